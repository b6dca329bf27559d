package image_test

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/image"
)

func dialTo(addr string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
}

// flipping flips a bit of every GET body whose path contains the string in
// part; "" means none.
func flipping(part *atomic.Value) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s, _ := part.Load().(string)
			if s == "" || r.Method != http.MethodGet || !strings.Contains(r.URL.Path, s) {
				next.ServeHTTP(w, r)
				return
			}
			rec := httptest.NewRecorder()
			next.ServeHTTP(rec, r)
			for k, v := range rec.Header() {
				w.Header()[k] = v
			}
			w.WriteHeader(rec.Code)
			p := rec.Body.Bytes()
			p[len(p)/2] ^= 1
			w.Write(p)
		})
	}
}

func TestFlippedBits(t *testing.T) {
	var part atomic.Value
	ref := serve(t, flipping(&part)) + "/app"
	m := pushImage(t, open(t, ref, image.Options{}), "v1", "amd64")
	img, err := open(t, ref+":v1", image.Options{}).Resolve(t.Context(), linux("amd64"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ part, ref, digest string }{
		{"manifests", ref + ":v1", m.Digest},
		{"manifests", ref + "@" + m.Digest, m.Digest},
		{img.ConfigBlob.Digest, ref + ":v1", img.ConfigBlob.Digest},
	} {
		part.Store(c.part)
		_, err := open(t, c.ref, image.Options{}).Resolve(t.Context(), linux("amd64"))
		if !errors.Is(err, image.ErrCorrupt) || !strings.Contains(err.Error(), c.digest) {
			t.Errorf("%s of %s: %v", c.part, c.ref, err)
		}
	}
	l := img.Layers[1]
	part.Store(l.Digest)
	repo := open(t, ref, image.Options{})
	for _, read := range []func(io.Reader) ([]byte, error){
		io.ReadAll,
		func(r io.Reader) ([]byte, error) {
			p := make([]byte, l.Size)
			n, err := io.ReadFull(r, p)
			return p[:n], err
		},
	} {
		r, err := repo.Blob(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		p, err := read(r)
		r.Close()
		if !errors.Is(err, image.ErrCorrupt) || !strings.Contains(err.Error(), l.Digest) || int64(len(p)) >= l.Size {
			t.Errorf("layer: %d of %d bytes, %v", len(p), l.Size, err)
		}
	}
}

// TestOneDocument: what a manifest is does not depend on who reads it.
func TestOneDocument(t *testing.T) {
	d := `{"mediaType":"x","digest":"sha256:` + strings.Repeat("0", 64) + `","size":1}`
	for _, c := range []struct {
		contentType, body string
		err               error
		saying            string
	}{
		{image.MediaTypeManifest, `{"schemaVersion":2,"mediaType":"` + image.MediaTypeIndex + `","manifests":[]}`, image.ErrCorrupt, "expected"},
		{image.MediaTypeManifest, `{"schemaVersion":2,"config":` + d + `,"manifests":[` + d + `]}`, image.ErrCorrupt, "index"},
		{image.MediaTypeIndex, `{"schemaVersion":2,"manifests":[],"layers":[` + d + `]}`, image.ErrCorrupt, "layers"},
		{image.MediaTypeManifest, `{"schemaVersion":2}`, image.ErrCorrupt, "config"},
		{image.MediaTypeManifest, `{}`, image.ErrCorrupt, "schemaVersion"},
		{image.MediaTypeManifest, `[]`, image.ErrCorrupt, "manifest"},
		{image.MediaTypeManifest, ``, image.ErrCorrupt, "manifest"},
		{image.MediaTypeManifest, `{"schemaVersion":2,"config":{"digest":"sha256:../../..","size":1}}`, image.ErrCorrupt, "digest"},
		{image.MediaTypeManifest, `{"schemaVersion":2,"config":{"digest":"sha256:` + strings.Repeat("0", 64) + `","size":-1}}`, image.ErrCorrupt, "size -1"},
		{image.MediaTypeManifest, `{"schemaVersion":2,"config":{"digest":"sha512:` + strings.Repeat("0", 128) + `","size":1}}`, image.ErrUnsupported, "sha512"},
		{"application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1,"name":"app"}`, image.ErrUnsupported, "schema 1"},
		{"application/json", `{"schemaVersion":1,"name":"app"}`, image.ErrUnsupported, "schema 1"},
		{"application/json", `{"schemaVersion":2,"mediaType":"application/vnd.oci.artifact.manifest.v1+json"}`, image.ErrNotImage, "artifact.manifest"},
		{"application/json", `{"schemaVersion":2,"config":` + d + `}`, image.ErrNotImage, `"x"`},
		{image.MediaTypeDockerList + "; charset=utf-8", `{"schemaVersion":2,"manifests":[]}`, image.ErrPlatform, "empty"},
		{image.MediaTypeManifest, strings.Repeat("[", 1<<20), image.ErrCorrupt, "manifest"},
		{image.MediaTypeManifest, strings.Repeat(" ", 5<<20), image.ErrLimit, "4194304"},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", c.contentType)
			io.WriteString(w, c.body)
		}))
		_, err := open(t, strings.TrimPrefix(srv.URL, "http://")+"/app:v1", image.Options{}).Resolve(t.Context(), linux("amd64"))
		if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.saying) || len(err.Error()) > 1000 {
			t.Errorf("%.100s: %v, expected %v with %q", c.body, err, c.err, c.saying)
		}
		srv.Close()
	}
}

