package estargz_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
)

// footer makes the footer of a layer, with the extra field.
func footer(extra string) string {
	return "\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff" + string(rune(len(extra))) + "\x00" + extra + "\x01\x00\x00\xff\xff" + strings.Repeat("\x00", 8)
}

func TestLocate(t *testing.T) {
	const size = 1000
	for what, test := range map[string]struct {
		tail string
		want estargz.Section
		kind error
	}{
		"eStargz":          {footer("SG\x16\x0000000000000001f4STARGZ"), estargz.Section{Offset: 500, Length: 449}, nil},
		"more than a tail": {strings.Repeat("x", 100) + footer("SG\x16\x0000000000000001f4STARGZ"), estargz.Section{Offset: 500, Length: 449}, nil},
		"stargz":           {"1234" + footer("00000000000001f4STARGZ"), estargz.Section{Offset: 500, Length: 453}, nil},
		"offset 0":         {footer("SG\x16\x000000000000000000STARGZ"), estargz.Section{Offset: 0, Length: 949}, nil},
		"offset too large": {footer("SG\x16\x0000000000000003b5STARGZ"), estargz.Section{}, index.ErrCorrupt},
		"offset 2^64-1":    {footer("SG\x16\x00ffffffffffffffffSTARGZ"), estargz.Section{}, index.ErrCorrupt},
		"offset no number": {footer("SG\x16\x00-000000000000001STARGZ"), estargz.Section{}, index.ErrCorrupt},
		"other magic":      {footer("SG\x16\x0000000000000001f4STARGX"), estargz.Section{}, index.ErrUnsupported},
		"other subfield":   {footer("SH\x16\x0000000000000001f4STARGZ"), estargz.Section{}, index.ErrUnsupported},
		"external":         {footer("SG\x11\x00STARGZEXTERNALTOC"), estargz.Section{}, index.ErrUnsupported},
		"no gzip":          {strings.Repeat("\x00", 51), estargz.Section{}, index.ErrUnsupported},
		"nothing":          {"", estargz.Section{}, index.ErrUnsupported},
		"cut off":          {footer("SG\x16\x0000000000000001f4STARGZ")[10:], estargz.Section{}, index.ErrUnsupported},
		"not empty":        {strings.TrimSuffix(footer("SG\x16\x0000000000000001f4STARGZ"), "\x00") + "\x01", estargz.Section{}, index.ErrUnsupported},
		"table elsewhere":  {"12345" + footer("SG\x11\x00STARGZEXTERNALTOC"), estargz.Section{}, index.ErrUnsupported},
		"a byte behind it": {footer("SG\x16\x0000000000000001f4STARGZ") + "\x00", estargz.Section{}, index.ErrUnsupported},
	} {
		got, err := estargz.Locate([]byte(test.tail), size, "layer")
		if got != test.want || !errors.Is(err, test.kind) || test.kind != nil && !strings.HasPrefix(fmt.Sprint(err), "layer: ") {
			t.Errorf("%s: %v, %v, want %v, %v", what, got, err, test.want, test.kind)
		}
	}
	if _, err := estargz.Locate([]byte(footer("SG\x11\x00STARGZEXTERNALTOC")), size, "layer"); !strings.Contains(fmt.Sprint(err), "another image") {
		t.Error(err)
	}
}

// pack stores a table.
func pack(name, table string) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(table))})
	io.WriteString(w, table)
	w.Close()
	z.Close()
	return b.Bytes()
}

