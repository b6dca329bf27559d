package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/keeper"
)

// dispatch carries out one request. Descriptors it returns are closed once
// they are sent.
func (s *server) dispatch(ctx context.Context, c *net.UnixConn, caller keeper.Peer, q request) (any, []*os.File, error) {
	switch q.Op {
	case "pull", "mount", "remove", "plan", "pin", "prune":
		defer s.beginWork()()
	}
	switch q.Op {
	case "status":
		return s.status(), nil, nil
	case "pull":
		var a pullArgs
		if err := errors.Join(json.Unmarshal(q.Args, &a), a.by(caller)); err != nil {
			return nil, nil, err
		}
		out, err := s.pull(ctx, a, tell(c))
		return out, nil, err
	case "plan":
		var a Source
		if err := errors.Join(json.Unmarshal(q.Args, &a), a.by(caller)); err != nil {
			return nil, nil, err
		}
		out, err := s.plan(ctx, a)
		return out, nil, err
	case "mount":
		var a mountArgs
		if err := errors.Join(json.Unmarshal(q.Args, &a), a.by(caller)); err != nil {
			return nil, nil, err
		}
		return s.mount(ctx, a, tell(c))
	case "abort", "wait":
		var a deviceArgs
		if err := json.Unmarshal(q.Args, &a); err != nil {
			return nil, nil, err
		}
		m, err := s.mountOf(a.Dev)
		if err != nil {
			return nil, nil, err
		}
		if q.Op == "abort" {
			return nil, nil, m.fs.Abort()
		}
		select {
		case <-m.gone:
			return nil, nil, nil
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	case "remove":
		var a removeArgs
		if err := json.Unmarshal(q.Args, &a); err != nil {
			return nil, nil, err
		}
		out, err := s.store.remove(ctx, a.Ref)
		return out, nil, err
	case "pin":
		var a pinArgs
		if err := json.Unmarshal(q.Args, &a); err != nil {
			return nil, nil, err
		}
		out, err := s.store.pin(ctx, a)
		return out, nil, err
	case "prune":
		var a pruneArgs
		if err := json.Unmarshal(q.Args, &a); err != nil {
			return nil, nil, err
		}
		out, err := s.store.prune(ctx, a.All)
		return out, nil, err
	case "scrub":
		out, err := s.scrub(ctx, tell(c))
		return out, nil, err
	case "df":
		out, err := s.store.df()
		return out, nil, err
	case "complete":
		var a completeArgs
		if err := json.Unmarshal(q.Args, &a); err != nil {
			return nil, nil, err
		}
		return nil, nil, s.waitComplete(ctx, a.ManifestDigest, tell(c))
	case "trace":
		var a traceArgs
		if err := json.Unmarshal(q.Args, &a); err != nil {
			return nil, nil, err
		}
		out, err := s.trace(ctx, a)
		return out, nil, err
	case "stop":
		return nil, nil, s.stopUnused()
	}
	return nil, nil, fmt.Errorf("request %q: %w by this service (version %s)", q.Op, index.ErrUnsupported, s.cfg.Version)
}

// stopUnused ends the service unless somebody would miss it.
func (s *server) stopUnused() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.served(); n > 0 {
		return fmt.Errorf("%d images are mounted: %w", n, ErrBusy)
	}
	if s.work > 0 {
		return fmt.Errorf("%d images are being pulled, mounted or removed: %w", s.work, ErrBusy)
	}
	s.ending = true // no call slips in before the socket is closed
	s.stop()
	return nil
}

// tell sends progress to a client, ten times a second at most. What a client
// does not take at once it does not get: it may be stopped, and work goes on.
func tell(c *net.UnixConn) func(Progress) {
	var (
		mu   sync.Mutex
		next time.Time
	)
	return func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		if p.Note == "" && p.Done < p.Total && now.Before(next) {
			return
		}
		next = now.Add(100 * time.Millisecond)
		js, _ := json.Marshal(p)
		send(c, progressTime, kindProgress, js)
	}
}

func (s *server) pull(ctx context.Context, a pullArgs, progress func(Progress)) (*Pulled, error) {
	u, im, err := s.pullImage(ctx, a.Source, nil, progress)
	if err != nil {
		return nil, err
	}
	if a.Complete && s.store.comparable(u.ManifestDigest) {
		// Somebody's word was taken for what the layers say. Now they are read.
		s.store.breakOff(u.ManifestDigest)
		wrong, err := s.store.reread(ctx, u.ManifestDigest, u.repo, "it has been read as a whole", nil, progress)
		if wrong != "" {
			progress(Progress{Note: "the index beside the image is wrong, and no longer used: " + wrong})
			s.log.Error("an index lies", "digest", u.ManifestDigest, "how", wrong)
		}
		err = errors.Join(err, im.Close(), u.Close())
		if err == nil {
			a.Refresh = false
			u, im, err = s.pullImage(ctx, a.Source, nil, progress)
		}
		if err != nil {
			return nil, err
		}
	}
	defer u.Close()
	defer im.Close()
	if a.Complete {
		defer s.store.hold(u.ManifestDigest)() // or its end would push its beginning out
	}
	missing := im.Missing()
	if a.Complete && missing.Chunks > 0 {
		var done atomic.Int64
		total := missing.Content
		err := im.Complete(ctx, func(n int64) { progress(Progress{Done: done.Add(n), Total: total}) })
		if err != nil {
			return nil, err
		}
		if err := s.pool.Sync(); err != nil {
			return nil, err
		}
		missing = im.Missing()
	}
	s.compare(u, im)
	out := u.pulled(a.Ref)
	out.ContentBytes, out.MissingBytes = im.ContentBytes(), missing.Stored
	return &out, nil
}

func (s *server) status() *Status {
	now := s.started
	u := s.pool.Usage()
	st := &Status{
		Root: s.cfg.Root, Version: s.cfg.Version, Started: &now, Pool: &u,
		Processes: []Process{},
		Mounts:    []MountStatus{}, Images: s.store.list(), Full: s.engine.Full(),
	}
	if pid := s.keeper.Keeper(); pid != 0 {
		st.Processes = append(st.Processes, Process{RoleKeeper, pid})
	}
	st.Processes = append(st.Processes, Process{RoleWorker, os.Getpid()})
	for _, m := range s.all() {
		if ms, ok := m.status(); ok {
			st.Mounts = append(st.Mounts, ms)
		}
	}
	sortMounts(st.Mounts)
	return st
}

// all lists the mounts, so that nobody has to wait for what is done with them.
func (s *server) all() []*mounted {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.mounts))
}

func (s *server) mountOf(dev uint64) (*mounted, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.mounts {
		if m.dev == dev {
			return m, nil
		}
	}
	return nil, fmt.Errorf("no mount of this service has device number %d: %w", dev, blob.ErrNotFound)
}
