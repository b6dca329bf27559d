package pool

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Builder makes a segment of chunks whose bytes are here: what is read anyway
// need not be planned first. Add may be called by several at once.
//
// Until Commit the segment is nowhere; a process that dies leaves nothing that
// Open does not take away.
type Builder struct {
	pool *Pool
	dir  string
	data *os.File

	mu      sync.Mutex
	entries []Entry
	known   map[chunk.Digest]struct{}
	size    int64
}

// Build begins a segment. Call Commit or Abort.
func (p *Pool) Build() (*Builder, error) {
	b := &Builder{pool: p, dir: filepath.Join(p.dir, segmentName(rand.Uint32())+newSuffix), known: map[chunk.Digest]struct{}{}}
	err := os.Mkdir(b.dir, 0o700)
	if err != nil {
		return nil, noSpace(err)
	}
	if b.data, err = os.OpenFile(filepath.Join(b.dir, "data"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600); err != nil {
		return nil, errors.Join(noSpace(err), os.RemoveAll(b.dir))
	}
	return b, nil
}

// Add stores a chunk, whose digest the caller has taken of data, unless the pool
// has its bytes. If the disk is full the error wraps ErrNoSpace.
func (b *Builder) Add(d chunk.Digest, data []byte) error {
	e := Entry{Digest: d, Size: uint32(len(data))}
	if len(data) == 0 || len(data) > chunk.MaxSize {
		return fmt.Errorf("pool: %w: chunk of %d bytes", chunk.ErrCorrupt, len(data))
	}
	place := []Entry{e}
	if s := b.pool.Lookup(place)[0]; s != nil && s.Present(place[0].Off, int64(e.Size)) {
		return nil
	}
	b.mu.Lock()
	_, ok := b.known[d]
	if !ok {
		b.known[d] = struct{}{}
		e.Off = b.size
		b.size += align(int64(e.Size))
		b.entries = append(b.entries, e)
	}
	size := b.size
	b.mu.Unlock()
	if ok {
		return nil
	}
	if size > MaxSegment {
		return fmt.Errorf("%w: chunks need more than %d bytes of addresses", index.ErrLimit, int64(MaxSegment))
	}
	if _, err := b.data.WriteAt(data, e.Off); err != nil {
		return fmt.Errorf("pool: %w", noSpace(err))
	}
	return nil
}

// Commit makes the segment the pool's; all of it is present. After a power cut
// it may turn out not to be: what was not written back by then is found out by
// its digest. The segment is nil if nothing was added.
func (b *Builder) Commit() (s *Segment, err error) {
	defer func() {
		err = errors.Join(noSpace(err), b.data.Close(), os.RemoveAll(b.dir)) // it is elsewhere now
	}()
	if len(b.entries) == 0 {
		return nil, nil
	}
	p := b.pool
	p.creating.Lock()
	defer p.creating.Unlock()
	table, id, err := p.newTable(b.entries, b.size)
	if err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if err := b.data.Truncate(b.size); err != nil {
		return nil, err
	}
	granules := b.size / chunk.Block
	present := presenceHeader(id, granules, boot)
	for w := range words(granules) {
		present = append(present, make([]byte, recSize)...)
		encodeRecord(present[len(present)-recSize:], id, w, mask(w, 0, granules), 0)
	}
	for name, body := range map[string][]byte{"table": table, "present": present} {
		if err := writeSynced(filepath.Join(b.dir, name), body); err != nil {
			return nil, err
		}
	}
	if err := syncDir(b.dir); err != nil {
		return nil, err
	}
	dir := filepath.Join(p.dir, segmentName(id))
	if err := os.Rename(b.dir, dir); err != nil {
		return nil, err
	}
	if err := syncDir(p.dir); err != nil {
		return nil, errors.Join(err, deleteSegment(dir))
	}
	return p.enter(dir, id)
}

// Abort gives up what was added.
func (b *Builder) Abort() error { return errors.Join(b.data.Close(), os.RemoveAll(b.dir)) }
