package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/shale-image/shale/bench/oci"
)

// Push uploads the image in an OCI layout to the registry at base (its URL, or
// that of a proxy in front of it) as name, "repository:tag". Blobs that the
// repository has are not sent again; the manifest's bytes stay as they are.
func Push(ctx context.Context, base, dir, name string) error {
	repo, tag, ok := strings.Cut(name, ":")
	if !ok {
		return fmt.Errorf("push: %q has no tag", name)
	}
	u, err := url.Parse(base)
	if err != nil {
		return fmt.Errorf("push: %w", err)
	}
	p := pusher{base: u.JoinPath("v2", repo), layout: oci.Layout(dir)}
	m, desc, err := p.layout.Manifest()
	if err != nil {
		return err
	}
	for _, d := range append(m.Layers, m.Config) {
		if err := p.blob(ctx, d); err != nil {
			return fmt.Errorf("push %s: blob %s: %w", name, d.Digest, err)
		}
	}
	path, err := p.layout.Blob(desc.Digest)
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	_, err = p.do(ctx, http.MethodPut, p.base.JoinPath("manifests", tag), desc.MediaType, bytes.NewReader(raw), desc.Size)
	if err != nil {
		return fmt.Errorf("push %s: manifest: %w", name, err)
	}
	return nil
}

type pusher struct {
	base   *url.URL // ".../v2/<repository>"
	layout oci.Layout
}

func (p pusher) blob(ctx context.Context, d oci.Descriptor) error {
	if _, err := p.do(ctx, http.MethodHead, p.base.JoinPath("blobs", d.Digest), "", nil, 0); err == nil {
		return nil
	}
	path, err := p.layout.Blob(d.Digest)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	location, err := p.do(ctx, http.MethodPost, p.base.JoinPath("blobs", "uploads/"), "", nil, 0)
	if err != nil {
		return err
	}
	q := location.Query()
	q.Set("digest", d.Digest)
	location.RawQuery = q.Encode()
	_, err = p.do(ctx, http.MethodPut, location, "application/octet-stream", f, d.Size)
	return err
}

// do sends one request, and returns the Location that is answered.
func (p pusher) do(ctx context.Context, method string, u *url.URL, contentType string, body io.Reader, size int64) (*url.URL, error) {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	req.ContentLength = size
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %s: %s", method, u.Redacted(), resp.Status, bytes.TrimSpace(text))
	}
	return u.Parse(resp.Header.Get("Location"))
}
