package httpblob

import (
	"fmt"
	"testing"
	"time"
)

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-1/2", "bytes 5-9/*", "bytes -1-2/3", "bytes 1-0/5", "bytes 0-9223372036854775807/9223372036854775807", "bytes 0-1/1", "items 0-1/2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, total, ok := parseContentRange(s)
		if ok && (first < 0 || last < first || total >= 0 && last >= total) {
			t.Fatalf("%q: %d %d %d", s, first, last, total)
		}
		if first, last, total, ok := parseContentRange(fmt.Sprintf("bytes %d-%d/%d", first, last, total)); ok && (first < 0 || total <= last) {
			t.Fatalf("%q", s)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "-7": 0, "x": 0, "99999999999": 1 << 31 * time.Second,
		"Fri, 02 Jan 2026 03:05:05 GMT": time.Minute, "Fri, 02 Jan 2026 03:03:05 GMT": 0,
	} {
		if got := parseRetryAfter(in, now); got != want {
			t.Errorf("%q: %v, expected %v", in, got, want)
		}
	}
}

func TestRedirectsAreBounded(t *testing.T) {
	var r redirects
	for i := range 3 * maxRedirects {
		r.put(fmt.Sprint(i), "https://storage.example/")
	}
	if len(r.m) > maxRedirects || r.get(fmt.Sprint(3*maxRedirects-1)) == "" {
		t.Errorf("%d entries", len(r.m))
	}
}
