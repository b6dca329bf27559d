package daemon

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index/estargz"
	"github.com/shale-image/shale/index/estargz/estargztest"
	"github.com/shale-image/shale/reader"
)

// layered is an image of one layer in a registry.
type layered struct {
	src  Source
	repo *image.Repository
	img  *image.Image
	size int64 // of the layer
	side image.Descriptor
}

// newLayered pushes a layer that unpacks to an archive. without has the registry answer
// with all of an object to who asks for a part.
func newLayered(t *testing.T, layer, archive []byte, annotations map[string]string, without bool) *layered {
	t.Helper()
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if without {
			r.Header.Del("Range")
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return newLayeredAt(t, strings.TrimPrefix(s.URL, "http://")+"/app:1", layer, archive, annotations)
}

func newLayeredAt(t *testing.T, ref string, layer, archive []byte, annotations map[string]string) *layered {
	t.Helper()
	x := &layered{src: Source{Ref: ref, Platform: "linux/amd64"}, size: int64(len(layer))}
	x.repo = openRef(t, x.src.Ref)
	push := func(mediaType string, p []byte) image.Descriptor {
		d := image.Descriptor{MediaType: mediaType, Digest: sha(p), Size: int64(len(p))}
		must(t, x.repo.PushBlob(background, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }))
		return d
	}
	kind := "application/vnd.oci.image.layer.v1.tar+gzip"
	if !bytes.HasPrefix(layer, []byte("\x1f\x8b")) {
		kind = "application/vnd.oci.image.layer.v1.tar+zstd"
	}
	d := push(kind, layer)
	d.Annotations = annotations
	config, err := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": []string{sha(archive)}}})
	must(t, err)
	manifest, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": push(image.MediaTypeConfig, config), "layers": []any{d}})
	must(t, err)
	_, err = x.repo.PushManifest(background, image.MediaTypeManifest, manifest, "1")
	must(t, err)
	x.img, err = x.repo.Resolve(background, image.Platform{OS: "linux", Architecture: "amd64"})
	must(t, err)
	return x
}

// index pushes what shale index does.
func (x *layered) index(t *testing.T) *layered {
	t.Helper()
	return x.indexAt(t, chunk.Size)
}

// indexAt is index with files cut at multiples of cut.
func (x *layered) indexAt(t *testing.T, cut uint32) *layered {
	t.Helper()
	made, err := reader.Make(background, reader.Job{Manifest: x.img.ManifestDigest, Layers: x.img.Layers, DiffIDs: x.img.Config.DiffIDs, Cut: cut,
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return x.repo.Blob(ctx, x.img.Layers[n]) }})
	must(t, err)
	t.Cleanup(func() { made.Close() })
	_, err = reader.Push(background, x.repo, x.img, made)
	must(t, err)
	x.side = made.Side
	return x
}

func zstded(t *testing.T, p []byte) []byte {
	t.Helper()
	e, err := zstd.NewWriter(nil)
	must(t, err)
	return e.EncodeAll(p, nil)
}

