package httpblob_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/blob/httpblob"
	"github.com/shale-image/shale/blob/retry"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs a server and returns a source of its /<digest>.
func serve(t *testing.T, h http.HandlerFunc) (*httpblob.Source, *httptest.Server) {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return httpblob.New(&http.Client{Transport: tr}, func(r blob.Ref) string { return srv.URL + "/" + r.Digest }), srv
}

func content(contents map[string][]byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p, ok := contents[strings.TrimPrefix(r.URL.Path, "/")]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(p))
	}
}

func TestConformance(t *testing.T) {
	blobtest.Run(t, func(contents map[string][]byte) blob.Source {
		s, _ := serve(t, content(contents))
		return s
	})
}

func TestConformanceHTTP2(t *testing.T) {
	blobtest.Run(t, func(contents map[string][]byte) blob.Source {
		srv := httptest.NewUnstartedServer(content(contents))
		srv.EnableHTTP2 = true
		srv.StartTLS()
		t.Cleanup(srv.Close)
		return httpblob.New(srv.Client(), func(r blob.Ref) string { return srv.URL + "/" + r.Digest })
	})
}

func TestConformanceBehindRetry(t *testing.T) {
	var refused sync.Map // what was asked for once: each first request fails, whoever else asks meanwhile
	blobtest.Run(t, func(contents map[string][]byte) blob.Source {
		h := content(contents)
		s, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if _, again := refused.LoadOrStore(r.URL.Path+" "+r.Header.Get("Range"), true); !again {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			h(w, r)
		})
		return retry.New(s, retry.Policy{Base: time.Microsecond})
	})
}

var data = bytes.Repeat([]byte("0123456789abcdef"), 1<<17) // 2 MiB
var ref = blobtest.Ref(data)

func TestLyingServers(t *testing.T) {
	partial := func(cr string, body []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", cr)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(body)
		}
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	whole := func(w http.ResponseWriter, _ *http.Request) { w.Write(data) }
	const off, n = 1000, 500 // asked for: bytes 1000-1499
	good := data[off : off+n]
	for _, c := range []struct {
		name   string
		h      http.HandlerFunc
		off    int64
		got    int // bytes delivered, all right
		err    error
		saying string
	}{
		{"honest", partial("bytes 1000-1499/2097152", good), off, n, nil, ""},
		{"total not told", partial("bytes 1000-1499/*", good), off, n, nil, ""},
		{"another start", partial("bytes 0-499/2097152", data[:n]), off, 0, blob.ErrRange, "bytes 1000-1499"},
		{"another size", partial("bytes 1000-1499/2000", good), off, 0, blob.ErrRange, "2000 bytes"},
		{"no content range", partial("", good), off, 0, blob.ErrRange, "answers"},
		{"garbage content range", partial("bytes +1000-1499/x", good), off, 0, blob.ErrRange, "answers"},
		{"more than asked", partial("bytes 1000-1999/2097152", data[off:2000]), off, 0, blob.ErrRange, "answers"},
		{"less than asked", partial("bytes 1000-1099/2097152", good[:100]), off, 100, io.ErrUnexpectedEOF, "400 bytes missing"},
		{"less than it says", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", "bytes 1000-1499/2097152")
			w.Header().Set("Content-Length", "500")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(good[:100])
		}, off, 100, io.ErrUnexpectedEOF, "400 bytes missing"},
		{"chunked and short", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", "bytes 1000-1499/2097152")
			w.WriteHeader(http.StatusPartialContent)
			w.(http.Flusher).Flush()
			w.Write(good[:100])
		}, off, 100, io.ErrUnexpectedEOF, "400 bytes missing"},
		{"compressed", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			w.Write(data)
		}, off, 0, blob.ErrRange, "gzip"},
		{"ignores ranges, near", whole, off, n, nil, ""},
		{"ignores ranges, far", whole, 1<<20 + 1, 0, blob.ErrRange, "ignores ranges"},
		{"ignores ranges, too short", func(w http.ResponseWriter, _ *http.Request) { w.Write(data[:1100]) }, off, 0, blob.ErrRange, "1100 bytes"},
		{"404", status(404), off, 0, blob.ErrNotFound, "404"},
		{"401", status(401), off, 0, blob.ErrUnauthorized, "401"},
		{"403", status(403), off, 0, blob.ErrUnauthorized, "403"},
		{"416", status(416), off, 0, blob.ErrRange, "416"},
		{"429", status(429), off, 0, blob.ErrUnavailable, "429"},
		{"500", status(500), off, 0, blob.ErrUnavailable, "500"},
		{"204", status(204), off, 0, nil, "204"},
		{"hang up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, off, 0, blob.ErrUnavailable, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, _ := serve(t, c.h)
			var got []byte
			r, err := s.Range(t.Context(), ref, c.off, n)
			if err == nil {
				got, err = io.ReadAll(r)
				r.Close()
			}
			if !bytes.Equal(got, data[c.off:c.off+int64(c.got)]) {
				t.Errorf("%d bytes, expected %d", len(got), c.got)
			}
			if (err == nil) != (c.got == n) || c.err != nil && !errors.Is(err, c.err) {
				t.Errorf("error %v, expected %v", err, c.err)
			}
			if err != nil && (!strings.Contains(err.Error(), c.saying) || !strings.Contains(err.Error(), ref.Digest)) {
				t.Errorf("%v does not name %q and the blob", err, c.saying)
			}
		})
	}
}

