package netmodel

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// object is what the test server has at every path.
var object = func() []byte {
	p := make([]byte, 300<<10)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}()

// start runs a proxy in front of a server of object, and returns a client.
func start(t *testing.T, m Model) (*Proxy, *http.Client) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPut:
			n, err := io.Copy(io.Discard, r.Body)
			if err != nil || n != r.ContentLength {
				http.Error(w, "body", http.StatusBadRequest)
				return
			}
			w.Header().Set("Location", "http://"+r.Host+"/made")
			w.WriteHeader(http.StatusCreated)
		default:
			w.Header().Set("Etag", `"1"`)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(object))
		}
	}))
	t.Cleanup(server.Close)
	p, err := Start(server.URL, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return p, &http.Client{Transport: transport}
}

// get fetches a range ("" is all) and returns what arrived.
func get(t *testing.T, c *http.Client, url, rng string) (int, []byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if rng != "" {
		req.Header.Set("Range", rng)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	p, err := io.ReadAll(resp.Body)
	return resp.StatusCode, p, err
}

// settle waits until the proxy has noted n requests: it does so after the
// client has seen the last byte.
func settle(t *testing.T, p *Proxy, n int) []Request {
	t.Helper()
	for range 5000 {
		if log := p.Log(); len(log) >= n {
			return log
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("%d requests are noted, want %d", len(p.Log()), n)
	return nil
}

func TestProxyPassesOn(t *testing.T) {
	p, c := start(t, Model{})
	if code, body, err := get(t, c, p.URL()+"/a?b=c", ""); err != nil || code != 200 || !bytes.Equal(body, object) {
		t.Errorf("status %d, %d bytes, %v", code, len(body), err)
	}
	if code, body, err := get(t, c, p.URL()+"/a", "bytes=100-299"); err != nil || code != 206 || !bytes.Equal(body, object[100:300]) {
		t.Errorf("range: status %d, %d bytes, %v", code, len(body), err)
	}
	req, err := http.NewRequest(http.MethodPut, p.URL()+"/b", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if got, want := resp.Header.Get("Location"), p.URL()+"/made"; resp.StatusCode != 201 || got != want {
		t.Errorf("PUT: status %d, location %s, want 201, %s", resp.StatusCode, got, want)
	}
	resp, err = c.Head(p.URL() + "/c")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.ContentLength != int64(len(object)) || resp.Header.Get("Etag") != `"1"` {
		t.Errorf("HEAD: length %d, header %v", resp.ContentLength, resp.Header)
	}

	log := settle(t, p, 4)
	want := []Request{
		{Method: "GET", Path: "/a", Status: 200, Down: int64(len(object))},
		{Method: "GET", Path: "/a", Range: "bytes=100-299", Status: 206, Down: 200},
		{Method: "PUT", Path: "/b", Status: 201, Up: 5},
		{Method: "HEAD", Path: "/c", Status: 200},
	}
	for i, r := range log {
		if (r.FirstByte > 0) != (r.Down > 0) || r.Total < r.FirstByte {
			t.Errorf("times of %+v", r)
		}
		r.Start, r.FirstByte, r.Total = 0, 0, 0
		if r != want[i] {
			t.Errorf("request %d is noted as %+v, want %+v", i, r, want[i])
		}
	}
	if got, want := p.Totals(), (Totals{4, int64(len(object)) + 200, 5}); got != want {
		t.Errorf("totals %v, want %v", got, want)
	}
	p.Reset()
	if len(p.Log()) != 0 || p.Totals() != (Totals{}) {
		t.Error("Reset forgets nothing")
	}
}

// Real time has only a lower bound here: a busy machine makes all slower.
func TestProxyIsNotFasterThanItsModel(t *testing.T) {
	p, c := start(t, Model{Delay: 20 * time.Millisecond, Bandwidth: 16e6})
	begin := time.Now()
	done := make(chan error)
	for range 2 {
		go func() {
			_, _, err := get(t, c, p.URL()+"/", "")
			done <- err
		}()
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	// 614400 bytes at 2 MB/s, less one piece.
	if d, least := time.Since(begin), 20*time.Millisecond+290*time.Millisecond; d < least {
		t.Errorf("two responses took %v, which is less than %v", d, least)
	}
	for _, r := range settle(t, p, 2) {
		if r.FirstByte < 20*time.Millisecond {
			t.Errorf("first byte after %v", r.FirstByte)
		}
	}
}

func TestFaults(t *testing.T) {
	flipped := func(at ...int) []byte {
		p := slices.Clone(object)
		for _, i := range at {
			p[i] ^= 1
		}
		return p
	}
	last := len(object) - 1
	tests := []struct {
		name  string
		fault *Fault
		rng   string
		code  int
		body  []byte
		cut   bool // the body ends too early
	}{
		{name: "none", code: 200, body: object},
		{name: "zero", fault: &Fault{}, code: 200, body: object},
		{name: "flip", fault: &Fault{Flip: []int64{0, 20000, int64(last), 1 << 40}}, code: 200, body: flipped(0, 20000, last)},
		{name: "flip in range", fault: &Fault{Flip: []int64{99, 150, 200}}, rng: "bytes=100-199", code: 206, body: flipped(150)[100:200]},
		{name: "status", fault: &Fault{Status: 429, Header: http.Header{"Retry-After": {"1"}}}, code: 429},
		{name: "truncate at once", fault: &Fault{Truncate: true}, code: 200, cut: true},
		{name: "truncate", fault: &Fault{Truncate: true, After: 70000}, code: 200, body: object[:70000], cut: true},
		{name: "truncate after the end", fault: &Fault{Truncate: true, After: 1 << 30}, code: 200, body: object},
		{name: "body", fault: &Fault{Status: 200, Body: []byte("hello")}, code: 200, body: []byte("hello")},
		{name: "drop", fault: &Fault{Drop: true}, cut: true},
		{name: "wait", fault: &Fault{Wait: 20 * time.Millisecond}, code: 200, body: object},
		{name: "rate", fault: &Fault{Rate: 10e6}, code: 200, body: object},
		{name: "ask for all", fault: &Fault{Ask: func(r *http.Request) { r.Header.Del("Range") }}, rng: "bytes=100-199", code: 200, body: object},
		{name: "answer", fault: &Fault{Answer: func(r *http.Response) {
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader("other")), 5
			r.Header.Set("Content-Length", "5")
		}}, code: 200, body: []byte("other")},
		{name: "stall", fault: &Fault{Stall: 20 * time.Millisecond, After: 5}, code: 200, body: object},
	}
	p, c := start(t, Model{})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p.SetFaults(func(r *http.Request) *Fault {
				if r.URL.Path != "/"+strings.ReplaceAll(tt.name, " ", "-") {
					t.Errorf("asked for the fate of %s", r.URL.Path)
				}
				return tt.fault
			})
			code, body, err := get(t, c, p.URL()+"/"+strings.ReplaceAll(tt.name, " ", "-"), tt.rng)
			if tt.cut {
				if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
					t.Errorf("error %v, want an early end", err)
				}
				if code == 0 {
					code = tt.code // broken off before the headers were flushed
				}
			} else if err != nil {
				t.Error(err)
			}
			if code != tt.code || !bytes.Equal(body, tt.body) {
				t.Errorf("status %d, %d bytes, want %d, %d bytes or others", code, len(body), tt.code, len(tt.body))
			}
		})
	}
}

