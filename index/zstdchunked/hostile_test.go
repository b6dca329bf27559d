package zstdchunked_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/zstdchunked"
)

const (
	newer = "io.github.containers.zstd-chunked."
	older = "io.containers.zstd-chunked."
)

func TestLocate(t *testing.T) {
	sum := chunk.Sum(chunk.SHA256, nil)
	const size = 1000
	good := zstdchunked.Table{Offset: 500, Length: 100, Size: 900, Digest: sum}
	for what, test := range map[string]struct {
		sum, pos string
		kind     error
		says     string
	}{
		"good":               {sum.String(), "500:100:900:1", nil, ""},
		"no digest":          {"", "500:100:900:1", index.ErrUnsupported, "only one of"},
		"no position":        {sum.String(), "", index.ErrUnsupported, "only one of"},
		"neither":            {"", "", index.ErrUnsupported, "no annotation " + newer + "manifest-position"},
		"bad digest":         {"sha256:00", "500:100:900:1", index.ErrCorrupt, "want a SHA-256 digest"},
		"BLAKE3":             {chunk.Sum(chunk.BLAKE3, nil).String(), "500:100:900:1", index.ErrCorrupt, "want a SHA-256 digest"},
		"three numbers":      {sum.String(), "500:100:900", index.ErrCorrupt, "want four numbers"},
		"five numbers":       {sum.String(), "500:100:900:1:1", index.ErrCorrupt, "want four numbers"},
		"a sign":             {sum.String(), "500:-100:900:1", index.ErrCorrupt, "want four numbers"},
		"too large":          {sum.String(), "500:100:9223372036854775808:1", index.ErrCorrupt, "want four numbers"},
		"other type":         {sum.String(), "500:100:900:2", index.ErrUnsupported, "type 2"},
		"at the beginning":   {sum.String(), "7:100:900:1", index.ErrCorrupt, "100 bytes at offset 7 of 1000"},
		"no bytes":           {sum.String(), "500:0:900:1", index.ErrCorrupt, "0 bytes"},
		"behind the end":     {sum.String(), "500:501:900:1", index.ErrCorrupt, "501 bytes at offset 500"},
		"far behind the end": {sum.String(), "9223372036854775807:9223372036854775807:900:1", index.ErrCorrupt, "of 1000"},
	} {
		for _, prefix := range []string{newer, older} {
			annotations := map[string]string{prefix + "manifest-checksum": test.sum, prefix + "manifest-position": test.pos, "other": "x"}
			got, err := zstdchunked.Locate(annotations, size, "layer")
			if test.kind == nil {
				if err != nil || got != good {
					t.Errorf("%s: %v, %v", what, got, err)
				}
			} else if !errors.Is(err, test.kind) || !strings.HasPrefix(err.Error(), "layer: ") || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: %v, want %v with %q", what, err, test.kind, test.says)
			}
		}
	}
}

// pack stores a table.
func pack(table string) ([]byte, zstdchunked.Table) {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(err)
	}
	p := w.EncodeAll([]byte(table), nil)
	return p, zstdchunked.Table{Offset: 100000, Length: int64(len(p)), Size: int64(len(table)), Digest: chunk.Sum(chunk.SHA256, p)}
}

