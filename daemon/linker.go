package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// An index is read and linked in a process of its own, and so are layers that
// have none. That takes the memory of the whole tree, which the service, that
// stays, need not have; and whatever hostile bytes do to it, the service's
// mounts live on (child.go).

// order is what to link where.
type order struct {
	Raw  reader.Raw `json:"raw"`
	Pool string     `json:"pool"` // directory
	Dir  string     `json:"dir"`  // to link into
}

// readOrder reads an order, and opens the pool, which the caller closes.
func readOrder() (o order, p *pool.Pool, err error) {
	if err = json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return o, nil, err
	}
	o.Raw.File = os.NewFile(firstFile, o.Raw.Name)
	p, err = pool.OpenTables(o.Pool)
	return o, p, err
}

// readTree reads the index of an order. What of the content has come with it goes
// into the pool.
func (o *order) readTree(p *pool.Pool) (*index.Tree, error) {
	if o.Raw.Kind != reader.SOCI {
		return o.Raw.Tree()
	}
	b, err := p.Build()
	if err != nil {
		return nil, err
	}
	o.Raw.Keep = b.Add
	t, err := o.Raw.Tree()
	if err != nil {
		return nil, errors.Join(err, b.Abort())
	}
	_, err = b.Commit()
	return t, err
}

func linker() (err error) {
	o, p, err := readOrder()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	t, err := o.readTree(p)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := keepData(filepath.Join(filepath.Dir(o.Dir), sideDir), t); err != nil {
		return err
	}
	return link.Link(ctx, t, p, o.Dir)
}

// keepData keeps what a tree has of blobs that no repository has.
func keepData(dir string, t *index.Tree) error {
	for i := range t.Blobs {
		if b := &t.Blobs[i]; b.Data != nil {
			if err := keepBeside(dir, b.Digest, bytes.NewReader(b.Data)); err != nil {
				return err
			}
		}
	}
	return nil
}

// linkRaw has an index read and linked into dir. It appears whole or not at all.
func (s *store) linkRaw(ctx context.Context, raw *reader.Raw, dir string) error {
	defer s.pool.Exclusive()()
	if err := ctx.Err(); err != nil {
		return err
	}
	err := s.child(ctx, "shale-linker", order{Raw: *raw, Pool: s.poolDir, Dir: dir}, raw.File)
	// What a process made that was killed is the pool's too: the next link of
	// the image refers to it, or the next removal frees it.
	loaded := s.pool.Load()
	if err != nil {
		return fmt.Errorf("link %s: %w", raw.Name, err)
	}
	return loaded
}
