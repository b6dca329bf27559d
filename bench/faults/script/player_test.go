package script

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/netmodel"
)

var object = func() []byte {
	p := make([]byte, 200e3)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(p)
	return p
}()

const (
	blobPath     = "/v2/app/blobs/sha256:0"
	manifestPath = "/v2/app/manifests/1"
)

// play starts a script in front of a server of object, and returns its host.
func play(t *testing.T, text string) (*Player, string) {
	t.Helper()
	s, err := Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("a token comes through to the registry")
		}
		if r.URL.Path == "/v2/moved/blobs/x" {
			http.Redirect(w, r, "/v2/app/blobs/x", http.StatusTemporaryRedirect)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(object))
	}))
	t.Cleanup(server.Close)
	proxy, err := netmodel.Start(server.URL, netmodel.Model{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	p := NewPlayer(proxy)
	p.Play(s, nil)
	return p, proxy.URL()
}

type got struct {
	*http.Response
	body []byte
	err  error
}

// get asks for [1000, 101000) of a blob, or for a manifest.
func get(t *testing.T, url string, header ...string) (g got) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if isBlob(url) || strings.Contains(url, "signed") {
		req.Header.Set("Range", "bytes=1000-100999")
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	c := &http.Client{Timeout: time.Second, Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	if g.Response, g.err = c.Do(req); g.err != nil {
		return g
	}
	defer g.Body.Close()
	g.body, g.err = io.ReadAll(g.Body)
	return g
}

// right tells whether it is what was asked for, of a length.
func (g got) right(n int) bool {
	return g.err == nil && g.StatusCode == 206 && bytes.Equal(g.body, object[1000:1000+n]) &&
		g.Header.Get("Content-Range") == fmt.Sprintf("bytes 1000-%d/200000", 1000+n-1)
}

func TestKinds(t *testing.T) {
	want := object[1000:101000]
	timeout := func(g got) bool { var e interface{ Timeout() bool }; return errors.As(g.err, &e) && e.Timeout() }
	for line, ok := range map[string]func(got) bool{
		"":                          func(g got) bool { return g.right(100e3) },
		"status 503 retry-after 2s": func(g got) bool { return g.StatusCode == 503 && g.Header.Get("Retry-After") == "2" && len(g.body) == 0 },
		"status 204":                func(g got) bool { return g.StatusCode == 204 && g.err == nil },
		"late 100ms":                func(g got) bool { return g.right(100e3) },
		"hang headers":              func(g got) bool { return timeout(g) && g.Response == nil },
		"hang body at 5kB":          func(g got) bool { return timeout(g) && bytes.Equal(g.body, want[:5e3]) },
		"slow 10kB/s":               timeout,
		"drop":                      func(g got) bool { return errors.Is(g.err, io.EOF) },
		"refuse":                    func(g got) bool { return errors.Is(g.err, syscall.ECONNREFUSED) },
		"page": func(g got) bool {
			return g.StatusCode == 200 && strings.HasPrefix(g.Header.Get("Content-Type"), "text/html") && len(g.body) > 10
		},
		"cut at 5kB":                   func(g got) bool { return errors.Is(g.err, io.ErrUnexpectedEOF) && bytes.Equal(g.body, want[:5e3]) },
		"reset":                        func(g got) bool { return errors.Is(g.err, syscall.ECONNRESET) && g.Response == nil },
		"reset at 5kB":                 func(g got) bool { return errors.Is(g.err, syscall.ECONNRESET) && len(g.body) <= 5e3 },
		"cut at 5kB\nhang body at 3kB": func(g got) bool { return timeout(g) && len(g.body) == 3e3 },
		"short by 1kB":                 func(g got) bool { return g.right(99e3) },
		"long by 1kB":                  func(g got) bool { return g.err == nil && len(g.body) == 101e3 && bytes.Equal(g.body[:100e3], want) },
		"flip each 10kB":               func(g got) bool { return g.err == nil && differ(g.body, want) == 10 },
		"zeros":                        func(g got) bool { return g.err == nil && bytes.Equal(g.body, make([]byte, 100e3)) },
		"other bytes": func(g got) bool {
			return g.Header.Get("Content-Range") == "bytes 1000-100999/200000" && bytes.Equal(g.body, object[5096:105096])
		},
		"wrong range": func(g got) bool {
			return g.Header.Get("Content-Range") == "bytes 5096-105095/200000" && bytes.Equal(g.body, object[5096:105096])
		},
		"no range": func(g got) bool {
			return g.StatusCode == 206 && g.Header.Get("Content-Range") == "" && bytes.Equal(g.body, want)
		},
		"ignore range": func(g got) bool { return g.StatusCode == 200 && bytes.Equal(g.body, object) },
		"encoded":      func(g got) bool { return g.err != nil || g.Header.Get("Content-Encoding") == "gzip" },
		"status 404 on manifests\ndrop on tokens\ndrop on /other/": func(g got) bool { return g.right(100e3) },
		"status 404 on all":            func(g got) bool { return g.StatusCode == 404 },
		"status 404 on /app/":          func(g got) bool { return g.StatusCode == 404 },
		"status 404 after 1":           func(g got) bool { return g.right(100e3) },
		"status 404 after 1h":          func(g got) bool { return g.right(100e3) },
		"status 404 every 2":           func(g got) bool { return g.right(100e3) },
		"status 404\nstatus 500":       func(g got) bool { return g.StatusCode == 404 },
		"flip each 10kB\nshort by 1kB": func(g got) bool { return g.err == nil && len(g.body) == 99e3 && differ(g.body, want[:99e3]) == 10 },
	} {
		t.Run(line, func(t *testing.T) {
			p, url := play(t, line)
			if g := get(t, url+blobPath); !ok(g) {
				t.Errorf("%+v, %d bytes, %v", g.Response, len(g.body), g.err)
			}
			if err := p.Stop(); err != nil {
				t.Error(err)
			}
			if g := get(t, url+blobPath); !g.right(100e3) {
				t.Errorf("afterwards: %+v, %d bytes, %v", g.Response, len(g.body), g.err)
			}
		})
	}
}

func differ(a, b []byte) (n int) {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			n++
		}
	}
	return n
}

