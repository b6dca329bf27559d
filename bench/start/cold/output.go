package cold

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// output is a pipe that knows when what is awaited was first written to it.
type output struct {
	w     *os.File
	line  string // how the awaited line begins; "": any byte will do
	start time.Time
	once  sync.Once
	done  chan struct{} // closed when nobody writes any more

	// Valid once done is closed.
	after time.Duration // 0: what is awaited did not come
	all   bytes.Buffer
}

// newOutput makes the pipe; time counts from now. The caller calls close.
func newOutput(line string) (*output, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	o := &output{w: w, line: line, start: time.Now(), done: make(chan struct{})}
	go func() {
		defer close(o.done)
		defer r.Close()
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			o.all.Write(buf[:n])
			if n > 0 && o.after == 0 && o.found() {
				o.after = time.Since(o.start)
			}
			if err != nil {
				return
			}
		}
	}()
	return o, nil
}

func (o *output) found() bool {
	all := o.all.Bytes()
	return o.line == "" || bytes.HasPrefix(all, []byte(o.line)) || bytes.Contains(all, []byte("\n"+o.line))
}

// close waits until all that was written is read. It may be called again.
func (o *output) close() {
	o.once.Do(func() { o.w.Close() })
	<-o.done
}

// first returns when the awaited came, after close.
func (o *output) first() (time.Duration, error) {
	if o.after == 0 {
		if o.line == "" {
			return 0, errors.New("the command printed nothing")
		}
		return 0, o.explain(fmt.Errorf("the command printed no line that begins with %q", o.line))
	}
	fmt.Fprintf(os.Stderr, "   after %.2f s: %q\n", o.after.Seconds(), bytes.TrimSpace(o.all.Bytes()))
	return o.after, nil
}

// explain adds to an error what the command said, after close.
func (o *output) explain(err error) error {
	if said := bytes.TrimSpace(o.all.Bytes()); len(said) > 0 {
		return fmt.Errorf("%w; it printed:\n%s", err, said)
	}
	return err
}
