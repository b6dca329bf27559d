package layer_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// block makes a header by hand, for what no writer writes.
type block struct {
	name, link, prefix string
	typ                byte
	magic              string // "" is v7
	size               string // octal
	mode, uid, mtime   string
	signed             bool // old checksum of signed bytes
	rest               map[int]string
}

func (b block) String() string {
	p := make([]byte, 512)
	put := func(off int, s string) { copy(p[off:], s) }
	or := func(s, def string) string {
		if s == "" {
			return def
		}
		return s
	}
	put(0, b.name)
	put(100, or(b.mode, "0000644\x00"))
	put(108, or(b.uid, "0000000\x00"))
	put(116, "0000000\x00")
	put(124, or(b.size, "00000000000\x00"))
	put(136, or(b.mtime, "00000000000\x00"))
	put(148, "        ")
	p[156] = b.typ
	put(157, b.link)
	put(257, b.magic)
	put(345, b.prefix)
	for off, s := range b.rest {
		put(off, s)
	}
	sum := 0
	for _, c := range p {
		if b.signed {
			sum += int(int8(c))
		} else {
			sum += int(c)
		}
	}
	put(148, fmt.Sprintf("%06o\x00 ", sum))
	return string(p)
}

const (
	ustar = "ustar\x0000"
	gnu   = "ustar  \x00"
	end   = "\x00"
)

var zeros = strings.Repeat("\x00", 1024)

// pad fills a string up to whole blocks.
func pad(s string) string { return s + strings.Repeat("\x00", -len(s)&511) }

func oct(n int) string { return fmt.Sprintf("%011o\x00", n) }

// pax makes a pax header of records "key=value".
func pax(typ byte, records ...string) string {
	var body string
	for _, r := range records {
		n := len(r) + 3
		for len(fmt.Sprintf("%d %s\n", n, r)) != n {
			n++
		}
		body += fmt.Sprintf("%d %s\n", n, r)
	}
	return block{name: "pax", typ: typ, magic: ustar, size: oct(len(body))}.String() + pad(body)
}

func file(name string) string { return block{name: name, typ: '0', magic: ustar}.String() }

// readAll returns the entries of an archive, a line each.
func readAll(archive string, lim index.Limits) (string, error) {
	r := layer.NewReader(iotest.OneByteReader(strings.NewReader(archive)), "hand", lim)
	var out strings.Builder
	for {
		e, err := r.Next()
		if err == io.EOF {
			return out.String(), nil
		}
		if err != nil {
			return out.String(), err
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return out.String(), err
		}
		switch e.Op {
		case index.Add:
			i := e.Inode
			fmt.Fprintf(&out, "%q %o %d %d.%d %d", e.Path, i.Mode, i.UID, i.Mtime.Sec, i.Mtime.Nsec, i.Size)
			if i.Target != "" {
				fmt.Fprintf(&out, " ->%q", i.Target)
			}
			for _, x := range i.Xattrs {
				fmt.Fprintf(&out, " %s=%q", x.Name, x.Value)
			}
			if len(e.Fragments) > 0 {
				fmt.Fprintf(&out, " %v %q", e.Fragments, data)
				if got := archive[e.DataOffset:][:len(data)]; got != string(data) {
					return "", fmt.Errorf("%q: at DataOffset %q, want %q", e.Path, got, data)
				}
			}
		case index.Link:
			fmt.Fprintf(&out, "%q link %q", e.Path, e.Target)
		case index.Whiteout:
			fmt.Fprintf(&out, "%q whiteout", e.Path)
		case index.Opaque:
			fmt.Fprintf(&out, "%q opaque", e.Path)
		}
		out.WriteByte('\n')
	}
}

