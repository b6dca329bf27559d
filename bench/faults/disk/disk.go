// Package disk makes a disk that fails when it is told to: an ext4 file system on a
// loop device over a file of a FUSE file system of this process. So every read and
// write of the kernel passes here, journal and all, as with the kernel's own targets
// for that (device-mapper's error and flakey), which few test machines have.
//
//	reader -> ext4 -> loop device -> FUSE -> this process -> a sparse file
//
// It takes root, loop devices, FUSE, and mkfs.ext4. It must not know what is stored.
package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// ErrUnsupported is that this machine cannot have such a disk.
var ErrUnsupported = errors.New("no fault disk here")

// Disk is a mounted file system whose disk can fail. Its methods may be called
// concurrently.
type Disk struct {
	// Dir is the root of the file system, 0755.
	Dir string

	dir    string // of all that is here
	server *fuse.Server
	file   *file
}

// New makes a disk of so many bytes below a directory that it makes. The caller
// calls Close. An error that wraps ErrUnsupported says what is missing.
func New(ctx context.Context, dir string, size int64) (_ *Disk, err error) {
	for _, tool := range []string{"mkfs.ext4", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w: mounting needs root", ErrUnsupported)
	}
	d := &Disk{dir: dir, Dir: filepath.Join(dir, "mnt"), file: &file{size: size}}
	d.file.idle.L = &d.file.mu
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	back := filepath.Join(dir, "back")
	for _, name := range []string{dir, d.Dir, back} {
		if err := os.MkdirAll(name, 0o755); err != nil {
			return nil, err
		}
	}
	content, err := os.OpenFile(filepath.Join(dir, "content"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	d.file.content = content
	if err := content.Truncate(size); err != nil {
		return nil, err
	}
	if err := run(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", content.Name()); err != nil {
		return nil, err
	}
	d.server, err = fs.Mount(back, &root{file: d.file}, &fs.Options{MountOptions: fuse.MountOptions{
		DirectMountStrict: true, FsName: "faultdisk", Name: "faultdisk", MaxWrite: 128 << 10,
	}})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	if err := d.mount(ctx); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return d, nil
}

// mount mounts the disk. Whatever its options say, an aborted journal makes it
// read-only.
func (d *Disk) mount(ctx context.Context) error {
	return run(ctx, "mount", "-t", "ext4", "-o", "loop", filepath.Join(d.dir, "back", "disk"), d.Dir)
}

// Remount ends all faults and mounts the disk anew, as after a restart: what was never
// written to it is not there. Nobody may use it.
func (d *Disk) Remount(ctx context.Context) error {
	d.file.set(func(f *file) { f.reads, f.writes, f.hangs = false, false, false })
	if err := d.unmount(); err != nil {
		return err
	}
	if err := d.mount(ctx); err != nil {
		return err
	}
	return d.fill(false)
}

// unmount waits for those who have just ended.
func (d *Disk) unmount() (err error) {
	for range 50 {
		if err = unix.Unmount(d.Dir, unix.UMOUNT_NOFOLLOW); err != unix.EBUSY {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", d.Dir, err)
	}
	return nil
}

func run(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

// Close ends all faults, unmounts the disk and removes it.
func (d *Disk) Close() error {
	var errs []error
	d.file.set(func(f *file) { f.reads, f.writes, f.hangs = false, false, false })
	if err := d.unmount(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, err, unix.Unmount(d.Dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	if d.server != nil {
		back := filepath.Join(d.dir, "back")
		err := unix.Unmount(back, 0)
		for range 50 { // the loop device goes a moment after its mount
			if err == nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
			err = unix.Unmount(back, 0)
		}
		if err == nil {
			d.server.Wait()
		} else { // it serves for as long as somebody uses it
			errs = append(errs, fmt.Errorf("unmount %s: %w", back, err), unix.Unmount(back, unix.MNT_DETACH))
		}
	}
	if d.file.content != nil {
		errs = append(errs, d.file.content.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

// Fault begins or ends a fault:
//
//	disk full          no byte is free for users, if the disk takes anything at all
//	disk read errors   what the kernel has not in memory is EIO
//	disk write errors  what it writes back is EIO; after that of its journal the file system is read-only
//	disk hangs         neither is answered
//	disk read-only     the file system is, as after an error; this has no end but Close
func (d *Disk) Fault(kind string, on bool) error {
	switch kind {
	case "disk full":
		return d.fill(on)
	case "disk read errors":
		d.file.set(func(f *file) { f.reads = on })
		if on { // what is in memory is no test
			return d.forget()
		}
	case "disk write errors":
		d.file.set(func(f *file) { f.writes = on })
	case "disk hangs":
		d.file.set(func(f *file) { f.hangs = on })
	case "disk read-only":
		if on {
			if err := unix.Mount("", d.Dir, "", unix.MS_REMOUNT, "abort"); err != nil {
				return fmt.Errorf("remount %s: %w", d.Dir, err)
			}
		}
	default:
		return fmt.Errorf("%q: no such fault of a disk", kind)
	}
	return nil
}

// forget has the kernel forget what it has in memory of files.
func (d *Disk) forget() error {
	return filepath.WalkDir(d.Dir, func(name string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		f, err := os.Open(name)
		if err != nil {
			return nil // it has just gone
		}
		defer f.Close()
		_ = f.Sync()
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
}

// fails tells whether an error is what another fault of the disk brings about.
func fails(err error) bool { return errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) }

// fill takes all room that there is, or gives it back; what a disk that fails otherwise
// does not give back comes with Remount.
func (d *Disk) fill(on bool) error {
	name := filepath.Join(d.Dir, "ballast")
	if !on {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) && !fails(err) {
			return err
		}
		return nil
	}
	f, err := os.Create(name)
	if err != nil {
		if fails(err) {
			return nil
		}
		return err
	}
	defer f.Close()
	var end int64
	for step := int64(64 << 20); step >= 4096; {
		switch err := unix.Fallocate(int(f.Fd()), 0, end, step); {
		case err == nil:
			end += step
		case errors.Is(err, unix.ENOSPC):
			step /= 2
		case fails(err):
			return nil
		case !errors.Is(err, unix.EINTR):
			return fmt.Errorf("fallocate: %w", err)
		}
	}
	return nil
}

// file is the disk as a file.
type file struct {
	fs.Inode
	content *os.File
	size    int64

	mu                   sync.Mutex
	idle                 sync.Cond // signalled when something changes
	reads, writes, hangs bool      // what fails
}

func (f *file) set(fn func(*file)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn(f)
	f.idle.Broadcast()
}

// fails waits while the disk hangs, and tells whether a read or a write is to fail.
func (f *file) fails(write bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.hangs {
		f.idle.Wait()
	}
	return f.reads && !write || f.writes && write
}

var _ = (fs.NodeGetattrer)((*file)(nil))

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = syscall.S_IFREG|0o600, uint64(f.size)
	return 0
}

var _ = (fs.NodeOpener)((*file)(nil))

func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

var _ = (fs.NodeReader)((*file)(nil))

func (f *file) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if f.fails(false) {
		return nil, syscall.EIO
	}
	n, err := f.content.ReadAt(p[:max(0, min(int64(len(p)), f.size-off))], off)
	if err != nil {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(p[:n]), 0
}

var _ = (fs.NodeWriter)((*file)(nil))

func (f *file) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	if f.fails(true) {
		return 0, syscall.EIO
	}
	n, err := f.content.WriteAt(p, off)
	if err != nil {
		return 0, syscall.EIO
	}
	return uint32(n), 0
}

var _ = (fs.NodeFsyncer)((*file)(nil))

func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	if f.fails(true) {
		return syscall.EIO
	}
	return 0
}

// root has the disk as its only file.
type root struct {
	fs.Inode
	file *file
}

var _ = (fs.NodeOnAdder)((*root)(nil))

func (r *root) OnAdd(ctx context.Context) {
	r.AddChild("disk", r.NewPersistentInode(ctx, r.file, fs.StableAttr{Mode: syscall.S_IFREG}), false)
}
