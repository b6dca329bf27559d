package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/bench/treecmp"
	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/reader"
)

// fsck is a program of erofs-utils, and what it can do.
type fsck struct {
	path   string
	xattrs bool // 1.8.2 and later: it extracts attributes, and the rest right
}

// findFsck takes FSCK_EROFS, or what is installed.
func findFsck(t *testing.T) fsck {
	t.Helper()
	f := fsck{path: os.Getenv("FSCK_EROFS")}
	if f.path == "" {
		var err error
		if f.path, err = exec.LookPath("fsck.erofs"); err != nil {
			t.Skipf("%v; apt-get install erofs-utils, or set FSCK_EROFS", err)
		}
	}
	version, _ := exec.Command(f.path, "-V").CombinedOutput() // exits with 1 in some versions
	help, _ := exec.Command(f.path, "--help").CombinedOutput()
	f.xattrs = bytes.Contains(help, []byte("xattrs"))
	first, _, _ := strings.Cut(string(version), "\n")
	t.Logf("%s: %s", f.path, first)
	return f
}

// check has an image checked and extracted, and the outcome compared. Its exit
// code alone says little: 1.5 exits with 0 although a checksum is wrong.
func (f fsck) check(t *testing.T, meta string, devices []string, truth string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	args := []string{"--extract=" + dir, "--preserve"}
	if f.xattrs {
		args = append(args, "--xattrs")
	}
	for _, d := range devices {
		args = append(args, "--device="+d)
	}
	out, err := exec.Command(f.path, append(args, meta)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", f.path, err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "<E>") || strings.Contains(line, "<W>") {
			if !strings.Contains(line, emptyXattr) {
				t.Errorf("%s: %s", f.path, line)
			}
		}
	}
	diffs, err := treecmp.Compare(truth, dir, treecmp.Options{Limit: 1 << 20})
	if err != nil {
		t.Error(err)
	}
	const most = 50
	diffs = slices.DeleteFunc(diffs, f.excused)
	for _, d := range diffs[:min(len(diffs), most)] {
		t.Error(d)
	}
	if len(diffs) > most {
		t.Errorf("and %d differences more", len(diffs)-most)
	}
}

// 1.8.2 to 1.9.3 take an attribute without a value for an error, and then leave
// the rest of the file's attributes.
const (
	emptyXattr     = "failed to get xattr value size of `user.empty`"
	emptyXattrFile = "odd/attrs"
)

// excused tells of a difference that it is due to fsck.erofs.
func (f fsck) excused(d treecmp.Difference) bool {
	switch d.Field {
	case treecmp.Mtime:
		return d.Path == "." // see compare
	case treecmp.Xattr: // the owner is set after a capability, which loses it
		return !f.xattrs || d.Path == emptyXattrFile || d.B == "security.capability absent"
	case treecmp.Links, treecmp.Group: // hard links become copies before 1.7,
		return !f.xattrs
	case treecmp.Size: // holes shrink to nothing before 1.8, up to 1.9.3 at the end of a file,
		return !f.xattrs || d.Path == "odd/holes"
	case treecmp.Mode: // and before 1.8 the owner is set after the mode, which loses set-id bits
		return !f.xattrs && d.A[1:] == d.B[1:]
	}
	return false
}

// What a node mounts is accepted by fsck.erofs, which extracts the same tree
// from it as tar from the layers.
func TestFsckLinked(t *testing.T) {
	f := findFsck(t)
	w := setup(t)
	n := w.node(t)
	n.shale(0, "pull", "-q", "--complete", w.registry.Host()+"/"+name)
	n.stop()
	dirs, err := filepath.Glob(filepath.Join(n.root, "images/*/linked"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("%q, %v: want one linked image", dirs, err)
	}
	im, err := link.Open(dirs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	devices := devicesOf(n, im)
	// What the kernel follows from an address to a device erofs-utils takes for an
	// address in the first file: the older extract the flat space as one file, and yet
	// want to be told of all devices; the newer (to 1.9.3) look in the wrong place, and
	// only check.
	if f.xattrs {
		args := []string{filepath.Join(dirs[0], "meta")}
		for _, d := range devices {
			args = append(args, "--device="+d)
		}
		if out, err := exec.Command(f.path, args...).CombinedOutput(); err != nil || bytes.Contains(out, []byte("<E>")) {
			t.Fatalf("%s: %v\n%s", f.path, err, out)
		}
		return
	}
	f.check(t, flatFile(t, im, devices), devices, w.truth)
}

func devicesOf(n *node, im *link.Image) (devices []string) {
	for _, s := range im.Info.Segments {
		devices = append(devices, filepath.Join(n.root, "pool/segments", fmt.Sprintf("%08x", s.ID), "data"))
	}
	return devices
}

// flatFile writes the flat address space of an image to a file.
func flatFile(t *testing.T, im *link.Image, devices []string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "flat")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(f, io.NewSectionReader(im.Meta(), 0, im.MetaSize)); err != nil {
		t.Fatal(err)
	}
	for i, s := range im.Info.Segments {
		d, err := os.Open(devices[i])
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if _, err := f.Seek(s.Flat, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(f, d); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(im.FlatSize); err != nil {
		t.Fatal(err)
	}
	return path
}

// So is what convert writes, with blobs decoded to where it says.
func TestFsckBootstrap(t *testing.T) {
	f := findFsck(t)
	w := setup(t)
	ref, err := image.ParseRef(w.registry.Host() + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	img, err := repo.ResolveManifest(t.Context(), image.Platform{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	raw, err := reader.Fetch(t.Context(), repo, img, reader.Options{TempDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	meta := filepath.Join(dir, "bootstrap")
	b := make([]byte, raw.Size)
	if _, err := raw.File.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(meta, b, 0o600); err != nil {
		t.Fatal(err)
	}
	boot, err := rafs.Open(bytes.NewReader(b), raw.Size, raw.Name, nil)
	if err != nil {
		t.Fatal(err)
	}
	var devices []string
	for i := range boot.Blobs() {
		info := &boot.Blobs()[i]
		r, err := repo.Blobs().Range(t.Context(), blob.Ref{Digest: info.Digest(), Size: info.Size}, 0, info.Size)
		if err != nil {
			t.Fatal(err)
		}
		stored, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, info.ID)
		decode(t, path, info, stored)
		devices = append(devices, path)
	}
	f.check(t, meta, devices, w.truth)
}

// decode puts the chunks of a blob where files refer to them.
func decode(t *testing.T, path string, info *rafs.BlobInfo, stored []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(info.Span)); err != nil {
		t.Fatal(err)
	}
	spans, offsets := info.Spans()
	b := index.Blob{Spans: spans}
	for i, c := range info.Chunks {
		s := spans[b.Find(offsets[i])]
		p := make([]byte, s.Size)
		if err := s.Codec.Decode(p, stored[s.Offset:][:s.Length]); err != nil {
			t.Fatalf("%s: chunk %d: %v", path, c.Index, err)
		}
		if _, err := f.WriteAt(p[c.In:][:c.Size], int64(c.Addr)); err != nil {
			t.Fatal(err)
		}
	}
}
