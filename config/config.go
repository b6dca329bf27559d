// Package config reads the node's configuration: how to reach registries. The
// file is optional, and so is everything in it.
//
//	{
//	  "registries": {
//	    "registry.example":  {"ca_file": "/etc/ssl/private-ca.pem", "mirrors": ["cache.example:5000"]},
//	    "10.0.0.7:5000":     {"plain_http": true}
//	  },
//	  "proxy": {"http": "http://proxy.example:3128", "https": "http://proxy.example:3128", "no_proxy": "localhost,.example"},
//	  "limits": {"entries": 1000000, "file_bytes": 1099511627776},
//	  "index_trust": "signed",
//	  "index_keys": ["/etc/shale/keys/team.pub"],
//	  "traces": "share",
//	  "indexes": "share",
//	  "cache": {"quota": "20G", "complete": "on", "complete_after": "30s", "complete_rate": "10M", "scrub": "720h"},
//	  "read_timeout": "1m",
//	  "worker_timeout": "30s"
//	}
//
// It knows settings; it reaches nothing itself.
package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/trust"
)

// Path is where the configuration is looked for if SHALE_CONFIG does not say.
const Path = "/etc/shale/config.json"

// maxSize bounds the file, in bytes.
const maxSize = 1 << 20

// Config is the content of the file.
type Config struct {
	Registries map[string]Registry `json:"registries"` // by "host[:port]", as in references
	Proxy      Proxy               `json:"proxy"`
	Limits     Limits              `json:"limits"`      // of what is read; zero fields mean the defaults
	IndexTrust string              `json:"index_trust"` // whose index of an image is believed: local, bound, signed or repository (the default)
	IndexKeys  []string            `json:"index_keys"`  // files of the public keys whose signature makes an index count as signed

	// Traces is what becomes of the traces of images' runs (package trace): they
	// are kept on this node (TracesOn, the default), also pushed beside the
	// images (TracesShare), or forgotten (TracesOff).
	Traces string `json:"traces"`

	// Indexes is what becomes of the index that this node makes of an image that has
	// none: it is kept (IndexesKeep, the default), or also pushed beside the image with
	// the credentials of who asked for the image, for other nodes (IndexesShare).
	Indexes string `json:"indexes"`

	Cache Cache `json:"cache"`

	// ReadTimeout is how long a read of a mounted image waits for bytes that no
	// source gives, before it fails with EIO: "30s", "10m". The next read tries
	// again. DefaultReadTimeout if empty.
	ReadTimeout string `json:"read_timeout"`

	// WorkerTimeout is how long the service's worker may fail to say that it is well
	// before it is killed and another one takes over, or "off".
	// DefaultWorkerTimeout if empty.
	WorkerTimeout string `json:"worker_timeout"`

	keys trust.Keys // of IndexKeys
}

// Cache is how much of images the node keeps, and what it fetches unasked.
type Cache struct {
	// Quota is what the pool may take on disk. Beyond it, as on a full disk, what was
	// used longest ago is evicted. The default, 0, is the disk alone.
	Quota Size `json:"quota"`

	// Complete is whether what is mounted is fetched as a whole when nobody waits for
	// anything: CompleteOn, the default, or CompleteOff. It begins CompleteAfter the
	// last time that a reader of the mount had to wait (default 30 s), and brings
	// CompleteRate stored bytes a second at most (default, 0: no limit). The same goes for
	// the layers that an index from elsewhere is compared with when all is here.
	Complete      string   `json:"complete"`
	CompleteAfter Duration `json:"complete_after,omitzero"`
	CompleteRate  Size     `json:"complete_rate"`

	// Scrub is how much time lies between two verifications of all that is kept
	// (DefaultScrub if empty), or "off".
	Scrub string `json:"scrub"`
}

// What Cache.Complete may be, besides "", and the default of CompleteAfter.
const (
	CompleteOn    = "on"
	CompleteOff   = "off"
	CompleteAfter = 30 * time.Second
)

// Size is a number of bytes; in JSON also a string like "20G", of units of 1024.
type Size int64

