package image

import (
	"errors"
	"fmt"
	"strings"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/index"
)

// Sentinels that callers branch on, besides blob.ErrNotFound,
// blob.ErrUnauthorized and blob.ErrUnavailable.
var (
	ErrCorrupt     = index.ErrCorrupt     // bytes that are not what their digest says, or make no sense
	ErrUnsupported = index.ErrUnsupported // an image, in a form that is not read here
	ErrLimit       = index.ErrLimit
	ErrNotImage    = errors.New("not an image")
	ErrPlatform    = errors.New("no image for the platform")

	// ErrElsewhere comes with ErrCorrupt where another place, a mirror or what it
	// mirrors, may have it right, and is asked by the next one who opens the blob.
	ErrElsewhere = errors.New("another source is asked next time")
)

// NotImageError is about a manifest of something else: a chart, a signature, an
// attestation. It unwraps to ErrNotImage.
type NotImageError struct {
	Name string // the reference or digest
	What string // the type that says what it is
}

func (e *NotImageError) Error() string {
	return fmt.Sprintf("%s: %v: it is %q", e.Name, ErrNotImage, e.What)
}
func (e *NotImageError) Unwrap() error { return ErrNotImage }

// PlatformError is about an image that is not for the platform asked for. It
// unwraps to ErrPlatform.
type PlatformError struct {
	Name      string // the reference or digest
	Want      Platform
	Available []Platform // at least one unless the index is empty
}

func (e *PlatformError) Error() string {
	names := make([]string, len(e.Available))
	for i, p := range e.Available {
		names[i] = p.String()
	}
	have := "it is empty"
	if len(names) > 0 {
		have = "it has " + strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s: %v %s: %s", e.Name, ErrPlatform, e.Want, have)
}
func (e *PlatformError) Unwrap() error { return ErrPlatform }

func corrupt(name, format string, args ...any) error {
	return index.Errorf(ErrCorrupt, name, -1, format, args...)
}

func overLimit(name, what string, limit int64) error {
	return index.Errorf(ErrLimit, name, -1, "%s of more than %d bytes", what, limit)
}

// overManifestLimit is overLimit of Options.ManifestLimit, by its name among a node's limits.
func overManifestLimit(name, what string, limit int64) error {
	return index.Errorf(ErrLimit, name, -1, "%s of more than %d bytes (ManifestBytes)", what, limit)
}

func notFound(name, format string, args ...any) error {
	return fmt.Errorf("%s: %w: "+format, append([]any{name, blob.ErrNotFound}, args...)...)
}

func unsupported(name, format string, args ...any) error {
	return index.Errorf(ErrUnsupported, name, -1, format, args...)
}

func overLimitN(name, what string, limit int) error {
	return index.Errorf(ErrLimit, name, -1, "more than %d %s", limit, what)
}
