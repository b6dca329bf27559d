package pool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"lukechampine.com/blake3"
)

// Presence records which granules of a segment are here. It is kept in memory
// and written to its file at once, so that it outlives the process; whether it
// outlives the machine is another question, and so there are two bits for a
// granule: live says that its bytes were written, durable that they were
// written AND synced to disk before. Little-endian:
//
//	header   4096 B   magic "SHALEPR1", segment u32, granules u32, boot id [36],
//	                  zeros
//	records    32 B   one for 64 granules: live u64, durable u64, check [16]:
//	                  the first bytes of BLAKE3(segment u32, record number u64,
//	                  live u64, durable u64)
//
// Granule g is bit g%64 of record g/64. A record of zeros says that nothing is
// here, so the file starts sparse, and a lost sector costs a fetch.
//
// Within one boot, and one mount of the file system (the boot id is that of the
// session, recover.go), live is the truth: a killed process loses nothing. In another
// session durable is, and what only live
// says may be torn: it is checked against its digests before it is believed
// (recover.go). A record that fails its check says nothing: its chunks are
// checked, too.
const (
	presenceMagic = "SHALEPR1"
	pageSize      = 4096
	recSize       = 32
	bootOff       = 16
	bootLen       = 36
)

type presence struct {
	segment  uint32
	granules int64
	live     []atomic.Uint64 // changed with mu held, read at any time

	mu      sync.Mutex // held while records change
	file    *os.File
	durable bitmap
	dirty   bool   // live may have bits that durable lacks
	kept    bitmap // what was durable when the disk lost a write; since then nothing is. Else nil
}

func presenceHeader(segment uint32, granules int64, boot string) []byte {
	b := make([]byte, pageSize)
	copy(b, presenceMagic)
	binary.LittleEndian.PutUint32(b[8:], segment)
	binary.LittleEndian.PutUint32(b[12:], uint32(granules))
	copy(b[bootOff:bootOff+bootLen], boot)
	return b
}

func presenceSize(granules int64) int64 { return pageSize + words(granules)*recSize }

// encodeRecord writes record w of a segment to b.
func encodeRecord(b []byte, segment uint32, w int64, live, durable uint64) {
	if live == 0 && durable == 0 {
		clear(b[:recSize])
		return
	}
	le := binary.LittleEndian
	var in [28]byte
	le.PutUint32(in[0:], segment)
	le.PutUint64(in[4:], uint64(w))
	le.PutUint64(in[12:], live)
	le.PutUint64(in[20:], durable)
	sum := blake3.Sum256(in[:])
	copy(b, in[12:])
	copy(b[16:recSize], sum[:])
}

// decodeRecord returns ok = false for what encodeRecord does not write.
func decodeRecord(b []byte, segment uint32, w int64) (live, durable uint64, ok bool) {
	le := binary.LittleEndian
	live, durable = le.Uint64(b[0:]), le.Uint64(b[8:])
	var want [recSize]byte
	encodeRecord(want[:], segment, w, live, durable)
	return live, durable, want == [recSize]byte(b[:recSize])
}

// has tells whether all granules in [from, to) are here.
func (p *presence) has(from, to int64) bool {
	if from < 0 || to > p.granules {
		return false
	}
	for w := from / 64; w < words(to); w++ {
		if m := mask(w, from, to); p.live[w].Load()&m != m {
			return false
		}
	}
	return true
}

func (p *presence) count() (n int64) {
	for i := range p.live {
		n += int64(bits.OnesCount64(p.live[i].Load()))
	}
	return n
}

// set records the granules in [from, to) as here, and calls fresh with each that was not.
// Others see that only once it is written.
func (p *presence) set(from, to int64, fresh func(g int64)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dirty = true
	return p.change(from/64, words(to), func(w int64, live, durable uint64) (uint64, uint64) {
		m := mask(w, from, to)
		for set := m &^ live; set != 0; set &= set - 1 {
			fresh(w*64 + int64(bits.TrailingZeros64(set)))
		}
		return live | m, durable
	})
}

// drop forgets granules, durably if it returns nil.
func (p *presence) drop(granules bitmap) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for w := range p.kept {
		p.kept[w] &^= granules[w]
	}
	err := p.change(0, words(p.granules), func(w int64, live, durable uint64) (uint64, uint64) {
		return live &^ granules[w], durable &^ granules[w]
	})
	return errors.Join(err, datasync(p.file))
}

// snapshot returns what is live, or nil if all of it is durable.
func (p *presence) snapshot() bitmap {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.dirty {
		return nil
	}
	p.dirty = false
	b := make(bitmap, len(p.live))
	for i := range p.live {
		b[i] = p.live[i].Load()
	}
	return b
}

// allDurable tells whether all that is here survives a power cut.
func (p *presence) allDurable() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.dirty && p.kept == nil
}

// promote records as durable what was live when its data were synced.
func (p *presence) promote(synced bitmap) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.kept != nil {
		return nil
	}
	err := p.change(0, words(p.granules), func(w int64, live, durable uint64) (uint64, uint64) {
		return live, durable | live&synced[w]
	})
	if err == nil {
		err = datasync(p.file)
	}
	p.dirty = p.dirty || err != nil
	return err
}

