package image_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/shale-image/shale/blob/blobtest"
	"github.com/shale-image/shale/image"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a transport that writes down what goes over the wire.
type recorder struct {
	http.RoundTripper
	mu   sync.Mutex
	reqs []*http.Request
}

func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	r.mu.Lock()
	r.reqs = append(r.reqs, req)
	r.mu.Unlock()
	return r.RoundTripper.RoundTrip(req)
}

// take returns "METHOD /path" of the requests since the last call.
func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var s []string
	for _, req := range r.reqs {
		s = append(s, req.Method+" "+req.URL.Path)
	}
	r.reqs = nil
	return s
}

func newRecorder(t *testing.T) *recorder {
	tr := &http.Transport{DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &recorder{RoundTripper: tr}
}

// serve runs a registry, or what wrap makes of one, and returns its host:port.
func serve(t *testing.T, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	var h http.Handler = registry.New(registry.Logger(quiet))
	if wrap != nil {
		h = wrap(h)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func open(t *testing.T, ref string, opts image.Options) *image.Repository {
	t.Helper()
	r, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	if opts.Transport == nil && opts.CAFile == "" {
		opts.Transport = newRecorder(t)
	}
	repo, err := image.Open(t.Context(), r, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}

func desc(mediaType string, p []byte) image.Descriptor {
	ref := blobtest.Ref(p)
	return image.Descriptor{MediaType: mediaType, Digest: ref.Digest, Size: ref.Size}
}

func opener(p []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }
}

func pushBlob(t *testing.T, repo *image.Repository, mediaType string, p []byte) image.Descriptor {
	t.Helper()
	d := desc(mediaType, p)
	if err := repo.PushBlob(t.Context(), d, opener(p)); err != nil {
		t.Fatal(err)
	}
	return d
}

func pushManifest(t *testing.T, repo *image.Repository, mediaType, tag string, v any) image.Descriptor {
	t.Helper()
	p, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.PushManifest(t.Context(), mediaType, p, tag)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

const tarGzip = "application/vnd.oci.image.layer.v1.tar+gzip"

var layers = [][]byte{[]byte("first layer"), bytes.Repeat([]byte("second layer "), 100000)}

type object = map[string]any

// manifest pushes the blobs of an image and returns its manifest.
func manifest(t *testing.T, repo *image.Repository, config object) object {
	t.Helper()
	p, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	m := object{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": pushBlob(t, repo, image.MediaTypeConfig, p), "annotations": object{"a": "b"}}
	var ds []image.Descriptor
	for _, l := range layers {
		ds = append(ds, pushBlob(t, repo, tarGzip, l))
	}
	m["layers"] = ds
	return m
}

func config(os, arch string) object {
	return object{
		"os": os, "architecture": arch, "created": "2026-01-02T03:04:05Z",
		"config": object{
			"User": "1000:1000", "Entrypoint": []string{"/init"}, "Cmd": []string{"-v"}, "Env": []string{"PATH=/bin", "A=" + arch},
			"WorkingDir": "/work", "Labels": object{"l": "v"}, "ExposedPorts": object{"80/tcp": object{}, "443/tcp": object{}}, "StopSignal": "SIGINT",
		},
		"rootfs": object{"type": "layers", "diff_ids": []string{"sha256:" + strings.Repeat("ab", 32)}},
	}
}

func pushImage(t *testing.T, repo *image.Repository, tag, arch string) image.Descriptor {
	t.Helper()
	return pushManifest(t, repo, image.MediaTypeManifest, tag, manifest(t, repo, config("linux", arch)))
}

type place struct {
	name string
	ref  func(t *testing.T) string // of a new, empty repository, without a tag
}

// places are the kinds of repository that must behave alike.
func places() []place {
	return []place{
		{"registry", func(t *testing.T) string { return serve(t, nil) + "/some/app" }},
		{"layout", func(t *testing.T) string { return "oci:" + filepath.Join(t.TempDir(), "layout") }},
		{"docker-registry", func(t *testing.T) string { return debianRegistry(t, "") + "/some/app" }},
	}
}

func everywhere(t *testing.T, f func(t *testing.T, ref string)) {
	for _, p := range places() {
		t.Run(p.name, func(t *testing.T) { f(t, p.ref(t)) })
	}
}

var quiet = log.New(io.Discard, "", 0)

var linux = func(arch string) image.Platform { return image.Platform{OS: "linux", Architecture: arch} }

func sprint(v any) string { return fmt.Sprint(v) }
