package reader

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader/nydustest"
)

// local opens an index as one of this node's own.
func (j *job) local(t *testing.T, m *Made) *Raw {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "index"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	f.Write(m.Encoded)
	raw, err := LocalIndex(j.Manifest, j.Layers, f, m.Side)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestLimits has every reader meet a limit, and pass it by one.
func TestLimits(t *testing.T) {
	for kind, open := range map[Kind]func(t *testing.T) *Raw{
		Nydus: func(t *testing.T) *Raw {
			repo, img := nydusImage(t, nydustest.Batch(t))
			raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			return raw
		},
		Index: func(t *testing.T) *Raw {
			j := newJob(gzipped, archive(t, files[0]), archive(t, files[1]))
			m, _ := j.make(t)
			return j.local(t, m)
		},
		TOC: func(t *testing.T) *Raw {
			repo, img := layout(t, goldenLayer(t, "plain.gz"))
			raw, _, err := fetched(t, repo, img, Options{})
			if err != nil {
				t.Fatal(err)
			}
			return raw
		},
		SOCI: func(t *testing.T) *Raw {
			repo, img := sociImage(t, sociLayout(t), "v2")
			raw, err := Fetch(t.Context(), repo, img, Options{TempDir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			return raw
		},
	} {
		t.Run(string(kind), func(t *testing.T) {
			raw := open(t)
			defer raw.Close()
			tree, err := raw.Tree()
			if err != nil || raw.Kind != kind {
				t.Fatal(raw.Kind, err)
			}
			var most index.Limits
			tree.Walk(func(path string, ino *index.Inode) error {
				most.Entries++
				most.FileSize = max(most.FileSize, ino.Size)
				var n int64
				for _, x := range ino.Xattrs {
					n += int64(len(x.Name) + len(x.Value))
				}
				most.XattrBytes = max(most.XattrBytes, n)
				return nil
			})
			most.Entries-- // the root
			for i := range tree.Blobs {
				most.StreamBytes = max(most.StreamBytes, tree.Blobs[i].StreamSize())
			}
			for name, lim := range map[string]index.Limits{
				"Entries":       {Entries: most.Entries - 1},
				"FileSize":      {FileSize: most.FileSize - 1},
				"XattrBytes":    {XattrBytes: most.XattrBytes - 1},
				"StreamBytes":   {StreamBytes: most.StreamBytes - 1},
				"MetadataBytes": {MetadataBytes: 20},
			} {
				if lim == (index.Limits{}) || name == "XattrBytes" && lim.XattrBytes < 0 {
					continue
				}
				raw.Limits = lim
				if _, err := raw.Tree(); !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), "("+name+")") {
					t.Errorf("%s: %v", name, err)
				}
			}
			if raw.Limits = most; kind == Index || kind == Nydus { // tables have whiteouts and double names, too
				if _, err := raw.Tree(); err != nil {
					t.Error("what is just met:", err)
				}
			}
		})
	}
}

// TestLimitsRaised makes an index, and reads it, by limits that are more than the
// defaults.
func TestLimitsRaised(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h := &tar.Header{Name: "labelled", Mode: 0o644, Typeflag: tar.TypeReg, PAXRecords: map[string]string{
		"SCHILY.xattr.user.a": strings.Repeat("a", 40_000), "SCHILY.xattr.user.b": strings.Repeat("b", 40_000)}}
	if err := errors.Join(w.WriteHeader(h), w.Close()); err != nil {
		t.Fatal(err)
	}
	j := newJob(gzipped, b.Bytes())
	if _, err := Make(t.Context(), j.Job); !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), "(XattrBytes)") {
		t.Error("by the defaults:", err)
	}
	j.Limits.XattrBytes = 1 << 20
	m, err := Make(t.Context(), j.Job)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	raw := j.local(t, m)
	if _, err := raw.Tree(); !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), "(XattrBytes)") {
		t.Error("read by the defaults:", err)
	}
	raw.Limits = j.Limits
	tree, err := raw.Tree()
	if err != nil {
		t.Fatal(err)
	}
	if x := tree.Root.Children["labelled"].Xattrs; len(x) != 2 || len(x[1].Value) != 40_000 {
		t.Errorf("%d attributes", len(x))
	}
}