var good = []struct{ name, archive, want string }{
	{"empty stream", "", ""},
	{"only the end", zeros, ""},
	{"ends at a block", file("a"), "\"a\" 100644 0 0.0 0\n"},
	{"ends after one zero block", file("a") + zeros[:512], "\"a\" 100644 0 0.0 0\n"},
	{"garbage after the end", file("a") + zeros + "garbage", "\"a\" 100644 0 0.0 0\n"},
	{"signed checksum", block{name: "\xff\xfe", typ: '0', signed: true}.String(), "\"\\xff\\xfe\" 100644 0 0.0 0\n"},
	{"v7 directory", block{name: "d/", typ: 0}.String(), "\"d\" 40644 0 0.0 0\n"},
	{"leading dots and slashes", file("/./a//b/./c"), "\"a/b/c\" 100644 0 0.0 0\n"},
	{"root", block{name: "./", typ: '5'}.String(), "\"\" 40644 0 0.0 0\n"},
	{"ustar prefix", block{name: "b", prefix: "a", typ: '0', magic: ustar}.String(), "\"a/b\" 100644 0 0.0 0\n"},
	{"gnu has no prefix", block{name: "b", prefix: "a", typ: '0', magic: gnu}.String(), "\"b\" 100644 0 0.0 0\n"},
	{"star prefix", block{name: "b", prefix: "a", typ: '0', magic: ustar, rest: map[int]string{476: "00000000001 ", 508: "tar\x00"}}.String(), "\"a/b\" 100644 0 0.0 0\n"},
	{"contiguous", block{name: "a", typ: '7', size: oct(2)}.String() + pad("hi"), "\"a\" 100644 0 0.0 2 [{0 2}] \"hi\"\n"},
	{"type bits in the mode", block{name: "a", typ: '0', mode: "0104755\x00"}.String(), "\"a\" 104755 0 0.0 0\n"},
	{"blank numbers", block{name: "a", typ: '0', mode: "   644 \x00", uid: "        "}.String(), "\"a\" 100644 0 0.0 0\n"},
	{"base-256 uid", block{name: "a", typ: '0', uid: "\x80\x00\x00\x00\x00\x01\x00\x00"}.String(), "\"a\" 100644 65536 0.0 0\n"},
	{"base-256 time before 1970", block{name: "a", typ: '0', mtime: strings.Repeat("\xff", 11) + "\xfe"}.String(), "\"a\" 100644 0 -2.0 0\n"},
	{"pax times", pax('x', "mtime=-1.25") + file("a") + pax('x', "mtime=1.0000000019") + file("b") + pax('x', "mtime=-0.0000000001") + file("c") + pax('x', "mtime=-3") + file("d"),
		"\"a\" 100644 0 -2.750000000 0\n\"b\" 100644 0 1.1 0\n\"c\" 100644 0 -1.999999999 0\n\"d\" 100644 0 -3.0 0\n"},
	{"pax size and path", pax('x', "size=3", "path=long/name", "hdrcharset=BINARY") + file("short") + pad("abc"), "\"long/name\" 100644 0 0.0 3 [{0 3}] \"abc\"\n"},
	{"an empty value is none", pax('g', "mtime=5") + pax('x', "mtime=", "path=") + file("a") + file("b"), "\"a\" 100644 0 0.0 0\n\"b\" 100644 0 5.0 0\n"},
	{"later global headers", pax('g', "mtime=5", "uid=7", "comment=x") + file("a") + pax('g', "mtime=") + file("b"), "\"a\" 100644 7 5.0 0\n\"b\" 100644 7 0.0 0\n"},
	{"empty xattr", pax('x', "SCHILY.xattr.user.e=") + file("a"), "\"a\" 100644 0 0.0 0 user.e=\"\"\n"},
	{"libarchive xattr", pax('x', "LIBARCHIVE.xattr.user.a%20b=aGk") + file("a"), "\"a\" 100644 0 0.0 0 user.a b=\"hi\"\n"},
	{"both xattrs", pax('x', "LIBARCHIVE.xattr.user.a%20b=aGk=", "SCHILY.xattr.user.a%20b=hi") + file("a"), "\"a\" 100644 0 0.0 0 user.a b=\"hi\"\n"},
	{"foreign records", pax('x', "APK-TOOLS.checksum.SHA1=00", "LIBARCHIVE.creationtime=1", "SCHILY.ino=3", "atime=1", "uname=root") + file("a"), "\"a\" 100644 0 0.0 0\n"},
	{"gnu long names", block{name: "././@LongLink", typ: 'K', magic: gnu, size: oct(4)}.String() + pad("to!\x00") +
		block{name: "././@LongLink", typ: 'L', magic: gnu, size: oct(4)}.String() + pad("abc\x00") + block{name: "a", link: "t", typ: '2', magic: gnu}.String(),
		"\"abc\" 120777 0 0.0 0 ->\"to!\"\n"},
	{"hard link with a size but no data", block{name: "a", link: "b", typ: '1', size: oct(5)}.String() + file("c"), "\"a\" link \"b\"\n\"c\" 100644 0 0.0 0\n"},
	{"hard link with data", block{name: "a", link: "./b", typ: '1', size: oct(5)}.String() + pad("hello") + file("c"), "\"a\" link \"b\"\n\"c\" 100644 0 0.0 0\n"},
	{"last hard link with a size", block{name: "a", link: "b", typ: '1', size: oct(5)}.String(), "\"a\" link \"b\"\n"},
	{"directory with a size", block{name: "a", typ: '5', size: oct(4096)}.String() + zeros, "\"a\" 40644 0 0.0 0\n"},
	{"volume label", block{name: "label", typ: 'V'}.String() + file("a"), "\"a\" 100644 0 0.0 0\n"},
	{"directory listing", block{name: "d/", typ: 'D', magic: gnu, size: oct(5)}.String() + pad("Yab\x00\x00") + file("a"), "\"d\" 40644 0 0.0 0\n\"a\" 100644 0 0.0 0\n"},
	{"old sparse", block{name: "s", typ: 'S', magic: gnu, size: oct(5), rest: map[int]string{345: end, 386: oct(512) + oct(3) + oct(2048) + oct(2) + oct(9000) + oct(0), 483: oct(9000)}}.String() + pad("abcde"),
		"\"s\" 100644 0 0.0 9000 [{512 3} {2048 2}] \"abcde\"\n"},
	{"sparse 1.0", pax('x', "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=100") + block{name: "x", typ: '0', size: oct(512 + 3)}.String() + pad("2\n10\n3\n100\n0\n") + pad("abc"),
		"\"s\" 100644 0 0.0 100 [{10 3}] \"abc\"\n"},
	{"whiteouts", file("a/.wh.b") + file(".wh.c") + file("d/.wh..wh..opq") + file(".wh..wh..opq") + file("e.wh.f"),
		"\"a/b\" whiteout\n\"c\" whiteout\n\"d\" opaque\n\"\" opaque\n\"e.wh.f\" 100644 0 0.0 0\n"},
	{"whiteout as aufs makes it", block{name: ".wh.a", link: ".wh..wh.aufs", typ: '1'}.String(), "\"a\" whiteout\n"},
	{"aufs housekeeping", file(".wh..wh.aufs") + block{name: ".wh..wh.plnk/", typ: '5'}.String() + block{name: ".wh..wh.plnk/1.2", typ: '0', size: oct(3)}.String() + pad("abc") + file(".wh..wh.plnk/.wh..") + file("a"), "\"a\" 100644 0 0.0 0\n"},
}

