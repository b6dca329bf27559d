package pool

import (
	"errors"
	"fmt"
	"math"
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
	room    int64   // that may still be taken
	absent  []Entry // of entries, those that were left out
}

// Build begins a segment. Call Commit or Abort.
func (p *Pool) Build() (*Builder, error) {
	b := &Builder{pool: p, room: math.MaxInt64, dir: filepath.Join(p.dir, segmentName(rand.Uint32())+newSuffix), known: map[chunk.Digest]struct{}{}}
	err := os.Mkdir(b.dir, 0o700)
	if err != nil {
		return nil, noSpace(err)
	}
	if b.data, err = os.OpenFile(filepath.Join(b.dir, "data"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600); err != nil {
		return nil, errors.Join(noSpace(err), os.RemoveAll(b.dir))
	}
	return b, nil
}

// Limit bounds the bytes that are stored. What is added beyond, or does not fit the
// disk, has an address and is not present. Call it before Add.
func (b *Builder) Limit(bytes int64) { b.room = bytes }

// Add stores a chunk, whose digest the caller has taken of data, unless the pool
// has its bytes.
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
	fits := pages(int64(e.Size)) <= b.room
	if !ok && fits {
		b.room -= pages(int64(e.Size))
	} else if !ok {
		b.absent = append(b.absent, e)
	}
	b.mu.Unlock()
	if ok {
		return nil
	}
	if size > MaxSegment {
		return fmt.Errorf("%w: chunks need more than %d bytes of addresses", index.ErrLimit, int64(MaxSegment))
	}
	if !fits {
		return nil
	}
	_, err := b.data.WriteAt(data, e.Off)
	if errors.Is(noSpace(err), ErrNoSpace) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.room, b.absent = 0, append(b.absent, e)
		return nil
	}
	if err != nil {
		return fmt.Errorf("pool: %w", err)
	}
	return nil
}

// Commit makes the segment the pool's; all of it is present but what did not fit. After a power cut
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
	boot, err := session(p.dir)
	if err != nil {
		return nil, err
	}
	if err := b.data.Truncate(b.size); err != nil {
		return nil, err
	}
	granules := b.size / chunk.Block
	present := presenceHeader(id, granules, boot)
	absent := make(bitmap, words(granules))
	for _, e := range b.absent {
		absent.take(e.granules())
	}
	for w := range words(granules) {
		present = append(present, make([]byte, recSize)...)
		encodeRecord(present[len(present)-recSize:], id, w, mask(w, 0, granules)&^absent[w], 0)
	}
	for name, body := range map[string][]byte{"table": table, "present": present} {
		if err := writeSynced(filepath.Join(b.dir, name), body, int64(len(body))); err != nil {
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
