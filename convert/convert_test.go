package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/convert/source"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// twoLayers is an image with chunks that repeat in a layer and between layers.
func twoLayers(t testing.TB) []testLayer {
	return []testLayer{
		gz(archive(t, file{name: "a/"}, file{name: "a/x", data: text(1, 300000)}, file{name: "a/y", data: text(1, 200000)}, file{name: "z", data: strings.Repeat("\x00", 200000)})),
		gz(archive(t, file{name: "b", data: text(1, 300000)}, file{name: "c", data: text(2, 400000)}, file{name: "a/.wh.y"})),
	}
}

func TestSameBytesForAnyWorkers(t *testing.T) {
	var layers []testLayer
	for i := range 5 {
		var files []file
		for k := range 20 {
			files = append(files, file{name: fmt.Sprintf("%d-%d", i, k), data: text(i*k%7, 1000+150000*(k%3))})
		}
		layers = append(layers, gz(archive(t, files...)))
	}
	src := makeImage(t, layers...)
	var want string
	for _, workers := range []int{1, 2, 7} {
		for range 3 {
			res := mustConvert(t, src, target(t), Options{Workers: workers})
			if want == "" {
				want = res.ManifestDigest
			}
			if res.ManifestDigest != want {
				t.Errorf("%d workers: %s, want %s", workers, res.ManifestDigest, want)
			}
		}
	}
}

// TestShapes converts what is no ordinary image but an image all the same.
func TestShapes(t *testing.T) {
	docker := gz(archive(t, file{name: "f", data: "docker"}))
	docker.mediaType = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	var many []testLayer
	var manyNames []string
	for i := range 300 {
		manyNames = append(manyNames, fmt.Sprintf("f%03d", i))
		many = append(many, plain(archive(t, file{name: manyNames[i], data: text(i, 100)})))
	}
	for _, test := range []struct {
		name   string
		layers []testLayer
		names  []string
		blobs  int
	}{
		{"no layers", nil, nil, 0},
		{"a layer of no bytes", []testLayer{plain([]byte{}), gz(archive(t, file{name: "f", data: "x"}))}, []string{"f"}, 1},
		{"an empty archive", []testLayer{gz(archive(t))}, nil, 0},
		{"no content", []testLayer{gz(archive(t, file{name: "d/"}, file{name: "empty"}, file{name: "l", link: "d", kind: '2'}))}, []string{"d", "empty", "l"}, 0},
		{"zeros alone", []testLayer{gz(archive(t, file{name: "z", data: strings.Repeat("\x00", 70000)}))}, []string{"z"}, 1},
		{"the same layer twice", []testLayer{gz(archive(t, file{name: "f", data: "x"})), gz(archive(t, file{name: "f", data: "x"}))}, []string{"f"}, 1},
		{"docker", []testLayer{docker}, []string{"f"}, 1},
		{"zstd", []testLayer{zst(archive(t, file{name: "f", data: text(1, 100000)}))}, []string{"f"}, 1},
		{"not compressed", []testLayer{plain(archive(t, file{name: "f", data: text(1, 100000)}))}, []string{"f"}, 1},
		{"more layers than blobs", many, manyNames, 254},
	} {
		t.Run(test.name, func(t *testing.T) {
			dst := target(t)
			res := mustConvert(t, makeImage(t, test.layers...), dst, Options{})
			if n := len(res.Blobs) - 1; n != test.blobs {
				t.Errorf("%d blobs, want %d", n, test.blobs)
			}
			if names := tree(t, dst).Root.Names(); !slices.Equal(names, test.names) {
				t.Errorf("files %q, want %q", names, test.names)
			}
			if os.Geteuid() == 0 {
				exported(t, dst)
			}
		})
	}
}

