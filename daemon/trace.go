package daemon

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/replace"
	"github.com/shale-image/shale/trace"
)

// traceFile is, in the directory of an image, what its runs on this node have
// read: docs/formats/trace.md.
const traceFile = "trace"

// badFile is one that could not be read.
const badFile = "trace.bad"

// maxAsked is how many touches are looked at that are not kept yet.
const maxAsked = 1 << 19

// MountTrace is what was read through a mount until now. The service has to
// serve it (any face but direct), else blob.ErrNotFound.
func (c *Client) MountTrace(ctx context.Context, id string) (*trace.Trace, error) {
	return c.trace(ctx, traceArgs{Mount: id})
}

// ImageTrace is what runs of an image on this node have read, those that still
// run included. platform is what it was pulled for, "" if any will do. If there
// is nothing, it is blob.ErrNotFound.
func (c *Client) ImageTrace(ctx context.Context, ref, platform string) (*trace.Trace, error) {
	return c.trace(ctx, traceArgs{Ref: ref, Platform: platform})
}

func (c *Client) trace(ctx context.Context, a traceArgs) (*trace.Trace, error) {
	var js json.RawMessage
	if _, err := c.call(ctx, "trace", a, &js, nil); err != nil {
		return nil, err
	}
	return trace.Decode(bytes.NewReader(js), "the node service's trace")
}

type traceArgs struct {
	Mount    string `json:"mount,omitempty"` // id; else
	Ref      string `json:"ref,omitempty"`
	Platform string `json:"platform,omitempty"`
}

// recording is what was read through one mount, by address.
type recording struct {
	Run     trace.Run     `json:"run"`
	Touches []trace.Touch `json:"touches"`
	MetaSum string        `json:"meta_blake3"` // of the linked image that has the addresses

	manifest string
	share    *Source // where to push it to, if it is shared
}

// recording copies what was read. The image is open.
func (m *mounted) recording() *recording {
	r := &recording{MetaSum: m.image.Linked().MetaSum, manifest: m.use.ManifestDigest}
	r.Run = trace.Run{
		ID: m.id, Command: m.asked.command(), Started: m.since.UTC().Round(0), Arch: runtime.GOARCH, CPU: cpuModel(),
		ReadAhead: cmp.Or(m.asked.ReadAheadKiB, mount.ReadAhead),
	}
	if m.asked.Quiet || m.face == fanotifyFace { // it was given as much, or is the kernel's
		r.Run.ReadAhead = 128
	}
	if m.asked.ShareTraces {
		r.share = &m.asked.Source
	}
	r.Touches, r.Run.Lost = m.image.Touched()
	return r
}

// command is the command, as much of it as is worth keeping.
func (p *Place) command() (out []string) {
	const words, long = 16, 200
	for _, w := range p.Command[:min(len(p.Command), words)] {
		if len(w) > long {
			w = strings.ToValidUTF8(w[:long], "") + "..."
		}
		out = append(out, w)
	}
	return out
}

// keepLater has what was read kept, if anything was.
func (s *server) keepLater(r *recording) {
	if len(r.Touches) > 0 {
		s.traces.add(r)
	}
}

func (s *server) keepsTraces() bool { return s.cfg.Registries.Traces != config.TracesOff }

