package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/index"
)

// besides gives out the windows of a request's spans in their order, each as it comes: the
// first span is decoded while those of the others are still on their way.
type besides struct {
	ends *ends
	blob blob.Ref
	at   int64 // where in the blob the next byte is that comes
	end  int64 // behind the last
	done chan struct{}
	body io.ReadCloser // set, or err, when done is closed
	err  error

	failed error         // the last window
	wait   time.Duration // for one window
	late   func()        // is called then
	ctx    context.Context
	cancel context.CancelFunc
}

// besides begins to fetch what lies beside spans, but for what is kept. Close it.
func (im *Image) besides(ctx context.Context, source blob.Source, ends *ends) *besides {
	n, off, length := index.Beside(ends.spans)
	off, length = ends.windows(off, length)
	b := &besides{ctx: ctx, ends: ends, at: off, end: off + length, done: make(chan struct{}), wait: im.rescue.patience(), late: func() {}}
	if length == 0 {
		close(b.done)
		return b
	}
	b.blob = im.blob(int(n))
	im.stats.request(length)
	ctx, b.cancel = context.WithCancel(ctx)
	go func() {
		defer close(b.done)
		b.body, b.err = source.Range(ctx, b.blob, off, length)
	}()
	return b
}

// window is stream.Options.More.
func (b *besides) window(_ uint32, off, length int64) ([]byte, error) {
	if p, err := b.ends.window(b.ctx, off); p != nil || err != nil {
		return p, err
	}
	late := time.AfterFunc(b.wait, b.late)
	p, err := b.read(off, length)
	late.Stop()
	if err != nil {
		b.failed = fmt.Errorf("windows at offset %d of blob %s: %w", off, b.blob.Digest, err)
		return nil, b.failed
	}
	b.ends.windowCame(off, p)
	return p, nil
}

func (b *besides) read(off, length int64) ([]byte, error) {
	<-b.done
	switch {
	case b.err != nil:
		return nil, b.err
	case b.body == nil || off < b.at || off+length > b.end:
		return nil, fmt.Errorf("%w: %d bytes are not beside the spans", index.ErrCorrupt, length)
	}
	_, err := io.CopyN(io.Discard, b.body, off-b.at)
	p := make([]byte, length)
	if err == nil {
		_, err = io.ReadFull(b.body, p)
	}
	if b.at = off + length; errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}

// reject tells the place that the windows came from that they may be wrong.
func (b *besides) reject() []blob.Source {
	select {
	case <-b.done:
		if b.body != nil {
			return blob.Reject(b.body)
		}
	default: // nothing came of it
	}
	return nil
}

// close ends the request, and waits for it.
func (b *besides) close() {
	if b.cancel != nil {
		b.cancel()
	}
	<-b.done
	if b.body != nil {
		b.body.Close()
	}
}
