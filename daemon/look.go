package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
)

// Looked is an image that the node has, for who only looks into it: read from the root
// directory by the caller itself, with or without a service, and without its registry as
// far as content is here. It is content.AtHand.
type Looked struct {
	ManifestDigest string
	Tree           *index.Tree

	linked *link.Image
	beside beside
	more   blob.Source
	pool   string

	mu   sync.Mutex
	data map[uint32]*os.File // nil of what is no more
}

// Look opens an image that the node of a root directory knows by this name or digest. more
// is asked for what is not here. The error wraps os.ErrNotExist if the node does not know
// it, or has found its index to be wrong.
func Look(root string, ref image.Ref, platform string, more blob.Source) (*Looked, error) {
	s := &store{
		dir: filepath.Join(root, "images"), refs: filepath.Join(root, "refs.json"), poolDir: poolDir(root),
		names: map[string]string{},
	}
	if err := s.readNames(); err != nil {
		return nil, err
	}
	digest, ok := s.names[nameKey(ref.String(), platform)]
	if !ok {
		p, err := image.WantedPlatform(platform)
		if err != nil {
			return nil, err
		}
		if digest = s.byDigest(ref, p, func(*record) bool { return true }); digest == "" {
			return nil, fmt.Errorf("%s: %w", ref, os.ErrNotExist)
		}
	}
	rec, err := s.loadRecord(digest)
	if err != nil {
		return nil, err
	}
	if rec.Wrong != "" || rec.Doubted != "" {
		return nil, fmt.Errorf("%s: its index is wrong: %w", ref, os.ErrNotExist)
	}
	l := &Looked{ManifestDigest: digest, more: more, pool: s.poolDir, data: map[uint32]*os.File{}}
	if l.linked, err = s.link(rec); err != nil {
		return nil, err
	}
	if err = l.linked.Verify(); err == nil {
		l.Tree, err = l.linked.Tree()
	}
	if err != nil {
		return nil, errors.Join(err, l.linked.Close())
	}
	l.beside = openBeside(s.path(digest))
	return l, nil
}

// readNames reads refs.json; one that is not there, or damaged, has none.
func (s *store) readNames() error {
	js, err := os.ReadFile(s.refs)
	if err != nil {
		return err
	}
	var read map[string]string
	if err := json.Unmarshal(js, &read); err != nil {
		return fmt.Errorf("%s: %w: %v", s.refs, index.ErrCorrupt, err)
	}
	s.takeNames(read)
	return nil
}

// Close releases the image.
func (l *Looked) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.data {
		f.Close()
	}
	l.beside.close()
	return l.linked.Close()
}

// Chunk implements content.AtHand.
func (l *Looked) Chunk(_ context.Context, t *index.Tree, chunk uint32, p []byte) bool {
	if t != l.Tree {
		return false
	}
	s, off := l.linked.Segment(l.linked.Chunk(int(chunk)).Flat)
	l.mu.Lock()
	f, known := l.data[s.ID]
	if !known {
		f, _ = pool.OpenData(l.pool, s.ID)
		l.data[s.ID] = f
	}
	l.mu.Unlock()
	if f == nil {
		return false
	}
	_, err := f.ReadAt(p, off)
	return err == nil
}

// Range implements blob.Source.
func (l *Looked) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return l.beside.or(ctx, l.more, ref, off, n)
}
