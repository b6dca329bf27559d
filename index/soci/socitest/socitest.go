// Package socitest makes ztocs as soci does, for layers that a test has made: files
// as archive/tar reads them, which soci uses too, and checkpoints at blocks of
// deflate. It must not know what reads them.
package socitest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/shale-image/shale/index/zran"
)

const windowSize = 32 << 10

var types = map[byte]string{
	tar.TypeReg: "reg", tar.TypeLink: "hardlink", tar.TypeSymlink: "symlink", tar.TypeChar: "char",
	tar.TypeBlock: "block", tar.TypeDir: "dir", tar.TypeFifo: "fifo",
}

// Build makes the ztoc of a layer, tar or tar+gzip, with spans of at least span
// bytes of the archive.
func Build(layer []byte, span int64) ([]byte, error) {
	in, algorithm := io.Reader(bytes.NewReader(layer)), byte(2)
	if bytes.HasPrefix(layer, []byte("\x1f\x8b")) {
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, err
		}
		in, algorithm = z, 1
	}
	archive := &counted{r: in}
	files, err := list(archive)
	if err != nil {
		return nil, err
	}
	spans, checkpoints := plain(layer, span)
	if algorithm == 1 {
		if spans, checkpoints, err = zipped(layer, span); err != nil {
			return nil, err
		}
	}
	w := &writer{b: make([]byte, 4)}
	root, f := w.table(4, 4, 8, 8, 4, 4)
	w.refer(0, root)
	w.string(f[0], "0.9")
	w.string(f[1], "socitest")
	w.i64(f[2], int64(len(layer)))
	w.i64(f[3], archive.n)
	toc, tf := w.table(4)
	w.refer(f[4], toc)
	for i, at := range w.vector(tf[0], len(files)) {
		w.file(at, &files[i])
	}
	info, cf := w.table(1, 4, 4, 4)
	w.refer(f[5], info)
	w.b[cf[0]] = algorithm
	binary.LittleEndian.PutUint32(w.b[cf[1]:], uint32(len(spans)-1))
	for i, at := range w.vector(cf[2], len(spans)) {
		w.string(at, fmt.Sprintf("sha256:%x", sha256.Sum256(layer[spans[i][0]:spans[i][1]])))
	}
	w.string(cf[3], string(checkpoints))
	return w.b, nil
}

// file is an entry of an archive, and where its data is.
type file struct {
	*tar.Header
	kind string
	at   int64
}

func list(archive *counted) (all []file, err error) {
	for r := tar.NewReader(archive); ; {
		h, err := r.Next()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		kind, ok := types[h.Typeflag]
		if !ok {
			return nil, fmt.Errorf("soci knows no entry of type %q", h.Typeflag)
		}
		all = append(all, file{h, kind, archive.n})
	}
}

