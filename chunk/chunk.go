// Package chunk is the unit of content: how file data is cut, named by digest
// and compressed.
//
// It knows nothing about files, images, blobs or disks.
package chunk

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"lukechampine.com/blake3"
)

const (
	// Size is the one cut: everything Shale cuts itself is cut at multiples
	// of 64 KiB from the start of each file (docs/ARCHITECTURE.md, "The one
	// cut").
	Size = 64 << 10

	// Earlier is what Size was before. Layers of an image that is known since that time
	// are cut likewise.
	Earlier = 128 << 10

	// Block is the granule of presence and of proof: what is on the node is
	// recorded by 16 KiB, and a BLAKE3 tree can prove one such block alone.
	Block = 16 << 10

	// MaxSize bounds the size of any chunk, also a foreign one (RAFS v6
	// allows 16 MiB). Decoders allocate at most this much for one chunk.
	MaxSize = 16 << 20
)

// ErrCorrupt is wrapped by every error that says "these bytes are not what
// they should be", as opposed to "these bytes could not be had". Callers
// branch on it: corruption is never retried from the same copy.
var ErrCorrupt = errors.New("corrupt data")

// Algorithm is a digest algorithm.
type Algorithm uint8

// The digest algorithms. The zero value is invalid on purpose.
const (
	BLAKE3 Algorithm = 1 + iota
	SHA256

	// Origin is for content of which nobody has told a digest: what is named is
	// where it comes from, down to the digest of the stored bytes. Two chunks of
	// one Origin are the same, but content cannot be verified by it; whoever
	// decodes it has to verify what it is decoded from.
	Origin
)

// Known tells whether a is one of them.
func (a Algorithm) Known() bool { return a >= BLAKE3 && a <= Origin }

// String returns the algorithm's name as used in digests ("blake3").
func (a Algorithm) String() string {
	switch a {
	case BLAKE3:
		return "blake3"
	case SHA256:
		return "sha256"
	case Origin:
		return "origin"
	}
	return fmt.Sprintf("algorithm(%d)", uint8(a))
}

// Digest names content: an algorithm and its full 256-bit sum. It is
// comparable and may be a map key.
type Digest struct {
	Algorithm Algorithm
	Sum       [32]byte
}

// Sum returns the digest of p. It panics if a is neither BLAKE3 nor SHA256.
func Sum(a Algorithm, p []byte) Digest {
	switch a {
	case BLAKE3:
		return Digest{a, blake3.Sum256(p)}
	case SHA256:
		return Digest{a, sha256.Sum256(p)}
	}
	panic("chunk: unknown digest algorithm")
}

// Parse reads the form that String writes, "blake3:<64 hex digits>", of a digest
// of content.
func Parse(s string) (Digest, error) {
	var d Digest
	name, sum, ok := strings.Cut(s, ":")
	switch name {
	case "blake3":
		d.Algorithm = BLAKE3
	case "sha256":
		d.Algorithm = SHA256
	default:
		ok = false
	}
	if !ok || len(sum) != 64 {
		return Digest{}, fmt.Errorf("digest %q: want blake3:<64 hex> or sha256:<64 hex>", s)
	}
	if _, err := hex.Decode(d.Sum[:], []byte(sum)); err != nil {
		return Digest{}, fmt.Errorf("digest %q: %w", s, err)
	}
	return d, nil
}

// ParseName is Parse, also of an Origin: for lists of what there is, where nothing
// is believed for its name.
func ParseName(s string) (Digest, error) {
	sum, ok := strings.CutPrefix(s, "origin:")
	if !ok {
		return Parse(s)
	}
	d, err := Parse("blake3:" + sum)
	if err != nil {
		return Digest{}, fmt.Errorf("origin %q: want origin:<64 hex>", s)
	}
	d.Algorithm = Origin
	return d, nil
}

// String returns "blake3:<64 hex digits>".
func (d Digest) String() string {
	return d.Algorithm.String() + ":" + hex.EncodeToString(d.Sum[:])
}

// Verify reports, as an error wrapping ErrCorrupt, that p is not the content
// d names. That an Origin does not tell is such an error, too.
func (d Digest) Verify(p []byte) error {
	if d.Algorithm != BLAKE3 && d.Algorithm != SHA256 {
		return fmt.Errorf("%w: %s says nothing about content", ErrCorrupt, d.Algorithm)
	}
	if got := Sum(d.Algorithm, p); got != d {
		return fmt.Errorf("%w: digest is %s, want %s", ErrCorrupt, got, d)
	}
	return nil
}

var zeros [4096]byte

// IsZero tells whether content is all zeros: a hole need not be stored.
func IsZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}
