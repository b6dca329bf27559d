package convert

import (
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
)

// verify reads back what is about to be pushed: the tree the bootstrap says
// must be the tree that was read, and each chunk must decode to the content
// whose digest was taken when the layer was read.
func (c *converter) verify(ctx context.Context, boot *os.File) error {
	st, err := boot.Stat()
	if err != nil {
		return err
	}
	im, err := rafs.Open(boot, st.Size(), "bootstrap")
	if err != nil {
		return err
	}
	back, err := im.Tree()
	if err != nil {
		return err
	}
	if len(back.Blobs) != len(c.blobs) {
		return fmt.Errorf("%w: %d blobs, want %d", chunk.ErrCorrupt, len(back.Blobs), len(c.blobs))
	}
	for i, b := range back.Blobs {
		if b.Digest != c.blobs[i].digest {
			return fmt.Errorf("%w: blob %d is %s, want %s", chunk.ErrCorrupt, i, b.Digest, c.blobs[i].digest)
		}
	}
	if err := index.Equal(c.tree, back); err != nil {
		return err
	}
	return c.verifyChunks(ctx, back)
}

// verifyChunks decodes and digests every chunk where the bootstrap says it is.
func (c *converter) verifyChunks(ctx context.Context, t *index.Tree) error {
	g, ctx := errgroup.WithContext(ctx)
	const batch = 64
	next := make(chan int)
	g.Go(func() error {
		defer close(next)
		for i := 0; i < len(t.Chunks); i += batch {
			select {
			case next <- i:
			case <-ctx.Done():
				return ctx.Err()
			}
			c.o.Progress(Event{Layer: -1, What: "verify", Done: int64(i), Total: int64(len(t.Chunks))})
		}
		return nil
	})
	for range c.o.Workers {
		g.Go(func() error {
			var stored, data []byte
			for i := range next {
				for k := i; k < min(i+batch, len(t.Chunks)); k++ {
					ch := &t.Chunks[k]
					stored, data = grow(stored, ch.Length), grow(data, ch.Size)
					err := readFull(c.blobs[ch.Blob].file, stored, int64(ch.Offset))
					if err == nil {
						err = ch.Codec.Decode(data, stored)
					}
					if err == nil {
						err = ch.Digest.Verify(data)
					}
					if err != nil {
						return fmt.Errorf("blob %s: chunk at offset %d: %w", t.Blobs[ch.Blob].Digest, ch.Offset, err)
					}
				}
			}
			return nil
		})
	}
	return g.Wait()
}

func grow(b []byte, n uint32) []byte {
	if uint32(cap(b)) < n {
		return make([]byte, n)
	}
	return b[:n]
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	_, err := r.ReadAt(p, off)
	return err
}
