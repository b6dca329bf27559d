package content

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

func TestCached(t *testing.T) {
	p := make([]byte, 5<<20+123)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	src := memblob.New(nil)
	ref := src.Put(p)
	var mu sync.Mutex
	requests, fail := 0, true
	src.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		mu.Lock()
		defer mu.Unlock()
		requests++
		if fail {
			return &memblob.Fault{After: -1, Err: blob.ErrUnavailable}
		}
		return nil
	}
	c := Cached(src, t.TempDir())
	if _, err := blob.ReadAll(t.Context(), c, ref, 0, 10); !errors.Is(err, blob.ErrUnavailable) {
		t.Fatal(err)
	}
	fail, requests = false, 0
	var wg sync.WaitGroup
	for range 4 {
		seed := r.Uint64()
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			for range 200 {
				off := r.Int64N(int64(len(p)))
				n := 1 + r.Int64N(min(int64(len(p))-off, 3<<20))
				got, err := blob.ReadAll(t.Context(), c, ref, off, n)
				if err != nil || !bytes.Equal(got, p[off:off+n]) {
					t.Errorf("%d bytes at %d: %v", n, off, err)
				}
			}
		})
	}
	wg.Wait()
	if requests > 6 {
		t.Errorf("%d requests for 6 windows", requests)
	}
	if _, err := blob.ReadAll(t.Context(), c, ref, int64(len(p))-5, 10); !errors.Is(err, blob.ErrRange) {
		t.Errorf("behind the end: %v", err)
	}
}

// TestLongFrame: a frame that is decoded from its start is fetched once, by whoever reads
// the files or chunks that are in it.
func TestLongFrame(t *testing.T) {
	const chunks, step = 64, 3 * size // with gaps
	plain := make([]byte, chunks*step)
	rand.NewChaCha8([32]byte{3}).Read(plain)
	var out bytes.Buffer
	z, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1))
	if err == nil {
		_, err = z.Write(plain)
	}
	if err = errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	src := memblob.New(nil)
	ref := src.Put(out.Bytes())
	b := index.Blob{Digest: ref.Digest, Size: ref.Size}
	b.Append(index.Span{Size: int64(len(plain)), Length: ref.Size, Codec: chunk.Zstd})
	tree := index.NewTree()
	tree.Blobs = []index.Blob{b}
	var all []uint32
	for i := range uint32(chunks) {
		at := int64(i) * step
		tree.Chunks = append(tree.Chunks, index.Chunk{Digest: chunk.Sum(chunk.BLAKE3, plain[at:at+size]), Size: size, Offset: at})
		all = append(all, chunks-1-i)
	}
	fetched := int64(0)
	src.Fault = func(_ context.Context, _ blob.Ref, _, n int64) *memblob.Fault {
		fetched += n
		return nil
	}
	got := 0
	check := func(n uint32, data []byte) error {
		if at := int64(n) * step; !bytes.Equal(data, plain[at:at+size]) {
			t.Errorf("chunk %d is wrong", n)
		}
		got++
		return nil
	}
	if err := Chunks(t.Context(), tree, src, all, check); err != nil || got != chunks || fetched != ref.Size {
		t.Errorf("%d chunks of %d, by %d bytes of %d; %v", got, chunks, fetched, ref.Size, err)
	}
	got, fetched = 0, 0
	c := Cached(src, t.TempDir())
	for _, n := range all { // each as a file by itself
		ino := &index.Inode{Size: size, Extents: []index.Extent{{Chunk: n}}}
		if err := Pieces(t.Context(), tree, c, ino, func(p Piece) error { return check(n, p.Data) }); err != nil {
			t.Fatal(err)
		}
	}
	if got != chunks || fetched != ref.Size {
		t.Errorf("%d chunks of %d, by %d bytes of %d", got, chunks, fetched, ref.Size)
	}
	// Windows are fetched once in any case; the frame has to be decoded once, too.
	decoded := c.(*cache).frames.known
	if x := decoded[windowKey{ref.Digest, 0}]; len(decoded) != 1 || x == nil || x.err != nil {
		t.Errorf("the frame was not decoded to a file: %v", decoded)
	}
	if err := Chunks(t.Context(), tree, Cached(src, "/nowhere"), all, check); err != nil { // it is read without a file
		t.Error(err)
	}
}
