package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/keeper"
)

func newKeychain() *keychain {
	return &keychain{turn: make(chan struct{}, 1), next: map[image.Credentials]image.Credentials{}}
}

func secret(p string) image.Credentials { return image.Credentials{Username: "me", Password: p} }

// TestKeychain: lookups are made one at a time and not too often, and what they find
// is everybody's.
func TestKeychain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeychain()
		answer, fails := "2", error(nil)
		var looks []time.Time
		look := func(context.Context) (image.Credentials, error) {
			looks = append(looks, time.Now())
			time.Sleep(time.Second)
			return secret(answer), fails
		}
		begin := time.Now()
		check := func(refused, want string, wantErr bool, count int, at time.Duration) {
			t.Helper()
			c, err := k.renew(t.Context(), secret(refused), look)
			if c != secret(want) || (err != nil) != wantErr || len(looks) != count || time.Since(begin) != at {
				t.Errorf("instead of %s: %q, %v, %d lookups, at %v; want %q, %d at %v", refused, c.Password, err, len(looks), time.Since(begin), want, count, at)
			}
		}
		for range 10 {
			go check("1", "2", false, 1, time.Second)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		synctest.Wait()
		check("1", "2", false, 1, time.Second) // at once
		answer = "3"
		check("2", "3", false, 2, 5*time.Second) // refused just after it was found: waits for the next lookup
		check("1", "3", false, 2, 5*time.Second)
		check("3", "3", false, 3, 9*time.Second) // there is nothing else:
		check("3", "3", false, 3, 9*time.Second) // nobody waits
		answer, fails = "", errors.New("locked")
		time.Sleep(lookupPause)
		check("3", "3", true, 4, 13*time.Second)
		check("3", "3", true, 4, 13*time.Second)
		time.Sleep(lookupPause)
		answer, fails = "2", nil // which holds again
		check("3", "2", false, 5, 17*time.Second)
		check("1", "2", false, 5, 17*time.Second)

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := k.renew(ctx, secret("2"), look); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		answer = "4"
		check("2", "4", false, 6, 21*time.Second) // what a reader has not waited for holds for nobody
	})
}

// person is a user of this machine with a credential helper that tells how it was
// called.
type person struct {
	t   *testing.T
	dir string
	uid uint32
	env image.Environment
}

func newPerson(t *testing.T, uid uint32) *person {
	t.Helper()
	p := &person{t: t, uid: uid, dir: t.TempDir()}
	for dir := p.dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o755))
	}
	p.write("docker-credential-fake", `#!/bin/sh
read server
{ id -u; id -g; id -G; pwd; ls /proc/self/fd | tr '\n' ' '; echo; env; echo; } >>"$HOME/calls"
[ -e "$HOME/hangs" ] && sleep 1000
cat "$HOME/answer"
`)
	p.env = image.Environment{"DOCKER_CONFIG=" + p.dir, "HOME=" + p.dir, "PATH=" + p.dir + ":/usr/bin:/bin"}
	return p
}

func (p *person) write(name, text string) {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	must(p.t, os.WriteFile(path+".new", []byte(text), 0o700))
	if os.Geteuid() == 0 {
		must(p.t, os.Chown(path+".new", int(p.uid), int(p.uid)))
		must(p.t, os.Chown(p.dir, int(p.uid), int(p.uid)))
	}
	must(p.t, os.Rename(path+".new", path))
}

// helps has the helper asked for a registry.
func (p *person) helps(registry string) {
	js, _ := json.Marshal(map[string]any{"credHelpers": map[string]string{registry: "fake"}})
	p.write("config.json", string(js))
}

// says sets what the helper says from now on.
func (p *person) says(password string) {
	p.write("answer", fmt.Sprintf(`{"Username":"me","Secret":%q}`, password))
}

// calls are what the helper has told of each.
func (p *person) calls() []string {
	b, _ := os.ReadFile(filepath.Join(p.dir, "calls"))
	if len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n\n")
}

func refOf(t *testing.T, s string) image.Ref {
	t.Helper()
	ref, err := image.ParseRef(s)
	must(t, err)
	return ref
}

