package image

import (
	"io"
	"net/http"
)

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
	sent, err := t.auth.current(req.Context(), t.scopes)
	if err != nil {
		closeBody(req)
		return nil, err
	}
	resp, err := send(sent.header)
	// A token that another request got meanwhile may be too old as well; one that was
	// got for this request is the last try with these credentials.
	for renewed := 0; err == nil && renewed <= maxRenewals && t.refused(req, resp, &sent); {
		next, rerr := t.better(req, resp, sent, renewed < maxRenewals)
		switch {
		case rerr != nil:
			return nil, rerr
		case next.header == "":
			return resp, nil // nothing better to offer: let the caller see the 401
		}
		if next.by != sent.by {
			renewed++
		}
		sent = next
		if req.Body != nil && req.Body != http.NoBody {
			body, err := req.GetBody()
			if err != nil {
				return nil, err
			}
			req = req.Clone(req.Context())
			req.Body = body
		}
		resp, err = send(sent.header)
	}
	if err == nil && sent.header != "" && resp.StatusCode < http.StatusBadRequest {
		t.auth.good.Store(&sent.header)
	}
	return resp, err
}

// refused tells whether another token or other credentials might be answered better.
func (t *transport) refused(req *http.Request, resp *http.Response, sent *offer) bool {
	switch {
	case req.Body != nil && req.Body != http.NoBody && req.GetBody == nil:
		return false // it cannot be sent again
	case resp.StatusCode == http.StatusUnauthorized:
		return true
	case resp.StatusCode != http.StatusForbidden:
		return false
	case t.auth.worked(req.Context(), sent.header, t.scopes):
		return true // some registries say so of a token that has expired
	}
	// And some, ECR for one, of such a password. Another token would not help.
	sent.fresh = true
	return t.auth.renewal != nil
}

// better returns what to send instead of an offer that was refused; nothing if there is
// nothing else. If it returns something, or an error, the response is closed.
func (t *transport) better(req *http.Request, resp *http.Response, sent offer, renew bool) (next offer, err error) {
	challenges := parseChallenges(resp.Header)
	if resp.StatusCode == http.StatusForbidden {
		challenges = nil // the last ones still hold
	}
	next, err = t.auth.answer(req.Context(), challenges, t.scopes, sent, renew)
	if err == nil && (next.header == "" || next.header == sent.header) {
		return offer{}, nil
	}
	io.CopyN(io.Discard, resp.Body, 64<<10)
	resp.Body.Close()
	return next, err
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		req.Body.Close()
	}
}
