package mounttest

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/convert"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index/estargz/estargztest"
	"github.com/shale-image/shale/index/soci/socitest"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/reader/nydustest"
)

// format is a way to store an image that a reader reads.
type format struct {
	name string
	want reader.Kind // of reader.Fetch; "": there is no index, and all layers are read
	// make makes an image of this format, tagged "image", from its layers as they
	// are unpacked.
	make func(t testing.TB, repo *image.Repository, archives [][]byte)
	// table says that the format cannot keep what JSON cannot: names that are not
	// UTF-8; and fractions of seconds.
	table bool
}

// formats lists the ways to store an image. A reader that is new is one more line.
var formats = []format{
	{"RAFS", reader.Nydus, converted, false},
	{"tar", reader.Index, indexed(func(p []byte) []byte { return p }), false},
	{"gzip", reader.Index, indexed(gzipped), false},
	{"gzip, several members", reader.Index, indexed(members(300_007)), false},
	{"zstd, one frame", reader.Index, indexed(zstded(1 << 40)), false},
	{"zstd, several frames", reader.Index, indexed(zstded(1<<20 + 1)), false},
	{"gzip without an index", "", func(t testing.TB, repo *image.Repository, archives [][]byte) {
		push(t, repo, archives, plainly(gzipped))
	}, false},
	{"zstd without an index", "", func(t testing.TB, repo *image.Repository, archives [][]byte) {
		push(t, repo, archives, plainly(zstded(1<<40)))
	}, false},
	{"eStargz", reader.TOC, tables(estargztest.Options{}), true},
	{"eStargz, odd chunks", reader.TOC, tables(estargztest.Options{Chunk: 100_001, Landmark: "size65536"}), true},
	{"zstd:chunked", reader.TOC, tables(estargztest.Options{Zstd: true}), true}, // a file of 8 MiB and one of 10 are recut
	{"zstd:chunked by the stargz snapshotter", reader.TOC, tables(estargztest.Options{Zstd: true, Stargz: true}), true},
	{"SOCI", reader.SOCI, ztocs(func(p []byte) []byte { return p }, 1), false},
	{"SOCI, gzip", reader.SOCI, ztocs(gzipped, 1), false},
	{"SOCI, version 2", reader.SOCI, ztocs(gzipped, 2), false},
	{"Nydus, batches", reader.Nydus, nydusBatches, false},
}

// TestReaders: whatever an image is stored as, what is mounted is what GNU tar
// unpacks. The whole suite runs with the device face; other faces show the tree.
func TestReaders(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	references := map[bool]string{}
	for _, f := range formats {
		layers := awkwardLayers(f.table)
		if references[f.table] == "" {
			references[f.table] = extract(t, layers...)
		}
		reference := references[f.table]
		t.Run(f.name, func(t *testing.T) {
			s := f.read(t, layers)
			for _, face := range mount.Faces() {
				t.Run(face.Name(), func(t *testing.T) {
					if face.Name() == "device" {
						Run(t, face, s, slices.Concat(layers...), reference)
						return
					}
					same(t, reference, shown(t, face, s))
				})
			}
		})
	}
}

// TestZran is the same of an image that nydus-image made over gzip layers. No test can
// make one of the awkward tree, so it is of what its layers have.
func TestZran(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	repo := repository(t, "oci:"+t.TempDir()+":"+nydustest.Tag)
	s := fetched(t, repo, nydustest.Push(t, repo, nydustest.Zran(t)), reader.Nydus)
	reference := nydustest.Extract(t)
	// No layer has the root, which tar has made.
	root := s.tree.Root
	must(t, os.Chmod(reference, os.FileMode(root.Mode&0o777)))
	must(t, os.Lchown(reference, int(root.UID), int(root.GID)))
	must(t, os.Chtimes(reference, time.Time{}, time.Unix(root.Mtime.Sec, int64(root.Mtime.Nsec))))
	for _, face := range mount.Faces() {
		t.Run(face.Name(), func(t *testing.T) { same(t, reference, shown(t, face, s)) })
	}
}