func TestWhen(t *testing.T) {
	for line, want := range map[string][]int{
		"status 404 after 2 for 3":         {206, 206, 404, 404, 404, 206, 206},
		"status 404 every 3":               {206, 206, 404, 206, 206, 404, 206},
		"status 404 after 1 for 3 every 2": {206, 206, 404, 206, 206, 206, 206},
	} {
		p, url := play(t, line)
		var codes []int
		for range want {
			if g := get(t, url+manifestPath); g.StatusCode != 200 { // does not count
				t.Error(g.Status)
			}
			codes = append(codes, get(t, url+blobPath).StatusCode)
		}
		if !slices.Equal(codes, want) {
			t.Errorf("%s: %d, want %d", line, codes, want)
		}
		var met int
		for _, c := range want {
			if c == 404 {
				met++
			}
		}
		if n := p.Met(); len(n) != 1 || n[0] != met {
			t.Errorf("%s: met %d, want %d", line, n, met)
		}
	}
	// It goes by itself.
	p, url := play(t, "refuse after 1 for 2s\nstatus 404 for 2s")
	if g := get(t, url+blobPath); g.err != nil || g.StatusCode != 404 {
		t.Errorf("%v", g)
	}
	get(t, url+blobPath) // during which it begins
	if g := get(t, url+blobPath); !errors.Is(g.err, syscall.ECONNREFUSED) {
		t.Errorf("%v, want ECONNREFUSED", g)
	}
	for end := time.Now().Add(10 * time.Second); !get(t, url+blobPath).right(100e3); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not end")
		}
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
}

type fakeDisk []string

func (d *fakeDisk) Fault(kind string, on bool) error {
	*d = append(*d, fmt.Sprint(kind, " ", on))
	return errors.New("ouch")
}

func TestDisk(t *testing.T) {
	p, _ := play(t, "")
	s, err := Parse(strings.NewReader("disk full\ndisk hangs after 1h\nquota 1MB"))
	if err != nil {
		t.Fatal(err)
	}
	var d fakeDisk
	p.Play(s, &d)
	if err := p.Stop(); err == nil || !slices.Equal(d, fakeDisk{"disk full true", "disk full false"}) {
		t.Errorf("%v, %q", err, d)
	}
}

// hungDisk lets nobody fill it while it hangs.
type hungDisk struct {
	hangs chan struct{}
	end   sync.Once
}

