package reader

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/count"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader/nydustest"
)

// nydusImage pushes an image made by Nydus into a directory.
func nydusImage(t testing.TB, objects []*nydustest.Object) (*image.Repository, *image.Image) {
	t.Helper()
	repo := openRepository(t, "oci:"+t.TempDir()+":"+nydustest.Tag, image.Options{})
	return repo, nydustest.Push(t, repo, objects)
}

// regular reads all regular files of a tree.
func regular(t testing.TB, tr *index.Tree, src blob.Source) (map[string]string, error) {
	t.Helper()
	files := map[string]string{}
	err := tr.Walk(func(path string, ino *index.Inode) error {
		if !ino.IsRegular() {
			return nil
		}
		var b bytes.Buffer
		err := content.Copy(t.Context(), &b, tr, src, ino)
		files[path] = b.String()
		return err
	})
	return files, err
}

// TestNydusZran reads an image over gzip layers, and compares its files with what
// tar makes of these.
func TestNydusZran(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("devices need root")
	}
	objects := nydustest.Zran(t)
	repo, img := nydusImage(t, objects)
	raw, tr, err := fetched(t, repo, img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Layers) != 3 || raw.Kind != Nydus || raw.Trust != Bound || len(raw.Metas) != 2 {
		t.Errorf("%d layers, kind %s, trust %s, %d with chunk info", len(img.Layers), raw.Kind, raw.Trust, len(raw.Metas))
	}
	if want := img.Layers[0].Size + img.Layers[1].Size + img.Layers[2].Size; raw.Stored != want {
		t.Errorf("%d bytes were fetched, want %d", raw.Stored, want)
	}
	if len(tr.Blobs) != 3 || tr.Blobs[0].Data != nil || int64(len(tr.Blobs[2].Data)) != tr.Blobs[2].Size || IndexDigest(tr.Blobs[2].Data) != tr.Blobs[2].Digest {
		t.Errorf("blobs %+v", tr.Blobs)
	}
	got, err := regular(t, tr, repo.Blobs())
	if err != nil {
		t.Fatal(err)
	}
	dir := nydustest.Extract(t)
	want := map[string]string{}
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		p, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		want[name] = string(p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got, want) {
		t.Errorf("files %v, want %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
}

// TestNydusRequests: of blobs with batches only the chunk info is fetched.
func TestNydusRequests(t *testing.T) {
	repo, img := nydusImage(t, nydustest.Batch(t))
	raw, tr, err := fetched(t, repo, img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(raw.Metas) != 1 || raw.Stored >= img.Layers[0].Size+img.Layers[1].Size {
		t.Errorf("%d blobs, %d bytes fetched", len(raw.Metas), raw.Stored)
	}
	asked := count.New(repo.Blobs())
	if files, err := regular(t, tr, asked); err != nil || len(files) == 0 {
		t.Errorf("%d files, %v", len(files), err)
	}
	if tr.Blobs[0].Digest != img.Layers[0].Digest || len(tr.Blobs) != 1 {
		t.Errorf("blobs %+v", tr.Blobs)
	}
}

// TestNydusTampered flips bytes of all objects as they lie in the repository: what
// comes of it is an error or the right content.
func TestNydusTampered(t *testing.T) {
	for what, objects := range map[string]func(testing.TB) []*nydustest.Object{"zran": nydustest.Zran, "batch": nydustest.Batch} {
		t.Run(what, func(t *testing.T) {
			repo, img := nydusImage(t, objects(t))
			all := func() (map[string]string, error) {
				_, tr, err := fetched(t, repo, img, Options{})
				if err != nil {
					return nil, err
				}
				return regular(t, tr, repo.Blobs())
			}
			want, err := all()
			if err != nil {
				t.Fatal(err)
			}
			failed := 0
			for _, o := range objects(t) {
				file := filepath.Join(repo.Ref().Dir(), "blobs/sha256", o.Name()[len("sha256:"):])
				if err := os.Chmod(file, 0o600); err != nil {
					t.Fatal(err)
				}
				for k := range 40 {
					p := bytes.Clone(o.Data)
					p[len(p)*k/40] ^= 0x10
					if k == 39 {
						p = p[:len(p)/2]
					}
					if err := os.WriteFile(file, p, 0o600); err != nil {
						t.Fatal(err)
					}
					got, err := all()
					if err != nil {
						failed++
						if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, chunk.ErrCorrupt) && !errors.Is(err, index.ErrUnsupported) && !errors.Is(err, blob.ErrRange) {
							t.Errorf("%s %s, byte %d: untyped error %v", o.MediaType, o.Name(), len(o.Data)*k/40, err)
						}
					} else if !maps.Equal(got, want) {
						t.Errorf("%s %s, byte %d: other content", o.MediaType, o.Name(), len(o.Data)*k/40)
					}
				}
				if err := os.WriteFile(file, o.Data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if failed < 40 {
				t.Errorf("only %d flips were seen", failed)
			}
		})
	}
}

// TestNydusPacked refuses images that are not packed as they say.
func TestNydusPacked(t *testing.T) {
	for what, change := range map[string]func([]*nydustest.Object) []*nydustest.Object{
		"chunk info of another layer": func(all []*nydustest.Object) []*nydustest.Object {
			all[2].Annotations["containerd.io/snapshot/nydus-ref"] = all[1].Name()
			return all
		},
		"chunk info not in the manifest": func(all []*nydustest.Object) []*nydustest.Object {
			all[2].Unlisted = true
			return all
		},
	} {
		repo, img := nydusImage(t, change(nydustest.Zran(t)))
		if _, _, err := fetched(t, repo, img, Options{}); !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestNydusParts: what a process is told of chunk info is not believed.
func TestNydusParts(t *testing.T) {
	repo, img := nydusImage(t, nydustest.Batch(t))
	for what, change := range map[string]func(*Meta){
		"none":      func(m *Meta) { m.Blob = 7 },
		"no parts":  func(m *Meta) { m.Parts = nil },
		"too short": func(m *Meta) { m.Parts[0].Length-- },
		"elsewhere": func(m *Meta) { m.Parts[0].At += 1 << 40 },
		"before":    func(m *Meta) { m.Parts[0].At = 0 },
		"negative":  func(m *Meta) { m.Parts[0].Length = -5 },
		"smaller":   func(m *Meta) { m.Size = 5 },
	} {
		raw, _, err := fetched(t, repo, img, Options{})
		if err != nil {
			t.Fatal(err)
		}
		change(&raw.Metas[0])
		if _, err := raw.Tree(); !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrUnsupported) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
