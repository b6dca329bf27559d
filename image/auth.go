package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/httpblob"
)

// auth answers the challenges of one registry. It sends nothing unasked: the
// first request goes out bare, and only its 401 tells what is wanted, so that
// an open registry costs no extra round trip. From then on requests carry
// their token at once.
type auth struct {
	scheme, host string // of the registry: nobody else sees credentials
	cred         Credentials
	client       *http.Client // for token servers

	lock   chan struct{} // held while a token is fetched; guards what follows
	asked  *challenge    // the last one
	tokens map[string]bearer

	good atomic.Pointer[string] // the header of the last request that was answered well
}

type bearer struct {
	header  string
	expires time.Time
}

func newAuth(scheme, host string, cred Credentials, base http.RoundTripper) *auth {
	return &auth{
		scheme: scheme, host: host, cred: cred,
		client: httpblob.Client(&http.Client{Transport: base}),
		lock:   make(chan struct{}, 1),
		tokens: map[string]bearer{},
	}
}

// transport authenticates requests for the given scopes.
type transport struct {
	base      http.RoundTripper
	auth      *auth
	scopes    []string
	userAgent string
}

// RoundTrip implements http.RoundTripper. Requests to other hosts (where a
// registry redirected to) pass without credentials.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	send := func(header string) (*http.Response, error) {
		r := req.Clone(req.Context())
		r.Header.Set("User-Agent", t.userAgent)
		if header != "" {
			r.Header.Set("Authorization", header)
		}
		return t.base.RoundTrip(r)
	}
	if req.URL.Scheme != t.auth.scheme || req.URL.Host != t.auth.host {
		return send("")
	}
	header, err := t.auth.current(req.Context(), t.scopes)
	if err != nil {
		closeBody(req)
		return nil, err
	}
	resp, err := send(header)
	// A token that another request got meanwhile may be too old as well; one that was
	// got for this request is the last try.
	for fresh := false; err == nil && !fresh && t.refused(req, resp, header); {
		next, got, rerr := t.renew(req, resp, header)
		switch {
		case rerr != nil:
			return nil, rerr
		case next == "":
			return resp, nil // nothing better to offer: let the caller see the 401
		}
		header, fresh = next, got
		if req.Body != nil && req.Body != http.NoBody {
			body, err := req.GetBody()
			if err != nil {
				return nil, err
			}
			req = req.Clone(req.Context())
			req.Body = body
		}
		resp, err = send(header)
	}
	if err == nil && header != "" && resp.StatusCode < http.StatusBadRequest {
		t.auth.good.Store(&header)
	}
	return resp, err
}

// refused tells whether another token might be answered better.
func (t *transport) refused(req *http.Request, resp *http.Response, header string) bool {
	switch {
	case req.Body != nil && req.Body != http.NoBody && req.GetBody == nil:
		return false // it cannot be sent again
	case resp.StatusCode == http.StatusUnauthorized:
		return true
	}
	// Some registries say so of a token that has expired.
	return resp.StatusCode == http.StatusForbidden && t.auth.worked(req.Context(), header, t.scopes)
}

// renew returns what to send instead of a header that was refused, and whether it was
// got for this request; "" if there is nothing else. If it returns something, or an
// error, the response is closed.
func (t *transport) renew(req *http.Request, resp *http.Response, sent string) (next string, fresh bool, err error) {
	challenges := parseChallenges(resp.Header)
	if resp.StatusCode == http.StatusForbidden {
		challenges = nil // the last ones still hold
	}
	next, fresh, err = t.auth.answer(req.Context(), challenges, t.scopes, sent)
	if err == nil && (next == "" || next == sent) {
		return "", false, nil
	}
	io.CopyN(io.Discard, resp.Body, 64<<10)
	resp.Body.Close()
	return next, fresh, err
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		req.Body.Close()
	}
}

