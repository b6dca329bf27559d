package image

import (
	"context"
	"encoding/json"
	"errors"
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
	scheme, host string       // of the registry: nobody else sees credentials
	client       *http.Client // for token servers
	renewal      Renewal      // nil if there are no other credentials

	lock   chan struct{} // held while a token is fetched; guards what follows
	cred   Credentials
	asked  *challenge        // the last one
	tokens map[string]bearer // got with cred

	good atomic.Pointer[string] // the header of the last request that was answered well
}

// Renewal returns credentials to use instead of some that the registry has refused: the
// same, if there are no others. An error says that nobody knows, and is
// blob.ErrUnavailable to who asked for something.
type Renewal func(ctx context.Context, refused Credentials) (Credentials, error)

// maxRenewals is how often one request is made with other credentials: some that were
// at hand may have been refused elsewhere meanwhile.
const maxRenewals = 2

// offer is what a request says of who makes it.
type offer struct {
	header string      // "" if there is nothing to say
	by     Credentials // that it was made of
	fresh  bool        // nothing better can be made of them: it was got for this request
}

type bearer struct {
	header  string
	expires time.Time
}

func newAuth(scheme, host string, cred Credentials, renewal Renewal, base http.RoundTripper) *auth {
	return &auth{
		scheme: scheme, host: host, cred: cred, renewal: renewal,
		client: httpblob.Client(&http.Client{Transport: base}),
		lock:   make(chan struct{}, 1),
		tokens: map[string]bearer{},
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

// current returns what to offer at once, nothing if none has been asked for. A
// token that has expired is replaced before it costs a 401.
func (a *auth) current(ctx context.Context, scopes []string) (offer, error) {
	if err := a.acquire(ctx); err != nil {
		return offer{}, err
	}
	defer a.release()
	if a.asked == nil {
		return offer{by: a.cred}, nil
	}
	return a.offer(ctx, scopes)
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

// answer returns what meets a challenge to a request that carried sent; nothing, or what
// was sent, if there is nothing. No challenges mean the last one. renew says whether
// other credentials may be asked for.
func (a *auth) answer(ctx context.Context, asked []challenge, scopes []string, sent offer, renew bool) (next offer, err error) {
	if err := a.acquire(ctx); err != nil {
		return offer{}, err
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
		return offer{}, nil
	}
	if !sent.fresh || sent.by != a.cred {
		// Unless another request has got a new token since, the one sent is bad.
		key := strings.Join(scopes, " ")
		old := a.tokens[key].header
		if old == sent.header {
			delete(a.tokens, key)
		}
		next, err = a.offer(ctx, scopes)
		if next.fresh = next.header != old; err != nil || next.header != "" && next.header != sent.header {
			return next, err
		}
	}
	if !renew {
		return offer{}, nil
	}
	if changed, err := a.change(ctx); err != nil || !changed {
		return offer{}, err
	}
	next, err = a.offer(ctx, scopes)
	next.fresh = true
	return next, err
}

// offer returns what the last challenge asks for. If the token server refuses the
// credentials, others are asked for. The lock is held.
func (a *auth) offer(ctx context.Context, scopes []string) (offer, error) {
	header, err := a.header(ctx, scopes)
	for n := 0; n < maxRenewals && refusal(err); n++ {
		switch changed, cerr := a.change(ctx); {
		case cerr != nil:
			return offer{}, cerr
		case !changed:
			return offer{}, err
		}
		header, err = a.header(ctx, scopes)
	}
	return offer{header: header, by: a.cred}, err
}

// refusal tells whether an error is the answer of a token server that other credentials
// might be given another one. OAuth 2.0 has 400 for a refresh token that has expired.
func refusal(err error) bool {
	var e *httpblob.Error
	return errors.As(err, &e) && (errors.Is(e, blob.ErrUnauthorized) || e.Status == http.StatusBadRequest && e.Method == http.MethodPost)
}

// change replaces credentials that were refused, if there are others. The lock is held.
func (a *auth) change(ctx context.Context) (bool, error) {
	if a.renewal == nil {
		return false, nil
	}
	c, err := a.renewal(ctx, a.cred)
	switch {
	case ctx.Err() != nil:
		return false, ctx.Err()
	case err != nil:
		return false, fmt.Errorf("%w: other credentials for %s, which has refused %v: %v", blob.ErrUnavailable, a.host, a.cred, err)
	case c == a.cred:
		return false, nil
	}
	a.cred = c
	clear(a.tokens)
	return true, nil
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
