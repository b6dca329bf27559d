package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/fleet"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index/estargz/estargztest"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/runtime"
	"github.com/shale-image/shale/trace"
)

// packs is an image in a registry of its own that counts, with an index beside it.
type packs struct {
	t    *testing.T
	repo *image.Repository
	img  *image.Image
	ref  string

	mu    sync.Mutex
	asked []string                                          // paths of requests
	spoil func(w http.ResponseWriter, r *http.Request) bool // answers itself
	wait  func()                                            // before each answer
}

// newPacks copies the image of a layout there. In an index, it is one of several
// platforms.
func newPacks(t *testing.T, layout string, inIndex bool) *packs {
	t.Helper()
	return newPacksIn(t, layout, inIndex, registry.WithReferrersSupport(true))
}

func newPacksIn(t *testing.T, layout string, inIndex bool, o ...registry.Option) *packs {
	t.Helper()
	p := &packs{t: t}
	reg := registry.New(append(o, registry.Logger(log.New(io.Discard, "", 0)))...)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		if r.URL.Path != "/v2/" {
			p.asked = append(p.asked, r.Method+" "+r.URL.Path)
		}
		spoil, wait := p.spoil, p.wait
		p.mu.Unlock()
		if wait != nil {
			wait()
		}
		if spoil != nil && spoil(w, r) {
			return
		}
		if strings.Contains(r.URL.Path, "/referrers/") {
			w = &telling{ResponseWriter: w, registry: reg}
			defer w.(*telling).end()
		}
		reg.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	src := openRef(t, layout)
	p.ref = strings.TrimPrefix(srv.URL, "http://") + "/app:1"
	p.repo = openRef(t, p.ref)
	img, err := src.Resolve(background, image.Platform{OS: "linux", Architecture: "amd64"})
	must(t, err)
	for _, d := range append(img.Layers, img.ConfigBlob) {
		must(t, p.repo.PushBlob(background, d, func() (io.ReadCloser, error) { return src.Blob(background, d) }))
	}
	tag := "1"
	if inIndex {
		tag = ""
	}
	d, err := p.repo.PushManifest(background, img.MediaType, img.ManifestBytes, tag)
	must(t, err)
	if inIndex {
		list := []byte(`{"schemaVersion":2,"mediaType":"` + image.MediaTypeIndex + `","manifests":[{"mediaType":"` + d.MediaType + `","digest":"` + d.Digest +
			`","size":` + strconv.FormatInt(d.Size, 10) + `,"platform":{"os":"linux","architecture":"amd64"}}]}`)
		_, err := p.repo.PushManifest(background, image.MediaTypeIndex, list, "1")
		must(t, err)
	}
	p.img, err = p.repo.Resolve(background, image.Platform{OS: "linux", Architecture: "amd64"})
	must(t, err)
	if _, ok := reader.Bootstrap(p.img); !ok {
		made, err := reader.Make(background, reader.Job{
			Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs, TempDir: t.TempDir(),
			Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return p.repo.Blob(ctx, img.Layers[n]) },
		})
		must(t, err)
		defer made.Close()
		_, err = reader.Push(background, p.repo, p.img, made)
		must(t, err)
	}
	return p
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// telling makes a list of referrers tell types and annotations, as it should.
type telling struct {
	http.ResponseWriter
	registry http.Handler
	status   int
	body     bytes.Buffer
}

func (w *telling) WriteHeader(status int)      { w.status = status }
func (w *telling) Write(p []byte) (int, error) { return w.body.Write(p) }

func (w *telling) end() {
	var list map[string]any
	if json.Unmarshal(w.body.Bytes(), &list) == nil && list["manifests"] != nil {
		for _, d := range list["manifests"].([]any) {
			d := d.(map[string]any)
			got := httptest.NewRecorder()
			w.registry.ServeHTTP(got, httptest.NewRequest(http.MethodGet, "/v2/app/manifests/"+d["digest"].(string), nil))
			var m map[string]any
			if json.Unmarshal(got.Body.Bytes(), &m) == nil {
				d["artifactType"], d["annotations"] = m["artifactType"], m["annotations"]
			}
		}
		js, _ := json.Marshal(list)
		w.body.Reset()
		w.body.Write(js)
		w.Header().Del("Content-Length")
	}
	w.ResponseWriter.WriteHeader(max(w.status, http.StatusOK))
	w.ResponseWriter.Write(w.body.Bytes())
}

