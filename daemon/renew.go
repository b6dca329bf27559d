package daemon

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/shale-image/shale/image"
)

// Credentials that a registry refuses are looked up again, as the user who came with
// them: helpers of clouds give what lives for hours, and containers run for longer. What
// is found serves all that the user has mounted of that registry.

const (
	// lookupPause lies between two lookups of a user's for a registry. Whoever is
	// refused what was just looked up waits for the next one; nobody waits if that
	// found nothing new.
	lookupPause = 3 * time.Second

	maxKeychains = 1024 // beyond it all is forgotten, and looked up again
	maxKnown     = 64   // credentials of one, likewise
)

// keychain is what is known of the credentials that one user has for one registry.
type keychain struct {
	turn  chan struct{}      // has one while they are looked up; guards what follows
	last  time.Time          // when they were last
	vain  *image.Credentials // instead of which nothing was found then
	cause error              // why, if that is known

	mu   sync.Mutex
	next map[image.Credentials]image.Credentials // of those that were refused
}

type keychains struct {
	mu sync.Mutex
	of map[string]*keychain
}

// keychain is that of who asked for an image; nil if credentials cannot be looked up
// in their name.
func (s *store) keychain(registry string, src Source) *keychain {
	if registry == "" || len(src.Environment) == 0 || src.caller == nil {
		return nil
	}
	if _, err := become(src.caller); err != nil {
		return nil
	}
	id, err := json.Marshal([]any{registry, src.caller, src.Environment})
	if err != nil {
		return nil
	}
	a := &s.keychains
	a.mu.Lock()
	defer a.mu.Unlock()
	k := a.of[string(id)]
	if k == nil {
		if a.of == nil || len(a.of) >= maxKeychains {
			a.of = map[string]*keychain{}
		}
		k = &keychain{turn: make(chan struct{}, 1), next: map[image.Credentials]image.Credentials{}}
		a.of[string(id)] = k
	}
	return k
}

// options say how to reach the registry of a reference for who asked.
func (s *store) options(ref image.Ref, src Source) image.Options {
	o := s.cfg.Options(ref, src.Credentials, s.agent)
	k := s.keychain(ref.Registry(), src)
	if k == nil {
		return o
	}
	o.Credentials = k.newest(src.Credentials)
	o.Renewal = func(ctx context.Context, refused image.Credentials) (image.Credentials, error) {
		return k.renew(ctx, refused, func(ctx context.Context) (image.Credentials, error) {
			c, err := lookUpAs(ctx, src.caller, src.Environment, ref)
			switch {
			case err != nil:
				s.log.Warn("look credentials up again", "registry", ref.Registry(), "uid", src.caller.UID, "err", err)
			case c == refused:
				s.log.Info("credentials are refused, and there are no others", "registry", ref.Registry(), "uid", src.caller.UID)
			default:
				s.log.Info("credentials were looked up again", "registry", ref.Registry(), "uid", src.caller.UID, "are", c)
			}
			return c, err
		})
	}
	return o
}

// newest are the credentials to begin with.
func (s *store) newest(src Source) image.Credentials {
	ref, err := image.ParseRef(src.Ref)
	if err != nil {
		return src.Credentials
	}
	return s.options(ref, src).Credentials
}

// newest follows what was found instead of some credentials.
func (k *keychain) newest(c image.Credentials) image.Credentials {
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		next, ok := k.next[c]
		if !ok {
			return c
		}
		c = next
	}
}

// renew is an image.Renewal by a lookup.
func (k *keychain) renew(ctx context.Context, refused image.Credentials, look func(context.Context) (image.Credentials, error)) (image.Credentials, error) {
	select {
	case k.turn <- struct{}{}:
		defer func() { <-k.turn }()
	case <-ctx.Done():
		return refused, ctx.Err()
	}
	if c := k.newest(refused); c != refused {
		return c, nil
	}
	if wait := lookupPause - time.Since(k.last); wait > 0 {
		if k.vain != nil && *k.vain == refused {
			return refused, k.cause
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return refused, ctx.Err()
		}
	}
	found, err := look(ctx)
	k.last, k.vain, k.cause = time.Now(), nil, nil
	switch {
	case ctx.Err() != nil:
		return refused, ctx.Err()
	case err != nil, found == refused, found == image.Credentials{}: // who has logged out gains nothing
		k.vain, k.cause = &refused, err
		return refused, err
	}
	k.replace(refused, found)
	return found, nil
}

func (k *keychain) replace(refused, found image.Credentials) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.next) >= maxKnown {
		clear(k.next)
	}
	k.next[refused] = found
	delete(k.next, found) // it holds again; and no way leads in a circle
}
