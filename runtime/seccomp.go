package runtime

import (
	_ "embed"
	"encoding/base64"
	"encoding/binary"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// The seccomp profile is Docker's default for a container with the default
// capabilities: what syscalls.txt lists is allowed, all else fails with EPERM,
// and
//
//	clone        not with new namespaces
//	clone3       fails with ENOSYS, since its flags cannot be looked at;
//	             libraries then use clone
//	personality  only the harmless ones
//	socket       not AF_VSOCK, which reaches the hypervisor
//
// It is handed over twice. The OCI configuration has it by name, for runtimes
// in general. But crun has libseccomp compile it for every start, which takes
// 11 ms of 17, so it also gets the finished program, which it then prefers.
//
//go:embed syscalls.txt
var syscallTable string

// bpfAnnotation is crun's name for a finished program in base64.
const bpfAnnotation = "run.oci.seccomp_bpf_data"

// namespaceFlags are clone's CLONE_NEW* but time's, which clone does not know.
const namespaceFlags = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP

// personalities are Linux, Linux32, either with kernel version 2.6, and the
// query for the present one.
var personalities = []uint32{0, 0x0008, 0x20000, 0x20008, 0xffffffff}

// abi is a set of system call numbers a processor offers.
type abi struct {
	audit  uint32 // AUDIT_ARCH_*
	arch   specs.Arch
	column int // in syscallTable
}

// abis returns what a container's programs may be built for, the native one
// first; none on processors that syscallTable does not have.
func abis() []abi {
	switch goruntime.GOARCH {
	case "amd64":
		return []abi{{unix.AUDIT_ARCH_X86_64, specs.ArchX86_64, 1}, {unix.AUDIT_ARCH_I386, specs.ArchX86, 2}}
	case "arm64":
		return []abi{{unix.AUDIT_ARCH_AARCH64, specs.ArchAARCH64, 3}}
	}
	return nil
}

// syscalls calls fn for every line of syscallTable: a name, its number in the
// column or -1, and whether the call is restricted.
func syscalls(column int, fn func(name string, nr int, restricted bool)) {
	for line := range strings.Lines(syscallTable) {
		f := strings.Fields(line)
		if len(f) != 4 || f[0] == "#" {
			continue
		}
		name, restricted := strings.CutSuffix(f[0], "*")
		nr, err := strconv.Atoi(f[column])
		if err != nil {
			nr = -1
		}
		fn(name, nr, restricted)
	}
}

// seccomp returns the profile for the OCI configuration and its annotations;
// nil on processors that syscallTable does not have.
func seccomp() (*specs.LinuxSeccomp, map[string]string) {
	list := abis()
	if list == nil {
		return nil, nil
	}
	eperm, enosys := uint(unix.EPERM), uint(unix.ENOSYS)
	s := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: &eperm}
	for _, a := range list {
		s.Architectures = append(s.Architectures, a.arch)
	}
	var names []string
	syscalls(1, func(name string, _ int, restricted bool) {
		if !restricted {
			names = append(names, name)
		}
	})
	allow := func(name string, args ...specs.LinuxSeccompArg) {
		s.Syscalls = append(s.Syscalls, specs.LinuxSyscall{Names: []string{name}, Action: specs.ActAllow, Args: args})
	}
	s.Syscalls = []specs.LinuxSyscall{
		{Names: names, Action: specs.ActAllow},
		{Names: []string{"clone3"}, Action: specs.ActErrno, ErrnoRet: &enosys},
	}
	allow("clone", specs.LinuxSeccompArg{Value: namespaceFlags, Op: specs.OpMaskedEqual})
	allow("socket", specs.LinuxSeccompArg{Value: unix.AF_VSOCK, Op: specs.OpNotEqual})
	for _, p := range personalities {
		allow("personality", specs.LinuxSeccompArg{Value: uint64(p), Op: specs.OpEqualTo})
	}
	return s, map[string]string{bpfAnnotation: base64.StdEncoding.EncodeToString(encodeFilter(filter(list)))}
}

