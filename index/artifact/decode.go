package artifact

import (
	"bytes"
	"fmt"
	"math"
	"strings"
	"syscall"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// decoder is one Decode. Sections are read in the order of their numbers, and
// each to its end.
type decoder struct {
	name  string
	lim   index.Limits
	tree  *index.Tree
	info  Info
	sec   [sections]column
	err   error // the first
	bytes int64 // of lim.Memory, used so far

	units   []uint64 // of the blobs
	counts  []uint64 // of the blobs: chunks
	xattrs  [][]index.Xattr
	classes []class
	times   []index.Time
	arena   []index.Extent // many files' extents in one allocation
	cursors []uint32       // of the blobs: the chunk behind the last run
}

// class is what many inodes have in common.
type class struct {
	mode, uid, gid uint32
	xattrs         uint32 // position in xattrs, counted from 1
}

func (d *decoder) decode(p []byte) error {
	sums, content, err := d.open(p)
	if err != nil {
		return err
	}
	if err := d.split(content); err != nil {
		return err
	}
	for _, read := range []func(){
		d.image, d.blobs, d.spans, func() { d.chunks(sums) },
		d.readXattrs, d.readClasses, d.readTimes, d.files,
	} {
		if read(); d.err != nil {
			return d.err
		}
	}
	return nil
}

func (d *decoder) image() {
	c := &d.sec[secImage]
	d.info.Manifest = formatDigest(c.bytes(sumSize))
	for c.left() > 0 && d.err == nil {
		c.take(blobBytes)
		d.info.DiffIDs = append(d.info.DiffIDs, formatDigest(c.bytes(sumSize)))
	}
}

func (d *decoder) blobs() {
	c := &d.sec[secBlobs]
	var spans uint64
	for c.left() > 0 && d.err == nil {
		c.take(blobBytes)
		b := index.Blob{Digest: formatDigest(c.bytes(sumSize)), Size: int64(c.upTo(math.MaxInt64, "size"))}
		n := c.uint()
		d.counts = append(d.counts, c.upTo(math.MaxUint32, "chunks"))
		d.units = append(d.units, 1+c.upTo(maxUnit-1, "unit minus one"))
		if s := &d.sec[secSpans]; n > uint64(len(s.p)) || (spans+n)*4 > uint64(len(s.p)) {
			c.fail(index.ErrCorrupt, "%d spans in a section of %d bytes", max(n, spans+n), len(s.p))
			return
		}
		spans += n
		if c.take(int64(n)*spanBytes) && n > 0 {
			b.Spans = make([]index.Span, n)
		}
		d.tree.Blobs = append(d.tree.Blobs, b)
	}
	if len(d.info.DiffIDs) > len(d.tree.Blobs) {
		c.fail(index.ErrCorrupt, "%d layers, of %d there is an uncompressed digest", len(d.tree.Blobs), len(d.info.DiffIDs))
	}
}

func (d *decoder) spans() {
	c := &d.sec[secSpans]
	blobs := d.tree.Blobs
	each := func(f func(b *index.Blob, i int)) {
		for n := range blobs {
			for i := range blobs[n].Spans {
				f(&blobs[n], i)
			}
		}
	}
	each(func(b *index.Blob, i int) {
		v := c.upTo(math.MaxUint8, "codec")
		b.Spans[i].Codec, b.Spans[i].Bits = chunk.Codec(v&15), uint8(v>>4)
		if c := b.Spans[i].Codec; c > chunk.Gzip && c != chunk.ZstdBlocks {
			d.check(fmt.Errorf("%w: span %d of blob %s is stored as codec(%d)", index.ErrCorrupt, i, b.Digest, c))
		}
	})
	each(func(b *index.Blob, i int) {
		s := &b.Spans[i]
		if s.Size = int64(c.uint()); i > 0 {
			s.Start = b.Spans[i-1].End()
		}
	})
	each(func(b *index.Blob, i int) { b.Spans[i].Length = int64(c.uint()) })
	each(func(b *index.Blob, i int) {
		if b.Spans[i].Offset = c.int(); i > 0 {
			b.Spans[i].Offset += b.Spans[i-1].Offset + b.Spans[i-1].Length
		}
	})
	var last index.Window
	each(func(b *index.Blob, i int) {
		if s := &b.Spans[i]; s.Windowed() {
			s.Window.Length = uint32(c.upTo(math.MaxUint32, "window of bytes"))
		}
	})
	each(func(b *index.Blob, i int) {
		if w := &b.Spans[i].Window; w.Length > 0 {
			w.Blob = uint32(c.upTo(math.MaxUint32, "blob"))
			w.Offset = c.int() + last.Offset + int64(last.Length)
			last = *w
		}
	})
	c.end()
	d.check(d.tree.CheckSpans())
}

// check keeps an error of the model's.
func (d *decoder) check(err error) {
	if err != nil && d.err == nil {
		d.err = &index.Error{Name: d.name, Offset: -1, Err: err}
	}
}

func (d *decoder) chunks(sums []byte) {
	list := make([]index.Chunk, len(sums)/sumSize)
	d.tree.Chunks = list
	algorithms := &d.sec[secAlgorithms]
	for i := 0; i < len(list) && d.err == nil; {
		a := chunk.Algorithm(algorithms.upTo(math.MaxUint8, "algorithm"))
		if a == chunk.Origin {
			d.check(fmt.Errorf("%w: chunk %d with an unknown digest", index.ErrCorrupt, i))
		}
		n := int(algorithms.upTo(uint64(len(list)-i), "chunks"))
		for range n {
			list[i].Digest = chunk.Digest{Algorithm: a, Sum: [32]byte(sums[i*sumSize:])}
			i++
		}
	}
	algorithms.end()
	sizes, gaps := &d.sec[secSizes], &d.sec[secGaps]
	i := 0
	for n := range d.tree.Blobs {
		d.cursors = append(d.cursors, uint32(i))
		if uint64(len(list)-i) < d.counts[n] {
			gaps.fail(index.ErrCorrupt, "blob %d has %d chunks, there are %d for it", n, d.counts[n], len(list)-i)
		}
		unit := int64(d.units[n])
		var before, end int64
		for range d.counts[n] {
			if d.err != nil {
				return
			}
			c := &list[i]
			c.Blob = uint32(n)
			c.Size = uint32(sizes.upTo(chunk.MaxSize, "size"))
			c.Offset = up(end, unit) + gaps.int()*unit
			if c.Offset < before {
				gaps.fail(index.ErrCorrupt, "chunk %d at %d of the stream, that before at %d", i, c.Offset, before)
			}
			d.check(d.tree.CheckChunk(c))
			before, end = c.Offset, c.End()
			i++
		}
	}
	if i < len(list) {
		gaps.fail(index.ErrCorrupt, "%d chunks in blobs, want %d", i, len(list))
	}
	sizes.end()
	gaps.end()
}

// up rounds up to a multiple of unit.
func up(v, unit int64) int64 { return (v + unit - 1) / unit * unit }

func (d *decoder) readXattrs() {
	c := &d.sec[secXattrs]
	if !c.take(int64(len(c.p))) {
		return
	}
	all := string(c.p)
	text := func() string {
		n := len(c.bytes(c.uint()))
		return all[c.at-n : c.at]
	}
	for c.left() > 0 && d.err == nil {
		var set []index.Xattr
		var size int64
		n := c.upTo(uint64(c.left()/2), "attributes")
		if n == 0 {
			c.fail(index.ErrCorrupt, "a set of no attributes")
		}
		if c.take(sliceBytes+int64(n)*xattrBytes) && n > 0 {
			set = make([]index.Xattr, 0, n)
		}
		for ; n > 0 && d.err == nil; n-- {
			x := index.Xattr{Name: text(), Value: text()}
			if x.Name == "" || len(x.Name) > maxName || strings.IndexByte(x.Name, 0) >= 0 {
				c.fail(index.ErrCorrupt, "attribute %q, want a name of 1 to %d bytes", x.Name[:min(len(x.Name), maxName)], maxName)
			}
			if len(set) > 0 && set[len(set)-1].Name >= x.Name {
				c.fail(index.ErrCorrupt, "attribute %q behind %q", x.Name, set[len(set)-1].Name)
			}
			if size += int64(len(x.Name) + len(x.Value)); size > d.lim.XattrBytes {
				c.fail(index.ErrLimit, "attributes of %d bytes, want at most %d (XattrBytes)", size, d.lim.XattrBytes)
			}
			set = append(set, x)
		}
		d.xattrs = append(d.xattrs, set)
	}
}

func (d *decoder) readClasses() {
	c := &d.sec[secClasses]
	for c.left() > 0 && d.err == nil {
		x := class{
			mode:   uint32(c.upTo(maxMode, "mode")),
			uid:    uint32(c.upTo(math.MaxUint32, "user")),
			gid:    uint32(c.upTo(math.MaxUint32, "group")),
			xattrs: uint32(c.upTo(uint64(len(d.xattrs)), "set of attributes")),
		}
		switch x.mode & syscall.S_IFMT {
		case syscall.S_IFREG, syscall.S_IFDIR, syscall.S_IFLNK, syscall.S_IFCHR, syscall.S_IFBLK, syscall.S_IFIFO, syscall.S_IFSOCK:
		default:
			c.fail(index.ErrCorrupt, "file type %#o is unknown", x.mode&syscall.S_IFMT)
		}
		if c.take(classBytes) {
			d.classes = append(d.classes, x)
		}
	}
}

func (d *decoder) readTimes() {
	c := &d.sec[secTimes]
	var sec int64
	for c.left() > 0 && d.err == nil {
		sec += c.int()
		if c.take(timeBytes) {
			d.times = append(d.times, index.Time{Sec: sec, Nsec: uint32(c.upTo(maxNsec, "nanoseconds"))})
		}
	}
}

// countNames checks the number of names, and that it agrees with the sections
// that have a number for each.
func (d *decoder) countNames() (names int) {
	c := &d.sec[secNames]
	names = bytes.Count(c.p, []byte{0})
	if names > d.lim.Entries {
		c.fail(index.ErrLimit, "%d names, want at most %d (Entries)", names, d.lim.Entries)
	}
	return names
}