func TestReader(t *testing.T) {
	for _, test := range good {
		t.Run(test.name, func(t *testing.T) {
			got, err := readAll(test.archive, index.Limits{})
			if err != nil || got != test.want {
				t.Errorf("%v, got\n%swant\n%s", err, got, test.want)
			}
		})
	}
}

func device(typ byte, major, minor string) string {
	return block{name: "dev", typ: typ, magic: ustar, rest: map[int]string{329: major, 337: minor}}.String()
}

var bad = []struct {
	name, archive string
	kind          error
	say           string // the error must
}{
	{"not tar", strings.Repeat("x", 512), index.ErrCorrupt, "checksum"},
	{"half a header", file("a")[:100], index.ErrCorrupt, "cut off"},
	{"a file cut off", block{name: "a", typ: '0', size: oct(1000)}.String() + pad("x"), index.ErrCorrupt, "cut off"},
	{"a lone zero block", zeros[:512] + file("a"), index.ErrCorrupt, "lone zero block"},
	{"dot dot", file("a/../b"), index.ErrCorrupt, ".."},
	{"no name", file(""), index.ErrCorrupt, "empty name"},
	{"a long element", pax('x', "path="+strings.Repeat("n", 256)) + file("a"), index.ErrCorrupt, "255"},
	{"a long path", pax('x', "path="+strings.Repeat("n/", 2048)+"n") + file("a"), index.ErrCorrupt, "4096"},
	{"a NUL in a path", pax('x', "path=a\x00b") + file("a"), index.ErrCorrupt, "NUL"},
	{"letters in a number", block{name: "a", typ: '0', mode: "zzz"}.String(), index.ErrCorrupt, "mode"},
	{"a negative size", block{name: "a", typ: '0', size: strings.Repeat("\xff", 12)}.String(), index.ErrCorrupt, "size"},
	{"a size beyond 63 bits", block{name: "a", typ: '0', size: "\x80\x00\x00\x01" + strings.Repeat("\x00", 8)}.String(), index.ErrCorrupt, "size"},
	{"uid -1", block{name: "a", typ: '0', uid: strings.Repeat("\xff", 8)}.String(), index.ErrUnsupported, "uid -1"},
	{"uid 4294967295", pax('x', "uid=4294967295") + file("a"), index.ErrUnsupported, "uid 4294967295"},
	{"uid beyond", pax('x', "uid=99999999999999999999") + file("a"), index.ErrCorrupt, "uid"},
	{"an odd time", pax('x', "mtime=1e9") + file("a"), index.ErrCorrupt, "mtime"},
	{"type M", block{name: "a", typ: 'M'}.String(), index.ErrUnsupported, "volume"},
	{"type N", block{name: "a", typ: 'N'}.String(), index.ErrUnsupported, "'N'"},
	{"type 9", block{name: "a", typ: '9'}.String(), index.ErrUnsupported, "'9'"},
	{"overlayfs whiteout", device('3', "0000000\x00", "0000000\x00"), index.ErrUnsupported, "0:0"},
	{"major number", device('4', "0010000\x00", "0000000\x00"), index.ErrUnsupported, "4096:0"},
	{"symlink to nothing", block{name: "a", typ: '2'}.String(), index.ErrCorrupt, "target"},
	{"hard link to the root", block{name: "a", typ: '1', link: "/"}.String(), index.ErrCorrupt, "hard link"},
	{"whiteout of nothing", file(".wh."), index.ErrCorrupt, "whiteout"},
	{"whiteout of the parent", file("a/.wh..."), index.ErrCorrupt, "whiteout"},
	{"below a whiteout", file(".wh.a/b"), index.ErrCorrupt, "below a whiteout"},
	{"overlay xattr", pax('x', "SCHILY.xattr.trusted.overlay.opaque=y") + file("a"), index.ErrUnsupported, "trusted.overlay.opaque"},
	{"overlay user xattr", pax('x', "LIBARCHIVE.xattr.user%2eoverlay.redirect=eQ") + file("a"), index.ErrUnsupported, "user.overlay.redirect"},
	{"odd xattr", pax('x', "SCHILY.xattr.com.apple.quarantine=y") + file("a"), index.ErrUnsupported, "com.apple.quarantine"},
	{"xattr without a name", pax('x', "SCHILY.xattr.user.=y") + file("a"), index.ErrUnsupported, "user."},
	{"global overlay xattr", pax('g', "SCHILY.xattr.trusted.overlay.metacopy=y") + file("a"), index.ErrUnsupported, "trusted.overlay.metacopy"},
	{"bad base64", pax('x', "LIBARCHIVE.xattr.user.a=%%") + file("a"), index.ErrCorrupt, "base64"},
	{"acl text", pax('x', "SCHILY.acl.access=user::rwx") + file("a"), index.ErrUnsupported, "SCHILY.acl.access"},
	{"selinux", pax('x', "RHT.security.selinux=x") + file("a"), index.ErrUnsupported, "RHT.security.selinux"},
	{"unknown posix", pax('x', "realtime.x=1") + file("a"), index.ErrUnsupported, "realtime.x"},
	{"unknown short", pax('x', "inode=1") + file("a"), index.ErrUnsupported, "inode"},
	{"windows", pax('x', "MSWINDOWS.rawsd=x") + file("a"), index.ErrUnsupported, "MSWINDOWS.rawsd"},
	{"charset", pax('x', "hdrcharset=ISO-IR 8859 1 1998") + file("a"), index.ErrUnsupported, "hdrcharset"},
	{"global path", pax('g', "path=x") + file("a"), index.ErrUnsupported, "path"},
	{"two pax headers", pax('x', "mtime=1") + pax('x', "mtime=1") + file("a"), index.ErrCorrupt, "second"},
	{"names that differ", pax('x', "path=x") + block{name: "l", typ: 'L', magic: gnu, size: oct(2)}.String() + pad("y\x00") + file("a"), index.ErrCorrupt, "different names"},
	{"a pax header alone", pax('x', "mtime=1"), index.ErrCorrupt, "without an entry"},
	{"a record without newline", block{name: "p", typ: 'x', size: oct(6)}.String() + pad("6 a=bc") + file("a"), index.ErrCorrupt, "newline"},
	{"a record too long", block{name: "p", typ: 'x', size: oct(6)}.String() + pad("9 a=b\n") + file("a"), index.ErrCorrupt, "length"},
	{"a record without key", block{name: "p", typ: 'x', size: oct(5)}.String() + pad("5 =b\n") + file("a"), index.ErrCorrupt, "key"},
	{"sparse directory", pax('x', "GNU.sparse.size=1", "GNU.sparse.map=0,0") + block{name: "a", typ: '5'}.String(), index.ErrCorrupt, "sparse"},
	{"sparse of another version", pax('x', "GNU.sparse.major=2", "GNU.sparse.minor=0") + file("a"), index.ErrUnsupported, "2.0"},
	{"sparse out of order", pax('x', "GNU.sparse.size=9", "GNU.sparse.map=5,1,0,1") + block{name: "a", typ: '0', size: oct(2)}.String() + pad("ab"), index.ErrCorrupt, "sparse map"},
	{"sparse beyond the end", pax('x', "GNU.sparse.size=9", "GNU.sparse.map=8,2") + block{name: "a", typ: '0', size: oct(2)}.String() + pad("ab"), index.ErrCorrupt, "sparse map"},
	{"sparse with too little data", pax('x', "GNU.sparse.size=9", "GNU.sparse.map=0,3") + block{name: "a", typ: '0', size: oct(2)}.String() + pad("ab"), index.ErrCorrupt, "sparse map"},
	{"sparse pairs out of turn", pax('x', "GNU.sparse.size=9", "GNU.sparse.numbytes=0") + file("a"), index.ErrCorrupt, "out of turn"},
	{"sparse 1.0 map too long", pax('x', "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=1") + block{name: "x", typ: '0', size: oct(512)}.String() + pad("200\n"+strings.Repeat("0\n", 254)), index.ErrCorrupt, "sparse map"},
	{"type S without GNU", block{name: "a", typ: 'S', magic: ustar}.String(), index.ErrUnsupported, "sparse"},
}