func (a *auth) acquire(ctx context.Context) error {
	select {
	case a.lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *auth) release() { <-a.lock }

// current returns the header to send at once, "" if none has been asked for. A
// token that has expired is replaced before it costs a 401.
func (a *auth) current(ctx context.Context, scopes []string) (string, error) {
	if err := a.acquire(ctx); err != nil {
		return "", err
	}
	defer a.release()
	if a.asked == nil {
		return "", nil
	}
	return a.header(ctx, scopes)
}

// worked tells whether a request with this header was last answered well, or another
// request has had it replaced since.
func (a *auth) worked(ctx context.Context, header string, scopes []string) bool {
	if good := a.good.Load(); good != nil && *good == header {
		return true
	}
	if header == "" || a.acquire(ctx) != nil {
		return false
	}
	defer a.release()
	t, ok := a.tokens[strings.Join(scopes, " ")]
	return ok && t.header != header
}

// answer returns the header that meets a challenge to a request that carried
// sent, and whether it was not there before; "" or sent itself if there is none. No
// challenges mean the last one.
func (a *auth) answer(ctx context.Context, asked []challenge, scopes []string, sent string) (header string, fresh bool, err error) {
	if err := a.acquire(ctx); err != nil {
		return "", false, err
	}
	defer a.release()
	pick := slices.IndexFunc(asked, func(c challenge) bool { return c.scheme == "bearer" })
	if pick < 0 {
		pick = slices.IndexFunc(asked, func(c challenge) bool { return c.scheme == "basic" })
	}
	switch {
	case pick >= 0:
		a.asked = &asked[pick]
	case a.asked == nil || asked != nil:
		return "", false, nil
	}
	// Unless another request has got a new token since, the one sent is bad.
	key := strings.Join(scopes, " ")
	old := a.tokens[key].header
	if old == sent {
		delete(a.tokens, key)
	}
	header, err = a.header(ctx, scopes)
	return header, header != old, err
}

// header returns what the last challenge asks for. The lock is held.
func (a *auth) header(ctx context.Context, scopes []string) (string, error) {
	switch {
	case a.asked.scheme == "basic" && a.cred.Username != "":
		r := http.Request{Header: http.Header{}}
		r.SetBasicAuth(a.cred.Username, a.cred.Password)
		return r.Header.Get("Authorization"), nil
	case a.asked.scheme == "basic":
		return "", nil
	case a.cred.RegistryToken != "":
		return "Bearer " + a.cred.RegistryToken, nil
	}
	key := strings.Join(scopes, " ")
	if t, ok := a.tokens[key]; ok && time.Now().Before(t.expires) {
		return t.header, nil
	}
	t, err := a.fetch(ctx, withScope(scopes, a.asked.params["scope"]))
	if err != nil {
		return "", err
	}
	a.tokens[key] = t
	return t.header, nil
}

// withScope adds the scope a challenge names, unless ours are about the same
// resource (and then ask for as much or more).
func withScope(scopes []string, asked string) []string {
	i := strings.LastIndexByte(asked, ':')
	if i < 0 || slices.ContainsFunc(scopes, func(s string) bool { return strings.HasPrefix(s, asked[:i+1]) }) {
		return scopes
	}
	return append(slices.Clone(scopes), asked)
}

// fetch gets a token from the server that the challenge names.
func (a *auth) fetch(ctx context.Context, scopes []string) (bearer, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	realm, err := a.realm(a.asked.params["realm"])
	if err != nil {
		return bearer{}, err
	}
	form := url.Values{"scope": scopes}
	if s := a.asked.params["service"]; s != "" {
		form.Set("service", s)
	}
	var req *http.Request
	if a.cred.IdentityToken != "" {
		form.Set("scope", strings.Join(scopes, " "))
		form.Set("grant_type", "refresh_token")
		form.Set("refresh_token", a.cred.IdentityToken)
		form.Set("client_id", "shale")
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(form.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
	} else {
		q := realm.Query()
		for k, v := range form {
			q[k] = v
		}
		realm.RawQuery = q.Encode()
		req, err = http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
		if err == nil && a.cred.Username != "" {
			req.SetBasicAuth(a.cred.Username, a.cred.Password)
		}
	}
	if err != nil {
		return bearer{}, err
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return bearer{}, fmt.Errorf("token for %s: %w", a.host, httpblob.WrapError(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return bearer{}, fmt.Errorf("token for %s: %w", a.host, httpblob.NewError(resp))
	}
	return a.parseToken(io.LimitReader(resp.Body, 1<<20), resp.Request.URL)
}

func (a *auth) parseToken(body io.Reader, from *url.URL) (bearer, error) {
	var reply struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"` // seconds
	}
	if err := json.NewDecoder(body).Decode(&reply); err != nil {
		return bearer{}, fmt.Errorf("token for %s: %s: %w: its answer is not JSON", a.host, httpblob.Redact(from), blob.ErrUnauthorized)
	}
	if reply.Token == "" {
		reply.Token = reply.AccessToken
	}
	if reply.Token == "" || strings.ContainsAny(reply.Token, "\r\n\x00") {
		return bearer{}, fmt.Errorf("token for %s: %s: %w: no token in its answer", a.host, httpblob.Redact(from), blob.ErrUnauthorized)
	}
	if reply.ExpiresIn <= 0 {
		reply.ExpiresIn = 60 // the specification's default
	}
	life := time.Duration(min(reply.ExpiresIn, 86400)) * time.Second
	return bearer{"Bearer " + reply.Token, time.Now().Add(life - life/10)}, nil
}

// realm parses the token server's URL. The registry chooses it, so it must not
// be a way to read a secret over the wire (plain HTTP), nor to make this node
// ask itself or its cloud's metadata service.
func (a *auth) realm(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("token for %s: %w: its token server %.100q is not a URL", a.host, blob.ErrUnauthorized, s)
	}
	fail := func(why string) (*url.URL, error) {
		return nil, fmt.Errorf("token for %s: %w: refusing its token server %s: %s", a.host, blob.ErrUnauthorized, httpblob.Redact(u), why)
	}
	if u.Scheme != "https" && (u.Scheme != "http" || a.scheme != "http") {
		return fail("not https")
	}
	if isLoopback(u.Host) && !isLoopback(a.host) {
		return fail("it is this machine")
	}
	if addr, err := netip.ParseAddr(u.Hostname()); err == nil && addr.Unmap().IsLinkLocalUnicast() {
		return fail("a link-local address")
	}
	return u, nil
}

// isLoopback tells whether a "host[:port]" is this machine by its name alone.
func isLoopback(hostport string) bool {
	host := (&url.URL{Host: hostport}).Hostname()
	addr, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && addr.Unmap().IsLoopback()
}