// TestLookUpAs: a lookup is another user's own process, with nothing of this one.
func TestLookUpAs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user needs root")
	}
	t.Setenv("LEAK", "root's")
	// What was inherited without a word, as of a shell that holds a lock.
	leak, err := os.Open("/etc/shadow")
	must(t, err)
	defer leak.Close()
	_, _, e := syscall.Syscall(syscall.SYS_FCNTL, leak.Fd(), syscall.F_SETFD, 0)
	if e != 0 {
		t.Fatal(e)
	}
	p := newPerson(t, 54321)
	p.helps("registry.example")
	p.says("word")
	caller := &keeper.Peer{UID: p.uid, GID: 54322, Groups: []uint32{54323, 54324}}
	look := func() (image.Credentials, error) {
		return lookUpAs(t.Context(), caller, p.env, refOf(t, "registry.example/app"))
	}
	c, err := look()
	if err != nil || c != secret("word") {
		t.Fatalf("%v, %v", c, err)
	}
	lines := strings.Split(p.calls()[0], "\n")
	if got := strings.Join(lines[:4], "|"); got != "54321|54322|54322 54323 54324|/" {
		t.Errorf("it ran as %s", got)
	}
	if fds := strings.Fields(lines[4]); !slices.Equal(fds, []string{"0", "1", "2", "3"}) { // 3 is ls'
		t.Errorf("with descriptors %s", fds)
	}
	for _, v := range lines[5:] {
		if name, _, _ := strings.Cut(v, "="); !slices.Contains([]string{"DOCKER_CONFIG", "HOME", "PATH", "PWD", "_", "SHLVL", "OLDPWD"}, name) {
			t.Errorf("it was given %s", v)
		}
	}
	// What another has closed to that user is closed to its lookup.
	p.write("config.json", "{}")
	must(t, os.Chown(filepath.Join(p.dir, "config.json"), 0, 0))
	if c, err := look(); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("of a file of root's: %v, %v", c, err)
	}
	p.helps("registry.example")
	p.write("answer", strings.Repeat("x", 1<<20))
	if c, err := look(); err == nil {
		t.Errorf("of an answer of 1 MiB: %v", c)
	}
	p.write("answer", fmt.Sprintf(`{"Username":"me","Secret":%q}`, strings.Repeat("x", lookupSays)))
	if c, err := look(); err == nil {
		t.Errorf("of a password of %d bytes: %v", lookupSays, c)
	}
}

// TestLookUpEnds: a lookup that nobody waits for any more leaves no helper behind.
func TestLookUpEnds(t *testing.T) {
	p := newPerson(t, uint32(os.Geteuid()))
	p.helps("registry.example")
	p.write("hangs", "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := lookUpAs(ctx, &keeper.Peer{UID: p.uid, GID: uint32(os.Getegid())}, p.env, refOf(t, "registry.example/app"))
		done <- err
	}()
	eventually(t, "the helper is asked", func() bool { return len(p.calls()) > 0 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) && !strings.Contains(err.Error(), "canceled") {
		t.Error(err)
	}
	eventually(t, "the helper is gone", func() bool {
		all, _ := filepath.Glob("/proc/[0-9]*/environ")
		for _, path := range all {
			if b, _ := os.ReadFile(path); strings.Contains(string(b), "HOME="+p.dir+"\x00") {
				return false
			}
		}
		return true
	})
}

// TestBecome: who is not root becomes nobody else.
func TestBecome(t *testing.T) {
	own := uint32(os.Geteuid())
	if own == 0 {
		again := self(t, 54321, "^TestBecome$")
		if out, err := again.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		as, err := become(&keeper.Peer{UID: 1, GID: 2, Groups: []uint32{3}})
		if err != nil || as.Uid != 1 || as.Gid != 2 || !slices.Equal(as.Groups, []uint32{3}) || as.NoSetGroups {
			t.Errorf("%+v, %v", as, err)
		}
		return
	}
	for _, uid := range []uint32{0, own + 1} {
		if as, err := become(&keeper.Peer{UID: uid}); err == nil {
			t.Errorf("user %d would become %+v", own, as)
		}
		src := Source{Environment: image.Environment{"HOME=/"}, caller: &keeper.Peer{UID: uid}}
		if k := new(store).keychain("registry.example", src); k != nil {
			t.Errorf("user %d would look up what is user %d's", own, uid)
		}
	}
	if as, err := become(&keeper.Peer{UID: own, GID: 1}); err != nil || as != nil {
		t.Errorf("%+v, %v", as, err)
	}
}

// TestCaller: who calls is what the kernel says, whatever the message does.
func TestCaller(t *testing.T) {
	js := `{"ref":"x/y","caller":{"uid":1},"Caller":{"uid":1},"environment":["HOME=/"]}`
	var a mountArgs
	must(t, json.Unmarshal([]byte(js), &a))
	if a.caller != nil {
		t.Fatalf("a message says it is of %+v", a.caller)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: filepath.Join(t.TempDir(), "s")})
	must(t, err)
	defer l.Close()
	c, err := net.DialUnix("unixpacket", nil, l.Addr().(*net.UnixAddr))
	must(t, err)
	defer c.Close()
	conn, err := l.AcceptUnix()
	must(t, err)
	defer conn.Close()
	peer, err := keeper.PeerOf(conn)
	must(t, err)
	must(t, a.by(peer))
	groups, err := os.Getgroups()
	must(t, err)
	if p := a.caller; int(p.UID) != os.Geteuid() || int(p.GID) != os.Getegid() || int(p.PID) != os.Getpid() || fmt.Sprint(p.Groups) != fmt.Sprint(groups) {
		t.Errorf("%+v, groups %v", p, groups)
	}
	a.Environment = append(a.Environment, "LD_PRELOAD=/evil.so")
	if err := a.by(peer); err == nil {
		t.Error("any environment is taken")
	}
}