func TestBlobsConformance(t *testing.T) {
	everywhere(t, func(t *testing.T, ref string) {
		blobtest.Run(t, func(contents map[string][]byte) blob.Source {
			repo := open(t, ref, image.Options{})
			for _, p := range contents {
				pushBlob(t, repo, tarGzip, p)
			}
			return repo.Blobs()
		})
	})
}

// TestPassingFaults: a registry that is busy for a while is asked again, also
// for an upload; the answer in the end is the right one.
func TestPassingFaults(t *testing.T) {
	var n atomic.Int64
	host := serve(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if n.Add(1)%2 == 1 {
				io.Copy(io.Discard, r.Body)
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			next.ServeHTTP(w, r)
		})
	})
	repo := open(t, host+"/app:v1", image.Options{})
	p, err := repo.PushManifest(t.Context(), image.MediaTypeIndex, []byte(`{"schemaVersion":2,"manifests":[]}`), "v1")
	if err != nil {
		t.Fatal(err)
	}
	if m, err := repo.Manifest(t.Context(), ""); err != nil || m.Digest != p.Digest {
		t.Error(err)
	}
}

func TestMirrors(t *testing.T) {
	mirror, origin := serve(t, nil), serve(t, nil)
	rec := newRecorder(t)
	gone := httptest.NewServer(nil)
	gone.Close()
	opts := image.Options{Transport: rec, Mirrors: []string{strings.TrimPrefix(gone.URL, "http://"), mirror}}
	pushImage(t, open(t, origin+"/app", image.Options{}), "v1", "amd64")
	hosts := func() (s []string) {
		for _, r := range rec.reqs {
			s = append(s, r.URL.Host)
		}
		rec.take()
		return s
	}
	repo := open(t, origin+"/app:v1", opts)
	if _, err := repo.Resolve(t.Context(), linux("amd64")); err != nil { // the mirror lacks it
		t.Fatal(err)
	}
	dead := strings.TrimPrefix(gone.URL, "http://")
	if got, want := sprint(hosts()), sprint([]string{dead, mirror, origin, mirror, origin}); got != want {
		t.Errorf("%v, expected %v", got, want)
	}
	pushImage(t, open(t, mirror+"/app", image.Options{}), "v1", "amd64")
	if _, err := repo.Resolve(t.Context(), linux("amd64")); err != nil {
		t.Fatal(err)
	}
	// It is not asked at once for an object that it did not have; what is dead is tried
	// again, but not so soon.
	alive := slices.DeleteFunc(hosts(), func(h string) bool { return h == dead })
	if got, want := sprint(alive), sprint([]string{mirror, origin}); got != want {
		t.Errorf("%v, expected %v", got, want)
	}
	for _, bad := range []string{"http://host", "host/path", "", "a b"} {
		r, _ := image.ParseRef(origin + "/app")
		if _, err := image.Open(t.Context(), r, image.Options{Mirrors: []string{bad}}); err == nil {
			t.Errorf("mirror %q is accepted", bad)
		}
	}
}

