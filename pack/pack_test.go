package pack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// store is chunks by digest.
type store map[chunk.Digest][]byte

func (s store) add(a chunk.Algorithm, p []byte) Chunk {
	c := Chunk{chunk.Sum(a, p), uint32(len(p))}
	s[c.Digest] = p
	return c
}

func (s store) content(_ context.Context, c Chunk) ([]byte, error) { return s[c.Digest], nil }

// sample is chunks of all kinds, and blocks of them in a order that comes back to
// some.
func sample() (s store, blocks []Block) {
	s = store{}
	rnd := rand.New(rand.NewChaCha8([32]byte{3}))
	bytesOf := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(i >> 5)
			if i%100 == 0 {
				p[i] = byte(rnd.Uint32())
			}
		}
		return p
	}
	small := s.add(chunk.BLAKE3, bytesOf(100))
	full := s.add(chunk.BLAKE3, bytesOf(8*chunk.Block))
	odd := s.add(chunk.BLAKE3, bytesOf(3*chunk.Block+77))
	whole := s.add(chunk.BLAKE3, bytesOf(2*chunk.Block))
	foreign := s.add(chunk.SHA256, bytesOf(2*chunk.Block+5))
	block := func(c Chunk, i int) { blocks = append(blocks, Block{c, i}) }
	block(full, 3)
	block(full, 4)
	block(small, 0)
	block(odd, 3)
	block(full, 0)
	block(foreign, 1)
	block(full, 3) // again
	block(whole, 0)
	block(whole, 1)
	block(odd, 0)
	block(foreign, 0)
	return s, blocks
}

func build(t testing.TB, s store, metadata []byte, blocks []Block, limit int64) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := Build(t.Context(), &out, metadata, blocks, Options{Content: s.content, Limit: limit}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// Of what does not fit hardly more is looked at than of what does.
func TestLimitReads(t *testing.T) {
	s := store{}
	var blocks []Block
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		p := make([]byte, chunk.Size)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		c := s.add(chunk.BLAKE3, p)
		for k := range chunk.Blocks(c.Size) {
			blocks = append(blocks, Block{c, k})
		}
	}
	asked := map[Chunk]bool{}
	var out bytes.Buffer
	_, err := Build(t.Context(), &out, nil, blocks, Options{Limit: 5 * chunk.Size, Content: func(ctx context.Context, c Chunk) ([]byte, error) {
		asked[c] = true
		return s.content(ctx, c)
	}})
	if err != nil || out.Len() > 5*chunk.Size || out.Len() < 4*chunk.Size || len(asked) > 10 {
		t.Errorf("%d bytes of %d chunks, %v", out.Len(), len(asked), err)
	}
}

// got is what a pack gives, as chunks with holes.
type got struct {
	metadata []byte
	runs     []Run
	blocks   map[Block][]byte
}

func read(r io.Reader) (g got, err error) {
	p, err := NewReader(r, "pack")
	if err != nil {
		return g, err
	}
	defer p.Close()
	var metadata bytes.Buffer
	if err := p.Metadata(&metadata); err != nil {
		return g, err
	}
	g.metadata, g.blocks = metadata.Bytes(), map[Block][]byte{}
	t, err := p.Table()
	if err != nil {
		return g, err
	}
	for {
		n, data, err := p.Next()
		if err == io.EOF {
			return g, nil
		}
		if err != nil {
			return g, err
		}
		run := t.Runs[n]
		g.runs = append(g.runs, run)
		for i := run.First; len(data) > 0; i++ {
			n := min(len(data), chunk.Block)
			g.blocks[Block{t.Chunks[run.Chunk], i}] = bytes.Clone(data[:n])
			data = data[n:]
		}
	}
}

