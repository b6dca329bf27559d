package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shale-image/shale/index/rafs"
)

// tampered is a converted image in a layout, and what the verbs say of it while
// it is whole.
type tampered struct {
	dir   string
	files *imageFiles
	want  map[string]string // by verb, standard output
}

// verbs are what looks at an image, with a file that is in its middle.
var verbs = map[string][]string{
	"check":  {"check", "-q", "REF"},
	"ls":     {"ls", "-lR", "REF"},
	"cat":    {"cat", "REF", "/data/two"},
	"export": {"export", "REF", "-"},
}

const tamperSpec = `
d data 0755 0:0
r data/one 0644 0:0 3000 1
r data/two 0644 0:0 9000 2
f data/three 0644 0:0 some text, some text, some text, some text, some text, some text, some text, some text
z data/zeros 0644 0:0 70000
l link 0777 0:0 data/two
`

func newTampered(t *testing.T) *tampered {
	t.Helper()
	w := &tampered{dir: filepath.Join(t.TempDir(), "image"), want: map[string]string{}}
	p, err := mktar(tamperSpec)
	if err != nil {
		t.Fatal(err)
	}
	plain := "oci:" + filepath.Join(t.TempDir(), "plain") + ":app"
	if err := pushImage(t.Context(), plain, [][]byte{p}, imageOptions{}); err != nil {
		t.Fatal(err)
	}
	if code, out, serr := runShale(t, "convert", "-q", plain, "oci:"+w.dir+":app"); code != 0 {
		t.Fatalf("convert: %d\n%s%s", code, out, serr)
	}
	if w.files, err = layoutFiles(w.dir, "app"); err != nil {
		t.Fatal(err)
	}
	for verb := range verbs {
		code, out, serr := w.run(t, verb)
		if code != 0 {
			t.Fatalf("%s of the whole image: %d\n%s", verb, code, serr)
		}
		w.want[verb] = out
	}
	return w
}

func (w *tampered) run(t *testing.T, verb string) (code int, stdout, stderr string) {
	args := append([]string{}, verbs[verb]...)
	for i := range args {
		if args[i] == "REF" {
			args[i] = "oci:" + w.dir + ":app"
		}
	}
	return runShale(t, args...)
}

func runShale(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, serr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), binary, args...)
	cmd.Stdout, cmd.Stderr = &out, &serr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), serr.String()
}

// try damages a file, expects that check and the verbs in must name it and
// fail, that the others do that or give what is right, and repairs it.
func (w *tampered) try(t *testing.T, file string, damage func([]byte) []byte, must ...string) {
	t.Helper()
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, damage(bytes.Clone(whole)), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(file, whole, 0o644)
	name := filepath.Base(file)
	for verb := range verbs {
		fails := verb == "check"
		for _, m := range must {
			fails = fails || m == verb
		}
		code, out, serr := w.run(t, verb)
		switch {
		case code == codeCorrupt:
			if !strings.Contains(serr, name) && (verb != "check" || !strings.Contains(out, name)) {
				t.Errorf("%s: the error does not name %s: %s%s", verb, name, out, serr)
			}
			if verb == "cat" && !strings.HasPrefix(w.want[verb], out) {
				t.Errorf("cat wrote other bytes before it failed")
			}
		case code != 0:
			t.Errorf("%s: exit code %d, want %d: %s", verb, code, codeCorrupt, serr)
		case fails:
			t.Errorf("%s: exit code 0, want %d", verb, codeCorrupt)
		case out != w.want[verb]:
			t.Errorf("%s: other output than of the whole image", verb)
		}
	}
}

func flipAt(off int64) func([]byte) []byte {
	return func(p []byte) []byte {
		p[off] ^= 0x04
		return p
	}
}

