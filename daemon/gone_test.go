package daemon

import (
	"bytes"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestRegistryGone: an image that is not complete when its registry goes away: reads
// wait for as long as they are told to, then fail, and work again once the registry
// does, with nothing restarted.
func TestRegistryGone(t *testing.T) {
	configured(t, `{"read_timeout": "2s", "cache": {"complete": "off"}}`)
	ref, _ := served(t, layout(t))
	host, name, _ := strings.Cut(ref, "/")
	var gone atomic.Bool
	pass := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: host})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if gone.Load() {
			panic(http.ErrAbortHandler)
		}
		pass.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	c := service(t)
	dir, _ := attach(t, c, strings.TrimPrefix(front.URL, "http://")+"/"+name)
	gone.Store(true)
	start := time.Now()
	if _, err := os.ReadFile(filepath.Join(dir, "big")); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if d := time.Since(start); d < 2*time.Second {
		t.Errorf("it waited for %v only", d)
	}
	time.Sleep(500 * time.Millisecond) // a failure stands for a moment
	// One that waits when the registry is back does not fail at all.
	time.AfterFunc(500*time.Millisecond, func() { gone.Store(false) })
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}