// shown shows an image by a face.
func shown(t *testing.T, face mount.Face, s stored) (at string) {
	t.Helper()
	dir := t.TempDir()
	store(t, dir, s)
	n, err := open(dir)
	must(t, err)
	t.Cleanup(func() { must(t, n.close()) })
	if face.Name() == "direct" {
		must(t, n.fill.Complete(t.Context(), nil))
	}
	at, _ = show(t, face, n.image())
	return at
}

// awkwardLayers is the awkward tree as layers have it: hung in one of its own, and
// one that takes away and changes what is below it.
func awkwardLayers(table bool) [][]file {
	var base, one, top []file
	when := time.Unix(1700000000, 123456789)
	add := func(to *[]file, kind byte, name, data string) *file {
		*to = append(*to, file{Header: tar.Header{Typeflag: kind, Name: name, Mode: 0o755, ModTime: when, Size: int64(len(data))}, data: []byte(data)})
		return &(*to)[len(*to)-1]
	}
	for _, f := range awkward() {
		delete(f.PAXRecords, "SCHILY.xattr.trusted.overlay.opaque") // an instruction to a file system: refused by name
		if f.Name == hung {
			add(&one, tar.TypeDir, ".", "")
			one = append(one, f)
			continue
		}
		if len(f.Name) <= len("many/entry-999") || !strings.HasPrefix(f.Name, "many/") {
			base = append(base, f)
		}
	}
	for _, dir := range []string{"covered", "covered/below", "merged"} {
		add(&base, tar.TypeDir, dir, "")
		add(&base, tar.TypeReg, dir+"/lower", strings.Repeat(dir, 1000))
	}
	for _, name := range []string{"doomed", "becomes-directory", "becomes-symlink", "becomes-other"} {
		add(&base, tar.TypeReg, name, strings.Repeat(name, 5000))
	}
	add(&top, tar.TypeDir, ".", "")
	add(&top, tar.TypeReg, ".wh.doomed", "")
	add(&top, tar.TypeReg, ".wh.never-was", "")
	add(&top, tar.TypeDir, "covered", "")
	add(&top, tar.TypeReg, "covered/upper", "upper")
	add(&top, tar.TypeReg, "covered/.wh..wh..opq", "")
	add(&top, tar.TypeDir, "merged", "").Mode = 0o700
	add(&top, tar.TypeReg, "merged/upper", "upper")
	add(&top, tar.TypeDir, "becomes-directory", "")
	add(&top, tar.TypeReg, "becomes-directory/file", "file")
	add(&top, tar.TypeSymlink, "becomes-symlink", "").Linkname = "linked"
	add(&top, tar.TypeReg, "becomes-other", strings.Repeat("other", 40_000))
	add(&top, tar.TypeLink, "link-from-above", "").Linkname = "linked"
	all := [][]file{base, one, top}
	if table {
		for i, files := range all {
			all[i] = slices.DeleteFunc(files, func(f file) bool { return !utf8.ValidString(f.Name) })
			for k := range all[i] {
				all[i][k].ModTime = time.Unix(all[i][k].ModTime.Unix(), 0)
			}
		}
	}
	return all
}

// read makes an image of the format and reads it as a node would.
func (f *format) read(t *testing.T, layers [][]file) stored {
	t.Helper()
	repo := repository(t, "oci:"+t.TempDir()+":image")
	var archives [][]byte
	for _, files := range layers {
		archives = append(archives, archive(t, files, true))
	}
	f.make(t, repo, archives)
	img, err := repo.Resolve(t.Context(), linux)
	must(t, err)
	var s stored
	if f.want == "" {
		var here sync.Map
		m := scanned(t, repo, img, func(d chunk.Digest, p []byte) error {
			here.Store(d, bytes.Clone(p))
			return nil
		})
		s = stored{tree: m.Tree, here: map[chunk.Digest][]byte{}}
		here.Range(func(d, p any) bool {
			s.here[d.(chunk.Digest)] = p.([]byte)
			return true
		})
		return s
	}
	return fetched(t, repo, img, f.want)
}

