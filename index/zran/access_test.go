package zran

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"sort"
	"testing"
	"testing/iotest"

	kgzip "github.com/klauspost/compress/gzip"
)

// writers lists what gzip layers are made by.
var writers = []struct {
	name string
	gzip func(testing.TB, []byte) []byte
}{
	{"gzip -1", piped("gzip", "-1")},
	{"gzip -9", piped("gzip", "-9")},
	{"pigz", piped("pigz", "-p", "2")},
	{"bgzip", piped("bgzip", "-c")},
	{"Go", func(t testing.TB, p []byte) []byte { return stdGzip(t, p, 6) }},
	{"klauspost", func(t testing.TB, p []byte) []byte { return klauspostGzip(t, p, 6) }},
	{"klauspost, no context", func(t testing.TB, p []byte) []byte { return klauspostGzip(t, p, kgzip.StatelessCompression) }},
	{"stored", func(t testing.TB, p []byte) []byte { return stdGzip(t, p, 0) }},
	{"members", func(t testing.TB, p []byte) (out []byte) {
		for i := 0; len(p) > 0; i++ {
			n := min(len(p), 1+i*i*1009)
			out = append(out, stdGzip(t, p[:n], i%10)...)
			p = p[n:]
		}
		return out
	}},
}

func piped(name string, args ...string) func(testing.TB, []byte) []byte {
	return func(t testing.TB, p []byte) []byte {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Skip(err)
		}
		cmd := exec.Command(path, args...)
		cmd.Stdin = bytes.NewReader(p)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}

// TestEveryPage reads 4 KiB at every 4 KiB of a stream, as each writer makes it,
// from the checkpoint before it. ZRAN_DATA names a file, such as an unpacked
// layer, and has it read all of that; docs/BENCHMARKS.md has what came of one.
func TestEveryPage(t *testing.T) {
	const page = 4096
	data := everything(1 << 20)
	if name := os.Getenv("ZRAN_DATA"); name != "" {
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		data = p
	}
	for _, w := range writers {
		t.Run(w.name, func(t *testing.T) {
			gz := w.gzip(t, data)
			var cps []Checkpoint
			var windows [][]byte
			z := NewReader(bytes.NewReader(gz), Options{Span: WindowSize, Checkpoint: func(cp Checkpoint, w []byte) error {
				cps, windows = append(cps, cp), append(windows, bytes.Clone(w))
				return nil
			}})
			defer z.Close()
			if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("from the start: %v", err)
			}
			for off := int64(0); off < int64(len(data)); off += page {
				i := sort.Search(len(cps), func(i int) bool { return cps[i].Out > off }) - 1
				if err := z.Resume(bytes.NewReader(gz[cps[i].In:]), cps[i], windows[i]); err != nil {
					t.Fatal(err)
				}
				if _, err := z.Discard(off - cps[i].Out); err != nil || z.Offset() != off {
					t.Fatalf("at %d: %v, after Discard at %d", off, err, z.Offset())
				}
				for want := data[off:min(off+page, int64(len(data)))]; len(want) > 0; {
					got, err := z.Next(len(want))
					if err != nil || len(got) == 0 || !bytes.HasPrefix(want, got) {
						t.Fatalf("at %d: %v or other bytes", off, err)
					}
					want = want[len(got):]
				}
			}
			t.Logf("%d bytes, %d compressed, %d pages from %d checkpoints", len(data), len(gz), (len(data)+page-1)/page, len(cps))
		})
	}
}

// everything is n bytes of all kinds.
func everything(n int) (data []byte) {
	rnd := rand.New(rand.NewPCG(3, 4))
	all := samples()
	for len(data) < n {
		for kind := range all { // in random order
			s := all[kind]
			data = append(data, s[rnd.IntN(len(s)/2+1):]...)
		}
	}
	return data[:n]
}

func TestReader(t *testing.T) {
	data := samples()["mixed"]
	gz := stdGzip(t, data, 6)
	z := NewReader(bytes.NewReader(gz), Options{})
	defer z.Close()
	if err := iotest.TestReader(z, data); err != nil {
		t.Error(err)
	}
	for range 2 {
		if b, err := z.Next(1); b != nil || err != io.EOF {
			t.Errorf("at the end: %q, %v", b, err)
		}
	}
	if z.Offset() != int64(len(data)) || z.InputOffset() != int64(len(gz)) {
		t.Errorf("at the end: offsets %d, %d, want %d, %d", z.Offset(), z.InputOffset(), len(data), len(gz))
	}
	if n, err := z.Discard(1); n != 0 || err != io.EOF {
		t.Errorf("Discard at the end: %d, %v", n, err)
	}
	z.Reset(bytes.NewReader(gz), Options{})
	if b, err := z.Next(0); len(b) != 0 || err != nil {
		t.Errorf("Next(0): %q, %v", b, err)
	}
	var got []byte
	for n := 1; ; n = n*3 + 1 {
		b, err := z.Next(n)
		if err == io.EOF {
			break
		}
		if err != nil || len(b) == 0 || len(b) > n {
			t.Fatalf("Next(%d): %d bytes, %v", n, len(b), err)
		}
		got = append(got, b...)
		if z.Offset() != int64(len(got)) {
			t.Fatalf("offset %d after %d bytes", z.Offset(), len(got))
		}
	}
	if !bytes.Equal(got, data) {
		t.Error("Next returns other bytes")
	}
	z.Reset(bytes.NewReader(gz), Options{})
	if n, err := z.Discard(1 << 40); n != int64(len(data)) || err != io.EOF {
		t.Errorf("Discard of more than all: %d, %v", n, err)
	}
	z.Reset(bytes.NewReader(gz), Options{})
	pr, pw := io.Pipe()
	pr.Close()
	if _, err := z.WriteTo(pw); err != io.ErrClosedPipe {
		t.Errorf("WriteTo of a broken writer: %v", err)
	}
	other := NewReader(bytes.NewReader(gz), Options{})
	other.Close()
	other.Close()
}

// Many small reads must not feed the garbage collector.
func TestResumeAllocates(t *testing.T) {
	gz := stdGzip(t, samples()["words"], 6)
	cp, window := checkpoints(t, gz, 50_000, 1)
	r := bytes.NewReader(nil)
	var z Reader
	n := testing.AllocsPerRun(100, func() {
		r.Reset(gz[cp.In:])
		if err := z.Resume(r, cp, window); err != nil {
			t.Fatal(err)
		}
		if _, err := z.Next(4096); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}
