package image

import (
	"encoding/json"
	"maps"
	"slices"
	"time"
)

// Config is what an image's configuration says about running it. The fields
// are as the image has them: not checked, not defaulted.
type Config struct {
	Platform   Platform  // zero if it does not say
	Created    time.Time // zero if it does not say
	User       string
	WorkingDir string
	StopSignal string
	Entrypoint []string
	Cmd        []string
	Env        []string // KEY=VALUE
	Labels     map[string]string
	Exposed    []string // ports such as "80/tcp", sorted
	Volumes    []string // paths, sorted
	DiffIDs    []string // digests of the uncompressed layers, lowest first
}

func parseConfig(name string, p []byte) (Config, error) {
	var raw struct {
		Platform
		Created string `json:"created"`
		Config  struct {
			User         string
			WorkingDir   string
			StopSignal   string
			Entrypoint   []string
			Cmd          []string
			Env          []string
			Labels       map[string]string
			ExposedPorts map[string]struct{}
			Volumes      map[string]struct{}
		} `json:"config"`
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(p, &raw); err != nil {
		return Config{}, corrupt(name, "configuration: %v", err)
	}
	for _, id := range raw.RootFS.DiffIDs {
		if !reDigest.MatchString(id) {
			return Config{}, corrupt(name, "configuration: diff_id %.100q is not a sha256 digest", id)
		}
	}
	created, _ := time.Parse(time.RFC3339Nano, raw.Created) // informative only
	c := raw.Config
	return Config{
		Platform: raw.Platform, Created: created,
		User: c.User, WorkingDir: c.WorkingDir, StopSignal: c.StopSignal,
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, Labels: c.Labels,
		Exposed: slices.Sorted(maps.Keys(c.ExposedPorts)),
		Volumes: slices.Sorted(maps.Keys(c.Volumes)),
		DiffIDs: raw.RootFS.DiffIDs,
	}, nil
}
