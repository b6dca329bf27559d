package pool

import (
	"errors"
	"os"
	"path/filepath"
)

// OpenTables opens a pool that another process has open, to plan with its
// addresses for it: only Lookup, Create, Remove, Exclusive and Close may be
// called. The other process holds Exclusive meanwhile, and calls Load
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

func openTableOnly(dir string, id uint32) (*Segment, error) {
	t, err := openTable(filepath.Join(dir, "table"))
	if err != nil {
		return nil, err
	}
	return &Segment{ID: id, dir: dir, table: t, Size: t.size}, nil
}