// ParseSize reads "64K", "1M", "20G", "1T" or a number of bytes.
func ParseSize(s string) (Size, error) {
	digits, unit := s, int64(1)
	if n := len(s) - 1; n >= 0 {
		if k := strings.IndexByte("KMGT", s[n]); k >= 0 {
			digits, unit = s[:n], 1<<(10*(k+1))
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/unit {
		return 0, fmt.Errorf("size %q: want bytes, or a number with K, M, G or T", s)
	}
	return Size(n * unit), nil
}

// UnmarshalJSON reads a number, or a string for ParseSize.
func (z *Size) UnmarshalJSON(b []byte) (err error) {
	text := string(b)
	if len(b) > 0 && b[0] == '"' {
		if err := json.Unmarshal(b, &text); err != nil {
			return err
		}
	}
	*z, err = ParseSize(text)
	return err
}

// What Config.Traces may be, besides "".
const (
	TracesOn    = "on"
	TracesShare = "share"
	TracesOff   = "off"
)

// What Config.Indexes may be, besides "".
const (
	IndexesKeep  = "keep"
	IndexesShare = "share"
)

// Keys are the public keys whose word on an index counts, as Read has read them;
// none in a nil Config.
func (c *Config) Keys() trust.Keys {
	if c == nil {
		return nil
	}
	return c.keys
}

// Limits bound what an image may make this node do.
type Limits struct {
	index.Limits        // of layers, and, as far as they have such a thing, of indexes
	ManifestBytes int64 `json:"manifest_bytes"` // default 4 MiB
}

// Registry is how to reach one registry.
type Registry struct {
	PlainHTTP bool     `json:"plain_http"` // without TLS; those on this machine are anyway
	CAFile    string   `json:"ca_file"`    // PEM certificates to trust besides the system's
	Mirrors   []string `json:"mirrors"`    // "host[:port]", asked first, in this order
}

// Proxy is what HTTP_PROXY, HTTPS_PROXY and NO_PROXY mean for the service,
// which does not have the caller's environment. Each replaces the variable.
type Proxy struct {
	HTTP    string `json:"http"`
	HTTPS   string `json:"https"`
	NoProxy string `json:"no_proxy"`
}

// Load reads the configuration of this node. There need not be one, unless
// SHALE_CONFIG names it.
func Load() (*Config, error) {
	path, named := os.LookupEnv("SHALE_CONFIG")
	if !named || path == "" {
		path, named = Path, false
	}
	return load(path, named)
}

func load(path string, named bool) (*Config, error) {
	// Only this file may be missing, and none that it names.
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) && !named {
		return &Config{}, nil
	}
	return Read(path)
}

// Read reads a configuration file, and the keys that it names. What it does not
// know is an error: a misspelt setting must not be ignored.
func Read(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxSize {
		return nil, fmt.Errorf("%s: more than %d bytes", path, maxSize)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	c := &Config{}
	if err := d.Decode(c); err != nil {
		return nil, fmt.Errorf("%s: at offset %d: %w", path, d.InputOffset(), err)
	}
	if d.More() {
		return nil, fmt.Errorf("%s: at offset %d: more than one object", path, d.InputOffset())
	}
	if err := c.check(path); err != nil {
		return nil, err
	}
	if c.keys, err = trust.ReadKeys(c.IndexKeys...); err != nil {
		return nil, fmt.Errorf("%s: index_keys: %w", path, err)
	}
	return c, nil
}

func (c *Config) check(path string) error {
	for host, r := range c.Registries {
		if _, err := image.ParseRef(host + "/x"); err != nil || host == "" {
			return fmt.Errorf("%s: registry %q: want host or host:port", path, host)
		}
		if r.CAFile != "" && !filepath.IsAbs(r.CAFile) {
			return fmt.Errorf("%s: registry %s: ca_file %q is not an absolute path", path, host, r.CAFile)
		}
	}
	for _, file := range c.IndexKeys {
		if !filepath.IsAbs(file) {
			return fmt.Errorf("%s: index_keys: %q is not an absolute path", path, file)
		}
	}
	if c.IndexTrust == "signed" && len(c.IndexKeys) == 0 {
		return fmt.Errorf("%s: index_trust is signed, but index_keys has no key that could have", path)
	}
	js, err := json.Marshal(c.Limits)
	limits := map[string]int64{}
	if err == nil {
		err = json.Unmarshal(js, &limits)
	}
	if err != nil {
		return fmt.Errorf("%s: limits: %w", path, err)
	}
	for name, n := range limits {
		if n < 0 {
			return fmt.Errorf("%s: limits: %s is %d: want a positive number, or 0 for the default", path, name, n)
		}
	}
	switch c.Indexes {
	case "", IndexesKeep, IndexesShare:
	default:
		return fmt.Errorf("%s: indexes %q: want %s or %s", path, c.Indexes, IndexesKeep, IndexesShare)
	}
	switch c.Cache.Complete {
	case "", CompleteOn, CompleteOff:
	default:
		return fmt.Errorf("%s: cache: complete %q: want %s or %s", path, c.Cache.Complete, CompleteOn, CompleteOff)
	}
	for name, t := range map[string]struct {
		text   string
		canOff bool
	}{"read_timeout": {c.ReadTimeout, false}, "worker_timeout": {c.WorkerTimeout, true}, "cache: scrub": {c.Cache.Scrub, true}} {
		if _, err := span(t.text, 0); err != nil || t.text == Off && !t.canOff {
			return fmt.Errorf("%s: %s %q: want a time of at least 1s, such as 90s or 5m%s", path, name, t.text, map[bool]string{true: ", or " + Off}[t.canOff])
		}
	}
	switch c.Traces {
	case "", TracesOn, TracesShare, TracesOff:
		return nil
	}
	return fmt.Errorf("%s: traces %q: want %s, %s or %s", path, c.Traces, TracesOn, TracesShare, TracesOff)
}

// Options says how to reach the registry of a reference.
func (c *Config) Options(ref image.Ref, cred image.Credentials, userAgent string) image.Options {
	o := image.Options{Credentials: cred, UserAgent: userAgent}
	r := c.Registries[ref.Registry()]
	o.CAFile, o.Mirrors = r.CAFile, r.Mirrors
	o.ManifestLimit = c.Limits.ManifestBytes
	for host, r := range c.Registries {
		if r.PlainHTTP {
			o.PlainHTTP = append(o.PlainHTTP, host)
		}
	}
	return o
}

// SetProxy puts the proxy settings into this process' environment, where HTTP
// clients look for them. It must come before the first request.
func (c *Config) SetProxy() error {
	for name, value := range map[string]string{"HTTP_PROXY": c.Proxy.HTTP, "HTTPS_PROXY": c.Proxy.HTTPS, "NO_PROXY": c.Proxy.NoProxy} {
		if value == "" {
			continue
		}
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}
