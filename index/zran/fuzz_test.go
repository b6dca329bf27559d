package zran

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"io"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"

	"github.com/shale-image/shale/index"
)

// FuzzInflate compares with compress/flate: both read the same or both fail,
// and what comes before a failure is the same.
func FuzzInflate(f *testing.F) {
	for kind, data := range samples() {
		data = data[:min(len(data), 5000)]
		for _, level := range []int{-2, 0, 1, 9} {
			f.Add(stdGzip(f, data, level)[10:])
		}
		f.Add([]byte(kind))
	}
	f.Add([]byte{0x07})                                     // block type 3
	f.Add([]byte{0x01, 5, 0, 5, 0})                         // stored, bad complement
	f.Add([]byte{0x03, 0x02})                               // fixed, match at the start
	f.Add([]byte{0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}) // too many symbols
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		want, wantErr := io.ReadAll(io.LimitReader(flate.NewReader(r), 1<<22))
		if len(want) == 1<<22 {
			t.Skip("a lot")
		}
		if wantErr == nil {
			in = in[:len(in)-r.Len()]
		}
		// A checkpoint between two blocks is the start of a deflate stream.
		z, err := Resume(bytes.NewReader(in), Checkpoint{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		got, err := io.ReadAll(z)
		if err == nil || !errors.Is(err, index.ErrCorrupt) {
			t.Fatalf("no trailer: %v", err)
		}
		if wantErr == nil {
			if z.state != atTrailer || !bytes.Equal(got, want) {
				t.Fatalf("%v, %d bytes, want %d", err, len(got), len(want))
			}
			return
		}
		if z.state == atTrailer {
			t.Fatalf("success, want %v", wantErr)
		}
		if n := min(len(got), len(want)); !bytes.Equal(got[:n], want[:n]) {
			t.Fatal("other bytes before the error")
		}
	})
}

// FuzzGzip compares with the gzip of klauspost/compress, which also fails for
// padding and for long names, and checks that every checkpoint leads to the
// same bytes.
func FuzzGzip(f *testing.F) {
	for _, data := range samples() {
		data = data[:min(len(data), 30_000)]
		gz := stdGzip(f, data, 6)
		f.Add(gz)
		f.Add(append(gz, gz...))
	}
	f.Add(append(header(31, "\x02\x00abname\x00comment\x00"), stdGzip(f, []byte("x"), 9)[10:]...))
	f.Fuzz(func(t *testing.T, in []byte) {
		var want []byte
		s, wantErr := kgzip.NewReader(bytes.NewReader(in))
		if wantErr == nil {
			want, wantErr = io.ReadAll(io.LimitReader(s, 1<<22))
		}
		if len(want) == 1<<22 {
			t.Skip("a lot")
		}
		z := NewReader(bytes.NewReader(in), Options{})
		defer z.Close()
		got, err := io.ReadAll(z)
		switch {
		case err == nil && wantErr == nil:
			verify(t, "fuzz", in, want)
		case err == nil && !bytes.HasPrefix(got, want):
			t.Fatalf("success with %d bytes, want %d and %v", len(got), len(want), wantErr)
		case err != nil && !errors.Is(err, index.ErrCorrupt):
			t.Fatal(err)
		case err != nil && wantErr == nil && (z.state != atMember || !bytes.Equal(got, want)):
			// It takes a header that is cut off in its name for the end.
			t.Fatalf("%v, want success", err)
		}
	})
}

// FuzzResume makes the stream itself, of any content, with many short blocks.
func FuzzResume(f *testing.F) {
	for _, data := range samples() {
		f.Add(data[:min(len(data), 1000)], int8(6), uint8(100), uint16(100))
	}
	f.Fuzz(func(t *testing.T, data []byte, level int8, times uint8, flush uint16) {
		data = bytes.Repeat(data, 1+int(times)/16)
		if len(data) > 1<<17 {
			t.Skip("a lot")
		}
		var gz bytes.Buffer
		w, err := gzip.NewWriterLevel(&gz, int(uint8(level))%12-2)
		if err != nil {
			t.Fatal(err)
		}
		every := int(flush) + 50
		for rest := data; len(rest) > 0; rest = rest[min(len(rest), every):] {
			w.Write(rest[:min(len(rest), every)])
			w.Flush()
		}
		w.Close()
		verifySpan(t, "fuzz", gz.Bytes(), data, int64(every/2))
	})
}
