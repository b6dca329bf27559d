package image_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shale-image/shale/image"
)

// TestWarm: requests that are made at the same time find connections open.
func TestWarm(t *testing.T) {
	var opened, asked atomic.Int64
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/" {
			asked.Add(1)
		}
		http.NotFound(w, r)
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			opened.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	ref, err := image.ParseRef(strings.TrimPrefix(srv.URL, "http://") + "/app:1")
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{MaxIdleConnsPerHost: 8}
	defer tr.CloseIdleConnections()
	repo, err := image.Open(t.Context(), ref, image.Options{Transport: tr})
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	repo.Warm(t.Context(), 3)
	for range 1000 {
		if asked.Load() == 3 {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if opened.Load() == 0 || asked.Load() != 3 {
		t.Fatalf("%d connections, %d requests", opened.Load(), asked.Load())
	}
}

// TestWarmTLS: with TLS as many connections are opened as the version of HTTP needs.
func TestWarmTLS(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		var asked atomic.Int64
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			http.NotFound(w, r)
		}))
		srv.EnableHTTP2 = http2
		srv.StartTLS()
		defer srv.Close()
		tr := srv.Client().Transport.(*http.Transport).Clone()
		tr.TLSClientConfig.ServerName = "example.com" // as the certificate says
		tr.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, srv.Listener.Addr().String())
		}
		defer tr.CloseIdleConnections()
		ref, err := image.ParseRef("registry.example/app:1")
		if err != nil {
			t.Fatal(err)
		}
		repo, err := image.Open(t.Context(), ref, image.Options{Transport: tr})
		if err != nil {
			t.Fatal(err)
		}
		defer repo.Close()
		repo.Warm(t.Context(), 3)
		want := int64(3)
		if http2 {
			want = 1
		}
		for range 1000 {
			if asked.Load() >= want {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(50 * time.Millisecond) // for more than that
		if n := asked.Load(); n != want {
			t.Errorf("HTTP/2 %v: %d requests, want %d", http2, n, want)
		}
	}
}
