package image

import (
	"errors"
	"net/http"
	"reflect"
	"strings"
	"testing"
)

func TestParseChallenges(t *testing.T) {
	for in, want := range map[string][]challenge{
		`Basic realm="x"`: {{"basic", map[string]string{"realm": "x"}}},
		`Bearer realm="https://a/t",service="s p",scope="repository:a/b:pull,push"`: {{"bearer", map[string]string{"realm": "https://a/t", "service": "s p", "scope": "repository:a/b:pull,push"}}},
		`Negotiate, BEARER Realm=https://a/t , scope = "q\"q", basic realm=""`: {
			{"negotiate", map[string]string{}}, {"bearer", map[string]string{"realm": "https://a/t", "scope": `q"q`}}, {"basic", map[string]string{"realm": ""}}},
		`Bearer realm="unfinished`: {{"bearer", map[string]string{"realm": "unfinished"}}},
		`="", ,,`:                  nil,
		``:                         nil,
	} {
		if got := parseChallenges(http.Header{"Www-Authenticate": {in}}); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, expected %v", in, got, want)
		}
	}
}

func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://a/t",service="s",scope="repository:a/b:pull", Basic realm=x`)
	f.Add(`a="b\`)
	f.Fuzz(func(t *testing.T, s string) {
		a := newAuth("https", "r.example", Credentials{}, nil, nil)
		for _, c := range parseChallenges(http.Header{"Www-Authenticate": {s}}) {
			if c.scheme == "" || c.params == nil {
				t.Fatalf("%q: %v", s, c)
			}
			if u, err := a.realm(c.params["realm"]); err == nil && (u.Scheme != "https" || u.Host == "" || isLoopback(u.Host)) {
				t.Fatalf("%q: realm %v", s, u)
			}
		}
	})
}

func FuzzDocument(f *testing.F) {
	d := `{"mediaType":"` + MediaTypeConfig + `","digest":"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef","size":2}`
	f.Add(MediaTypeManifest, []byte(`{"schemaVersion":2,"config":`+d+`,"layers":[`+d+`]}`))
	f.Add(MediaTypeIndex, []byte(`{"schemaVersion":2,"manifests":[{"mediaType":"`+MediaTypeManifest+`","digest":"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef","size":2,"platform":{"os":"linux","architecture":"arm","variant":"v7","os.features":["x"]}}]}`))
	f.Add("", []byte(`{"schemaVersion":1}`))
	f.Fuzz(func(t *testing.T, mediaType string, p []byte) {
		doc, err := parseDocument("x", mediaType, p)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrNotImage) {
				t.Fatalf("an error of no kind: %v", err)
			}
			return
		}
		if isIndex(doc.MediaType) == isManifest(doc.MediaType) || isManifest(doc.MediaType) != (doc.Config != nil) {
			t.Fatalf("neither index nor manifest, or both: %q", p)
		}
		if doc.Config != nil {
			if err := doc.checkImage("x"); err != nil && !errors.Is(err, ErrNotImage) {
				t.Fatal(err)
			}
		}
		s := search{repo: &Repository{}, want: Platform{OS: "linux", Architecture: "arm"}.normal()}
		for _, e := range append(s.order(doc), doc.Layers...) {
			if !reDigest.MatchString(e.Digest) || e.Size < 0 {
				t.Fatalf("descriptor %+v", e)
			}
		}
		if isIndex(doc.MediaType) {
			if q, err := setTag(p, Descriptor{MediaType: MediaTypeIndex, Digest: digestOf(p), Annotations: map[string]string{refName: "t"}}); err == nil {
				if _, err := parseDocument("x", MediaTypeIndex, q); err != nil && doc.MediaType == MediaTypeIndex {
					t.Fatalf("%q becomes %q: %v", p, q, err)
				}
			}
		}
	})
}

// FuzzReferrers: lists of referrers from outside, and adding to them.
func FuzzReferrers(f *testing.F) {
	const digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	d := `{"mediaType":"` + MediaTypeManifest + `","digest":"` + digest + `","size":2,"artifactType":"a/b","annotations":{"x":"y"}}`
	f.Add(MediaTypeIndex, []byte(`{"schemaVersion":2,"manifests":[`+d+`],"z":1}`))
	f.Add("", []byte(`{"schemaVersion":2,"mediaType":"`+MediaTypeIndex+`","manifests":null,"config":null,"Manifests":[]}`))
	f.Add(MediaTypeIndex, []byte(`{"schemaVersion":2,"manifests":[`+strings.Repeat(d+",", 3)+`{"digest":"sha512:"}]}`))
	f.Add(MediaTypeManifest, []byte(`{"artifactType":"a/b","subject":`+d+`,"config":{}}`))
	f.Fuzz(func(t *testing.T, mediaType string, p []byte) {
		check := func(err error) {
			if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrLimit) && !errors.Is(err, ErrNotImage) {
				t.Fatalf("an error of no kind: %v", err)
			}
		}
		_, err := parseReferrer("x", p)
		check(err)
		a, err := parseArtifact("x", mediaType, Manifest{Bytes: p}, digest)
		check(err)
		if err == nil && a.Type == "" {
			t.Fatalf("no type: %q", p)
		}
		list, err := parseList("x", mediaType, p, 3)
		check(err)
		if len(list) > 3 {
			t.Fatal("over the limit")
		}
		for _, e := range list {
			if !reDigest.MatchString(e.Digest) || e.Size < 0 {
				t.Fatalf("descriptor %+v", e)
			}
		}
		mine, err := newReferral(Descriptor{MediaType: MediaTypeIndex, Digest: digest}, "a/b", nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		mine.limit, mine.replaces = 1<<20, func(d Descriptor) bool { return d.Size > 5 }
		before, err := parseList("x", MediaTypeIndex, p, maxReferrers)
		q, aerr := mine.add("x", p)
		check(aerr)
		if err != nil || aerr != nil || q == nil {
			if err != nil && aerr == nil {
				t.Fatalf("adds to %q", p)
			}
			return
		}
		after, err := parseList("x", MediaTypeIndex, q, maxReferrers)
		if err != nil || len(after) == 0 || after[len(after)-1].Digest != mine.d.Digest || len(after) > len(before)+1 {
			t.Fatalf("%q becomes %q: %v", p, q, err)
		}
		if again, err := mine.add("x", q); again != nil || err != nil {
			t.Fatalf("%q again: %q, %v", q, again, err)
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"os":"linux","architecture":"amd64","created":"x","config":{"Env":["A=B"],"ExposedPorts":{"1/tcp":{}}},"rootfs":{"diff_ids":[]}}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := parseConfig("x", p)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		for _, id := range c.DiffIDs {
			if !reDigest.MatchString(id) {
				t.Fatalf("diff_id %q", id)
			}
		}
	})
}

func TestRank(t *testing.T) {
	for _, c := range []struct {
		have, want string
		runs       bool
	}{
		{"linux/amd64", "linux/amd64", true}, {"linux/amd64/v2", "linux/amd64", false}, {"linux/amd64", "linux/amd64/v3", true},
		{"linux/arm/v5", "linux/arm", true}, {"linux/arm/v8", "linux/arm/v7", false}, {"linux/arm64", "linux/arm", false},
		{"linux/aarch64", "linux/arm64/v8", true}, {"windows/amd64", "linux/amd64", false}, {"linux/mips64le/x", "linux/mips64le", false},
		{"linux/arm/garbage", "linux/arm", false}, {"linux/armhf", "linux/arm", true}, {"linux/i386", "linux/386", true},
	} {
		have, err1 := ParsePlatform(c.have)
		want, err2 := ParsePlatform(c.want)
		if got := have.rank(want) > 0; err1 != nil || err2 != nil || got != c.runs {
			t.Errorf("%s on %s: %v", c.have, c.want, got)
		}
	}
}
