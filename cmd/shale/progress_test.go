package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/vbauerster/mpb/v8"
)

// TestProgressLines has no terminal: a line for each step, not for each event.
func TestProgressLines(t *testing.T) {
	var out bytes.Buffer
	p := newProgress()
	p.out, p.bars = &out, nil
	for done := range int64(100) {
		p.step("read 1", done, 100)
		p.step("read 2", done, 0)
	}
	p.end()
	if got := out.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "read 1 (100 B)\n") {
		t.Errorf("%q", got)
	}
}

// TestProgressBars ends with bars that never were full, one of them of a length
// that nobody knows.
func TestProgressBars(t *testing.T) {
	p := newProgress()
	p.bars = mpb.New(mpb.WithOutput(&bytes.Buffer{}))
	p.step("whole", 100, 100)
	p.step("half", 50, 100)
	p.step("unknown", 50, 0)
	p.end() // must return
}
