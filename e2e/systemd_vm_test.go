package e2e

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// systemdRelease is the Debian release of the machine: the first whose kernel can pass
// a FUSE connection on (6.12). Its backports have one that knows pre-access events (6.14).
const systemdRelease = "trixie"

// proof runs in the machine, by systemd, when it has booted. It reads a fourth of the
// image's files before anything happens, and after each event those and a fourth that
// nobody has read before, with nothing in the kernel's memory.
const proof = `#!/bin/bash
say() { echo "proof: $*" >/dev/ttyS0; }
fail() { say "FAIL $*"; journalctl -u shale --no-pager -n 40 >/dev/ttyS0; say end; exit; }
pid() { systemctl show -P MainPID shale; }
forget() { sync; echo 3 >/proc/sys/vm/drop_caches; }
check() { forget; (cd /mnt && timeout 300 sha256sum --quiet -c "$1") >/tmp/sums 2>&1 || fail "$2: $(head -3 /tmp/sums)"; }
say systemd $(systemctl --version | head -1), Linux $(uname -r)
face=$(cat /face)
systemctl start shale || fail start
shale mount --face $face --no-complete oci:/image:shale /mnt >/dev/ttyS0 2>&1 || fail mount
shale mount --face $face --no-complete oci:/image:other /other >/dev/ttyS0 2>&1 || fail mount of the other
check /sums/0 "before"
say files in the store: $(systemctl show -P NFileDescriptorStore shale)
n=0
for event in "systemctl restart" "kill -9 the keeper" "kill -9 both" "reload"; do
	n=$((n+1)) keeper=$(pid)
	(while [ ! -e /tmp/enough ]; do check /sums/0 "during $event"; done; touch /tmp/read) &
	sleep 1
	began=$(date +%s.%N)
	case $event in
	"systemctl restart") systemctl restart shale || fail "$event";;
	"kill -9 the keeper") kill -9 $keeper;;
	"kill -9 both") kill -9 $keeper $(pgrep -P $keeper);;
	"reload") systemctl reload shale || fail "$event";;
	esac
	for i in $(seq 100); do
		[ "$(systemctl is-active shale)" = active ] && { [ "$event" = reload ] || [ "$(pid)" != $keeper ]; } && break
		sleep 0.2
	done
	say "$event: active again after $(echo "$(date +%s.%N) $began" | awk '{print $1-$2}') s"
	for f in $(seq 0 $((n<3 ? n : 3))); do check /sums/$f "after $event"; done
	touch /tmp/enough
	wait
	[ -e /tmp/read ] || fail "the reader during $event"
	rm /tmp/enough /tmp/read
	# One of the face fanotify that is complete needs nobody, and is told of by none.
	here=$(shale status --json | grep -E '"where": "/(mnt|other)"')
	[ $face = fanotify ] || grep -q /mnt <<<$here || fail "status after $event: $(shale status)"
	grep -q /other <<<$here || fail "status of the other after $event: $(shale status)"
	# The same, of an image that shares descriptors with the first.
	forget
	sum=$(sed -n ${n}p /others | sha256sum -c --quiet 2>&1) || fail "the other after $event: $sum"
	say ok $event
done
[ -e /sums/never ] || fail "nothing is left to be read"
systemctl stop shale || fail stop
forget
timeout 60 cat /mnt/$(cat /sums/never) >/tmp/out 2>/tmp/err
code=$?
case $face in
fanotify) # what was not here is zeros, and nobody hangs
	wrong=$(cmp -l /tmp/out /sums/content 2>&1 | awk '$2 != 0' | wc -l)
	[ $code = 0 ] && [ $wrong = 0 ] || fail "read with no service: $code, $wrong of $(wc -c </tmp/out) bytes are wrong, $(cat /tmp/err)";;
*)
	[ $code != 0 ] && [ ! -s /tmp/out ] || fail "read with no service: $(wc -c </tmp/out) bytes"
	# The second is what EROFS is told by FUSE when it wants metadata.
	grep -qE "Input/output error|Transport endpoint is not connected" /tmp/err || fail "$(cat /tmp/err)";;
esac
say ok systemctl stop
say files in the store: $(systemctl show -P NFileDescriptorStore shale)
say end
`

// TestSystemd runs the service under a real systemd, as process 1 of a machine: its
// unit's descriptor store lets mounts live on while all of the service is restarted.
// It takes some minutes, and is run if SHALE_SYSTEMD is set.
func TestSystemd(t *testing.T) {
	if os.Getenv("SHALE_SYSTEMD") == "" {
		t.Skip("takes minutes: set SHALE_SYSTEMD=1")
	}
	for face, suite := range map[string]string{"device": systemdRelease, "fanotify": systemdRelease + "-backports"} {
		t.Run(face, func(t *testing.T) { systemd(t, face, suite) })
	}
}

