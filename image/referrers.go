package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/shale-image/shale/blob"
)

const (
	maxReferrers = 1000      // of one subject
	maxLookups   = 64        // manifests fetched because a list does not tell their types
	maxLooked    = 10000     // manifests of a layout
	maxLookedAt  = 256 << 20 // bytes of those
)

// referrersTag is the tag of the index that lists the referrers of a manifest
// where nothing else does: "sha256-<hex>".
func referrersTag(subject string) string { return strings.Replace(subject, ":", "-", 1) }

func isReferrersTag(tag string) bool {
	return reDigest.MatchString(strings.Replace(tag, "sha256-", "sha256:", 1))
}

// parseList parses an index as a list: entries with digests of another kind are
// left out, and there may be at most limit. What it says it is must be an index,
// or nothing if mediaType, from outside, says so.
func parseList(name, mediaType string, p []byte, limit int) ([]entry, error) {
	var d struct {
		SchemaVersion             int
		MediaType                 string
		Config, Layers, Manifests json.RawMessage
	}
	if err := json.Unmarshal(p, &d); err != nil {
		return nil, corrupt(name, "index: %v", err)
	}
	if d.MediaType == "" {
		d.MediaType = mediaType
	}
	switch {
	case !isIndex(d.MediaType):
		return nil, unsupported(name, "a list in the form of %q, expected an index", printable(d.MediaType))
	case d.SchemaVersion != 2:
		return nil, corrupt(name, "index: schemaVersion is %d, expected 2", d.SchemaVersion)
	case present(d.Config) || present(d.Layers):
		return nil, corrupt(name, "an index with the config or layers of a manifest")
	case !present(d.Manifests):
		return nil, nil
	}
	// One by one: 3 bytes of JSON may become an entry of 120.
	dec := json.NewDecoder(bytes.NewReader(d.Manifests))
	if start, err := dec.Token(); err != nil || start != json.Delim('[') {
		return nil, corrupt(name, "index: its manifests are not a list")
	}
	var all []entry
	for n := 0; dec.More(); n++ {
		if n == limit {
			return nil, overLimitN(name, "manifests", limit)
		}
		var e entry
		if err := dec.Decode(&e); err != nil {
			return nil, corrupt(name, "index: %v", err)
		}
		if strings.HasPrefix(e.Digest, "sha512:") {
			continue
		}
		if !reDigest.MatchString(e.Digest) || e.Size < 0 {
			return nil, corrupt(name, "descriptor with digest %.100q and size %d", e.Digest, e.Size)
		}
		all = append(all, e)
	}
	return all, nil
}

func present(raw json.RawMessage) bool { return raw != nil && string(raw) != "null" }

// referrer is what a manifest or an index says about what it refers to.
type referrer struct {
	subject      string // digest; "" if none
	artifactType string // or that of the configuration
	annotations  map[string]string
}

func parseReferrer(name string, p []byte) (referrer, error) {
	var d struct {
		ArtifactType    string
		Config, Subject struct{ MediaType, Digest string }
		Annotations     map[string]string
	}
	if err := json.Unmarshal(p, &d); err != nil {
		return referrer{}, corrupt(name, "manifest: %v", err)
	}
	return referrer{d.Subject.Digest, firstNonEmpty(d.ArtifactType, d.Config.MediaType), d.Annotations}, nil
}

// ofType returns what is of some types in a list, or all of it for none, each once. Not all lists tell: in
// some the type is missing, in some it is always that of the configuration,
// which is empty. Then the manifests themselves are asked.
func ofType(ctx context.Context, list []entry, types []string, limit int64, get func(context.Context, string) (Manifest, error)) ([]Referrer, error) {
	var out []Referrer
	seen := map[string]bool{}
	lookups := 0
	for _, e := range list {
		if seen[e.Digest] {
			continue
		}
		seen[e.Digest] = true
		has := e.ArtifactType
		if len(types) > 0 && (has == "" || has == mediaTypeEmpty) && (isManifest(e.MediaType) || isIndex(e.MediaType)) && e.Size <= limit {
			if lookups++; lookups > maxLookups {
				return nil, overLimitN("referrers", "manifests whose type the list does not tell", maxLookups)
			}
			m, err := get(ctx, e.Digest)
			if errors.Is(err, blob.ErrNotFound) {
				continue
			}
			if err != nil {
				return nil, err
			}
			r, err := parseReferrer("manifest "+e.Digest, m.Bytes)
			if err != nil {
				return nil, err
			}
			has = r.artifactType
		}
		if len(types) == 0 || slices.Contains(types, has) {
			out = append(out, Referrer{e.Descriptor, has})
		}
	}
	return out, nil
}