func TestReaderRefuses(t *testing.T) {
	for _, test := range bad {
		t.Run(test.name, func(t *testing.T) {
			_, err := readAll(test.archive, index.Limits{})
			if !errors.Is(err, test.kind) || !strings.Contains(fmt.Sprint(err), test.say) {
				t.Errorf("%v, want %v and %q", err, test.kind, test.say)
			}
			var at *index.Error
			if errors.As(err, &at) && at.Name != "hand" {
				t.Errorf("error names %q, want the layer", at.Name)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	if got, want := (index.Limits{}).WithDefaults(), (index.Limits{
		Entries: 10_000_000, HeaderBytes: 1 << 20, XattrBytes: 64 << 10, MetadataBytes: 1 << 30,
		FileSize: 16 << 40, StreamBytes: 1 << 40, Expansion: 1000, Window: 128 << 20, Memory: 4 << 30,
	}); got != want {
		t.Errorf("the defaults are %+v, want %+v: docs/ARCHITECTURE.md lists them", got, want)
	}
	sparse := pax('x', "GNU.sparse.size=1000000", "GNU.sparse.map=1000000,0") + file("a")
	for _, test := range []struct {
		field, archive string
		lim            index.Limits
	}{
		{"Entries", file("a") + file("b"), index.Limits{Entries: 1}},
		{"HeaderBytes", pax('x', "path="+strings.Repeat("n", 600)) + file("b"), index.Limits{HeaderBytes: 600}},
		{"HeaderBytes", block{name: "a", typ: 'L', size: oct(1 << 32)}.String(), index.Limits{}},
		{"XattrBytes", pax('x', "SCHILY.xattr.user.a="+strings.Repeat("v", 100)) + file("b"), index.Limits{XattrBytes: 100}},
		{"XattrBytes", pax('g', "SCHILY.xattr.user.a="+strings.Repeat("v", 1000)) + file("b"), index.Limits{XattrBytes: 100}},
		{"MetadataBytes", file("abc") + file("def"), index.Limits{MetadataBytes: 5}},
		{"FileSize", block{name: "a", typ: '0', size: oct(1000)}.String(), index.Limits{FileSize: 999}},
		{"FileSize", sparse, index.Limits{FileSize: 999999}},
		{"StreamBytes", block{name: "a", typ: '0', size: oct(5000)}.String() + strings.Repeat("x", 5000), index.Limits{StreamBytes: 4000}},
		{"StreamBytes", zeros + strings.Repeat("x", 50000), index.Limits{StreamBytes: 4000}},
	} {
		_, err := readAll(test.archive, test.lim)
		if !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), test.field) {
			t.Errorf("%s: %v", test.field, err)
		}
	}
}

func TestCheckXattr(t *testing.T) {
	long := strings.Repeat("x", 64<<10)
	for _, c := range []struct {
		name, value string
		want        error
	}{
		{"user.a", long, nil},
		{"user.a", long + "x", index.ErrCorrupt},
		{"user." + long[:250], "", nil},
		{"user." + long[:251], "", index.ErrCorrupt},
		{"trusted.a\x00", "", index.ErrCorrupt},
		{"security.capability", "", nil},
		{"system.posix_acl_default", "", nil},
		{"system.nfs4_acl", "", index.ErrUnsupported},
		{"user.", "", index.ErrUnsupported},
		{"trusted.overlay.opaque", "", index.ErrUnsupported},
		{"user.overlay.opaque", "", index.ErrUnsupported},
	} {
		if got := layer.CheckXattr(c.name, c.value); got != c.want {
			t.Errorf("%.300q of %d bytes: %v, want %v", c.name, len(c.value), got, c.want)
		}
	}
}

// A header that claims to be followed by much data must not cost memory.
func TestReaderMemory(t *testing.T) {
	for _, archive := range []string{
		block{name: "a", typ: 'x', size: oct(8 << 20)}.String(),
		block{name: "a", typ: '0', size: oct(1 << 32)}.String(),
		pax('x', "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=1") + block{name: "x", typ: '0', size: oct(1024)}.String() + pad("8000000\n"),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := readAll(archive, index.Limits{})
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; err == nil || n > 2<<20 {
			t.Errorf("%d bytes allocated, error %v", n, err)
		}
	}
}

// Errors of the source are not corruption, wherever they come.
func TestReaderSourceError(t *testing.T) {
	archive := pax('x', "mtime=1") + block{name: "a", typ: '0', size: oct(700)}.String() + pad(strings.Repeat("x", 700)) + file("b") + zeros
	for _, broken := range []error{errors.New("broken"), io.ErrUnexpectedEOF} {
		for n := 0; n <= len(archive); n += 61 {
			r := layer.NewReader(io.MultiReader(strings.NewReader(archive[:n]), iotest.ErrReader(broken)), "l", index.Limits{})
			var err error
			for err == nil {
				if _, err = r.Next(); err == nil {
					_, err = io.Copy(io.Discard, r)
				}
			}
			if err != broken {
				t.Fatalf("after %d bytes: %v, want %v", n, err, broken)
			}
			if _, again := r.Next(); again != err {
				t.Fatalf("then %v", again)
			}
		}
	}
}

func TestReaderDrains(t *testing.T) {
	archive := file("a") + zeros + strings.Repeat("trailer", 100000)
	h := sha256.New()
	r := layer.NewReader(io.TeeReader(strings.NewReader(archive), h), "l", index.Limits{})
	for {
		if _, err := r.Next(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if want := sha256.Sum256([]byte(archive)); !bytes.Equal(h.Sum(nil), want[:]) {
		t.Error("not all of the stream was read")
	}
}

// TestAgainstGo reads what archive/tar writes, the writer of most images.
func TestAgainstGo(t *testing.T) {
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX, tar.FormatGNU} {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		when := time.Unix(1700000000, 0)
		long := strings.Repeat("long/", 30)
		add := func(h tar.Header, data string) {
			t.Helper()
			h.Format, h.ModTime, h.Size = format, when, int64(len(data))
			if h.Mode == 0 {
				h.Mode = 0o644
			}
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(w, data); err != nil {
				t.Fatal(err)
			}
		}
		add(tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o1777}, "")
		add(tar.Header{Name: long + "file", Typeflag: tar.TypeReg, Uid: 1000, Gid: 1001}, "content")
		add(tar.Header{Name: "link", Typeflag: tar.TypeLink, Linkname: "dir"}, "")
		add(tar.Header{Name: "sym", Typeflag: tar.TypeSymlink, Linkname: "/" + strings.Repeat("t", 99)}, "")
		add(tar.Header{Name: "dev", Typeflag: tar.TypeBlock, Devmajor: 259, Devminor: 3}, "")
		add(tar.Header{Name: "fifo", Typeflag: tar.TypeFifo}, "")
		add(tar.Header{Name: "dir/.wh.gone", Typeflag: tar.TypeReg}, "")
		if format == tar.FormatPAX {
			add(tar.Header{Name: "ü", Typeflag: tar.TypeReg, Uid: 1 << 30, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b\x00c"}}, "x")
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		got, err := readAll(buf.String(), index.Limits{})
		want := "\"dir\" 41777 0 1700000000.0 0\n" +
			fmt.Sprintf("%q 100644 1000 1700000000.0 7 [{0 7}] \"content\"\n", long+"file") +
			"\"link\" link \"dir\"\n" +
			fmt.Sprintf("\"sym\" 120777 0 1700000000.0 0 ->%q\n", "/"+strings.Repeat("t", 99)) +
			"\"dev\" 60644 0 1700000000.0 0\n\"fifo\" 10644 0 1700000000.0 0\n\"dir/gone\" whiteout\n"
		if format == tar.FormatPAX {
			want += "\"ü\" 100644 1073741824 1700000000.0 1 user.a=\"b\\x00c\" [{0 1}] \"x\"\n"
		}
		if err != nil || got != want {
			t.Errorf("%v: %v, got\n%swant\n%s", format, err, got, want)
		}
	}
}

func FuzzReader(f *testing.F) {
	for _, test := range good {
		f.Add([]byte(test.archive))
	}
	for _, test := range bad {
		f.Add([]byte(test.archive))
	}
	if _, err := exec.LookPath("tar"); err == nil && os.Geteuid() == 0 {
		root := f.TempDir()
		makeWorld(f, root, world{xattrs: true, special: true, bigIDs: true, old: true})
		for _, args := range [][]string{{"--format=gnu", "-S"}, {"--format=posix", "-S", "--xattrs", "--xattrs-include=*"}, {"--format=posix", "-z"}, {"--format=gnu", "--zstd"}} {
			f.Add(run(f, "tar", append(args, "-c", "-f", "-", "-C", root, ".")...))
		}
	}
	lim := index.Limits{HeaderBytes: 64 << 10, FileSize: 1 << 40}
	f.Fuzz(func(t *testing.T, p []byte) {
		rc, _, err := layer.Decompress(bytes.NewReader(p), index.Limits{StreamBytes: 4 << 20, Window: 8 << 20})
		if err != nil {
			return
		}
		defer rc.Close()
		r := layer.NewReader(rc, "fuzz", lim)
		tree := index.NewTree()
		to := tree.Begin()
		for {
			e, err := r.Next()
			if err != nil {
				return
			}
			var stored, last int64
			for _, fr := range e.Fragments {
				if fr.Length <= 0 || fr.Off < last || fr.Off+fr.Length > e.Inode.Size {
					t.Fatalf("%q: fragments %v in %d bytes", e.Path, e.Fragments, e.Inode.Size)
				}
				last = fr.Off + fr.Length
				stored += fr.Length
			}
			n, err := io.Copy(io.Discard, r)
			if err == nil && n != stored {
				t.Fatalf("%q: %d bytes of data, want %d", e.Path, n, stored)
			}
			if e.Op == index.Add {
				switch e.Inode.Type() {
				case syscall.S_IFREG, syscall.S_IFDIR, syscall.S_IFLNK, syscall.S_IFCHR, syscall.S_IFBLK, syscall.S_IFIFO:
				default:
					t.Fatalf("%q has mode %o", e.Path, e.Inode.Mode)
				}
			}
			if err := to.Apply(e.Change); err != nil && !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrLimit) {
				t.Fatalf("what the reader passes is refused: %v", err)
			}
		}
	})
}

// endless is an archive of n files of a size, never in memory as a whole.
func endless(n, size int) io.Reader {
	one := block{name: "dir/file", typ: '0', magic: ustar, size: oct(size)}.String() + pad(strings.Repeat("x", size))
	readers := make([]io.Reader, 0, n+1)
	for range n {
		readers = append(readers, strings.NewReader(one))
	}
	return io.MultiReader(append(readers, strings.NewReader(zeros))...)
}

func BenchmarkReader(b *testing.B) {
	for _, size := range []int{1 << 10, 16 << 10, 1 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			const total = 300 << 20
			n := total / (size + 512)
			b.SetBytes(total)
			buf := make([]byte, 64<<10)
			for b.Loop() {
				r := layer.NewReader(endless(n, size), "l", index.Limits{})
				for {
					if _, err := r.Next(); err == io.EOF {
						break
					} else if err != nil {
						b.Fatal(err)
					}
					for {
						if _, err := r.Read(buf); err != nil {
							break
						}
					}
				}
			}
		})
	}
}
