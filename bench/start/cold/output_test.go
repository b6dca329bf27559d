package cold

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestOutput(t *testing.T) {
	for _, tt := range []struct {
		line   string
		writes []string
		want   int // which write has what is awaited; -1: none
	}{
		{"", nil, -1},
		{"", []string{"x", "y"}, 0},
		{"ok", []string{"ok\n", "ok\n"}, 0},
		{"ok", []string{"no\n", "ok\n", "ok\n"}, 1},
		{"ok", []string{"no\no", "k"}, 1},
		{"ok", []string{"not ok\n", "nor ok"}, -1},
		{"ok", nil, -1},
	} {
		o, err := newOutput(tt.line)
		if err != nil {
			t.Fatal(err)
		}
		seen := make([]time.Duration, len(tt.writes)+1) // when each write began
		for i, s := range tt.writes {
			seen[i] = time.Since(o.start)
			if _, err := o.w.WriteString(s); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Millisecond) // so that it is read by itself
		}
		seen[len(tt.writes)] = time.Since(o.start)
		o.close()
		o.close()
		after, err := o.first()
		if (err == nil) != (tt.want >= 0) {
			t.Errorf("%q in %q: %v, %v", tt.line, tt.writes, after, err)
		} else if err == nil && after < seen[tt.want] {
			t.Errorf("%q in %q: after %v, before it was written at %v", tt.line, tt.writes, after, seen[tt.want])
		}
		if said := strings.Join(tt.writes, ""); o.all.String() != said {
			t.Errorf("read %q, want %q", o.all.Bytes(), said)
		}
	}
}

func TestExplain(t *testing.T) {
	o, err := newOutput("")
	if err != nil {
		t.Fatal(err)
	}
	o.close()
	boom := errors.New("boom")
	if got := o.explain(boom); got != boom {
		t.Errorf("with nothing said: %v", got)
	}
	o.all.WriteString(" why\n")
	if got := o.explain(boom); !errors.Is(got, boom) || !strings.HasSuffix(got.Error(), "\nwhy") {
		t.Errorf("%v", got)
	}
}
