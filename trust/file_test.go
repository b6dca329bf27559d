package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	s, err := Create(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]fs.FileMode{file: 0o600, file + ".pub": 0o644} {
		if st, err := os.Stat(name); err != nil || st.Mode().Perm()&^mode != 0 {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
	again, err := ReadSigner(file)
	if err != nil || again.ID() != s.ID() || len(s.ID()) != 32 {
		t.Errorf("%+v, %v", again, err)
	}
	// Neither file is overwritten, nor what a name leads to; and no half is left.
	before, _ := os.ReadFile(file)
	if _, err := Create(file); !errors.Is(err, fs.ErrExist) {
		t.Errorf("the key was overwritten: %v", err)
	}
	if after, _ := os.ReadFile(file); !bytes.Equal(before, after) {
		t.Error("the key has changed")
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("target", link); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(link); !errors.Is(err, fs.ErrExist) {
		t.Errorf("through a link: %v", err)
	}
	os.WriteFile(filepath.Join(dir, "half.pub"), []byte("mine"), 0o600)
	if _, err := Create(filepath.Join(dir, "half")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("the public key was overwritten: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "half")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a private key without its public one: %v", err)
	}
	if _, err := Create(filepath.Join(dir, "no", "where")); err == nil {
		t.Error("in no directory")
	}
}

func block(t testing.TB, kind string, der []byte, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// texts are files of keys of all kinds.
func texts(t testing.TB) map[string]string {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	dh, err := curve.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	private := func(name string, k any) {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		out[name] = block(t, privateType, der, err)
	}
	public := func(name string, k any) {
		der, err := x509.MarshalPKIXPublicKey(k)
		out[name] = block(t, publicType, der, err)
	}
	private("private", key)
	private("rsa private", small)
	private("ecdsa private", curve)
	private("ecdh private", dh)
	public("public", pub)
	public("rsa", &small.PublicKey)
	public("ecdsa", &curve.PublicKey)
	out["rsa of old"] = block(t, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(small), nil)
	out["encrypted"] = block(t, "ENCRYPTED PRIVATE KEY", []byte("secret"), nil)
	out["encrypted of old"] = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n"
	out["certificate"] = block(t, "CERTIFICATE", []byte("x"), nil)
	out["garbage"] = block(t, publicType, []byte("x"), nil)
	out["private garbage"] = block(t, privateType, []byte("x"), nil)
	out["empty"] = ""
	out["no pem"] = "ssh-ed25519 AAAA me@example\n"
	out["cut off"] = out["public"][:len(out["public"])-20]
	out["damaged"] = strings.Replace(out["public"], "\n", "\n?", 1)
	return out
}

func TestParse(t *testing.T) {
	text := texts(t)
	for name, want := range map[string]string{
		"rsa": "an RSA key, want an Ed25519", "ecdsa": "an ECDSA key, want", "private": "a private key, want a public one",
		"rsa of old": `"RSA PRIVATE KEY", want PUBLIC KEY`, "encrypted": "encrypted key", "certificate": `"CERTIFICATE", want`, "garbage": publicType,
		"empty": "no PEM", "no pem": "no PEM", "cut off": "malformed PEM: 0 of 1", "damaged": "malformed PEM: 0 of 1",
	} {
		if k, err := ParseKeys([]byte(text[name])); err == nil || !strings.Contains(err.Error(), want) || k != nil {
			t.Errorf("%s as public keys: %v, %v; want %q", name, k, err, want)
		}
		// What is wrong is not passed over because of what is right.
		if k, err := ParseKeys([]byte(text["public"] + text[name] + text["public"])); err == nil && name != "empty" && name != "no pem" {
			t.Errorf("%s between public keys: %v", name, k)
		}
	}
	for name, want := range map[string]string{
		"rsa private": "an RSA key, want an Ed25519", "ecdsa private": "an ECDSA key, want", "ecdh private": "want an Ed25519 key", "public": "a public key, want a private one",
		"rsa of old": `"RSA PRIVATE KEY", want PRIVATE KEY`, "encrypted": "an encrypted key", "encrypted of old": "an encrypted key",
		"private garbage": privateType, "empty": "no PEM", "no pem": "no PEM",
	} {
		if s, err := ParseSigner([]byte(text[name])); err == nil || !strings.Contains(err.Error(), want) || s != nil {
			t.Errorf("%s as a private key: %v, want %q", name, err, want)
		}
	}
	if _, err := ParseSigner([]byte(text["private"] + text["private"])); err == nil || !strings.Contains(err.Error(), "2 PEM blocks") {
		t.Errorf("two private keys: %v", err)
	}
}

func TestSeveralKeys(t *testing.T) {
	a, b := texts(t)["public"], texts(t)["public"]
	keys, err := ParseKeys([]byte("a team\n" + a + "\nanother\n" + b + a))
	if err != nil || len(keys) != 2 || keys[0].ID == keys[1].ID {
		t.Fatalf("%v, %v; want two keys", keys, err)
	}
	dir := t.TempDir()
	first, second := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	os.WriteFile(first, []byte(a), 0o600)
	os.WriteFile(second, []byte(b+a), 0o600)
	keys, err = ReadKeys(first, second)
	if err != nil || len(keys) != 2 {
		t.Errorf("%v, %v; want two keys", keys, err)
	}
	if keys, err := ReadKeys(); err != nil || keys != nil {
		t.Errorf("of no files: %v, %v", keys, err)
	}
	if keys, err := ReadKeys(first, dir+"/none"); !errors.Is(err, fs.ErrNotExist) || keys != nil || !strings.Contains(err.Error(), dir+"/none") {
		t.Errorf("%v, %v", keys, err)
	}
	os.WriteFile(second, bytes.Repeat([]byte(a), 1000), 0o600)
	if keys, err := ReadKeys(second); err == nil || keys != nil || !strings.Contains(err.Error(), second+": more than") {
		t.Errorf("%v, %v", keys, err)
	}
	if _, err := ReadSigner(first); err == nil || !strings.Contains(err.Error(), first+": a public key") {
		t.Error(err)
	}
}

// openssl is a second opinion: on files of keys, key ids and signatures.
func TestOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("needs openssl: ", err)
	}
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	openssl := func(args ...string) []byte {
		t.Helper()
		cmd := exec.Command("openssl", args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return out
	}
	openssl("genpkey", "-algorithm", "ed25519", "-out", "theirs")
	openssl("pkey", "-in", "theirs", "-pubout", "-out", "theirs.pub")
	if _, err := Create(path("ours")); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path("ours.pub")); err != nil || !bytes.Equal(got, openssl("pkey", "-in", "ours", "-pubout")) {
		t.Errorf("openssl has another public key of ours: %v", err)
	}
	text, err := statement.encode()
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(path("statement"), text, 0o600)
	for _, name := range []string{"theirs", "ours"} {
		s, err := ReadSigner(path(name))
		if err != nil {
			t.Fatal(err)
		}
		keys, err := ReadKeys(path(name + ".pub"))
		if err != nil || !keys.Has(s.ID()) {
			t.Fatalf("%v, %v", keys, err)
		}
		openssl("pkey", "-pubin", "-in", name+".pub", "-outform", "DER", "-out", "der")
		if sum := openssl("dgst", "-sha256", "-r", "der"); !strings.HasPrefix(string(sum), s.ID()) {
			t.Errorf("%s: key id %s, openssl says %s", name, s.ID(), sum)
		}
		_, value, err := s.Sign(statement)
		if err != nil {
			t.Fatal(err)
		}
		sig, _ := base64.StdEncoding.DecodeString(value)
		os.WriteFile(path("sig"), sig, 0o600)
		openssl("pkeyutl", "-verify", "-pubin", "-inkey", name+".pub", "-rawin", "-in", "statement", "-sigfile", "sig")
		openssl("pkeyutl", "-sign", "-inkey", name, "-rawin", "-in", "statement", "-out", "sig")
		if sig, err = os.ReadFile(path("sig")); err != nil {
			t.Fatal(err)
		}
		if id, err := keys.Verify(statement, map[string]string{Annotation + s.ID(): base64.StdEncoding.EncodeToString(sig)}); err != nil || id != s.ID() {
			t.Errorf("%s: a signature by openssl: %q, %v", name, id, err)
		}
	}
	openssl("pkey", "-in", "theirs", "-aes256", "-passout", "pass:x", "-out", "encrypted")
	openssl("genpkey", "-algorithm", "x25519", "-out", "x25519")
	openssl("pkey", "-in", "x25519", "-pubout", "-out", "x25519.pub")
	for name, want := range map[string]string{"encrypted": "an encrypted key", "x25519": "a key for ECDH"} {
		if _, err := ReadSigner(path(name)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	if _, err := ReadKeys(path("x25519.pub")); err == nil || !strings.Contains(err.Error(), "a key for ECDH") {
		t.Error(err)
	}
}

// FuzzParse has arbitrary text as files of keys. What is read can be used.
func FuzzParse(f *testing.F) {
	for _, text := range texts(f) {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		keys, err := ParseKeys(p)
		if (err == nil) != (len(keys) > 0) {
			t.Errorf("%d keys, %v", len(keys), err)
		}
		for _, k := range keys {
			if len(k.ID) != 32 || len(k.key) != ed25519.PublicKeySize {
				t.Errorf("%+v", k)
			}
		}
		if _, err := keys.Verify(statement, nil); err != nil {
			t.Error(err)
		}
		s, err := ParseSigner(p)
		if (err == nil) != (s != nil) {
			t.Errorf("%v, %v", s, err)
		}
		if s != nil {
			if _, _, err := s.Sign(statement); err != nil {
				t.Error(err)
			}
		}
	})
}
