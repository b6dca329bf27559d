package estargztest

import (
	"archive/tar"
	"bytes"
	"io"
	"testing"

	"github.com/klauspost/compress/gzip"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index/estargz"
)

// Retable returns an eStargz layer whose table of contents is what edit makes of
// the one that blob has, and its digest, right for what it says.
func Retable(t testing.TB, blob []byte, edit func(table string) string) (layer []byte, digest string) {
	t.Helper()
	at, err := estargz.Locate(blob[max(0, len(blob)-estargz.FooterSize):], int64(len(blob)), "layer")
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(blob[at.Offset:][:at.Length]))
	if err != nil {
		t.Fatal(err)
	}
	archive := tar.NewReader(z)
	if _, err := archive.Next(); err != nil {
		t.Fatal(err)
	}
	old, err := io.ReadAll(archive)
	if err != nil {
		t.Fatal(err)
	}
	stored, digest := Table(t, edit(string(old)))
	return bytes.Join([][]byte{blob[:at.Offset], stored, blob[at.Offset+at.Length:]}, nil), digest
}

// Table returns a table of contents as an eStargz layer stores it, and its digest.
func Table(t testing.TB, table string) (stored []byte, digest string) {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Name: "stargz.index.json", Typeflag: tar.TypeReg, Size: int64(len(table))}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, table)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), chunk.Sum(chunk.SHA256, []byte(table)).String()
}
