package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/shale-image/shale/mount"
)

// TestDetached: once all of its image is here a mount of the face fanotify needs no
// process: all of them end, and the whole tree is read, from the disk.
func TestDetached(t *testing.T) {
	if able := mount.Probe(); !able.Fanotify {
		t.Skip(able.Why["Fanotify"])
	}
	for _, f := range forms {
		if !f.lazy {
			continue // it is complete from the beginning
		}
		t.Run(f.what, func(t *testing.T) {
			w := setup(t)
			n, p := w.node(t), w.proxy(t)
			n.mount(f, "fanotify", p.Host())
			if _, err := os.ReadFile(filepath.Join(n.mnt, "etc/os-release")); err != nil {
				t.Error(err)
			}
			n.shale(0, "pull", "-q", "--complete", p.Host()+"/"+f.name)
			for deadline := time.Now().Add(30 * time.Second); !n.status().Mounts[0].Detached; time.Sleep(50 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("not detached: %+v", n.status().Mounts)
				}
			}
			pids := n.status().Processes
			n.shale(0, "daemon", "stop")
			for _, p := range pids {
				for deadline := time.Now().Add(10 * time.Second); !gone(p.PID); time.Sleep(10 * time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("the %s, %d, is still there", p.Role, p.PID)
					}
				}
			}
			p.Close()
			if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
				t.Log(err)
			}
			compare(t, w.truth, n.mnt)
		})
	}
}

// gone tells whether a process is no more, or dead and only not waited for.
func gone(pid int) bool {
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || bytes.Contains(p, []byte(") Z "))
}
