package reader

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
	"github.com/shale-image/shale/index/estargz/estargztest"
	"github.com/shale-image/shale/index/layer"
)

// tocLayer is a layer with the annotations of its descriptor.
type tocLayer struct {
	blob        []byte
	annotations map[string]string
}

// goldenLayer reads a layer that another tool made.
func goldenLayer(t testing.TB, name string) (l tocLayer) {
	t.Helper()
	dir := "../index/estargz/testdata/"
	if strings.HasSuffix(name, ".zst") {
		dir = "../index/zstdchunked/testdata/"
	}
	var err error
	if l.blob, err = os.ReadFile(dir + name); err != nil {
		t.Fatal(err)
	}
	js, err := os.ReadFile(dir + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(js, &l.annotations); err != nil {
		t.Fatal(err)
	}
	return l
}

// retabled is a golden layer with another table.
func retabled(t testing.TB, name string, edit func(string) string) (l tocLayer) {
	p, digest := estargztest.Retable(t, goldenLayer(t, name).blob, edit)
	return tocLayer{p, map[string]string{estargz.DigestAnnotation: digest}}
}

// large is a layer whose table does not fit into what is fetched at first.
func large(t testing.TB) tocLayer {
	r := rand.New(rand.NewPCG(1, 2))
	var b strings.Builder
	for i := range 12000 {
		fmt.Fprintf(&b, `{"name":"more/%d","type":"symlink","linkName":"%x%x%x","mode":511},`, i, r.Uint64(), r.Uint64(), r.Uint64())
	}
	return retabled(t, "plain.gz", func(s string) string {
		before, after, ok := strings.Cut(s, "[")
		if !ok {
			t.Fatal("no entries")
		}
		return before + "[" + b.String() + after
	})
}

func openRepository(t testing.TB, ref string, o image.Options) *image.Repository {
	t.Helper()
	r, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), r, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}

