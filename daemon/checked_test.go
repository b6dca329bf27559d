package daemon

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz/estargztest"
	"github.com/shale-image/shale/reader"
)

// TestTablesChecked: when all of an image is here that was used by tables of contents,
// its layers are compared with its config, and nothing else is made of them.
func TestTablesChecked(t *testing.T) {
	content := make([]byte, 300_000)
	rand.NewChaCha8([32]byte{2}).Read(content)
	toc, annotations := estargztest.Build(t, tarOf(t, "file", content), estargztest.Options{})
	z, err := gzip.NewReader(bytes.NewReader(toc))
	must(t, err)
	archive, err := io.ReadAll(z)
	must(t, err)
	for what, c := range map[string]struct {
		archive []byte // that the config tells of
		wrong   bool
	}{"right": {archive, false}, "another": {tarOf(t, "other", nil), true}} {
		t.Run(what, func(t *testing.T) {
			x := newLayered(t, toc, c.archive, annotations, false)
			s := service(t)
			dir, _ := attach(t, s, x.src.Ref)
			if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			must(t, unix.Unmount(dir, 0))
			images := &store{dir: filepath.Join(s.Root, "images")}
			var rec *record
			eventually(t, "the layers are compared", func() bool {
				rec, err = images.loadRecord(x.img.ManifestDigest)
				return err == nil && (rec.Checked || rec.Wrong != "")
			})
			if rec.Kind != reader.TOC || rec.Index != reader.Bound || rec.Checked == c.wrong {
				t.Errorf("%+v", rec)
			}
			if _, err := os.Stat(filepath.Join(images.path(x.img.ManifestDigest), indexFile)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("an index was made: %v", err)
			}
			df, err := s.Df(background)
			must(t, err)
			if n := df.Pool.Present; n > 400_000 {
				t.Errorf("the pool has %d bytes", n)
			}
			_, err = s.Pull(background, x.src, false, nil)
			if c.wrong != errors.Is(err, index.ErrCorrupt) || c.wrong && !strings.Contains(err.Error(), sha(c.archive)) {
				t.Errorf("the next use: %v", err)
			}
		})
	}
}
