package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/artifact"
	"github.com/shale-image/shale/reader"
)

// outcome is what comes of a lie under the trust "repository".
type outcome int

const (
	refused  outcome = iota // before the mount: by the index alone
	noticed                 // by who reads a chunk that it is about: and gets what is right
	believed                // by a mount; by who reads all it is found out
)

// lies are indexes that somebody pushes who may, beside an image of others.
var lies = []struct {
	what    string
	outcome outcome
	wrong   []string // files that are not what the image has, or cannot be read
	tree    func(t *index.Tree)
	patch   func(sections map[uint64][]byte)
	info    func(i *artifact.Info)
	size    int64 // what the artifact says of the index

	// check does not find it. No reader is harmed, but the image starts slowly.
	missed bool
}{
	{what: "two files swapped", outcome: believed, wrong: []string{"etc/passwd", "etc/shadow"}, tree: func(t *index.Tree) {
		a, b := file(t, "etc/passwd"), file(t, "etc/shadow")
		a.Size, a.Extents, b.Size, b.Extents = b.Size, b.Extents, a.Size, a.Extents
	}},
	{what: "a file less, and a mode", outcome: believed, wrong: []string{"etc/shadow"}, tree: func(t *index.Tree) {
		file(t, "etc/passwd").Mode = syscall.S_IFREG | 0o4777
		delete(file(t, "etc").Children, "shadow")
	}},
	{what: "a million empty files", outcome: believed, tree: func(t *index.Tree) {
		dir := &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{}}
		for n := range 1_000_000 {
			dir.Children[fmt.Sprint(n)] = &index.Inode{Mode: syscall.S_IFREG | 0o644}
		}
		t.Root.Children["many"] = dir
	}},
	{what: "digests of other content", outcome: noticed, wrong: []string{"etc/passwd"}, tree: func(t *index.Tree) {
		c := &t.Chunks[file(t, "etc/passwd").Extents[0].Chunk]
		c.Digest = chunk.Sum(chunk.BLAKE3, []byte("root::0:0::/:/bin/sh\n"))
	}},
	{what: "chunks elsewhere", outcome: noticed, missed: true, tree: func(t *index.Tree) {
		t.Chunks[file(t, "etc/passwd").Extents[0].Chunk].Offset += 512
	}},
	{what: "windows beyond the side", outcome: noticed, missed: true, tree: func(t *index.Tree) {
		for i := range t.Blobs[0].Spans {
			if w := &t.Blobs[0].Spans[i].Window; w.Length > 0 {
				w.Offset += t.Blobs[len(t.Blobs)-1].Size
			}
		}
	}},
	{what: "windows of another blob", outcome: noticed, missed: true, tree: func(t *index.Tree) {
		for i := range t.Blobs[0].Spans {
			if w := &t.Blobs[0].Spans[i].Window; w.Length > 0 {
				w.Blob, w.Offset = 1, 0
			}
		}
	}},
	{what: "another codec", outcome: noticed, missed: true, tree: func(t *index.Tree) {
		b := &t.Blobs[0]
		last := b.Spans[len(b.Spans)-1]
		b.Spans = []index.Span{{Size: last.End(), Length: last.Offset + last.Length, Codec: chunk.Zstd}}
	}},
	{what: "spans that decode to a lot", outcome: refused, missed: true, tree: func(t *index.Tree) {
		b := &t.Blobs[0]
		b.Spans[len(b.Spans)-1].Size = 1 << 50
		t.Chunks[file(t, "big").Extents[3].Chunk].Offset = 1<<50 - chunk.Size
	}},
	{what: "spans beyond the layer", outcome: refused, tree: func(t *index.Tree) {
		b := &t.Blobs[0]
		b.Size *= 2
		b.Spans[len(b.Spans)-1].Length += b.Size / 3
	}},
	{what: "names that lead out", outcome: refused, tree: rename("--"), patch: func(s map[uint64][]byte) {
		s[sectionNames] = bytes.Replace(s[sectionNames], []byte("--\x00"), []byte("..\x00"), 1)
	}},
	{what: "a name with a slash", outcome: refused, tree: rename("a-b"), patch: func(s map[uint64][]byte) {
		s[sectionNames] = bytes.Replace(s[sectionNames], []byte("a-b\x00"), []byte("a/b\x00"), 1)
	}},
	{what: "a name twice", outcome: refused, tree: func(t *index.Tree) { rename("zz1")(t); rename("zz2")(t) }, patch: func(s map[uint64][]byte) {
		s[sectionNames] = bytes.Replace(s[sectionNames], []byte("zz2\x00"), []byte("zz1\x00"), 1)
	}},
	{what: "a hard link to the root", outcome: refused, tree: func(t *index.Tree) {
		t.Root.Children["zz"] = file(t, "etc/passwd")
	}, patch: func(s map[uint64][]byte) {
		s[sectionLinks][len(s[sectionLinks])-1] = 0
	}},
	{what: "a link to nothing", outcome: refused, tree: func(t *index.Tree) {
		t.Root.Children["zz"] = &index.Inode{Mode: syscall.S_IFLNK | 0o777, Target: "-"}
	}, patch: func(s map[uint64][]byte) {
		s[sectionTargets] = []byte{0}
	}},
	{what: "64 million sets of no attributes", outcome: refused, patch: func(s map[uint64][]byte) {
		s[sectionXattrs] = make([]byte, 64<<20) // sets of no attributes
		s[sectionOptional] = make([]byte, 1200<<10)
		rand.NewChaCha8([32]byte{}).Read(s[sectionOptional]) // what is stored decodes to 64 times as much at most
	}},
	{what: "another image's", outcome: refused, info: func(i *artifact.Info) {
		i.Manifest = digest(nil)
	}},
	{what: "another image's layers", outcome: refused, tree: func(t *index.Tree) {
		t.Blobs[0].Digest = digest(nil)
	}},
	{what: "layers in another order", outcome: refused, tree: func(t *index.Tree) {
		t.Blobs[0], t.Blobs[1] = t.Blobs[1], t.Blobs[0]
		for i := range t.Chunks {
			if t.Chunks[i].Blob < 2 {
				t.Chunks[i].Blob ^= 1
			}
		}
	}},
	{what: "an index too large", outcome: refused, missed: true, size: 1 << 40},
	{what: "an index of another size", outcome: refused, size: 5},
}

