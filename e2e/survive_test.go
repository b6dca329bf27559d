package e2e

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/daemon"
)

// load reads what is mounted in all ways there are, and compares with the truth all
// the time.
type load struct {
	t     *testing.T
	truth string
	files []string
	ctx   context.Context

	bytes, reads atomic.Int64
	longest      atomic.Int64 // ns: of one read, or one command
}

// note takes the time of a read, and its result.
func (l *load) note(began time.Time, name string, n int, right bool, err error) {
	for took := int64(time.Since(began)); ; {
		old := l.longest.Load()
		if took <= old || l.longest.CompareAndSwap(old, took) {
			break
		}
	}
	switch {
	case err != nil:
		l.t.Errorf("%s: %v", name, err)
	case !right:
		l.t.Errorf("%s: wrong bytes", name)
	}
	l.bytes.Add(int64(n))
	l.reads.Add(1)
}

// each calls read with files of a mount that the kernel has forgotten the data of.
func (l *load) each(mnt string, seed uint64, read func(f *os.File, name string, want []byte, r *rand.Rand)) {
	r := rand.New(rand.NewPCG(seed, 0))
	for l.ctx.Err() == nil {
		name := l.files[r.IntN(len(l.files))]
		want, err := os.ReadFile(filepath.Join(l.truth, name))
		if err != nil {
			l.t.Error(err)
			return
		}
		f, err := os.Open(filepath.Join(mnt, name))
		if err != nil {
			l.t.Errorf("%s: %v", name, err)
			return
		}
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		read(f, name, want, r)
		f.Close()
	}
}

func (l *load) sequential(f *os.File, name string, want []byte, _ *rand.Rand) {
	buf := make([]byte, 128<<10)
	for off := 0; off < len(want) && l.ctx.Err() == nil; off += len(buf) {
		n := min(len(buf), len(want)-off)
		began := time.Now()
		_, err := f.ReadAt(buf[:n], int64(off))
		l.note(began, name, n, bytes.Equal(buf[:n], want[off:off+n]), err)
	}
}

func (l *load) random(f *os.File, name string, want []byte, r *rand.Rand) {
	buf := make([]byte, 4096)
	for range 30 {
		off := r.IntN(len(want))
		n := min(len(buf), len(want)-off)
		began := time.Now()
		_, err := f.ReadAt(buf[:n], int64(off))
		l.note(began, name, n, bytes.Equal(buf[:n], want[off:off+n]), err)
	}
}

func (l *load) mapped(f *os.File, name string, want []byte, _ *rand.Rand) {
	m, err := unix.Mmap(int(f.Fd()), 0, len(want), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		l.t.Errorf("%s: %v", name, err)
		return
	}
	defer unix.Munmap(m)
	for off := 0; off < len(want); off += 64 << 10 {
		end := min(off+64<<10, len(want))
		began := time.Now()
		l.note(began, name, end-off, bytes.Equal(m[off:end], want[off:end]), nil) // a fault would end the test
	}
}

// commands runs programs of the image in it.
func (l *load) commands(mnt string, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	for l.ctx.Err() == nil {
		name := l.files[r.IntN(len(l.files))]
		began := time.Now()
		got, err := exec.Command("chroot", mnt, "/usr/bin/cat", "/"+name).Output()
		want, werr := os.ReadFile(filepath.Join(l.truth, name))
		if err == nil {
			err = werr
		}
		l.note(began, "cat "+name, len(got), bytes.Equal(got, want), err)
	}
}

// TestSurvival kills the worker, and exchanges it, while containers' trees are read:
// SHALE_KILLS times, 20 by default. No read may fail, hang or be wrong.
func TestSurvival(t *testing.T) {
	w := setup(t)
	n := w.node(t)
	// No proxy: who faults in a mapping holds a processor that a server in this process
	// would need to answer.
	host := w.registry.Host()
	mounts := []string{n.mnt, t.TempDir(), t.TempDir()}
	n.shale(0, "mount", "--face", "device", host+"/"+name, mounts[0])
	n.shale(0, "mount", "--face", "device", host+"/"+name, mounts[1])
	n.shale(0, "mount", "--face", "device", host+"/"+plainName, mounts[2])
	for _, m := range mounts[1:] {
		defer unix.Unmount(m, unix.MNT_DETACH)
	}
	kills := 20
	if s := os.Getenv("SHALE_KILLS"); s != "" {
		var err error
		if kills, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	l := &load{t: t, truth: w.truth, files: someFiles(t, w.truth, 400), ctx: ctx}
	var wg sync.WaitGroup
	for i, mnt := range mounts {
		seed := uint64(10 * i)
		wg.Go(func() { l.each(mnt, seed, l.sequential) })
		wg.Go(func() { l.each(mnt, seed+1, l.random) })
		wg.Go(func() { l.each(mnt, seed+2, l.mapped) })
		wg.Go(func() { l.commands(mnt, seed+3) })
	}
	r := rand.New(rand.NewPCG(7, 7))
	killed, swapped := 0, 0
	for range kills {
		time.Sleep(time.Duration(50+r.IntN(500)) * time.Millisecond)
		if r.IntN(8) == 0 {
			n.shale(0, "upgrade")
			swapped++
			continue
		}
		for _, p := range n.status().Processes {
			if p.Role == daemon.RoleWorker && unix.Kill(p.PID, unix.SIGKILL) == nil {
				killed++
			}
		}
	}
	cancel()
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("readers hang")
	}
	st := n.status()
	if len(st.Mounts) != len(mounts) {
		t.Errorf("%d mounts, want %d", len(st.Mounts), len(mounts))
	}
	for _, p := range st.Processes {
		if p.Role == daemon.RoleKeeper {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
			_, rss, _ := bytes.Cut(b, []byte("VmRSS:"))
			rss, _, _ = bytes.Cut(rss, []byte("\n"))
			t.Logf("keeper: %s", bytes.TrimSpace(rss))
		}
	}
	t.Logf("%d kills, %d swaps; %d reads of %d MB, the longest %v", killed, swapped, l.reads.Load(), l.bytes.Load()/1e6, time.Duration(l.longest.Load()))
}

// killAll kills all processes of a node's service at once.
func (n *node) killAll() {
	n.t.Helper()
	for _, p := range n.status().Processes {
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
			n.t.Fatal(err)
		}
	}
}
