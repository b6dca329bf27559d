package httpblob

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/shale-image/shale/blob"
)

// Error is an answer that is not a success. It unwraps to blob.ErrNotFound,
// ErrUnauthorized, ErrRange or ErrUnavailable where its status means that.
type Error struct {
	Method     string
	URL        string // without user, query and fragment: they may hold secrets
	Status     int
	Body       string        // its first KiB
	RetryAfter time.Duration // 0 if the server did not say
}

// NewError makes an Error of a response and reads up to 1 KiB of its body; the
// caller closes the body.
func NewError(resp *http.Response) *Error {
	e := &Error{Status: resp.StatusCode, RetryAfter: parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())}
	if resp.Request != nil {
		e.Method, e.URL = resp.Request.Method, Redact(resp.Request.URL)
	}
	if resp.Body != nil {
		p, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		e.Body = strings.ToValidUTF8(string(p), "\ufffd")
	}
	return e
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s %s: %d %s", e.Method, e.URL, e.Status, http.StatusText(e.Status))
	if body := strings.TrimSpace(e.Body); body != "" {
		s += fmt.Sprintf(": %.200q", body)
	}
	return s
}

// Unwrap returns the sentinel for the status, or nil.
func (e *Error) Unwrap() error {
	switch {
	case e.Status == http.StatusNotFound || e.Status == http.StatusGone:
		return blob.ErrNotFound
	case e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden:
		return blob.ErrUnauthorized
	case e.Status == http.StatusRequestedRangeNotSatisfiable:
		return blob.ErrRange
	case e.Status == http.StatusRequestTimeout || e.Status == http.StatusTooManyRequests || e.Status >= 500:
		return blob.ErrUnavailable
	}
	return nil
}

// Wait returns how long the server asks to wait before the next try, 0 if it
// does not say.
func (e *Error) Wait() time.Duration { return e.RetryAfter }

// Redact returns the URL without what may be secret in it: the user, the query
// (signatures) and the fragment.
func Redact(u *url.URL) string {
	c := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	if u.RawQuery != "" {
		return c.String() + "?..."
	}
	return c.String()
}

// WrapError turns an error of http.Client.Do or of a body into one that may be
// shown, without the query of its URL, and that wraps blob.ErrUnavailable if
// the network is at fault rather than the request.
func WrapError(err error) error {
	err = redactURLError(err)
	var cert *tls.CertificateVerificationError
	var netErr net.Error
	switch {
	case errors.Is(err, blob.ErrUnavailable), errors.Is(err, context.Canceled), errors.As(err, &cert):
		return err
	case errors.As(err, &netErr), errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("%w: %w", blob.ErrUnavailable, err)
	}
	return err
}

func redactURLError(err error) error {
	var ue *url.Error
	if !errors.As(err, &ue) {
		return err
	}
	where := "request"
	if u, perr := url.Parse(ue.URL); perr == nil {
		where = Redact(u)
	}
	return fmt.Errorf("%s %s: %w", ue.Op, where, ue.Err)
}

// parseRetryAfter reads seconds or an HTTP date.
func parseRetryAfter(s string, now time.Time) time.Duration {
	if n, err := parseInt(s); err == nil {
		return time.Duration(min(n, 1<<31)) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil && t.After(now) {
		return t.Sub(now)
	}
	return 0
}