// tarOf is an archive of one file.
func tarOf(t *testing.T, name string, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}))
	w.Write(content)
	must(t, w.Close())
	return b.Bytes()
}

func openRef(t *testing.T, ref string) *image.Repository {
	t.Helper()
	r, err := image.ParseRef(ref)
	must(t, err)
	repo, err := image.Open(background, r, image.Options{})
	must(t, err)
	t.Cleanup(func() { repo.Close() })
	return repo
}

// requests returns those since the last call.
func (p *packs) requests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.asked
	p.asked = nil
	return out
}

// record runs something on a mount of the image, exactly recorded.
func (p *packs) record(command []string, run func(dir string)) *trace.Trace {
	p.t.Helper()
	c := service(p.t)
	dir, m := attachAs(p.t, c, p.ref, Place{Rehearsal: true, Command: command})
	run(dir)
	t, err := c.MountTrace(background, m.ID)
	must(p.t, err)
	must(p.t, unix.Unmount(dir, 0))
	return t
}

// push makes the pack of a trace, lets spoil change it, and pushes it.
func (p *packs) push(t *trace.Trace, spoil func(*reader.MadePack)) *reader.MadePack {
	p.t.Helper()
	m, err := reader.MakePack(background, p.repo, p.img, reader.Options{TempDir: p.t.TempDir()}, t, 0)
	must(p.t, err)
	if spoil != nil {
		spoil(m)
		m.Blob.Digest, m.Blob.Size = sha(m.Bytes), int64(len(m.Bytes))
	}
	_, err = reader.PushPack(background, p.repo, p.img, m)
	must(p.t, err)
	return m
}

// halves reads some of the image, not in order.
func halves(t *testing.T) func(dir string) {
	return func(dir string) {
		t.Helper()
		f, err := os.Open(filepath.Join(dir, "text"))
		must(t, err)
		defer f.Close()
		p := make([]byte, 3000)
		text := longText()
		for _, off := range []int64{1_500_000, 40, 700_000, 200_000} {
			if _, err := f.ReadAt(p, off); err != nil || !bytes.Equal(p, text[off:off+3000]) {
				t.Errorf("text at %d is wrong, or %v", off, err)
			}
		}
		if got, err := os.ReadFile(filepath.Join(dir, "etc/hello")); err != nil || !bytes.Equal(got, files["etc/hello"]) {
			t.Errorf("%q, %v", got, err)
		}
	}
}

// wholly reads all of the image.
func wholly(t *testing.T, dir string) {
	t.Helper()
	for name, want := range map[string][]byte{"text": longText(), "etc/hello": files["etc/hello"], "big": files["big"]} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: wrong content, or %v", name, err)
		}
	}
}

// TestStartPack: what a pack has nobody asks for otherwise, and the rest comes as
// always; a second start asks for nothing.
func TestStartPack(t *testing.T) {
	for name, tag := range map[string]string{"index": "plain", "converted": "shale"} {
		t.Run(name, func(t *testing.T) {
			ref := strings.TrimSuffix(windowed(t), "shale") + tag
			p := newPacks(t, ref, false)
			m := p.push(p.record([]string{"half"}, halves(t)), nil)
			p.requests()
			c := service(t)
			dir, mounted := attachAs(t, c, p.ref, Place{Command: []string{"half"}, NoComplete: true})
			halves(t)(dir)
			asked := p.requests()
			for _, l := range p.img.Layers {
				ranges := 0
				for _, a := range asked {
					if strings.HasSuffix(a, l.Digest) {
						ranges++
					}
				}
				if boot := l.Annotations[reader.NydusBootstrap] != ""; ranges > 0 && !boot {
					t.Errorf("layer %s was asked for %d times", l.Digest, ranges)
				}
			}
			if !contains(asked, m.Blob.Digest) {
				t.Errorf("requests %v: none is of the pack", asked)
			}
			s := statusOf(t, c, mounted.ID)
			if s.Fill.Stalls != 0 || s.Fill.PackBytes == 0 {
				t.Errorf("%+v", s.Fill)
			}
			wholly(t, dir)
			must(t, unix.Unmount(dir, 0))
			end(t, c)
			p.requests()
			dir, _ = attachAs(t, c, p.ref, Place{Command: []string{"half"}, NoComplete: true})
			halves(t)(dir)
			if asked := p.requests(); len(asked) > 0 {
				t.Errorf("a second start makes requests %v", asked)
			}
		})
	}
}