func TestCloseBreaksStallsOff(t *testing.T) {
	p, c := start(t, Model{})
	p.SetFaults(func(*http.Request) *Fault { return &Fault{Stall: time.Hour, After: 10} })
	resp, err := c.Get(p.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if n, err := resp.Body.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes after Close", n)
	}
}

func TestStartRefusesNonsense(t *testing.T) {
	for _, target := range []string{"", "127.0.0.1", ":"} {
		if p, err := Start(target, Default); err == nil {
			p.Close()
			t.Errorf("%q is accepted", target)
		}
	}
}

// An edge answers as the registry does, and asks it once for each blob.
func TestEdge(t *testing.T) {
	var asked atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if strings.Contains(r.URL.Path, "gone") {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(object))
	}))
	defer server.Close()
	p, err := Start(server.URL, Model{Edge: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	c := &http.Client{Transport: transport}
	blob := "/v2/a/b/blobs/sha256:" + strings.Repeat("0a", 32)
	var wg sync.WaitGroup
	for _, rng := range []string{"", "bytes=0-0", "bytes=100-70000", "bytes=300000-400000", "bytes=307199-307199"} {
		wg.Go(func() {
			status, got, err := get(t, c, p.URL()+blob, rng)
			status2, want, err2 := get(t, c, server.URL+"/direct", rng)
			if status != status2 || !bytes.Equal(got, want) || errors.Join(err, err2) != nil {
				t.Errorf("%q: %d, %d bytes, %v; want %d, %d bytes, %v", rng, status, len(got), err, status2, len(want), err2)
			}
		})
	}
	wg.Wait()
	if n := asked.Load(); n != 6 {
		t.Errorf("the server was asked %d times, want 5 directly and once for the blob", n)
	}
	if status, _, err := get(t, c, p.URL()+blob, "bytes=400000-400001"); status != http.StatusRequestedRangeNotSatisfiable || err != nil {
		t.Errorf("behind the end: %d, %v", status, err)
	}
	gone := "/v2/gone/blobs/sha256:" + strings.Repeat("0b", 32)
	for range 2 {
		if status, _, err := get(t, c, p.URL()+gone, "bytes=0-9"); status != http.StatusNotFound || err != nil {
			t.Errorf("of a blob that is not there: %d, %v", status, err)
		}
	}
}

func TestReset(t *testing.T) {
	p, c := start(t, Model{})
	for _, f := range []Fault{{Reset: true, Drop: true}, {Reset: true, Truncate: true, After: 5000}} {
		p.SetFaults(func(*http.Request) *Fault { return &f })
		if _, body, err := get(t, c, p.URL()+"/a", ""); !errors.Is(err, syscall.ECONNRESET) || int64(len(body)) > f.After {
			t.Errorf("%d bytes, %v, want ECONNRESET", len(body), err)
		}
	}
}

func TestRefuse(t *testing.T) {
	p, c := start(t, Model{})
	addr := p.Host()
	p.SetFaults(func(*http.Request) *Fault { return &Fault{Wait: time.Hour} })
	failed := make(chan error)
	go func() { _, _, err := get(t, c, p.URL()+"/a", ""); failed <- err }()
	for p.open() == 0 {
		time.Sleep(time.Millisecond)
	}
	for range 2 {
		if err := errors.Join(p.Refuse(true), p.Refuse(true)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := get(t, c, p.URL()+"/a", ""); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, want ECONNREFUSED", err)
		}
		p.SetFaults(nil)
		if err := p.Refuse(false); err != nil {
			t.Fatal(err)
		}
		if code, body, err := get(t, c, p.URL()+"/a", ""); err != nil || code != 200 || !bytes.Equal(body, object) || p.Host() != addr {
			t.Errorf("afterwards: status %d, %d bytes, %v", code, len(body), err)
		}
	}
	if err := <-failed; err == nil {
		t.Error("a request that was under way goes on")
	}
	if err := p.Refuse(true); err != nil { // Close lets the port go
		t.Fatal(err)
	}
}

func (p *Proxy) open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns)
}
