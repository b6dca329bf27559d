package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/runtime"
)

const (
	// packReadAhead is the kernel's readahead in files, in KiB, for the time of a start
	// with a pack, packStart: a pack has exactly what was read in a run without
	// readahead, and what else the kernel read would be fetched for it.
	packReadAhead = 4
	packStart     = 10 * time.Second

	// packTime is how long a mount waits for the table of a pack, so that the
	// first reads are not asked for in vain.
	packTime = 250 * time.Millisecond

	// refusedFor is how long a pack in which something was wrong is not asked for
	// again: each start would fetch it in vain. Its bytes may have been spoiled on their
	// way alone, so it is not for ever.
	refusedFor = 24 * time.Hour
)

// landing is what comes into a mount before it is asked for: a start pack, or what
// other nodes have shared, or nothing.
type landing struct {
	pack  *reader.Pack
	ctx   context.Context // ends with stop
	end   context.CancelFunc
	known chan struct{} // closed when it is known what comes
	ended chan struct{} // closed when it has ended and readers read on without it
}

// land has the pack of a use, if there is one, read into the pool.
func (s *server) land(u *use, im *fill.Image, start *reader.Start) *landing {
	l := &landing{pack: u.pack, known: make(chan struct{}), ended: make(chan struct{})}
	l.ctx, l.end = context.WithCancel(context.Background())
	tell := sync.OnceFunc(func() { close(l.known) })
	u.pack = nil
	switch {
	case l.pack != nil:
	case u.traced && start != nil:
		tell()
		go func() {
			defer close(l.ended)
			s.prefetch(l.ctx, u, im, &reader.Start{Args: start.Args, Any: start.Any, Entrypoint: u.hasEntrypoint()})
		}()
		return l
	default:
		if u.packed {
			im.Landed()
		}
		tell()
		close(l.ended)
		return l
	}
	go func() {
		defer close(l.ended)
		defer l.pack.Close()
		defer tell()
		r, err := l.pack.Reader()
		if err == nil {
			err = im.Land(l.ctx, r, tell)
		}
		switch {
		case err == nil:
			err = s.store.landed(l.ctx, u.ManifestDigest, l.pack.Blob.Digest)
		case reader.OfNoUse(err):
			err = errors.Join(err, s.store.refuse(l.ctx, u.ManifestDigest, l.pack.Blob.Digest))
		}
		if err != nil && l.ctx.Err() == nil {
			s.log.Warn("a start pack is of no use, or of less", "digest", l.pack.Blob.Digest, "ref", u.repo.Ref().String(), "err", err)
		}
	}()
	return l
}

// wait returns when it is known what comes, soon in any case.
func (l *landing) wait(ctx context.Context) {
	t := time.NewTimer(packTime)
	defer t.Stop()
	select {
	case <-l.known:
	case <-t.C:
	case <-ctx.Done():
	}
}

// stop ends the landing, also before its time.
func (l *landing) stop() {
	l.end()
	if l.pack != nil {
		l.pack.Stop()
	}
	<-l.ended
}

// start is what the mount is for; nil if nothing is to come along.
func (a *mountArgs) start() *reader.Start {
	if a.NoPack || a.Rehearsal {
		return nil
	}
	return &reader.Start{Args: a.Command, Any: a.AnyCommand}
}

// process is what an image's config says of the process that a container runs.
func (r *record) process() runtime.ImageConfig {
	var c struct {
		Config runtime.ImageConfig `json:"config"`
	}
	_ = json.Unmarshal(r.config, &c) // one that says nothing of it
	return c.Config
}

// hasEntrypoint tells whether what is said behind the image's name is arguments of a
// program of its own.
func (r *record) hasEntrypoint() bool { return len(r.process().Entrypoint) > 0 }

// program returns the program that a command behind the image's name runs, "" if there is
// none, and where the image looks for it.
func (r *record) program(command []string) (name string, dirs []string) {
	f := runtime.Flags{Args: command}
	if len(command) > 0 {
		if own, ok := strings.CutPrefix(command[0], reader.OtherEntrypoint); ok {
			f.Entrypoint, f.Args = &own, command[1:]
		}
	}
	c, err := runtime.Merge(r.process(), f)
	if err != nil {
		return "", nil
	}
	path := runtime.DefaultPath
	for _, e := range c.Env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	return c.Args[0], strings.Split(path, ":")
}

// awaitStart does endStart when it is time to.
func (m *mounted) awaitStart() {
	select {
	case <-time.After(time.Until(m.since.Add(packStart))):
		m.endStart()
	case <-m.gone:
	}
}

// prefetch fetches what other nodes have read of an image at such a start, where
// there is no pack that says it better.
func (s *server) prefetch(ctx context.Context, u *use, im *fill.Image, start *reader.Start) {
	wanted, err := s.shared(ctx, u, start)
	if err != nil {
		if ctx.Err() == nil {
			s.log.Warn("shared traces are of no use", "ref", u.repo.Ref().String(), "err", err)
		}
		return
	}
	im.FetchInOrder(ctx, wanted)
}

// openPack begins to fetch the start pack that fits, of an image whose packs the
// node knows, unless it was here before.
func (u *use) openPack(ctx context.Context, start *reader.Start) {
	if start == nil {
		return
	}
	p := start.Choose(slices.DeleteFunc(slices.Clone(u.Packs), func(p reader.PackRef) bool { return time.Now().Before(u.Refused[p.Blob.Digest]) }))
	u.packed = p != nil
	if p != nil && u.pack == nil && !slices.Contains(u.Landed, p.Blob.Digest) {
		u.pack = reader.OpenPack(context.WithoutCancel(ctx), u.repo, *p, u.ManifestDigest)
	}
}

// landed notes that all of a start pack has come.
func (s *store) landed(ctx context.Context, manifest, pack string) error {
	return s.notePack(ctx, manifest, func(rec *record) {
		if !slices.Contains(rec.Landed, pack) {
			rec.Landed = append(rec.Landed, pack)
		}
	})
}

// refuse notes that something is wrong with a start pack.
func (s *store) refuse(ctx context.Context, manifest, pack string) error {
	return s.notePack(ctx, manifest, func(rec *record) {
		if rec.Refused == nil {
			rec.Refused = map[string]time.Time{}
		}
		rec.Refused[pack] = time.Now().Add(refusedFor).UTC().Truncate(time.Second)
	})
}

func (s *store) notePack(ctx context.Context, manifest string, note func(*record)) error {
	unlock, err := s.lock(ctx, manifest)
	if err != nil {
		return err
	}
	defer unlock()
	rec, err := s.loadRecord(manifest)
	if err != nil {
		return err
	}
	note(rec)
	return s.saveRecord(rec)
}