// packComes waits until all of a pack has come.
func packComes(t *testing.T, c *Client, of *Mounted, m *reader.MadePack) {
	t.Helper()
	eventually(t, "the pack has come", func() bool {
		rec, err := (&store{dir: filepath.Join(c.Root, "images")}).loadRecord(of.ManifestDigest)
		return err == nil && slices.Equal(rec.Landed, []string{m.Blob.Digest})
	})
}

func contains(list []string, part string) bool {
	for _, s := range list {
		if strings.Contains(s, part) {
			return true
		}
	}
	return false
}

func statusOf(t *testing.T, c *Client, id string) MountStatus {
	t.Helper()
	st, err := c.Status(background)
	must(t, err)
	for _, m := range st.Mounts {
		if m.ID == id {
			return m
		}
	}
	t.Fatalf("no mount %s", id)
	return MountStatus{}
}

// TestPackOfAnother: a pack that is of another command, or none was told, is not
// used, or used.
func TestPackOfAnother(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	m := p.push(p.record([]string{"half"}, halves(t)), nil)
	for name, c := range map[string]struct {
		place Place
		want  bool
	}{
		"another command": {Place{Command: []string{"other"}}, false},
		"no command":      {Place{}, false},
		"any":             {Place{AnyCommand: true}, true},
		"unwanted":        {Place{Command: []string{"half"}, NoPack: true}, false},
		"more arguments":  {Place{Command: []string{"half", "-x"}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			p.requests()
			dir, _ := attachAs(t, service(t), p.ref, c.place)
			wholly(t, dir)
			if got := contains(p.requests(), m.Blob.Digest); got != c.want {
				t.Errorf("asked for: %v", got)
			}
		})
	}
}

// TestPackOfComplete: of an image of which nothing is missing no pack is asked for.
// (The comparison with the layers, which a mount that is to be completed brings, asks.)
func TestPackOfComplete(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	p.push(p.record([]string{"half"}, halves(t)), nil)
	c := service(t)
	dir, _ := attachAs(t, c, p.ref, Place{Command: []string{"other"}, NoComplete: true})
	wholly(t, dir)
	must(t, unix.Unmount(dir, 0))
	p.requests()
	dir, _ = attachAs(t, c, p.ref, Place{Command: []string{"half"}, NoComplete: true})
	halves(t)(dir)
	if asked := p.requests(); len(asked) > 0 {
		t.Errorf("requests %v", asked)
	}
}

// TestPackOfEntrypoint: other arguments of the image's own program are no other command.
func TestPackOfEntrypoint(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	m := p.push(p.record([]string{"--a"}, halves(t)), func(m *reader.MadePack) { m.Entrypoint = true })
	for name, c := range map[string]struct {
		command []string
		want    bool
	}{
		"other arguments": {[]string{"--b"}, true},
		"another program": {[]string{"--entrypoint=sh"}, false},
	} {
		p.requests()
		attachAs(t, service(t), p.ref, Place{Command: c.command})
		if got := contains(p.requests(), m.Blob.Digest); got != c.want {
			t.Errorf("%s: asked for: %v", name, got)
		}
	}
}