type counted struct {
	r io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// plain returns the spans of a layer that is not compressed.
func plain(layer []byte, span int64) (spans [][2]int64, checkpoints []byte) {
	size := int64(len(layer))
	for at := int64(0); at < size; at += span {
		spans = append(spans, [2]int64{at, min(at+span, size)})
	}
	w := &writer{b: make([]byte, 4)}
	root, f := w.table(4, 8, 8)
	w.refer(0, root)
	w.i64(f[1], span)
	w.i64(f[2], size)
	return spans, w.b
}

// zipped returns the spans of a gzip layer.
func zipped(layer []byte, span int64) (spans [][2]int64, checkpoints []byte, err error) {
	header := headerSize(layer)
	n := 0
	var body []byte
	z := zran.NewReader(bytes.NewReader(layer), zran.Options{Span: span, Checkpoint: func(c zran.Checkpoint, window []byte) error {
		in, bits := c.In, byte(0)
		switch {
		case c.Member && c.Out > 0:
			return errors.New("several members")
		case c.Member:
			in = header
		case c.Bits > 0:
			in, bits = c.In+1, 8-c.Bits
		}
		start := in
		if bits > 0 {
			start--
		}
		if n++; n > 1 {
			spans[n-2][1] = in
		}
		spans = append(spans, [2]int64{start, int64(len(layer))})
		body = binary.LittleEndian.AppendUint64(body, uint64(in))
		body = binary.LittleEndian.AppendUint64(body, uint64(c.Out))
		body = append(append(body, bits), make([]byte, windowSize-len(window))...)
		body = append(body, window...)
		return nil
	}})
	defer z.Close()
	if _, err := io.Copy(io.Discard, z); err != nil {
		return nil, nil, err
	}
	checkpoints = binary.LittleEndian.AppendUint32(nil, uint32(n))
	checkpoints = binary.LittleEndian.AppendUint64(checkpoints, uint64(span))
	return spans, append(checkpoints, body...), nil
}

// headerSize is the size of a gzip header without extra fields.
func headerSize(p []byte) int64 {
	n := 10
	for _, flag := range []byte{1 << 3, 1 << 4} { // name and comment
		if p[3]&flag != 0 {
			n += bytes.IndexByte(p[n:], 0) + 1
		}
	}
	return int64(n)
}

// writer writes a flatbuffer, what refers before what is referred to.
type writer struct{ b []byte }

// table appends a table of fields of some sizes, and returns where they are.
func (w *writer) table(sizes ...int) (pos int, fields []int) {
	le := binary.LittleEndian
	vtable := len(w.b)
	w.b = le.AppendUint16(w.b, uint16(4+2*len(sizes)))
	size := 4
	for _, n := range sizes {
		size += n
	}
	w.b = le.AppendUint16(w.b, uint16(size))
	at := 4
	for _, n := range sizes {
		w.b = le.AppendUint16(w.b, uint16(at))
		at += n
	}
	pos = len(w.b)
	w.b = le.AppendUint32(w.b, uint32(pos-vtable))
	for _, n := range sizes {
		fields = append(fields, len(w.b))
		w.b = append(w.b, make([]byte, n)...)
	}
	return pos, fields
}

func (w *writer) refer(at, to int) { binary.LittleEndian.PutUint32(w.b[at:], uint32(to-at)) }

func (w *writer) i64(at int, v int64) { binary.LittleEndian.PutUint64(w.b[at:], uint64(v)) }

func (w *writer) string(at int, s string) {
	w.refer(at, len(w.b))
	w.b = binary.LittleEndian.AppendUint32(w.b, uint32(len(s)))
	w.b = append(w.b, s...)
}

// vector appends a vector of references, and returns where they are.
func (w *writer) vector(at, n int) (elements []int) {
	w.refer(at, len(w.b))
	w.b = binary.LittleEndian.AppendUint32(w.b, uint32(n))
	for range n {
		elements = append(elements, len(w.b))
		w.b = append(w.b, 0, 0, 0, 0)
	}
	return elements
}

func (w *writer) file(at int, h *file) {
	pos, f := w.table(4, 4, 8, 8, 4, 8, 4, 4, 4, 4, 4, 8, 8, 4)
	w.refer(at, pos)
	w.string(f[0], h.Name)
	w.string(f[1], h.kind)
	w.i64(f[2], h.at)
	w.i64(f[3], h.Size)
	w.string(f[4], h.Linkname)
	w.i64(f[5], h.Mode)
	binary.LittleEndian.PutUint32(w.b[f[6]:], uint32(h.Uid))
	binary.LittleEndian.PutUint32(w.b[f[7]:], uint32(h.Gid))
	w.string(f[8], h.Uname)
	w.string(f[9], h.Gname)
	w.string(f[10], h.ModTime.Format(time.RFC3339Nano))
	w.i64(f[11], h.Devmajor)
	w.i64(f[12], h.Devminor)
	keys := slices.Sorted(maps.Keys(h.PAXRecords))
	for i, at := range w.vector(f[13], len(keys)) {
		x, xf := w.table(4, 4)
		w.refer(at, x)
		w.string(xf[0], keys[i])
		w.string(xf[1], h.PAXRecords[keys[i]])
	}
}
