package estargz_test

import (
	"encoding/json"
	"os"
	"slices"
	"testing"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
	"github.com/shale-image/shale/index/estargz/estargztest"
)

// golden returns a layer of testdata and its annotation (testdata/README.md).
func golden(t testing.TB, name string) (blob []byte, digest string) {
	t.Helper()
	blob, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	j, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	annotations := map[string]string{}
	if err := json.Unmarshal(j, &annotations); err != nil {
		t.Fatal(err)
	}
	return blob, annotations[estargz.DigestAnnotation]
}

func read(t testing.TB, blob []byte, digest string) *estargz.Layer {
	t.Helper()
	at, err := estargz.Locate(blob[len(blob)-estargz.FooterSize:], int64(len(blob)), "layer")
	if err != nil {
		t.Fatal(err)
	}
	l, err := estargz.Read(blob[at.Offset:][:at.Length], at, digest, "layer", index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// lookup returns a file of a layer alone.
func lookup(t *testing.T, l *estargz.Layer, path string) *index.Inode {
	t.Helper()
	for _, c := range l.Changes {
		if c.Path == path && c.Op == index.Add {
			return c.Inode
		}
	}
	t.Fatalf("no %s", path)
	return nil
}

func TestGolden(t *testing.T) {
	for name, extents := range map[string]int{ // of the file licenses/GPL-2, 9000 bytes
		"plain.gz":  1,
		"chunks.gz": 3, // of 4096 bytes
		"min.gz":    2, // of 8192 bytes, with others in one member
		"odd.gz":    1, // two, of 5000 bytes: EROFS could not address the second
	} {
		t.Run(name, func(t *testing.T) {
			blob, digest := golden(t, name)
			l := read(t, blob, digest)
			estargztest.Compare(t, blob, l)
			if n := len(lookup(t, l, "licenses/GPL-2").Extents); n != extents {
				t.Errorf("%d extents, want %d", n, extents)
			}
			var want []string
			if name == "chunks.gz" {
				want = []string{"licenses/BSD", "bin/tool"} // and its hard link bin/same
			}
			if !slices.Equal(l.Prefetch, want) {
				t.Errorf("prefetch %q, want %q", l.Prefetch, want)
			}
			if shared := len(l.Spans) < len(l.Chunks); shared != (name == "min.gz") {
				t.Errorf("chunks share a member: %v", shared)
			}
		})
	}
}

// TestWhiteouts: the tree of the goldens has no lower layer to hide anything of.
func TestWhiteouts(t *testing.T) {
	blob, digest := golden(t, "plain.gz")
	var got []string
	for _, c := range read(t, blob, digest).Changes {
		switch c.Op {
		case index.Whiteout:
			got = append(got, "whiteout "+c.Path)
		case index.Opaque:
			got = append(got, "opaque "+c.Path)
		case index.Link:
			got = append(got, "link "+c.Path+" "+c.Target)
		}
	}
	if want := []string{"link bin/same bin/tool", "whiteout etc/gone", "opaque opaque"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
