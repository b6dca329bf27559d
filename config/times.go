package config

import (
	"fmt"
	"time"
)

// Defaults of times.
const (
	// DefaultReadTimeout outlasts the restart of a registry.
	DefaultReadTimeout = time.Minute
	// DefaultWorkerTimeout is half of what readers wait for anyway, and many times what
	// a process on a machine that is short of memory or processors needs to say a word.
	DefaultWorkerTimeout = 30 * time.Second
	// DefaultScrub is a month, as is usual for disks.
	DefaultScrub = 30 * 24 * time.Hour
)

// Off turns off what has a time of its own.
const Off = "off"

// ReadWait is ReadTimeout, of at least a second.
func (c *Config) ReadWait() time.Duration { return spanOr(c.ReadTimeout, DefaultReadTimeout) }

// WorkerHang is WorkerTimeout; 0 is for ever.
func (c *Config) WorkerHang() time.Duration { return spanOr(c.WorkerTimeout, DefaultWorkerTimeout) }

// ScrubEvery is Scrub; 0 is never.
func (c *Cache) ScrubEvery() time.Duration { return spanOr(c.Scrub, DefaultScrub) }

// spanOr is span of what was not checked.
func spanOr(s string, def time.Duration) time.Duration {
	if d, err := span(s, def); err == nil {
		return d
	}
	return def
}

// span reads a time of at least a second; Off is 0, and nothing is def.
func span(s string, def time.Duration) (time.Duration, error) {
	switch s {
	case "":
		return def, nil
	case Off:
		return 0, nil
	}
	d, err := time.ParseDuration(s)
	if err == nil && d < time.Second {
		err = fmt.Errorf("%v is less than 1s", d)
	}
	return d, err
}

// Duration is a time span like "30s" in JSON.
type Duration time.Duration

// MarshalText writes what UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what time.ParseDuration does, if it is more than nothing.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err == nil && v <= 0 {
		err = fmt.Errorf("duration %q: want more than 0", b)
	}
	*d = Duration(v)
	return err
}
