package fusedev

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"testing"
)

// bytesContent is at hand but for [from, to) and what fails.
type bytesContent struct {
	data     []byte
	from, to int64
	err      error
	read     func(ctx context.Context) error
}

func (c *bytesContent) Size() int64 { return int64(len(c.data)) }

func (c *bytesContent) TryReadAt(p []byte, off int64) (bool, error) {
	if c.err != nil {
		return false, c.err
	}
	copy(p, c.data[off:off+int64(len(p))])
	return off >= c.to || off+int64(len(p)) <= c.from, nil
}

func (c *bytesContent) ReadAt(ctx context.Context, p []byte, off int64) error {
	if c.read != nil {
		if err := c.read(ctx); err != nil {
			return err
		}
	}
	copy(p, c.data[off:off+int64(len(p))])
	return nil
}

var quiet = slog.New(slog.DiscardHandler)

func newServer(t testing.TB, c Content, o Options) *Server {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet
	}
	s, err := New(c, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.cancel)
	return s
}

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i>>12) ^ byte(i)
	}
	return p
}

func encode(op uint32, unique, node uint64, arg []byte) []byte {
	p := make([]byte, inHeaderSize, inHeaderSize+len(arg))
	ne.PutUint32(p[0:], uint32(inHeaderSize+len(arg)))
	ne.PutUint32(p[4:], op)
	ne.PutUint64(p[8:], unique)
	ne.PutUint64(p[16:], node)
	return append(p, arg...)
}

func readArg(off uint64, n uint32) []byte {
	p := make([]byte, 40)
	ne.PutUint64(p[0:], 12345) // a file handle of some former process
	ne.PutUint64(p[8:], off)
	ne.PutUint32(p[16:], n)
	return p
}

// checkReply returns the errno and body of an answer.
func checkReply(t testing.TB, p []byte, unique uint64) (syscall.Errno, []byte) {
	t.Helper()
	if len(p) < outHeaderSize || int(ne.Uint32(p)) != len(p) {
		t.Fatalf("answer of %d bytes has a bad length", len(p))
	}
	if got := ne.Uint64(p[8:]); got != unique {
		t.Fatalf("answer to %#x, want %#x", got, unique)
	}
	errno := syscall.Errno(-int32(ne.Uint32(p[4:])))
	if errno != 0 && len(p) != outHeaderSize {
		t.Fatalf("error %v with a body of %d bytes", errno, len(p)-outHeaderSize)
	}
	return errno, p[outHeaderSize:]
}

func TestAnswers(t *testing.T) {
	data := pattern(3<<20 + 5)
	s := newServer(t, &bytesContent{data: data}, Options{Name: "img"})
	b, err := newBuffer()
	if err != nil {
		t.Fatal(err)
	}
	defer b.free()
	size := uint64(len(data))
	const resent = 1 << 63
	for _, test := range []struct {
		name   string
		op     uint32
		node   uint64
		unique uint64
		arg    []byte
		errno  syscall.Errno
		size   int // of the body
		data   []byte
	}{
		{name: "lookup", op: opLookup, node: 1, arg: []byte("img\x00"), size: entryOutSize},
		{name: "lookup of another", op: opLookup, node: 1, arg: []byte("im\x00"), errno: syscall.ENOENT},
		{name: "lookup below the file", op: opLookup, node: 2, arg: []byte("img\x00"), errno: syscall.ENOENT},
		{name: "lookup without NUL", op: opLookup, node: 1, arg: []byte("img"), errno: syscall.ENOENT},
		{name: "getattr root", op: opGetattr, node: 1, size: attrOutSize},
		{name: "getattr file", op: opGetattr, node: 2, size: attrOutSize},
		{name: "getattr of nothing", op: opGetattr, node: 3, errno: syscall.ESTALE},
		{name: "open", op: opOpen, node: 2, size: openOutSize},
		{name: "open of nothing", op: opOpen, node: 7, errno: syscall.ESTALE},
		{name: "statfs", op: opStatfs, node: 1, size: statfsOutSize},
		{name: "release", op: opRelease, node: 2},
		{name: "write", op: 16, node: 2, errno: syscall.ENOSYS},
		{name: "getxattr", op: 22, node: 2, errno: syscall.ENOSYS},
		{name: "unknown", op: 4000, node: 2, errno: syscall.ENOSYS},
		{name: "interrupt", op: opInterrupt, unique: 9, errno: syscall.ENOSYS},
		{name: "read", op: opRead, node: 2, arg: readArg(4096, 4096), size: 4096, data: data[4096:8192]},
		{name: "resent read", op: opRead, node: 2, unique: resent | 6, arg: readArg(0, 1<<20), size: 1 << 20, data: data[:1<<20]},
		{name: "read up to the end", op: opRead, node: 2, arg: readArg(size-5, 4096), size: 5, data: data[size-5:]},
		{name: "read at the end", op: opRead, node: 2, arg: readArg(size, 4096)},
		{name: "read past the end", op: opRead, node: 2, arg: readArg(1<<63+4096, 4096)},
		{name: "read too much", op: opRead, node: 2, arg: readArg(0, 1<<20+1), errno: syscall.EIO},
		{name: "read of the root", op: opRead, node: 1, arg: readArg(0, 1), errno: syscall.ESTALE},
		{name: "read cut short", op: opRead, node: 2, arg: make([]byte, 20), errno: syscall.EIO},
	} {
		t.Run(test.name, func(t *testing.T) {
			errno, body := checkReply(t, s.handle(encode(test.op, test.unique, test.node, test.arg), b), test.unique)
			if errno != test.errno || len(body) != test.size {
				t.Fatalf("errno %d, %d bytes; want %d, %d", errno, len(body), test.errno, test.size)
			}
			if test.data != nil && !bytes.Equal(body, test.data) {
				t.Error("wrong bytes")
			}
		})
	}
	for _, op := range []uint32{opForget, opBatchForget, opNotifyReply} {
		if out := s.handle(encode(op, 4, 2, make([]byte, 16)), b); out != nil {
			t.Errorf("opcode %d was answered", op)
		}
	}
	for _, raw := range [][]byte{nil, make([]byte, 39), encode(opRead, 1, 2, nil)[:39], append(encode(opRead, 1, 2, nil), 0)} {
		if out := s.handle(raw, b); out != nil {
			t.Errorf("malformed request of %d bytes was answered", len(raw))
		}
	}
}

