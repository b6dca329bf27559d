package mounttest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/mount"
)

// The test binary runs again in these roles.
const roleEnv = "SHALE_MOUNTTEST_ROLE"

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		var err error
		switch args := os.Args[1:]; role {
		case "serve":
			err = roleServe(args[0], args[1], args[2])
		case "mmap":
			err = roleMmap(args[0])
		case "user-setup":
			err = roleUserSetup(args[0])
		case "user":
			err = roleUser(args[0])
		}
		if err != nil {
			fmt.Println("error", err)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func command(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

func child(t *testing.T, role string, args ...string) string {
	t.Helper()
	out, err := command(role, args...).Output()
	must(t, err)
	return string(out)
}

func digest(p []byte) string { return fmt.Sprintf("%x", sha256.Sum256(p)) }

// roleServe shows the image of a store at a directory until it is killed.
// Requests for the data of hung hang.
func roleServe(name, store, at string) error {
	face, err := mount.FaceNamed(name)
	if err != nil {
		return err
	}
	n, err := open(store)
	if err != nil {
		return err
	}
	n.source.hanging.Store(&hanging{told: func() { fmt.Println("hangs") }})
	m, err := face.Mount(context.Background(), n.image(), options)
	if err != nil {
		return err
	}
	if err := mount.Attach(m.FD(), at); err != nil {
		return err
	}
	m.Close()
	fmt.Println("ready")
	select {} // until it is killed
}

// roleMmap maps a file and prints the digest of what it sees, or the fault. It
// is a process of its own: a page fault of the serving process on its own
// mount would stop its garbage collector, and so the server.
func roleMmap(path string) error {
	debug.SetPanicOnFault(true)
	defer func() {
		if e := recover(); e != nil {
			fmt.Println("fault")
		}
	}()
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	fmt.Println(digest(p))
	return nil
}

// killed: the process that made the mount is killed. If it served, readers get
// errors, never zeros, and nobody hangs; otherwise nothing happens. The store
// must be as it was made, but for what was read since.
func killed(t *testing.T, face mount.Face, s stored, from, reference string) {
	at := t.TempDir()
	cmd := command("serve", face.Name(), copyStore(t, s, from, face), at)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		unix.Unmount(at, unix.MNT_DETACH)
	})
	lines := bufio.NewScanner(out)
	says := func(want string) {
		within(t, "server says "+want, func() {
			if !lines.Scan() || lines.Text() != want {
				t.Errorf("server says %q, want %q", lines.Text(), want)
			}
		})
	}
	says("ready")
	kill := func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	if face.Name() == "direct" {
		kill()
		same(t, reference, at)
		return
	}
	warm, err := os.ReadFile(filepath.Join(at, "size4097"))
	must(t, err)
	pending := make(chan struct{})
	go func() {
		defer close(pending)
		if _, err := os.ReadFile(filepath.Join(at, hung)); err == nil && face.Name() != "fanotify" {
			t.Error("the read that hung succeeded")
		}
	}()
	says("hangs")
	kill()
	wait(t, "the read that hung", pending)
	if face.Name() == "fanotify" {
		within(t, "reads with nobody to ask", func() { unheld(t, at, reference) })
		must(t, unix.Unmount(at, 0))
		return
	}
	within(t, "reads without a server", func() {
		for _, name := range []string{"big", "sparse", hung} {
			if p, err := os.ReadFile(filepath.Join(at, name)); err == nil {
				t.Errorf("%s: a cold read succeeded", name)
			} else if name != "sparse" && bytes.Contains(p, make([]byte, 4096)) {
				t.Errorf("%s: a cold read gave zeros", name)
			}
		}
		if p, err := os.ReadFile(filepath.Join(at, "size4097")); err == nil && !bytes.Equal(p, warm) {
			t.Error("cached bytes changed")
		}
		if out := child(t, "mmap", filepath.Join(at, "big")); out != "fault\n" && out[:5] != "error" {
			t.Errorf("mmap: %s", out)
		}
	})
	must(t, unix.Unmount(at, 0))
}

// unheld: with nobody to ask the kernel reads what is there. That is what is right, or
// zeros; this is why Fanotify wants a holder.
func unheld(t *testing.T, at, reference string) {
	for _, name := range []string{"size4097", "big", "size1048583", hung} {
		want, err := os.ReadFile(filepath.Join(reference, name))
		must(t, err)
		got, err := os.ReadFile(filepath.Join(at, name))
		must(t, err)
		zeros := 0
		for i := 0; i < len(want); i += 4096 {
			w, g := want[i:min(i+4096, len(want))], got[i:min(i+4096, len(want))]
			if bytes.Equal(g, make([]byte, len(g))) {
				zeros++
			} else if !bytes.Equal(g, w) {
				t.Errorf("%s: at %d neither right nor zeros", name, i)
			}
		}
		if name == "size4097" && zeros > 0 {
			t.Errorf("%s: %d blocks of what was here are zeros", name, zeros)
		}
	}
}

// copyStore gives the serving process a store of its own, without data unless
// the face wants all.
func copyStore(t *testing.T, s stored, from string, face mount.Face) string {
	t.Helper()
	to := t.TempDir()
	if face.Name() == "direct" {
		must(t, os.CopyFS(to, os.DirFS(from)))
		return to
	}
	store(t, to, s)
	return to
}
