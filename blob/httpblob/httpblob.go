// Package httpblob is a blob.Source over HTTP range requests. It knows URLs
// and status codes; it knows no registry and holds no credentials: a client
// whose transport adds them brings those.
//
// A server may redirect, as registries do to signed URLs of a storage host.
// Where a redirect to another host led is remembered for a minute, so that the
// next range of the same blob costs one round trip instead of two.
package httpblob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/internal/bounds"
)

const (
	maxSkip  = 1 << 20  // read and thrown away if a server ignores the range
	maxDrain = 64 << 10 // read on Close to keep the connection
)

// Source reads blobs over HTTP. It is safe for concurrent use.
type Source struct {
	// IdleTimeout is how long a server may take to send a header, or the next
	// byte of a body, before the request fails with blob.ErrUnavailable. Time
	// in which the caller does not read does not count. Set it before the
	// first request; New sets 30 s.
	IdleTimeout time.Duration

	client    *http.Client
	url       func(blob.Ref) string
	redirects redirects
}

// New returns a source that finds an object at url(ref). The client's
// redirect policy is replaced by CheckRedirect; nil means http.DefaultClient.
func New(client *http.Client, url func(blob.Ref) string) *Source {
	return &Source{IdleTimeout: 30 * time.Second, client: Client(client), url: url}
}

// Client returns a copy of c (nil: http.DefaultClient) that follows redirects
// as CheckRedirect allows.
func Client(c *http.Client) *http.Client {
	if c == nil {
		c = http.DefaultClient
	}
	cp := *c
	cp.CheckRedirect = CheckRedirect
	return &cp
}

// Range implements blob.Source.
func (s *Source) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := bounds.Check(ref, 0, off, n); err != nil {
		return nil, err
	}
	if u := s.redirects.get(ref.Digest); u != "" {
		r, err := s.get(ctx, ref, u, off, n)
		if err == nil || ctx.Err() != nil {
			return r, err
		}
		// The signature has expired, or the host is gone: ask again.
		s.redirects.forget(ref.Digest)
	}
	return s.get(ctx, ref, s.url(ref), off, n)
}

func (s *Source) get(ctx context.Context, ref blob.Ref, url string, off, n int64) (io.ReadCloser, error) {
	watch, ctx := newWatchdog(ctx, s.IdleTimeout)
	r, err := s.do(ctx, watch, ref, url, off, n)
	if err != nil {
		watch.stop()
		return nil, fmt.Errorf("blob %s: %w", ref.Digest, watch.explain(err))
	}
	return r, nil
}

func (s *Source) do(ctx context.Context, watch *watchdog, ref blob.Ref, url string, off, n int64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, redactURLError(err)
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	req.Header.Set("Accept-Encoding", "identity")
	watch.start()
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, WrapError(err)
	}
	r := &reader{body: resp.Body, watch: watch, ref: ref, off: off, left: n}
	if err := r.accept(resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	watch.pause()
	if final := resp.Request.URL; final.Host != req.URL.Host {
		s.redirects.put(ref.Digest, final.String())
	}
	return r, nil
}

// accept checks that the response is what was asked for and moves the body to
// the first byte of the range.
func (r *reader) accept(resp *http.Response) error {
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" && resp.StatusCode/100 == 2 {
		return fmt.Errorf("%w: the server encodes the body as %q", blob.ErrRange, enc)
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
		first, last, total, ok := parseContentRange(resp.Header.Get("Content-Range"))
		want := fmt.Sprintf("bytes %d-%d", r.off, r.off+r.left-1)
		switch {
		case !ok || first != r.off || last > r.off+r.left-1:
			return fmt.Errorf("%w: asked for %s, the server answers %q", blob.ErrRange, want, resp.Header.Get("Content-Range"))
		case total >= 0 && r.ref.Size > 0 && total != r.ref.Size:
			return fmt.Errorf("%w: it has %d bytes, expected %d", blob.ErrRange, total, r.ref.Size)
		case total >= 0 && total < r.off+r.left:
			return fmt.Errorf("%w: asked for %s, it has %d bytes", blob.ErrRange, want, total)
		case resp.ContentLength >= 0 && resp.ContentLength != last-first+1:
			return fmt.Errorf("%w: Content-Range %q with a body of %d bytes", blob.ErrRange, resp.Header.Get("Content-Range"), resp.ContentLength)
		}
		// A server may send less than was asked for; the reader then ends in
		// io.ErrUnexpectedEOF.
		return nil
	case http.StatusOK:
		if resp.ContentLength >= 0 && resp.ContentLength < r.off+r.left {
			return fmt.Errorf("%w: %d bytes at offset %d, it has %d bytes", blob.ErrRange, r.left, r.off, resp.ContentLength)
		}
		if r.off > maxSkip {
			return fmt.Errorf("%w: the server ignores ranges, and offset %d is too far to skip", blob.ErrRange, r.off)
		}
		if n, err := io.CopyN(io.Discard, resp.Body, r.off); err == io.EOF {
			return fmt.Errorf("%w: %d bytes at offset %d, it has %d bytes", blob.ErrRange, r.left, r.off, n)
		} else if err != nil {
			return WrapError(err)
		}
		return nil
	default:
		return NewError(resp)
	}
}

// parseContentRange reads "bytes FIRST-LAST/TOTAL"; total is -1 for "*".
func parseContentRange(s string) (first, last, total int64, ok bool) {
	s, ok = strings.CutPrefix(s, "bytes ")
	span, size, ok1 := strings.Cut(s, "/")
	a, b, ok2 := strings.Cut(span, "-")
	first, err1 := parseInt(a)
	last, err2 := parseInt(b)
	total = -1
	var err3 error
	if size != "*" {
		total, err3 = parseInt(size)
	}
	ok = ok && ok1 && ok2 && errors.Join(err1, err2, err3) == nil && first <= last && (total < 0 || last < total)
	return first, last, total, ok
}

// parseInt takes digits only: no sign, no space.
func parseInt(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err
}
