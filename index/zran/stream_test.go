package zran

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/shale-image/shale/index"
)

func TestTools(t *testing.T) {
	all := samples()
	for _, line := range []string{
		"gzip -1c", "gzip -6c", "gzip -9c", "gzip -9c --rsyncable", "pigz -1c", "pigz -9c -b 128", "pigz -cp1 -0",
		"bgzip -c", "bgzip -cl 9", "igzip -c -", "libdeflate-gzip -12 -c",
	} {
		t.Run(line, func(t *testing.T) {
			args := strings.Fields(line)
			if _, err := exec.LookPath(args[0]); err != nil {
				t.Skipf("%s is not installed", args[0])
			}
			for kind, data := range all {
				cmd := exec.Command(args[0], args[1:]...)
				cmd.Stdin = bytes.NewReader(data)
				gz, err := cmd.Output()
				if err != nil {
					t.Fatalf("%s: %v", kind, err)
				}
				verify(t, kind, gz, data)
			}
		})
	}
}

// header makes a member's header with the flags and what follows the first ten
// bytes; if asked by flagHeaderCRC, with its checksum.
func header(flags byte, more string) []byte {
	h := append([]byte{0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 3}, more...)
	if flags&flagHeaderCRC != 0 {
		h = binary.LittleEndian.AppendUint16(h, uint16(crc32.ChecksumIEEE(h)))
	}
	return h
}

func TestHeaders(t *testing.T) {
	data := []byte("some data, some data")
	rest := stdGzip(t, data, 9)[10:]
	long := strings.Repeat("x", 100_000)
	for _, h := range [][]byte{
		header(0, ""), header(1, ""), header(flagName, "name\x00"), header(flagName, long+"\x00"),
		header(flagComment, "\x00"), header(flagExtraData, "\x00\x00"), header(flagExtraData, "\xff\xff"+long[:0xffff]),
		header(flagHeaderCRC, ""), header(0x1f, "\x02\x00ab"+long+"\x00comment\x00"),
	} {
		verify(t, "header", append(bytes.Clone(h), rest...), data)
		for _, n := range []int{0, 1, 9, 10, 11, len(h) - 1} {
			wantError(t, h[:min(n, len(h)-1)], io.ErrUnexpectedEOF)
		}
	}
	for name, h := range map[string][]byte{
		"magic": append([]byte{0x1f, 0x8c}, header(0, "")[2:]...), "method": append([]byte{0x1f, 0x8b, 7}, header(0, "")[3:]...),
		"reserved": header(0x20, ""), "checksum": append(header(flagHeaderCRC, "")[:10], 0, 0),
	} {
		t.Log(name)
		wantError(t, append(h, rest...), index.ErrCorrupt)
	}
}

func wantError(t testing.TB, gz []byte, want error) {
	t.Helper()
	z := NewReader(bytes.NewReader(gz), Options{})
	defer z.Close()
	_, err := z.WriteTo(io.Discard)
	if !errors.Is(err, want) || !errors.Is(err, index.ErrCorrupt) {
		t.Fatalf("got error %v, want %v", err, want)
	}
	var at *index.Error
	if !errors.As(err, &at) || at.Offset < 0 || at.Offset > int64(len(gz)) {
		t.Fatalf("error without a right offset: %v", err)
	}
	if _, again := z.Next(1); again != err {
		t.Fatalf("after %v came %v", err, again)
	}
}

func TestMembers(t *testing.T) {
	all := samples()
	var gz, want []byte
	for i, kind := range []string{"words", "empty", "noise", "one byte", "empty", "zeros", "mixed"} {
		want = append(want, all[kind]...)
		gz = append(gz, stdGzip(t, all[kind], i)...)
	}
	verify(t, "members", gz, want)
	for _, n := range []int{1, 9, 10, 511, 512, 200_000} { // padding
		verify(t, "padded", append(bytes.Clone(gz), make([]byte, n)...), want)
		wantError(t, append(append(bytes.Clone(gz), make([]byte, n)...), gz...), index.ErrCorrupt)
	}
	wantError(t, append(bytes.Clone(gz), "garbage of some length"...), index.ErrCorrupt)
	wantError(t, append(bytes.Clone(gz), 0x1f), io.ErrUnexpectedEOF)
	// A match may not reach into the member before.
	reach := flateWithDict(t, want[len(want)-1000:], want[len(want)-1000:])
	wantError(t, append(append(bytes.Clone(gz), header(0, "")...), reach...), index.ErrCorrupt)
}

func flateWithDict(t *testing.T, data, dict []byte) []byte {
	var b bytes.Buffer
	w, err := flate.NewWriterDict(&b, 9, dict)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(data)
	w.Close()
	return b.Bytes()
}

// Checksums and sizes of all members are verified, from the second on also
// after Resume.
func TestTrailer(t *testing.T) {
	data := samples()["mixed"]
	one := stdGzip(t, data, 6)
	for _, i := range []int{1, 4, 5, 8} {
		bad := bytes.Clone(one)
		bad[len(bad)-i] ^= 0x10
		wantError(t, bad, index.ErrCorrupt)

		cp, window := checkpoints(t, one, 50_000, 1)
		for _, test := range []struct {
			gz []byte
			ok bool
		}{{bad, true}, {append(bytes.Clone(bad), one...), true}, {append(bytes.Clone(one), bad...), false}} {
			z, err := Resume(bytes.NewReader(test.gz[cp.In:]), cp, window)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = z.WriteTo(io.Discard); test.ok != (err == nil) || err != nil && !errors.Is(err, index.ErrCorrupt) {
				t.Errorf("byte %d: %v, want success: %t", i, err, test.ok)
			}
			z.Close()
		}
	}
}

// checkpoints returns checkpoint i of a stream.
func checkpoints(t testing.TB, gz []byte, span int64, i int) (at Checkpoint, window []byte) {
	z := NewReader(bytes.NewReader(gz), Options{Span: span, Checkpoint: func(cp Checkpoint, w []byte) error {
		if i == 0 {
			at, window = cp, bytes.Clone(w)
		}
		i--
		return nil
	}})
	defer z.Close()
	if _, err := z.WriteTo(io.Discard); err != nil || i >= 0 {
		t.Fatalf("%v, %d checkpoints too few", err, i+1)
	}
	return at, window
}

// Flushes make empty stored blocks and short blocks at any bit.
func TestFlushes(t *testing.T) {
	data := samples()["words"][:60_000]
	for _, level := range []int{gzip.NoCompression, gzip.BestSpeed, gzip.DefaultCompression, gzip.HuffmanOnly} {
		var b bytes.Buffer
		w, _ := gzip.NewWriterLevel(&b, level)
		for i := 0; i < len(data); i += 97 {
			w.Write(data[i:min(i+97, len(data))])
			w.Flush()
		}
		w.Close()
		verify(t, "flushes", b.Bytes(), data)
		// Each block start is a checkpoint if they may be that close.
		n, bits := 0, 0
		z := NewReader(&b, Options{Span: 1, Checkpoint: func(cp Checkpoint, _ []byte) error {
			n++
			bits |= 1 << cp.Bits
			return nil
		}})
		if _, err := z.WriteTo(io.Discard); err != nil || n < len(data)/97 {
			t.Errorf("level %d: %v, %d checkpoints", level, err, n)
		}
		if level > 0 && bits&^1 == 0 {
			t.Errorf("level %d: all checkpoints are at the start of a byte", level)
		}
		z.Close()
	}
}
