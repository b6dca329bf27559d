package replace

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func TestFile(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", t.TempDir()) // of the same file system
	name := filepath.Join(dir, "a")
	if err := File(name, nil, 0o640); err != nil {
		t.Fatal(err)
	}
	for _, data := range []string{"one", ""} {
		if err := File(name, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(name); err != nil || string(got) != data {
			t.Errorf("%q, %v", got, err)
		}
		if st, err := os.Stat(name); err != nil || st.Mode() != 0o640 {
			t.Errorf("%v, %v", st.Mode(), err)
		}
	}
}

// TestWith: what is not whole yet lies beside the file, which is what it was; where the rest cannot
// be written it stays so, and nothing is left.
func TestWith(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", other) // of the same file system
	name := filepath.Join(dir, "a")
	is := func(want string) {
		t.Helper()
		if got, err := os.ReadFile(name); err != nil || string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	if err := File(name, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, want := range []error{errors.New("no more"), nil} {
		err := With(name, 0o600, func(w io.Writer) error {
			io.WriteString(w, "new")
			is("old")
			if got, err := filepath.Glob(filepath.Join(dir, ".a*")); err != nil || len(got) != 1 {
				t.Errorf("beside it lie %q, %v", got, err)
			}
			if got, err := os.ReadDir(other); err != nil || len(got) != 0 {
				t.Errorf("in TMPDIR lie %v, %v", got, err)
			}
			return want
		})
		if err != want {
			t.Errorf("%v, want %v", err, want)
		}
		if got, err := os.ReadDir(dir); err != nil || len(got) != 1 {
			t.Errorf("left are %v, %v", got, err)
		}
		if want != nil {
			is("old")
		} else {
			is("new")
		}
	}
}
