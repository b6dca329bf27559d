package reader

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"go.uber.org/goleak"

	"github.com/shale-image/shale/index"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bootstrapLayer makes a tar+gzip layer.
func bootstrapLayer(t testing.TB, headers ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.Copy(w, io.LimitReader(strings.NewReader(strings.Repeat("bootstrap ", 1000)), h.Size))
	}
	w.Flush()
	z.Close()
	return b.Bytes()
}

func TestUnpack(t *testing.T) {
	boot := &tar.Header{Name: "./image/image.boot", Size: 5000}
	good := bootstrapLayer(t, &tar.Header{Name: "image/", Typeflag: tar.TypeDir}, &tar.Header{Name: "image/other", Size: 3}, boot)
	var out bytes.Buffer
	if n, err := Unpack(&out, bytes.NewReader(good)); err != nil || n != 5000 || out.Len() != 5000 || !strings.HasPrefix(out.String(), "bootstrap ") {
		t.Errorf("%d bytes, %v", n, err)
	}
	broken := errors.New("broken")
	for name, test := range map[string]struct {
		layer []byte
		is    error
	}{
		"empty":                 {nil, index.ErrCorrupt},
		"no archive":            {[]byte("hello"), index.ErrCorrupt},
		"nothing inside":        {bootstrapLayer(t, &tar.Header{Name: "image/", Typeflag: tar.TypeDir}), index.ErrCorrupt},
		"another name":          {bootstrapLayer(t, &tar.Header{Name: "image/image.boot2", Size: 10}), index.ErrCorrupt},
		"a link":                {bootstrapLayer(t, &tar.Header{Name: "image/image.boot", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}), index.ErrCorrupt},
		"cut off in the stream": {good[:len(good)-20], index.ErrCorrupt},
		"cut off in the file":   {bootstrapLayer(t, &tar.Header{Name: "image/image.boot", Size: 20000}), index.ErrCorrupt},
		"large":                 {bootstrapLayer(t, &tar.Header{Name: "image/image.boot", Size: maxBootstrap + 1}), index.ErrLimit},
	} {
		if _, err := Unpack(io.Discard, bytes.NewReader(test.layer)); !errors.Is(err, test.is) {
			t.Errorf("%s: got error %v, want %v", name, err, test.is)
		}
	}
	if _, err := Unpack(&failing{broken}, bytes.NewReader(good)); err != broken {
		t.Errorf("where the writer fails: %v", err)
	}
	if _, err := Unpack(io.Discard, io.MultiReader(bytes.NewReader(good[:30]), &failing{broken})); !errors.Is(err, broken) || errors.Is(err, index.ErrCorrupt) {
		t.Errorf("where the reader fails: %v", err)
	}
}

type failing struct{ err error }

func (f *failing) Write([]byte) (int, error) { return 0, f.err }
func (f *failing) Read([]byte) (int, error)  { return 0, f.err }

// FuzzUnpack has arbitrary bytes as a bootstrap layer: an error says that they
// are wrong, and memory and output stay in bounds.
func FuzzUnpack(f *testing.F) {
	f.Add(bootstrapLayer(f, &tar.Header{Name: "image/image.boot", Size: 5000}))
	f.Add(bootstrapLayer(f, &tar.Header{Name: "image/", Typeflag: tar.TypeDir}, &tar.Header{Name: "image/image.boot", Size: 1}))
	f.Add([]byte("\x28\xb5\x2f\xfd"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		var out bytes.Buffer
		n, err := Unpack(&out, bytes.NewReader(p))
		if err == nil && n != int64(out.Len()) {
			t.Errorf("says %d bytes, wrote %d", n, out.Len())
		}
		if err != nil && !errors.Is(err, index.ErrCorrupt) && !errors.Is(err, index.ErrLimit) && !errors.Is(err, index.ErrUnsupported) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}