// TestManifest looks at what registries and Nydus tools see.
func TestManifest(t *testing.T) {
	dst := target(t)
	mustConvert(t, makeImage(t, twoLayers(t)...), dst, Options{})
	img, err := dst.Resolve(t.Context(), amd64)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(img.Layers); n != 3 || img.Annotations["from"] != "test" {
		t.Errorf("%d layers, annotations %v", n, img.Annotations)
	}
	for i, l := range img.Layers[:2] {
		if l.MediaType != "application/vnd.oci.image.layer.nydus.blob.v1" || l.Annotations["containerd.io/snapshot/nydus-blob"] != "true" {
			t.Errorf("layer %d is %+v", i, l)
		}
		if img.Config.DiffIDs[i] != l.Digest {
			t.Errorf("diff_id %d is %s, want the blob's digest", i, img.Config.DiffIDs[i])
		}
	}
	boot := img.Layers[2]
	if boot.MediaType != mediaGzip || boot.Annotations["containerd.io/snapshot/nydus-bootstrap"] != "true" || boot.Annotations["containerd.io/snapshot/nydus-fs-version"] != "6" {
		t.Errorf("bootstrap layer is %+v", boot)
	}
	// The bootstrap layer is an ordinary one: its diff_id must be right.
	rc, err := dst.Blob(t.Context(), boot)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	raw, _, err := layer.Decompress(rc, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	p, err := io.ReadAll(raw)
	if err != nil || digestOf(p) != img.Config.DiffIDs[2] {
		t.Errorf("bootstrap layer has %s, config says %s (%v)", digestOf(p), img.Config.DiffIDs[2], err)
	}
	for _, want := range []string{`"x-unknown":{"kept":1}`, `"created":"2026-01-02T03:04:05Z"`, `"Cmd":["/bin/true"]`} {
		if !strings.Contains(string(img.ConfigBytes), want) {
			t.Errorf("config lacks %s: %s", want, img.ConfigBytes)
		}
	}
}

// TestSecondPush counts what goes to a registry.
func TestSecondPush(t *testing.T) {
	var mu sync.Mutex
	puts := 0
	h := registry.New()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if (r.Method == http.MethodPut || r.Method == http.MethodPost || r.Method == http.MethodPatch) && strings.Contains(r.URL.Path, "/blobs/") {
			mu.Lock()
			puts++
			mu.Unlock()
		}
		h.ServeHTTP(w, r)
	}))
	defer srv.Close()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	ref, err := image.ParseRef(strings.TrimPrefix(srv.URL, "http://") + "/app:1")
	if err != nil {
		t.Fatal(err)
	}
	dst, err := image.Open(t.Context(), ref, image.Options{Transport: tr})
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	layers := twoLayers(t)
	src := makeImage(t, layers...)
	first := mustConvert(t, src, dst, Options{})
	if puts == 0 {
		t.Fatal("the first push sent nothing")
	}
	puts = 0
	second := mustConvert(t, src, dst, Options{})
	if puts != 0 || second.ManifestDigest != first.ManifestDigest {
		t.Errorf("the second push sent %d requests; %s, want %s", puts, second.ManifestDigest, first.ManifestDigest)
	}
	for _, b := range second.Blobs {
		if b.Pushed {
			t.Errorf("%s was pushed again", b.Digest)
		}
	}
	// An image on the same base: only its own layer and metadata are sent.
	other := makeImage(t, layers[0], gz(archive(t, file{name: "own", data: text(9, 100000)})))
	third := mustConvert(t, other, dst, Options{})
	if third.Blobs[0].Pushed || !third.Blobs[1].Pushed || !third.Blobs[2].Pushed {
		t.Errorf("pushed: %+v", third.Blobs)
	}
}

// fails converts what must fail, for a reason, and leave nothing.
func fails(t *testing.T, src *image.Repository, o Options, is error, says string) {
	t.Helper()
	o.TempDir, o.Platform = t.TempDir(), amd64
	dst := target(t)
	_, err := Convert(t.Context(), src, dst, o)
	if !errors.Is(err, is) || !strings.Contains(fmt.Sprint(err), says) {
		t.Errorf("got error %v; want %v and %q", err, is, says)
	}
	empty(t, dst.Ref().Dir())
	empty(t, o.TempDir)
}

