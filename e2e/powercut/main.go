// Command powercut is the only process of a virtual machine whose power is cut
// at any moment: the guest's half of TestPowerCut. It opens a pool, tells what
// is in it, and stores chunks until the end.
//
// Each boot is a round, and has a segment of its own. The lines on the console
// that begin with "powercut: " are for the host:
//
//	boot ID           the kernel runs, the disk is mounted
//	segment R HEX     round R has a segment; the bits of HEX say which of its
//	                  chunks are present, and all of those have the right bytes
//	created R         there is a segment for this round, R
//	synced N N N ...  so many chunks of each worker survive a power cut; chunk k
//	                  of worker w of W is bit w+k*W of the segment
//	full              all chunks of the round are synced
//	sealing S N       N chunks of a segment beside survive a power cut, S is its round:
//	                  from now on it is sealed, loses chunk 0, is unsealed, and gets it
//	                  again, over and over
//	sealed S          that has been done once more
//	FAIL ...          what is wrong
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/shale-image/shale/e2e/guest"
	"github.com/shale-image/shale/pool"
)

const (
	disk    = "/disk"
	workers = 4
	keep    = 2 // rounds before this one that are checked; older ones go
)

func main() {
	err := guest.SetUp(disk)
	if err == nil {
		err = run()
	}
	if err != nil {
		say("FAIL %v", err)
	}
	guest.Stay()
}

func say(format string, args ...any) { fmt.Printf("powercut: "+format+"\n", args...) }

func run() error {
	round, err := roundNumber()
	if err != nil {
		return err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	say("boot %s", bytes.TrimSpace(boot))
	p, err := pool.Open(filepath.Join(disk, "pool"))
	if err != nil {
		return err
	}
	if d := p.Damage(); len(d) > 0 {
		return errors.Join(d...)
	}
	for r := max(0, round-keep); r < round; r++ {
		if err := errors.Join(check(p, r, chunks), check(p, r+seals, sealed)); err != nil {
			return err
		}
	}
	for r := max(0, round-8); r < round-keep; r++ {
		for _, r := range []int{r, r + seals} {
			if s := p.Lookup([]pool.Entry{entry(0, content(r, 0))})[0]; s != nil {
				if err := p.Remove(s); err != nil {
					return err
				}
			}
		}
	}
	failed := make(chan error, 1)
	go func() { failed <- seal(p, round+seals) }()
	if err := fill(p, round); err != nil {
		return err
	}
	return <-failed
}

func roundNumber() (round int, err error) {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "powercut.round=")
	_, err = fmt.Sscan(rest, &round)
	return round, err
}

// check tells which of n chunks of a round are present, unless one of them is wrong.
func check(p *pool.Pool, round, n int) error {
	var (
		first *pool.Segment
		buf   []byte
		bits  = make([]byte, (n+7)/8)
	)
	for i := range n {
		want := content(round, i)
		es := []pool.Entry{entry(i, want)}
		s, off := p.Lookup(es)[0], es[0].Off
		if i == 0 {
			if first = s; s == nil {
				return nil
			}
		}
		if s != first {
			return fmt.Errorf("round %d: chunk %d is in no segment, or in another one than chunk 0", round, i)
		}
		if !s.Present(off, int64(len(want))) {
			continue
		}
		bits[i/8] |= 1 << (i % 8)
		n := (len(want) + 4095) &^ 4095 // a reader sees whole blocks
		buf = append(buf[:0], make([]byte, n)...)
		if err := s.ReadAt(buf, off); err != nil {
			return err
		}
		if !bytes.Equal(buf[:len(want)], want) {
			return fmt.Errorf("round %d: chunk %d at offset %d is present and wrong", round, i, off)
		}
		if len(bytes.Trim(buf[len(want):], "\x00")) > 0 {
			return fmt.Errorf("round %d: chunk %d at offset %d is not followed by zeros", round, i, off)
		}
	}
	say("segment %d %x", round, bits)
	return nil
}

// fill stores the chunks of a round, with syncs all the time.
func fill(p *pool.Pool, round int) error {
	es := entries(round, chunks)
	// Addresses in another order than that in which chunks come.
	placed := make([]pool.Entry, chunks)
	for i := range es {
		placed[i*7919%chunks] = es[i]
	}
	release := p.Exclusive() // or else seal frees what it has not seen
	s, err := p.Create(placed)
	release()
	if err != nil {
		return err
	}
	p.Lookup(es)
	say("created %d", round)

	var (
		stored [workers]atomic.Int64
		wg     sync.WaitGroup
		failed = make(chan error, workers+1)
		done   = make(chan struct{})
	)
	for w := range workers {
		wg.Go(func() {
			for i := w; i < chunks; i += workers {
				if err := s.Store(es[i].Off, content(round, i)); err != nil {
					failed <- err
					return
				}
				stored[w].Add(1)
			}
		})
	}
	go func() { wg.Wait(); close(done) }()
	for last := false; ; {
		select {
		case <-done:
			last = true
		default:
		}
		select {
		case err := <-failed:
			return err
		default:
		}
		line := "synced"
		for w := range stored {
			line += fmt.Sprintf(" %d", stored[w].Load())
		}
		if err := p.Sync(); err != nil {
			return err
		}
		say("%s", line)
		if last {
			say("full")
			return nil
		}
	}
}

// seal seals a segment and unseals it until the end, if the file system can do that.
func seal(p *pool.Pool, round int) error {
	es := entries(round, sealed)
	s, err := p.Create(es)
	if err != nil || !s.CanSeal() {
		return err
	}
	for i, e := range es {
		if err := s.Store(e.Off, content(round, i)); err != nil {
			return err
		}
	}
	if err := p.Sync(); err != nil {
		return err
	}
	say("sealing %d %d", round, sealed)
	enable := func(_ context.Context, f *os.File) error { return pool.EnableVerity(f) }
	for {
		if err := p.Seal(context.Background(), s, enable); err != nil {
			return err
		}
		if !s.Sealed() {
			return fmt.Errorf("round %d: complete and not sealed", round)
		}
		if err := freeFirst(p, s, es[1].Off); err != nil {
			return err
		}
		if err := p.Unseal(context.Background(), s, pool.KeepNone); err != nil {
			return err
		}
		if err := errors.Join(s.Store(0, content(round, 0)), p.Sync()); err != nil {
			return err
		}
		say("sealed %d", round)
	}
}

// freeFirst frees what s has before off, and nothing else.
func freeFirst(p *pool.Pool, s *pool.Segment, off int64) error {
	defer p.Exclusive()()
	var used pool.References
	for _, other := range p.Segments() {
		from := int64(0)
		if other == s {
			from = off
		}
		if err := used.Add(other.ID, from, other.Size-from); err != nil {
			return err
		}
	}
	_, err := p.Free(&used)
	return err
}
