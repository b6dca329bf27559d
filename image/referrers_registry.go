package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/httpblob"
)

const (
	maxPages = 100 // of a list of referrers
	maxRaces = 12  // tries to change a list that others change too

	// settle is how long a change of a list must have been there, and up to
	// twice that: longer than another pusher takes from reading it to writing.
	// Nobody knows how long that is: three times as long as it took here, maxSettle at most.
	settle    = 250 * time.Millisecond
	maxSettle = 15 * time.Second

	// apiPatience is how long an API may say nothing when the index is here.
	apiPatience = 3 * time.Second
)

// errNoList says that a registry has no API for referrers.
var errNoList = errors.New("no list of referrers")

func (g *registry) referrers(ctx context.Context, subject string, types []string) ([]Referrer, error) {
	return each(ctx, g, func(ctx context.Context, e *endpoint) (out []Referrer, err error) {
		list, err := g.list(ctx, e, subject, types)
		if err == nil {
			out, err = ofType(ctx, list, types, g.opts.ManifestLimit, func(ctx context.Context, digest string) (Manifest, error) {
				m, _, err := g.manifestFrom(ctx, e, digest)
				return m, err
			})
		}
		// The next may know of some; and a mirror that is there but bad at this
		// may yet be good for blobs.
		down := errors.Is(err, blob.ErrUnavailable) && status(err) == 0
		if e != g.self() && len(out) == 0 && !down {
			return nil, notFound(subject, "no referrers: %v", err)
		}
		if err != nil {
			return nil, err
		}
		return out, nil
	})
}

// list asks an endpoint's API for the referrers (1 request a page), and for the
// index with their tag, which counts if there is no API (1 request). It asks for
// both at once until it is known which of them this registry has: a start waits
// for the answer. Where the API fails, says nothing, or is not for us, what the
// index lists counts, too, if it lists anything.
func (g *registry) list(ctx context.Context, e *endpoint, subject string, types []string) ([]entry, error) {
	type answer struct {
		list []entry
		err  error
	}
	tagged := make(chan answer, 1)
	actx, giveUp := context.WithCancel(ctx) // the API
	defer giveUp()
	had := e.lists.Load()
	if !had {
		tctx, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			list, err := g.tagged(tctx, e, subject)
			if len(list) > 0 {
				time.AfterFunc(apiPatience, giveUp)
			}
			tagged <- answer{list, err}
		}()
	}
	failed := errNoList
	if !e.listless.Load() {
		var list []entry
		list, failed = g.pages(actx, e, subject, types)
		e.lists.Store(failed == nil)
		if failed == nil {
			return list, nil
		}
	}
	var a answer
	if had {
		a.list, a.err = g.tagged(ctx, e, subject)
	} else {
		e.listless.Store(failed == errNoList)
		a = <-tagged // it ends with ctx
	}
	if failed != errNoList && len(a.list) == 0 {
		return nil, failed
	}
	return a.list, a.err
}

// tagged gets the index with the tag of the referrers, if there is one.
func (g *registry) tagged(ctx context.Context, e *endpoint, subject string) ([]entry, error) {
	m, _, err := g.manifestFrom(ctx, e, referrersTag(subject))
	if err != nil {
		if lacks(err) {
			err = nil
		}
		return nil, err
	}
	return parseList(referrersTag(subject), mediaType(m.MediaType), m.Bytes, maxReferrers)
}

// status returns what a registry itself answered, 0 if err is none of its
// answers but, say, one of its token server.
func status(err error) int {
	if answer, ok := err.(*httpblob.Error); ok {
		return answer.Status
	}
	return 0
}

// lacks tells whether the registry answered that there is no such thing.
func lacks(err error) bool { return status(err) != 0 && errors.Is(err, blob.ErrNotFound) }

// mediaType returns a Content-Type without its parameters.
func mediaType(s string) string {
	s, _, _ = strings.Cut(s, ";")
	return strings.TrimSpace(s)
}

// pages gets a list that may come in parts.
func (g *registry) pages(ctx context.Context, e *endpoint, subject string, types []string) ([]entry, error) {
	name := "referrers of " + subject
	u, err := url.Parse(e.url + "/referrers/" + subject)
	if err != nil {
		return nil, err
	}
	artifactType := ""
	if len(types) == 1 { // there is no way to ask for several
		artifactType = types[0]
		u.RawQuery = url.Values{"artifactType": {artifactType}}.Encode()
	}
	var all []entry
	for n := 0; ; n++ {
		if n == maxPages {
			return nil, overLimitN(name, "pages", maxPages)
		}
		list, next, err := g.page(ctx, e, name, u, artifactType)
		if err != nil {
			if n > 0 && errors.Is(err, errNoList) {
				err = corrupt(name, "page %d is no index", n+1)
			}
			return nil, err
		}
		if all = append(all, list...); len(all) > maxReferrers {
			return nil, overLimitN(name, "manifests", maxReferrers)
		}
		if next == "" {
			return all, nil
		}
		to, err := u.Parse(next)
		if err != nil || to.Host != u.Host {
			return nil, corrupt(name, "its next page is %.200q, expected a URL of the same registry", next)
		}
		to.Scheme = u.Scheme // which a registry behind a proxy may not know
		u = to
	}
}