// Words of struct seccomp_data, by offset.
const (
	dataNR   = 0
	dataArch = 4
)

// dataArg0 returns the offset of the lower half of the first argument, which
// is all of it that the restricted calls look at.
func dataArg0() uint32 {
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		return 20
	}
	return 16
}

// filter returns the profile as a classic BPF program. The kernel runs it once
// for each call that depends on the number alone and remembers the outcome;
// the tree keeps the others short.
func filter(list []abi) []unix.SockFilter {
	prog := []unix.SockFilter{load(dataArch)}
	for _, a := range list {
		body := a.filter()
		prog = append(prog, jump(unix.BPF_JEQ, a.audit, 1, 0),
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(len(body))})
		prog = append(prog, body...)
	}
	return append(prog, fail(unix.ENOSYS))
}

// filter returns the part for one abi.
func (a abi) filter() []unix.SockFilter {
	var allowed []uint32
	prog := []unix.SockFilter{load(dataNR)}
	last := uint32(0)
	syscalls(a.column, func(name string, nr int, restricted bool) {
		if nr < 0 {
			return
		}
		last = max(last, uint32(nr))
		if !restricted {
			allowed = append(allowed, uint32(nr))
			return
		}
		rule := restriction(name)
		prog = append(prog, jump(unix.BPF_JEQ, uint32(nr), 0, uint8(len(rule))))
		prog = append(prog, rule...)
	})
	// Calls newer than the table (and x32's, far above) do not exist:
	// programs then do without them, while EPERM confuses some.
	prog = append(prog, jump(unix.BPF_JGT, last, 0, 1), fail(unix.ENOSYS))
	return append(prog, tree(spans(allowed))...)
}

// restriction returns what decides about a call of a restricted name.
func restriction(name string) []unix.SockFilter {
	switch name {
	case "clone":
		return []unix.SockFilter{load(dataArg0()), jump(unix.BPF_JSET, namespaceFlags, 0, 1), fail(unix.EPERM), allow}
	case "clone3":
		return []unix.SockFilter{fail(unix.ENOSYS)}
	case "socket":
		return []unix.SockFilter{load(dataArg0()), jump(unix.BPF_JEQ, unix.AF_VSOCK, 0, 1), fail(unix.EPERM), allow}
	case "personality":
		rule := []unix.SockFilter{load(dataArg0())}
		for _, p := range personalities {
			rule = append(rule, jump(unix.BPF_JEQ, p, 0, 1), allow)
		}
		return append(rule, fail(unix.EPERM))
	}
	panic("runtime: syscalls.txt restricts " + name)
}

type span struct{ first, last uint32 }

// spans joins neighbouring numbers.
func spans(nrs []uint32) []span {
	slices.Sort(nrs)
	var s []span
	for _, nr := range nrs {
		if n := len(s); n > 0 && s[n-1].last+1 >= nr {
			s[n-1].last = nr
		} else {
			s = append(s, span{nr, nr})
		}
	}
	return s
}

// tree returns a binary search for the number among the spans.
func tree(s []span) []unix.SockFilter {
	if len(s) == 1 {
		return []unix.SockFilter{jump(unix.BPF_JGE, s[0].first, 0, 2), jump(unix.BPF_JGT, s[0].last, 1, 0), allow, fail(unix.EPERM)}
	}
	half := len(s) / 2
	left, right := tree(s[:half]), tree(s[half:])
	prog := []unix.SockFilter{jump(unix.BPF_JGE, s[half].first, 0, 1),
		{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(len(left))}}
	return append(append(prog, left...), right...)
}

var allow = unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}

func fail(e unix.Errno) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(e)}
}

func load(off uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off}
}

func jump(op uint16, k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, Jt: yes, Jf: no, K: k}
}

// encodeFilter returns a program as the kernel reads it.
func encodeFilter(prog []unix.SockFilter) []byte {
	var b []byte
	for _, i := range prog {
		b = binary.NativeEndian.AppendUint16(b, i.Code)
		b = append(b, i.Jt, i.Jf)
		b = binary.NativeEndian.AppendUint32(b, i.K)
	}
	return b
}