// check compares what came with the chunks it is said to be of.
func (g got) check(t *testing.T, s store) {
	t.Helper()
	for b, data := range g.blocks {
		want := s[b.Digest][b.Index*chunk.Block:]
		if !bytes.Equal(data, want[:min(len(want), chunk.Block)]) {
			t.Errorf("block %d of %s is wrong", b.Index, b.Digest)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	s, blocks := sample()
	metadata := bytes.Repeat([]byte("index"), 1000)
	p := build(t, s, metadata, blocks, 0)
	if again := build(t, s, metadata, blocks, 0); !bytes.Equal(p, again) {
		t.Error("the same blocks make another pack")
	}
	for _, r := range []io.Reader{bytes.NewReader(p), iotest.OneByteReader(bytes.NewReader(p)), iotest.DataErrReader(bytes.NewReader(p))} {
		g, err := read(r)
		if err != nil {
			t.Fatal(err)
		}
		g.check(t, s)
		want := []Run{{0, 3, 2}, {1, 0, 1}, {2, 3, 1}, {0, 0, 1}, {3, 0, 3}, {4, 0, 2}, {2, 0, 1}}
		if !slices.Equal(g.runs, want) {
			t.Errorf("runs %v, want %v", g.runs, want)
		}
		if !bytes.Equal(g.metadata, metadata) {
			t.Error("other metadata")
		}
		for _, b := range blocks {
			if g.blocks[b] == nil {
				t.Errorf("block %d of %s is missing", b.Index, b.Digest)
			}
		}
	}
	// Who does not want the metadata need not take them.
	r, err := NewReader(bytes.NewReader(p), "pack")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Next(); err != nil {
		t.Error(err)
	}
}

func TestLimit(t *testing.T) {
	s := store{}
	var blocks []Block
	rnd := rand.NewChaCha8([32]byte{9})
	for range 50 {
		p := make([]byte, chunk.Size)
		rnd.Read(p)
		blocks = append(blocks, Block{s.add(chunk.BLAKE3, p), 2})
	}
	for _, limit := range []int64{100, 1000, 100_000, 500_000, 10_000_000} {
		p := build(t, s, []byte("index"), blocks, limit)
		if int64(len(p)) > limit+int64(len("index")) && limit > 1000 {
			t.Errorf("%d bytes, at most %d were wanted", len(p), limit)
		}
		g, err := read(bytes.NewReader(p))
		if err != nil {
			t.Fatal(err)
		}
		g.check(t, s)
		if limit == 500_000 && (len(g.runs) < 20 || len(g.runs) == 50) {
			t.Errorf("%d runs in %d bytes", len(g.runs), limit)
		}
	}
}

func TestBuildRefuses(t *testing.T) {
	s, blocks := sample()
	bad := func(name string, blocks []Block, content func(context.Context, Chunk) ([]byte, error)) {
		if _, err := Build(t.Context(), io.Discard, nil, blocks, Options{Content: content}); !errors.Is(err, chunk.ErrCorrupt) && !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	bad("other content", blocks, func(_ context.Context, c Chunk) ([]byte, error) { return make([]byte, c.Size), nil })
	bad("short content", blocks, func(_ context.Context, c Chunk) ([]byte, error) { return s[c.Digest][1:], nil })
	bad("a block behind the end", []Block{{blocks[0].Chunk, 8}}, s.content)
	bad("two sizes", []Block{blocks[0], {Chunk{blocks[0].Digest, 5}, 0}}, s.content)
}

// TestDamage: whatever is changed or cut off, what comes is right, and the end of
// it is an error with the name of the pack.
func TestDamage(t *testing.T) {
	s, blocks := sample()
	p := build(t, s, []byte("index"), blocks, 0)
	whole, err := read(bytes.NewReader(p))
	if err != nil {
		t.Fatal(err)
	}
	known := func(err error) bool {
		return errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrLimit) || errors.Is(err, index.ErrUnsupported)
	}
	step := 1 // as each takes a decoder with its window
	for i := 0; i < len(p); i += step {
		if i >= headerSize && i < headerSize+len("index") {
			continue // vouched for by whoever accepts the index
		}
		if i > 2*headerSize {
			step = max(1, len(p)/300)
		}
		bad := bytes.Clone(p)
		bad[i] ^= 1 << (i % 8)
		g, err := read(bytes.NewReader(bad))
		g.check(t, s)
		if err == nil && len(g.blocks) < len(whole.blocks) {
			t.Errorf("byte %d changed: %d blocks of %d and no error", i, len(g.blocks), len(whole.blocks))
		}
		if err != nil && !known(err) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	for n := 0; n < len(p); n += max(1, len(p)/300) {
		g, err := read(bytes.NewReader(p[:n]))
		g.check(t, s)
		if err != nil && !known(err) || err == nil && len(g.blocks) < len(whole.blocks) {
			t.Errorf("cut to %d of %d bytes: %v", n, len(p), err)
		}
	}
	if _, err := read(iotest.TimeoutReader(bytes.NewReader(p))); !errors.Is(err, iotest.ErrTimeout) {
		t.Errorf("a source that fails: %v, want its own error", err)
	}
}

// FuzzRead: a pack that nobody can trust gives blocks that match their digests,
// or an error.
func FuzzRead(f *testing.F) {
	s, blocks := sample()
	p := build(f, s, []byte("index"), blocks, 0)
	f.Add(p)
	f.Add(p[:len(p)/2])
	f.Fuzz(func(t *testing.T, p []byte) {
		g, err := read(bytes.NewReader(p))
		for b, data := range g.blocks {
			if want, ok := s[b.Digest]; ok && !bytes.Equal(data, want[b.Index*chunk.Block:][:len(data)]) {
				t.Errorf("block %d of %s is wrong", b.Index, b.Digest)
			}
		}
		if err != nil && !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrLimit) && !errors.Is(err, index.ErrUnsupported) {
			t.Errorf("%v", err)
		}
	})
}

func FuzzTable(f *testing.F) {
	_, blocks := sample()
	t, err := plan(blocks)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(t.encode())
	f.Fuzz(func(t *testing.T, p []byte) {
		table, err := decodeTable(p, "pack")
		if err != nil {
			return
		}
		again, err := decodeTable(table.encode(), "pack")
		if err != nil || !slices.Equal(again.Runs, table.Runs) || !slices.Equal(again.Chunks, table.Chunks) {
			t.Errorf("it does not come back: %v", err)
		}
	})
}

// TestTwice: nothing comes twice, and what a reader keeps to prove blocks is bounded,
// or a small pack could take any amount of memory.
func TestTwice(t *testing.T) {
	digest := func(n int) (d chunk.Digest) {
		d = chunk.Digest{Algorithm: chunk.BLAKE3}
		d.Sum[0], d.Sum[1] = byte(n), byte(n>>8)
		return d
	}
	many := &Table{}
	for n := range maxSums/(32*maxBlocks) + 1 {
		many.Chunks = append(many.Chunks, Chunk{digest(n), chunk.MaxSize})
		many.Runs = append(many.Runs, Run{n, 0, 1})
	}
	most := &Table{many.Chunks[1:], many.Runs[:len(many.Runs)-1]}
	again := &Table{append(slices.Clone(most.Chunks[:9]), most.Chunks[3]), most.Runs[:10]}
	other := &Table{slices.Clone(again.Chunks), again.Runs}
	other.Chunks[9] = Chunk{chunk.Digest{Algorithm: chunk.SHA256, Sum: other.Chunks[3].Digest.Sum}, 5}
	for name, c := range map[string]struct {
		table *Table
		want  error
	}{
		"as many sums as may be": {most, nil},
		"more sums":              {many, index.ErrLimit},
		"a chunk again":          {again, index.ErrCorrupt},
		"a digest again":         {other, index.ErrCorrupt},
		"a block again":          {&Table{most.Chunks[:2], []Run{{0, 5, 3}, {1, 6, 1}, {0, 7, 1}}}, index.ErrCorrupt},
		"a block behind another": {&Table{most.Chunks[:2], []Run{{0, 5, 3}, {1, 6, 1}, {0, 8, 1}}}, nil},
	} {
		if _, err := decodeTable(c.table.encode(), "pack"); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// TestSumsFit: a pack that would need more sums than may be is made as long as it is
// readable.
func TestSumsFit(t *testing.T) {
	var blocks []Block
	for n := range maxSums/(32*maxBlocks) + 1 {
		c := Chunk{chunk.Digest{Algorithm: chunk.BLAKE3}, chunk.MaxSize}
		c.Digest.Sum[0], c.Digest.Sum[1] = byte(n), byte(n>>8)
		blocks = append(blocks, Block{c, 0})
	}
	table, err := plan(blocks)
	if err != nil {
		t.Fatal(err)
	}
	table.fit()
	if _, err := decodeTable(table.encode(), "pack"); err != nil || len(table.Runs) != len(blocks)-1 {
		t.Errorf("%d runs of %d: %v", len(table.Runs), len(blocks), err)
	}
}

// TestWant: what nobody wants is not looked at, and what follows it not read.
func TestWant(t *testing.T) {
	s, blocks := sample()
	p := build(t, s, nil, blocks, 0)
	r, err := NewReader(iotest.OneByteReader(bytes.NewReader(p)), "pack")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	table, err := r.Table()
	if err != nil {
		t.Fatal(err)
	}
	came, want := 0, int64(0)
	r.Progress = func(n int) { came += n }
	for n, run := range table.Runs[:5] {
		want += table.Bytes(run)
		if n != 2 { // whose sums are kept
			want += int64(table.proofs()[n] * 32)
		}
	}
	wanted := make([]bool, len(table.Chunks))
	wanted[2] = true // runs 2 and 6
	wanted[3] = true // run 4
	r.Want(wanted, 5)
	var got []int
	for {
		n, data, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		run := table.Runs[n]
		if want := s[table.Chunks[run.Chunk].Digest][run.First*chunk.Block:]; !bytes.Equal(data, want[:len(data)]) {
			t.Errorf("run %d is wrong", n)
		}
		got = append(got, n)
	}
	if int64(came) != want {
		t.Errorf("told of %d bytes, want %d", came, want)
	}
	if !slices.Equal(got, []int{2, 4}) || len(r.sums) != 1 {
		t.Errorf("runs %v with sums of %d chunks, want 2 and 4 with those of one", got, len(r.sums))
	}
}
