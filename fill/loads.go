package fill

import (
	"fmt"
	"path"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/shale-image/shale/loader"
)

const (
	maxLoads = 512 // files of one image that are looked into
	loaders  = 6   // at a time

	// wholeObject is how large a file may be, in bytes, to come as a whole: nearly all that such
	// a library has is read, and it takes a request for four.
	wholeObject = 512 << 10

	// ahead of ld.so may be so many files, for so long. Who looks at the headers of more than
	// that, file(1) or ldconfig(8), loads none of them.
	maxUnread  = 64
	unreadTime = 30 * time.Second
)

// loads fetches what ld.so(8) will read of a program that is started, and of the libraries
// that come with it, while ld.so still reads the first of them: it opens one after the
// other, and comes back to each.
type loads struct {
	im *Image
	libraries

	mu      sync.Mutex
	seen    map[int64]bool // by flat address of a file
	queue   []object
	workers int
	unread  []unread
	code    []part // of libraries
}

// unread is where a file has what ld.so reads, and when that was found out.
type unread struct {
	flat  int64
	since time.Time
}

// object is an ELF file in the image.
type object struct {
	flat   int64
	dir    string   // where it was found, "" if it was read
	search []string // directories that are searched for what it needs
}

type part struct{ from, to int64 } // flat addresses

// Runs is told which program will be run, by its path or by its name in the first of some
// directories that has it, before anybody reads of it. If it was run here before it is of no use.
func (im *Image) Runs(name string, dirs []string) {
	l := &im.loads
	im.requests.Go(func() {
		if l.idle() || !l.open() {
			return
		}
		flat, _, ok := l.search(name, dirs)
		if !ok {
			return
		}
		f := im.file(flat)
		if f.first == f.last { // the metadata are damaged
			return
		}
		c := im.linked.Chunk(f.first)
		if s, at := im.address(c); s == nil || s.present(at, c) {
			return
		}
		p := make([]byte, 256)
		n, _ := f.ReadAt(p, 0) // what cannot be had is left to its readers
		if look := l.starts(p[:n], flat); look != nil {
			look()
		}
	})
}

// began is told what a reader was given from an address on. A file that is read from its
// start may be a program, or a library. Where nobody has had to wait for anything yet it would be
// in vain, or a start pack knows better.
func (l *loads) began(p []byte, off int64) {
	look := l.starts(p, off)
	if look == nil || l.idle() || l.im.stats.stalls.Load() == 0 || !l.im.begins(off) {
		return
	}
	l.im.requests.Go(look)
}

// starts returns what has a file looked into that begins with p, or what runs it; nil if it is
// neither a program nor a library.
func (l *loads) starts(p []byte, flat int64) (look func()) {
	if loader.IsELF(p) {
		return func() { l.add(object{flat: flat}) }
	}
	script := loader.Interpreter(p)
	if script == nil {
		return nil
	}
	return func() {
		l.need(script[:1], nil, nil)
		l.need(script[1:], programs, nil)
	}
}

// brought is began where the kernel reads itself, and was told that what it waited for is here.
func (l *loads) brought(off int64) {
	s, _ := l.im.segmentAt(off)
	if s == nil || s.pool.Sealed() || !l.im.begins(off) { // its descriptor may be younger than the marks
		return
	}
	l.im.requests.Go(func() {
		p := make([]byte, 256)
		if ok, err := l.im.copy(p, off); ok && err == nil {
			l.began(p, off)
		}
	})
}

// idle tells whether nothing is to be fetched by what is guessed.
func (l *loads) idle() bool { return l.im.led() || l.im.engine.Full() || l.im.ctx.Err() != nil }

// begins tells whether a file begins at a flat address.
func (im *Image) begins(off int64) bool {
	i := im.linked.Find(off)
	if i == im.linked.Chunks() {
		return false
	}
	c := im.linked.Chunk(i)
	return c.Flat == off && !c.Next
}

