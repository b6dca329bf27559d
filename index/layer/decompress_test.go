package layer_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func gz(p []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(p)
	w.Close()
	return b.Bytes()
}

func zst(p []byte, opts ...zstd.EOption) []byte {
	w, err := zstd.NewWriter(nil, append(opts, zstd.WithEncoderConcurrency(1))...)
	if err != nil {
		panic(err)
	}
	return w.EncodeAll(p, nil)
}

// someBytes makes bytes that compress somewhat.
func someBytes(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64()&0x0f0f0f0f0f0f0f0f)
	}
	return p
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestDecompress(t *testing.T) {
	p := someBytes(5 << 19)
	a, b := p[:3<<19], p[3<<19:]
	skippable := []byte{0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'x', 'y', 'z'}
	for _, test := range []struct {
		name string
		in   []byte
		kind layer.Compression
		want []byte
	}{
		{"nothing", nil, layer.None, nil},
		{"a byte", []byte{0x1f}, layer.None, []byte{0x1f}},
		{"none", p, layer.None, p},
		{"gzip", gz(p), layer.Gzip, p},
		{"gzip of nothing", gz(nil), layer.Gzip, nil},
		{"gzip members", join(gz(a), gz(nil), gz(b)), layer.Gzip, p},
		{"zstd", zst(p), layer.Zstd, p},
		{"zstd frames", join(skippable, zst(a), skippable, zst(b), skippable), layer.Zstd, p},
		{"zstd with a checksum", zst(p, zstd.WithEncoderCRC(true)), layer.Zstd, p},
	} {
		t.Run(test.name, func(t *testing.T) {
			rc, kind, err := layer.Decompress(iotest.HalfReader(bytes.NewReader(test.in)), index.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			defer rc.Close()
			got, err := io.ReadAll(rc)
			if err != nil || kind != test.kind || !bytes.Equal(got, test.want) {
				t.Errorf("%v, %v, %d bytes, want %v and %d bytes", err, kind, len(got), test.kind, len(test.want))
			}
			if n, err := rc.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("after the end: %d, %v", n, err)
			}
		})
	}
}

func decompress(l index.Limits, r io.Reader) (int64, error) {
	rc, _, err := layer.Decompress(r, l)
	if err != nil {
		return 0, err
	}
	defer rc.Close()
	return io.Copy(io.Discard, rc)
}

func TestDecompressCorrupt(t *testing.T) {
	p := someBytes(1 << 20)
	flip := func(in []byte, at int) []byte {
		out := bytes.Clone(in)
		out[at] ^= 0x55
		return out
	}
	g, z := gz(p), zst(p, zstd.WithEncoderCRC(true))
	for name, in := range map[string][]byte{
		"gzip cut in the header": g[:5], "gzip cut": g[:len(g)/2], "gzip without its end": g[:len(g)-1],
		"gzip changed": flip(g, len(g)/2), "gzip checksum": flip(g, len(g)-6), "gzip trailer": append(bytes.Clone(g), "junk"...),
		"zstd cut": z[:len(z)/2], "zstd without its end": z[:len(z)-1], "zstd changed": flip(z, len(z)/2), "zstd checksum": flip(z, len(z)-1),
		"zstd trailer": append(bytes.Clone(z), "junk"...),
	} {
		if _, err := decompress(index.Limits{}, bytes.NewReader(in)); !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
}

func TestDecompressSourceError(t *testing.T) {
	p := someBytes(1 << 20)
	for _, in := range [][]byte{gz(p), zst(p), p} {
		for _, broken := range []error{errors.New("broken"), io.ErrUnexpectedEOF} {
			for _, n := range []int{0, 2, 5, 1000, len(in) / 2, len(in) - 1} {
				_, err := decompress(index.Limits{}, io.MultiReader(bytes.NewReader(in[:n]), iotest.ErrReader(broken)))
				if err != broken {
					t.Errorf("after %d of %d: %v, want %v", n, len(in), err, broken)
				}
			}
		}
	}
}

func TestDecompressLimits(t *testing.T) {
	bomb := bytes.Repeat(zst(make([]byte, 10<<20)), 30)
	if _, err := decompress(index.Limits{}, bytes.NewReader(bomb)); !errors.Is(err, index.ErrLimit) || !strings.Contains(fmt.Sprint(err), "(Expansion)") {
		t.Errorf("300 MiB from %d bytes: %v, want ErrLimit", len(bomb), err)
	}
	if n, err := decompress(index.Limits{Expansion: 1 << 20}, bytes.NewReader(bomb)); err != nil || n != 300<<20 {
		t.Errorf("with Expansion: %d, %v", n, err)
	}
	if _, err := decompress(index.Limits{StreamBytes: 1 << 20}, bytes.NewReader(bomb)); !errors.Is(err, index.ErrLimit) {
		t.Errorf("with StreamBytes: %v, want ErrLimit", err)
	}
	var long bytes.Buffer
	w, err := zstd.NewWriter(&long, zstd.WithWindowSize(4<<20), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	w.Write(someBytes(5 << 20))
	w.Close()
	if _, err := decompress(index.Limits{Window: 2 << 20}, bytes.NewReader(long.Bytes())); !errors.Is(err, index.ErrLimit) || !strings.Contains(fmt.Sprint(err), "(Window)") {
		t.Errorf("with Window: %v, want ErrLimit", err)
	}
	if _, err := decompress(index.Limits{}, bytes.NewReader(long.Bytes())); err != nil {
		t.Error(err)
	}
}

// Close in the middle stops the goroutine (TestMain looks for it) and reading.
func TestDecompressClose(t *testing.T) {
	in := gz(someBytes(6 << 20))
	for _, read := range []int{0, 10, 3 << 20} {
		rc, _, err := layer.Decompress(bytes.NewReader(in), index.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(rc, make([]byte, read)); err != nil {
			t.Fatal(err)
		}
		rc.Close()
		rc.Close()
		if _, err := io.Copy(io.Discard, rc); err != io.ErrClosedPipe {
			t.Errorf("after Close: %v", err)
		}
	}
}

func BenchmarkDecompress(b *testing.B) {
	p := someBytes(64 << 20)
	for name, in := range map[string][]byte{"gzip": gz(p), "zstd": zst(p)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				if n, err := decompress(index.Limits{}, bytes.NewReader(in)); err != nil || n != int64(len(p)) {
					b.Fatal(n, err)
				}
			}
		})
	}
}
