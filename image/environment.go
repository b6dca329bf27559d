package image

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Environment is what a later lookup of the same credentials needs of the environment
// of whoever made the first, as "NAME=value". There may be secrets in it: it is shown
// in no log.
type Environment []string

// Of these variables an Environment may consist: what ResolveCredentials reads, and what
// credential helpers are told by, those of the clouds above all.
var (
	lookupPaths    = []string{"HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"}
	helperNames    = []string{"PATH", "USER", "LOGNAME", "XDG_DATA_HOME", "DBUS_SESSION_BUS_ADDRESS", "GNUPGHOME", "PASSWORD_STORE_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}
	helperPrefixes = []string{"AWS_", "AZURE_", "CLOUDSDK_", "GOOGLE_"}
)

// maxEnvironment bounds an Environment, in bytes.
const maxEnvironment = 16 << 10

// LookupEnvironment returns the Environment of this process. Paths in it are absolute: who
// looks again has another working directory. What does
// not fit into what Check allows is left out, last what ResolveCredentials reads.
func LookupEnvironment() Environment {
	var paths, others, env Environment
	for _, v := range os.Environ() {
		name, value, _ := strings.Cut(v, "=")
		switch {
		case value == "" || !allowed(name):
		case slices.Contains(lookupPaths, name):
			if abs, err := filepath.Abs(value); err == nil {
				paths = append(paths, name+"="+abs)
			}
		default:
			others = append(others, v)
		}
	}
	for _, v := range append(paths, others...) {
		if with := append(slices.Clip(env), v); with.Check() == nil {
			env = with
		}
	}
	slices.Sort(env) // the same is always said alike
	return env
}

func allowed(name string) bool {
	return slices.Contains(lookupPaths, name) || slices.Contains(helperNames, name) ||
		slices.ContainsFunc(helperPrefixes, func(p string) bool { return strings.HasPrefix(name, p) })
}

// Check refuses what LookupEnvironment would not have returned.
func (e Environment) Check() error {
	size := 0
	for _, v := range e {
		name, _, ok := strings.Cut(v, "=")
		if !ok || !allowed(name) || strings.ContainsRune(v, 0) {
			return fmt.Errorf("environment: %.40q is no variable for a lookup of credentials", name)
		}
		size += len(v) + 1
	}
	if size > maxEnvironment {
		return fmt.Errorf("environment of %d bytes, at most %d", size, maxEnvironment)
	}
	return nil
}

// String tells how much there is, and no secret.
func (e Environment) String() string { return fmt.Sprintf("%d variables", len(e)) }

// GoString is String, for %#v.
func (e Environment) GoString() string { return e.String() }

// LogValue is String, for log/slog.
func (e Environment) LogValue() slog.Value { return slog.StringValue(e.String()) }
