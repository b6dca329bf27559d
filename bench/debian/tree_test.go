package debian

import (
	"bytes"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/oci"
)

// states are a tree as it is built up, layer by layer: things are replaced,
// removed, and come back.
func states(t *testing.T) []*archive {
	return []*archive{
		newArchive(t).add(dir("d")).add(file("d/a", "1")).add(hardLink("d/b", "d/a")).
			add(dir("d/e")).add(file("d/e/f", "2")).add(file("d.x", "")).add(file("odd 'name", "")),
		newArchive(t).add(dir("d")).add(file("d/a", "3")).add(file("d.x", "")).add(dir("g")).add(symlink("g/l", "../d")),
		newArchive(t).add(dir("d")).add(file("d/a", "3")).add(dir("d/e")).add(file("d/e/new", "")).add(file("g", "")),
	}
}

// stack makes an image of the states and returns it, and each as it is in full.
func stack(t *testing.T) (oci.Layout, []snapshot) {
	t.Helper()
	out, err := oci.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var lower snapshot
	var all []snapshot
	var layers []oci.Descriptor
	config := oci.Image{RootFS: oci.RootFS{Type: "layers"}}
	for _, a := range states(t) {
		l, err := writeLayer(out, a.file(), lower, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if lower, err = takeSnapshot(bytes.NewReader(a.buf.Bytes())); err != nil {
			t.Fatal(err)
		}
		delete(lower, ".") // no layer has it
		all = append(all, lower)
		layers = append(layers, l.Descriptor)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.diffID)
	}
	if err := out.Finish(config, layers); err != nil {
		t.Fatal(err)
	}
	return out, all
}

func TestTreeIsAllLayersTogether(t *testing.T) {
	image, all := stack(t)
	out, err := oci.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	got, err := readTree(image, out)
	if err != nil {
		t.Fatal(err)
	}
	want := all[len(all)-1]
	if changed, removed := changes(got.names, want); len(changed)+len(removed) > 0 {
		t.Errorf("from the tree to what its layers were made from, %v changed and %v are gone", changed, removed)
	}
	if changed, _ := changes(all[0], want); len(changed) == 0 {
		t.Error("no layer changes anything")
	}
	if len(got.blobs) != 3 || len(got.layers) != 3 || len(got.diffIDs) != 3 {
		t.Errorf("%d blobs, %d layers, %d diff ids", len(got.blobs), len(got.layers), len(got.diffIDs))
	}
	for i, blob := range got.blobs {
		p, err := os.ReadFile(blob)
		if err != nil || oci.Digest(p) != got.layers[i].Digest || !strings.HasPrefix(blob, string(out)) {
			t.Errorf("blob %d is %s: %v", i, blob, err)
		}
	}
}

func TestNothingIsTheEmptyTree(t *testing.T) {
	got, err := readTree("", "")
	if err != nil || got.blobs != nil || got.names != nil {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestUnpackHook runs what mmdebstrap is told to, without mmdebstrap.
func TestUnpackHook(t *testing.T) {
	image, all := stack(t)
	m, _, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "it's a root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, d := range m.Layers {
		blob, err := image.Blob(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if i == 2 { // tar does not replace a directory that is not empty
			if err := os.RemoveAll(filepath.Join(root, "g")); err != nil {
				t.Fatal(err)
			}
		}
		if out, err := exec.Command("sh", "-c", unpackHook(blob), "hook", root).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		var got []string
		err = filepath.WalkDir(root, func(name string, _ fs.DirEntry, err error) error {
			if rel, _ := filepath.Rel(root, name); rel != "." {
				got = append(got, rel)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(got)
		if want := slices.Sorted(maps.Keys(all[i])); !slices.Equal(got, want) {
			t.Errorf("after layer %d there are %q, want %q", i, got, want)
		}
	}
	p, err := os.ReadFile(filepath.Join(root, "d/a"))
	if err != nil || string(p) != "3" {
		t.Errorf("d/a holds %q, %v", p, err)
	}
}
