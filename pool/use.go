package pool

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/chunk"
)

// useRange is what recency is kept of: the granules of one record of presence,
// 1 MiB.
const useRange = 64 * chunk.Block

// use says when each range of a segment was used last, in ticks since useEpoch;
// 0 is long ago. It costs a load where a range was used within the same tick.
// It is a guess that only eviction goes by: nothing is locked, checked or synced.
type use struct {
	last    []atomic.Uint32
	changed atomic.Bool
	file    string

	mu    sync.Mutex // held by save
	saved time.Time
}

const (
	useTick = 100 * time.Millisecond
	useName = "used" // little-endian, 4 bytes for each range
	useSave = time.Minute
)

var useEpoch = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// open reads what an earlier process kept.
func (u *use) open(dir string, size int64) {
	u.last = make([]atomic.Uint32, words(size/chunk.Block))
	u.file, u.saved = filepath.Join(dir, useName), time.Now()
	b, err := os.ReadFile(u.file)
	if err != nil || len(b) != 4*len(u.last) {
		return
	}
	now := useNow()
	for i := range u.last {
		u.last[i].Store(min(now, binary.LittleEndian.Uint32(b[4*i:])))
	}
}

func useNow() uint32 { return uint32(time.Since(useEpoch) / useTick) }

// touch notes that [off, off+n) is used.
func (u *use) touch(off, n int64) {
	if n <= 0 || len(u.last) == 0 {
		return
	}
	now := useNow()
	for r := off / useRange; r <= (off+n-1)/useRange; r++ {
		if u.last[r].Load() != now {
			u.last[r].Store(now)
			if !u.changed.Load() {
				u.changed.Store(true)
			}
		}
	}
}

// youngest is when anything of it was used last.
func (u *use) youngest() (last uint32) {
	for i := range u.last {
		last = max(last, u.last[i].Load())
	}
	return last
}

// save keeps it for the next process, once in a while, or now.
func (u *use) save(now bool) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !now && time.Since(u.saved) < useSave || !u.changed.Swap(false) {
		return nil
	}
	u.saved = time.Now()
	b := make([]byte, 0, 4*len(u.last))
	for i := range u.last {
		b = binary.LittleEndian.AppendUint32(b, u.last[i].Load())
	}
	// Half of it has another length, and is passed over.
	err := os.WriteFile(u.file, b, 0o600)
	if errors.Is(noSpace(err), ErrNoSpace) || errors.Is(err, os.ErrNotExist) {
		return nil // the disk is full, or the segment was just removed
	}
	return err
}

// Touch notes that the bytes [off, off+n) are used by somebody who reads them
// without Read.
func (s *Segment) Touch(off, n int64) { s.use.touch(off, min(n, s.Size-off)) }
