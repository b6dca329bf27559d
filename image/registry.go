package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/choose"
	"github.com/shale-image/shale/blob/httpblob"
)

// registry is a store over the distribution protocol: mirrors, then the
// registry itself.
type registry struct {
	ref       Ref
	opts      Options
	endpoints []*endpoint    // the last one is the registry
	blobs     *choose.Source // of all endpoints
	base      http.RoundTripper
	owned     *http.Transport // closed with the registry; nil if shared
}

// endpoint is one host that serves the repository.
type endpoint struct {
	url    string // of the repository: "https://host/v2/library/debian"
	auth   *auth
	client *http.Client

	lists, listless atomic.Bool // has an API for referrers, has none; neither is set before it was asked
}

// shared is the transport of all registries that need no own one, so that
// images of a registry share its connections.
var shared = sync.OnceValue(func() *http.Transport { return newTransport(nil) })

func newTransport(roots *x509.CertPool) *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   10 * time.Second,
		ForceAttemptHTTP2:     true,
		DisableCompression:    true, // ranges and digests are about the bytes as stored
		MaxIdleConns:          128,
		MaxIdleConnsPerHost:   32,
		IdleConnTimeout:       90 * time.Second,
		ExpectContinueTimeout: time.Second,
		ReadBufferSize:        64 << 10,
	}
}

func newRegistry(ref Ref, opts Options) (*registry, error) {
	g := &registry{ref: ref, opts: opts, base: opts.Transport}
	if g.base == nil && opts.CAFile != "" {
		roots, err := x509.SystemCertPool()
		if err != nil {
			roots = x509.NewCertPool()
		}
		pem, err := os.ReadFile(opts.CAFile)
		if err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("certificates: %s has none in PEM form", opts.CAFile)
		}
		g.owned = newTransport(roots)
		g.base = g.owned
	}
	if g.base == nil {
		g.base = shared()
	}
	for _, mirror := range opts.Mirrors {
		if !validHost(mirror) {
			return nil, fmt.Errorf("mirror %.200q: expected host or host:port", mirror)
		}
		g.endpoints = append(g.endpoints, g.endpoint(mirror, Credentials{}, nil))
	}
	host := ref.registry
	if host == dockerHub {
		host = dockerHubHost
	}
	g.endpoints = append(g.endpoints, g.endpoint(host, opts.Credentials, opts.Renewal))
	var places []choose.Place
	for _, e := range g.endpoints {
		places = append(places, choose.Place{Name: e.auth.host, Source: httpblob.New(e.client, func(r blob.Ref) string { return e.url + "/blobs/" + r.Digest }), Health: healthOf(e.auth)})
	}
	g.blobs = choose.New(places...)
	return g, nil
}

func (g *registry) endpoint(host string, cred Credentials, renewal Renewal) *endpoint {
	scheme := "https"
	if isLoopback(host) && g.opts.CAFile == "" || slices.Contains(g.opts.PlainHTTP, host) {
		scheme = "http"
	}
	e := &endpoint{
		url:  scheme + "://" + host + "/v2/" + g.ref.repository,
		auth: newAuth(scheme, host, cred, renewal, g.base),
	}
	e.client = g.client(e, "repository:"+g.ref.repository+":pull")
	return e
}

// client returns a client that authenticates at e for the given scopes.
func (g *registry) client(e *endpoint, scopes ...string) *http.Client {
	t := &transport{base: g.base, auth: e.auth, scopes: scopes, userAgent: g.opts.UserAgent}
	return httpblob.Client(&http.Client{Transport: t})
}

func (g *registry) close() error {
	if g.owned != nil {
		g.owned.CloseIdleConnections()
	}
	return nil
}

// each calls f for the endpoints, the healthiest first, until one succeeds; for two at
// once where the first brings nothing for 3 s. If all fail, the registry's own error
// counts.
func each[T any](ctx context.Context, g *registry, f func(context.Context, *endpoint) (T, error)) (T, error) {
	return choose.Each(ctx, g.blobs, func(ctx context.Context, n int) (T, error) { return f(ctx, g.endpoints[n]) })
}

// Range implements blob.Source.
func (g *registry) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if !reDigest.MatchString(ref.Digest) {
		return nil, fmt.Errorf("blob %.100q: %w: not a sha256 digest", ref.Digest, blob.ErrNotFound)
	}
	return g.blobs.Range(ctx, ref, off, n)
}

var acceptManifests = strings.Join([]string{MediaTypeIndex, MediaTypeManifest, MediaTypeDockerList, MediaTypeDockerManifest}, ", ")

func (g *registry) manifest(ctx context.Context, reference string) (Manifest, error) {
	return each(ctx, g, func(ctx context.Context, e *endpoint) (Manifest, error) {
		m, _, err := g.manifestFrom(ctx, e, reference)
		return m, err
	})
}

// manifestFrom also returns the answer's entity tag, "" if it has none.
func (g *registry) manifestFrom(ctx context.Context, e *endpoint, reference string) (m Manifest, etag string, err error) {
	header := http.Header{"Accept": {acceptManifests}}
	err = request(ctx, e.client, http.MethodGet, e.url+"/manifests/"+reference, header, nil, func(resp *http.Response) error {
		p, err := io.ReadAll(io.LimitReader(resp.Body, g.opts.ManifestLimit+1))
		if err != nil {
			return fmt.Errorf("manifest %s: %w: %w", reference, blob.ErrUnavailable, err)
		}
		if int64(len(p)) > g.opts.ManifestLimit {
			return overManifestLimit("manifest "+reference, "manifest", g.opts.ManifestLimit)
		}
		if !json.Valid(p) { // a page of something between us and the registry
			return corrupt("manifest "+reference, "it is not JSON")
		}
		m = Manifest{MediaType: resp.Header.Get("Content-Type"), Digest: digestOf(p), Bytes: p}
		etag = resp.Header.Get("ETag")
		want := reference
		if !reDigest.MatchString(reference) {
			// By tag there is only the registry's word, but it should be consistent.
			want = resp.Header.Get("Docker-Content-Digest")
			if strings.HasPrefix(m.MediaType, dockerSchema1) || !reDigest.MatchString(want) {
				return nil
			}
		}
		if m.Digest != want {
			return corrupt("manifest "+want, "its content has digest %s", m.Digest)
		}
		return nil
	}, http.StatusOK)
	return m, etag, err
}

// request makes one request with a small answer. done sees a response with one
// of the given statuses; others become an *httpblob.Error.
func request(ctx context.Context, c *http.Client, method, url string, header http.Header, body []byte, done func(*http.Response) error, statuses ...int) error {
	parent := ctx
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	var r io.Reader
	if body != nil {
		r = strings.NewReader(string(body))
	}
	req, err := http.NewRequestWithContext(ctx, method, url, r)
	if err != nil {
		return err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := c.Do(req)
	if err == nil {
		defer resp.Body.Close()
		if !slices.Contains(statuses, resp.StatusCode) {
			return httpblob.NewError(resp)
		}
		err = done(resp)
		io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection is kept
	} else {
		err = httpblob.WrapError(err)
	}
	if err != nil && parent.Err() != nil {
		return parent.Err()
	}
	return err
}

// location resolves the Location header of an upload.
func location(resp *http.Response) (*url.URL, error) {
	u, err := resp.Location()
	if err != nil {
		return nil, errors.New("the registry names no place to upload to")
	}
	if u.Scheme != "https" && (u.Scheme != "http" || resp.Request.URL.Scheme != "http") {
		return nil, fmt.Errorf("upload to %s refused: not https", httpblob.Redact(u))
	}
	return u, nil
}
