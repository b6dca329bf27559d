package trust

import (
	"encoding/base64"
	"errors"
	"maps"
	"strings"
	"testing"
)

func digest(c string) string { return "sha256:" + strings.Repeat(c, 64) }

var statement = Statement{Manifest: digest("a"), Index: digest("b"), Side: digest("c")}

// newPair makes a key; the file of the private one is in a directory of the test.
func newPair(t testing.TB) (*Signer, Keys) {
	t.Helper()
	file := t.TempDir() + "/key"
	s, err := Create(file)
	if err != nil {
		t.Fatal(err)
	}
	k, err := ReadKeys(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	return s, k
}

func sign(t testing.TB, st Statement, signers ...*Signer) map[string]string {
	t.Helper()
	out := map[string]string{"org.example.other": "x"}
	for _, s := range signers {
		name, value, err := s.Sign(st)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = value
	}
	return out
}

// The bytes that are signed are for ever, or signatures of before are worth
// nothing.
func TestStatement(t *testing.T) {
	got, err := statement.encode()
	want := "shale index signature v1\nmanifest " + digest("a") + "\nindex " + digest("b") + "\nside " + digest("c") + "\n"
	if err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	got, err = Statement{Manifest: digest("a"), Index: digest("b")}.encode()
	if err != nil || !strings.HasSuffix(string(got), "\nside none\n") {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []Statement{
		{}, {Manifest: digest("a")}, {Index: digest("b")},
		{digest("a"), digest("b"), "none"}, {digest("A"), digest("b"), ""}, {digest("a") + "\n", digest("b"), ""},
		{digest("a"), digest("b") + "\nside " + digest("c"), ""},
	} {
		s, _ := newPair(t)
		if _, _, err := s.Sign(bad); err == nil {
			t.Errorf("%+v was signed", bad)
		}
	}
}

func TestVerify(t *testing.T) {
	a, keyA := newPair(t)
	b, keyB := newPair(t)
	both := append(append(Keys{}, keyA...), keyB...)
	by := func(s ...*Signer) map[string]string { return sign(t, statement, s...) }
	for name, c := range map[string]struct {
		keys        Keys
		annotations map[string]string
		want        string
	}{
		"signed":                     {keyA, by(a), a.ID()},
		"by one of two keys":         {both, by(b), b.ID()},
		"by two, one is known":       {keyB, by(a, b), b.ID()},
		"by two, the first counts":   {both, by(a, b), a.ID()},
		"by another":                 {keyB, by(a), ""},
		"by nobody":                  {keyA, by(), ""},
		"no annotations":             {keyA, nil, ""},
		"no keys":                    {nil, by(a), ""},
		"another's that is nonsense": {keyA, map[string]string{Annotation + b.ID(): "?", Annotation: "", Annotation + "../x": ""}, ""},
	} {
		if id, err := c.keys.Verify(statement, c.annotations); err != nil || id != c.want {
			t.Errorf("%s: %q, %v; want %q", name, id, err, c.want)
		}
	}
	if x, y := by(a, b), by(b, a); !maps.Equal(x, y) {
		t.Error("the same statement has other signatures")
	}
}

// What a known key is said to have signed, and has not, is an error that names
// the key, whatever else is signed well.
func TestBadSignature(t *testing.T) {
	a, keyA := newPair(t)
	b, keyB := newPair(t)
	both := append(append(Keys{}, keyA...), keyB...)
	good := sign(t, statement, a, b)
	name := Annotation + a.ID()
	raw, err := base64.StdEncoding.DecodeString(good[name])
	if err != nil {
		t.Fatal(err)
	}
	flipped := append([]byte{}, raw...)
	flipped[40] ^= 1
	for what, value := range map[string]string{
		"empty":           "",
		"not base64":      "?" + good[name][1:],
		"a line break":    good[name][:20] + "\n" + good[name][20:],
		"cut off":         base64.StdEncoding.EncodeToString(raw[:63]),
		"longer":          base64.StdEncoding.EncodeToString(append(raw[:64:64], 0)),
		"of the URL form": base64.URLEncoding.EncodeToString(make([]byte, 64)),
		"another bit":     base64.StdEncoding.EncodeToString(flipped),
		"another's":       good[Annotation+b.ID()],
		"zeros":           base64.StdEncoding.EncodeToString(make([]byte, 64)),
		"huge":            strings.Repeat("A", 1<<20),
	} {
		bad := maps.Clone(good)
		bad[name] = value
		if id, err := both.Verify(statement, bad); !errors.Is(err, ErrSignature) || id != "" || !strings.Contains(err.Error(), a.ID()) || len(err.Error()) > 1000 {
			t.Errorf("%s: %q, %v", what, id, err)
		}
	}
	for what, st := range map[string]Statement{
		"of another image":     {digest("d"), statement.Index, statement.Side},
		"of another index":     {statement.Manifest, digest("d"), statement.Side},
		"with another side":    {statement.Manifest, statement.Index, digest("d")},
		"without its side":     {statement.Manifest, statement.Index, ""},
		"image and index":      {statement.Index, statement.Manifest, statement.Side},
		"index and side":       {statement.Manifest, statement.Side, statement.Index},
		"of what is no digest": {statement.Manifest, "x", statement.Side},
	} {
		if id, err := both.Verify(st, good); !errors.Is(err, ErrSignature) || id != "" {
			t.Errorf("%s: %q, %v", what, id, err)
		}
	}
	// A signature without a side is not one with a side.
	none := sign(t, Statement{Manifest: statement.Manifest, Index: statement.Index}, a)
	if id, err := keyA.Verify(statement, none); !errors.Is(err, ErrSignature) || id != "" {
		t.Errorf("a side was added: %q, %v", id, err)
	}
}

// FuzzVerify has arbitrary values: nothing but the signature itself is one.
func FuzzVerify(f *testing.F) {
	s, keys := newPair(f)
	name, value, err := s.Sign(statement)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(value)
	f.Add(value + "\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, v string) {
		id, err := keys.Verify(statement, map[string]string{name: v})
		if (v == value) != (id == s.ID()) || (err == nil) != (v == value) || err != nil && !errors.Is(err, ErrSignature) {
			t.Errorf("%q: %q, %v", v, id, err)
		}
	})
}
