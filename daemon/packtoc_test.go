package daemon

import (
	"bytes"
	"compress/gzip"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index/estargz/estargztest"
)

// TestStartPackOfTables: an image whose layers have tables of contents, and SHA-256 over
// their own chunks, starts by a pack of whole chunks.
func TestStartPackOfTables(t *testing.T) {
	content := make([]byte, 300_000)
	rand.NewChaCha8([32]byte{3}).Read(content)
	toc, annotations := estargztest.Build(t, tarOf(t, "file", content), estargztest.Options{})
	z, err := gzip.NewReader(bytes.NewReader(toc))
	must(t, err)
	archive, err := io.ReadAll(z)
	must(t, err)
	x := newLayered(t, toc, archive, annotations, false)
	p := &packs{t: t, repo: x.repo, img: x.img, ref: x.src.Ref}
	read := func(dir string) {
		if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	m := p.push(p.record([]string{"all"}, read), nil)
	if m.Index != "" || m.Metadata != 0 || len(m.Table.Runs) == 0 {
		t.Errorf("%+v of %d bytes of metadata", m.PackRef, m.Metadata)
	}
	for _, r := range m.Table.Runs {
		if c := m.Table.Chunks[r.Chunk]; c.Digest.Algorithm != chunk.SHA256 || r.Count != chunk.Blocks(c.Size) {
			t.Errorf("a run of %d blocks of chunk %s of %d bytes", r.Count, c.Digest, c.Size)
		}
	}
	c := service(t)
	dir, mounted := attachAs(t, c, p.ref, Place{Command: []string{"all"}})
	read(dir)
	if s := statusOf(t, c, mounted.ID).Fill; s.Stalls != 0 || s.PackBytes != int64(len(content)) {
		t.Errorf("%+v", s)
	}
}