// TestFlip flips a byte of each kind of object.
func TestFlip(t *testing.T) {
	w := newTampered(t)
	all := []string{"ls", "cat", "export"}
	if n := len(w.files.layers); n < 2 {
		t.Fatalf("%d layers", n)
	}
	boot := w.files.layers[len(w.files.layers)-1]
	size := func(name string) int64 {
		fi, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	for what, file := range map[string]string{"manifest": w.files.manifest, "bootstrap": boot} {
		for _, off := range []int64{0, 3, 100, size(file) / 2, size(file) - 1} {
			t.Run(fmt.Sprintf("%s/%d", what, off), func(t *testing.T) { w.try(t, file, flipAt(off), all...) })
		}
	}
	t.Run("config", func(t *testing.T) { w.try(t, w.files.config, flipAt(5)) })

	// The first layer has all files, so its blob all but the chunk of zeros.
	blob := w.files.layers[0]
	f, err := os.Open(blob)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	toc, err := rafs.ReadTOC(f, size(blob), "blob")
	if err != nil {
		t.Fatal(err)
	}
	part := func(name string) int64 {
		e, ok := toc.Entry(name)
		if !ok {
			t.Fatalf("no part %s", name)
		}
		return int64(e.Offset)
	}
	two := int64(3000 + 4000) // in the chunk of /data/two, which is behind the 3000 random bytes of /data/one
	for _, c := range []struct {
		what string
		off  int64
		must []string
	}{
		{"chunk", two, []string{"cat", "export"}},
		{"another chunk", 10, []string{"export"}},
		{"chunk table", part("blob.meta") + 3, nil},
		{"blob meta", part("blob.meta.header") + 13, nil},
		{"digests", part("blob.digest") + 40, nil},
		{"table of contents", size(blob) - 512 - 128 + 30, nil},
		{"table of contents, flags", size(blob) - 512 - 128, nil},
		{"tar header", size(blob) - 512, nil},
		{"last byte", size(blob) - 1, nil},
	} {
		t.Run(c.what, func(t *testing.T) { w.try(t, blob, flipAt(c.off), c.must...) })
	}
	t.Run("swapped", func(t *testing.T) {
		w.try(t, blob, func(p []byte) []byte {
			p[0], p[9999] = p[9999], p[0]
			return p
		}, "cat", "export")
	})
	t.Run("longer", func(t *testing.T) { w.try(t, blob, func(p []byte) []byte { return append(p, 0) }) })

	t.Run("named", func(t *testing.T) {
		whole, err := os.ReadFile(blob)
		if err != nil {
			t.Fatal(err)
		}
		defer os.WriteFile(blob, whole, 0o644)
		if err := flip(blob, two); err != nil {
			t.Fatal(err)
		}
		_, out, _ := w.run(t, "check")
		for _, part := range []string{"blob sha256:" + filepath.Base(blob), ": at offset 3000: ", "chunk blake3:", "\n  in /data/two\n"} {
			if !strings.Contains(out, part) {
				t.Errorf("check does not say %q: %s", part, out)
			}
		}
	})
}

// TestTruncate cuts each object at every 512th byte.
func TestTruncate(t *testing.T) {
	w := newTampered(t)
	for i, file := range append([]string{w.files.manifest, w.files.config}, w.files.layers...) {
		fi, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		must := []string{}
		if i == 0 || i == len(w.files.layers)+1 {
			must = []string{"ls", "cat", "export"}
		}
		for n := int64(0); n < fi.Size(); n += 512 {
			t.Run(fmt.Sprintf("%.8s/%d", filepath.Base(file), n), func(t *testing.T) {
				w.try(t, file, func(p []byte) []byte { return p[:n] }, must...)
			})
		}
	}
}

// TestMissing takes each object away.
func TestMissing(t *testing.T) {
	w := newTampered(t)
	for _, file := range append([]string{w.files.manifest, w.files.config}, w.files.layers...) {
		if err := os.Rename(file, file+".away"); err != nil {
			t.Fatal(err)
		}
		for verb := range verbs {
			code, out, serr := w.run(t, verb)
			switch {
			case code == 0 && verb != "check" && out == w.want[verb]:
			case code != codeNotFound && (verb != "check" || code != codeCorrupt):
				t.Errorf("%s without %s: exit code %d: %s", verb, filepath.Base(file), code, serr)
			case !strings.Contains(out+serr, filepath.Base(file)):
				t.Errorf("%s does not name %s: %s", verb, filepath.Base(file), serr)
			}
		}
		if err := os.Rename(file+".away", file); err != nil {
			t.Fatal(err)
		}
	}
}
