// Package blob is where bytes come from: ranges of immutable objects, in a
// registry, on an HTTP server, in a directory or in memory.
//
// A Source does not verify content: what it returns is hostile until the
// caller has checked a digest. Retries, metrics and faults are wrappers around
// a Source (blob/retry, ...), not options inside one. The package knows no
// image format.
package blob

import (
	"context"
	"errors"
	"io"
)

// Ref names an object. Digest is "sha256:<64 hex digits>", as in a manifest.
// Size is the object's size in bytes, or 0 if it is not known.
type Ref struct {
	Digest string
	Size   int64
}

// Source gives ranges of objects. Implementations are safe for concurrent use.
type Source interface {
	// Range opens n bytes of the object, starting at off; n > 0. The reader
	// yields exactly n bytes and then io.EOF, or an error: fewer bytes than
	// asked for end in an error that wraps io.ErrUnexpectedEOF, never in a
	// silent io.EOF. The caller closes the reader; it may do so early. ctx
	// governs the whole life of the reader.
	//
	// Errors wrap ErrNotFound, ErrUnauthorized, ErrRange or ErrUnavailable
	// where one of them applies, and name the object.
	Range(ctx context.Context, ref Ref, off, n int64) (io.ReadCloser, error)
}

// Sentinels that callers branch on.
var (
	ErrNotFound     = errors.New("not found")
	ErrUnauthorized = errors.New("unauthorized")
	ErrRange        = errors.New("range not satisfiable")
	ErrUnavailable  = errors.New("unavailable") // timeouts, 429, 5xx: trying again may help
)

// Rejecter is a body that wants to know when its content has turned out to be
// wrong. Only the reader of a body can tell: a Source does not verify.
type Rejecter interface {
	// Reject notes that what was read of the body is not what it should be, so
	// that others are asked first from now on. It returns sources of the same
	// objects to ask instead, one after the other, the most promising first: each
	// asks in one place only, so that what it gives is not mixed from good and bad
	// answers; and where the body itself came from one place, not there. It may be called after Close.
	Reject() []Source
}

// Reject calls the Reject of a body that has one. Otherwise there is nobody else
// to ask, and it returns nil.
func Reject(body io.Reader) []Source {
	if r, ok := body.(Rejecter); ok {
		return r.Reject()
	}
	return nil
}

type urgentKey struct{}

// WithUrgent marks the requests made under a context as ones that somebody waits
// for. A source may go to more expense for these.
func WithUrgent(ctx context.Context) context.Context {
	return context.WithValue(ctx, urgentKey{}, true)
}

// Urgent tells whether somebody waits for what is asked under a context.
func Urgent(ctx context.Context) bool { return ctx.Value(urgentKey{}) != nil }

// ReadAll reads n bytes of an object at off into memory.
func ReadAll(ctx context.Context, s Source, ref Ref, off, n int64) ([]byte, error) {
	r, err := s.Range(ctx, ref, off, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p := make([]byte, n)
	if _, err := io.ReadFull(r, p); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return p, nil
}