// TestProgram: which program a container runs, by what its image's config says.
func TestProgram(t *testing.T) {
	const own = `{"config": {"Entrypoint": ["a", "b"], "Cmd": ["c"], "Env": ["X=1", "PATH=/x:/y"]}}`
	for _, c := range []struct {
		config, command string
		entrypoint      bool
		name, dirs      string
	}{
		{own, "", true, "a", "/x:/y"},
		{own, "d e", true, "a", "/x:/y"},
		{own, "--entrypoint=sh -c", true, "sh", "/x:/y"},
		{own, "--entrypoint= d", true, "d", "/x:/y"},
		{own, "--entrypoint=", true, "", ""},
		{`{"config": {"Entrypoint": [], "Cmd": ["c"]}}`, "", false, "c", runtime.DefaultPath},
		{`{"config": {"Cmd": ["c"]}}`, "d e", false, "d", runtime.DefaultPath},
		{`{}`, "", false, "", ""},
		{``, "/d", false, "/d", runtime.DefaultPath},
	} {
		r := &record{config: []byte(c.config)}
		if got := r.hasEntrypoint(); got != c.entrypoint {
			t.Errorf("%s: has an entrypoint: %v", c.config, got)
		}
		name, dirs := r.program(strings.Fields(c.command))
		if got := strings.Join(dirs, ":"); name != c.name || got != c.dirs {
			t.Errorf("%s, %q: %q in %q", c.config, c.command, name, got)
		}
	}
}

// TestProgramComes: what a container will run is fetched before anybody has read of it.
func TestProgramComes(t *testing.T) {
	c := service(t)
	_, m := attachAs(t, c, layout(t), Place{NoComplete: true})
	eventually(t, "the image's program is fetched", func() bool { return mountStatus(t, c, m.ID).Source.Bytes > 0 })
}

// TestProgramOfPack: where a pack is to come the program is left to it, also while it has
// not begun to.
func TestProgramOfPack(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	m := p.push(p.record([]string{"/big"}, halves(t)), nil)
	p.mu.Lock()
	p.spoil = func(_ http.ResponseWriter, r *http.Request) bool {
		hangs := strings.HasSuffix(r.URL.Path, m.Blob.Digest)
		if hangs {
			<-r.Context().Done()
		}
		return hangs
	}
	p.mu.Unlock()
	p.requests()
	c := service(t)
	dir, _ := attachAs(t, c, p.ref, Place{Command: []string{"/big"}, NoComplete: true})
	unmount(t, c, dir)
	end(t, c)
	if asked := p.requests(); !contains(asked, m.Blob.Digest) || contains(asked, p.img.Layers[0].Digest) {
		t.Errorf("requests %v, want one of the pack and none of the layer", asked)
	}
}

// TestPackLater: a node that has an image asks for another of its packs when it is
// of use.
func TestPackLater(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	m := p.push(p.record([]string{"half"}, halves(t)), nil)
	c := service(t)
	dir, _ := attachAs(t, c, p.ref, Place{Command: []string{"other"}})
	must(t, unix.Unmount(dir, 0))
	p.requests()
	dir, mounted := attachAs(t, c, p.ref, Place{Command: []string{"half"}})
	halves(t)(dir)
	if asked := p.requests(); !contains(asked, m.Blob.Digest) || len(asked) != 2 {
		t.Errorf("requests %v, want one of the pack and one of its manifest", asked)
	}
	if s := statusOf(t, c, mounted.ID).Fill; s.Stalls > 0 {
		t.Errorf("%+v", s)
	}
}

// TestRoundTrips counts the rounds of requests from a reference to a mount: all
// that are made before one of them is answered are one.
func TestRoundTrips(t *testing.T) {
	for name, c := range map[string]struct {
		tag   string
		index bool
		api   bool // for referrers
		more  int  // indexes beside it
		most  int
	}{
		"manifest":            {"plain", false, true, 0, 3},
		"manifest, no API":    {"plain", false, false, 0, 3},
		"index":               {"plain", true, true, 0, 4},
		"index, no API":       {"plain", true, false, 0, 4},
		"converted":           {"shale", false, true, 0, 3},
		"converted, an index": {"shale", true, true, 0, 4},
		"five indexes":        {"plain", false, true, 4, 3},
		"five, no API":        {"plain", false, false, 4, 3},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPacksIn(t, strings.TrimSuffix(windowed(t), "shale")+c.tag, c.index, registry.WithReferrersSupport(c.api))
			for n := range c.more {
				p.attachAgain(strconv.Itoa(n))
			}
			p.push(p.record([]string{"half"}, halves(t)), nil)
			client := service(t)
			_, err := client.Status(background) // it runs
			must(t, err)
			r := newRounds(600 * time.Millisecond)
			p.mu.Lock()
			p.wait = r.wait
			p.mu.Unlock()
			p.requests()
			attachAs(t, client, p.ref, Place{Command: []string{"half"}})
			if n := r.end(); n > c.most {
				t.Errorf("%d rounds, at most %d are expected: %v", n, c.most, p.requests())
			}
		})
	}
}