// TestMirrorHangs: a mirror that has a manifest and does not bring it, or what refers to
// it, delays an image and does not keep it.
func TestMirrorHangs(t *testing.T) {
	origin := serve(t, nil)
	subject := pushImage(t, open(t, origin+"/app", image.Options{}), "v1", "amd64")
	a := pushArtifact(t, open(t, origin+"/app", image.Options{}), subject, typeA, "x", nil)
	mirror := serve(t, func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				io.WriteString(w, `{"schemaVersion":2,`)
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			}
			http.NotFound(w, r)
		})
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // a request has 30
	defer cancel()
	repo := open(t, origin+"/app:v1", image.Options{Mirrors: []string{mirror}})
	if img, err := repo.Resolve(ctx, linux("amd64")); err != nil || img.ManifestDigest != subject.Digest {
		t.Error(err)
	}
	repo = open(t, origin+"/app:v1", image.Options{Mirrors: []string{mirror}})
	if got, err := repo.Referrers(ctx, subject.Digest, typeA); err != nil || len(got) != 1 || got[0].Digest != a {
		t.Errorf("%v, %v", got, err)
	}
}

func TestMount(t *testing.T) {
	ref := debianRegistry(t, "")
	pushImage(t, open(t, ref+"/from/here", image.Options{}), "v1", "amd64")
	rec := newRecorder(t)
	repo := open(t, ref+"/to/there", image.Options{Transport: rec})
	d := desc(tarGzip, layers[1])
	err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) {
		t.Error("a blob that can be mounted was read")
		return nil, io.EOF
	}, "nowhere/at/all", "from/here")
	if got := rec.take(); err != nil || len(got) != 3 { // is it there, mount, mount
		t.Errorf("%v after %v", err, got)
	}
	if p, err := blob.ReadAll(t.Context(), repo.Blobs(), d.Ref(), 0, 6); err != nil || string(p) != "second" {
		t.Errorf("%q, %v", p, err)
	}
}

func TestTLS(t *testing.T) {
	srv := httptest.NewUnstartedServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	var buf bytes.Buffer
	pem.Encode(&buf, &pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(ca, buf.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	// Loopback is plain HTTP by default, so the TLS server is reached through a name.
	client := srv.Client().Transport.(*http.Transport).Clone()
	client.DialContext = dialTo(srv.Listener.Addr().String())
	client.TLSClientConfig.RootCAs = nil
	defer client.CloseIdleConnections()
	_, err := open(t, "example.com/app:v1", image.Options{Transport: client}).Manifest(t.Context(), "")
	if err == nil || errors.Is(err, blob.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %v", err)
	}
	repo := open(t, srv.Listener.Addr().String()+"/app:v1", image.Options{CAFile: ca})
	pushImage(t, repo, "v1", "amd64")
	if _, err := repo.Resolve(t.Context(), linux("amd64")); err != nil {
		t.Errorf("a certificate in the CA file: %v", err)
	}
	repo.Close()
	for _, bad := range []string{filepath.Join(t.TempDir(), "none"), os.DevNull} {
		r, _ := image.ParseRef("example.com/app")
		if _, err := image.Open(t.Context(), r, image.Options{CAFile: bad}); err == nil {
			t.Errorf("CA file %s is accepted", bad)
		}
	}
}

// TestHealthShared: what one image has learned of a mirror, which is asked in nobody's
// name, others need not.
func TestHealthShared(t *testing.T) {
	mirror, origin := serve(t, nil), serve(t, nil)
	for _, host := range []string{mirror, origin} {
		pushImage(t, open(t, host+"/app", image.Options{}), "v1", "amd64")
		pushImage(t, open(t, host+"/other", image.Options{}), "v1", "amd64")
	}
	gone := httptest.NewServer(nil)
	gone.Close()
	dead := strings.TrimPrefix(gone.URL, "http://")
	asked := func(ref string, cred image.Credentials, mirrors ...string) bool {
		t.Helper()
		rec := newRecorder(t)
		if _, err := open(t, ref, image.Options{Transport: rec, Mirrors: mirrors, Credentials: cred}).Resolve(t.Context(), linux("amd64")); err != nil {
			t.Fatal(err)
		}
		for _, r := range rec.reqs {
			if r.URL.Host == dead {
				return true
			}
		}
		return false
	}
	if !asked(origin+"/app:v1", image.Credentials{}, dead, mirror) {
		t.Error("the mirror was not asked")
	}
	if asked(origin+"/other:v1", image.Credentials{}, dead, mirror) {
		t.Error("a mirror that does not answer was asked for another image")
	}
	if asked(origin+"/app:v1", image.Credentials{Username: "me", Password: "x"}, dead, mirror) {
		t.Error("mirrors are asked in nobody's name, whoever asks")
	}
}
