package daemon

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/shale-image/shale/trace"
)

// What waits is bounded by what was read, and is kept a little at a time, of one image
// after the other.
func TestShelf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		var kept []string
		var s shelf
		touches := make([]trace.Touch, maxAtATime)
		s.init(func(_ context.Context, all []*recording) error {
			n := 0
			for _, r := range all {
				n += len(r.Touches)
			}
			kept = append(kept, fmt.Sprintf("%s: %d runs, %d", all[0].manifest, len(all), n/(maxAtATime/4)))
			return nil
		}, slog.New(slog.NewTextHandler(&log, nil)))
		add := func(digest string, quarters int) {
			s.add(&recording{manifest: digest, Touches: touches[:quarters*(maxAtATime/4)]})
		}
		add("a", 1)
		add("b", 4)
		add("a", 2)
		add("a", 3)
		add("a", 4)
		if n := len(s.of("a")); n != 4 {
			t.Errorf("%d of a wait", n)
		}
		for range maxTouches/maxAtATime - 4 {
			add("c", 4)
		}
		if log.Len() > 0 {
			t.Error(log.String())
		}
		add("d", 4)
		if !strings.Contains(log.String(), "digest=d") || len(s.of("d")) > 0 {
			t.Errorf("%s", log.String())
		}
		add("d", 2) // room for that is left
		s.flush()
		want := []string{"a: 2 runs, 3", "b: 1 runs, 4", "a: 1 runs, 3", "a: 1 runs, 4"}
		for range maxTouches/maxAtATime - 4 {
			want = append(want, "c: 1 runs, 4")
		}
		want = append(want, "d: 1 runs, 2")
		if !slices.Equal(kept, want) || s.busy() || s.touches != 0 {
			t.Errorf("kept %q, want %q; %d touches left", kept, want, s.touches)
		}
		var many shelf
		many.init(s.keep, s.log)
		for range maxWaiting { // of which nothing is known but that they were
			many.add(&recording{manifest: "e"})
		}
		log.Reset()
		if many.add(&recording{manifest: "f"}); !strings.Contains(log.String(), "digest=f") {
			t.Errorf("%s", log.String())
		}
		many.flush()
	})
}
