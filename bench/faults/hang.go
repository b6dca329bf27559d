package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/bench/faults/script"
	"github.com/shale-image/shale/bench/netmodel"
)

// hanging mounts two images of one registry on one node. If hang says so, 64 cold reads of
// the first hang, because its source does. Meanwhile the other one is read in all states,
// and that must not wait; and the first must go on when its source does. It returns how
// long each of states took; those that can be had again are read so many times, and the
// median counts.
func (s *stage) hanging(ctx context.Context, face string, m netmodel.Model, hang bool, times int) (took []time.Duration, err error) {
	also := func(f func() error) { err = errors.Join(err, f()) }
	proxy, err := netmodel.Start(s.url.String(), m)
	if err != nil {
		return nil, err
	}
	defer also(proxy.Close)
	player := script.NewPlayer(proxy)
	defer also(player.Stop)
	n, err := s.node("", proxy.Host(), time.Minute, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, n.log())
		}
		err = errors.Join(err, n.close())
	}()
	first, err := n.mount(ctx, face, proxy.Host()+"/"+s.images[0])
	if err != nil {
		return nil, err
	}
	other, err := n.mount(ctx, face, proxy.Host()+"/"+s.other)
	if err != nil {
		return nil, err
	}
	const settle = 200 * time.Millisecond // after two mounts, and until all reads wait
	if !hang {
		time.Sleep(settle)
		return s.readOther(other, times)
	}
	repository, _, _ := strings.Cut(s.images[0], ":")
	sc, err := script.Parse(strings.NewReader("hang headers on /" + repository + "/blobs/"))
	if err != nil {
		return nil, err
	}
	player.Play(sc, nil)
	h := s.hold(first)
	for end := time.Now().Add(30 * time.Second); player.Met()[0] == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return nil, errors.New("no request hangs")
		}
	}
	time.Sleep(settle)
	took, err = s.readOther(other, times)
	if left := h.left.Load(); left != cold {
		err = errors.Join(err, fmt.Errorf("%d of %d reads hang when all of the other image has been read", left, cold))
	}
	// What hangs is broken off, as by a registry that starts again.
	return took, errors.Join(err, player.Stop(), proxy.Refuse(true), proxy.Refuse(false), h.wait())
}

// states are how the other image is read, one after the other.
var states = []string{"cold", "from the pool", "from memory"}

// readOther reads another image in all states, but for a file: when all is here a mount of
// the face fanotify needs nobody, and nothing could delay it.
func (s *stage) readOther(mnt string, times int) (took []time.Duration, err error) {
	files := s.also.files[1:]
	for i, state := range states {
		var all []time.Duration
		for len(all) < times && (i > 0 || len(all) == 0) {
			if i == 1 {
				forget(mnt, files)
			}
			began := time.Now()
			r := s.also.read(mnt, files, readers)
			all = append(all, time.Since(began))
			if len(r.Wrong)+len(r.Failed) > 0 {
				err = errors.Join(err, fmt.Errorf("the other image, %s: wrong %q, failed %q", state, r.Wrong, r.Failed))
			}
		}
		slices.Sort(all)
		took = append(took, all[len(all)/2])
	}
	return took, err
}

// cold is how many reads hang.
const cold = 64

// held are reads that hang.
type held struct {
	left    atomic.Int64
	results chan error
}

// hold begins reads of a mount.
func (s *stage) hold(mnt string) *held {
	h := &held{results: make(chan error, cold)}
	h.left.Store(cold)
	for i := range cold {
		go func() {
			// Some at the same place of a file, most at places of their own.
			name := s.truth.files[i%len(s.truth.files)]
			err := readAt(filepath.Join(mnt, name), filepath.Join(s.truth.dir, name))
			h.left.Add(-1)
			h.results <- err
		}()
	}
	return h
}

// wait waits until all have ended.
func (h *held) wait() (err error) {
	for range cold {
		if e := <-h.results; e != nil {
			err = errors.Join(err, fmt.Errorf("a read that has hung: %w", e))
		}
	}
	return err
}

// readAt reads 4 KiB from the middle of a file, and compares.
func readAt(got, want string) error {
	var p [2][]byte
	for i, name := range []string{got, want} {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		p[i] = make([]byte, min(4096, st.Size()))
		if _, err := f.ReadAt(p[i], (st.Size()-int64(len(p[i])))/2); err != nil {
			return err
		}
	}
	if string(p[0]) != string(p[1]) {
		return fmt.Errorf("%s: wrong bytes", got)
	}
	return nil
}
