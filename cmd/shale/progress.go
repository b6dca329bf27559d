package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"
)

// progress shows how long work goes on: bars on a terminal, else a plain line
// for each step that begins. It writes to standard error only.
type progress struct {
	mu   sync.Mutex
	out  io.Writer
	bars *mpb.Progress // nil: plain lines
	open map[string]*mpb.Bar
	said map[string]bool
	next time.Time // of the next plain line about the same step
}

func newProgress() *progress {
	p := &progress{out: os.Stderr, open: map[string]*mpb.Bar{}, said: map[string]bool{}}
	if _, err := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS); err == nil {
		p.bars = mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(48))
	}
	return p
}

// step tells that done of total bytes of a step are done.
func (p *progress) step(name string, done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bars == nil {
		if p.said[name] && time.Now().Before(p.next) {
			return
		}
		p.next = time.Now().Add(5 * time.Second)
		if p.said[name] {
			fmt.Fprintf(p.out, "%s: %s of %s\n", name, size(done), size(total))
		} else {
			fmt.Fprintf(p.out, "%s (%s)\n", name, size(total))
		}
		p.said[name] = true
		return
	}
	b := p.open[name]
	if b == nil {
		b = p.bars.AddBar(total,
			mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.CountersKiloByte("% .1f / % .1f")))
		p.open[name] = b
	}
	b.SetCurrent(done)
}

// end takes the bars away, finished or not.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bars == nil {
		return
	}
	for _, b := range p.open {
		if !b.Completed() {
			b.Abort(false)
		}
	}
	p.bars.Wait()
}
