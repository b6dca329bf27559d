package fleet

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/trace"
)

// places are the ways in which a repository lists artifacts: as an index that its
// users write, and by itself, with and without letting them remove any.
func places(t *testing.T) map[string]string {
	serve := func(wrap func(http.Handler) http.Handler, o ...registry.Option) string {
		srv := httptest.NewServer(wrap(registry.New(append(o, registry.Logger(log.New(io.Discard, "", 0)))...)))
		t.Cleanup(srv.Close)
		return strings.TrimPrefix(srv.URL, "http://") + "/app"
	}
	plain := func(h http.Handler) http.Handler { return h }
	// What registries that list artifacts by themselves say.
	lists := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			p, _ := io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(p))
			var m struct{ Subject image.Descriptor }
			if r.Method == http.MethodPut && json.Unmarshal(p, &m) == nil && m.Subject.Digest != "" {
				w.Header().Set("OCI-Subject", m.Subject.Digest)
			}
			h.ServeHTTP(w, r)
		})
	}
	keeps := func(h http.Handler) http.Handler {
		h = lists(h)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodDelete {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			h.ServeHTTP(w, r)
		})
	}
	return map[string]string{
		"layout":   "oci:" + t.TempDir() + ":app",
		"registry": serve(plain),
		"api":      serve(lists, registry.WithReferrersSupport(true)),
		"keeps":    serve(keeps, registry.WithReferrersSupport(true)),
	}
}

func everywhere(t *testing.T, test func(t *testing.T, name, ref string)) {
	for name, ref := range places(t) {
		t.Run(name, func(t *testing.T) { test(t, name, ref) })
	}
}

func open(t testing.TB, ref string) *image.Repository {
	t.Helper()
	r, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), r, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}

func pushBlob(t testing.TB, repo *image.Repository, kind string, p []byte) image.Descriptor {
	t.Helper()
	d := image.Descriptor{MediaType: kind, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(p)), Size: int64(len(p))}
	if err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }); err != nil {
		t.Fatal(err)
	}
	return d
}

