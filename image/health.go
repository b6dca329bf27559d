package image

import (
	"sync"

	"github.com/shale-image/shale/blob/choose"
)

// How registries fare is known to all images of this process that ask them in the same
// name: what one of them has waited for, the others need not.
var healths = struct {
	sync.Mutex
	of map[identity]*choose.Health
}{of: map[identity]*choose.Health{}}

// identity is a registry, and as whom it is asked.
type identity struct {
	scheme, host string
	as           Credentials
}

// maxHealths bounds what is known: beyond it all is forgotten.
const maxHealths = 1024

func healthOf(a *auth) *choose.Health {
	id := identity{a.scheme, a.host, a.cred}
	healths.Lock()
	defer healths.Unlock()
	h := healths.of[id]
	if h == nil {
		if len(healths.of) >= maxHealths {
			clear(healths.of)
		}
		h = &choose.Health{}
		healths.of[id] = h
	}
	return h
}
