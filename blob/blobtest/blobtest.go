// Package blobtest is the conformance suite of blob.Source: what every source
// and every wrapper must do, whatever is behind it.
package blobtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/shale-image/shale/blob"
)

// Run tests the source that open returns for the given objects, keyed by
// digest. open is called once and must not modify the contents.
func Run(t *testing.T, open func(contents map[string][]byte) blob.Source) {
	rnd := rand.NewChaCha8([32]byte{1})
	big := make([]byte, 3<<20+17)
	rnd.Read(big)
	small := []byte("small object")
	one := []byte{0xff}
	contents := map[string][]byte{}
	add := func(p []byte) blob.Ref {
		ref := Ref(p)
		contents[ref.Digest] = p
		return ref
	}
	bigRef, smallRef, oneRef := add(big), add(small), add(one)
	src := open(contents)
	ctx := t.Context()
	size := int64(len(big))

	t.Run("ranges", func(t *testing.T) {
		for _, c := range []struct{ off, n int64 }{
			{0, 1}, {0, size}, {size - 1, 1}, {1, 4096}, {65535, 2}, {1 << 20, 1 << 20}, {size - 70000, 70000}, {4095, 100001},
		} {
			for _, ref := range []blob.Ref{bigRef, {Digest: bigRef.Digest}} {
				r, err := src.Range(ctx, ref, c.off, c.n)
				if err != nil {
					t.Fatalf("%d bytes at %d: %v", c.n, c.off, err)
				}
				got, err := io.ReadAll(r)
				if err != nil || !bytes.Equal(got, big[c.off:c.off+c.n]) {
					t.Errorf("%d bytes at %d: wrong bytes, or %v", c.n, c.off, err)
				}
				if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Errorf("%d bytes at %d: after the end: %d, %v", c.n, c.off, n, err)
				}
				if err := r.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}
		}
		if got, err := blob.ReadAll(ctx, src, oneRef, 0, 1); err != nil || !bytes.Equal(got, one) {
			t.Errorf("one byte: %x, %v", got, err)
		}
	})
	t.Run("any way of reading", func(t *testing.T) {
		for _, wrap := range []func(io.Reader) io.Reader{iotest.OneByteReader, iotest.HalfReader, iotest.DataErrReader} {
			r, err := src.Range(ctx, smallRef, 1, 7)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(wrap(r))
			if err != nil || string(got) != "mall ob" {
				t.Errorf("%q, %v", got, err)
			}
			r.Close()
		}
		r, err := src.Range(ctx, smallRef, 0, 5)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		var buf bytes.Buffer
		if n, err := io.Copy(&buf, r); n != 5 || err != nil || buf.String() != "small" {
			t.Errorf("copy: %d, %v, %q", n, err, buf.String())
		}
	})
	t.Run("bad ranges", func(t *testing.T) {
		for _, c := range []struct{ off, n int64 }{
			{0, size + 1}, {size, 1}, {size + 1, 1}, {1 << 40, 1}, {-1, 1}, {0, 0}, {0, -1}, {1<<63 - 1, 1<<63 - 1},
		} {
			for _, ref := range []blob.Ref{bigRef, {Digest: bigRef.Digest}} {
				r, err := src.Range(ctx, ref, c.off, c.n)
				if err == nil {
					r.Close()
				}
				if !errors.Is(err, blob.ErrRange) || !named(err, ref) {
					t.Errorf("%d bytes at %d of %d (size told: %v): %v", c.n, c.off, size, ref.Size != 0, err)
				}
			}
		}
	})
	t.Run("not found", func(t *testing.T) {
		missing := Ref([]byte("missing"))
		if _, err := src.Range(ctx, missing, 0, 1); !errors.Is(err, blob.ErrNotFound) || !named(err, missing) {
			t.Errorf("%v", err)
		}
	})
	t.Run("early close", func(t *testing.T) {
		for range 8 {
			r, err := src.Range(ctx, bigRef, 0, size)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("context", func(t *testing.T) {
		done, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := src.Range(done, bigRef, 0, 1); !errors.Is(err, context.Canceled) || errors.Is(err, blob.ErrUnavailable) {
			t.Errorf("cancelled before: %v", err)
		}
		during, cancel := context.WithCancel(ctx)
		defer cancel()
		r, err := src.Range(during, bigRef, 0, size)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		io.ReadFull(r, make([]byte, 10))
		cancel()
		if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled in the body: %v", err)
		}
	})
	t.Run("concurrent", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range int64(16) {
			wg.Go(func() {
				off := i * 200000
				n := min(200000, size-off)
				got, err := blob.ReadAll(ctx, src, bigRef, off, n)
				if err != nil || !bytes.Equal(got, big[off:off+n]) {
					t.Errorf("%d bytes at %d: wrong bytes, or %v", n, off, err)
				}
			})
		}
		wg.Wait()
	})
}

// Ref names an object by its content.
func Ref(p []byte) blob.Ref {
	return blob.Ref{Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(p)), Size: int64(len(p))}
}

func named(err error, ref blob.Ref) bool {
	return err != nil && bytes.Contains([]byte(err.Error()), []byte(ref.Digest))
}