func (d *hungDisk) Fault(kind string, on bool) error {
	if kind == "disk hangs" && !on {
		d.end.Do(func() { close(d.hangs) })
	} else if kind == "disk full" {
		<-d.hangs
	}
	return nil
}

// TestDiskHangs: that a disk hangs ends, and requests are answered meanwhile, whatever
// else is to be done to it.
func TestDiskHangs(t *testing.T) {
	p, url := play(t, "")
	s, err := Parse(strings.NewReader("disk hangs for 300ms\ndisk full after 1ms\nstatus 404"))
	if err != nil {
		t.Fatal(err)
	}
	d := &hungDisk{hangs: make(chan struct{})}
	p.Play(s, d)
	time.Sleep(20 * time.Millisecond)
	if g := get(t, url+blobPath); g.StatusCode != 404 {
		t.Errorf("%d, want 404", g.StatusCode)
	}
	select {
	case <-d.hangs:
	case <-time.After(10 * time.Second):
		t.Fatal("it hangs for ever")
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
}

func TestTokens(t *testing.T) {
	_, url := play(t, "tokens 2s then 403 on all")
	refused := get(t, url+blobPath)
	challenge := refused.Header.Get("WWW-Authenticate")
	if refused.StatusCode != 401 || challenge != fmt.Sprintf(`Bearer realm="%s%s",service="faults"`, url, tokenPath) {
		t.Fatalf("%d %q", refused.StatusCode, challenge)
	}
	g := get(t, url+tokenPath)
	var name string
	if _, err := fmt.Sscanf(string(g.body), `{"token": %q, "expires_in": 3600}`, &name); err != nil || g.StatusCode != 200 {
		t.Fatalf("%q, %v", g.body, err)
	}
	if g := get(t, url+blobPath, "Authorization", "Bearer "+name); !g.right(100e3) {
		t.Errorf("with a token: %v", g.Status)
	}
	time.Sleep(2100 * time.Millisecond)
	if g := get(t, url+blobPath, "Authorization", "Bearer "+name); g.StatusCode != 403 {
		t.Errorf("with an old token: %v", g.Status)
	}
}

func TestSigned(t *testing.T) {
	p, url := play(t, "tokens 1h on all\nsigned 2s")
	if g := get(t, url+blobPath); g.StatusCode != 401 {
		t.Errorf("without a token: %v", g.Status)
	}
	get(t, url+tokenPath)
	g := get(t, url+blobPath, "Authorization", "Bearer 1")
	to := g.Header.Get("Location")
	if g.StatusCode != 307 || !strings.HasPrefix(to, "http://localhost:") {
		t.Fatalf("%v %q", g.Status, to)
	}
	if g := get(t, to); !g.right(100e3) {
		t.Errorf("signed: %v", g.Status)
	}
	if g := get(t, to, "Authorization", "Bearer 1"); g.StatusCode != 400 {
		t.Errorf("signed, and with a token: %v", g.Status)
	}
	time.Sleep(2100 * time.Millisecond)
	if g := get(t, to); g.StatusCode != 403 {
		t.Errorf("an old signature: %v", g.Status)
	}
	p.Stop()
	if g := get(t, url+blobPath); !g.right(100e3) {
		t.Errorf("afterwards: %v", g.Status)
	}
	// What the registry itself redirects is no way around the faults.
	_, url = play(t, "flip each 10kB")
	if g := get(t, url+"/v2/moved/blobs/x"); g.StatusCode != 206 || differ(g.body, object[1000:101000]) != 10 {
		t.Errorf("%v, %d bytes differ", g.Status, differ(g.body, object[1000:101000]))
	}
}

// TestPacks: a fault on packs meets start packs alone.
func TestPacks(t *testing.T) {
	const text = "status 503 on packs"
	s, err := Parse(strings.NewReader(text))
	if err != nil || !s.Packs() {
		t.Fatal(s, err)
	}
	p, url := play(t, text)
	p.Packs = []string{"sha256:pack"}
	p.Play(s, nil)
	for path, want := range map[string]int{"/v2/app/blobs/sha256:pack": 503, "/v2/app/blobs/sha256:packs": 206, "/v2/app/manifests/sha256:pack": 200} {
		if got := get(t, url+path); got.err != nil || got.StatusCode != want {
			t.Errorf("%s: %v, %v, want %d", path, got.Response, got.err, want)
		}
	}
}
