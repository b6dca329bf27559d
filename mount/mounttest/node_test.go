package mounttest

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/mount/fusedev"
	"github.com/shale-image/shale/pool"
)

var options = mount.Options{
	Options: fusedev.Options{Name: "mounttest", ReadTimeout: 20 * time.Second, Logger: slog.New(slog.DiscardHandler)},
	Watch:   func(mount.Watching) error { return nil }, // nobody: package daemon has a keeper
}

// stored is an image in whatever form: its index, and what its bytes come from.
type stored struct {
	tree  *index.Tree
	blobs map[string][]byte       // by digest
	here  map[chunk.Digest][]byte // what is in the pool from the beginning
}

// store links an image below a directory, where any process can open it.
func store(t testing.TB, dir string, s stored) {
	t.Helper()
	for digest, b := range s.blobs {
		must(t, os.WriteFile(filepath.Join(dir, digest[len("sha256:"):]), b, 0o644))
	}
	hangs := "" // no other tree has the file
	if ino, err := s.tree.Lookup(hung); err == nil {
		hangs = s.tree.Blobs[s.tree.Chunks[ino.Extents[0].Chunk].Blob].Digest
	}
	must(t, os.WriteFile(filepath.Join(dir, hung), []byte(hangs), 0o644))
	p, err := pool.Open(filepath.Join(dir, "pool"))
	must(t, err)
	if len(s.here) > 0 {
		b, err := p.Build()
		must(t, err)
		for d, data := range s.here {
			must(t, b.Add(d, data))
		}
		_, err = b.Commit()
		must(t, err)
	}
	must(t, link.Link(t.Context(), s.tree, p, filepath.Join(dir, "linked")))
	must(t, p.Close())
}

// node is an opened store: an image whose data come from files when they are
// asked for.
type node struct {
	pool   *pool.Pool
	linked *link.Image
	fill   *fill.Image
	source *source
}

func open(dir string) (*node, error) {
	p, err := pool.Open(filepath.Join(dir, "pool"))
	if err != nil {
		return nil, err
	}
	l, err := link.Open(filepath.Join(dir, "linked"))
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	blob, err := os.ReadFile(filepath.Join(dir, hung))
	if err != nil {
		return nil, errors.Join(err, l.Close(), p.Close())
	}
	n := &node{pool: p, linked: l, source: &source{dir: dir, hung: string(blob)}}
	n.fill, err = fill.New(p, fill.Options{}).Open(l, n.source)
	return n, err
}

func (n *node) close() error { return errors.Join(n.fill.Close(), n.pool.Close()) }

func (n *node) image() mount.Image {
	missing := n.fill.Missing().Chunks
	im := mount.Image{Meta: filepath.Join(n.linked.Dir, "meta"), Content: n.fill, Complete: missing == 0}
	for _, s := range n.linked.Segments {
		segment, _ := n.pool.Segment(s.ID)
		im.Segments, im.Flat = append(im.Segments, segment.Path()), append(im.Flat, s.Flat)
	}
	return im
}

// source is a blob.Source over files.
type source struct {
	dir     string
	hung    string // blob whose requests may hang
	hanging atomic.Pointer[hanging]
	failing atomic.Bool
}

// hanging makes requests hang.
type hanging struct {
	told    func()        // of each, when it starts to
	release chan struct{} // ends it
}

var errInjected = errors.New("injected")

func (s *source) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if s.failing.Load() {
		return nil, errInjected
	}
	if h := s.hanging.Load(); h != nil && ref.Digest == s.hung {
		h.told()
		select {
		case <-ctx.Done():
		case <-h.release:
		}
		return nil, errInjected
	}
	f, err := os.Open(filepath.Join(s.dir, ref.Digest[len("sha256:"):]))
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, off, n), f}, nil
}

// show mounts an image on a directory, which goes away with the test.
func show(t testing.TB, face mount.Face, im mount.Image) (string, *mount.Mounted) {
	t.Helper()
	return showWith(t, face, im, options)
}

func showWith(t testing.TB, face mount.Face, im mount.Image, o mount.Options) (string, *mount.Mounted) {
	t.Helper()
	m, err := face.Mount(t.Context(), im, o)
	must(t, err)
	dir := t.TempDir()
	t.Cleanup(func() {
		m.Close()
		unix.Unmount(dir, unix.MNT_DETACH)
		m.Abort()
		wait(t, "the mount's end", m.Done())
	})
	must(t, mount.Attach(m.FD(), dir))
	must(t, m.Close())
	return dir, m
}

// wait fails the test if ch is not closed; the time only bounds a hang.
func wait(t testing.TB, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: nothing after 30 s", what)
	}
}

// within fails the test if f hangs.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	wait(t, what, done)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
