package inspect

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
	"github.com/shale-image/shale/index/estargz/estargztest"
	"github.com/shale-image/shale/index/layer"
	"github.com/shale-image/shale/reader"
)

// tocImage opens an image of a layer that has a table of contents.
func tocImage(t *testing.T, p []byte, annotations map[string]string) (*Image, *image.Repository) {
	t.Helper()
	ref, err := image.ParseRef("oci:" + t.TempDir() + ":toc")
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	push := func(mediaType string, p []byte) image.Descriptor {
		d := image.Descriptor{MediaType: mediaType, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(p)), Size: int64(len(p))}
		if err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }); err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := push("application/vnd.oci.image.layer.v1.tar+gzip", p)
	d.Annotations = annotations
	z, _, err := layer.Decompress(bytes.NewReader(p), index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, z); err != nil {
		t.Fatal(err)
	}
	diffIDs := []string{fmt.Sprintf("sha256:%x", sum.Sum(nil))}
	config, err := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}})
	if err != nil {
		t.Fatal(err)
	}
	m, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": push(image.MediaTypeConfig, config), "layers": []image.Descriptor{d}})
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
	im, err := Open(t.Context(), repo, img, reader.Options{TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.Close() })
	return im, repo
}

func tocLayer(t *testing.T, dir, name string) ([]byte, map[string]string) {
	t.Helper()
	p, err := os.ReadFile(filepath.Join("../index", dir, "testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	js, err := os.ReadFile(filepath.Join("../index", dir, "testdata", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	annotations := map[string]string{}
	if err := json.Unmarshal(js, &annotations); err != nil {
		t.Fatal(err)
	}
	return p, annotations
}

func TestCheckTOC(t *testing.T) {
	for _, name := range []string{"plain.gz", "chunks.gz", "min.gz", "odd.gz", "podman.zst", "skopeo.zst", "stargz.zst"} {
		dir := "estargz"
		if strings.HasSuffix(name, ".zst") {
			dir = "zstdchunked"
		}
		p, annotations := tocLayer(t, dir, name)
		im, _ := tocImage(t, p, annotations)
		r := check(t, im)
		if len(r.Defects) > 0 || r.Chunks < 5 {
			t.Errorf("%s: %+v", name, r)
		}
		if s := Inspect(im); !s.Lazy || s.Converted || s.Index != string(reader.TOC) || s.IndexTrust != string(reader.Bound) || s.IndexBytes == 0 {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// TestCheckTOCLies: a table whose digest is right says what its layer has not.
func TestCheckTOCLies(t *testing.T) {
	golden, _ := tocLayer(t, "estargz", "chunks.gz")
	for name, c := range map[string]struct {
		edit  func(entry map[string]any)
		wants string // part of a defect
	}{
		"another owner": {func(e map[string]any) { e["uid"] = 77 }, "owner"},
		"another name": {func(e map[string]any) {
			if e["type"] == "reg" {
				e["name"] = "licenses/GPL-9"
			} else {
				delete(e, "name") // a chunk is of the file before it
			}
		}, "names"},
		"a hole": {func(e map[string]any) {
			if e["chunkOffset"] == 4096.0 {
				e["chunkType"] = "zeros"
			}
		}, "content is not"},
		"another digest": {func(e map[string]any) {
			if e["chunkOffset"] == 4096.0 {
				e["chunkDigest"] = "sha256:" + strings.Repeat("1", 64)
			}
		}, "digest is"},
	} {
		t.Run(name, func(t *testing.T) {
			p, digest := estargztest.Retable(t, golden, func(s string) string { return edited(t, s, c.edit) })
			im, _ := tocImage(t, p, map[string]string{estargz.DigestAnnotation: digest})
			if im.Damage != nil {
				t.Fatal(im.Damage)
			}
			r := check(t, im)
			if !slices.ContainsFunc(r.Defects, func(d Defect) bool { return strings.Contains(d.Problem, c.wants) }) {
				t.Errorf("%+v, want one about %s", r.Defects, c.wants)
			}
		})
	}
}

// TestRefuted: an index that is of no use, beside an image whose layers have tables of
// contents, is what check tells of; the image is looked into by the tables.
func TestRefuted(t *testing.T) {
	p, annotations := tocLayer(t, "estargz", "chunks.gz")
	im, repo := tocImage(t, p, annotations)
	junk := []byte("no index")
	d := image.Descriptor{MediaType: reader.IndexMediaType, Digest: reader.IndexDigest(junk), Size: int64(len(junk))}
	if err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(junk)), nil }); err != nil {
		t.Fatal(err)
	}
	subject := image.Descriptor{MediaType: im.Manifest.MediaType, Digest: im.Manifest.ManifestDigest, Size: int64(len(im.Manifest.ManifestBytes))}
	if _, err := repo.PushArtifact(t.Context(), subject, reader.ArtifactType, []image.Descriptor{d}, nil, nil); err != nil {
		t.Fatal(err)
	}
	im, err := Open(t.Context(), repo, im.Manifest, reader.Options{TempDir: t.TempDir()})
	if err != nil || im.Damage != nil || !im.HasRanges(t.Context()) {
		t.Fatalf("%+v, %v", im, err)
	}
	if s := Inspect(im); !s.Lazy || s.Index != string(reader.TOC) {
		t.Errorf("%+v", s)
	}
	r := check(t, im)
	if len(r.Defects) != 1 || r.Defects[0].Object != "index" || !strings.Contains(r.Defects[0].Problem, "sha256:") {
		t.Errorf("%+v", r.Defects)
	}
}

// edited is a table with another entry of licenses/GPL-2.
func edited(t *testing.T, table string, edit func(map[string]any)) string {
	t.Helper()
	var all struct {
		Version int              `json:"version"`
		Entries []map[string]any `json:"entries"`
	}
	if err := json.Unmarshal([]byte(table), &all); err != nil {
		t.Fatal(err)
	}
	for _, e := range all.Entries {
		if e["name"] == "./licenses/GPL-2" {
			edit(e)
		}
	}
	p, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return string(p)
}

// TestCheckTOCFlips: what is damaged in a layer shows, with the file that has it.
func TestCheckTOCFlips(t *testing.T) {
	for _, name := range []string{"chunks.gz", "podman.zst"} {
		dir := "estargz"
		if strings.HasSuffix(name, ".zst") {
			dir = "zstdchunked"
		}
		p, annotations := tocLayer(t, dir, name)
		im, repo := tocImage(t, p, annotations)
		ino, err := im.Tree.Lookup("licenses/GPL-2")
		if err != nil {
			t.Fatal(err)
		}
		ch := im.Tree.Chunks[ino.Extents[0].Chunk]
		at := im.Tree.Blobs[0].Cover(ch.Offset, ch.End())[0].Offset + 30
		stored := filepath.Join(repo.Ref().Dir(), "blobs", strings.Replace(im.Manifest.Layers[0].Digest, ":", "/", 1))
		flipped := bytes.Clone(p)
		flipped[at] ^= 0x55
		if err := os.Remove(stored); err != nil {
			t.Fatal(err)
		}
		write(t, stored, flipped)
		r := check(t, im)
		if !slices.ContainsFunc(r.Defects, func(d Defect) bool {
			return slices.Contains(d.Files, "/licenses/GPL-2") && d.Chunk == ch.Digest.String()
		}) {
			t.Errorf("%s: %+v", name, r.Defects)
		}
		if len(r.Defects) > 4 {
			t.Errorf("%s: one byte gives %d defects", name, len(r.Defects))
		}
	}
}

// A table that is not the one that its annotation names is a defect, too.
func TestCheckTOCForeign(t *testing.T) {
	p, _ := tocLayer(t, "estargz", "plain.gz")
	_, other := tocLayer(t, "estargz", "chunks.gz")
	im, _ := tocImage(t, p, other)
	r := check(t, im)
	if im.Tree != nil || len(r.Defects) != 1 || r.Defects[0].Object != "index" || !strings.Contains(r.Defects[0].Problem, "digest") {
		t.Errorf("%+v", r)
	}
}