// attachAgain pushes one more artifact of the image's index.
func (p *packs) attachAgain(note string) {
	p.t.Helper()
	found, err := p.repo.Referrers(background, p.img.ManifestDigest, reader.ArtifactType)
	must(p.t, err)
	a, err := p.repo.Artifact(background, found[0].Descriptor, p.img.ManifestDigest)
	must(p.t, err)
	subject := image.Descriptor{MediaType: p.img.MediaType, Digest: p.img.ManifestDigest, Size: int64(len(p.img.ManifestBytes))}
	_, err = p.repo.PushArtifact(background, subject, reader.ArtifactType, a.Layers, map[string]string{"note": note}, nil)
	must(p.t, err)
}

// rounds holds requests back until no more come.
type rounds struct {
	quiet time.Duration
	mu    sync.Mutex
	n     int
	gate  chan struct{} // of the round that is gathering
	timer *time.Timer
	over  bool
}

func newRounds(quiet time.Duration) *rounds { return &rounds{quiet: quiet} }

func (r *rounds) wait() {
	r.mu.Lock()
	if r.over {
		r.mu.Unlock()
		return
	}
	if r.gate == nil {
		r.n++
		gate := make(chan struct{})
		r.gate = gate
		r.timer = time.AfterFunc(r.quiet, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			close(gate)
			r.gate = nil
		})
	} else {
		r.timer.Reset(r.quiet)
	}
	gate := r.gate
	r.mu.Unlock()
	<-gate
}

func (r *rounds) end() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	return r.n
}

// TestLandmark: what lies before the landmark of an eStargz layer is fetched when it is
// mounted, before anybody asks for it.
func TestLandmark(t *testing.T) {
	const size = 300_000
	content := make([]byte, 2*size)
	rand.NewChaCha8([32]byte{3}).Read(content)
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for i, name := range []string{"first", "last"} {
		must(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: size}))
		w.Write(content[i*size:][:size])
	}
	must(t, w.Close())
	toc, annotations := estargztest.Build(t, archive.Bytes(), estargztest.Options{Landmark: "first"})
	x := newLayered(t, toc, nil, annotations, false)
	c := service(t)
	_, m := attachAs(t, c, x.src.Ref, Place{NoComplete: true})
	eventually(t, "what comes first is here", func() bool { return statusOf(t, c, m.ID).Fill.ContentBytes >= size })
}

// TestPrefetch: where there is no pack, what other nodes have shared is fetched
// before it is asked for.
func TestPrefetch(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	recorded := p.record([]string{"half"}, halves(t))
	_, err := fleet.Push(background, p.repo, p.img, recorded, "")
	must(t, err)
	// Another would take all memory if it were read at once.
	z, err := zstd.NewWriter(nil)
	must(t, err)
	bomb := z.EncodeAll([]byte(`{"format":"shale-trace","version":1,"touches":[`+strings.Repeat("{},", 10<<20)+"{}]}"), nil)
	d := image.Descriptor{MediaType: fleet.MediaType, Digest: sha(bomb), Size: int64(len(bomb))}
	must(t, p.repo.PushBlob(background, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(bomb)), nil }))
	subject := image.Descriptor{MediaType: p.img.MediaType, Digest: p.img.ManifestDigest, Size: int64(len(p.img.ManifestBytes))}
	_, err = p.repo.PushArtifact(background, subject, fleet.ArtifactType, []image.Descriptor{d}, nil, nil)
	must(t, err)
	c := service(t)
	p.requests()
	_, m := attachAs(t, c, p.ref, Place{Command: []string{"half"}})
	want := int64(0)
	seen := map[string]bool{}
	for _, b := range recorded.Blocks {
		if !seen[b.Chunk.String()] {
			seen[b.Chunk.String()] = true
			want += int64(b.Size)
		}
	}
	// Nobody reads.
	eventually(t, "what others have read is here", func() bool { return statusOf(t, c, m.ID).Fill.ContentBytes >= want })
}
