package image

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"

	"github.com/shale-image/shale/blob"
)

// verifier passes an object through and fails, in place of its last byte, if
// it is not the one that its descriptor names.
type verifier struct {
	io.Closer
	r    io.Reader
	d    Descriptor
	hash hash.Hash
	n    int64
	err  error // sticky
}

func newVerifier(r io.ReadCloser, d Descriptor) *verifier {
	return &verifier{Closer: r, r: r, d: d, hash: sha256.New()}
}

func (v *verifier) Read(p []byte) (int, error) {
	if v.err != nil || len(p) == 0 {
		return 0, v.err
	}
	if v.n == v.d.Size {
		return 0, v.end()
	}
	n, err := v.r.Read(p[:min(int64(len(p)), v.d.Size-v.n)])
	v.n += int64(n)
	v.hash.Write(p[:n])
	switch {
	case v.n == v.d.Size:
		// Check now: who knows the size does not read on to io.EOF.
		if err := v.check(); err != nil {
			return 0, err
		}
		return n, nil
	case err == io.EOF:
		v.err = corrupt("blob "+v.d.Digest, "it has %d bytes, expected %d", v.n, v.d.Size)
		return n, v.err
	case err != nil:
		v.err = err
	}
	return n, err
}

func (v *verifier) check() error {
	if got := fmt.Sprintf("sha256:%x", v.hash.Sum(nil)); got != v.d.Digest {
		v.err = corrupt("blob "+v.d.Digest, "its content has digest %s", got)
		if len(blob.Reject(v.r)) > 0 { // the next one who opens it asks there first
			v.err = fmt.Errorf("%w (%w)", v.err, ErrElsewhere)
		}
	}
	return v.err
}

// end looks for bytes after the last one.
func (v *verifier) end() error {
	v.err = io.EOF
	if v.d.Size == 0 && v.check() != io.EOF {
		return v.err
	}
	var one [1]byte
	if n, err := io.ReadFull(v.r, one[:]); n > 0 {
		v.err = corrupt("blob "+v.d.Digest, "it has more than %d bytes", v.d.Size)
	} else if err != io.EOF {
		v.err = err
	}
	return v.err
}

// digestOf returns the digest of p.
func digestOf(p []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(p)) }

// checkBytes tells whether p is what the descriptor names.
func checkBytes(d Descriptor, p []byte) error {
	if int64(len(p)) != d.Size {
		return corrupt("blob "+d.Digest, "it has %d bytes, expected %d", len(p), d.Size)
	}
	if got := digestOf(p); got != d.Digest {
		return corrupt("blob "+d.Digest, "its content has digest %s", got)
	}
	return nil
}
