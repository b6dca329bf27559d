package pool

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/shale-image/shale/chunk"
)

// Segment is a sparse file with places for chunks. Its methods are safe for
// concurrent use.
type Segment struct {
	ID   uint32
	Size int64 // bytes of address space, a multiple of chunk.Block

	table    *table
	data     *os.File
	presence *presence
}

// createSegment writes a segment beside its final name, syncs it and renames
// it there.
func createSegment(dir string, entries []Entry, size int64) (err error) {
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	if err := writeSynced(filepath.Join(tmp, "table"), encodeTable(entries, size)); err != nil {
		return err
	}
	if err := createPresence(filepath.Join(tmp, "present"), size/chunk.Block); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(tmp, "data"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(size)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := syncDir(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

func openSegment(dir string, id uint32) (*Segment, error) {
	t, err := openTable(filepath.Join(dir, "table"))
	if err != nil {
		return nil, err
	}
	s := &Segment{ID: id, Size: t.size, table: t}
	if s.data, err = os.OpenFile(filepath.Join(dir, "data"), os.O_RDWR, 0); err != nil {
		t.close()
		return nil, err
	}
	if s.presence, err = openPresence(filepath.Join(dir, "present"), s.Size/chunk.Block); err != nil {
		t.close()
		s.data.Close()
		return nil, err
	}
	if err := s.presence.recover(s); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// Path is the segment's data file, for faces that mount it directly.
func (s *Segment) Path() string { return s.data.Name() }

// Present tells whether all of [off, off+n) is here.
func (s *Segment) Present(off, n int64) bool {
	return s.presence.has(off/chunk.Block, align(off+n)/chunk.Block)
}

// ReadAt reads exactly len(p) bytes at off. What is not present reads as
// zeros: the caller asks Present first.
func (s *Segment) ReadAt(p []byte, off int64) error {
	if _, err := s.data.ReadAt(p, off); err != nil {
		return fmt.Errorf("pool: %w", err)
	}
	return nil
}

// Store writes a chunk's bytes, which the caller has verified, at the address
// it has in this segment, and then records them as present. Two stores of the
// same chunk may run at once: they write the same bytes.
func (s *Segment) Store(off int64, p []byte) error {
	if _, err := s.data.WriteAt(p, off); err != nil {
		return fmt.Errorf("pool: %w", noSpace(err))
	}
	s.presence.set(off/chunk.Block, align(off+int64(len(p)))/chunk.Block)
	return nil
}

func (s *Segment) verify(e Entry) error {
	p := make([]byte, e.Size)
	if err := s.ReadAt(p, e.Off); err != nil {
		return err
	}
	return e.Digest.Verify(p)
}

func (s *Segment) sync() error { return s.presence.sync(s.data) }

func (s *Segment) close() error {
	err := s.sync()
	for _, f := range []func() error{s.presence.close, s.table.close, s.data.Close} {
		if e := f(); err == nil {
			err = e
		}
	}
	return err
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
