package runtime

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// defaultDevices are the character devices a container may open; the OCI
// runtimes themselves make the nodes. It may make any node, as Docker lets it,
// but open none but these.
var defaultDevices = []struct{ major, minor int64 }{
	{1, 3},           // null
	{1, 5},           // zero
	{1, 7},           // full
	{1, 8},           // random
	{1, 9},           // urandom
	{5, 0},           // tty
	{5, 1},           // console
	{5, 2},           // ptmx
	{136, anyDevice}, // pts/*
}

const anyDevice = -1

// deviceRules returns defaultDevices as rules for an OCI runtime.
func deviceRules() []specs.LinuxDeviceCgroup {
	rules := []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Access: "m"},
		{Allow: true, Type: "b", Access: "m"},
	}
	for _, d := range defaultDevices {
		r := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &d.major, Access: "rwm"}
		if d.minor != anyDevice {
			r.Minor = &d.minor
		}
		rules = append(rules, r)
	}
	return rules
}

// deviceFilter returns defaultDevices as an eBPF program. Its argument points
// to three 32-bit words: the type in the lower half and the access in the
// upper half of the first, major, minor. It returns 1 for yes.
func deviceFilter() []byte {
	const ( // operations: class, source, mode
		load  = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
		and   = 0x07 | unix.BPF_AND | unix.BPF_K // 64 bits
		right = 0x07 | unix.BPF_RSH | unix.BPF_K
		move  = 0x07 | 0xb0 | unix.BPF_K
		copy  = 0x07 | 0xb0 | unix.BPF_X
		jeq   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		jne   = unix.BPF_JMP | 0x50 | unix.BPF_K
		exit  = unix.BPF_JMP | 0x90
	)
	const result, arg, typ, access, major, minor = 0, 1, 2, 3, 4, 5 // registers
	var prog []byte
	op := func(code, dst, src byte, off int16, imm int64) {
		prog = append(prog, code, src<<4|dst)
		prog = binary.NativeEndian.AppendUint16(prog, uint16(off))
		prog = binary.NativeEndian.AppendUint32(prog, uint32(imm))
	}
	yes := func() { op(move, result, 0, 0, 1); op(exit, 0, 0, 0, 0) }
	no := func() { op(move, result, 0, 0, 0); op(exit, 0, 0, 0, 0) }

	op(load, typ, arg, 0, 0)
	op(copy, access, typ, 0, 0)
	op(right, access, 0, 0, 16)
	op(and, typ, 0, 0, 0xffff)
	op(load, major, arg, 4, 0)
	op(load, minor, arg, 8, 0)
	op(jne, access, 0, 2, unix.BPF_DEVCG_ACC_MKNOD)
	yes()
	op(jeq, typ, 0, 2, unix.BPF_DEVCG_DEV_CHAR)
	no()
	for _, d := range defaultDevices {
		if d.minor == anyDevice {
			op(jne, major, 0, 2, d.major)
		} else {
			op(jne, major, 0, 3, d.major)
			op(jne, minor, 0, 2, d.minor)
		}
		yes()
	}
	no()
	return prog
}

// deviceCgroup makes a cgroup in the unified hierarchy that has no limits but
// the device filter. init is born into it (CLONE_INTO_CGROUP), which costs
// nothing, while attaching a running process waits for an RCU grace period:
// 10 ms on an idle machine of two cores.
func deviceCgroup(id string) (cgroup *os.File, err error) {
	root, err := unifiedRoot()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	name := deviceCgroupName(id)
	if err := unix.Mkdirat(int(root.Fd()), name, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			_ = unix.Unlinkat(int(root.Fd()), name, unix.AT_REMOVEDIR)
		}
	}()
	fd, err := unix.Openat(int(root.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open cgroup %s: %w", name, err)
	}
	cgroup = os.NewFile(uintptr(fd), name)
	if err := attachFilter(fd, deviceFilter()); err != nil {
		cgroup.Close()
		return nil, fmt.Errorf("device filter: %w", err)
	}
	return cgroup, nil
}

func deviceCgroupName(id string) string { return "shale-" + id + "-init" }

// unifiedRoot opens the root of the unified hierarchy where the host has it,
// or else mounts it for this purpose alone, attached nowhere, which takes
// another 10 ms.
func unifiedRoot() (*os.File, error) {
	for _, dir := range []string{cgroupRoot, cgroupRoot + "/unified"} {
		f, err := os.OpenFile(dir, unix.O_DIRECTORY, 0)
		if err != nil {
			continue
		}
		var fs unix.Statfs_t
		if unix.Fstatfs(int(f.Fd()), &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC && fs.Flags&unix.ST_RDONLY == 0 {
			return f, nil
		}
		f.Close()
	}
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount cgroup2: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("mount cgroup2: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount cgroup2: %w", err)
	}
	return os.NewFile(uintptr(fd), "cgroup2"), nil
}

// removeDeviceCgroup removes a container's device cgroup; it is no error if
// there is none.
func removeDeviceCgroup(id string) error {
	root, err := unifiedRoot()
	if err != nil {
		return nil // then there cannot be one
	}
	defer root.Close()
	return whileBusy(func() error {
		err := unix.Unlinkat(int(root.Fd()), deviceCgroupName(id), unix.AT_REMOVEDIR)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	})
}

// attachFilter loads a device program and attaches it to a cgroup, which then
// owns it.
func attachFilter(cgroup int, prog []byte) error {
	license := []byte("Apache-2.0\x00")
	load := struct { // union bpf_attr for BPF_PROG_LOAD
		progType, insnCnt uint32
		insns, license    unsafe.Pointer
		logLevel, logSize uint32
		logBuf            uint64
		kernVersion       uint32
		progFlags         uint32
	}{
		progType: unix.BPF_PROG_TYPE_CGROUP_DEVICE, insnCnt: uint32(len(prog) / 8),
		insns: unsafe.Pointer(&prog[0]), license: unsafe.Pointer(&license[0]),
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&load)), unsafe.Sizeof(load))
	if errno != 0 {
		return fmt.Errorf("load: %w", errno)
	}
	defer unix.Close(int(fd))
	attach := struct { // for BPF_PROG_ATTACH
		targetFD, progFD, attachType, attachFlags uint32
	}{uint32(cgroup), uint32(fd), unix.BPF_CGROUP_DEVICE, unix.BPF_F_ALLOW_MULTI}
	if _, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attach)), unsafe.Sizeof(attach)); errno != 0 {
		return fmt.Errorf("attach: %w", errno)
	}
	return nil
}