func TestRead(t *testing.T) {
	const table = `{"version":1,"entries":[{"type":"dir","name":"a"}]}` + "\n"
	sum := chunk.Sum(chunk.SHA256, []byte(table)).String()
	good := pack("stargz.index.json", table)
	bomb := `{"version":1,"x":"` + strings.Repeat("x", 4<<20)
	for what, test := range map[string]struct {
		stored []byte
		digest string
		kind   error
		says   string
	}{
		"good":             {good, sum, nil, ""},
		"no digest":        {good, "", index.ErrUnsupported, "no annotation containerd.io/snapshot/stargz/toc.digest"},
		"bad digest":       {good, "sha256:x", index.ErrCorrupt, "want a SHA-256 digest"},
		"other digest":     {good, digestA, index.ErrCorrupt, "want " + digestA},
		"BLAKE3":           {good, chunk.Sum(chunk.BLAKE3, []byte(table)).String(), index.ErrCorrupt, "want a SHA-256 digest"},
		"other and bad":    {pack("stargz.index.json", "junk"), sum, index.ErrCorrupt, "want " + sum},
		"other name":       {pack("index.json", table), sum, index.ErrCorrupt, `file "index.json"`},
		"no gzip":          {[]byte(table), sum, index.ErrCorrupt, "gzip"},
		"no tar":           {pack("stargz.index.json", table)[:30], sum, index.ErrCorrupt, "EOF"},
		"cut off":          {good[:len(good)-40], sum, index.ErrCorrupt, "EOF"},
		"empty":            {nil, sum, index.ErrCorrupt, "EOF"},
		"bomb":             {pack("stargz.index.json", bomb), sum, index.ErrLimit, "(MetadataBytes)"},
		"junk in the JSON": {pack("stargz.index.json", "junk"), chunk.Sum(chunk.SHA256, []byte("junk")).String(), index.ErrCorrupt, "invalid character"},
	} {
		l, err := estargz.Read(test.stored, estargz.Section{Offset: 5, Length: int64(len(test.stored))}, test.digest, "layer", index.Limits{MetadataBytes: 1 << 20})
		if test.kind == nil {
			if err != nil || len(l.Changes) != 1 {
				t.Errorf("%s: %v", what, err)
			}
		} else if !errors.Is(err, test.kind) || !strings.HasPrefix(err.Error(), "layer: ") || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, want %v with %q", what, err, test.kind, test.says)
		}
	}
	if _, err := estargz.Read(good[1:], estargz.Section{Offset: 5, Length: int64(len(good))}, sum, "layer", index.Limits{}); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("a byte less: %v", err)
	}
}

// TestFlipped changes every third byte of a stored table: it is refused or, where gzip
// does not care (the time in its header), the same.
func TestFlipped(t *testing.T) {
	blob, digest := golden(t, "chunks.gz")
	at, err := estargz.Locate(blob, int64(len(blob)), "layer")
	if err != nil {
		t.Fatal(err)
	}
	stored := blob[at.Offset:][:at.Length]
	want := fmt.Sprintf("%+v", read(t, blob, digest).Chunks)
	for i := 0; i < len(stored); i += 3 {
		p := bytes.Clone(stored)
		p[i] ^= 0x55
		l, err := estargz.Read(p, at, digest, "layer", index.Limits{})
		if err == nil && fmt.Sprintf("%+v", l.Chunks) == want {
			continue
		}
		if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrLimit) {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
}

// table returns the JSON of a golden's table.
func table(t testing.TB, name string) []byte {
	blob, _ := golden(t, name)
	at, err := estargz.Locate(blob, int64(len(blob)), name)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(blob[at.Offset:][:at.Length]))
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(z)
	if _, err := r.Next(); err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"plain.gz", "chunks.gz", "min.gz", "odd.gz"} {
		f.Add(table(f, name), int64(20000), false)
	}
	f.Add([]byte(`{"version":1,"entries":[{"type":"reg","name":"a","size":5000,"offset":9,"endOffset":30,"chunkSize":4096,"chunkType":"zeros"},{"type":"chunk","offset":19}]}`), int64(100), true)
	f.Fuzz(func(t *testing.T, table []byte, end int64, frames bool) {
		s := estargz.Stored{Codec: chunk.Gzip, End: end}
		if frames {
			s.Codec = chunk.Zstd
		}
		l, err := estargz.Parse(bytes.NewReader(table), "layer", s, index.Limits{})
		if err != nil {
			typed(t, err)
			return
		}
		tree := index.NewTree()
		tree.Blobs = []index.Blob{{Size: end, Spans: l.Spans}}
		if err := tree.CheckSpans(); err != nil {
			t.Fatal(err)
		}
		for i := range l.Chunks {
			if err := tree.CheckChunk(&l.Chunks[i]); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range l.Changes {
			if c.Op == index.Add {
				extents(t, c.Inode, l.Chunks)
			}
		}
		if err := tree.Apply(l.Changes); err != nil {
			typed(t, err)
		}
	})
}

