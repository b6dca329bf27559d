package image_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shale-image/shale/image"
)

func TestResolveCredentials(t *testing.T) {
	home := t.TempDir()
	bin := filepath.Join(home, "bin")
	for name, text := range map[string]string{
		// The protocol of credential helpers: the server on stdin, JSON on stdout.
		"bin/docker-credential-ok":    "#!/bin/sh\nread s; echo '{\"ServerURL\":\"'$s'\",\"Username\":\"'$1'\",\"Secret\":\"'$s'\"}'\n",
		"bin/docker-credential-token": "#!/bin/sh\necho '{\"Username\":\"<token>\",\"Secret\":\"idtoken\"}'\n",
		"bin/docker-credential-none":  "#!/bin/sh\necho 'credentials not found in native keychain'; exit 1\n",
		"bin/docker-credential-bad":   "#!/bin/sh\necho 'locked' >&2; exit 1\n",
		"bin/docker-credential-junk":  "#!/bin/sh\necho secret-junk\n",
		"bin/docker-credential-long":  "#!/bin/sh\nprintf '{\"Username\":\"u\",\"Secret\":\"%0200000d\"}' 1\n",
		".docker/config.json": `{"auths":{
			"plain.example":{"auth":"dXNlcjpwYTpzcw=="},
			"https://old.example/v1/":{"auth":"dXNlcjpvbGQ="},
			"https://index.docker.io/v1/":{"username":"hub","password":"pw"},
			"identity.example":{"auth":"dXNlcjo=","identitytoken":"id"},
			"broken.example":{"auth":"%%%"},
			"empty.example":{}},
			"credHelpers":{"helper.example":"ok","token.example":"token","none.example":"none","bad.example":"bad","junk.example":"junk","long.example":"long","path.example":"../evil","gone.example":"gone"}}`,
		".config/containers/auth.json": `{"auths":{"podman.example/team":{"auth":"dGVhbTpwdw=="},"podman.example/team/app":{"auth":"YXBwOnB3"},"podman.example":{"auth":"YWxsOnB3"},"plain.example":{"auth":"bm86bm8="}}}`,
		"store/config.json":            `{"credsStore":"ok","auths":{"x.example":{}}}`,
		"junk/config.json":             `{"auths":{"x.example":{"auth":"hunter2`,
	} {
		path := filepath.Join(home, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	t.Setenv("HOME", home)
	for _, k := range []string{"DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(k, "")
	}
	resolve := func(s string) (image.Credentials, error) {
		r, err := image.ParseRef(s)
		if err != nil {
			t.Fatal(err)
		}
		return image.ResolveCredentials(t.Context(), r)
	}
	for ref, want := range map[string]image.Credentials{
		"plain.example/a":           {Username: "user", Password: "pa:ss"},
		"old.example/a":             {Username: "user", Password: "old"},
		"debian":                    {Username: "hub", Password: "pw"},
		"identity.example/a":        {Username: "user", IdentityToken: "id"},
		"empty.example/a":           {},
		"unknown.example/a":         {},
		"helper.example/a":          {Username: "get", Password: "helper.example"},
		"token.example/a":           {IdentityToken: "idtoken"},
		"none.example/a":            {},
		"podman.example/team/app":   {Username: "app", Password: "pw"},
		"podman.example/team/other": {Username: "team", Password: "pw"},
		"podman.example/other":      {Username: "all", Password: "pw"},
		"oci:/some/dir":             {},
	} {
		if got, err := resolve(ref); err != nil || got != want {
			t.Errorf("%s: %+v, %v", ref, got.Username+":"+got.Password+":"+got.IdentityToken, err)
		}
	}
	for _, host := range []string{"broken", "bad", "junk", "long", "path", "gone"} {
		if _, err := resolve(host + ".example/a"); err == nil || !strings.Contains(err.Error(), host+".example") || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", host, err)
		}
	}
	t.Setenv("DOCKER_CONFIG", filepath.Join(home, "store"))
	if got, err := resolve("debian"); err != nil || got.Password != "https://index.docker.io/v1/" {
		t.Errorf("store: %v, %v", got, err)
	}
	t.Setenv("DOCKER_CONFIG", filepath.Join(home, "junk"))
	if _, err := resolve("debian"); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("junk: %v", err)
	}
}

func TestCredentialsAreNotShown(t *testing.T) {
	c := image.Credentials{Username: "user", Password: "hunter2", IdentityToken: "hunter2", RegistryToken: "hunter2"}
	opts := image.Options{Credentials: c}
	var b strings.Builder
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "cred", c)
	fmt.Fprintf(&b, "%v %+v %#v %s %v %+v %#v", c, c, c, c, opts, opts, opts)
	if s := b.String(); strings.Contains(s, "hunter2") || !strings.Contains(s, "credentials of user") {
		t.Error(s)
	}
}

// TestCredentialsAtHand: what files say is known without running anything.
func TestCredentialsAtHand(t *testing.T) {
	home := t.TempDir()
	t.Setenv("DOCKER_CONFIG", home)
	for _, k := range []string{"HOME", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(k, "")
	}
	ran := filepath.Join(home, "ran")
	t.Setenv("PATH", home+":/usr/bin:/bin")
	if err := os.WriteFile(filepath.Join(home, "docker-credential-x"), []byte("#!/bin/sh\ntouch "+ran+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		config, ref string
		want        string
		known       bool
	}{
		{`{"auths":{"plain.example":{"auth":"dXNlcjpwYTpzcw=="}},"credHelpers":{"helper.example":"x"}}`, "plain.example/a", "pa:ss", true},
		{`{"credHelpers":{"helper.example":"x"}}`, "other.example/a", "", true},
		{`{"credHelpers":{"helper.example":"x"}}`, "helper.example/a", "", false},
		{`{"credsStore":"x"}`, "any.example/a", "", false},
		{`{"credsStore":"x"}`, "oci:/dir", "", true},
		{`{`, "any.example/a", "", false},
	} {
		if err := os.WriteFile(filepath.Join(home, "config.json"), []byte(c.config), 0o600); err != nil {
			t.Fatal(err)
		}
		ref, err := image.ParseRef(c.ref)
		if err != nil {
			t.Fatal(err)
		}
		if got, known := image.CredentialsAtHand(ref); got.Password != c.want || known != c.known {
			t.Errorf("%s of %s: %q, %v", c.ref, c.config, got.Password, known)
		}
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("a helper was run")
	}
}
