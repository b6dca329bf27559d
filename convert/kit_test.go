package convert

import (
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/shale-image/shale/image"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// debianImage finds the image that bench/demo builds.
func debianImage(t testing.TB) string {
	t.Helper()
	dirs, _ := filepath.Glob("../build/images/python-*/index.json")
	if len(dirs) == 0 {
		t.Skip("no image of Debian with python3 in build/images: run `make demo` once")
	}
	return filepath.Dir(dirs[0])
}

func open(t testing.TB, ref string) *image.Repository {
	t.Helper()
	r, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), r, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}
