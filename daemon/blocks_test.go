package daemon

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// repeating is content that compresses by half, much of it by what is up to 8 MiB before.
func repeating(n int) []byte {
	r := rand.New(rand.NewPCG(6, 7))
	var p []byte
	for len(p) < n {
		if k := 1 + r.IntN(5000); r.IntN(3) == 0 && len(p) > k {
			at := r.IntN(len(p) - k)
			p = append(p, p[at:at+k]...)
		} else {
			for range k / 8 {
				p = fmt.Appendf(p, "%x ", r.Uint32()>>(4*r.IntN(8)))
			}
		}
	}
	return p[:n]
}

// TestZstdBlocks reads pages here and there of an image whose layer is one zstd frame: by
// an index what lies around them is fetched, and no more.
func TestZstdBlocks(t *testing.T) {
	content := repeating(24 << 20)
	archive := tarOf(t, "data", content)
	x, s := newLayered(t, zstded(t, archive), archive, nil, false).index(t), service(t)
	dir, m := attachAs(t, s, x.src.Ref, Place{ReadAheadKiB: 4, NoComplete: true})
	f, err := os.Open(filepath.Join(dir, "data"))
	must(t, err)
	defer f.Close()
	r := rand.New(rand.NewPCG(8, 9))
	p := make([]byte, 4096)
	for _, at := range []int64{5 << 20, 18 << 20} { // each brings what is behind it, up to what a round trip is worth
		if _, err := f.ReadAt(p, at); err != nil || !bytes.Equal(p, content[at:][:len(p)]) {
			t.Fatalf("at %d: %v", at, err)
		}
	}
	st := mountStatus(t, s, m.ID)
	if n := st.Fill.FetchedBytes; n == 0 || n > x.size/2 { // the second 4 MiB, where a network is as fast as memory and its answers are late
		t.Errorf("%d bytes were fetched for two pages, of a layer of %d", n, x.size)
	}
	for range 300 {
		at := r.Int64N(int64(len(content) - len(p)))
		if _, err := f.ReadAt(p, at); err != nil || !bytes.Equal(p, content[at:][:len(p)]) {
			t.Fatalf("at %d: %v", at, err)
		}
	}
	if got, err := os.ReadFile(filepath.Join(dir, "data")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("all of it: %d bytes, %v", len(got), err)
	}
	if st := mountStatus(t, s, m.ID); st.MissingBytes != 0 || st.Fill.FetchedBytes > (x.size+x.side.Size)*3/2 {
		t.Errorf("%d bytes are missing, %d were fetched of a layer of %d and states of %d", st.MissingBytes, st.Fill.FetchedBytes, x.size, x.side.Size)
	}
	s = service(t)
	if p, err := s.Pull(background, x.src, true, nil); err != nil || p.MissingBytes != 0 {
		t.Errorf("all at once: %d bytes are missing, %v", p.MissingBytes, err)
	}
	dir, m = attachAs(t, s, x.src.Ref, Place{})
	if got, err := os.ReadFile(filepath.Join(dir, "data")); err != nil || !bytes.Equal(got, content) || mountStatus(t, s, m.ID).Fill.FetchedBytes > 0 {
		t.Errorf("all of it once it is here: %d bytes, %v", len(got), err)
	}
}

// TestLargeStates reads a page of a layer in which much is copied from before: of the
// states, which are as large as what is stored, few come.
func TestLargeStates(t *testing.T) {
	mib := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(mib)
	var content []byte
	for i := range 24 { // no chunk is as another, and of each page half has been before
		noise := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{2, byte(i)}).Read(noise)
		for at := 0; at < 1<<20; at += 2048 {
			content = append(append(content, noise[at:at+2048]...), mib[at:at+2048]...)
		}
	}
	archive := tarOf(t, "data", content)
	x, s := newLayered(t, zstded(t, archive), archive, nil, false).index(t), service(t)
	dir, m := attachAs(t, s, x.src.Ref, Place{ReadAheadKiB: 4, NoComplete: true})
	f, err := os.Open(filepath.Join(dir, "data"))
	must(t, err)
	defer f.Close()
	p := make([]byte, 4096)
	if _, err := f.ReadAt(p, 20<<20); err != nil || !bytes.Equal(p, content[20<<20:][:len(p)]) {
		t.Fatalf("other bytes, or %v", err)
	}
	if st := mountStatus(t, s, m.ID); x.side.Size < 10<<20 || st.Fill.FetchedBytes > 512<<10 {
		t.Errorf("%d bytes were fetched, of a layer of %d and states of %d", st.Fill.FetchedBytes, x.size, x.side.Size)
	}
}

// TestWrongStates: what is read by wrong states is right all the same, as the layer comes
// as a whole then.
func TestWrongStates(t *testing.T) {
	content := repeating(4 << 20)
	archive := tarOf(t, "data", content)
	for what, damage := range map[string]func(p []byte) []byte{
		"flipped here and there": func(p []byte) []byte {
			for i := 40; i < len(p); i += 5000 {
				p[i] ^= 4
			}
			return p
		},
		"of others": func(p []byte) []byte {
			n := len(p) / 3
			return append(bytes.Clone(p[n:]), p[:n]...)
		},
		"zeros": func(p []byte) []byte { return make([]byte, len(p)) },
		"gone":  func([]byte) []byte { return nil },
	} {
		t.Run(what, func(t *testing.T) {
			h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
			var side atomic.Pointer[string]
			var asked atomic.Int64
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if d := side.Load(); d == nil || r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+*d) {
					h.ServeHTTP(w, r)
					return
				}
				asked.Add(1)
				all := r.Clone(r.Context())
				all.Header.Del("Range")
				whole := httptest.NewRecorder()
				h.ServeHTTP(whole, all)
				p := damage(whole.Body.Bytes())
				if p == nil {
					http.NotFound(w, r)
					return
				}
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(p))
			}))
			t.Cleanup(srv.Close)
			x := newLayeredAt(t, strings.TrimPrefix(srv.URL, "http://")+"/app:1", zstded(t, archive), archive, nil)
			made := x.index(t).side
			if made.Size < 1000 {
				t.Fatalf("states of %d bytes: no test", made.Size)
			}
			side.Store(&made.Digest)
			dir, _ := attachAs(t, service(t), x.src.Ref, Place{ReadAheadKiB: 4})
			f, err := os.Open(filepath.Join(dir, "data"))
			must(t, err)
			defer f.Close()
			r := rand.New(rand.NewPCG(8, 9))
			p := make([]byte, 4096)
			for range 20 {
				at := r.Int64N(int64(len(content) - len(p)))
				if _, err := f.ReadAt(p, at); err != nil || !bytes.Equal(p, content[at:][:len(p)]) {
					t.Errorf("at %d: other bytes, or %v", at, err)
				}
			}
			if got, err := os.ReadFile(filepath.Join(dir, "data")); err != nil || !bytes.Equal(got, content) {
				t.Errorf("all of it: %d bytes, or others, %v", len(got), err)
			}
			if asked.Load() == 0 {
				t.Error("nobody has asked for a state")
			}
		})
	}
}
