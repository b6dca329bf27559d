package soci

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/shale-image/shale/index"
)

// places tells where in a ztoc its parts are.
type places struct {
	flat
	root, info, toc      int
	digests, checkpoints int // of the first
	files                []int
}

func locate(t testing.TB, p []byte) *places {
	x := &places{flat: flat{b: p}}
	x.root = x.flat.root()
	x.info, x.toc = x.table(x.root, ztocCompression), x.table(x.root, ztocTOC)
	x.digests, _ = x.vector(x.info, infoDigests, 4)
	x.checkpoints, _ = x.vector(x.info, infoCheckpoints, 1)
	at, n := x.vector(x.toc, 0, 4)
	for i := range n {
		x.files = append(x.files, x.indirect(at+4*i))
	}
	if x.err != nil || len(x.files) == 0 {
		t.Fatal(x.err)
	}
	return x
}

// file returns the file of a name.
func (x *places) file(t testing.TB, name string) int {
	for _, f := range x.files {
		if string(x.bytes(f, fileName)) == name {
			return f
		}
	}
	t.Fatalf("no file %q", name)
	return 0
}

func (x *places) put64(pos int, v int64)  { binary.LittleEndian.PutUint64(x.b[pos:], uint64(v)) }
func (x *places) put32(pos int, v uint32) { binary.LittleEndian.PutUint32(x.b[pos:], v) }
func (x *places) text(table, n int, s string) {
	pos, size := x.vector(table, n, 1)
	if len(s) > size {
		panic("no room")
	}
	x.put32(pos-4, uint32(len(s)))
	copy(x.b[pos:], s)
}

// A ztoc that says what cannot be is refused for what it is.
func TestHostile(t *testing.T) {
	all := ztocs(t, "v2")
	gz, plain := all[0], all[1]
	for _, c := range []struct {
		what   string
		of     ztoc
		change func(x *places)
		kind   error
		text   string
	}{
		{"version", gz, func(x *places) { x.text(x.root, ztocVersion, "1.0") }, index.ErrUnsupported, `version "1.0"`},
		{"another layer", gz, func(x *places) { x.put64(x.field(x.root, ztocStored), 7) }, index.ErrCorrupt, "layer of 7 bytes"},
		{"negative archive", gz, func(x *places) { x.put64(x.field(x.root, ztocStream), -1) }, index.ErrCorrupt, "archive of -1"},
		{"short archive", gz, func(x *places) { x.put64(x.field(x.root, ztocStream), 2000) }, index.ErrCorrupt, "of the archive of 2000"},
		{"long archive", gz, func(x *places) { x.put64(x.field(x.root, ztocStream), math.MaxInt64) }, index.ErrCorrupt, "cannot hold"},
		{"spans", gz, func(x *places) { x.put32(x.field(x.info, infoLast), 99) }, index.ErrCorrupt, "up to number 99"},
		{"algorithm", plain, func(x *places) { x.b[x.field(x.info, infoAlgorithm)] = 9 }, index.ErrUnsupported, "algorithm 9"},
		{"plain as gzip", plain, func(x *places) { x.b[x.field(x.info, infoAlgorithm)] = algorithmGzip }, index.ErrCorrupt, "checkpoints for"},
		{"digest", gz, func(x *places) { x.b[x.indirect(x.digests)+5] = 'x' }, index.ErrCorrupt, "digest"},
		{"checkpoints", gz, func(x *places) { x.put32(x.checkpoints, 1) }, index.ErrCorrupt, "checkpoints for"},
		{"a first checkpoint not at the start", gz, func(x *places) { x.put64(x.checkpoints+zinfoHeader+8, 1) }, index.ErrCorrupt, "checkpoint 0"},
		{"a checkpoint behind the layer", gz, func(x *places) { x.put64(x.checkpoints+zinfoHeader+checkpointSize, gz.Size+1) }, index.ErrCorrupt, "checkpoint"},
		{"checkpoints out of order", gz, func(x *places) { x.put64(x.checkpoints+zinfoHeader+checkpointSize+8, -5) }, index.ErrCorrupt, "checkpoint"},
		{"a negative checkpoint", gz, func(x *places) { x.put64(x.checkpoints+zinfoHeader, math.MinInt64) }, index.ErrCorrupt, "checkpoint"},
		{"bits", gz, func(x *places) { x.b[x.checkpoints+zinfoHeader+16] = 8 }, index.ErrCorrupt, "8 bits"},
		{"a name of nothing", gz, func(x *places) { x.text(x.files[1], fileName, "") }, index.ErrCorrupt, "an empty name"},
		{"a name that leads out", gz, func(x *places) { x.text(x.files[1], fileName, "../x") }, index.ErrCorrupt, `".."`},
		{"type", gz, func(x *places) { x.text(x.files[1], fileType, "xyz") }, index.ErrUnsupported, `type "xyz"`},
		{"time", gz, func(x *places) { x.text(x.files[1], fileTime, "now") }, index.ErrUnsupported, `modified at "now"`},
		{"a file behind the archive", gz, func(x *places) { x.put64(x.field(x.file(t, "./dir/big"), fileSize), 1<<40) }, index.ErrCorrupt, "of the archive"},
		{"a file of negative size", gz, func(x *places) { x.put64(x.field(x.file(t, "./dir/big"), fileSize), -1) }, index.ErrCorrupt, "-1 bytes"},
		{"a file at no block", gz, func(x *places) {
			x.put64(x.field(x.file(t, "./dir/big"), fileOffset), x.i64(x.file(t, "./dir/big"), fileOffset)+1)
		}, index.ErrCorrupt, "lies at offset"},
		{"a file in another", gz, func(x *places) { x.put64(x.field(x.file(t, "./dir/big"), fileOffset), 512) }, index.ErrCorrupt, "lies at offset"},
		{"owner", gz, func(x *places) { x.put32(x.field(x.file(t, "./dir/chunk"), fileUID), math.MaxUint32) }, index.ErrUnsupported, "uid"},
		{"sparse", gz, func(x *places) {
			at, _ := x.vector(x.file(t, "./dir/big"), fileRecords, 4)
			x.text(x.indirect(at), 0, "GNU.sparse.map")
		}, index.ErrUnsupported, "is sparse"},
		{"a reference out", gz, func(x *places) { x.put32(x.field(x.root, ztocTOC), math.MaxUint32) }, index.ErrCorrupt, "a reference"},
		{"a reference to itself", gz, func(x *places) { x.put32(x.field(x.root, ztocTOC), 0) }, index.ErrCorrupt, "a reference"},
		{"a vector out", gz, func(x *places) { x.put32(x.checkpoints-4, math.MaxUint32) }, index.ErrCorrupt, "elements"},
		{"fields out", gz, func(x *places) { x.put32(x.toc, 1<<31-1) }, index.ErrCorrupt, "fields"},
		{"spans of nothing", plain, func(x *places) {
			f := flat{b: x.b[x.checkpoints:]}
			x.put64(x.checkpoints+f.field(f.root(), plainSpan), 0)
		}, index.ErrCorrupt, "spans of 0"},
		{"larger spans", plain, func(x *places) {
			f := flat{b: x.b[x.checkpoints:]}
			x.put64(x.checkpoints+f.field(f.root(), plainSpan), 1<<40)
		}, index.ErrCorrupt, "spans of 1099511627776"},
	} {
		x := locate(t, bytes.Clone(c.of.stored))
		c.change(x)
		l, err := Read(x.b, c.of.Subject, index.Limits{})
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), c.of.Layer) || l != nil {
			t.Errorf("%s: %v, want %v that says %q", c.what, err, c.kind, c.text)
		}
	}
	if _, err := Read(gz.stored, gz.Subject, index.Limits{Entries: 3}); !errors.Is(err, index.ErrLimit) {
		t.Errorf("entries: %v", err)
	}
	if _, err := Read(gz.stored, gz.Subject, index.Limits{MetadataBytes: 100}); !errors.Is(err, index.ErrLimit) {
		t.Errorf("metadata: %v", err)
	}
}