// fetched reads an image by its index.
func fetched(t *testing.T, repo *image.Repository, img *image.Image, want reader.Kind) (s stored) {
	t.Helper()
	raw, err := reader.Fetch(t.Context(), repo, img, reader.Options{TempDir: t.TempDir()})
	must(t, err)
	defer raw.Close()
	if raw.Kind != want {
		t.Fatalf("read as %s, want %s", raw.Kind, want)
	}
	s = stored{blobs: map[string][]byte{}}
	s.tree, err = raw.Tree()
	must(t, err)
	for _, b := range s.tree.Blobs {
		if b.Data != nil {
			s.blobs[b.Digest] = b.Data
			continue
		}
		s.blobs[b.Digest], err = blob.ReadAll(t.Context(), repo.Blobs(), blob.Ref{Digest: b.Digest, Size: b.Size}, 0, b.Size)
		must(t, err)
	}
	return s
}

// converted makes what shale convert makes of an image.
func converted(t testing.TB, repo *image.Repository, archives [][]byte) {
	src := repository(t, "oci:"+filepath.Join(t.TempDir(), "plain")+":image")
	push(t, src, archives, plainly(gzipped))
	_, err := convert.Convert(t.Context(), src, repo, convert.Options{Platform: linux, TempDir: t.TempDir()})
	must(t, err)
}

// indexed makes an image with the index beside it that shale index pushes.
func indexed(compress func([]byte) []byte) func(testing.TB, *image.Repository, [][]byte) {
	return func(t testing.TB, repo *image.Repository, archives [][]byte) {
		img := push(t, repo, archives, plainly(compress))
		_, err := reader.Push(t.Context(), repo, img, scanned(t, repo, img, nil))
		must(t, err)
	}
}

// ztocs makes an image with a SOCI index of all layers but the last: beside it, or, as
// version 2 has it, named by its manifest.
func ztocs(compress func([]byte) []byte, version int) func(testing.TB, *image.Repository, [][]byte) {
	return func(t testing.TB, repo *image.Repository, archives [][]byte) {
		img := push(t, repo, archives, plainly(compress))
		var parts []image.Descriptor
		for i, a := range archives[:len(archives)-1] {
			p, err := socitest.Build(compress(a), 100_000)
			must(t, err)
			d := put(t, repo, reader.SOCIZtoc, p)
			d.Annotations = map[string]string{reader.SOCILayer: img.Layers[i].Digest}
			parts = append(parts, d)
		}
		if version == 2 {
			index, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "artifactType": reader.SOCIType2,
				"config": put(t, repo, "application/vnd.oci.empty.v1+json", []byte("{}")), "layers": parts})
			must(t, err)
			d, err := repo.PushManifest(t.Context(), image.MediaTypeManifest, index, "")
			must(t, err)
			m := bytes.Replace(img.ManifestBytes, []byte("{"), fmt.Appendf(nil, "{\"annotations\":{%q:%q},", reader.BoundSOCI, d.Digest), 1)
			_, err = repo.PushManifest(t.Context(), image.MediaTypeManifest, m, "image")
			must(t, err)
			return
		}
		subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
		_, err := repo.PushArtifact(t.Context(), subject, reader.SOCIType1, parts, nil, nil)
		must(t, err)
	}
}

// nydusBatches makes what shale convert makes, and then has the chunk table tell no
// more of batches than nydus-image's does: only the blobs have it.
func nydusBatches(t testing.TB, repo *image.Repository, archives [][]byte) {
	converted(t, repo, archives)
	img, err := repo.Resolve(t.Context(), linux)
	must(t, err)
	old, _ := reader.Bootstrap(img)
	layer, err := blob.ReadAll(t.Context(), repo.Blobs(), old.Ref(), 0, old.Size)
	must(t, err)
	boot := nydustest.Bootstrap(t, []*nydustest.Object{{Data: layer}})
	if n := nydustest.Untold(boot); n < 10 {
		t.Fatalf("%d chunks in batches", n)
	}
	d := put(t, repo, old.MediaType, nydustest.Pack(boot).Data)
	var m map[string]any
	must(t, json.Unmarshal(img.ManifestBytes, &m))
	for _, l := range m["layers"].([]any) {
		if l := l.(map[string]any); l["digest"] == old.Digest {
			l["digest"], l["size"] = d.Digest, d.Size
		}
	}
	p, err := json.Marshal(m)
	must(t, err)
	_, err = repo.PushManifest(t.Context(), img.MediaType, p, "image")
	must(t, err)
}

