// Command sealed is the first process of a virtual machine whose kernel and file system
// have fs-verity: the guest's half of TestSealed. The disk has /shale, /image, an image, and
// /files, what is in it. It says on the console, in lines that begin with "sealed: ", "ok
// WHAT" for each part that went well, "FAIL WHY", and at last "end".
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/e2e/guest"
	"github.com/shale-image/shale/pool"
)

const (
	disk = "/disk"
	root = disk + "/root"
	ref  = "oci:" + disk + "/image"
	mnt  = "/mnt"
	// patience is how long a service may take to seal what is complete, in a machine
	// that is emulated.
	patience = 4 * time.Minute
)

func main() {
	err := errors.Join(guest.SetUp(disk), os.MkdirAll(mnt, 0o755))
	if err == nil {
		err = run()
	}
	if err != nil {
		log, _ := os.ReadFile(root + "/daemon.log")
		say("FAIL %v\n%s", err, log)
	}
	say("end")
	guest.Stay()
}

func say(format string, args ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		fmt.Printf("sealed: %s\n", strings.TrimSpace(line))
	}
}

// part is one thing to show.
type part struct {
	name string
	do   func() error
}

func run() error {
	for _, p := range []part{
		{"a complete image is sealed below its direct mount", sealedBelow},
		{"a direct mount reads it whole", func() error { return read(false) }},
		{"damage is EIO below a direct mount", damagedBelow},
		{"scrub mends it", scrubbed},
		{"a reader that the service serves gets it all the same", served},
		{"fsck tells, and repairs", checked},
		{"rmi takes what is sealed", removed},
	} {
		if err := p.do(); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		say("ok %s", p.name)
	}
	return nil
}

// shale runs the program, and returns its standard output.
func shale(args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.Command(disk+"/shale", append([]string{"--root", root}, args...)...)
	cmd.Env = []string{"PATH=/", "HOME=/tmp"}
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("shale %s: %w: %s", strings.Join(args, " "), err, &errs)
	}
	return out.String(), nil
}

func mount(face string) error {
	_, err := shale("mount", "--face", face, ref, mnt)
	return err
}

func complete() error {
	_, err := shale("pull", "-q", "--complete", ref)
	return err
}

// segments returns how many there are, and how many of these are sealed.
func segments() (all, sealed int, err error) {
	js, err := shale("df", "--json")
	var d daemon.Disk
	if err == nil {
		err = json.Unmarshal([]byte(js), &d)
	}
	return d.Pool.Segments, d.Pool.Sealed, err
}

// await waits until all segments are sealed, or none.
func await(sealed bool) error {
	for end := time.Now().Add(patience); ; time.Sleep(time.Second) {
		all, n, err := segments()
		if err != nil || all > 0 && (sealed && n == all || !sealed && n == 0) {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d of %d segments are sealed", n, all)
		}
	}
}

func sealedBelow() error {
	if err := errors.Join(complete(), mount("direct")); err != nil {
		return err
	}
	if err := await(true); err != nil {
		return err
	}
	for _, path := range data() {
		if f, err := os.OpenFile(path, os.O_RDWR, 0); !errors.Is(err, unix.EPERM) {
			f.Close()
			return fmt.Errorf("%s can be written: %v", path, err)
		}
	}
	return nil
}

func data() []string {
	all, _ := filepath.Glob(root + "/pool/segments/*/data")
	return all
}

