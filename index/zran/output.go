package zran

import "hash/crc32"

const (
	// outSize is how much is inflated at a time. The window is moved to the
	// front of the buffer once for as many bytes; together they fit in a
	// second-level cache.
	outSize  = 128 << 10
	outSlack = 320 // a match, literals before it and what wide copies write too much
)

// output is the end of the decompressed stream.
type output struct {
	base   int64 // offset in the stream of buf[0]
	oldest int   // buf[oldest:n] is of this member
	summed int   // buf[:summed] is in crc
	read   int   // buf[read:n] is not given out yet
	n      int
	crc    uint32 // of the member
	buf    [WindowSize + outSize + outSlack]byte
}

// reset empties o; the window is what comes before offset.
func (o *output) reset(offset int64, window []byte) {
	n := copy(o.buf[:], window)
	o.base = offset - int64(n)
	o.oldest, o.summed, o.read, o.n, o.crc = 0, n, n, n, 0
}

// window returns the last bytes of the member.
func (o *output) window() []byte { return o.buf[max(o.oldest, o.n-WindowSize):o.n] }

// room makes room and returns a position after n, at most size bytes behind
// it, up to which can be written with outSlack bytes too much. All must have
// been given out.
func (o *output) room(size int) int {
	const full = WindowSize + outSize
	if o.n > full-min(size, ahead) {
		o.sum()
		w := o.window()
		o.base += int64(o.n - len(w))
		n := copy(o.buf[:], w)
		o.oldest, o.summed, o.read, o.n = 0, n, n, n
	}
	return min(full, o.n+size)
}

// sum brings crc up to date.
func (o *output) sum() {
	o.crc = crc32.Update(o.crc, crc32.IEEETable, o.buf[o.summed:o.n])
	o.summed = o.n
}

// begin starts a member.
func (o *output) begin() { o.oldest, o.summed, o.crc = o.n, o.n, 0 }

// offset returns the offset in the stream of what is written next.
func (o *output) offset() int64 { return o.base + int64(o.n) }