// typed fails unless err says what kind of error it is.
func typed(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrUnsupported) && !errors.Is(err, index.ErrLimit) {
		t.Fatalf("untyped error: %v", err)
	}
}

// extents checks that those of a file lie in it, in order, where blocks begin.
func extents(t *testing.T, ino *index.Inode, chunks []index.Chunk) {
	t.Helper()
	var at int64
	for _, e := range ino.Extents {
		if e.Off < at || e.Off%4096 != 0 || e.Off+int64(chunks[e.Chunk].Size) > ino.Size {
			t.Fatalf("extent at %d of %d, behind %d", e.Off, ino.Size, at)
		}
		at = e.Off + int64(chunks[e.Chunk].Size)
	}
}

func FuzzLocate(f *testing.F) {
	f.Add([]byte(footer("SG\x16\x0000000000000001f4STARGZ")), int64(1000))
	f.Add([]byte("1234"+footer("00000000000001f4STARGZ")), int64(1000))
	f.Add([]byte(footer("SG\x11\x00STARGZEXTERNALTOC")), int64(1000))
	f.Fuzz(func(t *testing.T, tail []byte, size int64) {
		at, err := estargz.Locate(tail, size, "layer")
		if err != nil {
			typed(t, err)
		} else if at.Offset < 0 || at.Length <= 0 || at.Offset > size-at.Length {
			t.Fatalf("%v of %d", at, size)
		}
	})
}

func FuzzRead(f *testing.F) {
	blob, digest := golden(f, "chunks.gz")
	at, err := estargz.Locate(blob, int64(len(blob)), "layer")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(blob[at.Offset:][:at.Length])
	f.Add(pack("stargz.index.json", `{"version":1,"entries":[]}`))
	f.Fuzz(func(t *testing.T, stored []byte) {
		_, err := estargz.Read(stored, estargz.Section{Offset: at.Offset, Length: int64(len(stored))}, digest, "layer", index.Limits{MetadataBytes: 1 << 20})
		if err != nil {
			typed(t, err)
		}
	})
}

// TestSample: the example of the format's own documentation.
func TestSample(t *testing.T) {
	p, err := os.ReadFile("testdata/sample.json")
	if err != nil {
		t.Fatal(err)
	}
	l, err := estargz.Parse(bytes.NewReader(p), "sample", estargz.Stored{Codec: chunk.Gzip, End: 886733}, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	busybox := lookup(t, l, "bin/busybox")
	s := l.Spans[0]
	if busybox.Size != 833104 || busybox.Mode != 0o100755 || len(busybox.Extents) != 1 || s.Offset != 126 || s.Offset+s.Length != 512427 || s.Size != 833104 {
		t.Errorf("%+v in %+v", busybox, s)
	}
	if got := strings.Join(l.Prefetch, " "); got != "bin/busybox lib/ld-musl-x86_64.so.1" || len(l.Changes) != 4 {
		t.Errorf("%d changes, prefetch %s", len(l.Changes), got)
	}
}

// BenchmarkParse reads a table of 100,000 files.
func BenchmarkParse(b *testing.B) {
	type entry = map[string]any
	var entries []entry
	for i := range 100000 {
		d := chunk.Sum(chunk.SHA256, fmt.Append(nil, i)).String()
		entries = append(entries, entry{"name": fmt.Sprintf("usr/share/dir%d/file%d", i/50, i), "type": "reg", "size": 5000, "modtime": "2023-11-14T22:13:20Z",
			"mode": 33188, "offset": 100 + i*2000, "NumLink": 0, "digest": d, "chunkDigest": d})
	}
	p, err := json.MarshalIndent(entry{"version": 1, "entries": entries}, "", "\t")
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := estargz.Parse(bytes.NewReader(p), "layer", estargz.Stored{Codec: chunk.Gzip, End: 1 << 40}, index.Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}