// pushImage pushes an image without layers.
func pushImage(t testing.TB, repo *image.Repository) *image.Image {
	t.Helper()
	const kind = "application/vnd.oci.image.manifest.v1+json"
	config := pushBlob(t, repo, "application/vnd.oci.image.config.v1+json", []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`))
	m, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": kind, "config": config, "layers": []any{}})
	if _, err := repo.PushManifest(t.Context(), kind, m, "app"); err != nil {
		t.Fatal(err)
	}
	return &image.Image{MediaType: kind, ManifestDigest: fmt.Sprintf("sha256:%x", sha256.Sum256(m)), ManifestBytes: m}
}

// run is the trace of run n, which has read one block of its own and one that all read.
func run(img *image.Image, n int) *trace.Trace {
	t := &trace.Trace{Manifest: img.ManifestDigest, Runs: []trace.Run{{ID: fmt.Sprintf("run%03d", n), Started: time.Unix(int64(n), 0).UTC()}}}
	for _, name := range []string{"common", t.Runs[0].ID} {
		t.Blocks = append(t.Blocks, trace.Block{Chunk: chunk.Sum(chunk.BLAKE3, []byte(name)), Size: 100, Path: name, Runs: 1, By: 1})
	}
	return t
}

// holds fails unless just these runs are beside the image, each counted once.
func holds(t *testing.T, repo *image.Repository, img *image.Image, from, to int) {
	t.Helper()
	got, err := Traces(t.Context(), repo, img)
	if err != nil {
		t.Fatal(err)
	}
	var ids, want []string
	for _, r := range got.Runs {
		ids = append(ids, r.ID)
	}
	for n := from; n < to; n++ {
		want = append(want, fmt.Sprintf("run%03d", n))
	}
	if !slices.Equal(ids, want) {
		t.Errorf("runs %q, want %q", ids, want)
	}
	for _, b := range got.Blocks {
		if runs := map[bool]int{true: to - from, false: 1}[b.Path == "common"]; b.Runs != runs {
			t.Errorf("%s was read by %d runs, want %d", b.Path, b.Runs, runs)
		}
	}
	if len(got.Blocks) != to-from+1 {
		t.Errorf("%d blocks, want %d", len(got.Blocks), to-from+1)
	}
}

func listed(t *testing.T, repo *image.Repository, img *image.Image) int {
	t.Helper()
	found, err := repo.Referrers(t.Context(), img.ManifestDigest, ArtifactType)
	if err != nil {
		t.Fatal(err)
	}
	return len(found)
}

func TestPush(t *testing.T) {
	everywhere(t, func(t *testing.T, name, ref string) {
		if name == "registry" && testing.Short() {
			t.Skip("a change of a list takes half a second there")
		}
		repo := open(t, ref)
		img := pushImage(t, repo)
		if _, err := Traces(t.Context(), repo, img); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("of none: %v", err)
		}
		nodes := 2*Max + 3
		if name == "registry" {
			nodes = Max + 2
		}
		for n := range nodes {
			if _, err := Push(t.Context(), repo, img, run(img, n), ""); err != nil {
				t.Fatalf("push %d: %v", n, err)
			}
			if k := listed(t, repo, img); k > Max && name != "keeps" || k > n+1 {
				t.Errorf("after %d pushes there are %d", n+1, k)
			}
		}
		holds(t, repo, img, 0, nodes)
		// A node whose trace has grown replaces what it pushed before.
		mine := run(img, nodes)
		first, err := Push(t.Context(), repo, img, mine, "")
		if err != nil {
			t.Fatal(err)
		}
		before := listed(t, repo, img)
		if mine, err = trace.Merge(mine, run(img, nodes+1)); err != nil {
			t.Fatal(err)
		}
		again, err := Push(t.Context(), repo, img, mine, first)
		if err != nil || again == first {
			t.Errorf("%s, %v", again, err)
		}
		if k := listed(t, repo, img); k != before && name != "keeps" {
			t.Errorf("there were %d, now %d", before, k)
		}
		holds(t, repo, img, 0, nodes+2)
		// The same once more is the same.
		if d, err := Push(t.Context(), repo, img, mine, again); err != nil || d != again {
			t.Errorf("%s, %v; want %s", d, err, again)
		}
		if _, err := Push(t.Context(), repo, img, &trace.Trace{Manifest: "sha256:other"}, ""); !errors.Is(err, trace.ErrMismatch) {
			t.Error(err)
		}
	})
}

// Where nobody can remove anything the list stays shorter than what makes it
// hard to find an index in it.
func TestPushKept(t *testing.T) {
	repo := open(t, places(t)["keeps"])
	img := pushImage(t, repo)
	var err error
	n := 0
	for ; err == nil && n < 2*maxListed; n++ {
		_, err = Push(t.Context(), repo, img, run(img, n), "")
	}
	if !errors.Is(err, index.ErrLimit) || listed(t, repo, img) > maxListed {
		t.Errorf("after %d pushes: %v, %d are listed", n, err, listed(t, repo, img))
	}
	holds(t, repo, img, 0, n-1) // all but the one that was refused
}

// Many at a time lose nothing and count nothing twice.
func TestPushAtOnce(t *testing.T) {
	everywhere(t, func(t *testing.T, name, ref string) {
		if name == "registry" && testing.Short() {
			t.Skip("takes its time")
		}
		repo := open(t, ref)
		img := pushImage(t, repo)
		nodes := Max + 4
		if name == "registry" { // each change of the list is a race of all
			nodes = 6
			for n := range Max - 2 { // so that they have to merge
				pushed(t, repo, img, run(img, nodes+n))
			}
		}
		var wg sync.WaitGroup
		for n := range nodes {
			wg.Go(func() {
				if _, err := Push(t.Context(), open(t, ref), img, run(img, n), ""); err != nil {
					t.Errorf("push %d: %v", n, err)
				}
			})
		}
		wg.Wait()
		if name == "registry" {
			nodes += Max - 2
		}
		holds(t, repo, img, 0, nodes)
		if k := listed(t, repo, img); k > Max && name != "keeps" {
			t.Errorf("there are %d", k)
		}
	})
}

// pushed pushes a trace without looking at others.
func pushed(t *testing.T, repo *image.Repository, img *image.Image, tr *trace.Trace) string {
	t.Helper()
	d, err := push(t.Context(), repo, img, tr, nil)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// What others have put there is passed over if it is of no use, and replaced,
// unless it is of a later version.
func TestHostile(t *testing.T) {
	repo := open(t, places(t)["layout"])
	img := pushImage(t, repo)
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	packed := func(p []byte) []byte {
		z, _ := zstd.NewWriter(nil)
		return z.EncodeAll(p, nil)
	}
	artifact := func(kind string, layers ...[]byte) {
		var all []image.Descriptor
		for _, p := range layers {
			all = append(all, pushBlob(t, repo, kind, p))
		}
		if _, err := repo.PushArtifact(t.Context(), subject, ArtifactType, all, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	good, err := encode(run(img, 1))
	if err != nil {
		t.Fatal(err)
	}
	other := run(img, 2)
	other.Manifest = "sha256:" + strings.Repeat("0", 64)
	foreign, _ := encode(other)
	artifact(MediaType)                                           // no layer
	artifact(MediaType, good, good)                               // two
	artifact("application/vnd.example", good)                     // of another type
	artifact(MediaType, []byte("no zstd"))                        //
	artifact(MediaType, good[:len(good)-5])                       // cut off
	artifact(MediaType, packed([]byte("no JSON")))                //
	artifact(MediaType, packed(make([]byte, trace.MaxEncoded+1))) // a bomb
	artifact(MediaType, make([]byte, maxStored+1))
	artifact(MediaType, foreign)
	// As large as may be, of nothing but what a decoder has to make something of.
	artifact(MediaType, packed([]byte(`{"format":"shale-trace","version":1,"touches":[`+strings.Repeat("{},", 21<<20)+"{}]}")))
	artifact(MediaType, packed([]byte(`{"format":"shale-trace","version":1,"runs":[`+strings.Repeat("{},", 21<<20)+"{}]}")))
	artifact(MediaType, packed([]byte(`{"format":"shale-trace","version":2}`)))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = Traces(t.Context(), repo, img)
	if !errors.Is(err, blob.ErrNotFound) || !strings.Contains(err.Error(), "sha256:") {
		t.Errorf("none of use: %v", err)
	}
	if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > 300<<20 { // a window of 8 MiB for each
		t.Errorf("%d MB were allocated", (after.TotalAlloc-before.TotalAlloc)>>20)
	}
	artifact(MediaType, good)
	got, err := Traces(t.Context(), repo, img)
	if err != nil || !cmp.Equal(got, run(img, 1)) {
		t.Errorf("%v, %v", got, err)
	}
	for n := 2; n < 10; n++ {
		if _, err := Push(t.Context(), repo, img, run(img, n), ""); err != nil {
			t.Fatal(err)
		}
	}
	holds(t, repo, img, 1, 10)
	// All that are unsupported stay: no layer, two, another type, version 2.
	if k := listed(t, repo, img); k < 4 || k > Max {
		t.Errorf("there are %d", k)
	}
	for n := range Max {
		artifact("application/vnd.example", fmt.Appendf(nil, "%d", n))
	}
	if _, err := Push(t.Context(), repo, img, run(img, 10), ""); !errors.Is(err, index.ErrLimit) {
		t.Errorf("beside %d that cannot be merged: %v", Max, err)
	}
}

// All that lie beside an image come in two rounds of requests, behind the list.
func TestAtOnce(t *testing.T) {
	var mu sync.Mutex
	wait := map[string]chan struct{}{} // nil: nobody waits
	count := map[string]int{}
	const nodes = 4
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind, digest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/app/"), "/")
		if kind == "manifests" && !strings.HasPrefix(digest, "sha256:") {
			kind = "list"
		}
		mu.Lock()
		all := wait[kind]
		if count[kind]++; all != nil && count[kind] == nodes {
			close(all)
		}
		mu.Unlock()
		if all != nil {
			select {
			case <-all:
			case <-time.After(20 * time.Second): // the others never come
				w.WriteHeader(http.StatusTeapot)
				return
			}
		}
		reg.ServeHTTP(w, r)
	}))
	defer srv.Close()
	repo := open(t, strings.TrimPrefix(srv.URL, "http://")+"/app")
	img := pushImage(t, repo)
	for n := range nodes {
		if _, err := Push(t.Context(), repo, img, run(img, n), ""); err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	clear(count)
	wait["manifests"], wait["blobs"] = make(chan struct{}), make(chan struct{})
	mu.Unlock()
	got, err := Traces(t.Context(), repo, img)
	if err != nil || len(got.Runs) != nodes {
		t.Errorf("%v, %v", got, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if count["manifests"] != nodes || count["blobs"] != nodes || count["list"] != 1 {
		t.Errorf("requests: %v", count)
	}
}

// What is read of all traces together is bounded.
func TestTooMuch(t *testing.T) {
	repo := open(t, places(t)["layout"])
	img := pushImage(t, repo)
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	z, _ := zstd.NewWriter(nil)
	for n := range 4 {
		tr := run(img, n)
		for i := range 240 {
			tr.Blocks = append(tr.Blocks, trace.Block{Chunk: chunk.Sum(chunk.BLAKE3, fmt.Append(nil, i)), Size: 100, Path: "f", Runs: 1, By: 1})
		}
		var b bytes.Buffer
		if err := tr.Encode(&b); err != nil {
			t.Fatal(err)
		}
		long := strings.ReplaceAll(b.String(), "\n", strings.Repeat(" ", 200<<10)) // 48 MB
		d := pushBlob(t, repo, MediaType, z.EncodeAll([]byte(long), nil))
		if _, err := repo.PushArtifact(t.Context(), subject, ArtifactType, []image.Descriptor{d}, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Traces(t.Context(), repo, img)
	if err != nil || len(got.Runs) != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	all, err := Stored(t.Context(), repo, img, 1<<20)
	if err != nil || len(all) != 4 {
		t.Errorf("%d, %v", len(all), err)
	}
	if apart, err := Merge(img.ManifestDigest, all); err != nil || !cmp.Equal(apart, got) {
		t.Errorf("%v, %v", apart, err)
	}
	if some, err := Stored(t.Context(), repo, img, len(all[0])+len(all[1])+10); err != nil || len(some) != 2 {
		t.Errorf("%d, %v", len(some), err)
	}
}

// A trace that is too large to be pushed is pushed in part.
func TestPushPart(t *testing.T) {
	if testing.Short() {
		t.Skip("compresses 70 MB, twice")
	}
	repo := open(t, places(t)["layout"])
	img := pushImage(t, repo)
	tr := run(img, 1)
	for i := range trace.MaxBlocks - 2 {
		tr.Blocks = append(tr.Blocks, trace.Block{Chunk: chunk.Sum(chunk.BLAKE3, fmt.Append(nil, i)), Size: 100, Path: "f", Runs: 1, By: 1})
	}
	if _, err := Push(t.Context(), repo, img, tr, ""); err != nil {
		t.Fatal(err)
	}
	got, err := Traces(t.Context(), repo, img)
	if err != nil || !got.Runs[0].Lost || len(got.Blocks) < trace.MaxBlocks/2 || len(got.Blocks) == trace.MaxBlocks {
		t.Errorf("%d blocks, %v", len(got.Blocks), err)
	}
}

func FuzzDecode(f *testing.F) {
	good, err := encode(run(&image.Image{ManifestDigest: "sha256:x"}, 1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, p []byte) {
		var left int64
		_, err := decode(p, "sha256:x", "x", &left)
		if err != nil && !useless(err) {
			t.Fatal(err)
		}
	})
}
