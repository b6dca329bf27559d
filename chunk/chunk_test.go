package chunk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
)

func TestDigest(t *testing.T) {
	// The digests of "abc" by b3sum(1) and sha256sum(1).
	for alg, want := range map[Algorithm]string{
		BLAKE3: "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
		SHA256: "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
	} {
		d := Sum(alg, []byte("abc"))
		if d.String() != want {
			t.Errorf("%v: %s, want %s", alg, d, want)
		}
		if back, err := ParseName(want); err != nil || back != d {
			t.Errorf("ParseName(%s): %v, %v", want, back, err)
		}
		if back, err := Parse(want); err != nil || back != d {
			t.Errorf("Parse(%s): %v, %v", want, back, err)
		}
		if err := d.Verify([]byte("abc")); err != nil {
			t.Error(err)
		}
		if err := d.Verify([]byte("abd")); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), want) {
			t.Errorf("other bytes: %v, want ErrCorrupt with the digest", err)
		}
	}
	if err := (Digest{}).Verify(nil); !errors.Is(err, ErrCorrupt) {
		t.Errorf("no algorithm: %v, want ErrCorrupt", err)
	}
	for _, bad := range []string{"", "sha256", "sha256:", "md5:" + strings.Repeat("0", 64), "sha256:" + strings.Repeat("0", 63),
		"sha256:" + strings.Repeat("0", 65), "blake3:" + strings.Repeat("g", 64)} {
		if d, err := Parse(bad); err == nil {
			t.Errorf("Parse(%q) = %v", bad, d)
		}
	}
}

// samples are contents of all kinds: empty, small, compressible, random.
func samples() map[string][]byte {
	r := rand.New(rand.NewPCG(1, 2))
	random := make([]byte, Size)
	for i := range random {
		random[i] = byte(r.Uint32())
	}
	text := bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog\n"), 3000)
	return map[string][]byte{
		"one byte": {7}, "zeros": make([]byte, Size), "text": text[:Size], "odd": text[:Size-13],
		"random": random, "half random": append(append([]byte{}, random[:Size/2]...), text[:Size/2]...),
		"large": bytes.Repeat(random, 20), "largest": make([]byte, MaxSize),
	}
}

func TestCodecs(t *testing.T) {
	for name, raw := range samples() {
		for _, c := range []Codec{None, Zstd, LZ4} {
			prefix := []byte("kept")
			out, ok := c.Encode(prefix, raw)
			if !bytes.HasPrefix(out, prefix) {
				t.Fatalf("%s, %v: what was there is gone", name, c)
			}
			stored := out[len(prefix):]
			if !ok {
				if len(stored) != 0 {
					t.Errorf("%s, %v: refused, but %d bytes were appended", name, c, len(stored))
				}
				if c != None && (name == "zeros" || name == "text") {
					t.Errorf("%s, %v: not compressed", name, c)
				}
				continue
			}
			if len(stored) >= len(raw) {
				t.Errorf("%s, %v: %d bytes for %d", name, c, len(stored), len(raw))
			}
			got := make([]byte, len(raw))
			if err := c.Decode(got, stored); err != nil || !bytes.Equal(got, raw) {
				t.Errorf("%s, %v: does not come back: %v", name, c, err)
			}
			for _, n := range []int{0, len(raw) - 1, len(raw) + 1} {
				if err := c.Decode(make([]byte, n), stored); !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s, %v: %d bytes for %d: %v, want ErrCorrupt", name, c, len(raw), n, err)
				}
			}
			for _, n := range []int{0, 1, len(stored) / 2, len(stored) - 1} {
				if err := c.Decode(got, stored[:n]); !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s, %v: cut at %d of %d: %v, want ErrCorrupt", name, c, n, len(stored), err)
				}
			}
		}
	}
}

func TestNone(t *testing.T) {
	got := make([]byte, 3)
	if err := None.Decode(got, []byte("abc")); err != nil || string(got) != "abc" {
		t.Errorf("%q, %v", got, err)
	}
	for _, stored := range []string{"", "ab", "abcd"} {
		if err := None.Decode(got, []byte(stored)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%q: %v, want ErrCorrupt", stored, err)
		}
	}
	if err := Codec(99).Decode(got, []byte("abc")); !errors.Is(err, ErrCorrupt) {
		t.Errorf("unknown codec: %v, want ErrCorrupt", err)
	}
}

// TestEncodeIsReproducible: the result depends on the content alone, not on
// what the coder did before nor on how many run.
func TestEncodeIsReproducible(t *testing.T) {
	all := samples()
	for _, c := range []Codec{Zstd, LZ4} {
		want := map[string][]byte{}
		for name, raw := range all {
			want[name], _ = c.Encode(nil, raw)
		}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for name, raw := range all {
					if got, _ := c.Encode(nil, raw); !bytes.Equal(got, want[name]) {
						t.Errorf("%v: %s comes out differently", c, name)
					}
				}
			})
		}
		wg.Wait()
	}
}

func TestParseCodec(t *testing.T) {
	for _, c := range []Codec{None, Zstd, LZ4} {
		if got, err := ParseCodec(c.String()); err != nil || got != c {
			t.Errorf("%v: %v, %v", c, got, err)
		}
	}
	if _, err := ParseCodec("brotli"); err == nil {
		t.Error("brotli is a codec")
	}
}

// FuzzDecode: whatever is stored, it decodes to the exact length or is an
// error that wraps ErrCorrupt.
func FuzzDecode(f *testing.F) {
	for _, raw := range samples() {
		if len(raw) > Size {
			continue
		}
		for _, c := range []Codec{Zstd, LZ4} {
			if out, ok := c.Encode(nil, raw); ok {
				f.Add(uint8(c), out, len(raw))
			}
		}
	}
	f.Fuzz(func(t *testing.T, c uint8, stored []byte, n int) {
		if n < 0 || n > 4*Size {
			return
		}
		dst := make([]byte, n, n+64)
		guard := dst[n : n+64]
		err := Codec(c%4).Decode(dst, stored)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("%v, want ErrCorrupt", err)
		}
		if !bytes.Equal(guard, make([]byte, 64)) {
			t.Error("wrote behind the end")
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	raw := samples()["text"]
	dst := make([]byte, len(raw))
	for _, c := range []Codec{Zstd, LZ4} {
		b.Run(c.String(), func(b *testing.B) {
			stored, _ := c.Encode(nil, raw)
			b.SetBytes(int64(len(raw)))
			for b.Loop() {
				if err := c.Decode(dst, stored); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
