package daemon

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/keeper"
)

const partSize = 3 << 20

// parts are files whose middles do not come along with each other.
func parts() map[string][]byte {
	all := map[string][]byte{}
	for i := range 6 {
		r := rand.NewChaCha8([32]byte{byte(i)})
		all[fmt.Sprint("part", i)] = make([]byte, partSize)
		r.Read(all[fmt.Sprint("part", i)])
	}
	return all
}

// revocable is a registry with such an image, whose password changes.
type revocable struct {
	*packs
	password atomic.Value // string
	status   int          // said of any other
	bearer   bool         // the password is for tokens, and a change ends these
	served   atomic.Int64 // blobs
	refused  atomic.Int64
}

func newRevocable(t *testing.T, status int, bearer bool) *revocable {
	t.Helper()
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for name, b := range parts() {
		must(t, tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(b))}))
		tw.Write(b)
	}
	tw.Close()
	r := &revocable{packs: newPacks(t, layoutOf(t, layer.Bytes()), false), status: status, bearer: bearer}
	r.password.Store("word-0")
	r.mu.Lock()
	r.spoil = r.guard
	r.mu.Unlock()
	return r
}

func (r *revocable) guard(w http.ResponseWriter, req *http.Request) bool {
	_, password, basic := req.BasicAuth()
	good := password == r.password.Load()
	if r.bearer && req.URL.Path == "/token" {
		if good {
			fmt.Fprintf(w, `{"token": "of-%s", "expires_in": 3600}`, password)
		} else {
			r.refused.Add(1)
			w.WriteHeader(r.status)
		}
		return true
	}
	token, said := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer of-")
	if r.bearer {
		good, basic = token == r.password.Load(), said
	}
	switch {
	case good:
		if strings.Contains(req.URL.Path, "/blobs/") {
			r.served.Add(1)
		}
		return false
	case !basic && r.bearer:
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="r"`, req.Host))
		w.WriteHeader(http.StatusUnauthorized)
	case !basic:
		w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
		w.WriteHeader(http.StatusUnauthorized)
	default:
		r.refused.Add(1)
		w.WriteHeader(r.status)
	}
	return true
}

// source is what a client of a person's would ask for.
func (r *revocable) source(p *person, password string) Source {
	p.t.Helper()
	ref := refOf(p.t, r.ref)
	p.helps(ref.Registry())
	p.says(password)
	return Source{Ref: r.ref, Platform: "linux/amd64", Credentials: secret(password), Environment: p.env}
}

// change has the registry want another password, which the helper knows.
func (r *revocable) change(p *person, password string) {
	p.says(password)
	r.password.Store(password)
}

// mounting attaches the image for as long as the test takes.
func mounting(t *testing.T, c *Client, src Source, p Place) (dir string) {
	t.Helper()
	p.Where, p.NoComplete = "test", true
	if os.Geteuid() != 0 {
		p.Dir = t.TempDir()
	}
	m, err := c.Mount(background, src, p, nil)
	if errors.Is(err, index.ErrUnsupported) {
		t.Skip(err)
	}
	must(t, err)
	if m.FS == nil {
		t.Cleanup(func() { exec.Command("fusermount3", "-u", "-z", p.Dir).Run() })
		return p.Dir
	}
	t.Cleanup(func() { m.FS.Close() })
	return fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd())
}

// reads fails the test if a piece of the file is not right, or was here already.
func (r *revocable) reads(dir, name string) {
	r.t.Helper()
	before := r.served.Load()
	if err := r.piece(dir, name); err != nil {
		r.t.Fatal(err)
	}
	if r.served.Load() == before {
		r.t.Fatalf("%s was here already", name)
	}
}

// piece reads from the middle of a file: who reads all of one is given the next, too.
func (r *revocable) piece(dir, name string) error {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, 1000)
	if _, err := f.ReadAt(p, partSize/2); err != nil {
		return err
	}
	if !bytes.Equal(p, parts()[name][partSize/2:][:len(p)]) {
		return errors.New(name + " has other bytes")
	}
	return nil
}

// TestCredentialsRevoked: who reads a mount does not see that its credentials have been
// revoked, as the user's helper knows others; nor that the worker has died since.
func TestCredentialsRevoked(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		for _, bearer := range []bool{false, true} {
			for _, face := range []string{"device", "fanotify"} {
				t.Run(fmt.Sprint(status, bearer, face), func(t *testing.T) {
					t.Parallel()
					revoked(t, status, bearer, face)
				})
			}
		}
	}
}

func revoked(t *testing.T, status int, bearer bool, face string) {
	c, r, me := service(t), newRevocable(t, status, bearer), newPerson(t, 0)
	dir := mounting(t, c, r.source(me, "word-0"), Place{Face: face})
	r.reads(dir, "part0")
	if n := len(me.calls()); n != 0 {
		t.Errorf("the helper was asked %d times before it had to be", n)
	}
	r.change(me, "word-1")
	r.reads(dir, "part1")
	r.reads(dir, "part2")
	if n := len(me.calls()); n != 1 {
		t.Errorf("the helper was asked %d times, want once", n)
	}
	r.change(me, "word-2")
	killWorker(t, c) // the next one begins with what is revoked
	r.reads(dir, "part3")
	eventually(t, "what was found is kept", func() bool {
		st, err := c.Status(background)
		must(t, err)
		kept, err := keeper.Ask(background, c.Root)
		must(t, err)
		var show MountStatus
		must(t, json.Unmarshal(kept.Mounts[0], &show))
		return show.Source == st.Mounts[0].Source
	})
	me.write("answer", "the helper has none any more")
	killWorker(t, c)
	r.reads(dir, "part4")
	if n := len(me.calls()); n != 2 {
		t.Errorf("the helper was asked %d times, want twice", n)
	}
	nowhere(t, c, "word-", me.dir)
}

// TestCredentialsShared: what was found for one mount serves the others of that user,
// and none of another environment.
func TestCredentialsShared(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	c, r := service(t), newRevocable(t, http.StatusForbidden, false)
	me, other := newPerson(t, 0), newPerson(t, 0)
	mine, again := mounting(t, c, r.source(me, "word-0"), Place{Face: "device"}), mounting(t, c, r.source(me, "word-0"), Place{Face: "device"})
	theirs := mounting(t, c, r.source(other, "word-0"), Place{Face: "device"})
	r.change(me, "word-1")
	r.reads(mine, "part0")
	r.reads(again, "part1")
	if n := len(me.calls()); n != 1 {
		t.Errorf("the helper was asked %d times, want once", n)
	}
	if err := r.piece(theirs, "part2"); !errors.Is(err, syscall.EIO) {
		t.Errorf("with another's credentials: %v, want EIO", err)
	}
	if n := len(other.calls()); n == 0 {
		t.Error("another's helper was not asked")
	}
	other.says("word-1")
	eventually(t, "it works again", func() bool { return r.piece(theirs, "part2") == nil })
}

// TestCredentialsOfUser is TestCredentialsRevoked of a service that is no root's: its
// helper is asked as its user.
func TestCredentialsOfUser(t *testing.T) {
	if os.Geteuid() == 0 {
		if _, err := exec.LookPath("fusermount3"); err != nil {
			t.Skip(err)
		}
		again := self(t, 65534, "^TestCredentialsOfUser$")
		if os.Getenv("SHALE_UNSHARED") == "" {
			again.Env = append(again.Env, "SHALE_UNSHARED=1")
			again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		} else { // in a mount namespace of its own /dev/fuse is open to everyone, as on most machines
			fuse := filepath.Join(t.TempDir(), "fuse")
			must(t, unix.Mknod(fuse, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 229))))
			must(t, os.Chmod(fuse, 0o666))
			must(t, unix.Mount(fuse, "/dev/fuse", "", unix.MS_BIND, ""))
			defer unix.Unmount("/dev/fuse", 0)
		}
		out, err := again.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestCredentialsOfUser")) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	c, r, me := service(t), newRevocable(t, http.StatusForbidden, false), newPerson(t, uint32(os.Geteuid()))
	dir := mounting(t, c, r.source(me, "word-0"), Place{Face: "fuse"})
	r.reads(dir, "part0")
	r.change(me, "word-1")
	r.reads(dir, "part1")
	if calls := me.calls(); len(calls) != 1 || !strings.HasPrefix(calls[0], "65534\n65534\n") {
		t.Errorf("%q", calls)
	}
}

// TestPullRefused: a pull whose credentials are refused has them looked up once more.
func TestPullRefused(t *testing.T) {
	c, r, me := service(t), newRevocable(t, http.StatusForbidden, true), newPerson(t, uint32(os.Geteuid()))
	src := r.source(me, "word-0")
	r.change(me, "word-1")
	if _, err := c.Pull(background, src, true, nil); err != nil {
		t.Error(err)
	}
	src.Environment = append(src.Environment, "LD_PRELOAD=/evil.so")
	if _, err := c.Pull(background, src, true, nil); err == nil {
		t.Error("any environment is taken")
	}
	src = Source{Ref: r.ref, Platform: "linux/amd64", Credentials: image.Credentials{Username: "me", Password: "word-0"}, Refresh: true}
	if _, err := c.Pull(background, src, true, nil); err == nil {
		t.Error("credentials from nowhere")
	}
}
