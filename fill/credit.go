package fill

import "time"

const (
	// mostCredit is for how long readers wait, all in all, for a start pack that brings
	// nothing.
	mostCredit = 500 * time.Millisecond

	// packPace is the least pace, in bytes of content a second, at which a pack is waited
	// for without end: a link of about 4 Mbit/s. Where requests are known to be slower
	// than four times this, a quarter of theirs is enough.
	packPace = 1e6
)

// credit is for how long readers still wait for a start pack, all of them together. The
// time in which somebody waits is taken off; what the pack brings makes up for it. A pack
// that has used it up is late: nobody waits for it, until it has made up for all. So one
// that hangs delays readers once, and one that dribbles now and then. It is used under
// its landing's lock.
type credit struct {
	left    time.Duration
	late    bool
	waiting int
	since   time.Time // up to when waiting has been taken off
}

// spend takes off the time until now.
func (c *credit) spend(now time.Time) {
	if c.waiting > 0 {
		c.left = max(0, c.left-now.Sub(c.since))
	}
	c.since = now
	c.late = c.late || c.left == 0
}

// earn adds the time that n bytes may take at a pace.
func (c *credit) earn(now time.Time, n int, pace float64) {
	c.spend(now)
	c.left = min(mostCredit, c.left+time.Duration(float64(n)/pace*float64(time.Second)))
	c.late = c.late && c.left < mostCredit
}

// pace is how fast a start pack has to come.
func (w *worth) pace() float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.rate > 0 {
		return min(packPace, w.rate/4)
	}
	return packPace
}
