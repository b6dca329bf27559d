package fleet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/trace"
)

// parallel is how many requests are in flight: two round trips bring all that lie
// beside an image.
const parallel = 16

// each fetches what was listed, and has one called for each in the order of the list,
// with the digest of the artifact and its trace, or the reason why that is of no use.
// When maxPlain is read it leaves out the rest. At most one trace, and two times
// maxStored, are in memory. It fails if the repository cannot be read, or one does.
func each(ctx context.Context, repo *image.Repository, img *image.Image, found []image.Referrer, one func(string, *trace.Trace, error) error) error {
	left := int64(maxPlain)
	err := stored(ctx, repo, img, found, func(digest string, p []byte, err error) error {
		var t *trace.Trace
		if err == nil {
			t, err = decode(p, img.ManifestDigest, "trace "+digest, &left)
		}
		if err := one(digest, t, err); err != nil {
			return err
		}
		if left < 0 {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

var errEnough = errors.New("that is enough of it")

// stored is each before anything is decoded.
func stored(ctx context.Context, repo *image.Repository, img *image.Image, found []image.Referrer, one func(string, []byte, error) error) error {
	var fetching sync.WaitGroup
	defer fetching.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	layers, bad := make([]image.Descriptor, len(found)), make([]error, len(found))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, d := range found {
		g.Go(func() error {
			layers[i], bad[i] = layer(gctx, repo, img, d.Descriptor)
			if bad[i] != nil && !useless(bad[i]) {
				return bad[i]
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	type answer struct {
		stored []byte
		err    error
	}
	answers := make([]chan answer, len(found))
	for i := range answers {
		answers[i] = make(chan answer, 1)
	}
	room := semaphore.NewWeighted(2 * maxStored)
	requests := make(chan struct{}, parallel)
	fetching.Go(func() {
		for i, d := range layers {
			if bad[i] != nil {
				continue
			}
			if room.Acquire(ctx, d.Size) != nil { // in their order, or the first might wait for ever
				return
			}
			fetching.Go(func() {
				requests <- struct{}{}
				defer func() { <-requests }()
				p, err := fetch(ctx, repo, d)
				answers[i] <- answer{p, err}
			})
		}
	})
	for i, d := range found {
		a := answer{err: bad[i]}
		if a.err == nil {
			select {
			case a = <-answers[i]:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if a.err != nil && !useless(a.err) {
			return a.err
		}
		if err := one(d.Digest, a.stored, a.err); err != nil {
			return err
		}
		if bad[i] == nil {
			room.Release(layers[i].Size)
		}
	}
	return nil
}

// layer is where the trace of an artifact is.
func layer(ctx context.Context, repo *image.Repository, img *image.Image, d image.Descriptor) (l image.Descriptor, err error) {
	a, err := repo.Artifact(ctx, d, img.ManifestDigest)
	if err != nil {
		return l, err
	}
	name := "trace " + a.Digest
	if a.Type != ArtifactType || len(a.Layers) != 1 || a.Layers[0].MediaType != MediaType {
		return l, index.Errorf(index.ErrUnsupported, name, -1, "an artifact of type %.100q with %d layers, want %s and one of %s", a.Type, len(a.Layers), ArtifactType, MediaType)
	}
	if a.Layers[0].Size < 0 || a.Layers[0].Size > maxStored {
		return l, index.Errorf(index.ErrLimit, name, -1, "%d bytes, at most %d are read", a.Layers[0].Size, maxStored)
	}
	return a.Layers[0], nil
}

func fetch(ctx context.Context, repo *image.Repository, d image.Descriptor) ([]byte, error) {
	rc, err := repo.Blob(ctx, d)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// decode reads what encode made, a trace of a manifest, and takes the bytes that are
// read of it off left.
func decode(stored []byte, manifest, name string, left *int64) (*trace.Trace, error) {
	z, err := zstd.NewReader(bytes.NewReader(stored), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	plain := &source{r: z}
	t, err := trace.Decode(plain, name)
	*left -= plain.bytes
	if plain.err != nil {
		return nil, index.Errorf(index.ErrCorrupt, name, -1, "zstd: %v", plain.err)
	}
	if err == nil && t.Manifest != manifest {
		return nil, index.Errorf(index.ErrCorrupt, name, -1, "it is a trace of %.100q, want %s", t.Manifest, manifest)
	}
	return t, err
}

// source counts, and keeps the error of a reader.
type source struct {
	r     io.Reader
	bytes int64
	err   error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.bytes += int64(n)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}
