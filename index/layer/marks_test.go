package layer_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
	"github.com/shale-image/shale/index/zframe"
)

// marked decompresses a layer, and returns what it is, its spans, and their windows one
// behind the other.
func marked(t *testing.T, stored []byte, m *layer.Marks) (plain, windows []byte, err error) {
	t.Helper()
	if m.Window == nil {
		m.Window = func(p []byte) (index.Window, error) {
			w := index.Window{Offset: int64(len(windows)), Length: uint32(len(p))}
			windows = append(windows, p...)
			return w, nil
		}
	}
	rc, kind, err := layer.DecompressMarked(bytes.NewReader(stored), index.Limits{}, m)
	if err != nil || kind != layer.Zstd {
		t.Fatal(kind, err)
	}
	defer rc.Close()
	plain, err = io.ReadAll(rc)
	if _, again := rc.Read(make([]byte, 1)); err == nil && again != io.EOF {
		t.Errorf("after the end: %v", again)
	}
	return plain, windows, err
}

// repeats is content whose blocks copy from the ones before.
func repeats(n int) []byte {
	r := rand.New(rand.NewPCG(3, 4))
	p := someBytes(30_000)
	for len(p) < n {
		at := r.IntN(len(p) - 2000)
		p = append(append(p, p[at:][:1+r.IntN(2000)]...), make([]byte, 700)...)
		for i := range 700 {
			p[len(p)-1-i] = byte(r.Uint32())
		}
	}
	return p[:n]
}

// TestMarksBlocks: the spans of a zstd layer are those that are cut, each with the state
// that it was given.
func TestMarksBlocks(t *testing.T) {
	plain := repeats(1 << 20)
	skippable := []byte{0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'x', 'y', 'z'}
	small := zst(plain[:5000])
	for name, stored := range map[string][]byte{
		"a frame": zst(plain),
		"frames":  join(skippable, small, small, zst(plain[10_000:]), skippable),
	} {
		want := plain
		if name == "frames" {
			want = join(plain[:5000], plain[:5000], plain[10_000:])
		}
		m := &layer.Marks{Every: 32 << 10, Blocks: 128 << 10}
		got, states, err := marked(t, stored, m)
		if err != nil || !bytes.Equal(got, want) || len(m.Spans) < 7 || len(states) == 0 {
			t.Fatalf("%s: %d spans, %d bytes of states, %v", name, len(m.Spans), len(states), err)
		}
		tree := index.Tree{Blobs: []index.Blob{{Spans: m.Spans, Size: int64(len(stored))}}}
		if err := tree.CheckSpans(); err != nil || tree.Blobs[0].StreamSize() != int64(len(want)) {
			t.Errorf("%s: %v, a stream of %d bytes", name, err, tree.Blobs[0].StreamSize())
		}
		for i, s := range m.Spans {
			p := make([]byte, s.Size)
			err := zframe.Decode(p, stored[s.Offset:][:s.Length], states[s.Window.Offset:][:s.Window.Length])
			if err != nil || !bytes.Equal(p, want[s.Start:s.End()]) || i+1 < len(m.Spans) && s.Size < 128<<10 || s.Size > 256<<10 {
				t.Errorf("%s: span %d, %+v: %v", name, i, s, err)
			}
		}
	}
}

// TestMarksWindowFails: an error of who keeps the states is the layer's, as it is.
func TestMarksWindowFails(t *testing.T) {
	stored := zst(repeats(1 << 20))
	no := errors.New("no")
	for _, fail := range []int{1, 3, 7} {
		calls := 0
		m := &layer.Marks{Every: 1, Blocks: 1, Window: func([]byte) (index.Window, error) {
			if calls++; calls == fail {
				return index.Window{}, no
			}
			return index.Window{}, nil
		}}
		if _, _, err := marked(t, stored, m); err != no || calls != fail {
			t.Errorf("the %dth of %d states: %v", fail, calls, err)
		}
	}
}

// TestMarksWhole: a layer of which a frame cannot be cut has spans of whole frames, and so
// has one of small frames.
func TestMarksWhole(t *testing.T) {
	plain := repeats(300_000)
	zeros := make([]byte, 33<<20)
	rand.NewChaCha8([32]byte{2}).Read(zeros[:1<<20]) // comes again behind 32 MiB
	var far bytes.Buffer
	e, err := zstd.NewWriter(&far, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(64<<20), zstd.WithEncoderLevel(zstd.SpeedBestCompression))
	if err != nil {
		t.Fatal(err)
	}
	e.Write(zeros)
	e.Write(zeros[:1<<20])
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	var frames [][]byte
	for p := range slices.Chunk(plain, 20_000) {
		frames = append(frames, zst(p))
	}
	for name, c := range map[string]struct {
		stored []byte
		spans  int
	}{
		"a match from far":                     {far.Bytes(), 1},
		"one from far behind a frame as usual": {join(zst(plain), far.Bytes(), zst(plain)), 3},
		"small frames":                         {join(frames...), 8},
	} {
		m := &layer.Marks{Every: 40_000, Blocks: 128 << 10}
		m.Window = func(p []byte) (index.Window, error) { return index.Window{Length: uint32(len(p))}, nil }
		rc, _, err := layer.DecompressMarked(bytes.NewReader(c.stored), index.Limits{Expansion: 1 << 20, Window: 64 << 20}, m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, rc); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		rc.Close()
		if len(m.Spans) != c.spans || slices.ContainsFunc(m.Spans, func(s index.Span) bool { return s.Codec != chunk.Zstd || s.Window.Length > 0 }) {
			t.Errorf("%s: %d spans, want %d: %+v", name, len(m.Spans), c.spans, m.Spans[:min(4, len(m.Spans))])
		}
	}
}

// TestMarksLimits: marking does not change what a layer may take.
func TestMarksLimits(t *testing.T) {
	stored := zst(repeats(2 << 20))
	for _, lim := range []index.Limits{{StreamBytes: 1 << 20}, {Window: 1 << 10}} {
		m := &layer.Marks{Every: 1, Window: func([]byte) (index.Window, error) { return index.Window{}, nil }}
		rc, _, err := layer.DecompressMarked(bytes.NewReader(stored), lim, m)
		if err == nil {
			_, err = io.Copy(io.Discard, rc)
			rc.Close()
		}
		if !errors.Is(err, index.ErrLimit) || m.Spans != nil && m.Spans[0].Codec == chunk.ZstdBlocks {
			t.Errorf("%+v: %v, %d spans", lim, err, len(m.Spans))
		}
	}
}

// TestMarksLargeStates: content that comes again and again is not cut, as its states would
// be many times as large as the layer.
func TestMarksLargeStates(t *testing.T) {
	noise := someBytes(1 << 20)
	for times, cut := range map[int]bool{2: true, 20: false} {
		var plain []byte
		for i := range times { // not where it was in the blocks before
			plain = append(append(plain, noise[i*777:]...), noise[:i*777]...)
		}
		m := &layer.Marks{Every: 32 << 10, Blocks: 128 << 10}
		if _, _, err := marked(t, zst(plain), m); err != nil || (len(m.Spans) > 1) != cut {
			t.Errorf("%d times: %d spans, %v", times, len(m.Spans), err)
		}
	}
}