func TestRead(t *testing.T) {
	const head = `{"version":1,"entries":[`
	const file = `{"type":"reg","name":"big","size":20000000,"offset":100,"endOffset":99000,"digest":"D","chunkSize":70001,"chunkDigest":"D"},
	{"type":"chunk","name":"big","offset":600,"chunkOffset":70001,"chunkSize":19929999,"chunkDigest":"D"}]}`
	digests := strings.NewReplacer(`"D"`, `"`+chunk.Sum(chunk.SHA256, nil).String()+`"`)
	for what, test := range map[string]struct {
		table string
		alter func(p []byte, t *zstdchunked.Table) []byte
		kind  error
		says  string
	}{
		"good":       {head + `]}`, nil, nil, ""},
		"junk":       {"junk", nil, index.ErrCorrupt, "invalid character"},
		"large file": {head + file, nil, index.ErrUnsupported, `"big", 20000000 bytes, is cut at offsets`},
		"small file": {head + strings.ReplaceAll(strings.ReplaceAll(file, "20000000", "16000000"), "19929999", "15929999"), nil, nil, ""},
		"behind the end": {head + strings.ReplaceAll(file, `"endOffset":99000`, `"endOffset":99993`), nil, index.ErrCorrupt,
			"ends at 99993, want at most 99992"},
		"bomb": {head + strings.Repeat(" ", 4<<20) + `]}`, nil, index.ErrLimit, "(MetadataBytes)"},
		"bomb that lies": {head + strings.Repeat(" ", 4<<20) + `]}`, func(p []byte, t *zstdchunked.Table) []byte { t.Size = 100; return p },
			index.ErrCorrupt, "EOF"},
		"size": {head + `]}`, func(p []byte, t *zstdchunked.Table) []byte { t.Size++; return p }, index.ErrCorrupt, "bytes, want"},
		"a byte less": {head + `]}`, func(p []byte, t *zstdchunked.Table) []byte { return p[1:] }, index.ErrCorrupt,
			"bytes of a table"},
		"digest": {head + `]}`, func(p []byte, t *zstdchunked.Table) []byte { t.Digest.Sum[0] ^= 1; return p }, index.ErrCorrupt, "digest is"},
		"no zstd": {head + `]}`, func(p []byte, t *zstdchunked.Table) []byte {
			p = bytes.Repeat([]byte("x"), len(p))
			t.Digest = chunk.Sum(chunk.SHA256, p)
			return p
		}, index.ErrCorrupt, "magic"},
	} {
		p, at := pack(digests.Replace(test.table))
		if test.alter != nil {
			p = test.alter(p, &at)
		}
		_, err := zstdchunked.Read(p, at, "layer", index.Limits{MetadataBytes: 1 << 20})
		if test.kind == nil && err == nil {
			continue
		}
		if test.kind == nil || !errors.Is(err, test.kind) || !strings.HasPrefix(err.Error(), "layer: ") || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, want %v with %q", what, err, test.kind, test.says)
		}
	}
}

// TestFlipped: no byte of a stored table can be changed.
func TestFlipped(t *testing.T) {
	blob, annotations := golden(t, "skopeo.zst")
	at, err := zstdchunked.Locate(annotations, int64(len(blob)), "layer")
	if err != nil {
		t.Fatal(err)
	}
	stored := blob[at.Offset:][:at.Length]
	for i := range stored {
		stored[i] ^= 0x55
		if _, err := zstdchunked.Read(stored, at, "layer", index.Limits{}); !errors.Is(err, index.ErrCorrupt) {
			t.Fatalf("byte %d: %v", i, err)
		}
		stored[i] ^= 0x55
	}
}

func FuzzRead(f *testing.F) {
	for _, name := range []string{"podman.zst", "skopeo.zst", "stargz.zst"} {
		blob, annotations := golden(f, name)
		at, err := zstdchunked.Locate(annotations, int64(len(blob)), name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(blob[at.Offset:][:at.Length], at.Offset, at.Size)
	}
	f.Fuzz(func(t *testing.T, stored []byte, off, size int64) {
		at := zstdchunked.Table{Offset: off, Length: int64(len(stored)), Size: size, Digest: chunk.Sum(chunk.SHA256, stored)}
		l, err := zstdchunked.Read(stored, at, "layer", index.Limits{MetadataBytes: 1 << 20})
		if err != nil {
			typed(t, err)
			return
		}
		tree := index.NewTree()
		tree.Blobs = []index.Blob{{Size: off, Spans: l.Spans}}
		if err := tree.CheckSpans(); err != nil {
			t.Fatal(err)
		}
		for i := range l.Chunks {
			if err := tree.CheckChunk(&l.Chunks[i]); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzLocate(f *testing.F) {
	_, annotations := golden(f, "podman.zst")
	f.Add(annotations[newer+"manifest-checksum"], annotations[newer+"manifest-position"], int64(20000))
	f.Fuzz(func(t *testing.T, sum, pos string, size int64) {
		annotations := map[string]string{newer + "manifest-checksum": sum, newer + "manifest-position": pos}
		at, err := zstdchunked.Locate(annotations, size, "layer")
		if err != nil {
			typed(t, err)
		} else if at.Offset < 8 || at.Length <= 0 || at.Offset > size-at.Length || at.Size < 0 {
			t.Fatalf("%v of %d", at, size)
		}
	})
}

func typed(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrUnsupported) && !errors.Is(err, index.ErrLimit) {
		t.Fatal(fmt.Errorf("untyped error: %w", err))
	}
}
