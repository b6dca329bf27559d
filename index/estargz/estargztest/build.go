package estargztest

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index/estargz"
)

// Options say how a layer is built.
type Options struct {
	// Zstd makes a zstd:chunked layer, cut as Podman's tools cut: anywhere. The
	// default is eStargz.
	Zstd bool
	// Stargz makes of a zstd:chunked layer one as the stargz snapshotter has them: an
	// eStargz layer whose members are zstd frames.
	Stargz bool
	// Chunk is the size of chunks in bytes; of zstd:chunked layers, about. Default
	// 4 MiB and 64 KiB.
	Chunk int
	// Landmark is the file behind which the prefetch landmark stands; "" is the
	// landmark that says there is nothing to prefetch.
	Landmark string
}

// podman tells whether a layer is to be as Podman's tools make them.
func (o *Options) podman() bool { return o.Zstd && !o.Stargz }

// entry is what a table says of a file, or of a further chunk of one.
type entry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	LinkName    string            `json:"linkName,omitempty"`
	Mode        int64             `json:"mode,omitempty"`
	Size        int64             `json:"size,omitempty"`
	UID         int               `json:"uid,omitempty"`
	GID         int               `json:"gid,omitempty"`
	ModTime     string            `json:"modtime,omitempty"`
	DevMajor    int64             `json:"devMajor,omitempty"`
	DevMinor    int64             `json:"devMinor,omitempty"`
	Xattrs      map[string]string `json:"xattrs,omitempty"`
	Digest      string            `json:"digest,omitempty"`
	Offset      int               `json:"offset,omitempty"`
	EndOffset   int               `json:"endOffset,omitempty"`
	ChunkOffset int               `json:"chunkOffset,omitempty"`
	ChunkSize   int               `json:"chunkSize,omitempty"`
	ChunkDigest string            `json:"chunkDigest,omitempty"`
}

var types = map[byte]string{
	tar.TypeReg: "reg", tar.TypeDir: "dir", tar.TypeSymlink: "symlink", tar.TypeLink: "hardlink",
	tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeFifo: "fifo",
}

// built is a layer that is being built.
type built struct {
	o     Options
	out   bytes.Buffer
	piece bytes.Buffer // not compressed yet: what lies between files, or data of one
	toc   struct {
		Version int      `json:"version"`
		Entries []*entry `json:"entries"`
	}
	t testing.TB
}

// Build makes a layer with a table of contents of a tar archive that has no
// sparse files, and the annotations of its descriptor. It takes whatever the
// format has a place for, also what other tools refuse to make.
func Build(t testing.TB, archive []byte, o Options) (layer []byte, annotations map[string]string) {
	t.Helper()
	b := &built{o: o, t: t}
	b.toc.Version = 1
	if b.o.Chunk == 0 {
		b.o.Chunk = 4 << 20
		if o.podman() {
			b.o.Chunk = 64 << 10
		}
	}
	if !o.podman() && o.Landmark == "" {
		b.landmark(".no.prefetch.landmark")
	}
	in := bytes.NewReader(archive)
	pos := func() int { return len(archive) - in.Len() }
	r := tar.NewReader(in)
	at := 0
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b.piece.Write(archive[at:pos()]) // padding, and the headers
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		b.add(h, data)
		at = pos()
		if h.Name == o.Landmark && !o.podman() {
			b.piece.Write(make([]byte, -at&511))
			at += -at & 511
			b.landmark(".prefetch.landmark")
		}
	}
	table, err := json.Marshal(&b.toc)
	if err != nil {
		t.Fatal(err)
	}
	if o.Zstd {
		b.piece.Write(archive[at:])
		b.flush()
		return b.zstdEnd(table)
	}
	b.piece.Write(make([]byte, -at&511))
	b.flush()
	stored, digest := Table(t, string(table)) // ends the archive
	footer := fmt.Sprintf("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00%016xSTARGZ\x01\x00\x00\xff\xff%s", b.out.Len(), make([]byte, 8))
	return append(append(b.out.Bytes(), stored...), footer...), map[string]string{estargz.DigestAnnotation: digest}
}

