package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