// trace answers a call.
func (s *server) trace(ctx context.Context, a traceArgs) (json.RawMessage, error) {
	digest := ""
	if a.Mount == "" {
		var err error
		if digest, err = s.store.named(a.Ref, a.Platform); err != nil {
			return nil, err
		}
	}
	var all []*recording
	for _, m := range s.all() {
		if m.fs.Served() && (m.id == a.Mount || digest != "" && m.use.ManifestDigest == digest && !m.asked.Unrecorded) {
			m.reading.RLock()
			if !m.ended {
				all = append(all, m.recording())
			}
			m.reading.RUnlock()
		}
	}
	if a.Mount != "" {
		if len(all) == 0 {
			return nil, fmt.Errorf("no mount that this service serves has the id %q: %w", a.Mount, blob.ErrNotFound)
		}
		return s.resolve(ctx, traceOrder{Recordings: all})
	}
	all = append(s.traces.of(digest), all...)
	if len(all) > 0 {
		if some := atATime(all, maxAsked); len(some) < len(all) {
			s.log.Warn("some of the runs that are under way are not looked at: they have read too much", "ref", a.Ref, "runs", len(all), "looked_at", len(some))
			all = some
		}
		return s.resolve(ctx, traceOrder{Kept: true, Recordings: all})
	}
	js, err := os.ReadFile(filepath.Join(s.store.path(digest), traceFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no run of %s has been recorded on this node: %w", a.Ref, blob.ErrNotFound)
	}
	return js, err
}

// named returns the manifest digest that a reference has on this node.
func (s *store) named(reference, platform string) (string, error) {
	ref, err := image.ParseRef(reference)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if d, ok := s.names[nameKey(ref.String(), platform)]; ok {
		return d, nil
	}
	if platform == "" {
		for key, d := range s.names {
			if name, _, _ := splitKey(key); name == ref.String() {
				return d, nil
			}
		}
	}
	return "", fmt.Errorf("%s: the node knows no such image: %w", ref, blob.ErrNotFound)
}

// keepTraces adds recordings of an image to what is kept of it.
func (s *server) keepTraces(ctx context.Context, all []*recording) error {
	digest := all[0].manifest
	unlock, err := s.store.lock(ctx, digest)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(filepath.Join(s.store.path(digest), "record")); err != nil {
		return nil // the image was removed meanwhile
	}
	if _, err = s.resolve(ctx, traceOrder{Kept: true, Keep: true, Recordings: all}); err != nil {
		return err
	}
	for _, r := range all {
		if r.share != nil {
			s.sharing.add(&recording{manifest: r.manifest, share: r.share}) // what was read is kept now
		}
	}
	return nil
}

// resolve has recordings of an image resolved, by a process of its own.
func (s *server) resolve(ctx context.Context, o traceOrder) (json.RawMessage, error) {
	o.Manifest = o.Recordings[0].manifest
	o.Dir = s.store.path(o.Manifest)
	return s.store.ask(ctx, "shale-tracer", o)
}

// traceOrder is what recordings to make sense of.
type traceOrder struct {
	Dir        string       `json:"dir"` // of the image
	Manifest   string       `json:"manifest"`
	Kept       bool         `json:"kept"` // merge with what is kept
	Keep       bool         `json:"keep"` // and keep that, instead of printing it
	Recordings []*recording `json:"recordings"`
}

// tracer is the process that finds chunks and files for recordings: that takes
// a walk through all metadata of the image. It lets others go first.
func tracer() error {
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
	var o traceOrder
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	t, err := o.merge()
	if err != nil || ctx.Err() != nil {
		return errors.Join(err, ctx.Err())
	}
	var b bytes.Buffer
	if err := t.Encode(&b); err != nil {
		return err
	}
	if o.Keep {
		return replace.File(filepath.Join(o.Dir, traceFile), b.Bytes(), 0o600)
	}
	_, err = os.Stdout.Write(b.Bytes())
	return err
}

func (o *traceOrder) merge() (*trace.Trace, error) {
	l, err := link.Open(filepath.Join(o.Dir, "linked"))
	if err != nil {
		return nil, err
	}
	defer l.Close()
	var all []*trace.Trace
	if o.Kept {
		t, err := o.kept()
		if err != nil {
			return nil, err
		}
		if t != nil {
			all = append(all, t)
		}
	}
	for _, r := range o.Recordings {
		if r.MetaSum != l.MetaSum { // the image was linked again since: the addresses mean nothing
			continue
		}
		t, err := trace.Resolve(l, o.Manifest, r.Run, r.Touches)
		if err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	if len(all) == 0 {
		return &trace.Trace{Manifest: o.Manifest}, nil
	}
	return trace.Merge(all...)
}

// kept is what is kept of the image, nil if that is nothing. A file that cannot be read
// is set aside before another takes its place.
func (o *traceOrder) kept() (*trace.Trace, error) {
	name := filepath.Join(o.Dir, traceFile)
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t, err := trace.Decode(f, name)
	if err == nil && t.Manifest != o.Manifest {
		err = index.Errorf(index.ErrCorrupt, name, -1, "it is a trace of %.100q, want %s", t.Manifest, o.Manifest)
	}
	switch {
	case err == nil:
		return t, nil
	case !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrUnsupported) && !errors.Is(err, index.ErrLimit):
		return nil, err // perhaps it can be read another time
	case o.Keep:
		bad := filepath.Join(o.Dir, badFile)
		if rerr := os.Rename(name, bad); rerr != nil {
			return nil, errors.Join(err, rerr)
		}
		slog.New(slog.NewTextHandler(os.Stderr, nil)).Warn("a trace cannot be read and is set aside: another is begun", "as", bad, "err", err)
	}
	return nil, nil
}

// cpuModel is the processor's name, "" if it is not told.
func cpuModel() string {
	p, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(p[:min(len(p), 4096)]) {
		if name, value, ok := bytes.Cut(line, []byte(":")); ok && string(bytes.TrimSpace(name)) == "model name" {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}
