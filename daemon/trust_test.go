package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/trust"
)

// TestBelieved: which images that the node has linked need not be read anew.
func TestBelieved(t *testing.T) {
	dir := t.TempDir()
	key, err := trust.Create(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.json")
	if err := os.WriteFile(path, fmt.Appendf(nil, `{"index_keys": [%q]}`, filepath.Join(dir, "key.pub")), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	with, without := &store{cfg: cfg}, &store{cfg: &config.Config{}}
	for name, c := range map[string]struct {
		s    *store
		r    record
		want map[reader.Trust]bool // the others are false
	}{
		"local":            {with, record{Index: reader.Local}, map[reader.Trust]bool{"local": true, "bound": true, "signed": true, "repository": true}},
		"bound":            {with, record{Index: reader.Bound}, map[reader.Trust]bool{"bound": true, "signed": true, "repository": true}},
		"of old":           {with, record{}, map[reader.Trust]bool{"bound": true, "signed": true, "repository": true}},
		"signed":           {with, record{Index: reader.Signed, Key: key.ID()}, map[reader.Trust]bool{"signed": true, "repository": true}},
		"key is gone":      {without, record{Index: reader.Signed, Key: key.ID()}, map[reader.Trust]bool{"repository": true}},
		"no configuration": {&store{}, record{Index: reader.Signed, Key: key.ID()}, map[reader.Trust]bool{"repository": true}},
		"another key":      {with, record{Index: reader.Signed, Key: "0123"}, map[reader.Trust]bool{"repository": true}},
		"no key":           {with, record{Index: reader.Signed}, map[reader.Trust]bool{"repository": true}},
		"repository":       {with, record{Index: reader.Repository, Key: key.ID()}, map[reader.Trust]bool{"repository": true}},
		"converted":        {with, record{Index: reader.Bound, Kind: reader.Nydus}, map[reader.Trust]bool{"local": true, "bound": true, "signed": true, "repository": true}},
		"of no kind":       {with, record{Index: "notary"}, nil},
	} {
		for _, at := range []reader.Trust{reader.Local, reader.Bound, reader.Signed, reader.Repository} {
			if got := c.s.believed(&c.r, at); got != c.want[at] {
				t.Errorf("%s, at %s: %v", name, at, got)
			}
		}
	}
}

// A converted image is linked once, also where nothing but the node's own indexes
// is believed: there is no other way to read it.
func TestConvertedIsLinkedOnce(t *testing.T) {
	c, ref := service(t), layout(t)
	linked := func() os.FileInfo {
		t.Helper()
		p, err := c.Pull(background, Source{Ref: ref, Platform: "linux/amd64", IndexTrust: string(reader.Local), Refresh: true}, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(filepath.Join(imageDir(c, p.ManifestDigest), "linked", "meta"))
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	first, second := linked(), linked()
	if !os.SameFile(first, second) {
		t.Error("it was linked anew")
	}
}
