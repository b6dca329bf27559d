package replace

import (
	"os"
	"path/filepath"
	"testing"
)

func TestFile(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", t.TempDir()) // of the same file system
	name := filepath.Join(dir, "a")
	for _, data := range []string{"one", ""} {
		if err := File(name, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(name); err != nil || string(got) != data {
			t.Errorf("%q, %v", got, err)
		}
	}
}

// TestBeside: what is not whole yet lies beside the file, which is what it was, and is gone with
// Cleanup.
func TestBeside(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", other)
	name := filepath.Join(dir, "a")
	if err := File(name, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Begin(name, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("new"); err != nil {
		t.Fatal(err)
	}
	if got, err := filepath.Glob(filepath.Join(dir, ".a*")); err != nil || len(got) != 1 {
		t.Errorf("beside it lie %q, %v", got, err)
	}
	if got, err := os.ReadDir(other); err != nil || len(got) != 0 {
		t.Errorf("in TMPDIR lie %v, %v", got, err)
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != "old" {
		t.Errorf("%q, %v", got, err)
	}
	if err := f.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadDir(dir); err != nil || len(got) != 1 {
		t.Errorf("left are %v, %v", got, err)
	}
}
