package daemon

import (
	"context"
	"errors"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/index"
)

// What children of tests do.
func init() {
	children["test-hungry"] = func() error {
		var all [][]byte
		for range 1 << 20 {
			p := make([]byte, 1<<20)
			for i := 0; i < len(p); i += 4096 {
				p[i] = 1
			}
			all = append(all, p)
		}
		runtime.KeepAlive(all)
		return nil
	}
	children["test-wasteful"] = func() error { // of which little is in use at a time
		var keep [32][]byte
		for i := range 4096 {
			p := make([]byte, 1<<20)
			for i := 0; i < len(p); i += 4096 {
				p[i] = 1
			}
			keep[i%len(keep)] = p
		}
		runtime.KeepAlive(keep)
		return nil
	}
	children["test-told"] = func() error {
		p, err := os.ReadFile("/proc/self/oom_score_adj")
		if string(p) != "1000\n" || err != nil {
			return errors.New("the machine's lack of memory is not for this process: " + string(p))
		}
		return index.Errorf(index.ErrLimit, "something", 7, "too much")
	}
}

// raced: the tests run under the race detector.
var raced bool

func TestChildMemory(t *testing.T) {
	if raced {
		t.Skip("the race detector reserves more memory than a child may have")
	}
	s := &store{cfg: &config.Config{}}
	if l := s.limits(); l.Memory < 16<<20 || l.Memory > 4<<30 || l.Entries != 10_000_000 {
		t.Errorf("the limits are %+v", l)
	}
	s.cfg.Limits.Memory = 256 << 20
	_, err := s.ask(t.Context(), "test-hungry", nil)
	if !errors.Is(err, index.ErrLimit) || !strings.Contains(err.Error(), "268435456 bytes of memory (Memory)") || strings.Contains(err.Error(), "goroutine") {
		t.Error("who has too much:", err)
	}
	if _, err := s.ask(t.Context(), "test-wasteful", nil); err != nil {
		t.Error("who has less than that at a time:", err)
	}
	if _, err := s.ask(t.Context(), "test-told", nil); err == nil || err.Error() != "something: at offset 7: limit exceeded: too much" {
		t.Error("who says what is wrong:", err)
	}
	for says, out := range map[string]bool{
		"runtime: out of memory: cannot allocate 4194304-byte block\nfatal error: out of memory\n": true,
		"fatal error: runtime: cannot allocate memory\n\nruntime stack:\n":                         true,
		"panic: out of memory\n\ngoroutine 1 [running]:\n":                                         false,
		"fatal error: all goroutines are asleep - deadlock!\n\nout of memory":                      false,
		"": false,
	} {
		if head(says).outOfMemory() != out {
			t.Errorf("%q", says)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.ask(ctx, "test-hungry", nil); !errors.Is(err, context.Canceled) {
		t.Error("nobody waits for it:", err)
	}
	// This process is not what was limited.
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_DATA, &l); err != nil || l.Cur == 256<<20 || debug.SetMemoryLimit(-1) <= 256<<20 {
		t.Error("the service is limited", l, err)
	}
}
