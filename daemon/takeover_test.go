package daemon

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// TestPackGoesOn: the worker dies while a start pack lands; the next one has the rest of
// it come.
func TestPackGoesOn(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	m := p.push(p.record([]string{"half"}, halves(t)), nil)
	var asked atomic.Int64
	p.mu.Lock()
	p.spoil = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, m.Blob.Digest) || asked.Add(1) > 1 {
			return false
		}
		n := len(m.Bytes)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", n-1, n))
		w.Header().Set("Content-Length", fmt.Sprint(n))
		w.WriteHeader(http.StatusPartialContent)
		w.Write(m.Bytes[:n-1000]) // the index, and some of the content
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	}
	p.mu.Unlock()
	c := service(t)
	dir, mounted := attachAs(t, c, p.ref, Place{Command: []string{"half"}})
	if asked.Load() != 1 {
		t.Fatalf("the pack was asked for %d times", asked.Load())
	}
	if s := statusOf(t, c, mounted.ID); s.MissingBytes == 0 {
		t.Fatalf("nothing is missing: %+v", s)
	}
	p.requests()
	killWorker(t, c)
	packComes(t, c, mounted, m) // nobody reads
	halves(t)(dir)
	if s := statusOf(t, c, mounted.ID).Fill; s.PackBytes == 0 || s.Stalls != 0 {
		t.Errorf("%+v", s)
	}
	for _, a := range p.requests() {
		if !strings.Contains(a, m.Blob.Digest) && !strings.Contains(a, "/manifests/") {
			t.Errorf("%s: the pack has what is read", a)
		}
	}
	killWorker(t, c) // and it is not asked for again
	halves(t)(dir)
	if n := asked.Load(); n != 2 {
		t.Errorf("the pack was asked for %d times, want 2", n)
	}
}

// TestCountsGoOn: what was counted of a mount is not lost with a worker.
func TestCountsGoOn(t *testing.T) {
	c := service(t)
	dir, m := attach(t, c, layout(t))
	readFiles(t, dir)
	before := statusOf(t, c, m.ID)
	if before.Fill.Requests == 0 || before.Source.Requests == 0 || before.Fill.ReadBytes == 0 {
		t.Fatalf("%+v", before)
	}
	check := func() {
		t.Helper()
		after := statusOf(t, c, m.ID)
		if after.Fill.Requests != before.Fill.Requests || after.Source != before.Source || after.Fill.ReadBytes < before.Fill.ReadBytes {
			t.Errorf("%+v, before %+v", after, before)
		}
		before = after
	}
	self, err := os.Open("/proc/self/exe")
	must(t, err)
	defer self.Close()
	_, err = c.Upgrade(background, self)
	must(t, err)
	check()
	killWorker(t, c)
	check()
}

// TestHungWorker: a worker that is stopped is replaced, and its readers go on.
func TestHungWorker(t *testing.T) {
	configured(t, `{"worker_timeout": "3s"}`)
	c := service(t)
	dir, _ := attach(t, c, layout(t))
	old := pid(t, c)
	must(t, syscall.Kill(old, syscall.SIGSTOP))
	readFiles(t, dir) // nothing of it was read before
	st, err := c.Status(background)
	if err != nil || len(st.Mounts) != 1 || st.Processes[len(st.Processes)-1].PID == old {
		t.Errorf("%+v, %v", st, err)
	}
}
