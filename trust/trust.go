// Package trust makes and checks signatures of indexes: the word of somebody
// with a key that an index is that of an image, whoever may push beside it.
//
// A signature is Ed25519 over a Statement. It is kept as an annotation, whose
// name ends with the id of the key, so that one index may have several. The
// package knows digests and files of keys; it knows no registry, and nothing of
// what an index says.
package trust

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
)

// Annotation is what the names of annotations with signatures begin with; the
// id of the key follows.
const Annotation = "io.github.shale-image.signature."

// ErrSignature says that a signature by a key that is known is not one of what
// it is said to sign.
var ErrSignature = errors.New("bad signature")

// Statement is what is signed.
type Statement struct {
	Manifest string // digest of the image's
	Index    string // digest of the index as it is stored
	Side     string // digest of what lies beside the layers; "" if nothing does
}

var reDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// encode writes the statement in the only form that it has. Digests are all of
// one length and no line can be mistaken for another:
//
//	shale index signature v1
//	manifest sha256:2c26...
//	index sha256:fcde...
//	side none
func (s Statement) encode() ([]byte, error) {
	for _, d := range []string{s.Manifest, s.Index} {
		if !reDigest.MatchString(d) {
			return nil, fmt.Errorf("sign %.100q: not a sha256 digest", d)
		}
	}
	side := "none"
	if s.Side != "" {
		if side = s.Side; !reDigest.MatchString(side) {
			return nil, fmt.Errorf("sign %.100q: not a sha256 digest", side)
		}
	}
	return fmt.Appendf(nil, "shale index signature v1\nmanifest %s\nindex %s\nside %s\n", s.Manifest, s.Index, side), nil
}

// Signer is a private key. It may be used by several goroutines.
type Signer struct {
	id  string
	key ed25519.PrivateKey
}

// ID returns the id of the key.
func (s *Signer) ID() string { return s.id }

// Sign returns the name and the value of an annotation. The same statement
// always has the same signature.
func (s *Signer) Sign(st Statement) (name, value string, err error) {
	text, err := st.encode()
	if err != nil {
		return "", "", err
	}
	return Annotation + s.id, base64.StdEncoding.EncodeToString(ed25519.Sign(s.key, text)), nil
}

// Key is a public key.
type Key struct {
	ID  string // hex of the first 16 bytes of the SHA-256 of its PKIX form
	key ed25519.PublicKey
}

func newKey(pub ed25519.PublicKey) (Key, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return Key{}, err
	}
	sum := sha256.Sum256(der)
	return Key{hex.EncodeToString(sum[:16]), pub}, nil
}

// Keys are the keys of those whose word counts. Without any nobody's does.
type Keys []Key

// Has tells whether a key is among them.
func (k Keys) Has(id string) bool {
	for i := range k {
		if k[i].ID == id {
			return true
		}
	}
	return false
}

// Verify looks among annotations for signatures of a statement, and returns the
// id of the first of the keys that has signed it, "" if none has. What other
// keys are said to have signed is neither here nor there. But if one of these
// keys is said to have, and has not, somebody has changed something: that is
// ErrSignature, whatever else there is.
func (k Keys) Verify(st Statement, annotations map[string]string) (id string, err error) {
	for i := range k {
		value, ok := annotations[Annotation+k[i].ID]
		if !ok {
			continue
		}
		text, err := st.encode()
		if err != nil {
			return "", fmt.Errorf("key %s: %w: %w", k[i].ID, ErrSignature, err)
		}
		sig, err := base64.StdEncoding.Strict().DecodeString(value)
		// The length: a decoder passes over line breaks.
		if err != nil || len(sig) != ed25519.SignatureSize || len(value) != base64.StdEncoding.EncodedLen(len(sig)) {
			return "", fmt.Errorf("key %s: %w: not the base64 of %d bytes", k[i].ID, ErrSignature, ed25519.SignatureSize)
		}
		if !ed25519.Verify(k[i].key, text, sig) {
			return "", fmt.Errorf("key %s: %w: not of index %s and side %q of image %s", k[i].ID, ErrSignature, st.Index, st.Side, st.Manifest)
		}
		if id == "" {
			id = k[i].ID
		}
	}
	return id, nil
}
