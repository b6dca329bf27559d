package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/shale-image/shale/mount/fusedev"
)

// read is one READ of the kernel.
type read struct {
	at, took time.Duration // took is 0 for a hit
	off      int64
	n        int
	hit      bool
}

func (r read) String() string {
	return fmt.Sprintf("%9.3f ms  %10d +%7d  %v  %8.3f ms", r.at.Seconds()*1e3, r.off, r.n, r.hit, r.took.Seconds()*1e3)
}

// tracer notes what a Content is asked for.
type tracer struct {
	fusedev.Content
	start time.Time

	mu    sync.Mutex
	reads []read
}

func (t *tracer) note(at time.Time, n int, off int64, hit bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reads = append(t.reads, read{at.Sub(t.start), time.Since(at), off, n, hit})
}

func (t *tracer) TryReadAt(p []byte, off int64) (bool, error) {
	at := time.Now()
	ok, err := t.Content.TryReadAt(p, off)
	if ok {
		t.note(at, len(p), off, true)
	}
	return ok, err
}

func (t *tracer) ReadAt(ctx context.Context, p []byte, off int64) error {
	at := time.Now()
	err := t.Content.ReadAt(ctx, p, off)
	t.note(at, len(p), off, false)
	return err
}
