package daemon

import (
	"bytes"
	"errors"
	"io"
	"log"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index/soci/socitest"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// An image that was linked when files were cut at larger pieces is cut likewise when all
// of it is read, since its index does not lead to what is asked for: else readers would
// not find it.

// TestEarlierSide: what lies beside the layers is gone, or wrong.
func TestEarlierSide(t *testing.T) {
	for what, damage := range map[string]func(path string, size int64) error{
		"gone":  func(path string, _ int64) error { return os.Remove(path) },
		"wrong": func(path string, size int64) error { return os.WriteFile(path, make([]byte, size), 0o600) },
	} {
		t.Run(what, func(t *testing.T) {
			x := indexedAt(t, chunk.Earlier, "", nil)
			x.must(damage(blobFile(x.dir, x.side), x.side.Size))
			mnt, m := attach(t, x.c, x.ref)
			x.right(mnt)
			if s, r := statusOf(t, x.c, m.ID), x.record(); s.Fill.Errors != 0 || r.Doubted == "" || r.Wrong != "" {
				t.Errorf("%+v; the record says %+v", s.Fill, r)
			}
		})
	}
}

// TestEarlierWithoutRanges: the registry does not serve parts of layers any more, and the
// index is the node's own, or of SOCI.
func TestEarlierWithoutRanges(t *testing.T) {
	content := make([]byte, 9<<20) // more than is passed over to come to a part
	rand.NewChaCha8([32]byte{1}).Read(content)
	archive := tarOf(t, "data", content)
	layer := gzipped(archive)
	for what, prepare := range map[string]func(t *testing.T, c *Client, x *layered){
		"own": func(t *testing.T, c *Client, x *layered) {
			x.indexAt(t, chunk.Earlier)
			_, err := c.Pull(background, x.src, true, nil) // which compares it
			must(t, err)
			end(t, c)
		},
		"SOCI": func(t *testing.T, c *Client, x *layered) {
			z, err := socitest.Build(layer, 256<<10)
			must(t, err)
			d := image.Descriptor{MediaType: reader.SOCIZtoc, Digest: sha(z), Size: int64(len(z)), Annotations: map[string]string{reader.SOCILayer: x.img.Layers[0].Digest}}
			must(t, x.repo.PushBlob(background, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(z)), nil }))
			subject := image.Descriptor{MediaType: x.img.MediaType, Digest: x.img.ManifestDigest, Size: int64(len(x.img.ManifestBytes))}
			_, err = x.repo.PushArtifact(background, subject, reader.SOCIType1, []image.Descriptor{d}, nil, nil)
			must(t, err)
			_, err = c.Pull(background, x.src, false, nil)
			must(t, err)
			end(t, c)
			dir := imageDir(c, x.img.ManifestDigest)
			raw, err := (&store{}).foreign(dir)
			must(t, err)
			defer raw.Close()
			raw.Cut = chunk.Earlier
			tree, err := raw.Tree()
			must(t, err)
			must(t, os.RemoveAll(filepath.Join(dir, "linked")))
			p, err := pool.Open(poolDir(c.Root))
			must(t, err)
			must(t, errors.Join(link.Link(background, tree, p, filepath.Join(dir, "linked")), p.Close()))
		},
	} {
		t.Run(what, func(t *testing.T) {
			var whole atomic.Bool
			h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if whole.Load() {
					r.Header.Del("Range")
				}
				h.ServeHTTP(w, r)
			}))
			t.Cleanup(srv.Close)
			x, c := newLayeredAt(t, strings.TrimPrefix(srv.URL, "http://")+"/app:1", layer, archive, nil), service(t)
			prepare(t, c, x)
			l, err := link.Open(filepath.Join(imageDir(c, x.img.ManifestDigest), "linked"))
			must(t, err)
			if got := l.Chunk(0).Size; got != chunk.Earlier {
				t.Errorf("the first chunk has %d bytes", got)
			}
			must(t, l.Close())
			if _, err := os.Stat(filepath.Join(imageDir(c, x.img.ManifestDigest), indexFile)); (err == nil) != (what == "own") {
				t.Errorf("the node's own index: %v", err)
			}
			p, err := pool.Open(poolDir(c.Root))
			must(t, err)
			_, err = p.Evict(&pool.References{}, math.MaxInt64)
			must(t, errors.Join(err, p.Close()))
			whole.Store(true)
			dir, m := attachAs(t, c, x.src.Ref, Place{})
			if got, err := os.ReadFile(filepath.Join(dir, "data")); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, or others, %v", len(got), err)
			}
			if s := statusOf(t, c, m.ID); s.Fill.Errors != 0 || s.Wrong != "" {
				t.Errorf("%+v", s)
			}
		})
	}
}