// tables makes an image of layers with tables of contents.
func tables(o estargztest.Options) func(testing.TB, *image.Repository, [][]byte) {
	return func(t testing.TB, repo *image.Repository, archives [][]byte) {
		push(t, repo, archives, func(p []byte) ([]byte, map[string]string) { return estargztest.Build(t, p, o) })
	}
}

// scanned reads all layers of an image.
func scanned(t testing.TB, repo *image.Repository, img *image.Image, keep func(chunk.Digest, []byte) error) *reader.Made {
	t.Helper()
	m, err := reader.Make(t.Context(), reader.Job{
		Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs, Keep: keep, TempDir: t.TempDir(),
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return repo.Blob(ctx, img.Layers[n]) },
	})
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

var linux = image.Platform{OS: "linux", Architecture: "amd64"}

func repository(t testing.TB, name string) *image.Repository {
	t.Helper()
	ref, err := image.ParseRef(name)
	must(t, err)
	repo, err := image.Open(t.Context(), ref, image.Options{})
	must(t, err)
	t.Cleanup(func() { repo.Close() })
	return repo
}

// plainly compresses a layer that has no annotations.
func plainly(compress func([]byte) []byte) func([]byte) ([]byte, map[string]string) {
	return func(p []byte) ([]byte, map[string]string) { return compress(p), nil }
}

// push pushes an image of archives; compress makes a layer of one, with the
// annotations of its descriptor.
func push(t testing.TB, repo *image.Repository, archives [][]byte, compress func([]byte) ([]byte, map[string]string)) *image.Image {
	t.Helper()
	var layers []image.Descriptor
	var diffIDs []string
	for _, a := range archives {
		p, annotations := compress(a)
		kind := ""
		switch {
		case bytes.HasPrefix(p, []byte("\x1f\x8b")):
			kind = "+gzip"
		case bytes.HasPrefix(p, []byte("\x28\xb5\x2f\xfd")):
			kind = "+zstd"
		}
		d := put(t, repo, "application/vnd.oci.image.layer.v1.tar"+kind, p)
		d.Annotations = annotations
		layers, diffIDs = append(layers, d), append(diffIDs, chunk.Sum(chunk.SHA256, a).String())
	}
	config, err := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}})
	must(t, err)
	m, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": put(t, repo, image.MediaTypeConfig, config), "layers": layers})
	must(t, err)
	_, err = repo.PushManifest(t.Context(), image.MediaTypeManifest, m, "image")
	must(t, err)
	img, err := repo.Resolve(t.Context(), linux)
	must(t, err)
	return img
}

func put(t testing.TB, repo *image.Repository, mediaType string, p []byte) image.Descriptor {
	t.Helper()
	d := image.Descriptor{MediaType: mediaType, Digest: chunk.Sum(chunk.SHA256, p).String(), Size: int64(len(p))}
	must(t, repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }))
	return d
}

// members makes gzip of members that begin each so many bytes, as those of bgzip do.
func members(size int) func([]byte) []byte {
	return func(p []byte) (out []byte) {
		for len(p) > 0 {
			n := min(size, len(p))
			out = append(out, gzipped(p[:n])...)
			p = p[n:]
		}
		return out
	}
}

func zstded(frame int) func([]byte) []byte {
	return func(p []byte) (out []byte) {
		e, _ := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
		for len(p) > 0 {
			n := min(frame, len(p))
			out = e.EncodeAll(p[:n], out)
			p = p[n:]
		}
		return out
	}
}
