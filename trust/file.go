package trust

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// Files of keys are PEM as openssl reads and writes it (openssl genpkey
// -algorithm ed25519): PKCS#8 of private keys, PKIX of public ones.
const (
	privateType = "PRIVATE KEY"
	publicType  = "PUBLIC KEY"

	maxFile = 64 << 10 // bytes of a file of keys
)

// ReadKeys reads files of public keys, each of which has at least one. A key
// that is there twice counts once.
func ReadKeys(files ...string) (Keys, error) {
	var all Keys
	for _, file := range files {
		text, err := read(file)
		if err != nil {
			return nil, err
		}
		keys, err := ParseKeys(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		for _, k := range keys {
			if !all.Has(k.ID) {
				all = append(all, k)
			}
		}
	}
	return all, nil
}

// ParseKeys reads the text of a file of public keys.
func ParseKeys(text []byte) (Keys, error) {
	list, err := blocks(text)
	if err != nil {
		return nil, err
	}
	var all Keys
	for _, b := range list {
		if b.Type != publicType {
			return nil, unwanted(b, publicType)
		}
		parsed, err := x509.ParsePKIXPublicKey(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", publicType, err)
		}
		pub, ok := parsed.(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("%s: %s, want an Ed25519 key", publicType, kind(parsed))
		}
		k, err := newKey(pub)
		if err != nil {
			return nil, err
		}
		if !all.Has(k.ID) {
			all = append(all, k)
		}
	}
	return all, nil
}

// ReadSigner reads the file of a private key.
func ReadSigner(file string) (*Signer, error) {
	text, err := read(file)
	if err != nil {
		return nil, err
	}
	s, err := ParseSigner(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return s, nil
}

// ParseSigner reads the text of the file of a private key.
func ParseSigner(text []byte) (*Signer, error) {
	list, err := blocks(text)
	if err != nil {
		return nil, err
	}
	if len(list) != 1 {
		return nil, fmt.Errorf("%d PEM blocks, want one %s", len(list), privateType)
	}
	if list[0].Type != privateType {
		return nil, unwanted(list[0], privateType)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(list[0].Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", privateType, err)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: %s, want an Ed25519 key", privateType, kind(parsed))
	}
	return newSigner(key)
}

func newSigner(key ed25519.PrivateKey) (*Signer, error) {
	pub, err := newKey(key.Public().(ed25519.PublicKey))
	if err != nil {
		return nil, err
	}
	return &Signer{pub.ID, key}, nil
}

// Create makes a key: file, which only its owner may read, has the private one,
// and file+".pub" the public one. It overwrites neither.
func Create(file string) (*Signer, error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	s, err := newSigner(key)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	if err := create(file, 0o600, privateType, private); err != nil {
		return nil, err
	}
	if err := create(file+".pub", 0o644, publicType, public); err != nil {
		return nil, errors.Join(err, os.Remove(file))
	}
	return s, nil
}

// create writes a file that was not there; if it fails there is none.
func create(name string, mode fs.FileMode, kind string, der []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	err = pem.Encode(f, &pem.Block{Type: kind, Bytes: der})
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		err = errors.Join(err, os.Remove(name))
	}
	return err
}

func read(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("%s: more than %d bytes", file, maxFile)
	}
	return text, err
}

// blocks returns the PEM blocks of a text, at least one. Text between them is
// left alone, but a block that is damaged is an error: package pem would pass
// over it as if it were such text.
func blocks(text []byte) (list []*pem.Block, err error) {
	begun := bytes.Count(text, []byte("-----BEGIN"))
	for b, rest := pem.Decode(text); b != nil; b, rest = pem.Decode(rest) {
		list = append(list, b)
	}
	if len(list) == 0 && begun == 0 {
		return nil, errors.New("no PEM block in it")
	}
	if len(list) != begun {
		return nil, fmt.Errorf("malformed PEM: %d of %d blocks can be read", len(list), begun)
	}
	return list, nil
}

// unwanted is the error for a block of another type.
func unwanted(b *pem.Block, want string) error {
	switch {
	case b.Type == "ENCRYPTED PRIVATE KEY", b.Headers["DEK-Info"] != "":
		return fmt.Errorf("an encrypted key (%.40q), want %s (openssl pkey decrypts it)", b.Type, want)
	case b.Type == privateType:
		return errors.New("a private key, want a public one")
	case b.Type == publicType:
		return errors.New("a public key, want a private one")
	}
	return fmt.Errorf("%.40q, want %s of an Ed25519 key", b.Type, want)
}

// kind names a key that is not Ed25519.
func kind(key any) string {
	switch key.(type) {
	case *rsa.PublicKey, *rsa.PrivateKey:
		return "an RSA key"
	case *ecdsa.PublicKey, *ecdsa.PrivateKey:
		return "an ECDSA key"
	case *ecdh.PublicKey, *ecdh.PrivateKey:
		return "a key for ECDH"
	}
	return fmt.Sprintf("a %T", key)
}
