package e2e

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// machine is an emulated computer with a kernel, one program and a disk.
type machine struct {
	qemu, kernel, initrd string
}

// What a kernel with drivers in modules needs for a virtio disk, loop devices, FUSE and
// EROFS, in this order.
var modules = []string{
	"drivers/virtio/virtio_ring.ko", "drivers/virtio/virtio.ko", "drivers/virtio/virtio_pci_legacy_dev.ko",
	"drivers/virtio/virtio_pci_modern_dev.ko", "drivers/virtio/virtio_pci.ko", "drivers/block/virtio_blk.ko",
	"arch/x86/crypto/crc32c-intel.ko", "lib/libcrc32c.ko", "lib/lz4/lz4_decompress.ko", "fs/netfs/netfs.ko",
	"drivers/block/loop.ko", "fs/fuse/fuse.ko", "fs/erofs/erofs.ko",
}

// newMachine makes a machine whose first process is the program of a package. It skips
// the test if something is missing. SHALE_TEST_KERNEL names the kernel to boot,
// BOOT/vmlinuz-VERSION; its modules are then those in BOOT/../lib/modules/VERSION.
// Modules must not be compressed.
func newMachine(t *testing.T, program string) *machine {
	t.Helper()
	const install = "; apt-get install qemu-system-x86 e2fsprogs linux-image-cloud-amd64, or set SHALE_TEST_KERNEL to the vmlinuz of that package, unpacked somewhere"
	m := &machine{kernel: os.Getenv("SHALE_TEST_KERNEL")}
	var err error
	if m.qemu, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("%v%s", err, install)
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skipf("%v%s", err, install)
	}
	if m.kernel == "" {
		all, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
		if err != nil || len(all) == 0 {
			t.Skipf("no /boot/vmlinuz-*-cloud-amd64%s", install)
		}
		m.kernel = all[len(all)-1]
	}
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-o", init, program)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	kernel := filepath.Join(filepath.Dir(m.kernel), "../lib/modules",
		strings.TrimPrefix(filepath.Base(m.kernel), "vmlinuz-"), "kernel")
	var a archive
	a.add("init", 0o100755, read(t, init))
	for _, dir := range []string{"dev", "proc", "disk", "modules"} {
		a.add(dir, 0o040755, nil)
	}
	for i, name := range modules {
		b, err := os.ReadFile(filepath.Join(kernel, name))
		if errors.Is(err, os.ErrNotExist) {
			continue // built in; if not, the machine says what it lacks
		} else if err != nil {
			t.Fatal(err)
		}
		a.add(fmt.Sprintf("modules/%02d.ko", i), 0o100644, b)
	}
	a.add("TRAILER!!!", 0, nil)
	m.initrd = filepath.Join(dir, "initrd")
	if err := os.WriteFile(m.initrd, a.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return m
}

// archive is a cpio archive of the kind that kernels unpack, "newc".
type archive struct{ bytes.Buffer }

func (a *archive) add(name string, mode uint32, data []byte) {
	links := 1
	fmt.Fprintf(a, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.Len(), mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.WriteString(name + "\x00")
	a.pad()
	a.Write(data)
	a.pad()
}

func (a *archive) pad() { a.Write(make([]byte, -a.Len()&3)) }

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// newDisk makes a file system in a file, with what options say.
func (m *machine) newDisk(t *testing.T, options ...string) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	args := append([]string{"-q", "-F", "-b", "4096", "-O", "verity"}, options...)
	command(t, "mkfs.ext4", append(args, disk, "512M")...)
	return disk
}

// vm is a machine that runs.
type vm struct {
	cmd   *exec.Cmd
	lines chan string // of the console; closed when the machine is off
	errs  bytes.Buffer
	err   error // how it ended; when lines is closed
}

