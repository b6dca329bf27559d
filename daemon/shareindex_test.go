package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	benchregistry "github.com/shale-image/shale/bench/registry"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader"
)

// unindexed is an image in a registry that has no index, of a layer that needs windows.
func unindexed(t *testing.T, host string) *layered {
	t.Helper()
	archive := tarOf(t, "text", longText())
	return newLayeredAt(t, host+"/app:1", gzipped(archive), archive, nil)
}

// beside lists the indexes beside the image.
func (x *layered) beside(t *testing.T) (out []string) {
	t.Helper()
	found, err := x.repo.Referrers(background, x.img.ManifestDigest, reader.ArtifactType)
	must(t, err)
	for _, d := range found {
		if d.Type == reader.ArtifactType {
			out = append(out, d.Digest)
		}
	}
	return out
}

// shared waits until a node knows what became of its index.
func (x *layered) shared(t *testing.T, c *Client) (out sharedIndex) {
	t.Helper()
	name := filepath.Join(imageDir(c, x.img.ManifestDigest), sharedIndexFile)
	eventually(t, "the index is shared, or not", func() bool {
		js, err := os.ReadFile(name)
		return err == nil && json.Unmarshal(js, &out) == nil
	})
	return out
}

func (x *layered) pull(t *testing.T, c *Client, share bool) {
	t.Helper()
	src := x.src
	src.Refresh, src.ShareIndex = true, share
	_, err := c.Pull(background, src, false, nil)
	must(t, err)
}

// TestShareIndex: who may push does so for the others, once, and in the place of nothing.
func TestShareIndex(t *testing.T) {
	for _, kind := range []string{"go-containerregistry", "docker-registry"} {
		t.Run(kind, func(t *testing.T) {
			var host string
			if kind == "docker-registry" {
				r, err := benchregistry.Start(background, t.TempDir())
				if errors.Is(err, exec.ErrNotFound) {
					t.Skip(err)
				}
				must(t, err)
				t.Cleanup(func() { r.Stop() })
				host = r.Host()
			} else {
				s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true)))
				t.Cleanup(s.Close)
				host = strings.TrimPrefix(s.URL, "http://")
			}
			x := unindexed(t, host)
			silent, giving, third := service(t), service(t), service(t)
			x.pull(t, silent, false)
			must(t, silent.Stop(background)) // which has all pushed that is to be
			end(t, silent)
			if got := x.beside(t); len(got) != 0 {
				t.Fatalf("who was not asked to has pushed %v", got)
			}
			configured(t, `{"indexes": "share"}`)
			x.pull(t, giving, false) // the configuration says so
			st := x.shared(t, giving)
			if got := x.beside(t); !st.Pushed || len(got) != 1 || got[0] != st.Artifact {
				t.Fatalf("%+v, and beside the image lie %v", st, got)
			}
			configured(t, `{}`)
			// It is what shale index makes, with its windows.
			a, err := x.repo.Artifact(background, referrer(t, x), x.img.ManifestDigest)
			must(t, err)
			made, err := reader.Make(background, reader.Job{Manifest: x.img.ManifestDigest, Layers: x.img.Layers, DiffIDs: x.img.Config.DiffIDs,
				Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return x.repo.Blob(ctx, x.img.Layers[n]) }})
			must(t, err)
			defer made.Close()
			if len(a.Layers) != 2 || a.Layers[0].Digest != reader.IndexDigest(made.Encoded) || a.Layers[1].Digest != made.Side.Digest || made.Side.Size == 0 {
				t.Errorf("pushed as %+v", a.Layers)
			}
			// Others start by it, and read what lies behind windows.
			p, err := third.Plan(background, x.src)
			must(t, err)
			if !p.Lazy || p.Index != reader.Index || p.IndexTrust != reader.Repository {
				t.Errorf("another node: %+v", p)
			}
			if os.Geteuid() == 0 {
				dir, _ := attach(t, third, x.src.Ref)
				if got, err := os.ReadFile(filepath.Join(dir, "text")); err != nil || string(got) != string(longText()) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
			// Where one lies, whoever's, there comes no other.
			x.pull(t, silent, true)
			if st := x.shared(t, silent); st.Pushed || st.Artifact != a.Digest {
				t.Errorf("%+v", st)
			}
			if got := x.beside(t); len(got) != 1 {
				t.Errorf("beside the image lie %v", got)
			}
		})
	}
}

func referrer(t *testing.T, x *layered) image.Descriptor {
	t.Helper()
	found, err := x.repo.Referrers(background, x.img.ManifestDigest, reader.ArtifactType)
	must(t, err)
	return found[0].Descriptor
}

// TestShareIndexRefused: who may not push has an image all the same, and does not try
// again with each use.
func TestShareIndexRefused(t *testing.T) {
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	var open atomic.Bool
	var refused atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead && !open.Load() {
			refused.Add(1)
			http.Error(w, `{"errors":[{"code":"DENIED"}]}`, http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	open.Store(true)
	x := unindexed(t, strings.TrimPrefix(s.URL, "http://"))
	open.Store(false)
	c := service(t)
	x.pull(t, c, true)
	if st := x.shared(t, c); st.Artifact != "" || st.Pushed || refused.Load() == 0 {
		t.Errorf("%+v after %d requests", st, refused.Load())
	}
	before := refused.Load()
	x.pull(t, c, true)
	must(t, c.Stop(background))
	end(t, c)
	if refused.Load() != before {
		t.Error("it was tried again at once")
	}
}

// TestShareRottenIndex: what has changed on disk is not pushed.
func TestShareRottenIndex(t *testing.T) {
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	x, c := unindexed(t, strings.TrimPrefix(s.URL, "http://")), service(t)
	x.pull(t, c, false)
	name := filepath.Join(imageDir(c, x.img.ManifestDigest), indexFile)
	p, err := os.ReadFile(name)
	must(t, err)
	p[len(p)/2] ^= 0x20
	must(t, os.WriteFile(name, p, 0o600))
	x.pull(t, c, true)
	if st := x.shared(t, c); st.Artifact != "" || st.Pushed || len(x.beside(t)) != 0 {
		t.Errorf("%+v", st)
	}
}
