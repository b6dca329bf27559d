package fill

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pack"
	"github.com/shale-image/shale/pool"
)

// packOf makes a pack of blocks (flat addresses) of an image, and of others.
func (n *node) packOf(x *img, flats []int64, others ...[]byte) []byte {
	n.t.Helper()
	var blocks []pack.Block
	pieces := map[chunk.Digest][]byte{}
	for _, p := range others {
		d := chunk.Sum(chunk.BLAKE3, p)
		pieces[d] = p
		blocks = append(blocks, pack.Block{Chunk: pack.Chunk{Digest: d, Size: uint32(len(p))}})
	}
	for _, f := range flats {
		c := x.linked.Chunk(x.linked.Find(f))
		pieces[c.Digest] = n.pieces[c.Digest]
		blocks = append(blocks, pack.Block{Chunk: pack.Chunk{Digest: c.Digest, Size: c.Size}, Index: int((f - c.Flat) / chunk.Block)})
	}
	var out bytes.Buffer
	_, err := pack.Build(n.t.Context(), &out, []byte("index"), blocks, pack.Options{
		Content: func(_ context.Context, c pack.Chunk) ([]byte, error) { return pieces[c.Digest], nil },
	})
	must(n.t, err)
	return out.Bytes()
}

func reading(t testing.TB, r io.Reader) *pack.Reader {
	t.Helper()
	p, err := pack.NewReader(r, "pack")
	must(t, err)
	t.Cleanup(p.Close)
	return p
}

// blocks lists the flat addresses of all blocks of an image.
func (x *img) blocks() (all []int64) {
	for i := range x.linked.Chunks() {
		c := x.linked.Chunk(i)
		for b := c.Flat; b < c.Flat+int64(c.Size); b += chunk.Block {
			all = append(all, b)
		}
	}
	return all
}

func TestLand(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(300_000, 5, 40_000, 64<<10)
	x := n.image(b)
	all := x.blocks()
	hot := []int64{all[7], all[1], all[2], all[len(all)-1], all[0]}
	p := n.packOf(x, hot, []byte("of another image"))
	must(t, x.Land(t.Context(), reading(t, bytes.NewReader(p)), nil))
	for _, f := range hot {
		must(t, x.read(t.Context(), t, f, chunk.Block))
	}
	if asked := n.asked(); len(asked) > 0 {
		t.Errorf("%d requests for what the pack brought", len(asked))
	}
	if s := x.Stats(); s.PackBytes == 0 || s.Stalls > 0 {
		t.Errorf("%+v", s)
	}
	// The rest comes as always, and what is here of a chunk does no harm.
	x.all(t)
	// Nothing of it is missing: the pack need not be read.
	must(t, x.Land(t.Context(), reading(t, io.MultiReader(bytes.NewReader(p[:len(p)-500]), failing{})), nil))
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("read on") }

// gate is a reader that gives so many bytes, and more when it is told.
type gate struct {
	mu   sync.Mutex
	cond *sync.Cond
	p    []byte
	free int
}

func newGate(p []byte) *gate {
	g := &gate{p: p}
	g.cond = sync.NewCond(&g.mu)
	return g
}

func (g *gate) open(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.free += n
	g.cond.Broadcast()
}

func (g *gate) Read(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.free == 0 {
		g.cond.Wait()
	}
	if len(g.p) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), g.free)], g.p)
	g.p, g.free = g.p[n:], g.free-n
	return n, nil
}

// TestLandWaits: who reads what is due waits for it and asks for nothing, who
// reads what is not gets it by a request meanwhile.
func TestLandWaits(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(300_000, 300_000)
	x := n.image(b)
	all := x.blocks()
	p := n.packOf(x, []int64{all[2], all[9]})
	g := newGate(p)
	g.open(len(p) / 2)
	known, landed := make(chan struct{}), make(chan error, 1)
	go func() { landed <- x.Land(t.Context(), reading(t, g), func() { close(known) }) }()
	<-known
	read := make(chan error, 1)
	go func() { read <- x.read(t.Context(), t, all[9], 4096) }()
	must(t, x.read(t.Context(), t, all[len(all)-1], 100)) // of no pack
	if len(n.asked()) == 0 {
		t.Error("no request for what no pack brings")
	}
	select {
	case err := <-read:
		t.Fatalf("a read of what is due ended before it came: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := x.read(short, t, all[9], 4096); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a reader that gives up: %v", err)
	}
	x.settle()
	n.asked()
	g.open(len(p))
	must(t, <-read)
	must(t, <-landed)
	if asked := n.asked(); len(asked) > 0 {
		t.Errorf("requests %v for what the pack brought", asked)
	}
	if s := x.Stats(); s.PackWaits == 0 {
		t.Errorf("%+v: nobody waited", s)
	}
}

