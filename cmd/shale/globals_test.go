package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/image"
)

// TestLookUp: a helper that hangs, or fails, keeps nobody from what is on the node.
func TestLookUp(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("PATH", dir+":/usr/bin:/bin")
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("config.json", `{"credsStore": "x"}`)
	ref, err := image.ParseRef("registry.example/app")
	if err != nil {
		t.Fatal(err)
	}
	for _, does := range []string{"exec sleep 1000", "echo locked >&2; exit 1"} {
		write("docker-credential-x", "#!/bin/sh\n"+does+"\n")
		if c, err := lookUp(t.Context(), ref, true, 100*time.Millisecond); err != nil || c != (image.Credentials{}) {
			t.Errorf("%s: %v, %v", does, c, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := lookUp(ctx, ref, false, time.Hour); err == nil || !strings.Contains(err.Error(), "docker-credential-x") {
			t.Errorf("%s, of what is not known: %v", does, err)
		}
	}
	write("docker-credential-x", "#!/bin/sh\necho '{\"Username\": \"me\", \"Secret\": \"s\"}'\n")
	if c, err := lookUp(t.Context(), ref, true, time.Minute); err != nil || c.Password != "s" {
		t.Errorf("%v, %v", c, err)
	}
}

// TestFindImage: what is waited for is named by a reference, a digest or a mount.
func TestFindImage(t *testing.T) {
	a, b := "sha256:"+strings.Repeat("a", 64), "sha256:"+strings.Repeat("b", 64)
	st := &daemon.Status{
		Mounts: []daemon.MountStatus{{ID: "1234", ManifestDigest: b}},
		Images: []daemon.ImageStatus{{Refs: []string{"r.example/app:1"}, ManifestDigest: a}, {ManifestDigest: b}},
	}
	for name, want := range map[string]string{"r.example/app:1": a, "r.example/other@" + b: b, "1234": b} {
		if got, err := findImage(st, name); err != nil || got != want {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
	if _, err := findImage(st, "r.example/app:2"); !errors.Is(err, blob.ErrNotFound) {
		t.Error(err)
	}
}
