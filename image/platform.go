package image

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
)

// Platform is what an image runs on. The zero Platform means this machine's
// architecture, on Linux.
type Platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"` // as in GOARCH
	Variant      string `json:"variant,omitempty"`
}

// ParsePlatform parses "os/arch[/variant]", or "arch" alone for Linux.
func ParsePlatform(s string) (Platform, error) {
	parts := strings.Split(s, "/")
	if len(parts) == 1 {
		parts = []string{"linux", s}
	}
	if len(parts) > 3 || slices.Contains(parts, "") || len(s) > 100 {
		return Platform{}, fmt.Errorf("platform %.100q: expected os/arch or os/arch/variant", s)
	}
	p := Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p, nil
}

// WantedPlatform is ParsePlatform for what somebody asks for: nothing is the zero Platform.
func WantedPlatform(s string) (Platform, error) {
	if s == "" {
		return Platform{}, nil
	}
	return ParsePlatform(s)
}

// String returns "os/arch[/variant]".
func (p Platform) String() string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// normal fills in defaults and replaces the other names that are in use.
func (p Platform) normal() Platform {
	if p.OS == "" {
		p.OS = "linux"
	}
	if p.Architecture == "" {
		p.Architecture = runtime.GOARCH
	}
	switch p.Architecture {
	case "x86_64", "x86-64":
		p.Architecture = "amd64"
	case "aarch64":
		p.Architecture = "arm64"
	case "i386":
		p.Architecture = "386"
	case "armhf":
		p.Architecture, p.Variant = "arm", "v7"
	case "armel":
		p.Architecture, p.Variant = "arm", "v6"
	}
	if p.Variant == "" {
		switch p.Architecture {
		case "amd64":
			p.Variant = "v1"
		case "arm":
			p.Variant = "v7"
		case "arm64":
			p.Variant = "v8"
		}
	}
	return p
}

// Canonical is the one way to write what p means, defaults filled in: "linux/arm64/v8".
func (p Platform) Canonical() string { return p.normal().String() }

// Fits tells whether an image for p runs on want, and whether there can be none that fits
// better.
func (p Platform) Fits(want Platform) (fits, exactly bool) {
	r := p.rank(want)
	return r > 0, r == exact
}

// exact is the rank of what is for just that platform.
const exact = 1000

// rank tells how well an image for p runs on want: 0 not at all, else more is
// better. A machine runs its own variant and, of amd64, arm and arm64, also
// those before it ("v6" on "v7").
func (p Platform) rank(want Platform) int {
	p, want = p.normal(), want.normal()
	if p.OS != want.OS || p.Architecture != want.Architecture {
		return 0
	}
	if p.Variant == want.Variant {
		return exact
	}
	level := func(v string) int {
		var n int
		if _, err := fmt.Sscanf(v, "v%d", &n); err != nil || n < 1 || n >= exact {
			return 0
		}
		return n
	}
	switch have, most := level(p.Variant), level(want.Variant); {
	case want.Architecture != "amd64" && want.Architecture != "arm" && want.Architecture != "arm64":
		return 0
	case have == 0 || have > most:
		return 0
	default:
		return have
	}
}