func forget() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// read reads all of what is mounted, from the disk, in pieces. Nothing may differ; some
// reads must fail, or none may.
func read(fails bool) error {
	if err := forget(); err != nil {
		return err
	}
	failed := 0
	err := filepath.WalkDir(disk+"/files", func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		want, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := os.Open(filepath.Join(mnt, strings.TrimPrefix(path, disk+"/files")))
		if err != nil {
			return err
		}
		defer f.Close()
		buf := make([]byte, 128<<10)
		for off := 0; off < len(want); {
			n, err := f.ReadAt(buf[:min(len(buf), len(want)-off)], int64(off))
			if !bytes.Equal(buf[:n], want[off:off+n]) {
				return fmt.Errorf("%s: wrong bytes in the %d at offset %d", f.Name(), n, off)
			}
			off += n
			if errors.Is(err, unix.EIO) {
				failed++
				off = off&^4095 + 4096
			} else if err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && (failed > 0) != fails {
		err = fmt.Errorf("%d reads failed", failed)
	}
	return err
}

// damage changes a bit on the disk, below the file system, in the middle of a 128 KiB
// piece of every segment.
func damage() error {
	if err := forget(); err != nil {
		return err
	}
	raw, err := os.OpenFile("/dev/vda", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer raw.Close()
	const page, at = 4096, 19 // the page that is changed
	var files []*os.File
	for _, path := range data() {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		files = append(files, f)
		want, got := make([]byte, page), make([]byte, page)
		if _, err := f.ReadAt(want, at*page); err != nil {
			return err
		}
		const fibmap = 1 // FIBMAP, which takes a block's number and returns the disk's
		block := int32(at)
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fibmap, uintptr(unsafe.Pointer(&block))); e != 0 {
			return e
		}
		if _, err := raw.ReadAt(got, int64(block)*page); err != nil || !bytes.Equal(got, want) {
			return fmt.Errorf("block %d of the disk is not page %d of %s: %v", block, at, path, err)
		}
		got[1234] ^= 1
		if _, err := raw.WriteAt(got, int64(block)*page); err != nil {
			return err
		}
	}
	if err := raw.Sync(); err != nil {
		return err
	}
	for _, f := range files {
		if err := forgetPage(f, at*page); err != nil {
			return err
		}
	}
	return nil
}

// forgetPage has the kernel forget what it has cached of all files, and makes sure of one
// page: the kernel keeps one that is in use, as it may be just after it was read.
func forgetPage(f *os.File, off int) error {
	m, err := unix.Mmap(int(f.Fd()), int64(off), os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(m)
	for range 100 {
		if err := forget(); err != nil {
			return err
		}
		var cached byte
		if _, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&cached))); e != 0 {
			return e
		}
		if cached&1 == 0 {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("%s: the kernel does not forget what is at %d", f.Name(), off)
}

func damagedBelow() error {
	if err := errors.Join(damage(), read(true), unix.Unmount(mnt, 0)); err != nil {
		return err
	}
	// What is mounted now, too.
	return errors.Join(mount("direct"), read(true), unix.Unmount(mnt, 0))
}

func scrubbed() error {
	js, err := shale("scrub", "--json")
	var found struct {
		Problems []pool.Problem `json:"problems"`
	}
	if e := json.Unmarshal([]byte(js), &found); e != nil {
		return errors.Join(err, e)
	}
	if len(found.Problems) != len(data()) || !found.Problems[0].Dropped {
		return fmt.Errorf("found: %s", js)
	}
	return errors.Join(await(false), complete(), mount("direct"), read(false), unix.Unmount(mnt, 0), await(true))
}

func served() error {
	err := mount("device")
	if err != nil { // before Linux 6.12 there is none
		err = mount("fuse")
	}
	if err := errors.Join(err, damage(), read(false)); err != nil {
		return err
	}
	return errors.Join(await(false), read(false), unix.Unmount(mnt, 0), complete(), await(true))
}

func checked() error {
	if err := end(); err != nil {
		return err
	}
	if err := damage(); err != nil {
		return err
	}
	if out, err := shale("fsck"); err == nil {
		return fmt.Errorf("fsck finds nothing: %s", out)
	}
	out, _ := shale("fsck", "--repair")
	if again, err := shale("fsck"); err != nil {
		return fmt.Errorf("after a repair that said %q: %w: %s", out, err, again)
	}
	return errors.Join(complete(), mount("direct"), read(false), unix.Unmount(mnt, 0), await(true))
}

// end ends the service.
func end() error {
	c := &daemon.Client{Root: root}
	var err error
	for range 100 {
		if err = c.Stop(context.Background()); err != nil && !strings.Contains(err.Error(), "in use") {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("the service does not end: %w", err)
}

func removed() error {
	if _, err := shale("rmi", ref); err != nil {
		return err
	}
	all, _, err := segments()
	if all != 0 || len(data()) != 0 {
		return fmt.Errorf("%d segments are left, %d files: %w", all, len(data()), err)
	}
	return err
}
