package netmodel

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// edge answers GET requests of blobs from memory, as the servers do that big
// registries send their clients to; each blob is read from the registry once, and
// whole. All else goes to the registry.
type edge struct {
	registry http.RoundTripper

	mu    sync.Mutex
	blobs map[string]*edgeBlob // by path
}

type edgeBlob struct {
	sync.Mutex
	header http.Header
	data   []byte // nil until it was read
}

var blobPath = regexp.MustCompile(`^/v2/.+/blobs/sha256:[0-9a-f]{64}$`)

// RoundTrip implements http.RoundTripper.
func (e *edge) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodGet || !blobPath.MatchString(r.URL.Path) {
		return e.registry.RoundTrip(r)
	}
	e.mu.Lock()
	b := e.blobs[r.URL.Path]
	if b == nil {
		b = &edgeBlob{}
		e.blobs[r.URL.Path] = b
	}
	e.mu.Unlock()
	b.Lock()
	defer b.Unlock()
	if b.data == nil {
		if resp, err := e.fetch(r, b); resp != nil || err != nil {
			return resp, err
		}
	}
	from, to, status := int64(0), int64(len(b.data)), http.StatusOK
	if s := r.Header.Get("Range"); s != "" {
		lo, hi, ok := strings.Cut(strings.TrimPrefix(s, "bytes="), "-")
		first, err := strconv.ParseInt(lo, 10, 64)
		last, err2 := strconv.ParseInt(hi, 10, 64)
		if !ok || errors.Join(err, err2) != nil || first > last || first >= to {
			return e.registry.RoundTrip(r) // it knows what to say
		}
		from, to, status = first, min(to, last+1), http.StatusPartialContent
	}
	h := b.header.Clone()
	h.Set("Content-Length", strconv.FormatInt(to-from, 10))
	if status == http.StatusPartialContent {
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(b.data)))
	}
	return answer(r, status, h, b.data[from:to]), nil
}

// fetch reads a blob from the registry. It returns the answer if that is not the
// blob.
func (e *edge) fetch(r *http.Request, b *edgeBlob) (*http.Response, error) {
	whole := r.Clone(r.Context())
	whole.Header.Del("Range")
	resp, err := e.registry.RoundTrip(whole)
	if err != nil || resp.StatusCode != http.StatusOK {
		return resp, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	b.header, b.data = resp.Header, data
	return nil, nil
}

func answer(r *http.Request, status int, h http.Header, body []byte) *http.Response {
	return &http.Response{
		StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: r,
		Header: h, Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)),
	}
}
