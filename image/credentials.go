package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

// Credentials are what a registry may ask for. They are shown in no log: every
// way of printing them gives the user's name at most.
type Credentials struct {
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	IdentityToken string `json:"identityToken,omitempty"` // exchanged for a token at the registry's token server
	RegistryToken string `json:"registryToken,omitempty"` // sent to the registry as it is
}

// String tells whose credentials they are, and no secret.
func (c Credentials) String() string {
	switch {
	case c == Credentials{}:
		return "no credentials"
	case c.Username != "":
		return "credentials of " + c.Username
	}
	return "token"
}

// GoString is String, for %#v.
func (c Credentials) GoString() string { return c.String() }

// LogValue is String, for log/slog.
func (c Credentials) LogValue() slog.Value { return slog.StringValue(c.String()) }

// ResolveCredentials looks for credentials where the caller's other tools keep
// them: Docker's config.json with its credential helpers, then Podman's
// auth.json. None is not an error. It runs programs of the caller (the helpers), so
// it belongs in a process of the caller's, with the caller's environment.
func ResolveCredentials(ctx context.Context, ref Ref) (Credentials, error) {
	return lookUp(ref, func(name, server string) (Credentials, error) { return runHelper(ctx, name, server) })
}

// CredentialsAtHand is ResolveCredentials that runs nothing. It returns false if it takes
// a helper to know, which may need the network, or a file cannot be used.
func CredentialsAtHand(ref Ref) (Credentials, bool) {
	c, err := lookUp(ref, func(string, string) (Credentials, error) { return Credentials{}, errHelper })
	return c, err == nil
}

var errHelper = errors.New("a credential helper knows")

// lookUp reads the files, and has run ask helpers.
func lookUp(ref Ref, run func(name, server string) (Credentials, error)) (Credentials, error) {
	if ref.registry == "" {
		return Credentials{}, nil
	}
	for _, name := range authFiles() {
		p, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Credentials{}, fmt.Errorf("credentials: %w", err)
		}
		var file authFile
		if err := json.Unmarshal(p, &file); err != nil {
			// The decoder's message may quote the file.
			return Credentials{}, fmt.Errorf("credentials: %s is not valid JSON of a Docker configuration", name)
		}
		c, err := file.resolve(ref, run)
		if err != nil {
			return Credentials{}, fmt.Errorf("credentials for %s: %s: %w", ref.registry, name, err)
		}
		if c != (Credentials{}) {
			return c, nil
		}
	}
	return Credentials{}, nil
}

// authFiles lists the files to look in, in order.
func authFiles() []string {
	var files []string
	add := func(base string, path ...string) {
		if base != "" {
			files = append(files, filepath.Join(append([]string{base}, path...)...))
		}
	}
	home, _ := os.UserHomeDir()
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		add(dir, "config.json")
	} else {
		add(home, ".docker", "config.json")
	}
	if file := os.Getenv("REGISTRY_AUTH_FILE"); file != "" {
		add(file)
		return files
	}
	add(os.Getenv("XDG_RUNTIME_DIR"), "containers", "auth.json")
	if dir := os.Getenv("XDG_CONFIG_HOME"); dir != "" {
		add(dir, "containers", "auth.json")
	} else {
		add(home, ".config", "containers", "auth.json")
	}
	return files
}

// authFile is the part of config.json and auth.json that matters here.
type authFile struct {
	Auths       map[string]authEntry `json:"auths"`
	CredHelpers map[string]string    `json:"credHelpers"`
	CredsStore  string               `json:"credsStore"`
}

type authEntry struct {
	Auth          string `json:"auth"` // base64 of user:password
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

func (f *authFile) resolve(ref Ref, run func(name, server string) (Credentials, error)) (Credentials, error) {
	// docker.io has its own key, from a time before the others.
	server, hosts := ref.registry, []string{ref.registry}
	if ref.registry == dockerHub {
		server = "https://index.docker.io/v1/"
		hosts = []string{"index.docker.io", dockerHub, dockerHubHost}
	}
	for _, host := range append([]string{server}, hosts...) {
		if helper := f.CredHelpers[host]; helper != "" {
			return run(helper, server)
		}
	}
	if f.CredsStore != "" {
		if c, err := run(f.CredsStore, server); err != nil || c != (Credentials{}) {
			return c, err
		}
	}
	entries := map[string]authEntry{}
	for key, e := range f.Auths {
		key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
		for _, suffix := range []string{"/", "/v1", "/v2"} {
			key = strings.TrimSuffix(key, suffix)
		}
		entries[key] = e
	}
	for _, host := range hosts {
		// Podman knows keys for a part of a registry: the longest wins.
		for key := host + "/" + ref.repository; key != ""; {
			if e, ok := entries[key]; ok {
				if c, err := e.credentials(); err != nil || c != (Credentials{}) {
					return c, err
				}
			}
			i := strings.LastIndexByte(key, '/')
			key = key[:max(i, 0)]
		}
	}
	return Credentials{}, nil
}

func (e authEntry) credentials() (Credentials, error) {
	c := Credentials{e.Username, e.Password, e.IdentityToken, e.RegistryToken}
	if e.Auth != "" {
		p, err := base64.StdEncoding.DecodeString(e.Auth)
		user, password, ok := strings.Cut(string(p), ":")
		if err != nil || !ok {
			return Credentials{}, errors.New("auth is not base64 of user:password")
		}
		c.Username, c.Password = user, strings.Trim(password, "\x00")
	}
	return c, nil
}