// Sections of an index (docs/formats/index.md).
const (
	sectionXattrs   = 7
	sectionNames    = 10
	sectionLinks    = 13
	sectionTargets  = 18
	sectionOptional = 64
)

func file(t *index.Tree, path string) *index.Inode {
	ino, err := t.Lookup(path)
	if err != nil {
		panic(err)
	}
	return ino
}

// rename adds a file to be renamed.
func rename(name string) func(*index.Tree) {
	return func(t *index.Tree) { t.Root.Children[name] = &index.Inode{Mode: syscall.S_IFREG | 0o644} }
}

// patched takes an index apart and puts it together again.
func patched(t *testing.T, p []byte, patch func(sections map[uint64][]byte)) []byte {
	t.Helper()
	const header, sum = 24, 32
	at := header + sum*int(binary.LittleEndian.Uint32(p[12:]))
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	content, err := d.DecodeAll(p[at:len(p)-sum], nil)
	if err != nil {
		t.Fatal(err)
	}
	sections := map[uint64][]byte{}
	for len(content) > 0 {
		id, n := binary.Uvarint(content)
		size, m := binary.Uvarint(content[n:])
		sections[id] = content[n+m:][:size]
		content = content[n+m:][size:]
	}
	patch(sections)
	for id := range uint64(sectionOptional + 1) {
		if s := sections[id]; len(s) > 0 {
			content = binary.AppendUvarint(content, id)
			content = append(binary.AppendUvarint(content, uint64(len(s))), s...)
		}
	}
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	p = bytes.Clone(p[:at])
	binary.LittleEndian.PutUint64(p[16:], uint64(len(content)))
	p = e.EncodeAll(content, p)
	all := blake3.Sum256(p)
	return append(p, all[:]...)
}

