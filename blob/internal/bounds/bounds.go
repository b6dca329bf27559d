// Package bounds checks the arguments of blob.Source.Range, so that every
// source refuses the same requests with the same error.
package bounds

import (
	"fmt"
	"math"
	"strings"

	"github.com/shale-image/shale/blob"
)

// Check refuses a range that is empty, negative, overflows, or ends after the
// object, if ref or actual tells its size (0: not known). The error wraps
// blob.ErrRange and names the object.
func Check(ref blob.Ref, actual, off, n int64) error {
	if off < 0 || n <= 0 || off > math.MaxInt64-n {
		return fmt.Errorf("blob %s: %d bytes at offset %d: %w", ref.Digest, n, off, blob.ErrRange)
	}
	for _, size := range []int64{ref.Size, actual} {
		if size > 0 && off+n > size {
			return fmt.Errorf("blob %s: %d bytes at offset %d: %w: it has %d bytes", ref.Digest, n, off, blob.ErrRange, size)
		}
	}
	return nil
}

// Hex returns the 64 digits of a "sha256:..." digest and whether it is one.
// What it accepts is safe as a file name and in a URL.
func Hex(digest string) (string, bool) {
	hex, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return "", false
	}
	return hex, true
}
