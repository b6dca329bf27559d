package memblob_test

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/blob/memblob"
)

func TestConformance(t *testing.T) {
	blobtest.Run(t, func(contents map[string][]byte) blob.Source { return memblob.New(contents) })
}

func TestFault(t *testing.T) {
	s := memblob.New(nil)
	ref := s.Put([]byte("0123456789"))
	var fault *memblob.Fault
	s.Fault = func(context.Context, blob.Ref, int64, int64) *memblob.Fault { return fault }
	broken := errors.New("broken")
	for _, c := range []struct {
		fault *memblob.Fault
		want  string
		err   error
	}{
		{nil, "2345", nil},
		{&memblob.Fault{After: -1, Err: broken}, "", broken},
		{&memblob.Fault{After: 0, Err: broken}, "", broken},
		{&memblob.Fault{After: 3, Err: broken}, "234", broken},
		{&memblob.Fault{After: 99, Err: broken}, "2345", broken},
		{&memblob.Fault{Flip: 1}, "3345", nil},
		{&memblob.Fault{After: 1, Err: broken, Flip: 1}, "3", broken},
	} {
		fault = c.fault
		var got []byte
		r, err := s.Range(t.Context(), ref, 2, 4)
		if err == nil {
			got, err = io.ReadAll(r)
		}
		if string(got) != c.want || !errors.Is(err, c.err) {
			t.Errorf("%+v: %q, %v", c.fault, got, err)
		}
	}
	fault = nil
	if p, _ := blob.ReadAll(t.Context(), s, ref, 0, 10); string(p) != "0123456789" {
		t.Errorf("a flip reached the object: %q", p)
	}
}
