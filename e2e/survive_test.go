package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
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
	longest      [kinds]atomic.Int64 // ns
}

// What is timed.
const (
	aRead = iota // or the faults of 64 KiB of a mapping
	aCommand
	aRound // of a container: 20 files, each read by a command
	kinds
)

// note takes the time of a read, and its result.
func (l *load) note(kind int, began time.Time, name string, n int, right bool, err error) {
	for took := int64(time.Since(began)); ; {
		old := l.longest[kind].Load()
		if took <= old || l.longest[kind].CompareAndSwap(old, took) {
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
		l.note(aRead, began, name, n, bytes.Equal(buf[:n], want[off:off+n]), err)
	}
}

func (l *load) random(f *os.File, name string, want []byte, r *rand.Rand) {
	buf := make([]byte, 4096)
	for range 30 {
		off := r.IntN(len(want))
		n := min(len(buf), len(want)-off)
		began := time.Now()
		_, err := f.ReadAt(buf[:n], int64(off))
		l.note(aRead, began, name, n, bytes.Equal(buf[:n], want[off:off+n]), err)
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
		l.note(aRead, began, name, end-off, bytes.Equal(m[off:end], want[off:end]), nil) // a fault would end the test
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
		l.note(aCommand, began, "cat "+name, len(got), bytes.Equal(got, want), err)
	}
}

// contained runs a container that reads some files again and again, and tells their
// digest. It forgets what it has read.
func (l *load) contained(n *node, face, ref string, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	sum := sha256.New()
	var script strings.Builder
	fmt.Fprint(&script, "trap 'exit 0' TERM; while :; do (set -e")
	for range 20 {
		name := l.files[r.IntN(len(l.files))]
		want, err := os.ReadFile(filepath.Join(l.truth, name))
		if err != nil {
			l.t.Error(err)
			return
		}
		sum.Write(want)
		fmt.Fprintf(&script, "; dd status=none bs=64k iflag=nocache if='/%s'", name)
	}
	fmt.Fprint(&script, ") | sha256sum; done")
	cmd := exec.Command(n.w.shale, "run", "--rm", "--no-complete", "--face", face, ref, "sh", "-c", script.String())
	cmd.Env = append(os.Environ(), "SHALE_ROOT="+n.root)
	out, err := cmd.StdoutPipe()
	if err == nil {
		var errout bytes.Buffer
		cmd.Stderr = &errout
		defer func() {
			if errout.Len() > 0 {
				l.t.Errorf("container: %s", &errout)
			}
		}()
		err = cmd.Start()
	}
	if err != nil {
		l.t.Error(err)
		return
	}
	defer context.AfterFunc(l.ctx, func() { cmd.Process.Signal(unix.SIGTERM) })()
	lines, began := bufio.NewScanner(out), time.Now()
	for lines.Scan() {
		got, _, _ := strings.Cut(lines.Text(), " ")
		l.note(aRound, began, "files of a container", 0, got == fmt.Sprintf("%x", sum.Sum(nil)) || l.ctx.Err() != nil, nil)
		began = time.Now()
	}
	if err := cmd.Wait(); err != nil {
		l.t.Errorf("container: %v", err)
	}
}

// takeovers lists how long no worker served, each time, as the keeper has told.
func (n *node) takeovers() (all []time.Duration) {
	n.t.Helper()
	for _, name := range []string{"daemon.log.1", "daemon.log"} {
		log, _ := os.ReadFile(filepath.Join(n.root, name)) // the first is there only if there was much to say
		for _, m := range regexp.MustCompile(`msg="a worker serves".* nobody_did_for=(\S+)`).FindAllSubmatch(log, -1) {
			d, err := time.ParseDuration(string(m[1]))
			if err != nil {
				n.t.Fatal(err)
			}
			all = append(all, d)
		}
	}
	if len(all) > 0 {
		all = all[1:] // the service's own start
	}
	slices.Sort(all)
	return all
}

// TestSurvival kills the worker, and exchanges it, while containers' trees are read:
// SHALE_KILLS times, 20 by default. No read may fail, hang or be wrong.
func TestSurvival(t *testing.T) {
	for _, face := range []string{"device", "fanotify"} {
		t.Run(face, func(t *testing.T) { testSurvival(t, face) })
	}
}

// testSurvival leaves images incomplete, so that the service is needed to the end.
func testSurvival(t *testing.T, face string) {
	w := setup(t)
	n := w.node(t)
	// No proxy: who faults in a mapping holds a processor that a server in this process
	// would need to answer.
	host := w.registry.Host()
	mounts := []string{n.mnt, t.TempDir(), t.TempDir()}
	n.shale(0, "mount", "--no-complete", "--face", face, host+"/"+name, mounts[0])
	n.shale(0, "mount", "--no-complete", "--face", face, host+"/"+name, mounts[1])
	n.shale(0, "mount", "--no-complete", "--face", face, host+"/"+plainName, mounts[2])
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
	if _, err := exec.LookPath("runc"); err == nil {
		wg.Go(func() { l.contained(n, face, host+"/"+name, 100) })
		wg.Go(func() { l.contained(n, face, host+"/"+plainName, 101) })
	}
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 7)) // moments are no two times the same anyway
	killed, swapped := 0, 0
	for range kills {
		time.Sleep(time.Duration(50+r.IntN(500)) * time.Millisecond)
		if r.IntN(8) == 0 {
			n.shale(0, "upgrade")
			swapped++
			continue
		}
		for _, p := range n.asked().Processes {
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
	if len(st.Mounts) < len(mounts) || len(st.Mounts) > len(mounts)+2 {
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
	took := n.takeovers()
	if len(took) < kills/2 {
		t.Errorf("the keeper tells of %d takeovers", len(took))
	} else {
		t.Logf("%d takeovers: nobody served for %v (median), %v (99 of 100), %v at most", len(took), took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
	}
	longest := func(kind int) time.Duration { return time.Duration(l.longest[kind].Load()) }
	t.Logf("%d kills, %d swaps; %d reads of %d MB, the longest %v; of commands %v, of a container's rounds %v",
		killed, swapped, l.reads.Load(), l.bytes.Load()/1e6, longest(aRead), longest(aCommand), longest(aRound))
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