func TestErrorDetails(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "17")
		w.WriteHeader(http.StatusTooManyRequests)
		fmt.Fprint(w, strings.Repeat("slow down ", 1000))
	}))
	defer srv.Close()
	s := httpblob.New(srv.Client(), func(blob.Ref) string { return srv.URL + "/b?X-Signature=hunter2#frag" })
	_, err := s.Range(t.Context(), ref, 0, 1)
	var e *httpblob.Error
	if !errors.As(err, &e) {
		t.Fatal(err)
	}
	if e.Method != "GET" || e.Status != 429 || e.RetryAfter != 17*time.Second || len(e.Body) != 1024 || e.URL != srv.URL+"/b?..." {
		t.Errorf("%+v", e)
	}
	if s := err.Error(); strings.Contains(s, "hunter2") || len(s) > 600 {
		t.Errorf("%d bytes: %s", len(s), s)
	}
	// The same for a server that cannot be reached: net/http's error has the whole URL.
	srv.Close()
	_, err = s.Range(t.Context(), ref, 0, 1)
	if !errors.Is(err, blob.ErrUnavailable) || strings.Contains(err.Error(), "hunter2") {
		t.Error(err)
	}
}

func TestIdleTimeout(t *testing.T) {
	release := make(chan struct{})
	for _, sent := range []int{-1, 0, 100} { // no header; header only; a part of the body
		s, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if sent >= 0 {
				w.Header().Set("Content-Range", "bytes 0-999/2097152")
				w.WriteHeader(http.StatusPartialContent)
				w.Write(data[:sent])
				w.(http.Flusher).Flush()
			}
			select {
			case <-release:
			case <-r.Context().Done():
			}
		})
		s.IdleTimeout = 20 * time.Millisecond
		p, err := blob.ReadAll(t.Context(), s, ref, 0, 1000)
		if !errors.Is(err, blob.ErrUnavailable) || !strings.Contains(err.Error(), "no progress for 20ms") {
			t.Errorf("%d bytes sent: %d, %v", sent, len(p), err)
		}
	}
	close(release)
}

func TestConnectionIsKept(t *testing.T) {
	var conns atomic.Int64
	srv := httptest.NewUnstartedServer(content(map[string][]byte{ref.Digest: data}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			conns.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	s := httpblob.New(srv.Client(), func(r blob.Ref) string { return srv.URL + "/" + r.Digest })
	for i := range 10 {
		r, err := s.Range(t.Context(), ref, 0, 60<<10)
		if err != nil {
			t.Fatal(err)
		}
		io.ReadFull(r, make([]byte, 1+i*6000)) // the rest is less than maxDrain
		r.Close()
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections for reads closed early, expected 1", n)
	}
}

func TestCloseDoesNotWait(t *testing.T) {
	release := make(chan struct{})
	s, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-999/2097152")
		w.WriteHeader(http.StatusPartialContent)
		w.Write(data[:100])
		w.(http.Flusher).Flush()
		<-release
	})
	r, err := s.Range(t.Context(), ref, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	io.ReadFull(r, make([]byte, 10))
	r.Close() // hangs for ever if it drains without a limit
	if _, err := r.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("read after close: %v", err)
	}
	close(release)
}

func TestRedirect(t *testing.T) {
	var direct, leaked atomic.Int64
	var broken atomic.Bool
	h := content(map[string][]byte{"b": data})
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		direct.Add(1)
		if r.Header.Get("Authorization") != "" || r.Header.Get("Cookie") != "" || r.Header.Get("Referer") != "" {
			leaked.Add(1)
		}
		if broken.Load() && r.URL.Query().Get("sig") == "1" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		h(w, r)
	}))
	defer storage.Close()
	var asked atomic.Int64
	s, srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprintf("%s/b?sig=%d", storage.URL, asked.Add(1)), http.StatusTemporaryRedirect)
	})
	_ = srv
	get := func() {
		t.Helper()
		if p, err := blob.ReadAll(t.Context(), s, ref, 5, 1000); err != nil || !bytes.Equal(p, data[5:1005]) {
			t.Fatalf("wrong bytes, or %v", err)
		}
	}
	for range 5 {
		get()
	}
	if a, d := asked.Load(), direct.Load(); a != 1 || d != 5 {
		t.Errorf("%d requests to the server, %d to the storage; expected 1 and 5", a, d)
	}
	broken.Store(true) // the signature expires: a new one is asked for
	get()
	get()
	if a, d := asked.Load(), direct.Load(); a != 2 || d != 8 {
		t.Errorf("%d requests to the server, %d to the storage; expected 2 and 8", a, d)
	}

	// Credentials in the request itself stay with the host, also if only the port differs.
	req, _ := http.NewRequestWithContext(context.Background(), "GET", srv.URL, nil)
	req.Header.Set("Authorization", "Bearer secret")
	req.Header.Set("Cookie", "secret=1")
	resp, err := httpblob.Client(srv.Client()).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if leaked.Load() != 0 {
		t.Error("credentials followed a redirect to another host")
	}
}

func TestNoDowngrade(t *testing.T) {
	plain := httptest.NewServer(content(map[string][]byte{"b": data}))
	defer plain.Close()
	srv := httptest.NewTLSServer(http.RedirectHandler(plain.URL+"/b?sig=hunter2", http.StatusFound))
	defer srv.Close()
	s := httpblob.New(srv.Client(), func(blob.Ref) string { return srv.URL })
	_, err := s.Range(t.Context(), ref, 0, 1)
	if err == nil || !strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "hunter2") {
		t.Error(err)
	}
	loop := httptest.NewUnstartedServer(nil)
	loop.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/", http.StatusFound) })
	loop.Start()
	defer loop.Close()
	s = httpblob.New(loop.Client(), func(blob.Ref) string { return loop.URL })
	if _, err := s.Range(t.Context(), ref, 0, 1); err == nil || !strings.Contains(err.Error(), "10 redirects") {
		t.Error(err)
	}
}
