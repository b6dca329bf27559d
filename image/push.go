package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/httpblob"
)

// uploadIdle is how long an upload may make no progress, and how long the
// registry may take to store a blob once it has all of it.
const uploadIdle = 2 * time.Minute

func (g *registry) self() *endpoint { return g.endpoints[len(g.endpoints)-1] }

func (g *registry) pushScope() string { return "repository:" + g.ref.repository + ":pull,push" }

// pushBlob asks for the blob (1 request), and if it is missing starts an upload
// or a mount (1 request) and sends it whole (1 request).
func (g *registry) pushBlob(ctx context.Context, d Descriptor, open func() (io.ReadCloser, error), mountFrom []string) error {
	e := g.self()
	client := g.client(e, g.pushScope())
	err := request(ctx, client, http.MethodHead, e.url+"/blobs/"+d.Digest, nil, nil, func(resp *http.Response) error {
		if resp.ContentLength >= 0 && resp.ContentLength != d.Size {
			return corrupt("blob "+d.Digest, "the registry has it with %d bytes, expected %d", resp.ContentLength, d.Size)
		}
		return nil
	}, http.StatusOK)
	if !errors.Is(err, blob.ErrNotFound) {
		return err
	}
	var to *url.URL
	start := func(client *http.Client, query url.Values) error {
		u := e.url + "/blobs/uploads/"
		if len(query) > 0 {
			u += "?" + query.Encode()
		}
		return request(ctx, client, http.MethodPost, u, nil, nil, func(resp *http.Response) (err error) {
			if to = nil; resp.StatusCode == http.StatusAccepted {
				to, err = location(resp)
			}
			return err
		}, http.StatusAccepted, http.StatusCreated)
	}
	for _, from := range mountFrom {
		// A token for from is refused where the user may not read it: that, like
		// any failed mount, only means that the bytes have to be sent.
		both := g.client(e, g.pushScope(), "repository:"+from+":pull")
		if err := start(both, url.Values{"mount": {d.Digest}, "from": {from}}); err != nil {
			continue
		}
		if to == nil {
			return nil
		}
		// It offers an upload instead: for want of better, that is used.
	}
	if to == nil {
		if err := start(client, nil); err != nil {
			return err
		}
		if to == nil {
			return errors.New("the registry answers 201 to the start of an upload")
		}
	}
	q := to.Query()
	q.Set("digest", d.Digest)
	to.RawQuery = q.Encode()
	return upload(ctx, client, to.String(), d, open)
}

// upload sends a whole blob.
func upload(ctx context.Context, c *http.Client, to string, d Descriptor, open func() (io.ReadCloser, error)) error {
	idle := fmt.Errorf("%w: upload made no progress for %v", blob.ErrUnavailable, uploadIdle)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(uploadIdle, func() { cancel(idle) })
	defer timer.Stop()

	// The transport may still read a body after Do has returned, and its own
	// error is worth more than the transport's "body closed".
	failed := make(chan error, 1)
	body := func() (io.ReadCloser, error) {
		r, err := open()
		if err != nil {
			return nil, err
		}
		return &progress{verifier: newVerifier(r, d), timer: timer, failed: failed}, nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, to, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	if d.Size > 0 {
		if req.Body, err = body(); err != nil {
			return err
		}
		req.GetBody, req.ContentLength = body, d.Size
	}
	resp, err := c.Do(req)
	select {
	case ferr := <-failed:
		if err == nil {
			resp.Body.Close()
		}
		return ferr
	default:
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return httpblob.WrapError(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusNoContent {
		return httpblob.NewError(resp)
	}
	io.CopyN(io.Discard, resp.Body, 64<<10)
	return nil
}

// progress keeps an upload's timer from firing while bytes flow, and remembers
// why its source failed, unless that is because the transport has closed it:
// then the registry's answer is the reason.
type progress struct {
	*verifier
	timer  *time.Timer
	failed chan<- error
	closed atomic.Bool
}

func (p *progress) Read(b []byte) (int, error) {
	n, err := p.verifier.Read(b)
	p.timer.Reset(uploadIdle)
	if err != nil && err != io.EOF && !p.closed.Load() {
		select {
		case p.failed <- err:
		default:
		}
	}
	return n, err
}

func (p *progress) Close() error {
	p.closed.Store(true)
	return p.verifier.Close()
}

func (g *registry) pushManifest(ctx context.Context, m Manifest, tag string) error {
	_, err := g.putManifest(ctx, m, firstNonEmpty(tag, m.Digest), "")
	return err
}

// putManifest stores a manifest under a tag or its digest; unless it is empty,
// only if what is there has the entity tag match. It returns the answer's header.
func (g *registry) putManifest(ctx context.Context, m Manifest, reference, match string) (answer http.Header, err error) {
	e := g.self()
	header := http.Header{"Content-Type": {m.MediaType}}
	if match != "" {
		header.Set("If-Match", match)
	}
	err = request(ctx, g.client(e, g.pushScope()), http.MethodPut, e.url+"/manifests/"+reference, header, m.Bytes, func(resp *http.Response) error {
		answer = resp.Header
		if got := answer.Get("Docker-Content-Digest"); got != "" && got != m.Digest {
			return corrupt("manifest "+m.Digest, "the registry stored it as %.100q", got)
		}
		return nil
	}, http.StatusCreated)
	return answer, err
}
