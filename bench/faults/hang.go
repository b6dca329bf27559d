package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/bench/faults/script"
)

// hanging has 64 cold reads of one image hang, because its source does, and meanwhile
// another image read cold, and warm, on the same node and from the same registry. That
// must not wait for the first; and the first must go on when its source does.
func (s *stage) hanging(ctx context.Context) (err error) {
	also := func(f func() error) { err = errors.Join(err, f()) }
	proxy, err := s.proxy()
	if err != nil {
		return err
	}
	defer also(proxy.Close)
	player := script.NewPlayer(proxy)
	defer also(player.Stop)
	n, err := s.node("", proxy.Host(), time.Minute, 0)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, n.log())
		}
		err = errors.Join(err, n.close())
	}()
	hung, err := n.mount(ctx, device, proxy.Host()+"/"+s.images[0])
	if err != nil {
		return err
	}
	well, err := n.mount(ctx, device, proxy.Host()+"/"+s.other)
	if err != nil {
		return err
	}
	repository, _, _ := strings.Cut(s.images[0], ":")
	sc, err := script.Parse(strings.NewReader("hang headers on /" + repository + "/blobs/"))
	if err != nil {
		return err
	}
	player.Play(sc, nil)

	const cold = 64
	var waiting atomic.Int64
	var wg sync.WaitGroup
	results := make(chan error, cold)
	for i := range cold {
		waiting.Add(1)
		wg.Go(func() {
			defer waiting.Add(-1)
			// Some at the same place of a file, most at places of their own.
			name := s.truth.files[i%len(s.truth.files)]
			results <- readAt(filepath.Join(hung, name), filepath.Join(s.truth.dir, name))
		})
	}
	for end := time.Now().Add(30 * time.Second); player.Met()[0] == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return errors.New("no request hangs")
		}
	}
	time.Sleep(200 * time.Millisecond) // and all of them wait
	for _, state := range []string{"cold", "warm", "warm in the pool"} {
		r := s.also.read(well, s.also.files, readers)
		if len(r.Wrong)+len(r.Failed) > 0 {
			err = errors.Join(err, fmt.Errorf("%s, while another image hangs: wrong %q, failed %q", state, r.Wrong, r.Failed))
		}
		if state == "warm" {
			forget(well, s.also.files)
		}
	}
	if left := waiting.Load(); left != cold {
		err = errors.Join(err, fmt.Errorf("%d of %d reads hang when all of the other image has been read", left, cold))
	}
	// What hangs is broken off, as by a registry that starts again.
	err = errors.Join(err, player.Stop(), proxy.Refuse(true), proxy.Refuse(false))
	wg.Wait()
	close(results)
	for e := range results {
		if e != nil {
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
