package daemon

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"regexp"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/shale-image/shale/image"
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
	maps.DeleteFunc(s.names, func(key, digest string) bool {
		_, _, ok := splitKey(key)
		return !ok || !reDigest.MatchString(digest)
	})
	return nil
}

const badSuffix = ".bad"

var reDigest = regexp.MustCompile("^sha256:[0-9a-f]{64}$")

// nameKey is a reference as refs.json has it.
func nameKey(ref image.Ref, platform string) string { return ref.String() + " " + platform }

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
	return renameio.WriteFile(s.refs, append(js, '\n'), 0o600)
}
