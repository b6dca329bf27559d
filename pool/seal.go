package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/replace"
)

// A segment of which all is here can be sealed where the file system has fs-verity
// (verity.go): what the disk has changed is then EIO, and never a wrong byte, also for the
// kernel, which reads below direct mounts without asking. That a file is sealed is told by
// the file alone, so it outlives whatever dies.
//
// A sealed file cannot change. What of its chunks goes is forgotten by presence alone, the
// file keeps the bytes and nothing can be stored in the segment; until Unseal writes beside
// it a file with what is still here, and renames that over it. Who has the old one open, as
// the kernel has for a direct mount, reads on in that. Where nothing is left of a segment
// an empty file takes its place at once.

// turn is had by who seals a segment or unseals it. Who changes it takes it away.
type turn struct {
	sync.Mutex
	wanted atomic.Int32
	cancel atomic.Pointer[context.CancelFunc]
}

// begin takes a turn if nobody has it. ctx ends when somebody wants it.
func (t *turn) begin(ctx context.Context) (_ context.Context, end func(), ok bool) {
	if !t.TryLock() {
		return nil, nil, false
	}
	ctx, cancel := context.WithCancel(ctx)
	t.cancel.Store(&cancel)
	if t.wanted.Load() > 0 {
		cancel()
	}
	return ctx, func() { cancel(); t.Unlock() }, true
}

// interrupt takes the turn from who has it. Call release.
func (s *Segment) interrupt() (release func()) {
	t := &s.turn
	t.wanted.Add(1)
	if cancel := t.cancel.Load(); cancel != nil {
		(*cancel)()
	}
	t.Lock()
	t.wanted.Add(-1)
	return t.Unlock
}

// Sealed tells whether the file system verifies each read of the segment.
func (s *Segment) Sealed() bool { return s.sealed.Load() && !s.sealing.Load() }

// Complete tells whether all of the segment is here.
func (s *Segment) Complete() bool { return s.presence.count() == s.Size/chunk.Block }

// CanSeal tells whether the segment's file system can seal files.
func (s *Segment) CanSeal() bool { return canVerify(s.data.Load()) }

// ErrSealed is an ErrNoSpace of a store in a sealed segment. Readers are served from memory
// until it is unsealed, as if the disk was full.
var ErrSealed = fmt.Errorf("the segment is sealed, and has to be written anew: %w", ErrNoSpace)

func (s *Segment) refuse() error { return fmt.Errorf("pool: segment %08x: %w", s.ID, ErrSealed) }

// OnRot has fn told of chunks that a sealed segment's file system would not read, and which
// are not here any more. It may be called by any reader.
func (p *Pool) OnRot(fn func(Problem)) { p.rot.Store(&fn) }

var errNotDurable = errors.New("pool: not all of the segment is here and durable")

// Seal seals a segment that is complete; with another, or one that somebody wants to
// change, it does nothing. The caller has
// verified it. enable calls EnableVerity on its file, and returns when ctx ends, which it
// does as soon as somebody wants to change the segment: it is best done by a process that
// can be killed. Readers read on meanwhile.
func (p *Pool) Seal(ctx context.Context, s *Segment, enable func(context.Context, *os.File) error) (err error) {
	if s.Sealed() || !s.Complete() {
		return nil
	}
	room := s.Size/100 + 1<<20 // the tree has 32 bytes for 4096, and for each 4096 of these
	if err := p.quota.take(room); err != nil {
		return err
	}
	ctx, end, ok := s.turn.begin(ctx)
	if !ok {
		p.quota.give(room)
		return nil
	}
	defer end()
	before := s.disk()
	defer func() { p.quota.give(room - (s.disk() - before)) }()
	if err := errors.Join(s.sync(), p.allowSeals()); err != nil {
		return err
	}
	s.sealing.Store(true)
	defer s.sealing.Store(false)
	f, err := s.freeze()
	if f == nil {
		return err
	}
	if err = enable(ctx, f); err != nil && !isSealed(s.Path()) {
		return errors.Join(err, s.thaw())
	}
	return nil
}

// freeze has nothing but a file to be read left of the segment's data, if all of it is
// here and durable; else it returns nil.
func (s *Segment) freeze() (*os.File, error) {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.stores.Lock()
	defer s.stores.Unlock()
	if s.sealed.Load() || !s.Complete() || !s.presence.allDurable() {
		return nil, errNotDurable
	}
	f, err := os.Open(s.Path())
	if err != nil {
		return nil, err
	}
	s.sealed.Store(true)
	return f, s.data.Swap(f).Close()
}

// thaw is the opposite of freeze.
func (s *Segment) thaw() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.stores.Lock()
	defer s.stores.Unlock()
	f, sealed, err := openSealed(s.Path())
	if err != nil {
		return err
	}
	err = s.data.Swap(f).Close()
	s.sealed.Store(sealed)
	return err
}

