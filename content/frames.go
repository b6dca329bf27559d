package content

import (
	"context"
	"errors"
	"os"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/stream"
)

// maxFrames bounds the file that frames are decoded to, in bytes. Nothing of it is
// verified before it is used, so a source could make it as long as it likes.
const maxFrames = 16 << 30

// frames are what long frames decode to, one behind the other in a file without a name.
type frames struct {
	source blob.Source
	dir    string

	mu    sync.Mutex
	file  *os.File
	size  int64 // what is taken of it
	fails error // of the file: nothing is decoded any more
	known map[windowKey]*frame
}

type frame struct {
	done chan struct{} // closed when the others are set
	at   int64         // in the file
	err  error
}

// read fills p with what is at an offset of a blob's stream, if that lies in a long frame,
// or returns false: who reads it in another way finds out why.
func (f *frames) read(ctx context.Context, b *index.Blob, off int64, p []byte) bool {
	spans := b.Cover(off, off+int64(len(p)))
	if len(spans) != 1 || spans[0].Codec != chunk.Zstd || spans[0].Whole() {
		return false
	}
	s := spans[0]
	key := windowKey{b.Digest, s.Offset}
	f.mu.Lock()
	x := f.known[key]
	if x != nil {
		f.mu.Unlock()
		select {
		case <-x.done:
		case <-ctx.Done():
			return false
		}
	} else {
		x = &frame{done: make(chan struct{}), err: f.take(s.Size)}
		x.at = f.size - s.Size
		file := f.file
		f.known[key] = x
		f.mu.Unlock()
		if x.err == nil {
			x.err = f.decode(ctx, b, s, file, x.at)
		}
		if ctx.Err() != nil {
			f.mu.Lock()
			delete(f.known, key) // the next who asks tries again
			f.mu.Unlock()
		}
		close(x.done)
	}
	if x.err != nil {
		return false
	}
	_, err := f.file.ReadAt(p, x.at+off-s.Start)
	return err == nil
}

// take has room for size bytes at the end of the file. mu is held.
func (f *frames) take(size int64) (err error) {
	if f.fails != nil {
		return f.fails
	}
	if size > maxFrames-f.size {
		return index.ErrLimit
	}
	if f.file == nil {
		if f.file, err = os.CreateTemp(f.dir, ".shale-frames-"); err == nil {
			err = os.Remove(f.file.Name())
		}
		if f.fails = err; err != nil {
			return err
		}
	}
	f.size += size
	return nil
}

func (f *frames) decode(ctx context.Context, b *index.Blob, s index.Span, to *os.File, at int64) error {
	body, err := f.source.Range(ctx, blob.Ref{Digest: b.Digest, Size: b.Size}, s.Offset, s.Length)
	if err != nil {
		return err
	}
	defer body.Close()
	r, err := stream.NewReader(body, []index.Span{s}, s.Start, s.End(), nil)
	if err != nil {
		return err
	}
	defer r.Close()
	for r.Pos() < s.End() {
		pos := r.Pos()
		p, err := r.Next(int(min(s.End()-pos, 128<<10)))
		if err != nil {
			return err
		}
		if _, err := to.WriteAt(p, at+pos-s.Start); err != nil { // the disk is full: nobody else shall suffer
			f.mu.Lock()
			defer f.mu.Unlock()
			f.fails = err
			return errors.Join(err, to.Truncate(0))
		}
	}
	return nil
}
