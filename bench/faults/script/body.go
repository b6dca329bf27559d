package script

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/shale-image/shale/bench/netmodel"
)

// body is a reader in place of a body.
type body struct {
	io.Reader
	io.Closer
}

// shorten has an answer end n bytes too early, and say so, as far as it has as many.
func shorten(resp *http.Response, n int64) {
	if resp.ContentLength <= n {
		return
	}
	left := resp.ContentLength - n
	resp.Body = body{io.LimitReader(resp.Body, left), resp.Body}
	resize(resp, left)
}

// lengthen has an answer go on for n bytes too many, and say so.
func lengthen(resp *http.Response, n int64) {
	if resp.ContentLength < 0 {
		return
	}
	resp.Body = body{io.MultiReader(resp.Body, io.LimitReader(more{}, n)), resp.Body}
	resize(resp, resp.ContentLength+n)
}

// resize sets the length of an answer, and the range that it says it is.
func resize(resp *http.Response, n int64) {
	resp.ContentLength = n
	resp.Header.Set("Content-Length", strconv.FormatInt(n, 10))
	if first, _, total, ok := contentRange(resp); ok {
		resp.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%s", first, first+n-1, total))
	}
}

func contentRange(resp *http.Response) (first, last int64, total string, ok bool) {
	n, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/%s", &first, &last, &total)
	return first, last, total, err == nil && n == 3
}

// more is bytes that nobody wants.
type more struct{}

func (more) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte('a' + i%26)
	}
	return len(p), nil
}

// flipped inverts a bit of each so many bytes.
type flipped struct {
	io.ReadCloser
	each, off int64
}

func (f *flipped) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	for i := range p[:n] {
		if (f.off+int64(i))%f.each == f.each/2%499 { // early: answers are short, too
			p[i] ^= 1 << (i % 8)
		}
	}
	f.off += int64(n)
	return n, err
}

type zeros struct{ io.ReadCloser }

func (z zeros) Read(p []byte) (int, error) {
	n, err := z.ReadCloser.Read(p)
	clear(p[:n])
	return n, err
}

// elsewhere has a request for a range answered with another one of the same length,
// and the answer say that, or that it is what was asked for.
func elsewhere(f *netmodel.Fault, r *http.Request, honest bool) {
	var first, last int64
	if n, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil || n != 2 {
		return
	}
	by := int64(4096)
	if first >= by {
		by = -by
	}
	ask(f, func(r *http.Request) { r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first+by, last+by)) })
	change(f, func(resp *http.Response) {
		_, _, total, ok := contentRange(resp)
		if honest || !ok {
			return
		}
		// What lies at the end of the object is as long as it is.
		resp.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%s", first, first+resp.ContentLength-1, total))
	})
}

// isBlob tells what a path of the distribution protocol is about.
func isBlob(path string) bool { return strings.Contains(path, "/blobs/") }
func isManifest(path string) bool {
	return strings.Contains(path, "/manifests/") || strings.Contains(path, "/referrers/")
}
