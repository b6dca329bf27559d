package fill

// maxPrefetch bounds what Prefetch asks of a blob, in stored bytes: a third of a
// second at 100 Mbit/s, for which a reader may have to wait whose chunk comes last.
// Builders of layers put whole files first, of which starts read a part.
const maxPrefetch = 4 << 20

// Prefetch begins to fetch what the makers of the image say is read first, by one
// request for each blob of which they do, and returns at once. Readers join it.
func (im *Image) Prefetch() {
	for b, end := range im.linked.First {
		if end == 0 {
			continue
		}
		select {
		case im.ahead <- struct{}{}:
		default:
			return
		}
		wants := im.front(b, end)
		if len(wants) == 0 {
			<-im.ahead
			continue
		}
		im.requests.Go(func() {
			defer func() { <-im.ahead }()
			im.fetch(wants)
		})
	}
}

// front claims the missing chunks that lie first in a blob, up to an offset of its
// stream.
func (im *Image) front(blob int, end int64) []want {
	e := im.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range im.linked.Chunks() {
		c := im.linked.Chunk(i)
		if c.Blob != blob || c.Offset >= end || im.here(c) {
			continue
		}
		wants := im.collect(i, i, maxPrefetch, maxPrefetch)
		for n := len(wants); n > 0 && wants[n-1].chunk.Offset >= end; n-- {
			wants = wants[:n-1]
		}
		e.claim(wants, 0, 0)
		return wants
	}
	return nil
}
