package reader

import (
	"context"
	"os"
	"slices"
	"strconv"

	"github.com/shale-image/shale/image"
)

// The annotations of an index's artifact, which the list of referrers repeats, say what it
// will be asked for: so that needs not wait for the manifest.
const (
	indexDigest = "io.github.shale-image.index.digest"
	indexSize   = "io.github.shale-image.index.size"
)

// early is an index that is fetched by the word of the list, while the manifest is that has
// to say the same.
type early struct {
	d      image.Descriptor
	file   *os.File
	cancel context.CancelFunc
	done   chan error
}

// fetchEarly begins to fetch the first index of a list that may be believed, nil if the list
// does not tell of one. The caller calls close.
func fetchEarly(ctx context.Context, repo *image.Repository, img *image.Image, found []image.Referrer, o Options) *early {
	for _, r := range found {
		size, err := strconv.ParseInt(r.Annotations[indexSize], 10, 64)
		d := image.Descriptor{MediaType: IndexMediaType, Digest: r.Annotations[indexDigest], Size: size}
		switch {
		case err != nil || size <= 0 || size > maxIndex || !reSHA256.MatchString(d.Digest):
		case slices.Contains(o.refuted, d.Digest):
		case !o.Trust.Allows(Repository) && img.Annotations[BoundIndex] != d.Digest:
		default:
			f, err := scratch(o.TempDir)
			if err != nil {
				return nil
			}
			e := &early{d: d, file: f, done: make(chan error, 1)}
			ctx, e.cancel = context.WithCancel(ctx)
			go func() { e.done <- besideBlob(ctx, repo, d, f, 0) }()
			return e
		}
	}
	return nil
}

// take waits for the index if it is the one that d names, and returns its file. Another is
// given up: then there is none.
func (e *early) take(d image.Descriptor) (*os.File, error) {
	if e == nil || e.file == nil || d.Digest != e.d.Digest || d.Size != e.d.Size {
		e.close()
		return nil, nil
	}
	f := e.file
	e.file = nil
	err := <-e.done
	e.cancel()
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// close gives up an index that nobody has taken.
func (e *early) close() {
	if e != nil && e.file != nil {
		e.cancel()
		<-e.done
		e.file.Close()
		e.file = nil
	}
}
