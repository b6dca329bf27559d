package config

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/trust"
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
	if d := c.ReadWait(); d != DefaultReadTimeout {
		t.Errorf("reads wait for %v", d)
	}
	if c, err := Read(write(t, `{"read_timeout": "2m30s"}`)); err != nil || c.ReadWait() != 150*time.Second {
		t.Errorf("reads wait for %v, %v", c.ReadWait(), err)
	}
	if c.WorkerHang() != DefaultWorkerTimeout || c.Cache.ScrubEvery() != DefaultScrub {
		t.Errorf("by default %v and %v", c.WorkerHang(), c.Cache.ScrubEvery())
	}
	if c, err := Read(write(t, `{"worker_timeout": "2m", "cache": {"scrub": "off"}}`)); err != nil || c.WorkerHang() != 2*time.Minute || c.Cache.ScrubEvery() != 0 {
		t.Errorf("%v and %v, %v", c.WorkerHang(), c.Cache.ScrubEvery(), err)
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
		`{"index_keys": ["team.pub"]}`:                        "absolute",
		`{"index_keys": ["/nowhere/team.pub"]}`:               "index_keys: open /nowhere/team.pub",
		`{"index_trust": "signed"}`:                           "no key",
		`{"limits": {"entries": -1}}`:                         "entries is -1",
		`{"limits": {"manifest_bytes": -4096}}`:               "manifest_bytes is -4096",
		`{"read_timeout": "0s"}`:                              "at least 1s",
		`{"read_timeout": "soon"}`:                            "at least 1s",
		`{"read_timeout": "off"}`:                             "at least 1s",
		`{"worker_timeout": "10ms"}`:                          "at least 1s",
		`{"cache": {"scrub": "monthly"}}`:                     "at least 1s",
		`{"indexes": "maybe"}`:                                "want keep or share",
		`{"traces": "maybe"}`:                                 "want on, share or off",
		`{}{}`:                                                "more than one",
		`{`:                                                   "offset",
		strings.Repeat(" ", maxSize+1):                        "more than",
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

func TestKeys(t *testing.T) {
	dir := t.TempDir()
	var files, ids []string
	for _, name := range []string{"a", "b"} {
		s, err := trust.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files, ids = append(files, filepath.Join(dir, name+".pub")), append(ids, s.ID())
	}
	path := write(t, fmt.Sprintf(`{"index_trust": "signed", "index_keys": [%q, %q]}`, files[0], files[1]))
	c, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if k := c.Keys(); len(k) != 2 || !k.Has(ids[0]) || !k.Has(ids[1]) {
		t.Errorf("keys %v, want %v", k, ids)
	}
	// A private key in place of the public one; and none. That a configuration
	// need not be there must not mean that its keys need not.
	if err := os.Rename(filepath.Join(dir, "a"), files[0]); err != nil {
		t.Fatal(err)
	}
	if c, err := load(path, false); err == nil || !strings.Contains(err.Error(), files[0]+": a private key") {
		t.Errorf("%+v, %v", c, err)
	}
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	if c, err := load(path, false); err == nil || !strings.Contains(err.Error(), files[0]) {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := load(filepath.Join(dir, "none"), false); err != nil || c == nil {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestCache(t *testing.T) {
	var c Config
	js := `{"cache": {"quota": "1G", "complete": "off", "complete_after": "2m", "complete_rate": "10M", "scrub": "24h"}}`
	if err := json.Unmarshal([]byte(js), &c); err != nil {
		t.Fatal(err)
	}
	if want := (Cache{1 << 30, CompleteOff, Duration(2 * time.Minute), 10 << 20, "24h"}); c.Cache != want {
		t.Errorf("%+v, want %+v", c.Cache, want)
	}
	for _, c := range []Config{{}, c} { // the service passes it on to its processes
		var again Config
		js, err := json.Marshal(c)
		if err == nil {
			err = json.Unmarshal(js, &again)
		}
		if err != nil || again.Cache != c.Cache {
			t.Errorf("%+v, then %+v: %v", c.Cache, again.Cache, err)
		}
	}
	for _, js := range []string{`{"cache": {"complete": "later"}}`, `{"cache": {"complete_after": "0s"}}`, `{"cache": {"complete_after": "-1s"}}`, `{"cache": {"complete_after": "x"}}`} {
		path := filepath.Join(t.TempDir(), "config.json")
		if err := os.WriteFile(path, []byte(js), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(path); err == nil {
			t.Errorf("%s: want an error", js)
		}
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{`5`: 5, `"5"`: 5, `"2K"`: 2 << 10, `"20G"`: 20 << 30, `"1T"`: 1 << 40, `"0"`: 0} {
		var got Size
		if err := json.Unmarshal([]byte(text), &got); err != nil || got != want {
			t.Errorf("%s: %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{`-1`, `"-1K"`, `"K"`, `""`, `"5X"`, `"9999999T"`, `1.5`, `{}`, `null`} {
		var got Size
		if err := json.Unmarshal([]byte(text), &got); err == nil {
			t.Errorf("%s: %d, want an error", text, got)
		}
	}
}
