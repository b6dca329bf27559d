package daemon

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/replace"
)

// loadNames reads refs.json. A damaged one is set aside: the names can be had
// from the registries again, and the images they mean are still here.
func (s *store) loadNames() error {
	js, err := os.ReadFile(s.refs)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(js, &s.names); err != nil || s.names == nil {
		s.log.Error("the names of images are damaged; they were set aside", "file", s.refs+badSuffix, "err", err)
		s.names = map[string]string{}
		return os.Rename(s.refs, s.refs+badSuffix)
	}
	s.takeNames(s.names)
	return nil
}

// takeNames takes what refs.json has, all names in one form.
func (s *store) takeNames(read map[string]string) {
	s.names = map[string]string{}
	for _, key := range slices.Backward(slices.Sorted(maps.Keys(read))) { // "" counts most
		if ref, platform, ok := splitKey(key); ok && reDigest.MatchString(read[key]) {
			s.names[nameKey(ref, platform)] = read[key]
		}
	}
}

const badSuffix = ".bad"

var reDigest = regexp.MustCompile("^sha256:[0-9a-f]{64}$")

// nameKey is a reference as refs.json has it. This node's own platform is "", also if it
// was written out.
func nameKey(ref, platform string) string {
	p, err := image.ParsePlatform(platform)
	if own := (image.Platform{}).Canonical(); err != nil || p.Canonical() == own {
		return ref + " "
	}
	return ref + " " + p.Canonical()
}

// splitKey undoes nameKey; a directory may have a blank in its name.
func splitKey(key string) (ref, platform string, ok bool) {
	i := strings.LastIndexByte(key, ' ')
	if i < 0 {
		return "", "", false
	}
	return key[:i], key[i+1:], true
}

// saveNames writes refs.json.
func (s *store) saveNames() error {
	s.saving.Lock()
	defer s.saving.Unlock()
	s.mu.Lock()
	js, err := json.MarshalIndent(s.names, "", "  ")
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return replace.File(s.refs, append(js, '\n'), 0o600)
}

// byDigest finds an image on the node by the digest in a reference, which is that of its
// manifest or of an index that led to it; "" if there is none. What lies in another
// repository counts if it is enough.
func (s *store) byDigest(ref image.Ref, want image.Platform, enough func(*record) bool) string {
	if ref.Digest() == "" {
		return ""
	}
	all, err := s.digests()
	if err != nil {
		return ""
	}
	for _, digest := range all {
		rec, err := s.loadRecord(digest)
		if err != nil {
			continue
		}
		p, err := image.ParsePlatform(rec.Platform)
		fits, exactly := p.Fits(want)
		if err == nil && (fits && digest == ref.Digest() || exactly && slices.Contains(rec.Within, ref.Digest())) &&
			(s.namedIn(ref, digest) || enough(rec)) {
			return digest
		}
	}
	return ""
}

// maxWithin is how many indexes that led to an image are kept, the last ones.
const maxWithin = 16

// noteManifest notes what an image's manifest says, and which indexes have led to it. The
// caller holds its lock.
func (s *store) noteManifest(rec *record, img *image.Image) error {
	all := rec.Within
	for _, d := range img.Within {
		if !slices.Contains(all, d) {
			all = append(all, d)
		}
	}
	if len(all) == len(rec.Within) && len(rec.Layers) == len(img.Layers) {
		return nil
	}
	rec.Layers = img.Layers
	rec.Within = all[max(0, len(all)-maxWithin):]
	return s.saveRecord(rec)
}

// namedIn tells whether an image has a name in the repository of ref.
func (s *store) namedIn(ref image.Ref, digest string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, d := range s.names {
		if d != digest {
			continue
		}
		name, _, _ := splitKey(key)
		if r, err := image.ParseRef(name); err == nil && r.Registry() == ref.Registry() && r.Repository() == ref.Repository() && r.Dir() == ref.Dir() {
			return true
		}
	}
	return false
}

// isComplete tells whether all of an image is here.
func (s *store) isComplete(rec *record) bool {
	l, err := s.link(rec)
	if err != nil {
		return false
	}
	defer l.Close()
	here, all, err := s.present(l)
	return err == nil && here == all
}