// distrust forgets what is live but not durable, and returns it, as its disk has lost a write. That may
// have been one of the file system's own, of where the bytes of files are, too: so what
// was durable is used on, and looked at in the next session, like all that comes in this.
func (p *presence) distrust() (forgotten bitmap, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.kept == nil {
		p.kept = slices.Clone(p.durable)
	}
	forgotten = make(bitmap, len(p.live))
	for w := range p.live { // also what cannot be written
		forgotten[w] = p.live[w].And(p.kept[w]) &^ p.kept[w]
		p.durable[w] = 0
	}
	return forgotten, p.write(0, words(p.granules), func(w int64) (uint64, uint64, bool) {
		return p.live[w].Load(), 0, true
	})
}

// change rewrites those records in [from, to) that fn changes: first in the
// file, then where others see it. mu is held.
func (p *presence) change(from, to int64, fn func(w int64, live, durable uint64) (uint64, uint64)) error {
	return p.write(from, to, func(w int64) (live, durable uint64, ok bool) {
		live, durable = fn(w, p.live[w].Load(), p.durable[w])
		return live, durable, live != p.live[w].Load() || durable != p.durable[w]
	})
}

// write writes the records in [from, to) for which fn returns ok, neighbours
// together.
func (p *presence) write(from, to int64, fn func(w int64) (live, durable uint64, ok bool)) error {
	const most = 1 << 10
	type record struct{ live, durable uint64 }
	var (
		buf []byte
		run []record // [w-len(run), w)
	)
	for w := from; ; w++ {
		var (
			r  record
			ok bool
		)
		if w < to {
			r.live, r.durable, ok = fn(w)
		}
		if len(run) == most || !ok && len(run) > 0 {
			first := w - int64(len(run))
			if _, err := p.file.WriteAt(buf, pageSize+first*recSize); err != nil {
				return noSpace(err)
			}
			for i, r := range run {
				p.live[first+int64(i)].Store(r.live)
				p.durable[first+int64(i)] = r.durable
			}
			buf, run = buf[:0], run[:0]
		}
		if w >= to {
			return nil
		}
		if ok {
			buf = append(buf, make([]byte, recSize)...)
			encodeRecord(buf[len(buf)-recSize:], p.segment, w, r.live, r.durable)
			run = append(run, r)
		}
	}
}

// openPresence reads the record of a segment as far as it can be believed.
// What it cannot vouch for is in doubt, and neither live nor durable here. ok
// tells that nothing is in doubt and that the file says so itself.
func openPresence(path string, segment uint32, granules int64, boot string) (p *presence, doubt bitmap, ok bool, err error) {
	n := words(granules)
	p = &presence{segment: segment, granules: granules, live: make([]atomic.Uint64, n), durable: make(bitmap, n)}
	doubt = make(bitmap, n)
	if p.file, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, nil, false, err
	}
	ok, err = p.read(doubt, boot)
	if err != nil {
		return nil, nil, false, errors.Join(fmt.Errorf("%s: %w", path, err), p.file.Close())
	}
	return p, doubt, ok && doubt.empty(), nil
}

// read reads the file; thisBoot tells whether it was in use in this boot.
func (p *presence) read(doubt bitmap, boot string) (thisBoot bool, err error) {
	st, err := p.file.Stat()
	if err != nil {
		return false, err
	}
	head := make([]byte, pageSize)
	if known := st.Size() == presenceSize(p.granules); known {
		if _, err := p.file.ReadAt(head, 0); err != nil {
			return false, err
		}
	}
	thisBoot = string(head[bootOff:bootOff+bootLen]) == boot
	clear(head[bootOff : bootOff+bootLen])
	if string(head) != string(presenceHeader(p.segment, p.granules, "")) {
		// Not ours, or the header is damaged: make it one that says nothing.
		doubt.take(0, p.granules)
		if err := errors.Join(p.file.Truncate(0), p.file.Truncate(presenceSize(p.granules))); err != nil {
			return false, err
		}
		_, err := p.file.WriteAt(presenceHeader(p.segment, p.granules, ""), 0)
		return false, err
	}
	buf := make([]byte, min(int64(len(p.live)), 4096)*recSize)
	for w := 0; w < len(p.live); {
		part := buf[:min(len(buf), (len(p.live)-w)*recSize)]
		if _, err := p.file.ReadAt(part, pageSize+int64(w)*recSize); err != nil {
			return false, err
		}
		for ; len(part) > 0; part, w = part[recSize:], w+1 {
			p.accept(part, int64(w), thisBoot, doubt)
		}
	}
	return thisBoot, nil
}

// accept takes in one record.
func (p *presence) accept(b []byte, w int64, thisBoot bool, doubt bitmap) {
	all := mask(w, 0, p.granules)
	live, durable, ok := decodeRecord(b, p.segment, w)
	if !ok || live&^all != 0 || durable&^live != 0 {
		doubt[w] = all
		return
	}
	if !thisBoot {
		doubt[w] = live &^ durable
		live = durable
	}
	p.live[w].Store(live)
	p.durable[w] = durable
	p.dirty = p.dirty || live != durable
}

// settle writes what became of the granules that were in doubt, and then, as
// the last thing, that it was in this boot.
func (p *presence) settle(doubted bitmap, boot string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.write(0, int64(len(p.live)), func(w int64) (uint64, uint64, bool) {
		return p.live[w].Load(), p.durable[w], doubted[w] != 0
	})
	if err == nil {
		err = datasync(p.file)
	}
	if err != nil {
		return err
	}
	if _, err := p.file.WriteAt(presenceHeader(p.segment, p.granules, boot), 0); err != nil {
		return noSpace(err)
	}
	return datasync(p.file)
}
