package mount

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

func TestProbe(t *testing.T) {
	needRoot(t)
	c := Probe()
	t.Logf("%+v", c)
	out, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil || c.KernelRelease != strings.TrimSpace(string(out)) {
		t.Errorf("release %q, want %q (%v)", c.KernelRelease, out, err)
	}
	for name, have := range map[string]bool{
		"DetachedFUSE": c.DetachedFUSE, "FileBackedEROFS": c.FileBackedEROFS,
		"Loop": c.Loop, "Fanotify": c.Fanotify, "Resend": c.Resend,
		"Fusermount": c.Fusermount, "TellsErrors": c.TellsErrors,
	} {
		if _, told := c.Why[name]; have == told {
			t.Errorf("%s is %v, and a reason is given: %v", name, have, told)
		}
	}
	// What the tests of this package do must agree.
	if !c.Device() || !c.DetachedFUSE {
		t.Errorf("Device works in other tests, not in Probe: %v", c.Why)
	}
}

// Without rights nothing works, and the reasons say so.
func TestProbeUnprivileged(t *testing.T) {
	needRoot(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=probe")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Skipf("cannot run as nobody: %v %s", err, out)
	}
	t.Logf("%s", out)
	if strings.Contains(strings.ReplaceAll(string(out), "Fusermount:true", ""), "true") || strings.Count(string(out), "denied")+strings.Count(string(out), "not permitted") < 5 { // fusermount3 may work
		t.Errorf("as nobody: %s", out)
	}
}

// fsck.erofs agrees that the probe's image is one.
func TestProbeImage(t *testing.T) {
	if _, err := exec.LookPath("fsck.erofs"); err != nil {
		t.Skip("needs fsck.erofs")
	}
	path := t.TempDir() + "/img"
	if err := os.WriteFile(path, probeImage(), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("fsck.erofs", path).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v %s", err, out)
	}
}
