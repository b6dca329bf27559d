package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/artifact"
	"github.com/shale-image/shale/reader"
)

// indexedImage is an image with an index beside it, in a layout.
type indexedImage struct {
	t    *testing.T
	c    *Client
	dir  string // of the layout
	ref  string
	repo *image.Repository
	img  *image.Image
	side image.Descriptor // of its index
}

// indexed makes an image; its config says of its layer what it unpacks to, if diffID
// is "", and its index what lie makes of it.
func indexed(t *testing.T, diffID string, lie func(*index.Tree)) *indexedImage {
	t.Helper()
	return indexedAt(t, chunk.Size, diffID, lie)
}

// indexedAt is indexed with files cut at multiples of cut.
func indexedAt(t *testing.T, cut uint32, diffID string, lie func(*index.Tree)) *indexedImage {
	t.Helper()
	x := &indexedImage{t: t, c: service(t), ref: strings.TrimSuffix(windowed(t), "shale") + "plain"}
	x.dir = strings.TrimSuffix(strings.TrimPrefix(x.ref, "oci:"), ":plain")
	ref, err := image.ParseRef(x.ref)
	x.must(err)
	x.repo, err = image.Open(background, ref, image.Options{})
	x.must(err)
	t.Cleanup(func() { x.repo.Close() })
	x.resolve()
	right := x.img.Config.DiffIDs
	if diffID != "" {
		config := bytes.Replace(x.img.ConfigBytes, []byte(right[0]), []byte(diffID), 1)
		manifest := bytes.Replace(x.img.ManifestBytes, []byte(sha(x.img.ConfigBytes)), []byte(sha(config)), 1)
		x.push(image.MediaTypeConfig, config)
		_, err := x.repo.PushManifest(background, image.MediaTypeManifest, manifest, "plain")
		x.must(err)
		x.resolve()
	}
	made, err := reader.Make(background, reader.Job{Manifest: x.img.ManifestDigest, Layers: x.img.Layers, DiffIDs: right, Cut: cut,
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return x.repo.Blob(ctx, x.img.Layers[n]) }})
	x.must(err)
	t.Cleanup(func() { made.Close() })
	if lie != nil {
		lie(made.Tree)
		made.Encoded, err = artifact.Encode(made.Tree, artifact.Info{Manifest: x.img.ManifestDigest, DiffIDs: x.img.Config.DiffIDs}, index.Limits{})
		x.must(err)
	}
	_, err = reader.Push(background, x.repo, x.img, made)
	x.must(err)
	x.side = made.Side
	return x
}

func (x *indexedImage) must(err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatal(err)
	}
}

func (x *indexedImage) resolve() {
	x.t.Helper()
	var err error
	x.img, err = x.repo.Resolve(background, image.Platform{OS: "linux", Architecture: "amd64"})
	x.must(err)
}

func (x *indexedImage) push(mediaType string, p []byte) {
	d := image.Descriptor{MediaType: mediaType, Digest: sha(p), Size: int64(len(p))}
	x.must(x.repo.PushBlob(background, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }))
}

func (x *indexedImage) record() (r record) {
	x.t.Helper()
	js, err := os.ReadFile(filepath.Join(imageDir(x.c, x.img.ManifestDigest), "record"))
	x.must(err)
	x.must(json.Unmarshal(js, &r))
	return r
}

// compared waits until the node goes by what it has seen itself.
func (x *indexedImage) compared() {
	x.t.Helper()
	eventually(x.t, "the index is compared", func() bool { return x.record().Index == reader.Local })
	if r := x.record(); r.Doubted != "" || r.Wrong != "" {
		x.t.Errorf("the record says %+v", r)
	}
}

func (x *indexedImage) mount() error {
	mnt, err := x.c.Mount(background, Source{Ref: x.ref, Platform: "linux/amd64"}, Place{}, nil)
	if err == nil {
		mnt.FS.Close()
	}
	return err
}

func readAll(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	for _, name := range []string{"text", "etc/hello", "big"} {
		p, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		}
		got[name] = string(p)
	}
	return got
}

// right fails the test unless the image is what its layer says.
func (x *indexedImage) right(dir string) {
	x.t.Helper()
	for name, got := range readAll(x.t, dir) {
		want := string(files[name])
		if name == "text" {
			want = string(longText())
		}
		if got != want {
			x.t.Errorf("%s: %d bytes, want %d, or others", name, len(got), len(want))
		}
	}
}

// An image that becomes complete by being read is compared with its layers, once, and
// needs no registry from then on.
func TestCompared(t *testing.T) {
	x := indexed(t, "", nil)
	mnt, _ := attach(t, x.c, x.ref)
	if r := x.record(); r.Index != reader.Repository {
		t.Fatalf("mounted by %+v", r)
	}
	x.right(mnt)
	x.compared()
	x.must(os.RemoveAll(x.dir))
	unmount(t, x.c, mnt)
	end(t, x.c)
	p, err := x.c.Pull(background, Source{Ref: x.ref, Platform: "linux/amd64", IndexTrust: string(reader.Local)}, false, nil)
	if err != nil || p.MissingBytes != 0 {
		t.Errorf("afterwards: %+v, %v", p, err)
	}
	mnt, _ = attach(t, x.c, x.ref)
	x.right(mnt)
}

