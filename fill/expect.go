package fill

import (
	"context"
	"io"

	"github.com/shale-image/shale/blob"
)

// expectedRequest is the most that one request for what is expected to be read asks for, in
// bytes of content: whoever reads the end of it waits for all. What can only come with more
// than expectedPiece stored bytes is left to its readers.
const (
	expectedRequest = 1 << 20
	expectedPiece   = 4 << 20
)

// maxFile is how many chunks of a file are looked at, 8 GiB of those that we cut.
const maxFile = 1 << 16

// file is a file of the image as package loader sees it. Its chunks have to follow each
// other in the map, as they do but for those that other files have, too.
type file struct {
	im          *Image
	flat        int64
	first, last int   // its chunks, [first, last)
	end         int64 // flat address
}

// file returns the file that begins at a flat address.
func (im *Image) file(flat int64) file {
	m := im.linked
	f := file{im: im, flat: flat, first: m.Find(flat), end: flat}
	for f.last = f.first; f.last < min(m.Chunks(), f.first+maxFile); f.last++ {
		c := m.Chunk(f.last)
		if f.last > f.first && !c.Next {
			break
		}
		f.end = c.Flat + int64(c.Size)
	}
	return f
}

// chunks returns the chunks that have [off, off+n) of the file, none where it has ended, and
// where they end, or the range does.
func (f *file) chunks(off, n int64) (lo, hi int, end int64) {
	if off < 0 || off >= f.end-f.flat || n <= 0 {
		return 0, 0, f.flat
	}
	m, to := f.im.linked, f.flat+off+min(n, f.end-f.flat-off)
	lo, hi = m.Find(f.flat+off), m.Find(to)
	if hi < f.last && m.Chunk(hi).Flat < to {
		hi++
	}
	if lo >= hi { // between two chunks
		return 0, 0, f.flat
	}
	last := m.Chunk(hi - 1)
	return lo, hi, min(to, last.Flat+int64(last.Size))
}

// ReadAt implements loader.File.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if err := f.im.ctx.Err(); err != nil {
		return 0, err
	}
	lo, hi, end := f.chunks(off, int64(len(p)))
	if end <= f.flat+off {
		return 0, io.EOF
	}
	f.im.expect(lo, hi)
	for i := lo; i < hi; i++ {
		if err := f.im.expected(i); err != nil {
			return 0, err
		}
	}
	n := int(end - f.flat - off)
	ok, err := f.im.copy(p[:n], f.flat+off)
	switch {
	case err != nil:
		return 0, err
	case !ok: // it could not be stored, or was evicted
		return 0, io.ErrUnexpectedEOF
	case n < len(p):
		return n, io.EOF
	}
	return n, nil
}

// Bring implements loader.File.
func (f *file) Bring(off, n int64) {
	if lo, hi, end := f.chunks(off, n); end > f.flat+off && f.im.ctx.Err() == nil {
		f.im.requests.Go(func() { f.im.expect(lo, hi) })
	}
}

// expect begins to fetch what is missing of the chunks [lo, hi), for nobody yet. Before it
// has a place among the requests in flight nothing is promised to readers.
func (im *Image) expect(lo, hi int) {
	e := im.engine
	next := func() (wants []want) { // for one request
		e.mu.Lock()
		defer e.mu.Unlock()
		for ; lo < hi && len(wants) == 0; lo++ { // each once, whatever becomes of it
			from, to := im.linked.Chunk(lo), lo
			for to < hi && im.linked.Stored(im.linked.Chunk(to)).Length <= expectedPiece &&
				(to == lo || im.linked.Chunk(to).Flat < from.Flat+expectedRequest) {
				to++
			}
			if to == lo {
				continue
			}
			wants = im.collect(lo, to, 0, 0)
			e.claim(im, wants, 0, 0)
			for _, w := range wants {
				w.flight.guessed = true
				lo = max(lo, w.index)
			}
		}
		return wants
	}
	for lo < hi {
		select {
		case im.guesses <- struct{}{}:
		case <-im.ctx.Done():
			return
		}
		wants := next()
		if len(wants) == 0 {
			<-im.guesses
			return
		}
		im.requests.Go(func() {
			defer func() { <-im.guesses }()
			im.fetch(blob.WithUrgent(im.ctx), wants)
		})
	}
}

// expected waits for chunk i if it is on its way.
func (im *Image) expected(i int) error {
	s, at := im.address(im.linked.Chunk(i))
	if s == nil {
		return ErrStale
	}
	im.engine.mu.Lock()
	f := im.flying(at)
	im.engine.mu.Unlock()
	if f == nil {
		return nil
	}
	select {
	case <-f.done:
		return f.err
	case <-im.ctx.Done():
		return context.Cause(im.ctx)
	}
}