// boot starts the machine with a disk, given as the value of -blockdev.
func (m *machine) boot(t *testing.T, round int, disk string) *vm {
	t.Helper()
	v := &vm{lines: make(chan string, 10_000)}
	v.cmd = exec.Command(m.qemu, "-accel", "tcg", "-machine", "pc", "-cpu", "max", "-smp", "2", "-m", "512",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", m.kernel, "-initrd", m.initrd,
		"-append", fmt.Sprintf("console=ttyS0 quiet panic=-1 powercut.round=%d", round),
		"-blockdev", disk,
		"-device", "virtio-blk-pci,drive=disk,discard=off,write-zeroes=off")
	v.cmd.Stderr = &v.errs
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(v.lines)
		// A line that the cut left without its end is none.
		for r := bufio.NewReader(out); ; {
			line, err := r.ReadString('\n')
			if err != nil {
				v.err = v.cmd.Wait()
				return
			}
			v.lines <- strings.TrimSpace(line)
		}
	}()
	t.Cleanup(func() {
		v.kill()
		for range v.lines {
		}
	})
	return v
}

// kill ends the machine at once. What it said may still be read.
func (v *vm) kill() { v.cmd.Process.Kill() }

// quit ends the machine as abruptly, but has the emulator finish what it was
// asked to write.
func (v *vm) quit(t *testing.T) {
	t.Helper()
	v.cmd.Process.Signal(syscall.SIGTERM)
	defer time.AfterFunc(patience, v.kill).Stop()
	for range v.lines {
	}
	if v.err != nil {
		t.Fatalf("the emulator: %v\n%s", v.err, &v.errs)
	}
}

// write is an entry of a log of writes.
type write struct {
	off   int64
	data  []byte
	flush bool // writes before it are on the disk for good
}

type writeLog []write

// readWriteLog reads those entries of a log in the format of the kernel's
// dm-log-writes that begin before end. Little-endian, in sectors of 512 bytes:
// a superblock (magic u64, version u64, entries u64, sector size u32), then for
// each entry a sector with the header (first sector u64, sectors u64, flags u64,
// size of a mark u64) and the data. Flag 1 is a flush, before the data if it has
// any, 2 is FUA, 4 a discard, 8 a mark.
func readWriteLog(name string, end int64) (log writeLog, err error) {
	const sector, magic = 512, 0x6a736677736872
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var h struct{ First, Count, Flags, Mark uint64 }
	for off := int64(0); off < end; {
		err := binary.Read(io.NewSectionReader(f, off, sector), binary.LittleEndian, &h)
		if err != nil {
			return nil, fmt.Errorf("%s: at %d: %w", name, off, err)
		}
		if off == 0 {
			if h.First != magic || h.Count != 1 {
				return nil, fmt.Errorf("%s: magic %x, version %d", name, h.First, h.Count)
			}
			off += sector
			continue
		}
		if h.Flags&^1 != 0 || h.Count > 1<<20 || h.Flags == 0 && h.Count == 0 {
			return nil, fmt.Errorf("%s: at %d: an entry with flags %d and %d sectors", name, off, h.Flags, h.Count)
		}
		off += sector
		if h.Flags&1 != 0 {
			log = append(log, write{flush: true})
		}
		if h.Count > 0 {
			w := write{off: int64(h.First) * sector, data: make([]byte, h.Count*sector)}
			if _, err := f.ReadAt(w.data, off); err != nil {
				return nil, fmt.Errorf("%s: at %d: %w", name, off, err)
			}
			log = append(log, w)
		}
		off += int64(h.Count) * sector
	}
	return log, nil
}

// replay does to a disk what the log says, except that writes after the last
// flush may be lost, each sector of them for itself.
func (log writeLog) replay(r *rand.Rand, disk string) (kept, lost int, err error) {
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	flushed := len(log)
	for flushed > 0 && !log[flushed-1].flush {
		flushed--
	}
	odds := r.IntN(5)
	for i, w := range log {
		if i < flushed {
			if _, err := f.WriteAt(w.data, w.off); err != nil {
				return 0, 0, err
			}
			continue
		}
		// ext4 does not survive if half of its superblock is written, which it
		// writes in place; disks have larger sectors in fact.
		size := 512
		if w.off < 4096 {
			size = len(w.data)
		}
		for at := 0; at < len(w.data); at += size {
			if r.IntN(4) >= odds {
				lost++
				continue
			}
			kept++
			if _, err := f.WriteAt(w.data[at:min(at+size, len(w.data))], w.off+int64(at)); err != nil {
				return 0, 0, err
			}
		}
	}
	return kept, lost, nil
}