func TestInit(t *testing.T) {
	s := newServer(t, &bytesContent{}, Options{})
	b, err := newBuffer()
	if err != nil {
		t.Fatal(err)
	}
	defer b.free()
	for _, test := range []struct {
		major, minor uint32
		flags        uint64
		want         uint64
		errno        syscall.Errno
	}{
		{7, 28, flagMaxPages | flagAsyncDIO, flagMaxPages | flagAsyncDIO, 0},
		{7, 99, ^uint64(0), wantedFlags, 0},
		{7, 12, flagMaxPages, 0, syscall.EPROTO},
		{8, 40, flagMaxPages, 0, syscall.EPROTO},
	} {
		arg := make([]byte, 64)
		ne.PutUint32(arg[0:], test.major)
		ne.PutUint32(arg[4:], test.minor)
		ne.PutUint32(arg[12:], uint32(test.flags))
		ne.PutUint32(arg[16:], uint32(test.flags>>32))
		for range 2 { // answered whenever it is seen
			errno, body := checkReply(t, s.handle(encode(opInit, 2, 0, arg), b), 2)
			if errno != test.errno {
				t.Fatalf("%+v: %v", test, errno)
			}
			if errno != 0 {
				continue
			}
			if got := uint64(ne.Uint32(body[12:])) | uint64(ne.Uint32(body[32:]))<<32; got != test.want {
				t.Errorf("%+v: flags %#x", test, got)
			}
			if pages := ne.Uint16(body[28:]); pages != 256 {
				t.Errorf("max_pages %d", pages)
			}
		}
	}
	if errno, _ := checkReply(t, s.handle(encode(opInit, 2, 0, make([]byte, 8)), b), 2); errno != syscall.EIO {
		t.Errorf("short INIT: %v", errno)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, name := range []string{"a/b", ".", "..", "a\x00", strings.Repeat("x", 256)} {
		if _, err := New(&bytesContent{}, Options{Name: name}); err == nil {
			t.Errorf("name %q was accepted", name)
		}
	}
}

func TestErrorsAreLoggedOnceASecond(t *testing.T) {
	var out bytes.Buffer
	s := newServer(t, &bytesContent{data: pattern(4096), err: errors.New("bad disk")},
		Options{Logger: slog.New(slog.NewTextHandler(&out, nil))})
	b, err := newBuffer()
	if err != nil {
		t.Fatal(err)
	}
	defer b.free()
	const reads = 1000
	for range reads {
		if errno, _ := checkReply(t, s.handle(encode(opRead, 1, 2, readArg(0, 4096)), b), 1); errno != syscall.EIO {
			t.Fatalf("errno %v, want EIO", errno)
		}
	}
	if s.Stats() != (Stats{Errors: reads}) {
		t.Errorf("stats %+v", s.Stats())
	}
	if n := strings.Count(out.String(), "bad disk"); n < 1 || n > reads/10 {
		t.Errorf("%d log lines for %d errors", n, reads)
	}
}

// Any request gets one well-formed answer or none, and never bytes past the
// file's end.
func FuzzHandle(f *testing.F) {
	data := pattern(100_000)
	f.Add(encode(opRead, 3, 2, readArg(99_000, 1<<20)))
	f.Add(encode(opLookup, 3, 1, []byte("image\x00")))
	f.Add(encode(opInit, 3, 0, make([]byte, 64)))
	s := newServer(f, &bytesContent{data: data}, Options{})
	b, err := newBuffer()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		out := s.handle(raw, b)
		if out == nil {
			return
		}
		r, _ := parse(raw)
		errno, body := checkReply(t, out, r.unique)
		if r.op == opRead && errno == 0 && len(body) > 0 {
			off := ne.Uint64(r.arg[8:])
			if want := data[off:min(uint64(len(data)), off+uint64(ne.Uint32(r.arg[16:])))]; !bytes.Equal(body, want) {
				t.Errorf("READ at %d: %d bytes, want %d", off, len(body), len(want))
			}
		}
	})
}