func TestBadLayers(t *testing.T) {
	good := gz(archive(t, file{name: "f", data: text(1, 1<<20)}))
	t.Run("flipped byte", func(t *testing.T) {
		for at := range 8 {
			src := makeImage(t, gz(archive(t, file{name: "base"})), good)
			digest := strings.TrimPrefix(digestOf(good.stored), "sha256:")
			name := filepath.Join(src.Ref().Dir(), "blobs/sha256", digest)
			p, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			p[(len(p)-1)*at/7] ^= 1
			if err := os.WriteFile(name, p, 0o644); err != nil {
				t.Fatal(err)
			}
			fails(t, src, Options{}, index.ErrCorrupt, digest)
		}
	})
	t.Run("diff_id", func(t *testing.T) {
		bad := good
		bad.diffID = digestOf([]byte("another"))
		fails(t, makeImage(t, good, bad), Options{}, index.ErrCorrupt, "layer 2 ("+digestOf(good.stored)+"): corrupt data: uncompressed it has digest "+digestOf(good.raw))
	})
	t.Run("trailing garbage", func(t *testing.T) {
		bad := good
		bad.stored = append(slices.Clone(good.stored), "garbage"...)
		fails(t, makeImage(t, bad), Options{}, index.ErrCorrupt, digestOf(bad.stored))
	})
	for _, kind := range []string{"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"} {
		t.Run(kind, func(t *testing.T) {
			bad := good
			bad.mediaType = kind
			fails(t, makeImage(t, good, bad), Options{}, index.ErrUnsupported, `layer 2 (`+digestOf(good.stored))
		})
	}
	t.Run("socket", func(t *testing.T) {
		fails(t, makeImage(t, plain(archive(t, file{name: "s", kind: 's'}))), Options{}, index.ErrUnsupported, "layer 1")
	})
	t.Run("converted", func(t *testing.T) {
		dst := target(t)
		mustConvert(t, makeImage(t, good), dst, Options{})
		fails(t, dst, Options{}, source.ErrConverted, "is its bootstrap")
	})
	t.Run("prefetch", func(t *testing.T) {
		fails(t, makeImage(t, good), Options{Prefetch: []string{"/nowhere"}}, index.ErrNotExist, "prefetch: /nowhere")
	})
	t.Run("same", func(t *testing.T) {
		src := makeImage(t, good)
		if _, err := Convert(t.Context(), src, open(t, src.Ref().String()), Options{Platform: amd64}); !errors.Is(err, ErrSame) {
			t.Errorf("got error %v, want %v", err, ErrSame)
		}
	})
}

// flip changes a byte of a blob, if a spool has that.
func flip(t testing.TB, b *layerBlob, off int64) (done bool) {
	for _, s := range b.sections {
		if off < s.at || off >= s.at+s.size {
			continue
		}
		var p [1]byte
		if _, err := s.file.ReadAt(p[:], s.off+off-s.at); err != nil {
			t.Fatal(err)
		}
		p[0] ^= 0x10
		if _, err := s.file.WriteAt(p[:], s.off+off-s.at); err != nil {
			t.Fatal(err)
		}
		return true
	}
	return false
}

// TestVerification damages what was written, byte by byte of some bytes, before
// it is pushed.
func TestVerification(t *testing.T) {
	src := makeImage(t, twoLayers(t)...)
	for off := int64(0); off < 100000; off += 1999 { // also chunks of files that a layer hides
		hit := false
		fails(t, src, Options{damage: func(b *layerBlob) { hit = hit || flip(t, b, off) }}, chunk.ErrCorrupt, "does not read back")
		if !hit {
			t.Errorf("no blob has a byte at %d", off)
		}
	}
}

// blocked is a layer that has a file and then waits.
type blocked struct {
	ctx     context.Context
	started chan struct{}
	n       int
}

func (b *blocked) Next() (*layer.Entry, error) {
	if b.n++; b.n < 3 {
		return &layer.Entry{Change: index.Change{Path: fmt.Sprint("f", b.n), Inode: &index.Inode{Mode: 0o100644, Size: 1 << 20}},
			Fragments: []layer.Fragment{{Length: 1 << 20}}}, nil
	}
	close(b.started)
	<-b.ctx.Done()
	return nil, b.ctx.Err()
}

func (b *blocked) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i)
	}
	return len(p), nil
}

func (b *blocked) Close() error { return nil }

// TestCancel ends conversions in the middle: by cancellation, and by an error
// of another layer.
func TestCancel(t *testing.T) {
	for _, byError := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		started := make(chan struct{})
		wait := source.Layer{Name: "waits", Open: func(ctx context.Context, _ func(int64)) (source.Reader, error) {
			return &blocked{ctx: ctx, started: started}, nil
		}}
		broken := errors.New("broken")
		other := source.Layer{Name: "other", Open: func(context.Context, func(int64)) (source.Reader, error) {
			<-started
			if !byError {
				cancel()
				<-ctx.Done()
			}
			return nil, broken
		}}
		o := Options{TempDir: t.TempDir(), Workers: 2}
		dst := target(t)
		_, err := Image(ctx, &source.Image{Config: []byte("{}"), Layers: []source.Layer{wait, other}}, dst, o)
		if byError && !errors.Is(err, broken) || !byError && !errors.Is(err, context.Canceled) && !errors.Is(err, broken) {
			t.Errorf("got error %v", err)
		}
		empty(t, o.TempDir)
		empty(t, dst.Ref().Dir())
		cancel()
	}
}
