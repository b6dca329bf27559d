package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// TestPace: what nobody waits for is read at the rate that is set, not while readers wait,
// and one thing at a time.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn, loud := make(chan struct{}, 1), make(chan struct{})
		quiet := true
		p := &pace{turn: turn, rate: 1 << 20, quiet: func(ctx context.Context) error {
			if !quiet {
				<-loud
			}
			return ctx.Err()
		}}
		data := bytes.Repeat([]byte("0123456789abcdef"), 4<<20/16)
		begun := time.Now()
		read := func(ctx context.Context) error {
			got, err := io.ReadAll(p.reader(ctx, bytes.NewReader(data)))
			if err == nil && !bytes.Equal(got, data) {
				err = errors.New("other bytes")
			}
			return err
		}
		must(t, read(t.Context()))
		if took := time.Since(begun); took < 4*time.Second-time.Millisecond || took > 4*time.Second+time.Millisecond {
			t.Errorf("4 MiB at 1 MiB/s took %v", took)
		}
		ended := make(chan error, 2)
		begun = time.Now()
		for range 2 {
			go func() { ended <- read(t.Context()) }()
		}
		must(t, <-ended)
		must(t, <-ended)
		if took := time.Since(begun); took < 8*time.Second-time.Millisecond {
			t.Errorf("two of them took %v", took)
		}
		quiet = false
		go func() { ended <- read(t.Context()) }()
		time.Sleep(time.Hour)
		select {
		case err := <-ended:
			t.Errorf("it did not wait for readers: %v", err)
		default:
		}
		quiet = true
		close(loud)
		must(t, <-ended)

		// One whose source hangs holds up nobody else.
		r, w := io.Pipe()
		hung, cancel := context.WithCancel(t.Context())
		go func() {
			_, err := io.ReadAll(p.reader(hung, r))
			ended <- err
		}()
		synctest.Wait()
		must(t, read(t.Context()))
		w.CloseWithError(io.ErrUnexpectedEOF)
		if err := <-ended; err != io.ErrUnexpectedEOF {
			t.Error(err)
		}
		cancel()
		if err := read(hung); err != context.Canceled {
			t.Error(err)
		}
		if len(turn) != 0 {
			t.Error("a turn is never given back")
		}
	})
}
