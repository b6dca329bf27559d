package e2e

import (
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
)

// TestNoRanges has a registry that answers with all of an object to who asks for
// a part. No image can start lazily from it, nor has one to fail.
func TestNoRanges(t *testing.T) {
	w := setup(t)
	target, err := url.Parse(w.registry.URL())
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int64
	srv := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		if strings.Contains(r.In.URL.Path, "/blobs/") && r.Out.Header.Get("Range") != "" {
			r.Out.Header.Del("Range")
			asked.Add(1)
		}
	}})
	t.Cleanup(srv.Close)
	host := strings.TrimPrefix(srv.URL, "http://")
	for what, scale := range map[string]int{"small": 1, "large": 6} {
		s := w.newSmall(t, "e2e/noranges-"+what, scale)
		converted := "e2e/noranges-" + what + ":converted"
		if out, err := exec.Command(w.shale, "convert", "-q", w.registry.Host()+"/"+s.name, w.registry.Host()+"/"+converted).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, trust := range []string{"repository", "local", "converted"} {
			t.Run(what+" "+trust, func(t *testing.T) {
				n := w.node(t)
				ref := host + "/" + s.name
				if trust == "converted" {
					ref, trust = host+"/"+converted, "repository"
				}
				_, errout, code := n.try("mount", "--index-trust", trust, ref, n.mnt)
				if code != 0 {
					t.Fatalf("exit code %d: %s", code, errout)
				}
				// Of a small layer a part may be asked for, and all be taken.
				if !strings.Contains(errout, noteRead) && (what == "large" || trust == "local") {
					t.Errorf("no note says that the image %s: %s", noteRead, errout)
				}
				s.right(t, n.mnt)
				if st := n.status(); st.Mounts[0].Fill.Errors != 0 {
					t.Errorf("readers saw it: %+v", st.Mounts[0].Fill)
				}
				n.shale(0, "umount", n.mnt)
				n.shale(0, "pull", "-q", "--complete", ref)
			})
		}
	}
	if asked.Load() == 0 {
		t.Error("nobody asked for a part")
	}
	// Once a node has all of an image, no more is asked of anybody.
	t.Run("complete", func(t *testing.T) {
		n := w.node(t)
		s := w.newSmall(t, "e2e/noranges-small", 1)
		n.shale(0, "pull", "-q", "--complete", w.registry.Host()+"/"+s.name)
		n.shale(0, "mount", host+"/"+s.name, n.mnt)
		s.right(t, n.mnt)
	})
}
