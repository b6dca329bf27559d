package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fromEnvInt is a number from the environment.
func fromEnvInt(t *testing.T, name string, def int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// TestDeaths kills the whole service while it is read from, SHALE_DEATHS times, 3 by
// default: reads are right or fail from then on, and nobody hangs. After a mount anew
// all is right.
func TestDeaths(t *testing.T) {
	w := setup(t)
	files := someFiles(t, w.truth, 600)
	var failed, right int64
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	for i := range fromEnvInt(t, "SHALE_DEATHS", 3) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			n := w.node(t)
			ref := w.registry.Host() + "/" + []string{name, plainName}[i%2]
			n.shale(0, "mount", "--face", "device", ref, n.mnt)
			f, g := death(t, n, files, time.Duration(r.IntN(1500))*time.Millisecond, r)
			failed, right = failed+f, right+g
			n.shale(0, "umount", n.mnt)
			n.shale(0, "mount", "--face", "device", ref, n.mnt)
			for _, name := range files[:200] {
				if right, err := readLike(n.mnt, w.truth, name); err != nil || !right {
					t.Errorf("%s after a mount anew: right %v, %v", name, right, err)
				}
			}
		})
	}
	t.Logf("%d reads failed after the deaths, %d were right", failed, right)
	if failed == 0 {
		t.Error("no read failed: was everything in memory?")
	}
}

// death kills a service some time after its readers began, and returns how many reads
// failed and were right since.
func death(t *testing.T, n *node, files []string, after time.Duration, r *rand.Rand) (failed, right int64) {
	t.Helper()
	var f, g atomic.Int64
	var dead atomic.Bool
	var wg sync.WaitGroup
	list := r.Perm(len(files))
	for k := range 4 {
		wg.Go(func() {
			for j := k; j < len(list); j += 4 {
				killed := dead.Load()
				ok, err := readFresh(n.mnt, n.w.truth, files[list[j]])
				switch {
				case err == nil && !ok:
					t.Errorf("%s: wrong bytes", files[list[j]])
				case err != nil && !dead.Load():
					t.Errorf("before the end: %v", err)
				case err != nil && !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOTCONN):
					t.Error(err)
				case err != nil:
					f.Add(1)
				case killed:
					g.Add(1)
				}
			}
		})
	}
	processes := n.status().Processes
	time.Sleep(after)
	dead.Store(true)
	for _, p := range processes {
		if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("readers hang")
	}
	return f.Load(), g.Load()
}

// readFresh is readLike of what the kernel has forgotten, as far as it does.
func readFresh(got, want, name string) (bool, error) {
	if f, err := os.Open(filepath.Join(got, name)); err == nil {
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		f.Close()
	}
	return readLike(got, want, name)
}
