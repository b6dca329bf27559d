package lint

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/shale-image/shale/"

// layers lists the packages from the bottom to the top. A package may import
// those of lower layers, and below its own directory; of its own layer none.
var layers = [][]string{
	{"chunk", "trust", "keeper", "loader", "replace"},
	{"index", "blob"},
	{"erofs", "index/zran", "index/zframe", "index/artifact", "blob/internal", "blob/retry", "blob/count", "blob/choose", "pool"},
	{"index/layer", "index/stream", "blob/memblob", "blob/dirblob", "blob/httpblob"},
	{"blob/blobtest", "index/rafs", "index/scan", "index/estargz", "index/soci", "content", "image", "link"},
	{"packages", "export", "index/zstdchunked", "trace", "pack"},
	{"fleet"},
	{"reader", "fill", "mount/fusedev"},
	{"convert", "inspect", "mount", "runtime", "config"},
	{"daemon"},
	{"cmd"},
	{"bench", "e2e", "lint"},
}

// only lists modules that a single package may import.
var only = map[string]string{
	"github.com/google/go-containerregistry": "image",
	"github.com/google/renameio/v2":          "replace",
	"github.com/spf13/cobra":                 "cmd",
	"github.com/vbauerster/mpb":              "cmd",
	"github.com/opencontainers/runtime-spec": "runtime",
}

type pkg struct {
	ImportPath, Dir, Doc string
	Imports, GoFiles     []string
	TestImports          []string
	XTestImports         []string
	TestGoFiles          []string
	XTestGoFiles         []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json", module+"...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// layer returns the layer of a package: that of the longest prefix listed.
func layer(t *testing.T, p string) (int, string) {
	for dir := p; dir != "."; dir = filepath.Dir(dir) {
		for i, l := range layers {
			if slices.Contains(l, dir) {
				return i, dir
			}
		}
	}
	t.Errorf("package %s is in no layer: add it to lint_test.go and docs/ARCHITECTURE.md", p)
	return -1, ""
}

func TestImportDirection(t *testing.T) {
	for _, p := range packages(t) {
		from := strings.TrimPrefix(p.ImportPath, module)
		at, own := layer(t, from)
		for _, imp := range p.Imports {
			for mod, allowed := range only {
				if strings.HasPrefix(imp, mod) && own != allowed && own != "bench" {
					t.Errorf("%s imports %s: only %s may", from, imp, allowed)
				}
			}
			to, ok := strings.CutPrefix(imp, module)
			if !ok || strings.HasPrefix(to, from+"/") {
				continue
			}
			low, group := layer(t, to)
			if group == own {
				continue
			}
			if low >= at {
				t.Errorf("%s imports %s, which is not below it", from, to)
			}
		}
	}
}

func TestPackageDocs(t *testing.T) {
	for _, p := range packages(t) {
		if len(p.GoFiles) > 0 && len(p.Doc) < 40 {
			t.Errorf("%s: the package comment must say what it is for (%q)", p.ImportPath, p.Doc)
		}
	}
}

// TestFileSizes keeps files to what a reader takes in.
func TestFileSizes(t *testing.T) {
	for _, p := range packages(t) {
		for _, name := range slices.Concat(p.GoFiles, p.TestGoFiles, p.XTestGoFiles) {
			b, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			limit := 500
			if strings.HasSuffix(name, "_test.go") {
				limit = 800
			}
			if n := bytes.Count(b, []byte("\n")); n > limit {
				t.Errorf("%s/%s has %d lines, more than %d: two ideas?", p.ImportPath, name, n, limit)
			}
		}
	}
}

// TestArchitectureNamesPackages keeps the page in step with the tree.
func TestArchitectureNamesPackages(t *testing.T) {
	page, err := os.ReadFile("../docs/ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		if strings.Contains(name, "internal") || len(p.GoFiles) == 0 {
			continue
		}
		if !bytes.Contains(page, []byte(name)) {
			t.Errorf("docs/ARCHITECTURE.md does not mention %s", name)
		}
	}
}
