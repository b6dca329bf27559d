package count_test

import (
	"context"
	"io"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/blob/count"
	"github.com/shale-image/shale/blob/memblob"
)

func TestConformance(t *testing.T) {
	blobtest.Run(t, func(contents map[string][]byte) blob.Source { return count.New(memblob.New(contents)) })
}

func TestStats(t *testing.T) {
	mem := memblob.New(nil)
	ref := mem.Put(make([]byte, 100))
	src := count.New(mem)
	if _, err := blob.ReadAll(t.Context(), src, ref, 0, 60); err != nil {
		t.Fatal(err)
	}
	if _, err := blob.ReadAll(t.Context(), src, ref, 60, 60); err == nil {
		t.Fatal("a range after the end succeeds")
	}
	mem.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault {
		return &memblob.Fault{After: 7, Err: io.ErrUnexpectedEOF}
	}
	r, err := src.Range(t.Context(), ref, 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	io.ReadAll(r)
	r.Read(make([]byte, 1)) // the same failure is not counted again
	if got, want := src.Stats(), (count.Stats{Requests: 3, Bytes: 67, Errors: 2}); got != want {
		t.Errorf("%+v, expected %+v", got, want)
	}
}
