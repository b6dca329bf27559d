package image_test

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"

	"github.com/shale-image/shale/image"
)

var someDigest = "sha256:" + strings.Repeat("0123456789abcdef", 4)

func TestParseRef(t *testing.T) {
	for _, c := range []struct{ in, registry, repository, tag, digest, full string }{
		{"debian", "docker.io", "library/debian", "latest", "", "docker.io/library/debian:latest"},
		{"debian:12", "docker.io", "library/debian", "12", "", "docker.io/library/debian:12"},
		{"docker.io/debian:12", "docker.io", "library/debian", "12", "", "docker.io/library/debian:12"},
		{"index.docker.io/library/debian", "docker.io", "library/debian", "latest", "", "docker.io/library/debian:latest"},
		{"user/app", "docker.io", "user/app", "latest", "", "docker.io/user/app:latest"},
		{"localhost/app", "localhost", "app", "latest", "", "localhost/app:latest"},
		{"localhost:5000/debian:12", "localhost:5000", "debian", "12", "", "localhost:5000/debian:12"},
		{"127.0.0.1:5000/a/b/c", "127.0.0.1:5000", "a/b/c", "latest", "", "127.0.0.1:5000/a/b/c:latest"},
		{"[::1]:5000/a:B", "[::1]:5000", "a", "B", "", "[::1]:5000/a:B"},
		{"[fd00::1]/a", "[fd00::1]", "a", "latest", "", "[fd00::1]/a:latest"},
		{"GHCR.io/a/b", "ghcr.io", "a/b", "latest", "", "ghcr.io/a/b:latest"},
		{"r.example/a__b--c.d:_x@" + someDigest, "r.example", "a__b--c.d", "_x", someDigest, "r.example/a__b--c.d:_x@" + someDigest},
		{"debian@" + someDigest, "docker.io", "library/debian", "", someDigest, "docker.io/library/debian@" + someDigest},
	} {
		r, err := image.ParseRef(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		if r.Registry() != c.registry || r.Repository() != c.repository || r.Tag() != c.tag || r.Digest() != c.digest || r.String() != c.full || r.Dir() != "" {
			t.Errorf("%s: %q %q %q %q, %s", c.in, r.Registry(), r.Repository(), r.Tag(), r.Digest(), r)
		}
	}
	for _, c := range []struct{ in, dir, tag, digest string }{
		{"oci:dir", "dir", "latest", ""},
		{"oci:/a/b:1", "/a/b", "1", ""},
		{"oci:/a:b/c", "/a:b/c", "latest", ""},
		{"oci:../x y:1@" + someDigest, "../x y", "1", someDigest},
		{"oci:/a@b", "/a@b", "latest", ""},
		{"oci:/a@" + someDigest, "/a", "", someDigest},
	} {
		r, err := image.ParseRef(c.in)
		if err != nil || r.Dir() != c.dir || r.Tag() != c.tag || r.Digest() != c.digest || r.String() != c.in || r.Registry() != "" {
			t.Errorf("%s: %v, %q %q %q, %s", c.in, err, r.Dir(), r.Tag(), r.Digest(), r)
		}
	}
	for _, in := range []string{
		"", ":", "@", "a:", "a@", "a@sha256:abc", "a@sha512:" + strings.Repeat("0", 128), "a@" + strings.ToUpper(someDigest), "https://r.example/a", "docker://a",
		"Debian", "a/../b", "../a", "r.example/..", "r.example/a/./b", "r.example//a", "r.example/a/", "r.example/", "/a", "a:..", "a:.x", "a:-x", "a:b c", "a%2fb",
		"r.example:0/a", "r.example:99999/a", "r.example:/a", "r.example:+1/a", "-r.example/a", "r..example/a", "user@r.example/a", "r.example/a?b", "r.example/a#b",
		"[::1/a", "[]:1/a", "[::1%25lo]/a", "a\n", "a\x00", strings.Repeat("a", 256), "a:" + strings.Repeat("t", 129), strings.Repeat("a/", 5000),
		"oci:", "oci::tag", "oci:dir:..", "oci:a\x00b", "oci:@" + someDigest, "oci:dir@sha256:abc",
	} {
		if r, err := image.ParseRef(in); err == nil {
			t.Errorf("%.100q is accepted as %s", in, r)
		}
	}
}

func TestRefText(t *testing.T) {
	r, _ := image.ParseRef("debian:12")
	p, err := json.Marshal(map[string]image.Ref{"ref": r.WithDigest(someDigest)})
	if err != nil || string(p) != `{"ref":"docker.io/library/debian:12@`+someDigest+`"}` {
		t.Errorf("%s, %v", p, err)
	}
	var back struct{ Ref image.Ref }
	if err := json.Unmarshal(p, &back); err != nil || back.Ref != r.WithDigest(someDigest) {
		t.Errorf("%v, %v", back, err)
	}
	l, _ := image.ParseRef("oci:x:1")
	if s := l.WithDir("/abs/x").String(); s != "oci:/abs/x:1" {
		t.Error(s)
	}
}

func TestPlatform(t *testing.T) {
	for in, want := range map[string]string{"arm64": "linux/arm64", "linux/arm/v7": "linux/arm/v7", "windows/amd64": "windows/amd64"} {
		if p, err := image.ParsePlatform(in); err != nil || p.String() != want {
			t.Errorf("%s: %v, %v", in, p, err)
		}
	}
	for _, in := range []string{"", "/", "linux/", "a/b/c/d", "linux//v7", strings.Repeat("x", 200)} {
		if p, err := image.ParsePlatform(in); err == nil {
			t.Errorf("%q is accepted as %v", in, p)
		}
	}
}

func FuzzParseRef(f *testing.F) {
	for _, s := range []string{"debian:12", "localhost:5000/a/b@" + someDigest, "oci:/a/b:c@" + someDigest, "[::1]:1/a", "oci:a@b:c", "r.example/a:b@sha256:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := image.ParseRef(s)
		if err != nil {
			return
		}
		back, err := image.ParseRef(r.String())
		if err != nil || back.String() != r.String() || back.Tag() != r.Tag() || back.Digest() != r.Digest() || back.Dir() != r.Dir() {
			t.Fatalf("%q becomes %q becomes %q, %v", s, r, back, err)
		}
		if r.Dir() != "" {
			return
		}
		// In a URL it is what it looks like.
		path := "/v2/" + r.Repository() + "/manifests/" + r.Tag()
		u, err := url.Parse("https://" + r.Registry() + path)
		if err != nil || u.Host != r.Registry() || u.EscapedPath() != path || u.JoinPath().Path != path || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			t.Fatalf("%q gives the URL %v, %v", s, u, err)
		}
	})
}
