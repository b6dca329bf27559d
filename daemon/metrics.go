package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/fill"
)

const metricsName = "metrics.sock"

// serveMetrics answers GET /metrics on a socket in the root directory, in the
// Prometheus text format:
//
//	curl --unix-socket /var/lib/shale/metrics.sock http://shale/metrics
func (s *server) serveMetrics(ctx context.Context) error {
	name := filepath.Join(s.cfg.Root, metricsName)
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// Through a descriptor, since the path may be too long for an address.
	fd, err := unix.Open(s.cfg.Root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: s.cfg.Root, Err: err}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", fd, metricsName)})
	unix.Close(fd)
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(name, 0o600); err != nil {
		return errors.Join(err, l.Close())
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Write(s.metrics())
	})
	h := &http.Server{Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { h.Close() }) // close removes the socket
	go h.Serve(l)
	return nil
}

// metrics writes what the service has done since it started.
func (s *server) metrics() []byte {
	s.mu.Lock()
	sum, n := s.ended, len(s.mounts)
	for _, m := range s.mounts {
		sum.add(m.totals())
	}
	s.mu.Unlock()
	total, source := sum.fill, sum.origin
	u := s.pool.Usage()
	var b bytes.Buffer
	for _, m := range []struct {
		name, kind, help string
		value            int64
	}{
		{"shale_mounts", "gauge", "Images mounted now.", int64(n)},
		{"shale_fetch_requests_total", "counter", "Ranged requests made for readers.", total.Requests},
		{"shale_fetch_bytes_total", "counter", "Stored bytes asked for in them.", total.FetchedBytes},
		{"shale_fetch_errors_total", "counter", "Fetches that failed.", total.Errors},
		{"shale_source_requests_total", "counter", "Requests made of registries for chunks, retries included.", source.Requests},
		{"shale_source_retries_total", "counter", "Of them, those that repeat or continue one that failed.", source.Retries},
		{"shale_source_bytes_total", "counter", "Bytes received in them.", source.Bytes},
		{"shale_source_errors_total", "counter", "Of them, those that failed or broke off.", source.Errors},
		{"shale_chunks_filled_total", "counter", "Chunks verified and stored.", total.Chunks},
		{"shale_read_bytes_total", "counter", "Bytes served to the kernel.", total.ReadBytes},
		{"shale_pool_segments", "gauge", "Segments of the pool.", int64(u.Segments)},
		{"shale_pool_present_bytes", "gauge", "Bytes of chunks on the node.", u.Present},
		{"shale_pool_known_bytes", "gauge", "Bytes of chunks the node has addresses for.", u.Address},
		{"shale_pool_disk_bytes", "gauge", "Bytes the pool takes on disk.", u.Disk},
		{"shale_pool_quota_bytes", "gauge", "Bytes the pool may take on disk; 0 is without limit.", u.Quota},
		{"shale_pool_evicted_bytes_total", "counter", "Bytes evicted to make room.", u.Evicted},
		{"shale_chunks_in_flight", "gauge", "Chunks on their way, or kept in memory since the pool is full.", int64(s.engine.Flights())},
		{"shale_goroutines", "gauge", "Goroutines of the worker.", int64(runtime.NumGoroutine())},
		{"shale_start_time_seconds", "gauge", "When the service started, Unix time.", s.started.Unix()},
	} {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n%s %d\n", m.name, m.help, m.name, m.kind, m.name, m.value)
	}
	return b.Bytes()
}

// maxLastErrors bounds them as package fill does.
const maxLastErrors = 8

// totals is what mounts have read and fetched.
type totals struct {
	fill   fill.Stats
	origin SourceStats
}

func (t *totals) add(x totals) {
	t.fill.ReadBytes += x.fill.ReadBytes
	t.fill.Requests += x.fill.Requests
	t.fill.FetchedBytes += x.fill.FetchedBytes
	t.fill.Chunks += x.fill.Chunks
	t.fill.ContentBytes += x.fill.ContentBytes
	t.fill.PackBytes += x.fill.PackBytes
	t.fill.PackWaits += x.fill.PackWaits
	t.fill.Stalls += x.fill.Stalls
	t.fill.Errors += x.fill.Errors
	t.fill.LastErrors = slices.Concat(x.fill.LastErrors, t.fill.LastErrors) // x's are older
	t.fill.LastErrors = t.fill.LastErrors[max(0, len(t.fill.LastErrors)-maxLastErrors):]
	t.origin.Requests += x.origin.Requests
	t.origin.Retries += x.origin.Retries
	t.origin.Bytes += x.origin.Bytes
	t.origin.Errors += x.origin.Errors
}
