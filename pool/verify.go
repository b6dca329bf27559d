package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
)

// Problem is something in a pool that is not as it should be.
type Problem struct {
	Segment string `json:"segment"`         // its name
	Offset  int64  `json:"offset"`          // of a chunk in its data; -1: the whole segment
	Chunk   string `json:"chunk,omitempty"` // its digest
	Error   string `json:"error"`
	Dropped bool   `json:"dropped"` // it is not here any more, and is fetched again
}

// KeepNone is for Verify where nothing needs to be kept.
func KeepNone() (*References, func(), error) { return &References{}, func() {}, nil }

// Verified is what Verify has read.
type Verified struct {
	Segments int   `json:"segments"`
	Chunks   int   `json:"chunks"`
	Bytes    int64 `json:"bytes"`
	// Partial counts the chunks of which only a part is here, and Origins those that
	// are known by where they come from: no digest tells whether they are whole.
	Partial int `json:"partial"`
	Origins int `json:"origins"`
}

// Check is Verify of a pool that nobody has open, and changes nothing in it.
func Check(ctx context.Context, dir string, tell func(Problem)) (v Verified, err error) {
	p, err := OpenTables(dir)
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	err = p.each(func(path string, id uint32) error {
		s, ok := p.Segment(id)
		if !ok {
			_, err := openTable(filepath.Join(path, "table"))
			tell(Problem{Segment: segmentName(id), Offset: -1, Error: fmt.Sprint(err)})
			return nil
		}
		var data *os.File
		if data, err = os.Open(filepath.Join(path, "data")); err == nil {
			s.data.Store(data)
			var st os.FileInfo
			if st, err = data.Stat(); err == nil && st.Size() != s.Size {
				err = fmt.Errorf("%s: %w: %d bytes, want %d", s.Path(), chunk.ErrCorrupt, st.Size(), s.Size)
			}
		}
		if err != nil {
			tell(Problem{Segment: segmentName(id), Offset: -1, Error: err.Error()})
			return nil
		}
		return s.verifyAll(ctx, &v, nil, nil, tell)
	})
	return v, err
}

// Verify reads every chunk that is here, from the disk rather than from memory, and
// compares it with its digest. tell is told of those that are not what they should be;
// they are dropped, unless keep has them, so that they are fetched again. keep is
// called before something is dropped, and release afterwards. pace, if not nil, is
// called before each chunk with its size, and may take its time.
func (p *Pool) Verify(ctx context.Context, keep func() (_ *References, release func(), _ error), pace func(bytes int64) error, tell func(Problem)) (v Verified, err error) {
	for _, s := range p.all() {
		if err := p.VerifySegment(ctx, &v, s, keep, pace, tell); err != nil {
			return v, err
		}
	}
	return v, nil
}

// VerifySegment is Verify of one segment, and adds to v what it has read.
func (p *Pool) VerifySegment(ctx context.Context, v *Verified, s *Segment, keep func() (_ *References, release func(), _ error), pace func(bytes int64) error, tell func(Problem)) error {
	drop := func(s *Segment, e Entry) (bool, error) {
		from, to := e.granules()
		granules := make(bitmap, len(s.presence.live))
		granules.take(from, to)
		if done, err := s.forget(granules); done || err != nil {
			return done, err
		}
		refs, release, err := keep()
		if err != nil {
			return false, err
		}
		defer release()
		if refs.segments[s.ID].overlaps(from, to) {
			return false, nil
		}
		p.freeing.Lock()
		defer p.freeing.Unlock()
		if now, ok := p.Segment(s.ID); !ok || now != s {
			return false, nil // removed meanwhile
		}
		disk, err := s.discard(granules)
		p.quota.give(disk)
		return err == nil, err
	}
	err := s.verifyAll(ctx, v, pace, drop, tell)
	if err == nil {
		err = p.Unseal(ctx, s, keep)
		if errors.Is(err, ErrNoSpace) { // it stays as it is, and what it lacks is not here
			err = nil
		}
	}
	if _, ok := p.Segment(s.ID); !ok && ctx.Err() == nil {
		return nil // removed meanwhile
	}
	return err
}

// Segments lists the segments there are, by ID.
func (p *Pool) Segments() []*Segment { return p.all() }

func (s *Segment) verifyAll(ctx context.Context, v *Verified, pace func(int64) error, drop func(*Segment, Entry) (bool, error), tell func(Problem)) error {
	v.Segments++
	var buf []byte
	for _, e := range s.table.byPlace() {
		if err := ctx.Err(); err != nil {
			return err
		}
		from, to := e.granules()
		if !s.presence.has(from, to) {
			for g := from; g < to; g++ {
				if s.presence.has(g, g+1) {
					v.Partial++
					break
				}
			}
			continue
		}
		if e.Digest.Algorithm == chunk.Origin {
			v.Origins++
			continue
		}
		if pace != nil {
			if err := pace(int64(e.Size)); err != nil {
				return err
			}
		}
		v.Chunks++
		v.Bytes += int64(e.Size)
		bad := s.verifyOne(e, &buf)
		if bad == nil {
			continue
		}
		problem := Problem{Segment: segmentName(s.ID), Offset: e.Off, Chunk: e.Digest.String(), Error: bad.Error()}
		var err error
		if drop != nil {
			problem.Dropped, err = drop(s, e)
		}
		tell(problem)
		if err != nil {
			return err
		}
	}
	return nil
}

// verifyOne compares a chunk that was here with its digest, if it still is.
func (s *Segment) verifyOne(e Entry, buf *[]byte) error {
	if cap(*buf) < int(e.Size) {
		*buf = make([]byte, e.Size)
	}
	p := (*buf)[:e.Size]
	// What was written back is read again. A file system that cannot do so reads
	// what it has.
	_ = s.descriptor(func(fd int) error { return unix.Fadvise(fd, e.Off, int64(e.Size), unix.FADV_DONTNEED) })
	ok, err := s.readHere(p, e.Off)
	if !ok && err == nil {
		return nil // evicted meanwhile
	}
	if err != nil {
		return err
	}
	return e.Digest.Verify(p)
}
