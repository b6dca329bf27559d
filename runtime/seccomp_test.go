package runtime

import (
	"bufio"
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// decide interprets a filter as the kernel would.
func decide(t *testing.T, prog []unix.SockFilter, audit, nr uint32, arg0 uint64) uint32 {
	t.Helper()
	data := binary.NativeEndian.AppendUint32(nil, nr)
	data = binary.NativeEndian.AppendUint32(data, audit)
	data = append(data, make([]byte, 8)...)
	data = binary.NativeEndian.AppendUint64(data, arg0)
	var acc uint32
	for pc := 0; ; pc++ {
		in := prog[pc]
		taken := false
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			acc = binary.NativeEndian.Uint32(data[in.K:])
			continue
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(in.K)
			continue
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			taken = acc == in.K
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			taken = acc > in.K
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			taken = acc >= in.K
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			taken = acc&in.K != 0
		default:
			t.Fatalf("instruction %d: code %#x", pc, in.Code)
		}
		if taken {
			pc += int(in.Jt)
		} else {
			pc += int(in.Jf)
		}
	}
}

// TestFilter compares what the program says with the table it is made from,
// for every number of every abi.
func TestFilter(t *testing.T) {
	for _, list := range [][]abi{
		{{unix.AUDIT_ARCH_X86_64, "", 1}, {unix.AUDIT_ARCH_I386, "", 2}},
		{{unix.AUDIT_ARCH_AARCH64, "", 3}},
	} {
		prog := filter(list)
		if len(prog) > 4096 {
			t.Errorf("%d instructions, the kernel takes 4096", len(prog))
		}
		for _, a := range list {
			byName, byNumber, last := map[string]int{}, map[int]string{}, 0
			syscalls(a.column, func(name string, nr int, restricted bool) {
				if nr >= 0 {
					byName[name], byNumber[nr], last = nr, name, max(last, nr)
				}
			})
			for nr := range last + 50 {
				want := uint32(unix.SECCOMP_RET_ALLOW)
				if name := byNumber[nr]; nr > last || name == "clone3" {
					want = fail(unix.ENOSYS).K
				} else if name == "" {
					want = fail(unix.EPERM).K
				}
				if got := decide(t, prog, a.audit, uint32(nr), 0); got != want {
					t.Errorf("%#x: call %d (%s): %#x, want %#x", a.audit, nr, byNumber[nr], got, want)
				}
			}
			for _, c := range []struct {
				name string
				arg  uint64
				ok   bool
			}{
				{"clone", uint64(unix.SIGCHLD), true}, {"clone", unix.CLONE_THREAD | unix.CLONE_VM, true},
				{"clone", unix.CLONE_NEWUSER | uint64(unix.SIGCHLD), false}, {"clone", unix.CLONE_NEWNS | 1<<32, false},
				{"socket", unix.AF_INET, true}, {"socket", unix.AF_VSOCK, false}, {"socket", unix.AF_VSOCK | 1<<32, false},
				{"personality", 0xffffffff, true}, {"personality", 0x20008, true}, {"personality", 0x0400000, false},
			} {
				got := decide(t, prog, a.audit, uint32(byName[c.name]), c.arg)
				if (got == unix.SECCOMP_RET_ALLOW) != c.ok {
					t.Errorf("%#x: %s(%#x): %#x", a.audit, c.name, c.arg, got)
				}
			}
			for _, name := range []string{"read", "openat", "execve", "exit_group", "ptrace", "chroot", "rseq"} {
				if _, ok := byName[name]; !ok {
					t.Errorf("%#x: %s is missing", a.audit, name)
				}
			}
		}
		if got := decide(t, prog, 0xdead, 0, 0); got != fail(unix.ENOSYS).K {
			t.Errorf("unknown processor: %#x", got)
		}
	}
	for _, name := range []string{"mount", "bpf", "unshare", "setns", "io_uring_setup", "kexec_load", "init_module", "keyctl", "reboot"} {
		if strings.Contains(syscallTable, "\n"+name+" ") {
			t.Errorf("%s is allowed", name)
		}
	}
}

// TestSyscallNumbers compares the table with the kernel's headers.
func TestSyscallNumbers(t *testing.T) {
	for column, header := range map[int]string{1: "unistd_64.h", 2: "unistd_32.h"} {
		f, err := os.Open("/usr/include/x86_64-linux-gnu/asm/" + header)
		if err != nil {
			t.Skip("needs amd64 kernel headers: Debian's linux-libc-dev")
		}
		defer f.Close()
		numbers := map[string]int{}
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if f := strings.Fields(sc.Text()); len(f) == 3 && f[0] == "#define" {
				if n, err := strconv.Atoi(f[2]); err == nil {
					numbers[strings.TrimPrefix(f[1], "__NR_")] = n
				}
			}
		}
		syscalls(column, func(name string, nr int, _ bool) {
			if want, ok := numbers[name]; ok && nr != want || !ok && nr >= 0 && nr < 450 && name != "uretprobe" {
				t.Errorf("%s: %s is %d, the header has %d (%v)", header, name, nr, want, ok)
			}
		})
	}
}

// exit386 is a static 386 program that exits with code 7.
func exit386() []byte {
	code := []byte{0xb8, 1, 0, 0, 0, 0xbb, 7, 0, 0, 0, 0xcd, 0x80} // mov eax,1; mov ebx,7; int 0x80
	const base, header = 0x08048000, 52 + 32
	le := binary.LittleEndian
	b := append([]byte("\x7fELF\x01\x01\x01"), make([]byte, 9)...)
	for _, v := range []uint16{2, 3} { // executable, 386
		b = le.AppendUint16(b, v)
	}
	for _, v := range []uint32{1, base + header, 52, 0, 0} {
		b = le.AppendUint32(b, v)
	}
	for _, v := range []uint16{52, 32, 1, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	size := uint32(header + len(code))
	for _, v := range []uint32{1, 0, base, base, size, size, 5, 4096} { // one read-exec segment
		b = le.AppendUint32(b, v)
	}
	return append(b, code...)
}

func TestSeccomp(t *testing.T) {
	if abis() == nil {
		t.Skip("no profile for this processor")
	}
	eachRuntime(t, func(t *testing.T, path string) {
		r := newRuns(t, path)
		if err := os.Symlink("busybox", filepath.Join(r.lower.Name(), "bin/unshare")); err != nil {
			t.Fatal(err)
		}
		r.run(t, Config{}, "unshare -U true 2>&1; chroot / /bin/true && echo ok").
			want(t, 0, "unshare: unshare(0x10000000): Operation not permitted\nok\n")
		if abis()[0].column != 1 {
			return
		}
		name := filepath.Join(r.lower.Name(), "exit386")
		write(t, name, string(exit386()), 0o755)
		if got := exitCode(name); got != 7 {
			t.Skip("this kernel runs no 386 programs: ", got)
		}
		r.run(t, Config{Args: []string{"/exit386"}}, "").want(t, 7, "")
	})
}

func exitCode(name string) int {
	p, err := os.StartProcess(name, []string{name}, &os.ProcAttr{})
	if err != nil {
		return -1
	}
	s, err := p.Wait()
	if err != nil {
		return -1
	}
	return s.ExitCode()
}