// walk looks for referrers in a layout, which has no list of them: any manifest
// may be one.
type walk struct {
	subject string
	types   []string
	limit   int64 // bytes of a manifest
	read    func(digest string) ([]byte, error)

	seen  map[string]bool
	bytes int64
	found []Referrer
}

// visit looks at what an index lists, and the indexes in it.
func (w *walk) visit(ctx context.Context, name string, p []byte, depth int) error {
	list, err := parseList(name, MediaTypeIndex, p, maxLooked)
	if err != nil {
		return err
	}
	for _, e := range list {
		if w.seen[e.Digest] || !isManifest(e.MediaType) && !isIndex(e.MediaType) || e.Size > w.limit {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		w.seen[e.Digest] = true
		w.bytes += e.Size
		if len(w.seen) > maxLooked {
			return overLimitN(name, "manifests to look at", maxLooked)
		}
		if w.bytes > maxLookedAt {
			return overLimit(name, "manifests to look at", maxLookedAt)
		}
		name := "manifest " + e.Digest
		p, err := w.read(e.Digest)
		if errors.Is(err, blob.ErrNotFound) { // a layout need not be complete
			continue
		}
		if err == nil {
			err = checkBytes(e.Descriptor, p)
		}
		if err != nil {
			return err
		}
		r, err := parseReferrer(name, p)
		if err != nil {
			return err
		}
		if r.subject == w.subject && (len(w.types) == 0 || slices.Contains(w.types, r.artifactType)) {
			if len(w.found) == maxReferrers {
				return overLimitN("referrers", "of one manifest", maxReferrers)
			}
			e.Annotations = r.annotations // not those of its place in the index
			w.found = append(w.found, Referrer{e.Descriptor, r.artifactType})
		}
		if isIndex(e.MediaType) && depth > 0 {
			if err := w.visit(ctx, name, p, depth-1); err != nil {
				return err
			}
		}
	}
	return nil
}

// referral is an artifact on its way to the index that lists those of its
// subject.
type referral struct {
	m            Manifest
	d            Descriptor // of m
	subject      string     // digest
	artifactType string
	replaces     func(Descriptor) bool
	limit        int64 // bytes of an index

	// drop holds the digests that are to leave the list. It is made when the
	// list is first seen: two that replace all others would take turns for ever.
	drop map[string]bool

	// before is the same where the registry makes the list, once it was looked at.
	before []Referrer
	looked bool
}

// add returns the index, nil if there is none yet, with the artifact in it, or
// nil if there is nothing to change.
func (f *referral) add(name string, index []byte) ([]byte, error) {
	if index == nil {
		index = []byte(`{"schemaVersion":2,"mediaType":"` + MediaTypeIndex + `","manifests":[]}`)
	}
	list, err := parseList(name, MediaTypeIndex, index, maxReferrers)
	if err != nil {
		return nil, err
	}
	if f.drop == nil {
		f.drop = map[string]bool{}
		for _, e := range list {
			if e.ArtifactType == f.artifactType && e.Digest != f.d.Digest && f.replaces != nil && f.replaces(e.Descriptor) {
				f.drop[e.Digest] = true
			}
		}
	}
	goes := func(e entry) bool { return f.drop[e.Digest] || e.Digest == f.d.Digest }
	var gone []string
	for _, e := range list {
		if goes(e) {
			gone = append(gone, e.Digest)
		}
	}
	if len(gone) == 1 && gone[0] == f.d.Digest { // there, and alone
		return nil, nil
	}
	if len(list)-len(gone) >= maxReferrers {
		return nil, overLimitN(name, "referrers", maxReferrers)
	}
	p, err := editIndex(name, index, goes, struct {
		Descriptor
		ArtifactType string `json:"artifactType"`
	}{f.d, f.artifactType})
	if err == nil && int64(len(p)) > f.limit {
		return nil, overManifestLimit(name, "index", f.limit)
	}
	return p, err
}

// editIndex returns an index without the entries that drop names, and with d as
// its last. Everything else stays as it is, also what is not known here.
func editIndex(name string, index []byte, drop func(entry) bool, d any) ([]byte, error) {
	var fields map[string]json.RawMessage
	var manifests []json.RawMessage
	if err := json.Unmarshal(index, &fields); err != nil {
		return nil, corrupt(name, "%v", err)
	}
	if raw := fields["manifests"]; raw != nil {
		if err := json.Unmarshal(raw, &manifests); err != nil {
			return nil, corrupt(name, "%v", err)
		}
	}
	manifests = slices.DeleteFunc(manifests, func(raw json.RawMessage) bool {
		var e entry
		return json.Unmarshal(raw, &e) == nil && drop(e)
	})
	raw, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	if fields["manifests"], err = json.Marshal(append(manifests, raw)); err != nil {
		return nil, err
	}
	return json.Marshal(fields)
}
