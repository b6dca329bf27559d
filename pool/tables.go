package pool

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/shale-image/shale/chunk"
)

// OpenTables opens a pool that another process has open, to plan with its
// addresses for it: only Lookup, Create, Build, Remove, Exclusive and Close may
// be called, and Segment.Present, which tells what was there when it was opened. The other process holds Exclusive meanwhile, and calls Load
// afterwards. What is damaged or half there is passed over and left alone.
func OpenTables(dir string) (*Pool, error) {
	root, err := openFormat(dir)
	if err != nil {
		return nil, err
	}
	p := &Pool{dir: root, segments: map[uint32]*Segment{}, tablesOnly: true}
	return p, p.each(func(path string, id uint32) error {
		s, err := openTableOnly(path, id)
		if damaged(err) {
			return nil
		}
		if err == nil {
			p.add(s)
		}
		return err
	})
}

// Load opens the segments that a process with OpenTables has created. The
// caller holds Exclusive.
func (p *Pool) Load() error {
	return p.each(func(path string, id uint32) error {
		if _, ok := p.Segment(id); ok {
			return nil
		}
		s, err := openSegment(path, id)
		if err == nil {
			p.add(s)
		}
		return err
	})
}

// each calls fn for every segment there is on disk.
func (p *Pool) each(fn func(path string, id uint32) error) error {
	names, err := os.ReadDir(p.dir)
	if err != nil {
		return err
	}
	for _, de := range names {
		if id, suffix, ok := parseName(de.Name()); ok && suffix == "" {
			err = errors.Join(err, fn(filepath.Join(p.dir, de.Name()), id))
		}
	}
	return err
}

// OpenData opens the data of a segment, of a pool that others may have open, for who
// verifies all that it reads: what is not present, or evicted meanwhile, reads as anything.
func OpenData(dir string, id uint32) (*os.File, error) {
	if _, err := readFormat(filepath.Join(dir, "format")); err != nil {
		return nil, err
	}
	return os.Open(filepath.Join(dir, "segments", segmentName(id), "data"))
}

func openTableOnly(dir string, id uint32) (*Segment, error) {
	t, err := openTable(filepath.Join(dir, "table"))
	if err != nil {
		return nil, err
	}
	s := &Segment{ID: id, dir: dir, table: t, Size: t.size, chunks: t.count}
	if s.presence, err = s.snapshot(); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// snapshot reads what of a segment that another process has open is present.
// What another boot has left behind and that process has not looked at is not.
func (s *Segment) snapshot() (*presence, error) {
	granules := s.Size / chunk.Block
	p := &presence{segment: s.ID, granules: granules, live: make([]atomic.Uint64, words(granules)), durable: make(bitmap, words(granules))}
	boot, err := session(s.dir)
	if err != nil {
		return p, err
	}
	b, err := os.ReadFile(filepath.Join(s.dir, "present"))
	if err != nil || int64(len(b)) != presenceSize(granules) {
		return p, err
	}
	doubt := make(bitmap, len(p.live))
	for w := range p.live {
		p.accept(b[pageSize+w*recSize:], int64(w), string(b[bootOff:bootOff+bootLen]) == boot, doubt)
	}
	return p, nil
}
