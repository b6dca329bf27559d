package script

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/shale-image/shale/bench/netmodel"
)

// doors are a token server, and a store with signed URLs, as registries have them. Both
// say of what they give that it lasts for an hour, and change their mind.
type doors struct {
	host string // of the proxy

	mu     sync.Mutex
	made   int
	tokens map[string]time.Time // when each was given
	signed map[string]signed
}

type signed struct {
	path    string
	auth    string // of who was sent here
	expires time.Time
	then    int
}

const (
	tokenPath  = "/faults/token"
	signedPath = "/faults/signed/"
	maxSigned  = 1 << 16
)

func newDoors(host string) *doors {
	return &doors{host: host, tokens: map[string]time.Time{}, signed: map[string]signed{}}
}

// next makes a name that nobody has had. The lock is held.
func (d *doors) next() string {
	d.made++
	return strconv.Itoa(d.made)
}

// enter answers requests to the token server, and takes those with a signed URL to
// what was signed.
func (d *doors) enter(f *netmodel.Fault, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.URL.Path == tokenPath {
		name := d.next()
		d.tokens["Bearer "+name] = time.Now()
		answer(f, http.StatusOK, "application/json", fmt.Sprintf(`{"token": %q, "expires_in": 3600}`, name))
		return
	}
	name, ok := strings.CutPrefix(r.URL.Path, signedPath)
	if !ok {
		return
	}
	switch s, ok := d.signed[name]; {
	case !ok:
		answer(f, http.StatusNotFound, "", "")
	case r.Header.Get("Authorization") != "":
		answer(f, http.StatusBadRequest, "", "Only one auth mechanism allowed") // as S3 does
	case time.Now().After(s.expires):
		answer(f, s.then, "", "Request has expired")
	default:
		ask(f, func(r *http.Request) {
			r.URL.Path, r.URL.RawPath, r.URL.RawQuery = s.path, "", ""
			if s.auth != "" {
				r.Header.Set("Authorization", s.auth)
			}
		})
	}
}

// token wants a token of a request, one that is not older than life.
func (d *doors) token(f *netmodel.Fault, r *http.Request, life time.Duration, then int) {
	if f.Status != 0 || !strings.HasPrefix(r.URL.Path, "/v2/") {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	given, ok := d.tokens[r.Header.Get("Authorization")]
	switch {
	case !ok:
		then = http.StatusUnauthorized
	case time.Since(given) < life:
		ask(f, func(r *http.Request) { r.Header.Del("Authorization") })
		return
	}
	answer(f, then, "", "")
	if then == http.StatusUnauthorized {
		f.Header.Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s%s",service="faults"`, d.host, tokenPath))
	}
}

// redirect sends a request for a blob to a URL of another host that lasts for life.
func (d *doors) redirect(f *netmodel.Fault, r *http.Request, life time.Duration, then int) {
	if !isBlob(r.URL.Path) || f.Status != 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.signed) >= maxSigned {
		clear(d.signed)
	}
	name := d.next()
	auth := r.Header.Get("Authorization")
	if _, ours := d.tokens[auth]; ours {
		auth = ""
	}
	d.signed[name] = signed{r.URL.Path, auth, time.Now().Add(life), then}
	answer(f, http.StatusTemporaryRedirect, "", "")
	_, port, _ := strings.Cut(d.host, ":")
	f.Header.Set("Location", "http://localhost:"+port+signedPath+name+"?signature=secret")
}
