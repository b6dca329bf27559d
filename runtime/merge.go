package runtime

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// ImageConfig is the part of an image's configuration that running it needs,
// with the fields' meaning in the OCI image specification.
type ImageConfig struct {
	Entrypoint, Cmd, Env []string
	User                 string
	WorkingDir           string
	StopSignal           string
}

// Flags are what the user may say against the image. Config's fields that no
// image has are set on Merge's result instead.
type Flags struct {
	Args       []string // the command after the image's name
	Entrypoint *string  // nil is the image's; "" is none
	Env        []string // "K=V", or "K" for the caller's own value
	User       string
	WorkingDir string
	StopSignal string
}

// Merge applies docker run's rules: a given command replaces the image's Cmd
// and leaves its Entrypoint; a given entrypoint replaces the Entrypoint and
// drops the image's Cmd; later environment entries win.
//
//	image ENTRYPOINT [/init] CMD [serve], flags [sh -c ls]  ->  /init sh -c ls
func Merge(image ImageConfig, f Flags) (Config, error) {
	entrypoint, cmd := image.Entrypoint, image.Cmd
	if f.Entrypoint != nil {
		entrypoint, cmd = nil, nil
		if *f.Entrypoint != "" {
			entrypoint = []string{*f.Entrypoint}
		}
	}
	if len(f.Args) > 0 {
		cmd = f.Args
	}
	c := Config{
		Args:       slices.Concat(entrypoint, cmd),
		User:       either(f.User, image.User),
		Cwd:        path.Clean("/" + either(f.WorkingDir, image.WorkingDir)),
		StopSignal: either(f.StopSignal, image.StopSignal),
	}
	if f.WorkingDir != "" && !path.IsAbs(f.WorkingDir) {
		return Config{}, fmt.Errorf("working directory %q is not an absolute path", f.WorkingDir)
	}
	if len(c.Args) == 0 || c.Args[0] == "" {
		return Config{}, errors.New("no command: the image names none, so give one")
	}
	for _, kv := range image.Env {
		if i := strings.IndexByte(kv, '='); i > 0 {
			c.Env = setenv(c.Env, kv)
		}
	}
	for _, kv := range f.Env {
		switch i := strings.IndexByte(kv, '='); {
		case i > 0:
			c.Env = setenv(c.Env, kv)
		case i == 0 || kv == "":
			return Config{}, fmt.Errorf("environment %q has no name", kv)
		default:
			if v, ok := os.LookupEnv(kv); ok {
				c.Env = setenv(c.Env, kv+"="+v)
			}
		}
	}
	if _, err := stopSignal(c.StopSignal); err != nil {
		return Config{}, err
	}
	return c, c.check()
}

// check refuses what the runtimes, being C programs at heart, would cut short.
func (c *Config) check() error {
	if len(c.Args) == 0 {
		return errors.New("no command")
	}
	for _, s := range slices.Concat(c.Args, c.Env, []string{c.Cwd, c.User, c.Hostname}) {
		if strings.IndexByte(s, 0) >= 0 {
			return fmt.Errorf("%q contains a NUL byte", s)
		}
	}
	if c.Memory < 0 || c.CPUs < 0 {
		return errors.New("a limit is negative")
	}
	if c.Network != "" && c.Network != Host && c.Network != None {
		return fmt.Errorf("network %q: want host or none", c.Network)
	}
	return nil
}

// ParseMount reads "SRC:DST", "SRC:DST:ro" or "SRC:DST:rw". A relative SRC
// that starts with "." or "/" is made absolute; names of volumes are refused.
func ParseMount(s string) (Mount, error) {
	f := strings.Split(s, ":")
	if len(f) < 2 || len(f) > 3 || f[0] == "" || !path.IsAbs(f[1]) {
		return Mount{}, fmt.Errorf("volume %q: want SRC:DST or SRC:DST:ro with an absolute DST", s)
	}
	m := Mount{Source: f[0], Destination: path.Clean(f[1])}
	if len(f) == 3 {
		if f[2] != "ro" && f[2] != "rw" {
			return Mount{}, fmt.Errorf("volume %q: mode %q: want ro or rw", s, f[2])
		}
		m.ReadOnly = f[2] == "ro"
	}
	if m.Destination == "/" {
		return Mount{}, fmt.Errorf("volume %q would hide the image", s)
	}
	if m.Source[0] != '/' && m.Source[0] != '.' {
		return Mount{}, fmt.Errorf("volume %q: named volumes are not supported: start SRC with / or ./", s)
	}
	var err error
	m.Source, err = filepath.Abs(m.Source)
	return m, err
}

// ParseBytes reads a size in bytes with an optional suffix b, k, m, g or t
// (powers of 1024, any case): "512m" is 536870912.
func ParseBytes(s string) (int64, error) {
	digits := strings.TrimRight(strings.ToLower(s), "bkmgt")
	shift, ok := map[string]uint{"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40,
		"kb": 10, "mb": 20, "gb": 30, "tb": 40}[strings.ToLower(s[len(digits):])]
	n, err := strconv.ParseInt(digits, 10, 64)
	if !ok || err != nil || n <= 0 || n > (1<<62)>>shift {
		return 0, fmt.Errorf("size %q: want a positive number with an optional b, k, m, g or t", s)
	}
	return n << shift, nil
}

// setenv sets "K=V" in env, in place of an earlier entry for K.
func setenv(env []string, kv string) []string {
	key := kv[:strings.IndexByte(kv, '=')+1]
	for i, e := range env {
		if strings.HasPrefix(e, key) {
			env[i] = kv
			return env
		}
	}
	return append(env, kv)
}

// defaultenv is setenv, but leaves an earlier entry alone.
func defaultenv(env []string, kv string) []string {
	key := kv[:strings.IndexByte(kv, '=')+1]
	if slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, key) }) {
		return env
	}
	return append(env, kv)
}

func either(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