// page gets one part, and where the next one is, if any. errNoList means that
// the answer is none of an API for referrers; a registry without one answers
// 404, 400, 405, or 200 with a page for people.
func (g *registry) page(ctx context.Context, e *endpoint, name string, u *url.URL, artifactType string) (list []entry, next string, err error) {
	header := http.Header{"Accept": {MediaTypeIndex}}
	err = request(ctx, e.client, http.MethodGet, u.String(), header, nil, func(resp *http.Response) error {
		kind := mediaType(resp.Header.Get("Content-Type"))
		if kind != MediaTypeIndex && kind != "" && !strings.Contains(kind, "json") {
			return errNoList
		}
		p, err := io.ReadAll(io.LimitReader(resp.Body, g.opts.ManifestLimit+1))
		if err != nil {
			return fmt.Errorf("%s: %w: %w", name, blob.ErrUnavailable, err)
		}
		if int64(len(p)) > g.opts.ManifestLimit {
			return overManifestLimit(name, "page", g.opts.ManifestLimit)
		}
		list, err = parseList(name, kind, p, maxReferrers)
		if err != nil && kind != MediaTypeIndex && !errors.Is(err, ErrLimit) {
			return errNoList
		}
		applied := strings.FieldsFunc(resp.Header.Get("OCI-Filters-Applied"), func(r rune) bool { return r == ',' || r == ' ' })
		for i := range list {
			if list[i].ArtifactType == "" && slices.Contains(applied, "artifactType") {
				list[i].ArtifactType = artifactType
			}
		}
		next = nextLink(resp.Header)
		return err
	}, http.StatusOK)
	switch code := status(err); {
	case code == 0, errors.Is(err, blob.ErrUnauthorized): // about who asks
	case errors.Is(err, blob.ErrUnavailable) && code != http.StatusNotImplemented: // about when
	default: // about what is asked for
		err = errNoList
	}
	return list, next, err
}

// nextLink returns the target of a Link header with the relation "next", "" if
// there is none: Link: </v2/app/referrers/sha256:...?n=5>; rel="next"
func nextLink(h http.Header) string {
	for _, s := range h.Values("Link") {
		for {
			_, rest, ok := strings.Cut(s, "<")
			target, rest, ok2 := strings.Cut(rest, ">")
			if !ok || !ok2 {
				break
			}
			var params string
			if i := strings.IndexByte(rest, '<'); i >= 0 {
				params, s = rest[:i], rest[i:]
			} else {
				params, s = rest, ""
			}
			for _, p := range strings.FieldsFunc(params, func(r rune) bool { return r == ';' || r == ',' }) {
				key, value, _ := strings.Cut(p, "=")
				if strings.EqualFold(strings.TrimSpace(key), "rel") && slices.Contains(strings.Fields(strings.ToLower(strings.Trim(value, `" `))), "next") {
					return target
				}
			}
		}
	}
	return ""
}

func (g *registry) attach(ctx context.Context, f *referral) error {
	if err := g.supersede(ctx, f); err != nil {
		return err
	}
	answer, err := g.putManifest(ctx, f.m, f.m.Digest, "")
	if err != nil {
		return err
	}
	if answer.Get("OCI-Subject") != f.subject {
		return g.tagReferrer(ctx, f)
	}
	// The registry lists it, and what it replaces until that is removed. Many let
	// nobody do that.
	for _, d := range f.before {
		if err := g.delete(ctx, d.Digest); err != nil {
			return ctx.Err()
		}
	}
	return nil
}

// supersede finds out what an artifact replaces where the registry makes the list:
// only what was there before, or two that replace all others would remove each
// other.
func (g *registry) supersede(ctx context.Context, f *referral) error {
	if f.replaces == nil || f.looked {
		return nil
	}
	list, err := g.pages(ctx, g.self(), f.subject, []string{f.artifactType})
	if err == nil {
		f.before, err = ofType(ctx, list, []string{f.artifactType}, f.limit, func(ctx context.Context, digest string) (Manifest, error) {
			m, _, err := g.manifestFrom(ctx, g.self(), digest)
			return m, err
		})
	}
	if err != nil && err != errNoList && !errors.Is(err, blob.ErrUnauthorized) { // the manifest tells whether we may
		return err
	}
	f.before = slices.DeleteFunc(f.before, func(d Referrer) bool { return d.Digest == f.d.Digest || !f.replaces(d.Descriptor) })
	f.looked = true
	return nil
}

// delete takes 1 request.
func (g *registry) delete(ctx context.Context, digest string) error {
	e := g.self()
	scope := "repository:" + g.ref.repository + ":pull,push,delete"
	return request(ctx, g.client(e, scope), http.MethodDelete, e.url+"/manifests/"+digest, nil, nil,
		func(*http.Response) error { return nil }, http.StatusAccepted, http.StatusOK, http.StatusNoContent)
}

// tagReferrer adds an artifact to the index with the tag of its referrers. Few
// registries heed If-Match, so another pusher may overwrite the change, not
// having seen it: it is looked at again after a while.
func (g *registry) tagReferrer(ctx context.Context, f *referral) error {
	tag := referrersTag(f.subject)
	for range maxRaces {
		begun := time.Now()
		old, etag, err := g.manifestFrom(ctx, g.self(), tag)
		if err != nil && !lacks(err) {
			return err
		}
		if kind := mediaType(old.MediaType); err == nil && kind != MediaTypeIndex {
			return unsupported(tag, "a list in the form of %q, expected %s", printable(kind), MediaTypeIndex)
		}
		p, err := f.add(tag, old.Bytes)
		if err != nil || p == nil {
			return err
		}
		if strings.HasPrefix(etag, "W/") { // never matches
			etag = ""
		}
		_, err = g.putManifest(ctx, Manifest{MediaType: MediaTypeIndex, Digest: digestOf(p), Bytes: p}, tag, etag)
		if code := status(err); err != nil && code != http.StatusPreconditionFailed && code != http.StatusConflict {
			return err
		}
		if err := sleep(ctx, min(max(settle, 3*time.Since(begun)), maxSettle)+rand.N(settle)); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: %w: others kept changing it, %d times", tag, blob.ErrUnavailable, maxRaces)
}

// sleep waits, or fails as ctx does.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
