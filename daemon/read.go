package daemon

import (
	"context"
	"errors"
	"io"
	"math"
	"path/filepath"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/count"
	"github.com/shale-image/shale/blob/dirblob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/image"
)

// origin is where a mount's bytes come from: the image's own repository, asked
// again when it stumbles. It counts what was asked of it, and what that took.
// What this node has made to lie beside the layers is on the node alone, and so are
// the ztocs it has fetched.
type origin struct {
	asked, made *count.Source
	beside      beside
}

// SourceStats is what the repository of an image was asked for, by one mount.
type SourceStats struct {
	Requests int64 `json:"requests"` // made, retries included
	Retries  int64 `json:"retries"`  // of them, those that repeat or continue one that failed
	Bytes    int64 `json:"bytes"`    // received
	Errors   int64 `json:"errors"`   // requests that failed or broke off
}

// newOrigin makes the origin of an image whose files are in dir. Passing faults are
// waited out for as long as a reader waits.
func newOrigin(repo *image.Repository, dir string, wait time.Duration) *origin {
	made := count.New(repo.Blobs())
	return &origin{count.New(retry.New(made, retry.Policy{Attempts: math.MaxInt, Total: wait})), made, openBeside(dir)}
}

func (o *origin) close() { o.beside.close() }

// Range implements blob.Source.
func (o *origin) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	return o.beside.or(ctx, o.asked, ref, off, n)
}

// beside is what lies beside an image on this node alone.
type beside []*dirblob.Source

func openBeside(dir string) (b beside) {
	for _, name := range []string{sideDir, ztocDir} {
		if d, err := dirblob.Open(filepath.Join(dir, name)); err == nil {
			b = append(b, d)
		}
	}
	return b
}

func (b beside) close() {
	for _, d := range b {
		_ = d.Close()
	}
}

// or is Range of these, and of src for what they lack.
func (b beside) or(ctx context.Context, src blob.Source, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	for _, d := range b {
		if r, err := d.Range(ctx, ref, off, n); !errors.Is(err, blob.ErrNotFound) {
			return r, err
		}
	}
	return src.Range(ctx, ref, off, n)
}

func (o *origin) stats() SourceStats {
	asked, made := o.asked.Stats(), o.made.Stats()
	return SourceStats{
		Requests: made.Requests, Retries: max(0, made.Requests-asked.Requests),
		Bytes: made.Bytes, Errors: made.Errors,
	}
}
