package zran

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/shale-image/shale/index"
)

// endless is a reader that never returns anything.
type endless struct{}

func (endless) Read([]byte) (int, error) { return 0, nil }

func TestShortReads(t *testing.T) {
	for kind, data := range samples() {
		gz := append(stdGzip(t, data, 6), stdGzip(t, data[:len(data)/100], 0)...)
		want := append(bytes.Clone(data), data[:len(data)/100]...)
		for name, wrap := range map[string]func(io.Reader) io.Reader{
			"one byte": iotest.OneByteReader, "half": iotest.HalfReader, "data and error": iotest.DataErrReader,
			"one byte, then data and error": func(r io.Reader) io.Reader { return iotest.DataErrReader(iotest.OneByteReader(r)) },
		} {
			z := NewReader(wrap(bytes.NewReader(gz)), Options{})
			if err := iotest.TestReader(z, want); len(want) < 10_000 && err != nil {
				t.Errorf("%s, %s: %v", kind, name, err)
			}
			z.Reset(wrap(bytes.NewReader(gz)), Options{})
			if got, err := io.ReadAll(iotest.HalfReader(z)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s, %s: %v, %d bytes, want %d", kind, name, err, len(got), len(want))
			}
			z.Close()
		}
	}
}

// What can be decoded before a stream ends or its source fails is returned,
// then the error.
func TestCutOff(t *testing.T) {
	all := samples()
	data := append(append(bytes.Clone(all["words"][:1500]), all["noise"][:300]...), all["runs"][:3000]...)
	broken := errors.New("broken")
	first := stdGzip(t, data[:700], 9)
	for _, gz := range [][]byte{
		stdGzip(t, data, 9), stdGzip(t, data, 0), stdGzip(t, data, -2), stdGzip(t, []byte("fixed"), 9),
		append(bytes.Clone(first), stdGzip(t, data[700:], 9)...), header(31, "\x02\x00abname\x00comment\x00"),
	} {
		before := 0
		for n := range len(gz) {
			if n == len(first) && bytes.HasPrefix(gz, first) {
				continue // a whole member
			}
			z := NewReader(bytes.NewReader(gz[:n]), Options{})
			got, err := io.ReadAll(z)
			if !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(err, index.ErrCorrupt) {
				t.Fatalf("%d of %d bytes: %v", n, len(gz), err)
			}
			if !bytes.HasPrefix(data, got) && string(got) != "fixed"[:len(got)] || len(got) < before {
				t.Fatalf("%d of %d bytes: got %q", n, len(gz), got)
			}
			before = len(got)
			z.Reset(io.MultiReader(bytes.NewReader(gz[:n]), iotest.ErrReader(broken)), Options{})
			again, err := io.ReadAll(z)
			if err != broken || !bytes.Equal(again, got) {
				t.Fatalf("%d of %d bytes, then an error: %v, %d bytes, want %d", n, len(gz), err, len(again), len(got))
			}
			z.Close()
		}
	}
	z := NewReader(endless{}, Options{})
	if _, err := z.Next(1); err != io.ErrNoProgress {
		t.Errorf("a reader that returns nothing: %v", err)
	}
}

// Damage of any bit is noticed, and never as anything else.
func TestBitFlips(t *testing.T) {
	all := samples()
	data := append(append(bytes.Clone(all["words"][:700]), all["noise"][:100]...), all["runs"][:1000]...)
	for _, level := range []int{-2, 0, 1, 9} {
		gz := stdGzip(t, data, level)
		for i := 10; i < len(gz); i++ {
			for bit := range 8 {
				bad := bytes.Clone(gz)
				bad[i] ^= 1 << bit
				z := NewReader(bytes.NewReader(bad), Options{})
				got, err := io.ReadAll(z)
				z.Close()
				// Unused codes and the bits that align a stored block do not matter.
				if err == nil && !bytes.Equal(got, data) || err != nil && !errors.Is(err, index.ErrCorrupt) {
					t.Fatalf("level %d, byte %d, bit %d: %v", level, i, bit, err)
				}
			}
		}
	}
}

func TestBadCheckpoints(t *testing.T) {
	gz := stdGzip(t, samples()["words"], 6)
	cp, window := checkpoints(t, gz, 50_000, 1)
	for _, bad := range []Checkpoint{{In: -1}, {Out: -1}, {Bits: 8}, {Bits: 1, Member: true}} {
		if _, err := Resume(bytes.NewReader(gz), bad, nil); !errors.Is(err, index.ErrCorrupt) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := Resume(bytes.NewReader(gz), cp, make([]byte, WindowSize+1)); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("window too long: %v", err)
	}
	z, err := Resume(bytes.NewReader(gz[cp.In:]), cp, window[len(window)-100:])
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	if _, err := z.WriteTo(io.Discard); !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("window too short: %v", err)
	}
	stop := errors.New("stop")
	z.Reset(bytes.NewReader(gz), Options{Span: 1000, Checkpoint: func(cp Checkpoint, _ []byte) error {
		if cp.Out > 0 {
			return stop
		}
		return nil
	}})
	if n, err := z.WriteTo(io.Discard); err != stop || n == 0 {
		t.Errorf("an error of Checkpoint: %v after %d bytes", err, n)
	}
}