// A ztoc of old leaves out the first checkpoint.
func TestOldCheckpoints(t *testing.T) {
	z := ztocs(t, "v2")[0]
	x := locate(t, bytes.Clone(z.stored))
	n := binary.LittleEndian.Uint32(x.b[x.checkpoints-4:])
	// What is behind goes one checkpoint to the front.
	rest := x.b[x.checkpoints+zinfoHeader : x.checkpoints+int(n)]
	copy(rest, rest[checkpointSize:])
	x.put32(x.checkpoints-4, n-checkpointSize)
	l, err := Read(x.b, z.Subject, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	want, err := Read(z.stored, z.Subject, index.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if l.Spans[0].Offset != firstCheckpoint || l.Spans[0].Start != 0 || len(l.Spans) != len(want.Spans) || l.Spans[1].Offset != want.Spans[1].Offset ||
		l.Spans[1].Window.Offset+checkpointSize != want.Spans[1].Window.Offset || l.Spans[1].Proof.Window != want.Spans[1].Proof.Window {
		t.Errorf("%+v, want %+v", l.Spans, want.Spans)
	}
}

// Whatever a ztoc says, what is taken can be fetched and makes sense.
func FuzzRead(f *testing.F) {
	for _, z := range ztocs(f, "v2") {
		f.Add(z.stored, z.Size)
	}
	f.Fuzz(func(t *testing.T, p []byte, size int64) {
		l, err := Read(p, Subject{Layer: "sha256:l", Size: size, Ztoc: "sha256:z"}, index.Limits{Entries: 10000})
		if err != nil {
			if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrUnsupported) && !errors.Is(err, index.ErrLimit) {
				t.Fatal(err)
			}
			return
		}
		tree := index.Tree{Chunks: l.Chunks, Blobs: []index.Blob{{Digest: "sha256:l", Size: size, Spans: l.Spans}}}
		if err := tree.CheckSpans(); err != nil {
			t.Fatal(err)
		}
		for i := range tree.Chunks {
			if err := tree.CheckChunk(&tree.Chunks[i]); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range l.Spans {
			if w := s.Window; w.Length > 0 && (w.Offset < 0 || w.Offset+int64(w.Length) > int64(len(p))) {
				t.Fatalf("a window at %d of %d", w.Offset, len(p))
			}
		}
	})
}
