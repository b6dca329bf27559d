package packages

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/shale-image/shale/index"
)

func file(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }

func link(to string) *fstest.MapFile {
	return &fstest.MapFile{Data: []byte(to), Mode: fs.ModeSymlink | 0o777}
}

func read(t *testing.T, root fs.FS) *Database {
	t.Helper()
	d, err := Read(root)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDpkg(t *testing.T) {
	got := read(t, fstest.MapFS{
		"lib": link("usr/lib"), "usr/lib/ld.so": file("x"), "usr/bin/sh": file("x"), "usr/share/abs": link("/usr/lib"),
		"var/lib/dpkg/status": file("Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nMulti-Arch: same\nVersion: 2.36-9\n" +
			"Description: a library\n Package: of this line nobody\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n\n" +
			"Package: dash\nStatus: install ok installed\nArchitecture: amd64\nVersion: 0.5\n"),
		"var/lib/dpkg/info/libc6:amd64.list": file("/.\n/lib\n/lib/ld.so\n/usr/share/abs/x\n"),
		"var/lib/dpkg/info/dash.list":        file("/usr/bin/sh\n/usr/share/man\n"),
		"var/lib/dpkg/diversions":            file("/usr/bin/sh\n/usr/bin/sh.distrib\nbash\n"),
		// As distroless images have it.
		"var/lib/dpkg/status.d/tzdata":         file("Package: tzdata\nVersion: 2024a\nArchitecture: all\n"),
		"var/lib/dpkg/status.d/tzdata.md5sums": file("00000000000000000000000000000000  usr/share/zoneinfo/UTC\n"),
		"var/lib/dpkg/status.d/base":           file("Package: base-files\nVersion: 12\n"),
	})
	want := &Database{Kinds: []string{"dpkg"}, Packages: []Package{
		{Name: "libc6", Version: "2.36-9", Arch: "amd64", Files: []string{"lib", "usr/lib/ld.so", "usr/lib/x"}},
		{Name: "dash", Version: "0.5", Arch: "amd64", Files: []string{"usr/bin/sh.distrib", "usr/share/man"}},
		{Name: "base-files", Version: "12"},
		{Name: "tzdata", Version: "2024a", Arch: "all", Files: []string{"usr/share/zoneinfo/UTC"}},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// Names take little memory, and what is no file keeps nobody waiting.
func TestBounds(t *testing.T) {
	long := "F:" + strings.Repeat("d/", 250_000) + "\n" + strings.Repeat("R:f\n", 1000)
	_, err := Read(fstest.MapFS{"lib/apk/db/installed": file("P:x\nV:1\n" + long)})
	if !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), "name of more than 4096") {
		t.Error(err)
	}
	var many strings.Builder
	many.WriteString("P:x\nV:1\n")
	for i := range 2000 {
		fmt.Fprintf(&many, "F:%05d/%s\nR:f\n", i, strings.Repeat("d/", 2000))
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = Read(fstest.MapFS{"lib/apk/db/installed": file(many.String())})
	runtime.ReadMemStats(&after)
	if !errors.Is(err, index.ErrLimit) {
		t.Error(err)
	}
	if n := (after.HeapSys - before.HeapSys) >> 20; n > 1000 {
		t.Errorf("%d MB", n)
	}
	dir := t.TempDir()
	if err := errors.Join(os.MkdirAll(dir+"/var/lib/dpkg", 0o755), syscall.Mkfifo(dir+"/var/lib/dpkg/status", 0o644)); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := Read(root.FS()); !errors.Is(err, index.ErrCorrupt) {
		t.Error(err)
	}
}

// On a Debian machine dpkg itself says what is right.
func TestDpkgItself(t *testing.T) {
	out, err := exec.Command("dpkg-query", "-W", "-f", "${Package} ${Version} ${Architecture} ${db:Status-Status}\n").Output()
	if err != nil {
		t.Skipf("dpkg-query: %v", err)
	}
	var want []string
	for line := range strings.Lines(string(out)) {
		if s, ok := strings.CutSuffix(line, " installed\n"); ok {
			want = append(want, s)
		}
	}
	root, err := os.OpenRoot("/")
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var got []string
	for _, p := range read(t, root.FS()).Packages {
		got = append(got, p.Name+" "+p.Version+" "+p.Arch)
		if p.Name == "libc-bin" && !slices.Contains(p.Files, "usr/bin/ldd") {
			t.Errorf("libc-bin has %q", p.Files)
		}
		if p.Name == "libc6" && !slices.ContainsFunc(p.Files, func(s string) bool { return strings.HasPrefix(s, "usr/lib/") && strings.HasSuffix(s, "/libc.so.6") }) {
			t.Errorf("libc6 has no libc.so.6 where it really is: %q", p.Files)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("%d packages, dpkg has %d: %s", len(got), len(want), cmp.Diff(want, got))
	}
}

const installed = "C:Q1aaaa=\nP:musl\nV:1.2.5-r0\nA:x86_64\nF:lib\nR:ld-musl-x86_64.so.1\na:0:0:755\nF:usr/bin\nR:ldd\n\nP:empty\nV:1\nA:noarch\n\nP:last\nV:2\nF:\nR:init"

func TestApk(t *testing.T) {
	want := &Database{Kinds: []string{"apk"}, Packages: []Package{
		{Name: "musl", Version: "1.2.5-r0", Arch: "x86_64", Files: []string{"lib/ld-musl-x86_64.so.1", "usr/bin/ldd"}},
		{Name: "empty", Version: "1", Arch: "noarch"},
		{Name: "last", Version: "2", Files: []string{"init"}},
	}}
	for _, at := range []string{"lib/apk/db/installed", "usr/lib/apk/db/installed"} {
		if d := cmp.Diff(want, read(t, fstest.MapFS{at: file(installed)})); d != "" {
			t.Errorf("%s: %s", at, d)
		}
	}
}

// rpmdb is what rpm 4.18 makes when it installs two packages, one with an epoch and
// without its documentation, and one of 400 files.
func rpmdb(t testing.TB) []byte {
	t.Helper()
	f, err := os.Open("testdata/rpmdb.sqlite.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRpm(t *testing.T) {
	got := read(t, fstest.MapFS{
		"var/lib/rpm": link("../../usr/lib/sysimage/rpm"), "usr/lib/sysimage/rpm/rpmdb.sqlite": {Data: rpmdb(t)}, "usr/lib/sysimage/rpm/rpmdb.sqlite-wal": file(""),
	})
	if !slices.Equal(got.Kinds, []string{"rpm"}) || len(got.Packages) != 2 {
		t.Fatalf("%+v", got)
	}
	slices.SortFunc(got.Packages, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	hello, many := got.Packages[0], got.Packages[1]
	if d := cmp.Diff(Package{Name: "hello", Version: "4:1.2-3", Arch: "noarch", Files: []string{"usr/bin/hello"}}, hello); d != "" {
		t.Error(d)
	}
	if many.Name != "many" || many.Version != "1.2-3" || len(many.Files) != 400+7+1 || !slices.Contains(many.Files, "opt/many/directory-with-a-long-name-1/file-400") {
		t.Errorf("%s %s has %d files: %q", many.Name, many.Version, len(many.Files), many.Files)
	}
}

// rpm itself says what is in a database.
func TestRpmItself(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "rpmdb.sqlite"), rpmdb(t), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("rpm", "--dbpath", dir, "--define", "_db_backend sqlite", "-qa", "--qf", "[%{=NAME} %{FILENAMES} %{FILESTATES}\n]").Output()
	if err != nil {
		t.Skipf("rpm: %v", err)
	}
	var want, got []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 3 && f[2] != "2" {
			want = append(want, f[0]+" "+strings.TrimPrefix(f[1], "/"))
		}
	}
	for _, p := range read(t, fstest.MapFS{"var/lib/rpm/rpmdb.sqlite": {Data: rpmdb(t)}}).Packages {
		for _, f := range p.Files {
			got = append(got, p.Name+" "+f)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestSource(t *testing.T) {
	for name, want := range map[string]string{
		"usr/lib/python3/__pycache__/ast.cpython-311.pyc": "usr/lib/python3/ast.py", "__pycache__/x.cpython-311.opt-1.pyc": "x.py",
		"usr/lib/ast.pyc": "", "__pycache__/x.so": "", "x": "", "__pycache__": "", "": "",
	} {
		if got := Source(name); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestNone(t *testing.T) {
	if d := cmp.Diff(&Database{}, read(t, fstest.MapFS{"etc/passwd": file("x")})); d != "" {
		t.Error(d)
	}
}

func TestBad(t *testing.T) {
	db := rpmdb(t)
	flipped := bytes.Clone(db)
	copy(flipped[16:], []byte{0, 3})
	for what, c := range map[string]struct {
		root fstest.MapFS
		err  error
		text string
	}{
		"long line":     {fstest.MapFS{"var/lib/dpkg/status": file("Package: " + strings.Repeat("x", maxLine+1))}, index.ErrLimit, "var/lib/dpkg/status"},
		"many packages": {fstest.MapFS{"lib/apk/db/installed": file(strings.Repeat("P:x\n\n", maxPackages+1))}, index.ErrLimit, "packages"},
		"berkeley":      {fstest.MapFS{"var/lib/rpm/Packages": file("x")}, index.ErrUnsupported, "var/lib/rpm/Packages"},
		"ndb":           {fstest.MapFS{"usr/lib/sysimage/rpm/Packages.db": file("x")}, index.ErrUnsupported, "Packages.db"},
		"log":           {fstest.MapFS{"var/lib/rpm/rpmdb.sqlite": {Data: db}, "var/lib/rpm/rpmdb.sqlite-wal": file("x")}, index.ErrUnsupported, "-wal"},
		"no database":   {fstest.MapFS{"var/lib/rpm/rpmdb.sqlite": file("x")}, index.ErrCorrupt, "no SQLite"},
		"page size":     {fstest.MapFS{"var/lib/rpm/rpmdb.sqlite": {Data: flipped}}, index.ErrCorrupt, "pages of 3 bytes"},
		"cut":           {fstest.MapFS{"var/lib/rpm/rpmdb.sqlite": {Data: db[:8192]}}, index.ErrCorrupt, "rpmdb.sqlite"},
	} {
		if _, err := Read(c.root); !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v ... %s", what, err, c.err, c.text)
		}
	}
}

// Links that lead in a circle lead nowhere, and none leads out of the image.
func TestLinks(t *testing.T) {
	dir := t.TempDir()
	for name, to := range map[string]string{"a": "b", "b": "a", "c": "/", "d": "../../../../etc", "e": "e/e"} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "lib/apk/db"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lib/apk/db/installed"), []byte("P:x\nF:a/b/c\nR:f\nF:c\nR:g\nF:d\nR:h\nF:e\nR:i\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	got := read(t, root.FS()).Packages[0].Files
	if len(got) != 4 || got[2] != "etc/h" {
		t.Errorf("%q", got)
	}
}

func FuzzRead(f *testing.F) {
	db := rpmdb(f)
	f.Add([]byte(installed), byte(0))
	f.Add([]byte("Package: a\nStatus: install ok installed\nVersion: 1\n"), byte(1))
	f.Add(db, byte(2))
	f.Fuzz(func(t *testing.T, p []byte, kind byte) {
		name := []string{"lib/apk/db/installed", "var/lib/dpkg/status", "var/lib/rpm/rpmdb.sqlite"}[kind%3]
		_, err := Read(fstest.MapFS{name: {Data: p}, "var/lib/dpkg/info/a.list": {Data: p}, "var/lib/dpkg/diversions": {Data: p}})
		if err != nil && !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrLimit) && !errors.Is(err, index.ErrUnsupported) && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	})
}

// What is kept of packages without files, and the tags of a header, have bounds too.
func TestPackageNames(t *testing.T) {
	root := fstest.MapFS{}
	long := file("Package: " + strings.Repeat("x", 1000_000) + "\n")
	for i := range 300 {
		root[fmt.Sprintf("var/lib/dpkg/status.d/%03d", i)] = long
	}
	if _, err := Read(root); !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), "status.d/268: limit exceeded: names of more than") {
		t.Error(err)
	}
	header := func(tags int) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(tags)), make([]byte, 4+16*tags)...)
	}
	r := &reader{}
	if _, err := r.rpmHeader(header(maxTags), "db"); err != nil {
		t.Error(err)
	}
	if _, err := r.rpmHeader(header(maxTags+1), "db"); !errors.Is(err, index.ErrLimit) {
		t.Error(err)
	}
}
