package fanotify

import (
	"bufio"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAnswers: what is not there is brought before it is read, what cannot be brought
// is EIO, and nothing is asked once the mark is gone.
func TestAnswers(t *testing.T) {
	g, f := marked(t, t.TempDir())
	x := newFiller(f)
	g.Serve(x)
	if err := check(f.Name(), 8*block, 4*block); err != nil {
		t.Error(err)
	}
	if err := check(f.Name(), 9*block, block); err != nil { // it is there now
		t.Error(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	file := File{st.Dev, st.Ino}
	if want := []Event{{file, 8 * block, 4 * block}, {file, 9 * block, block}}; !slices.Equal(x.asked(), want) {
		t.Errorf("asked %+v, want %+v", x.asked(), want)
	}
	x.fail.Store(true)
	if err := check(f.Name(), 0, block); !errors.Is(err, unix.EIO) {
		t.Errorf("%v, want EIO", err)
	}
	if p := make([]byte, block); x.f == nil {
		t.Error("no file")
	} else if _, err := x.f.ReadAt(p, 0); err != nil { // an old descriptor asks nobody
		t.Error(err)
	}
	if err := g.Unmark(f); err != nil {
		t.Error(err)
	}
	if err := g.Unmark(f); err != nil {
		t.Errorf("once more: %v", err)
	}
	asked := len(x.asked())
	if _, err := os.ReadFile(f.Name()); err != nil || len(x.asked()) != asked {
		t.Errorf("%v, asked %d more", err, len(x.asked())-asked)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

// TestManyWait: more readers than there are slots wait, and all get theirs.
func TestManyWait(t *testing.T) {
	if testing.Short() {
		t.Skip("a thousand threads")
	}
	g, f := marked(t, t.TempDir())
	release := make(chan struct{})
	x := newFiller(f)
	var asked atomic.Int64
	x.delay = func(Event) { asked.Add(1); <-release }
	g.Serve(x)
	var wg sync.WaitGroup
	for i := range int64(slots + 50) {
		wg.Go(func() {
			if err := check(f.Name(), i%(fileSize/block)*block, block); err != nil {
				t.Error(err)
			}
		})
	}
	for asked.Load() < slots {
		time.Sleep(time.Millisecond)
	}
	close(release)
	wg.Wait()
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

// TestTakeOver: readers who wait for a process that is killed are answered by the
// next, whatever numbers their events have.
func TestTakeOver(t *testing.T) {
	g, f := marked(t, t.TempDir())
	group, journal := g.Files()
	cmd := process(t, "hang", g, f)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	var wg sync.WaitGroup
	const readers = 20
	for i := range int64(readers) {
		wg.Go(func() {
			if err := check(f.Name(), i*block, block); err != nil {
				t.Error(err)
			}
		})
		lines.Scan()
	}
	kill(cmd)
	again, err := Take(group, journal, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if len(again.left) != readers {
		t.Errorf("%d events are left, want %d", len(again.left), readers)
	}
	for _, r := range again.left {
		if r.File.Inode == 0 {
			t.Error("the file of an event is not known")
		}
		if r.open >= 0 && r.open%2 == 0 { // so some numbers are used again
			unix.Close(r.open)
			r.open = -1
		}
	}
	x := newFiller(f)
	release := make(chan struct{})
	x.delay = func(e Event) {
		if e.Off < readers*block {
			<-release
		}
	}
	again.Serve(x)
	for i := range int64(readers) { // some of them wait for those before
		wg.Go(func() {
			if err := check(f.Name(), (100+i)*block, block); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	close(release)
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	within(t, "readers", done)
	again.reading.Lock()
	if len(again.old) != 0 {
		t.Errorf("%d numbers are not answered", len(again.old))
	}
	again.reading.Unlock()
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

// TestKilledAtAllMoments: processes that answer are killed one after the other, and
// no reader gets a wrong byte, an error, or nothing.
func TestKilledAtAllMoments(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 3 s")
	}
	g, f := marked(t, t.TempDir())
	var end atomic.Bool
	var reads atomic.Int64
	var wg sync.WaitGroup
	for i := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(2, i))
			for !end.Load() {
				n := 1 + r.Int64N(16)
				if err := check(f.Name(), r.Int64N(fileSize/block-n)*block, int(n)*block); err != nil {
					t.Error(err)
				}
				reads.Add(1)
			}
		})
	}
	start := func() *exec.Cmd {
		cmd := process(t, "serve", g, f)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	cmd := start()
	for i := range 60 {
		time.Sleep(time.Duration(10+i*7%30) * time.Millisecond)
		kill(cmd)
		cmd = start()
	}
	end.Store(true)
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	within(t, "readers", done)
	kill(cmd)
	t.Logf("%d reads", reads.Load())
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

// TestFileSystems: the same on those that raise such events.
func TestFileSystems(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			mkfs, err := exec.LookPath("mkfs." + fs)
			if err != nil {
				t.Skip(err)
			}
			disk, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
			if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 512<<20)); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(mkfs, disk).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if out, err := exec.Command("mount", "-o", "loop", disk, dir).CombinedOutput(); err != nil {
				t.Skipf("%v: %s", err, out)
			}
			defer unix.Unmount(dir, unix.MNT_DETACH)
			g, f := marked(t, dir)
			g.Serve(newFiller(f))
			if err := check(f.Name(), 0, fileSize); err != nil {
				t.Error(err)
			}
			f.Close()
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBadJournal: readers of whom a damaged journal does not tell get EIO, those of whom
// it does their bytes, and whoever comes afterwards too.
func TestBadJournal(t *testing.T) {
	const readers = 6
	for name, c := range map[string]struct {
		damage func(journal *os.File, slots []byte) error
		known  int
	}{
		"event": {func(journal *os.File, slots []byte) error {
			for i := range len(slots) / slotSize {
				if p := slots[i*slotSize:]; i > 0 && !slot(p).empty() {
					_, err := journal.WriteAt([]byte{1, 2, 3, 4, 5}, int64(i)*slotSize)
					return err
				}
			}
			return errors.New("no event")
		}, readers - 1},
		"magic": {func(journal *os.File, _ []byte) error { _, err := journal.WriteAt([]byte("x"), 0); return err }, 0},
		"size":  {func(journal *os.File, _ []byte) error { return journal.Truncate(100) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			g, f := marked(t, t.TempDir())
			group, journal := g.Files()
			cmd := process(t, "hang", g, f)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			var wg sync.WaitGroup
			var right, refused atomic.Int64
			for i := range int64(readers) {
				wg.Go(func() {
					switch err := check(f.Name(), i*block, block); {
					case err == nil:
						right.Add(1)
					case errors.Is(err, unix.EIO):
						refused.Add(1)
					default:
						t.Error(err)
					}
				})
				lines.Scan()
			}
			kill(cmd)
			if err := c.damage(journal, g.journal.mem); err != nil {
				t.Fatal(err)
			}
			again, err := Take(group, journal, quiet)
			if err != nil {
				t.Fatal(err)
			}
			again.Serve(newFiller(f))
			done := make(chan struct{})
			go func() { wg.Wait(); close(done) }()
			within(t, "readers", done)
			if int(right.Load()) != c.known || int(refused.Load()) != readers-c.known {
				t.Errorf("%d readers have right bytes, %d EIO; want %d and %d", right.Load(), refused.Load(), c.known, readers-c.known)
			}
			if err := check(f.Name(), 100*block, block); err != nil {
				t.Error(err)
			}
			if err := again.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// FuzzEvent: what the kernel writes is taken as it is, and anything else refused.
func FuzzEvent(f *testing.F) {
	good := make([]byte, eventSize)
	copy(good, []byte{eventSize, 0, 0, 0, unix.FANOTIFY_METADATA_VERSION, 0, metadataSize, 0})
	good[16] = 9 // fd
	copy(good[metadataSize:], []byte{infoRange, 0, rangeSize, 0})
	good[33], good[41] = 0x10, 0x20 // offset 4096, count 8192
	f.Add(good)
	f.Add(good[:metadataSize])
	f.Fuzz(func(t *testing.T, p []byte) {
		e, fd, ok, rest, err := parse(p)
		if err != nil {
			return
		}
		if len(rest) >= len(p) || ok && (e.Off < 0 || e.Size < 0) {
			t.Errorf("%+v, %d bytes left of %d", e, len(rest), len(p))
		}
		if string(p) == string(good) && (fd != 9 || e.Off != 4096 || e.Size != 8192 || !ok) {
			t.Errorf("%+v of fd %d, %v", e, fd, ok)
		}
	})
}
