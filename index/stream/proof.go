package stream

import (
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// proven gives out the stored bytes of spans that lie one behind the other, those
// of each span only once its Proof has been compared.
type proven struct {
	body  io.Reader // as many bytes as the spans have
	spans []index.Span
	end   int64 // in the blob, of the spans before
	mem   *[]byte
	left  []byte // to be given out
}

func (p *proven) Read(b []byte) (int, error) {
	for len(p.left) == 0 {
		if len(p.spans) == 0 {
			return 0, io.EOF
		}
		if err := p.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, p.left)
	p.left = p.left[n:]
	return n, nil
}

// next reads the stored bytes of a span. The first of them may be the last of the
// span before, which has been given out.
func (p *proven) next() error {
	s := &p.spans[0]
	had := max(0, p.end-s.Offset)
	if had > 1 || s.Length > index.MaxStored { // as CheckSpans has it
		return fmt.Errorf("%w: %d stored bytes at offset %d, %d of them in the span before", chunk.ErrCorrupt, s.Length, s.Offset, had)
	}
	var last byte
	if had > 0 {
		last = (*p.mem)[len(*p.mem)-1]
	}
	b := grow(p.mem, int(s.Length))
	*p.mem = b
	if had > 0 {
		b[0] = last
	}
	if _, err := io.ReadFull(p.body, b[had:]); err != nil {
		return unexpected(err)
	}
	if got := sha256.Sum256(b); got != s.Proof.Stored {
		return fmt.Errorf("%w: digest of %d stored bytes at offset %d is sha256:%x, want sha256:%x", chunk.ErrCorrupt, s.Length, s.Offset, got, s.Proof.Stored)
	}
	p.spans, p.end, p.left = p.spans[1:], s.Offset+s.Length, b[had:]
	return nil
}

// Verify reports, as an error wrapping chunk.ErrCorrupt, that data is not the
// content that d names, where data is what Next has returned. For a chunk.Origin
// that is so unless all it was decoded from has been proved.
func (r *Reader) Verify(d chunk.Digest, data []byte) error {
	switch {
	case d.Algorithm != chunk.Origin:
		return d.Verify(data)
	case r.from < r.unproved:
		return fmt.Errorf("%w: content of %s from stored bytes that have no digest", chunk.ErrCorrupt, d)
	}
	return nil
}