// TestLandBreaksOff: what a pack that breaks off, or lies, does not bring comes by
// requests, also to those who wait for it.
func TestLandBreaksOff(t *testing.T) {
	for name, spoil := range map[string]func(p []byte) io.Reader{
		"cut off":   func(p []byte) io.Reader { return bytes.NewReader(p[:len(p)-2000]) },
		"one bit":   func(p []byte) io.Reader { p[len(p)-3000] ^= 4; return bytes.NewReader(p) },
		"no source": func(p []byte) io.Reader { return io.MultiReader(bytes.NewReader(p[:len(p)-2000]), failing{}) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, Options{})
			b := newBuilder(chunk.Zstd)
			b.blob()
			b.files(300_000)
			x := n.image(b)
			all := x.blocks()
			p := n.packOf(x, all[1:9])
			var wg sync.WaitGroup
			err := x.Land(t.Context(), reading(t, spoil(p)), func() {
				for _, f := range all {
					wg.Go(func() {
						if err := x.read(t.Context(), t, f, 1000); err != nil {
							t.Error(err)
						}
					})
				}
			})
			if err == nil {
				t.Error("no word of it")
			} else if name != "no source" && !errors.Is(err, index.ErrCorrupt) {
				t.Errorf("%v, want ErrCorrupt", err)
			}
			wg.Wait()
		})
	}
}

// TestLandPatience: who wants the end of a long pack first does not wait for all
// of it.
func TestLandPatience(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(2*patience, 1000)
	x := n.image(b)
	all := x.blocks()
	p := n.packOf(x, all)
	g := newGate(p)
	g.open(len(p) / 10)
	ctx, cancel := context.WithCancel(t.Context())
	known, landed := make(chan struct{}), make(chan error, 1)
	go func() { landed <- x.Land(ctx, reading(t, g), func() { close(known) }) }()
	<-known
	must(t, x.read(t.Context(), t, all[len(all)-1], 1000))
	if len(n.asked()) == 0 {
		t.Error("no request")
	}
	cancel()
	g.open(len(p))
	if err := <-landed; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	x.all(t)
}

func TestLandYields(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(100_000, 100_000)
	x := n.image(b)
	all := x.blocks()
	p := n.packOf(x, all[:1])
	hold := make(chan struct{})
	n.setFault(func(context.Context, blob.Ref, int64, int64) *memblob.Fault { <-hold; return nil })
	read := make(chan error, 1)
	go func() { read <- x.read(t.Context(), t, all[len(all)-1], 10) }()
	for len(n.asked()) == 0 {
		time.Sleep(time.Millisecond)
	}
	landed := make(chan error, 1)
	go func() { landed <- x.Land(t.Context(), reading(t, bytes.NewReader(p)), nil) }()
	select {
	case err := <-landed:
		t.Errorf("a pack that nobody waits for does not yield to a request: %v", err)
	case <-time.After(30 * time.Millisecond):
	}
	must(t, x.read(t.Context(), t, all[0], 10)) // now somebody does
	must(t, <-landed)
	close(hold)
	must(t, <-read)
}

// A full disk ends the landing; what it did not bring comes as always.
func TestLandNoSpace(t *testing.T) {
	n := newNodeIn(t, smallDisk(t, "1m"), Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(4 << 20)
	x := n.image(b)
	p := n.packOf(x, x.blocks())
	if err := x.Land(t.Context(), reading(t, bytes.NewReader(p)), nil); !errors.Is(err, pool.ErrNoSpace) {
		t.Errorf("%v, want ErrNoSpace", err)
	}
	x.all(t)
}

// TestLandRefuses: a pack that is of something else is not used.
func TestLandRefuses(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(300_000)
	x := n.image(b)
	p := n.packOf(x, x.blocks()[:1], []byte("of another image"), bytes.Repeat([]byte("or"), chunk.Block))
	if err := x.Land(t.Context(), reading(t, bytes.NewReader(p)), nil); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
	if s := x.Stats(); s.PackBytes != 0 || x.led() {
		t.Errorf("%+v of a pack that was refused", s)
	}
	x.all(t)
}

// counted counts what is read.
type counted struct {
	r io.Reader
	n int
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}

// TestLandEnds: what stands behind all that is missing is not read.
func TestLandEnds(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(4 << 20)
	x := n.image(b)
	all := x.blocks()
	for _, f := range all[len(all)/4:] {
		must(t, x.read(t.Context(), t, f, chunk.Block))
	}
	p := n.packOf(x, all)
	read := &counted{r: bytes.NewReader(p)}
	must(t, x.Land(t.Context(), reading(t, read), nil))
	if read.n > len(p)/2 {
		t.Errorf("%d bytes of %d were read for the first quarter", read.n, len(p))
	}
	x.settle()
	n.asked()
	x.all(t)
	if asked := n.asked(); len(asked) > 0 {
		t.Errorf("%d requests for what was here", len(asked))
	}
}

// TestLandSpan: what a request decodes anyway is kept, also if a pack is to bring it, or
// the same span would be fetched for each of its chunks.
func TestLandSpan(t *testing.T) {
	n := newNode(t, Options{})
	b := newBuilder(chunk.Zstd)
	b.blob()
	b.files(2 * patience)
	b.batch(20_000, 30_000, 15_000, 9_000)
	x := n.image(b)
	all := x.blocks()
	p := n.packOf(x, all)
	g := newGate(p)
	g.open(len(p) / 10)
	ctx, cancel := context.WithCancel(t.Context())
	known, landed := make(chan struct{}), make(chan error, 1)
	go func() { landed <- x.Land(ctx, reading(t, g), func() { close(known) }) }()
	<-known
	last := x.linked.Chunks() - 1
	for i := last - 3; i <= last; i++ {
		must(t, x.read(t.Context(), t, x.linked.Chunk(i).Flat, 100))
	}
	if asked := n.asked(); len(asked) != 1 {
		t.Errorf("%d requests for one batch", len(asked))
	}
	cancel()
	g.open(len(p))
	if err := <-landed; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
