// Package memblob is a blob.Source over a map in memory, for tests: its Fault
// hook makes any request fail, break off or deliver wrong bytes.
package memblob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/internal/bounds"
)

// Source holds its objects in memory. It is safe for concurrent use.
type Source struct {
	// Fault, if set, is asked about every request; nil means no fault. It is
	// called by concurrent requests at once and may block, to delay one. Set
	// it before the first request.
	Fault func(ctx context.Context, ref blob.Ref, off, n int64) *Fault

	mu      sync.RWMutex
	objects map[string][]byte
}

// Fault says how one request goes wrong: After bytes are delivered, then the
// reader fails with Err. A negative After makes Range itself fail with Err. If
// Flip is not 0 it is XORed into the first byte. A nil Err with a Flip delivers
// all bytes.
type Fault struct {
	After int64
	Err   error
	Flip  byte
}

// New returns a source of contents, keyed by digest. The map and the slices
// are the source's from then on. The keys need not match the contents, so that
// a test can lie.
func New(contents map[string][]byte) *Source {
	s := &Source{objects: map[string][]byte{}}
	for digest, p := range contents {
		s.objects[digest] = p
	}
	return s
}

// Put adds an object and returns its name.
func (s *Source) Put(p []byte) blob.Ref {
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(p))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[digest] = p
	return blob.Ref{Digest: digest, Size: int64(len(p))}
}

// Range implements blob.Source.
func (s *Source) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := bounds.Check(ref, 0, off, n); err != nil {
		return nil, err
	}
	s.mu.RLock()
	p, ok := s.objects[ref.Digest]
	s.mu.RUnlock()
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", ref.Digest, blob.ErrNotFound)
	}
	if off+n > int64(len(p)) {
		return nil, fmt.Errorf("blob %s: %d bytes at offset %d: %w: it has %d bytes", ref.Digest, n, off, blob.ErrRange, len(p))
	}
	p = p[off : off+n]
	r := &reader{ctx: ctx}
	if s.Fault != nil {
		if f := s.Fault(ctx, ref, off, n); f != nil {
			switch {
			case f.Err != nil && f.After < 0:
				return nil, fmt.Errorf("blob %s: %w", ref.Digest, f.Err)
			case f.Err != nil:
				p, r.err = p[:min(f.After, n)], fmt.Errorf("blob %s: at offset %d: %w", ref.Digest, off+f.After, f.Err)
			}
			if f.Flip != 0 && len(p) > 0 {
				p = bytes.Clone(p)
				p[0] ^= f.Flip
			}
		}
	}
	r.Reader.Reset(p)
	return r, nil
}

type reader struct {
	bytes.Reader
	ctx context.Context
	err error // instead of io.EOF
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.Reader.Read(p)
	if err == io.EOF && r.err != nil {
		err = r.err
	}
	return n, err
}

// WriteTo hides bytes.Reader's, which knows neither the context nor the fault.
func (r *reader) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{r})
}

func (r *reader) Close() error { return nil }