// TestPlanFallsBack: a plan says what a pull then does, where an index is of no use.
func TestPlanFallsBack(t *testing.T) {
	content := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{1}).Read(content)
	archive := tarOf(t, "file", content)
	small := tarOf(t, "file", content[:100_000])
	toc, annotations := estargztest.Build(t, small, estargztest.Options{})
	unpacked := func(p []byte) []byte {
		z, err := gzip.NewReader(bytes.NewReader(p))
		must(t, err)
		all, err := io.ReadAll(z)
		must(t, err)
		return all
	}
	wrong, digest := estargztest.Retable(t, toc, func(table string) string { return strings.Replace(table, `"size":100000`, `"size":-7`, 1) })
	for _, c := range []struct {
		what   string
		image  *layered
		reason string // "": it is lazy
		kind   reader.Kind
	}{
		{"an index", newLayered(t, gzipped(archive), archive, nil, false).index(t), "", reader.Index},
		{"no index", newLayered(t, gzipped(archive), archive, nil, false), "has no index", ""},
		{"a registry without ranges", newLayered(t, gzipped(archive), archive, nil, true).index(t), "does not serve parts of objects", ""},
		{"a table of contents", newLayered(t, toc, unpacked(toc), annotations, false), "", reader.TOC},
		{"a wrong table of contents", newLayered(t, wrong, unpacked(wrong), map[string]string{estargz.DigestAnnotation: digest}, false), "-7", ""},
		{"one of another digest", newLayered(t, toc, unpacked(toc), map[string]string{estargz.DigestAnnotation: digest}, false), "digest", ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := service(t)
			p, err := s.Plan(background, c.image.src)
			must(t, err)
			if p.Lazy != (c.reason == "") || !strings.Contains(p.Reason, c.reason) || p.Known || p.Index != c.kind || len(p.Layers) != 1 {
				t.Fatalf("planned: %+v", p)
			}
			l, all := p.Layers[0], c.image.size
			if p.Lazy {
				if p.StartBytes != p.MetadataBytes || p.StartBytes == 0 || p.StartBytes > all || p.ContentBytes < 100_000 || p.FetchBytes > p.MostBytes {
					t.Errorf("planned: %+v", p)
				}
			} else if p.StartBytes != all || p.FetchBytes != all || p.MostBytes != all || p.ContentBytes != 0 || l.ReadBytes != all {
				t.Errorf("planned: %+v", p)
			}
			note := ""
			_, err = s.Pull(background, c.image.src, false, func(p Progress) { note += p.Note })
			must(t, err)
			if (note == "") != p.Lazy || !strings.Contains(note, c.reason) {
				t.Errorf("planned: %+v, but the pull says %q", p, note)
			}
			known, err := s.Plan(background, c.image.src)
			must(t, err)
			if !p.Lazy {
				if !known.Known || !known.Lazy || known.Index != reader.Index || known.IndexTrust != reader.Local || known.MetadataBytes == 0 ||
					known.FetchBytes != 0 || known.MostBytes != 0 || known.ContentBytes == 0 || known.HereBytes != known.ContentBytes {
					t.Errorf("once it is known: %+v", known)
				}
				return
			}
			want := *p
			want.Known, want.StartBytes, want.FetchBytes, want.MostBytes = true, 0, p.FetchBytes-p.StartBytes, p.MostBytes-p.StartBytes
			got, _ := json.Marshal(known)
			if js, _ := json.Marshal(want); !bytes.Equal(js, got) {
				t.Errorf("once it is known: %s, want %s", got, js)
			}
		})
	}
}

// TestPlanBounds reads an image in an order that is bad for it: what is fetched lies
// between the bounds of the plan.
func TestPlanBounds(t *testing.T) {
	for _, c := range []struct {
		what  string
		pack  func(archive []byte) []byte
		size  int
		frame bool
	}{
		{"gzip", gzipped, 2 << 20, false},
		{"one zstd frame", func(p []byte) []byte { return zstded(t, p) }, 2 << 20, false},
		{"one zstd frame of a block", func(p []byte) []byte { return zstded(t, p) }, 100_000, true},
	} {
		t.Run(c.what, func(t *testing.T) {
			text := longText()
			text = text[:min(c.size, len(text))]
			archive := tarOf(t, "text", text)
			x, s := newLayered(t, c.pack(archive), archive, nil, false).index(t), service(t)
			p, err := s.Plan(background, x.src)
			must(t, err)
			l := p.Layers[0]
			if l.OneFrame != c.frame || c.frame && (l.Pieces != 1 || l.ReadBytes != x.size) || !c.frame && (l.Pieces < 3 || l.ReadBytes > x.size/3) {
				t.Errorf("planned: %+v", l)
			}
			dir, m := attachAs(t, s, x.src.Ref, Place{ReadAheadKiB: 4})
			f, err := os.Open(filepath.Join(dir, "text"))
			must(t, err)
			defer f.Close()
			got := make([]byte, len(text))
			for at := len(text) &^ 4095; at >= 0; at -= 4096 {
				n := min(4096, len(text)-at)
				if _, err := f.ReadAt(got[at:at+n], int64(at)); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, text) {
				t.Error("other bytes")
			}
			st := mountStatus(t, s, m.ID)
			fetched := st.Fill.FetchedBytes + p.StartBytes
			if fetched > p.MostBytes || st.MissingBytes != 0 || c.frame && (st.Fill.Requests != 1 || fetched != p.FetchBytes) {
				t.Errorf("%d bytes were fetched in %d requests, planned: %+v", fetched, st.Fill.Requests, p)
			}
			if fetched < p.FetchBytes*9/10 { // spans that chunks share are kept, so not much more come
				t.Errorf("only %d bytes were fetched, planned: %+v", fetched, p)
			}
		})
	}
}