// What Shale has cut as it did earlier is compared with layers that are cut likewise.
func TestComparedEarlier(t *testing.T) {
	x := indexedAt(t, chunk.Earlier, "", func(tree *index.Tree) {
		if !slices.ContainsFunc(tree.Chunks, func(c index.Chunk) bool { return c.Size == chunk.Earlier }) {
			t.Error("nothing is as large as a chunk was")
		}
	})
	mnt, _ := attach(t, x.c, x.ref)
	x.right(mnt)
	x.compared()
}

// What cannot be compared now is compared later; here, when it is unmounted.
func TestComparedLater(t *testing.T) {
	x := indexed(t, "", nil)
	mnt, _ := attach(t, x.c, x.ref)
	readAll(t, mnt)
	layer := blobFile(x.dir, x.img.Layers[0])
	x.must(os.Rename(layer, layer+".away"))
	eventually(t, "a comparison failed", func() bool {
		log, _ := os.ReadFile(filepath.Join(x.c.Root, logName))
		return bytes.Contains(log, []byte("was not compared"))
	})
	if r := x.record(); r.Index != reader.Repository || r.Doubted != "" || r.Wrong != "" {
		t.Errorf("the record says %+v", r)
	}
	x.right(mnt)
	x.must(os.Rename(layer+".away", layer))
	unmount(t, x.c, mnt)
	x.compared()
}

// A lie is found when all of the image is here. Those who have it mounted are told,
// nobody mounts it beside them, and later by the node's own index.
func TestLieIsFound(t *testing.T) {
	x := indexed(t, "", func(tree *index.Tree) {
		a, _ := tree.Lookup("etc/hello")
		b, _ := tree.Lookup("text")
		a.Size, a.Extents, b.Size, b.Extents = b.Size, b.Extents, a.Size, a.Extents
	})
	mnt, _ := attach(t, x.c, x.ref)
	if got := readAll(t, mnt); got["text"] != string(files["etc/hello"]) {
		t.Fatal("this is no lie")
	}
	eventually(t, "the lie is found", func() bool {
		st, err := x.c.Status(background)
		return err == nil && len(st.Mounts) == 1 && strings.Contains(st.Mounts[0].Wrong, "etc/hello")
	})
	if err := x.mount(); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(fmt.Sprint(err), "etc/hello") {
		t.Errorf("mounted once more: %v", err)
	}
	unmount(t, x.c, mnt)
	mnt, _ = attach(t, x.c, x.ref)
	x.right(mnt)
	if st, err := x.c.Status(background); err != nil || len(st.Mounts) != 1 || st.Mounts[0].Wrong != "" {
		t.Errorf("told of what is right: %+v, %v", st, err)
	}
}

// Layers that are not those of the image's config are nobody's image.
func TestOtherLayers(t *testing.T) {
	other := "sha256:" + strings.Repeat("12", 32)
	x := indexed(t, other, nil)
	mnt, _ := attach(t, x.c, x.ref)
	readAll(t, mnt)
	eventually(t, "it is found", func() bool { return strings.Contains(x.record().Wrong, other) })
	unmount(t, x.c, mnt)
	for range 2 {
		if err := x.mount(); !errors.Is(err, index.ErrCorrupt) || !strings.Contains(fmt.Sprint(err), other) {
			t.Errorf("mounted once more: %v", err)
		}
	}
	remove(t, x.c, x.ref)
}

// Who removes an image does not wait for its comparison, nor does who pulls it.
func TestComparisonYields(t *testing.T) {
	x := indexed(t, "", nil)
	mnt, _ := attach(t, x.c, x.ref)
	x.right(mnt)
	unmount(t, x.c, mnt) // begins it
	if _, err := x.c.Pull(background, Source{Ref: x.ref, Platform: "linux/amd64", Refresh: true}, false, nil); err != nil {
		t.Error(err)
	}
	if out, err := x.c.Remove(background, x.ref); err != nil || len(out.Images) != 1 {
		t.Errorf("%+v, %v", out, err)
	}
}

// TestNotCompared: where nothing is fetched by itself nothing is compared, and no
// layer is asked for when a mount has ended.
func TestNotCompared(t *testing.T) {
	x := indexed(t, "", nil)
	y := indexed(t, "sha256:"+strings.Repeat("12", 32), nil) // another image
	y.c = x.c
	mnt, _ := attachAs(t, x.c, x.ref, Place{NoComplete: true})
	x.right(mnt)
	unmount(t, x.c, mnt)
	mnt, _ = attach(t, y.c, y.ref)
	readAll(t, mnt)
	unmount(t, y.c, mnt)
	eventually(t, "the other one is compared", func() bool { return y.record().Wrong != "" })
	if r := x.record(); r.Index != reader.Repository || r.Doubted != "" {
		t.Errorf("the record says %+v", r)
	}
}
