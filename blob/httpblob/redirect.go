package httpblob

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// CheckRedirect is the redirect policy of clients here: at most 10, never from
// https to http, and nothing that authenticates follows to another scheme,
// host or port (net/http alone would let it follow to another port, and to
// subdomains).
func CheckRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	if s := req.URL.Scheme; s != "https" && (s != "http" || via[len(via)-1].URL.Scheme == "https") {
		return fmt.Errorf("redirect from %s to %s refused", Redact(via[len(via)-1].URL), Redact(req.URL))
	}
	if first := via[0].URL; req.URL.Scheme != first.Scheme || req.URL.Host != first.Host {
		for _, h := range []string{"Authorization", "Proxy-Authorization", "Cookie", "Cookie2", "Www-Authenticate", "Referer"} {
			req.Header.Del(h)
		}
	}
	return nil
}

const (
	redirectTTL  = time.Minute // signed URLs live 5 minutes or longer
	maxRedirects = 1024        // a URL is about 1 KiB
)

// redirects remembers where requests for a digest ended up.
type redirects struct {
	mu sync.Mutex
	m  map[string]redirect
}

type redirect struct {
	url     string
	expires time.Time
}

func (r *redirects) get(digest string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	to, ok := r.m[digest]
	if !ok || time.Now().After(to.expires) {
		return ""
	}
	return to.url
}

func (r *redirects) put(digest, url string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m == nil || len(r.m) >= maxRedirects {
		r.m = map[string]redirect{}
	}
	r.m[digest] = redirect{url, time.Now().Add(redirectTTL)}
}

func (r *redirects) forget(digest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.m, digest)
}
