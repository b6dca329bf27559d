package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/mount/fusedev"
)

// event is a READ of the kernel, or a request that was made of the source.
type event struct {
	at, took time.Duration // took is 0 for a hit
	off      int64
	n        int64
	kind     string // hit, read, or what is fetched from
}

func (e event) String() string {
	return fmt.Sprintf("%9.3f ms  %-8s %10d +%7d  %8.3f ms", e.at.Seconds()*1e3, e.kind, e.off, e.n, e.took.Seconds()*1e3)
}

// tracer notes what a Content is asked for, and what it asks its source for.
type tracer struct {
	fusedev.Content
	blob.Source
	start time.Time

	mu     sync.Mutex
	events []event
}

func (t *tracer) note(at time.Time, n, off int64, kind string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events = append(t.events, event{at.Sub(t.start), time.Since(at), off, n, kind})
}

// noted returns what was noted, in the order in which it began.
func (t *tracer) noted() []event {
	t.mu.Lock()
	defer t.mu.Unlock()
	events := slices.Clone(t.events)
	slices.SortStableFunc(events, func(a, b event) int { return int(a.at - b.at) })
	return events
}

func (t *tracer) TryReadAt(p []byte, off int64) (bool, error) {
	at := time.Now()
	ok, err := t.Content.TryReadAt(p, off)
	if ok {
		t.note(at, int64(len(p)), off, "hit")
	}
	return ok, err
}

func (t *tracer) ReadAt(ctx context.Context, p []byte, off int64) error {
	at := time.Now()
	err := t.Content.ReadAt(ctx, p, off)
	t.note(at, int64(len(p)), off, "read")
	return err
}

// Range implements blob.Source.
func (t *tracer) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	at := time.Now()
	body, err := t.Source.Range(ctx, ref, off, n)
	if err != nil {
		return nil, err
	}
	return &toldBody{body, func() { t.note(at, n, off, ref.Digest[7:14]) }}, nil
}

// toldBody is a body that tells when it ends.
type toldBody struct {
	io.ReadCloser
	ended func()
}

func (b *toldBody) Close() error {
	b.ended()
	return b.ReadCloser.Close()
}