// landmark adds a file that is no file of the image.
func (b *built) landmark(name string) {
	var a bytes.Buffer
	w := tar.NewWriter(&a)
	w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 1})
	b.piece.Write(a.Bytes())
	b.add(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 1}, []byte{0xf})
	b.piece.Write(make([]byte, 511))
}

// add adds a file whose header is in the piece.
func (b *built) add(h *tar.Header, data []byte) {
	e := &entry{Type: types[h.Typeflag], Name: h.Name, LinkName: h.Linkname, Mode: h.Mode, Size: int64(len(data)), UID: h.Uid, GID: h.Gid, DevMajor: h.Devmajor, DevMinor: h.Devminor}
	if b.o.podman() {
		e.ModTime = h.ModTime.UTC().Format(time.RFC3339Nano)
	} else {
		e.ModTime = h.ModTime.UTC().Truncate(time.Second).Format(time.RFC3339)
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			if e.Xattrs == nil {
				e.Xattrs = map[string]string{}
			}
			e.Xattrs[name] = base64.StdEncoding.EncodeToString([]byte(value))
		}
	}
	b.toc.Entries = append(b.toc.Entries, e)
	if len(data) == 0 {
		return
	}
	file := e
	file.Digest = chunk.Sum(chunk.SHA256, data).String()
	b.flush()
	for at := 0; at < len(data); {
		p := data[at:min(len(data), at+b.length(data, at))]
		if at > 0 {
			e = &entry{Type: "chunk", Name: h.Name}
			b.toc.Entries = append(b.toc.Entries, e)
			b.flush()
		}
		e.Offset, e.ChunkOffset = b.out.Len(), at
		if len(p) < len(data) {
			e.ChunkSize, e.ChunkDigest = len(p), chunk.Sum(chunk.SHA256, p).String()
		}
		b.piece.Write(p)
		at += len(p)
	}
	if b.o.podman() { // what follows has a frame of its own
		b.flush()
		file.EndOffset = b.out.Len()
	}
}

// length is how long the chunk is that begins at an offset of a file. Those of
// zstd:chunked end anywhere, but where they end does the same content elsewhere.
func (b *built) length(data []byte, at int) int {
	if !b.o.podman() {
		return b.o.Chunk
	}
	return b.o.Chunk/2 + int(crc32.ChecksumIEEE(data[at:min(len(data), at+64)]))%b.o.Chunk
}

// flush compresses the piece.
func (b *built) flush() {
	if b.piece.Len() == 0 {
		return
	}
	if b.o.Zstd {
		b.out.Write(zstdFrame(b.piece.Bytes()))
	} else {
		w, _ := gzip.NewWriterLevel(&b.out, gzip.BestSpeed)
		w.Write(b.piece.Bytes())
		if err := w.Close(); err != nil {
			b.t.Fatal(err)
		}
	}
	b.piece.Reset()
}

func (b *built) zstdEnd(table []byte) ([]byte, map[string]string) {
	stored := zstdFrame(table)
	n := len(stored)
	b.out.Write([]byte{0x50, 0x2a, 0x4d, 0x18, byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)}) // a skippable frame
	prefix := "io.github.containers.zstd-chunked.manifest-"
	if b.o.Stargz {
		prefix = "io.containers.zstd-chunked.manifest-"
	}
	a := map[string]string{
		prefix + "checksum": chunk.Sum(chunk.SHA256, stored).String(),
		prefix + "position": fmt.Sprintf("%d:%d:%d:1", b.out.Len(), n, len(table)),
	}
	if b.o.Stargz {
		a[estargz.DigestAnnotation] = chunk.Sum(chunk.SHA256, table).String()
	}
	b.out.Write(stored)
	return b.out.Bytes(), a
}

func zstdFrame(p []byte) []byte {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(err) // the options are constants
	}
	return e.EncodeAll(p, nil)
}