// pushTOC pushes an image of layers.
func pushTOC(t testing.TB, repo *image.Repository, layers ...tocLayer) *image.Image {
	t.Helper()
	push := func(mediaType string, p []byte) image.Descriptor {
		d := image.Descriptor{MediaType: mediaType, Digest: IndexDigest(p), Size: int64(len(p))}
		if err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }); err != nil {
			t.Fatal(err)
		}
		return d
	}
	var all []image.Descriptor
	var diffIDs []string
	for _, l := range layers {
		kind := "gzip"
		if bytes.HasPrefix(l.blob, []byte("\x28\xb5\x2f\xfd")) {
			kind = "zstd"
		}
		d := push("application/vnd.oci.image.layer.v1.tar+"+kind, l.blob)
		d.Annotations = l.annotations
		all = append(all, d)
		sum := sha256.New()
		if z, _, err := layer.Decompress(bytes.NewReader(l.blob), index.Limits{}); err == nil {
			io.Copy(sum, z)
			z.Close()
		}
		diffIDs = append(diffIDs, fmt.Sprintf("sha256:%x", sum.Sum(nil)))
	}
	config, err := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}})
	if err != nil {
		t.Fatal(err)
	}
	m, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": push(image.MediaTypeConfig, config), "layers": all})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.PushManifest(t.Context(), image.MediaTypeManifest, m, "toc"); err != nil {
		t.Fatal(err)
	}
	img, err := repo.Resolve(t.Context(), image.Platform{OS: "linux", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// layout has an image in a directory.
func layout(t testing.TB, layers ...tocLayer) (*image.Repository, *image.Image) {
	t.Helper()
	repo := openRepository(t, "oci:"+t.TempDir()+":toc", image.Options{})
	return repo, pushTOC(t, repo, layers...)
}

// fetched fetches an index and reads it as another process would.
func fetched(t testing.TB, repo *image.Repository, img *image.Image, o Options) (*Raw, *index.Tree, error) {
	t.Helper()
	o.TempDir = t.TempDir()
	raw, err := Fetch(t.Context(), repo, img, o)
	if err != nil {
		return nil, nil, err
	}
	t.Cleanup(func() { raw.Close() })
	js, err := json.Marshal(raw)
	if err != nil {
		t.Fatal(err)
	}
	other := &Raw{}
	if err := json.Unmarshal(js, other); err != nil {
		t.Fatal(err)
	}
	other.File = raw.File
	tree, err := other.Tree()
	return raw, tree, err
}

// scanned reads all layers of an image.
func scanned(t testing.TB, repo *image.Repository, img *image.Image) *Made {
	t.Helper()
	m, err := Make(t.Context(), Job{Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs, TempDir: t.TempDir(),
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return repo.Blob(ctx, img.Layers[n]) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	for _, name := range []string{".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"} {
		delete(m.Tree.Root.Children, name) // the format's own
	}
	return m
}

// withSide is the blobs of an image and what lies beside its layers.
type withSide struct {
	blob.Source
	m *Made
}

func (s withSide) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if ref.Digest == s.m.Side.Digest {
		return io.NopCloser(io.NewSectionReader(s.m.side, off, n)), nil
	}
	return s.Source.Range(ctx, ref, off, n)
}

// TestTOC: the tables of layers that other tools made say what reading these
// layers says, and where the bytes of their files are.
func TestTOC(t *testing.T) {
	for _, names := range []string{
		"plain.gz", "chunks.gz", "min.gz", "odd.gz", "podman.zst", "skopeo.zst", "stargz.zst",
		"plain.gz podman.zst", "stargz.zst odd.gz chunks.gz", "skopeo.zst skopeo.zst", "min.gz podman.zst min.gz stargz.zst",
	} {
		t.Run(names, func(t *testing.T) {
			var layers []tocLayer
			var total int64
			for name := range strings.FieldsSeq(names) {
				l := goldenLayer(t, name)
				layers, total = append(layers, l), total+int64(len(l.blob))
			}
			repo, img := layout(t, layers...)
			raw, tree, err := fetched(t, repo, img, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if raw.Kind != TOC || raw.Trust != Bound || raw.Stored <= 0 || raw.Stored > total {
				t.Errorf("%s, %s, %d bytes of %d", raw.Kind, raw.Trust, raw.Stored, total)
			}
			for i, b := range tree.Blobs {
				if b.Digest != img.Layers[i].Digest || b.Size != img.Layers[i].Size {
					t.Errorf("blob %d is %s of %d bytes", i, b.Digest, b.Size)
				}
			}
			m := scanned(t, repo, img)
			n := 0
			err = m.Tree.Walk(func(path string, ino *index.Inode) error {
				other, err := tree.Lookup(path)
				if err != nil || !ino.IsRegular() || !other.IsRegular() {
					return err
				}
				var want, got bytes.Buffer
				if err := content.Copy(t.Context(), &want, m.Tree, withSide{repo.Blobs(), m}, ino); err != nil {
					return err
				}
				if err := content.Copy(t.Context(), &got, tree, repo.Blobs(), other); err != nil || !bytes.Equal(got.Bytes(), want.Bytes()) {
					t.Errorf("/%s: %d bytes, want %d; %v", path, got.Len(), want.Len(), err)
				}
				n++
				return nil
			})
			if err != nil || n < 5 {
				t.Fatalf("%d files, %v", n, err)
			}
			m.Tree.Walk(func(path string, ino *index.Inode) error {
				other, _ := tree.Lookup(path)
				ino.Extents = other.Extents // compared above
				return nil
			})
			m.Tree.Chunks = tree.Chunks
			if err := index.Equal(m.Tree, tree); err != nil {
				t.Error(err)
			}
		})
	}
}

// requests records the ranges of blobs that are asked for.
type requests struct {
	http.RoundTripper
	mu  sync.Mutex
	all []string // the digest's first digits and the range
}

func (r *requests) RoundTrip(q *http.Request) (*http.Response, error) {
	if _, digest, ok := strings.Cut(q.URL.Path, "/blobs/sha256:"); ok && q.Method == http.MethodGet {
		r.mu.Lock()
		r.all = append(r.all, digest[:8]+" "+q.Header.Get("Range"))
		r.mu.Unlock()
	}
	return r.RoundTripper.RoundTrip(q)
}

// TestTOCRequests: a table takes one request, or two if it is large.
func TestTOCRequests(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	transport := &http.Transport{DisableCompression: true}
	defer transport.CloseIdleConnections()
	seen := &requests{RoundTripper: transport}
	repo := openRepository(t, strings.TrimPrefix(server.URL, "http://")+"/a/b:toc", image.Options{Transport: seen})
	small, big, zstd := goldenLayer(t, "plain.gz"), large(t), goldenLayer(t, "podman.zst")
	img := pushTOC(t, repo, small, big, zstd)
	seen.all = nil
	raw, tree, err := fetched(t, repo, img, Options{Trust: Bound})
	if err != nil {
		t.Fatal(err)
	}
	at, err := estargz.Locate(big.blob, int64(len(big.blob)), "large")
	if err != nil {
		t.Fatal(err)
	}
	z, err := tableOf(img.Layers[2])
	if err != nil {
		t.Fatal(err)
	}
	end := int64(len(big.blob)) - tail
	var want []string
	var bytes int64
	for _, r := range []struct{ layer, from, to int64 }{{0, 0, int64(len(small.blob))}, {1, end, end + tail}, {1, at.Offset, end}, {2, z.Offset, z.Offset + z.Length}} {
		want = append(want, fmt.Sprintf("%s bytes=%d-%d", strings.TrimPrefix(img.Layers[r.layer].Digest, "sha256:")[:8], r.from, r.to-1))
		bytes += r.to - r.from
	}
	slices.Sort(want)
	slices.Sort(seen.all)
	if !slices.Equal(seen.all, want) {
		t.Errorf("requests %q, want %q", seen.all, want)
	}
	if raw.Stored != bytes {
		t.Errorf("%d bytes, want %d", raw.Stored, bytes)
	}
	if _, err := tree.Lookup("more/11999"); err != nil {
		t.Error(err)
	}

	seen.all = nil
	if _, _, err := fetched(t, repo, img, Options{Trust: Local}); !errors.Is(err, ErrNoIndex) || len(seen.all) > 0 {
		t.Errorf("%v, %d requests; want none for what only the node's own index may tell", err, len(seen.all))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Fetch(ctx, repo, img, Options{Trust: Bound}); !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoIndex) {
		t.Errorf("canceled: %v", err)
	}
}

// An index beside the image goes first if it may be believed.
func TestTOCAndIndex(t *testing.T) {
	repo, img := layout(t, goldenLayer(t, "plain.gz"), goldenLayer(t, "podman.zst"))
	if _, err := Push(t.Context(), repo, img, scanned(t, repo, img)); err != nil {
		t.Fatal(err)
	}
	for trust, want := range map[Trust]Kind{"": Index, Repository: Index, Signed: TOC, Bound: TOC} {
		raw, _, err := fetched(t, repo, img, Options{Trust: trust})
		if err != nil || raw.Kind != want || want == TOC && raw.Trust != Bound {
			t.Errorf("trust %q: %+v, %v; want %s", trust, raw, err, want)
		}
	}
}

// TestTOCOfNoUse: then the whole image has to be read, and the cause is told.
func TestTOCOfNoUse(t *testing.T) {
	plain, podman := goldenLayer(t, "plain.gz"), goldenLayer(t, "podman.zst")
	with := func(l tocLayer, change map[string]string) tocLayer {
		a := maps.Clone(l.annotations)
		maps.Copy(a, change) // an empty one is none
		return tocLayer{l.blob, a}
	}
	const zstd = "io.github.containers.zstd-chunked.manifest-"
	other := "sha256:" + strings.Repeat("1", 64)
	// A table of another layer, that says of one of its contents that it is longer.
	repo, img := layout(t, plain)
	_, tree, err := fetched(t, repo, img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	known := tree.Chunks[len(tree.Chunks)-1]
	longer := retabled(t, "plain.gz", func(string) string {
		return fmt.Sprintf(`{"version":1,"entries":[{"name":"x","type":"reg","size":%d,"offset":100,"digest":%q,"chunkDigest":%[2]q}]}`, known.Size+1, known.Digest)
	})
	for name, c := range map[string]struct {
		layers []tocLayer
		want   error // besides ErrNoIndex
	}{
		"one has none":              {[]tocLayer{plain, {gzipped(archive0), nil}}, index.ErrUnsupported},
		"no annotation":             {[]tocLayer{podman, with(plain, map[string]string{estargz.DigestAnnotation: ""})}, index.ErrUnsupported},
		"half an annotation":        {[]tocLayer{plain, with(podman, map[string]string{zstd + "checksum": ""})}, index.ErrUnsupported},
		"not eStargz":               {[]tocLayer{{gzipped(archive0), plain.annotations}}, index.ErrUnsupported},
		"cut off":                   {[]tocLayer{{plain.blob[:len(plain.blob)-10], plain.annotations}}, index.ErrUnsupported},
		"cut off before":            {[]tocLayer{{slices.Concat(plain.blob[:5000], plain.blob[len(plain.blob)-51:]), plain.annotations}}, index.ErrCorrupt},
		"cut off, zstd":             {[]tocLayer{{podman.blob[:len(podman.blob)/2], podman.annotations}}, index.ErrCorrupt},
		"another digest":            {[]tocLayer{plain, with(plain, map[string]string{estargz.DigestAnnotation: other})}, index.ErrCorrupt},
		"another digest, zstd":      {[]tocLayer{podman, with(podman, map[string]string{zstd + "checksum": other})}, index.ErrCorrupt},
		"no digest":                 {[]tocLayer{with(plain, map[string]string{estargz.DigestAnnotation: "x"})}, index.ErrCorrupt},
		"no position":               {[]tocLayer{with(podman, map[string]string{zstd + "position": "1:2"})}, index.ErrCorrupt},
		"another version":           {[]tocLayer{retabled(t, "plain.gz", func(string) string { return `{"version":2,"entries":[]}` })}, index.ErrUnsupported},
		"another size of a content": {[]tocLayer{plain, longer}, index.ErrCorrupt},
		"no JSON":                   {[]tocLayer{retabled(t, "odd.gz", func(s string) string { return s[:len(s)/2] })}, index.ErrCorrupt},
		"a file where a directory is": {[]tocLayer{plain, retabled(t, "plain.gz", func(string) string {
			return `{"version":1,"entries":[{"name":"bin/tool/x","type":"reg","size":0}]}`
		})}, index.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			repo, img := layout(t, c.layers...)
			_, _, err := fetched(t, repo, img, Options{})
			if !errors.Is(err, ErrNoIndex) || !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	repo, img = layout(t, tocLayer{gzipped(archive0), nil}, tocLayer{gzipped(archive1), nil})
	if _, _, err := fetched(t, repo, img, Options{}); !errors.Is(err, ErrNoIndex) || errors.Is(err, index.ErrUnsupported) {
		t.Errorf("without tables: %v", err)
	}
	repo, img = layout(t, longer)
	if _, _, err := fetched(t, repo, img, Options{}); err != nil {
		t.Errorf("a size that nothing contradicts: %v", err)
	}
}

// A layer shorter than the manifest says can be read by nobody; a registry that
// serves no ranges says the same.
func TestTOCTruncated(t *testing.T) {
	for _, name := range []string{"plain.gz", "podman.zst"} {
		repo, img := layout(t, goldenLayer(t, name))
		file := filepath.Join(repo.Ref().Dir(), "blobs", strings.Replace(img.Layers[0].Digest, ":", "/", 1))
		if err := os.Chmod(file, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, 5000); err != nil {
			t.Fatal(err)
		}
		if _, _, err := fetched(t, repo, img, Options{}); !errors.Is(err, ErrNoIndex) || !errors.Is(err, blob.ErrRange) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTOCLimit(t *testing.T) {
	x := &tables{}
	for _, c := range []struct {
		n    int64
		fits bool
	}{{maxIndex - 1000, true}, {1 << 62, false}, {1000, true}, {1, false}} {
		if _, err := x.room(image.Descriptor{}, c.n); (err == nil) != c.fits || err != nil && !errors.Is(err, index.ErrLimit) {
			t.Errorf("%d bytes: %v", c.n, err)
		}
	}
	raw := &Raw{Name: "x", Size: 100, Layers: make([]image.Descriptor, 1)}
	raw.Layers[0].Annotations = goldenLayer(t, "plain.gz").annotations
	for _, table := range [][]Table{nil, {{Section: estargz.Section{Length: -1}}}, {{Section: estargz.Section{Length: 101}}}, {{Section: estargz.Section{Length: 1}, At: 100}}, {{At: -1}}} {
		raw.Tables = table
		if _, err := raw.toc(); !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%+v: %v", table, err)
		}
	}
}

// FuzzTOC has two layers with arbitrary tables: what comes of them is a tree that
// can be linked, or an error of a kind that says to read the layers.
func FuzzTOC(f *testing.F) {
	for _, name := range []string{"plain.gz", "chunks.gz", "min.gz"} {
		retabled(f, name, func(s string) string {
			f.Add(s, s)
			f.Add(s, `{"version":1,"entries":[]}`)
			return s
		})
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		file, err := scratch(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		raw := &Raw{Kind: TOC, Manifest: "image", Name: "image", File: file}
		for _, table := range []string{a, b} {
			stored, digest := estargztest.Table(t, table)
			if _, err := file.WriteAt(stored, raw.Size); err != nil {
				t.Fatal(err)
			}
			const at = 20000
			n := int64(len(stored))
			raw.Layers = append(raw.Layers, image.Descriptor{Digest: "sha256:" + digest[7:], Size: at + n, Annotations: map[string]string{estargz.DigestAnnotation: digest}})
			raw.Tables = append(raw.Tables, Table{estargz.Section{Offset: at, Length: n}, raw.Size})
			raw.Size += n
		}
		tree, err := raw.Tree()
		if err != nil {
			if !errors.Is(err, ErrNoIndex) {
				t.Fatal(err)
			}
			return
		}
		sizes := map[chunk.Digest]uint32{}
		for i := range tree.Chunks {
			c := &tree.Chunks[i]
			if n, ok := sizes[c.Digest]; ok && n != c.Size {
				t.Errorf("%s has %d and %d bytes", c.Digest, n, c.Size)
			}
			sizes[c.Digest] = c.Size
		}
		tree.Walk(func(path string, ino *index.Inode) error {
			next := int64(0)
			for _, e := range ino.Extents {
				if e.Off < next || e.Off%4096 != 0 {
					t.Errorf("%q: an extent at %d, after one that ends at %d", path, e.Off, next)
				}
				if next = e.Off + int64(tree.Chunks[e.Chunk].Size); next > ino.Size {
					t.Errorf("%q of %d bytes has content up to %d", path, ino.Size, next)
				}
			}
			return nil
		})
	})
}

// What a builder has put first is known of the stream.
func TestTOCFirst(t *testing.T) {
	for name, some := range map[string]bool{"plain.gz": false, "chunks.gz": true} {
		repo, img := layout(t, goldenLayer(t, name))
		_, tree, err := fetched(t, repo, img, Options{})
		if err != nil {
			t.Fatal(err)
		}
		first := tree.Blobs[0].First
		if (first > 0) != some || first >= tree.Blobs[0].StreamSize() {
			t.Fatalf("%s: %d bytes of %d are first", name, first, tree.Blobs[0].StreamSize())
		}
		if !some {
			continue
		}
		// testdata/README.md: licenses/BSD, bin/same, which is a link to bin/tool
		for path, in := range map[string]bool{"licenses/BSD": true, "licenses/GPL-2": false} {
			ino, err := tree.Lookup(path)
			if err != nil {
				t.Fatal(err)
			}
			if c := tree.Chunks[ino.Extents[0].Chunk]; (c.End() <= first) != in {
				t.Errorf("%s ends at %d, what is first at %d", path, c.End(), first)
			}
		}
	}
}
