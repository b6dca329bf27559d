package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/shale-image/shale/image"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRead(t *testing.T) {
	c, err := Read(write(t, `{
		"registries": {
			"registry.example": {"ca_file": "/ca.pem", "mirrors": ["a:5000", "b"]},
			"10.0.0.7:5000": {"plain_http": true}
		},
		"proxy": {"https": "http://p:1"}
	}`))
	if err != nil {
		t.Fatal(err)
	}
	ref, err := image.ParseRef("registry.example/x/y:z")
	if err != nil {
		t.Fatal(err)
	}
	want := image.Options{CAFile: "/ca.pem", Mirrors: []string{"a:5000", "b"}, PlainHTTP: []string{"10.0.0.7:5000"}, UserAgent: "test"}
	if d := cmp.Diff(want, c.Options(ref, image.Credentials{}, "test")); d != "" {
		t.Error(d)
	}
	t.Setenv("HTTPS_PROXY", "before")
	if err := c.SetProxy(); err != nil || os.Getenv("HTTPS_PROXY") != "http://p:1" {
		t.Errorf("%v, HTTPS_PROXY is %q", err, os.Getenv("HTTPS_PROXY"))
	}
}

func TestBad(t *testing.T) {
	for text, want := range map[string]string{
		`{"registry": {}}`:                                    "registry",
		`{"registries": {"a b": {}}}`:                         "a b",
		`{"registries": {"": {}}}`:                            "host",
		`{"registries": {"a.example": {"ca_file": "x.pem"}}}`: "absolute",
		`{}{}`:                         "more than one",
		`{`:                            "offset",
		strings.Repeat(" ", maxSize+1): "more than",
	} {
		path := write(t, text)
		if _, err := Read(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%.40s: %v, want the file's name and %q", text, err, want)
		}
	}
}

func TestLoad(t *testing.T) {
	t.Setenv("SHALE_CONFIG", filepath.Join(t.TempDir(), "none"))
	if _, err := Load(); err == nil {
		t.Error("a configuration that is named must be there")
	}
	t.Setenv("SHALE_CONFIG", write(t, `{"proxy": {"no_proxy": "x"}}`))
	if c, err := Load(); err != nil || c.Proxy.NoProxy != "x" {
		t.Errorf("%+v, %v", c, err)
	}
}
