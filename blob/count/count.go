// Package count wraps a blob.Source and counts what goes through it, for
// status and metrics.
package count

import (
	"context"
	"io"
	"sync/atomic"

	"github.com/shale-image/shale/blob"
)

// Source counts the requests to another source. It is safe for concurrent use.
type Source struct {
	src                     blob.Source
	requests, bytes, errors atomic.Int64
}

// Stats is what has been counted so far.
type Stats struct {
	Requests int64 // calls of Range
	Bytes    int64 // bytes that readers have delivered
	Errors   int64 // requests that failed: at once, or once in the body
}

// New returns a counting view of src.
func New(src blob.Source) *Source { return &Source{src: src} }

// Stats returns the counts. Each is exact; together they are no snapshot.
func (s *Source) Stats() Stats {
	return Stats{Requests: s.requests.Load(), Bytes: s.bytes.Load(), Errors: s.errors.Load()}
}

// Range implements blob.Source.
func (s *Source) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return s.from(ctx, s.src, ref, off, n)
}

func (s *Source) from(ctx context.Context, src blob.Source, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	s.requests.Add(1)
	r, err := src.Range(ctx, ref, off, n)
	if err != nil {
		s.errors.Add(1)
		return nil, err
	}
	return &reader{r, s, false}, nil
}

type reader struct {
	io.ReadCloser
	src    *Source
	failed bool
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.src.bytes.Add(int64(n))
	if err != nil && err != io.EOF && !r.failed {
		r.failed = true
		r.src.errors.Add(1)
	}
	return n, err
}

// Reject implements blob.Rejecter: what is asked instead counts too.
func (r *reader) Reject() []blob.Source {
	others := blob.Reject(r.ReadCloser)
	for i := range others {
		others[i] = instead{r.src, others[i]}
	}
	return others
}

// instead counts requests to another source as those of a Source.
type instead struct {
	count *Source
	src   blob.Source
}

func (s instead) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return s.count.from(ctx, s.src, ref, off, n)
}
