package dirblob_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/blob/dirblob"
)

func open(t *testing.T, dir string) *dirblob.Source {
	t.Helper()
	s, err := dirblob.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func write(t *testing.T, name string, p []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, p, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	for _, layout := range []string{"blobs/sha256", "."} {
		t.Run(layout, func(t *testing.T) {
			blobtest.Run(t, func(contents map[string][]byte) blob.Source {
				dir := t.TempDir()
				for digest, p := range contents {
					write(t, filepath.Join(dir, layout, strings.TrimPrefix(digest, "sha256:")), p)
				}
				return open(t, dir)
			})
		})
	}
}

func TestHostileDirectory(t *testing.T) {
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "secret")
	write(t, outside, []byte("secret"))
	hex := func(c string) string { return strings.Repeat(c, 64) }
	write(t, filepath.Join(dir, "file"), []byte("inside"))
	for _, err := range []error{
		os.Symlink(outside, filepath.Join(dir, hex("a"))),
		os.Symlink("file", filepath.Join(dir, hex("b"))),
		syscall.Mkfifo(filepath.Join(dir, hex("c")), 0o644),
		os.Mkdir(filepath.Join(dir, hex("d")), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, dir)
	for _, digest := range []string{
		"sha256:" + hex("a"), "sha256:" + hex("b"), "sha256:" + hex("c"), "sha256:" + hex("d"),
		"sha256:../../etc/passwd", "file", "sha256:" + hex("E"), "sha512:" + hex("e"), "",
	} {
		r, err := s.Range(t.Context(), blob.Ref{Digest: digest}, 0, 1)
		if err == nil {
			r.Close()
			t.Errorf("%s: was opened", digest)
		}
		if digest != "sha256:"+hex("a") && !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("%s: %v", digest, err)
		}
	}
}

func TestTruncatedWhileOpen(t *testing.T) {
	dir := t.TempDir()
	p := make([]byte, 10000)
	ref := blobtest.Ref(p)
	name := filepath.Join(dir, strings.TrimPrefix(ref.Digest, "sha256:"))
	write(t, name, p)
	r, err := open(t, dir).Range(t.Context(), ref, 0, 10000)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := os.Truncate(name, 5000); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); len(got) != 5000 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