// Unseal writes a sealed segment of which something is missing anew, so that it can be
// stored again, and gives back the space of what is not here. One of which keep names
// something is left as it is: the kernel would go on to read the old file, which would
// take its space until then. A chunk that cannot be read is not here afterwards. ErrNoSpace
// is that there is no room for both.
func (p *Pool) Unseal(ctx context.Context, s *Segment, keep func() (_ *References, release func(), _ error)) error {
	if !s.Sealed() || s.Complete() {
		return nil
	}
	refs, release, err := keep()
	if err != nil {
		return err
	}
	release()
	if !refs.segments[s.ID].empty() {
		return nil
	}
	room := s.presence.count() * chunk.Block
	if err := p.quota.take(room); err != nil {
		return err
	}
	var more int64
	defer func() { p.quota.give(room - more) }()
	old := s.data.Load()
	f, err := s.copy(ctx)
	if f == nil {
		return err
	}
	// Not with the turn: who evicts waits for that with what keep waits for.
	refs, release, err = keep()
	if err != nil {
		return errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	defer release()
	_, end, ok := s.turn.begin(ctx)
	if !ok {
		return errors.Join(f.Close(), os.Remove(f.Name()))
	}
	defer end()
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.stores.Lock()
	defer s.stores.Unlock()
	// As long as the file is the same nothing was stored, so all that is here was copied.
	if now, ok := p.Segment(s.ID); !ok || now != s || s.data.Load() != old || !s.sealed.Load() || !refs.segments[s.ID].empty() {
		return errors.Join(f.Close(), os.Remove(f.Name()))
	}
	before := s.disk()
	err = s.replace(f)
	more = s.disk() - before
	return err
}

// copy writes what is here of a sealed segment into a new file. It returns nil if somebody
// wants the segment.
func (s *Segment) copy(ctx context.Context) (f *os.File, err error) {
	ctx, end, ok := s.turn.begin(ctx)
	if !ok {
		return nil, nil
	}
	defer end()
	if f, err = s.beside(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(noSpace(err), f.Close(), os.Remove(f.Name()))
			f = nil
		}
	}()
	var buf []byte
	for _, e := range s.table.byPlace() {
		if err := ctx.Err(); err != nil {
			return f, err
		}
		from, to := e.granules()
		for g := from; g < to; g++ {
			if !s.presence.has(g, g+1) {
				continue
			}
			first := g
			for g+1 < to && s.presence.has(g+1, g+2) {
				g++
			}
			off, end := first*chunk.Block, min((g+1)*chunk.Block, e.Off+pages(int64(e.Size)))
			if int64(cap(buf)) < end-off {
				buf = make([]byte, end-off)
			}
			part := buf[:end-off]
			if err = s.ReadAt(part, off); errors.Is(err, unix.EIO) {
				err = s.forgetRotten(off, end-off, err)
			} else if err == nil {
				_, err = f.WriteAt(part, off)
			}
			if err != nil {
				return f, err
			}
		}
	}
	return f, f.Sync()
}

// newData is what takes the place of data.
const newData = "data.new"

// beside makes an empty file for replace.
func (s *Segment) beside() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, newData), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return nil, noSpace(err)
	}
	if err := f.Truncate(s.Size); err != nil {
		return nil, errors.Join(noSpace(err), f.Close())
	}
	return f, nil
}

// replace has a file take the place of a sealed one, durably. syncing and stores are held.
func (s *Segment) replace(f *os.File) error {
	err := f.Sync()
	if err == nil {
		err = os.Rename(f.Name(), s.Path())
	}
	if err != nil {
		return errors.Join(fmt.Errorf("unseal %s: %w", s.Path(), noSpace(err)), f.Close())
	}
	err = syncDir(s.dir)
	s.allocated.bits.Store(nil)
	s.sealed.Store(false)
	return errors.Join(err, s.data.Swap(f).Close())
}

// forget makes granules of a sealed segment vanish, whose bytes stay where they are: also
// what the kernel reads may be forgotten. With another segment it does nothing.
func (s *Segment) forget(granules bitmap) (done bool, err error) {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.stores.Lock()
	defer s.stores.Unlock()
	if !s.sealed.Load() {
		return false, nil
	}
	err = s.presence.drop(granules)
	s.epoch.Add(1)
	return err == nil, err
}

// forgetRotten forgets the chunks of [off, off+n) that cannot be read. If all can it
// returns cause.
func (s *Segment) forgetRotten(off, n int64, cause error) error {
	var buf []byte
	for _, e := range s.table.byPlace() {
		from, to := e.granules()
		if to*chunk.Block <= off || e.Off >= off+n {
			continue
		}
		if int64(cap(buf)) < int64(e.Size) {
			buf = make([]byte, e.Size)
		}
		bad := s.ReadAt(buf[:e.Size], e.Off)
		if !errors.Is(bad, unix.EIO) {
			continue
		}
		granules := make(bitmap, len(s.presence.live))
		granules.take(from, to)
		if _, err := s.forget(granules); err != nil {
			return err
		}
		cause = nil
		if tell := s.rot.Load(); tell != nil {
			(*tell)(Problem{Segment: segmentName(s.ID), Offset: e.Off, Chunk: e.Digest.String(), Error: bad.Error(), Dropped: true})
		}
	}
	return cause
}

// allowSeals has the pool say that segments may be sealed, which programs that know
// version 1 alone cannot open.
func (p *Pool) allowSeals() error {
	dir := filepath.Dir(p.dir)
	name := filepath.Join(dir, "format")
	if v, err := readFormat(name); err != nil || v >= sealVersion {
		return err
	}
	if err := replace.File(name, encodeFormat(sealVersion), 0o600); err != nil {
		return noSpace(err)
	}
	return syncDir(dir)
}