func systemd(t *testing.T, face, suite string) {
	w := setup(t)
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skipf("%v; apt-get install qemu-system-x86", err)
	}
	root := systemdRoot(t, suite)
	s, other := w.newSmall(t, "systemd/image", 4), w.newSmall(t, "systemd/other", 5)
	n := w.node(t)
	for tag, s := range map[string]*small{"shale": s, "other": other} {
		n.shale(0, "convert", "-q", w.registry.Host()+"/"+s.name, "oci:"+filepath.Join(root, "image")+":"+tag)
	}

	put := func(name string, mode os.FileMode, content []byte) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, mode); err != nil {
			t.Fatal(err)
		}
	}
	var sums [4]bytes.Buffer
	for i, name := range slices.Sorted(maps.Keys(s.files)) {
		if name == "tar/two" {
			put("sums/never", 0o644, []byte(name))
			put("sums/content", 0o644, s.files[name])
			continue
		}
		fmt.Fprintf(&sums[i%4], "%x  %s\n", sha256.Sum256(s.files[name]), name)
	}
	for i := range sums {
		put(fmt.Sprint("sums/", i), 0o644, sums[i].Bytes())
	}
	var others bytes.Buffer
	for _, name := range slices.Backward(slices.Sorted(maps.Keys(other.files))) { // the largest last: it is not complete before
		if len(other.files[name]) > 100<<10 {
			fmt.Fprintf(&others, "%x  /other/%s\n", sha256.Sum256(other.files[name]), name)
		}
	}
	put("others", 0o644, others.Bytes())
	put("face", 0o644, []byte(face))
	if err := os.Mkdir(filepath.Join(root, "other"), 0o755); err != nil {
		t.Fatal(err)
	}
	put("usr/local/bin/shale", 0o755, read(t, w.shale))
	put("usr/local/bin/proof", 0o755, []byte(proof))
	put("etc/systemd/system/shale.service", 0o644, read(t, "../dist/shale.service"))
	put("etc/systemd/system/proof.service", 0o644, []byte("[Unit]\nAfter=basic.target\n[Service]\nType=oneshot\nExecStart=/usr/local/bin/proof\nTimeoutStartSec=infinity\n"))
	put("etc/fstab", 0o644, nil)
	for _, unit := range []string{"serial-getty@ttyS0.service", "getty@tty1.service", "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer"} {
		if err := os.Symlink("/dev/null", filepath.Join(root, "etc/systemd/system", unit)); err != nil {
			t.Fatal(err)
		}
	}
	wants := filepath.Join(root, "etc/systemd/system/multi-user.target.wants")
	if err := os.MkdirAll(wants, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../proof.service", filepath.Join(wants, "proof.service")); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	command(t, "mkfs.ext4", "-q", "-F", "-d", root, disk, "2G")
	boot := func(pattern string) string {
		all, err := filepath.Glob(filepath.Join(root, "boot", pattern))
		if err != nil || len(all) != 1 {
			t.Fatalf("boot/%s: %q, %v", pattern, all, err)
		}
		return all[0]
	}
	cmd := exec.Command(qemu, "-accel", "tcg,thread=multi", "-machine", "pc", "-cpu", "max", "-smp", "2", "-m", "1024",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", boot("vmlinuz-*"), "-initrd", boot("initrd.img-*"),
		"-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1 systemd.show_status=0 mitigations=off",
		"-drive", "file="+disk+",format=raw,if=virtio,cache=unsafe")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	console, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(15*time.Minute, func() { cmd.Process.Kill() }).Stop()
	defer cmd.Wait()
	defer cmd.Process.Kill()
	passed := 0
	var last []string
	for lines := bufio.NewScanner(console); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		said, ok := strings.CutPrefix(line, "proof: ")
		switch {
		case !ok:
			last = append(last[max(0, len(last)-60):], line)
			continue
		case strings.HasPrefix(said, "ok "):
			passed++
		case strings.HasPrefix(said, "FAIL"):
			t.Error(said)
		}
		t.Log(said)
		if said == "end" {
			break
		}
	}
	if passed != 5 {
		t.Errorf("%d of 5 events passed; the console's last lines:\n%s\n%s", passed, strings.Join(last, "\n"), &errs)
	}
}

// systemdRoot makes a root directory with systemd, and the kernel of a suite.
func systemdRoot(t *testing.T, suite string) string {
	t.Helper()
	cache := filepath.Join("../build/images", "systemd-"+suite+".tar")
	if _, err := os.Stat(cache); err != nil {
		if err := os.MkdirAll(filepath.Dir(cache), 0o755); err != nil {
			t.Fatal(err)
		}
		part := cache + ".part"
		defer os.Remove(part)
		args := []string{"--variant=minbase", "--format=tar", "--include=systemd-sysv,dbus,procps,linux-image-cloud-amd64/" + suite, systemdRelease, part}
		for _, suite := range slices.Compact([]string{systemdRelease, suite}) {
			args = append(args, "deb http://deb.debian.org/debian "+suite+" main")
		}
		out, err := exec.Command("mmdebstrap", args...).CombinedOutput()
		if err != nil {
			t.Skipf("no Debian %s to be had: %v\n%s", suite, err, out)
		}
		if err := os.Rename(part, cache); err != nil {
			t.Fatal(err)
		}
	}
	root := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, "tar", "--extract", "--file", cache, "--directory", root, "--numeric-owner", "--xattrs", "--xattrs-include=*", "--exclude=./dev/*")
	return root
}
