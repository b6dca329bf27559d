package script

import (
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/shale-image/shale/bench/netmodel"
)

// Disk is what faults of the disk are done to.
type Disk interface {
	// Fault begins or ends a fault of the given kind: "disk full", ...
	Fault(kind string, on bool) error
}

// Player acts a script out.
type Player struct {
	Packs []string // digests of what is a start pack; to be set before Play

	proxy *netmodel.Proxy
	doors *doors

	mu     sync.Mutex
	parts  []*part // nil while nothing goes wrong
	timers []*time.Timer
	disk   Disk
	err    error
}

// part is a fault that is acted out.
type part struct {
	Fault
	packs []string
	start time.Time
	seen  int           // requests that it is about
	begun time.Time     // zero: not yet
	first int           // seen before it began
	met   int           // requests that have met it, or times that it has begun
	done  chan struct{} // closed when what was last done to the disk is done; nil: nothing was
}

// NewPlayer has a proxy ask the player about each request from now on. Nothing goes
// wrong before Play.
func NewPlayer(p *netmodel.Proxy) *Player {
	pl := &Player{proxy: p, doors: newDoors(p.Host())}
	p.SetFaults(pl.fate)
	return pl
}

// Play begins a script. disk may be nil if the script has no faults of it.
func (p *Player) Play(s *Script, disk Disk) {
	p.Stop()
	wait(p.start(s, disk))
}

// wait waits for what is done to the disk.
func wait(done []chan struct{}) {
	for _, done := range done {
		<-done
	}
}

// doing is what is being done to the disk. The lock is held.
func (p *Player) doing() (done []chan struct{}) {
	for _, a := range p.parts {
		if a.done != nil {
			done = append(done, a.done)
		}
	}
	return done
}

func (p *Player) start(s *Script, disk Disk) (doing []chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.disk, p.err = disk, nil
	for _, f := range s.Faults {
		a := &part{Fault: f, packs: p.Packs, start: time.Now()}
		p.parts = append(p.parts, a)
		switch k := kinds[f.Kind]; {
		case !k.disk && !k.lasts || f.After.Requests > 0:
		case f.After.Time > 0:
			p.later(f.After.Time, func() { p.begin(a) })
		default:
			p.begin(a)
		}
	}
	return p.doing()
}

// Stop ends all faults, and returns what could not be done of the script. Requests
// that hang go on hanging; tokens and signed URLs that were given are good.
func (p *Player) Stop() error {
	wait(p.end())
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

func (p *Player) end() (doing []chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.timers {
		t.Stop()
	}
	for _, a := range p.parts {
		if !a.begun.IsZero() {
			p.last(a, false)
		}
	}
	doing = p.doing()
	p.parts, p.timers = nil, nil
	return doing
}

// Met returns how often each fault of the script has happened.
func (p *Player) Met() (n []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.parts {
		n = append(n, a.met)
	}
	return n
}

// later calls fn, with the lock held, unless the script has ended by then. The lock
// is held.
func (p *Player) later(d time.Duration, fn func()) {
	var t *time.Timer
	t = time.AfterFunc(d, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if slices.Contains(p.timers, t) {
			fn()
		}
	})
	p.timers = append(p.timers, t)
}

// begin begins a fault that lasts for a time. The lock is held.
func (p *Player) begin(a *part) {
	a.begun = time.Now()
	a.met++
	p.last(a, true)
	if a.For.Time > 0 {
		p.later(a.For.Time, func() { p.last(a, false) })
	}
}

// last begins or ends what lasts. The lock is held.
func (p *Player) last(a *part, on bool) {
	switch {
	case a.Kind == "refuse":
		p.note(p.proxy.Refuse(on))
	case a.Kind == "quota": // is the node's from the beginning
	case kinds[a.Kind].disk && p.disk != nil:
		// One that hangs holds up who fills it: not us, who are to end that.
		disk, before, done := p.disk, a.done, make(chan struct{})
		a.done = done
		go func() {
			defer close(done)
			if before != nil {
				<-before
			}
			err := disk.Fault(a.Kind, on)
			p.mu.Lock()
			defer p.mu.Unlock()
			p.note(err)
		}()
	}
}

// note keeps the first error. The lock is held.
func (p *Player) note(err error) {
	if p.err == nil {
		p.err = err
	}
}

// fate says what is to happen to a request.
func (p *Player) fate(r *http.Request) *netmodel.Fault {
	f := &netmodel.Fault{Answer: follow}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, a := range p.parts {
		if !a.due(r, now) {
			continue
		}
		switch k := kinds[a.Kind]; {
		case k.lasts:
			p.begin(a)
		default:
			a.met++
			k.do(p, a.Args, f, r)
		}
	}
	p.doors.enter(f, r)
	return f
}

// due tells whether a request meets the fault, and counts it.
func (a *part) due(r *http.Request, now time.Time) bool {
	if kinds[a.Kind].disk || !a.concerns(r.URL.Path) {
		return false
	}
	n := a.seen
	a.seen++
	if n < a.After.Requests || now.Sub(a.start) < a.After.Time {
		return false
	}
	if kinds[a.Kind].lasts {
		return a.After.Requests > 0 && a.begun.IsZero()
	}
	if a.begun.IsZero() {
		a.begun, a.first = now, n
	}
	n -= a.first
	switch {
	case a.For.Time > 0 && now.Sub(a.begun) >= a.For.Time:
		return false
	case a.Every > 0 && (n+1)%a.Every != 0:
		return false
	}
	return a.For.Requests == 0 || n < a.For.Requests
}

// concerns tells whether a path is one that the fault is on.
func (a *part) concerns(path string) bool {
	switch a.On {
	case "all":
		return true
	case "":
		return isBlob(path) || strings.HasPrefix(path, signedPath)
	case "manifests":
		return isManifest(path)
	case "tokens":
		return path == tokenPath
	case "packs":
		return isBlob(path) && slices.ContainsFunc(a.packs, func(digest string) bool { return strings.HasSuffix(path, "/"+digest) })
	}
	return strings.Contains(path, a.On)
}

// follow takes the place of a redirect of the registry: what is behind it shall have
// the same faults.
func follow(resp *http.Response) {
	if resp.Request.Method != http.MethodGet || resp.StatusCode/100 != 3 || resp.Header.Get("Location") == "" {
		return
	}
	to, err := resp.Location()
	if err != nil {
		return
	}
	req, err := http.NewRequestWithContext(resp.Request.Context(), http.MethodGet, to.String(), nil)
	if err != nil {
		return
	}
	if rng := resp.Request.Header.Get("Range"); rng != "" {
		req.Header.Set("Range", rng)
	}
	req.Header.Set("Accept-Encoding", "identity")
	behind, err := http.DefaultClient.Do(req)
	if err != nil {
		return
	}
	resp.Body.Close()
	*resp = *behind
}