// add has a file looked into, unless it was.
func (l *loads) add(o object) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.seen[o.flat] || len(l.seen) >= maxLoads {
		return
	}
	if l.seen == nil {
		l.seen = map[int64]bool{}
	}
	l.seen[o.flat] = true
	l.queue = append(l.queue, o)
	if l.workers < loaders {
		l.workers++
		l.im.requests.Go(l.work)
	}
}

func (l *loads) work() {
	for {
		o, ok := l.next()
		if !ok {
			return
		}
		// What is no such file, or cannot be had, is left to its readers.
		_ = l.look(o)
	}
}

// next takes a file out of the queue.
func (l *loads) next() (o object, ok bool) {
	idle := l.idle()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unread = slices.DeleteFunc(l.unread, func(u unread) bool {
		return time.Since(u.since) > unreadTime || l.im.record.has(u.flat, u.flat+1)
	})
	if len(l.unread) >= maxUnread || idle {
		for _, o := range l.queue {
			delete(l.seen, o.flat) // another time
		}
		l.queue = nil
	}
	if len(l.queue) == 0 {
		l.workers--
		return object{}, false
	}
	o, l.queue = l.queue[0], l.queue[1:]
	return o, true
}

// look looks into a file.
func (l *loads) look(o object) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
			l.im.engine.opt.Logger.Error("looking into a file panicked", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	f := l.im.file(o.flat)
	if f.end-f.flat <= wholeObject {
		l.im.expect(f.first, f.last)
	}
	return loader.Load(&f, func(x *loader.Object) { l.found(o, x, f.end) })
}

// found is told what is loaded with an object, whose file ends at a flat address.
func (l *loads) found(o object, x *loader.Object, end int64) {
	const most = 8 // parts of one file
	l.mu.Lock()
	if at := o.flat + x.Data.Off; x.Data.Size > 0 && at < end && l.im.record != nil {
		l.unread = append(l.unread, unread{at, time.Now()})
	}
	if !x.Program && o.dir != "" { // of programs more is read, and of what is opened for itself
		for _, r := range x.Code[:min(len(x.Code), most)] {
			if from := o.flat + r.Off; from < end {
				l.code = append(l.code, part{from, min(end, from+r.Size)})
			}
		}
	}
	l.mu.Unlock()
	search := slices.Clip(o.search)
	for _, dir := range x.Search {
		if rest, ok := strings.CutPrefix(dir, "$ORIGIN"); ok {
			from := o.dir
			if x.Program || from == "" { // a program's has no symbolic links
				from = l.dir(o.flat)
			}
			if from == "" {
				continue
			}
			dir = from + rest
		}
		if dir = path.Clean(dir); path.IsAbs(dir) && !slices.Contains(search, dir) && len(search) < 32 {
			search = append(search, dir)
		}
	}
	l.need(append([]string{x.Interp}, x.Needed...), slices.Concat(search, standard(x.Machine)), search)
}

// window is how much one request may bring of a library's code, of which chunk i is to be read:
// twice as much as has been read of what is around it, since of most libraries little is,
// and of a few nearly all. It returns false for what is no such code.
func (l *loads) window(i int) (int64, bool) {
	im := l.im
	flat := im.linked.Chunk(i).Flat
	l.mu.Lock()
	n := slices.IndexFunc(l.code, func(s part) bool { return flat >= s.from && flat < s.to })
	var code part
	if n >= 0 {
		code = l.code[n]
	}
	l.mu.Unlock()
	if n < 0 || im.record == nil {
		return 0, false
	}
	const around = 64
	var read int64
	for k := max(0, i-around); k < min(i+around, im.linked.Chunks()); k++ {
		if c := im.linked.Chunk(k); c.Flat >= code.from && c.Flat < code.to && im.record.has(c.Flat, c.Flat+int64(c.Size)) {
			read += im.linked.StoredShare(c)
		}
	}
	o := &im.engine.opt
	return min(o.Neighbours+2*read, 4*o.Window), true
}