// TestMaliciousIndex has lies of each kind beside an image. Nothing is mounted
// under them but by who believes the repository, and nothing breaks.
func TestMaliciousIndex(t *testing.T) {
	w := setup(t)
	n := w.node(t)
	honest, s := w.newSmall(t, "e2e/honest", 1), w.newSmall(t, "e2e/lies", 1)
	n.shale(0, "mount", w.registry.Host()+"/"+honest.name, n.mnt)
	for _, l := range lies {
		t.Run(l.what, func(t *testing.T) {
			n := n.in(t)
			tree := s.tree(t)
			if l.tree != nil {
				l.tree(tree)
			}
			info := artifact.Info{Manifest: s.img.ManifestDigest, DiffIDs: s.img.Config.DiffIDs}
			if l.info != nil {
				l.info(&info)
			}
			p, err := artifact.Encode(tree, info, index.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if l.patch != nil {
				p = patched(t, p, l.patch)
			}
			s.attack(t, p, l.size)
			testLie(t, n, w.registry.Host()+"/"+s.name, s, l.outcome, l.wrong, !l.missed)
			honest.right(t, n.mnt)
			if st := n.status(); len(st.Mounts) != 1 || len(st.Images) != 1 {
				t.Errorf("left behind: %+v", st)
			}
			n.hasImages(1)
		})
	}
	n.shale(0, "umount", n.mnt)
	n.shale(0, "rmi", w.registry.Host()+"/"+honest.name)
	if u := n.status().Pool; u == nil || u.Present != 0 {
		t.Errorf("the pool is not empty: %+v", u)
	}
}

// attack pushes an index in place of the right one.
func (s *small) attack(t *testing.T, p []byte, size int64) {
	t.Helper()
	d := s.push(t, reader.IndexMediaType, p)
	if size > 0 {
		d.Size = size
	}
	subject := image.Descriptor{MediaType: s.img.MediaType, Digest: s.img.ManifestDigest, Size: int64(len(s.img.ManifestBytes))}
	_, err := s.repo.PushArtifact(t.Context(), subject, reader.ArtifactType, []image.Descriptor{d, s.made.Side}, nil,
		func(image.Descriptor) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
}

func testLie(t *testing.T, n *node, ref string, s *small, want outcome, wrong []string, found bool) {
	dir := t.TempDir()
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) })
	// mount mounts the image, has a look at it, and takes it away.
	mount := func(trust string, look func()) (errout string) {
		t.Helper()
		_, errout, code := n.try("mount", "--index-trust", trust, ref, dir)
		if code == 7 && want == refused && trust == "repository" {
			return errout
		}
		if code != 0 {
			t.Fatalf("mount --index-trust %s: exit code %d: %s", trust, code, errout)
		}
		look()
		n.shale(0, "umount", dir)
		return errout
	}
	right := func() { t.Helper(); s.right(t, dir) }
	lied := func() {
		t.Helper()
		if failed := s.read(t, dir, wrong...); len(failed) > 0 {
			t.Errorf("cannot be read: %q", failed)
		}
		for _, name := range wrong {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err == nil && bytes.Equal(got, s.files[name]) {
				t.Errorf("%s is right: this is no lie", name)
			}
		}
	}
	forget := func() {
		t.Helper()
		if _, errout, code := n.try("rmi", ref); code != 0 && code != 3 {
			t.Errorf("rmi: exit code %d: %s", code, errout)
		}
		n.hasImages(1)
	}
	// Whoever looks at all that there is finds it out.
	out, errout, code := n.try("check", "-q", ref)
	if code != 7 && found {
		t.Errorf("check: exit code %d, want 7: %s%s", code, out, errout)
	}
	n.try("plan", ref) // which is no promise, and must not break
	n.hasImages(1)
	for _, trust := range []string{"local", "bound", "signed"} {
		if errout := mount(trust, right); !strings.Contains(errout, noteRead) {
			t.Errorf("--index-trust %s: no note says that the image %s: %s", trust, noteRead, errout)
		}
		forget()
	}
	if want == refused {
		t.Log(mount("repository", right))
		forget()
		return
	}
	if errout := mount("repository", lied); strings.Contains(errout, noteRead) {
		t.Errorf("refused: %s", errout)
	}
	// Who has believed it need not do so again.
	mount("local", right)
	forget()
	out, errout, code = n.try("pull", "-q", "--complete", ref)
	t.Logf("pull --complete: exit code %d: %s%s", code, out, errout)
	switch {
	case want == believed && code == 0 && !strings.Contains(errout, "index"):
		t.Error("pull --complete does not tell that the index is wrong")
	case want == noticed && code != 0:
		t.Error("pull --complete fails, although the layers are right")
	case code == 0:
		mount("repository", right)
	}
	forget()
}
