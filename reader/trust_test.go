package reader

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/trust"
)

func TestTrust(t *testing.T) {
	kinds := []Trust{Local, Bound, Signed, Repository}
	for i, at := range kinds {
		for j, from := range kinds {
			if got := at.Allows(from); got != (j <= i) {
				t.Errorf("%s allows %s: %v", at, from, got)
			}
		}
		if p, err := ParseTrust(string(at)); err != nil || p != at || !strings.Contains(TrustKinds, string(at)) {
			t.Errorf("%q is %q, %v", at, p, err)
		}
		if at.Allows("") || at.Allows("signd") || Trust("").Allows(at) || Trust("signd").Allows(at) {
			t.Errorf("%s and what is no kind", at)
		}
	}
	if p, err := ParseTrust(""); err != nil || p != Repository {
		t.Errorf("the default is %q, %v", p, err)
	}
	if _, err := ParseTrust("Signed"); err == nil || !strings.Contains(err.Error(), TrustKinds) {
		t.Error(err)
	}
}

// stored is an image in a repository, and an index of it.
type stored struct {
	repo  *image.Repository
	img   *image.Image
	made  *Made
	layer []image.Descriptor // of its artifacts
}

// store pushes an image to a repository; bind names its index in its manifest.
func store(t *testing.T, ref string, bind bool) *stored {
	t.Helper()
	parsed, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	s := &stored{}
	if s.repo, err = image.Open(t.Context(), parsed, image.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.repo.Close() })
	p := gzipped(archive0)
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sha256.Sum256(archive0))
	m := map[string]any{
		"schemaVersion": 2, "mediaType": image.MediaTypeManifest,
		"config": s.blob(t, "application/vnd.oci.image.config.v1+json", config),
		"layers": []any{s.blob(t, "application/vnd.oci.image.layer.v1.tar+gzip", p)},
	}
	platform, err := image.ParsePlatform("linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	push := func() {
		js, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = s.repo.PushManifest(t.Context(), image.MediaTypeManifest, js, "app"); err == nil {
			s.img, err = s.repo.Resolve(t.Context(), platform)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	push()
	s.make(t)
	if bind {
		// Of an image whose manifest has its digest no index can have the
		// manifest's: what is bound here is only fetched.
		m["annotations"] = map[string]string{BoundIndex: IndexDigest(s.made.Encoded)}
		push()
	}
	s.layer = []image.Descriptor{s.blob(t, IndexMediaType, s.made.Encoded)}
	if s.made.Side.Size == 0 {
		t.Fatal("an image without a side shows less")
	}
	r, err := s.made.OpenSide()
	if err != nil {
		t.Fatal(err)
	}
	side, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	s.layer = append(s.layer, s.blob(t, SideMediaType, side))
	return s
}

func (s *stored) make(t *testing.T) {
	t.Helper()
	var err error
	s.made, err = Make(t.Context(), Job{Manifest: s.img.ManifestDigest, Layers: s.img.Layers, DiffIDs: s.img.Config.DiffIDs, TempDir: t.TempDir(),
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return s.repo.Blob(ctx, s.img.Layers[n]) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.made.Close() })
}

func (s *stored) blob(t *testing.T, kind string, p []byte) image.Descriptor {
	t.Helper()
	d := image.Descriptor{MediaType: kind, Digest: IndexDigest(p), Size: int64(len(p))}
	if err := s.repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }); err != nil {
		t.Fatal(err)
	}
	return d
}

// attach pushes an artifact as anybody may, and leaves what is there.
func (s *stored) attach(t *testing.T, layers []image.Descriptor, annotations map[string]string) string {
	t.Helper()
	subject := image.Descriptor{MediaType: s.img.MediaType, Digest: s.img.ManifestDigest, Size: int64(len(s.img.ManifestBytes))}
	digest, err := s.repo.PushArtifact(t.Context(), subject, ArtifactType, layers, annotations, nil)
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

func (s *stored) push(t *testing.T, signers ...*trust.Signer) string {
	t.Helper()
	digest, err := Push(t.Context(), s.repo, s.img, s.made, signers...)
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

// fetch returns what it takes to believe the index, and who signed it.
func (s *stored) fetch(t *testing.T, at Trust, keys trust.Keys) (Trust, string, error) {
	t.Helper()
	raw, err := Fetch(t.Context(), s.repo, s.img, Options{TempDir: t.TempDir(), Trust: at, Keys: keys})
	if err != nil {
		if raw != nil {
			t.Error("an index with an error")
		}
		return "", "", err
	}
	defer raw.Close()
	if p, err := io.ReadAll(io.NewSectionReader(raw.File, 0, raw.Size)); err != nil || !bytes.Equal(p, s.made.Encoded) || raw.Side.Digest != s.made.Side.Digest {
		t.Errorf("another index: %d bytes, %v", len(p), err)
	}
	return raw.Trust, raw.Key, nil
}

func newKey(t *testing.T) (*trust.Signer, trust.Keys) {
	t.Helper()
	file := t.TempDir() + "/key"
	s, err := trust.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	k, err := trust.ReadKeys(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	return s, k
}

// repositories are those that list what refers to an image in different ways.
func repositories(t *testing.T, f func(t *testing.T, ref string, lists bool)) {
	host := func(t *testing.T, o ...registry.Option) string {
		srv := httptest.NewServer(registry.New(append(o, registry.Logger(log.New(io.Discard, "", 0)))...))
		t.Cleanup(srv.Close)
		return strings.TrimPrefix(srv.URL, "http://")
	}
	t.Run("layout", func(t *testing.T) { f(t, "oci:"+t.TempDir()+"/layout:app", false) })
	t.Run("registry", func(t *testing.T) { f(t, host(t)+"/app:app", false) })
	t.Run("registry that lists", func(t *testing.T) { f(t, host(t, registry.WithReferrersSupport(true))+"/app:app", true) })
}

// TestSigned: what is fetched, under each trust.
func TestSigned(t *testing.T) {
	repositories(t, func(t *testing.T, ref string, _ bool) {
		s := store(t, ref, false)
		signer, keys := newKey(t)
		other, others := newKey(t)
		both := slices.Concat(keys, others)
		check := func(what string, at Trust, keys trust.Keys, want Trust, id string) {
			t.Helper()
			got, key, err := s.fetch(t, at, keys)
			if got != want || key != id || want == "" && (!errors.Is(err, ErrNoIndex) || useless(err)) {
				t.Errorf("%s, at %q: %q by %q, %v; want %q by %q", what, at, got, key, err, want, id)
			}
		}
		for _, at := range []Trust{Local, Bound, Signed, Repository} {
			check("none", at, keys, "", "")
		}
		s.push(t)
		for _, at := range []Trust{Local, Bound, Signed} {
			check("unsigned", at, keys, "", "")
		}
		for _, at := range []Trust{Bound, Signed} { // who is told that there is none would make one
			want := fmt.Sprintf("takes --index-trust repository, and %s is given", at)
			if _, _, err := s.fetch(t, at, keys); !strings.Contains(fmt.Sprint(err), want) || strings.Contains(err.Error(), ErrNoIndex.Error()) {
				t.Errorf("unsigned, at %s: %v", at, err)
			}
		}
		check("unsigned", Repository, keys, Repository, "")
		check("unsigned", "", nil, Repository, "")

		s.push(t, signer)
		check("signed", Local, keys, "", "")
		check("signed", Bound, keys, "", "")
		check("signed", Signed, keys, Signed, signer.ID())
		check("signed", Repository, keys, Signed, signer.ID())
		check("signed", Signed, both, Signed, signer.ID())
		check("signed by another", Signed, others, "", "")
		check("signed by another", Repository, others, Repository, "")
		check("signed, without keys", Signed, nil, "", "")

		s.push(t, signer, other)
		check("signed by two", Signed, others, Signed, other.ID())
		check("signed by two", Signed, keys, Signed, signer.ID())
	})
}

// What the manifest names needs no key.
func TestBoundIndex(t *testing.T) {
	s := store(t, "oci:"+t.TempDir()+"/layout:app", true)
	signer, keys := newKey(t)
	s.attach(t, s.layer, nil)
	for _, at := range []Trust{Bound, Signed, Repository} {
		if got, key, err := s.fetch(t, at, keys); got != Bound || key != "" {
			t.Errorf("at %s: %q by %q, %v", at, got, key, err)
		}
	}
	if _, _, err := s.fetch(t, Local, keys); !errors.Is(err, ErrNoIndex) {
		t.Error(err)
	}
	// But for a signature that is wrong.
	other := image.Descriptor{MediaType: IndexMediaType, Digest: IndexDigest([]byte("x")), Size: 1}
	bad, err := sign(statement(s.img.ManifestDigest, []image.Descriptor{other}), []*trust.Signer{signer})
	if err != nil {
		t.Fatal(err)
	}
	s2 := store(t, "oci:"+t.TempDir()+"/layout:app", true)
	s2.attach(t, s2.layer, bad)
	for _, at := range []Trust{Bound, Signed, Repository} {
		if _, _, err := s2.fetch(t, at, keys); !errors.Is(err, index.ErrCorrupt) || !errors.Is(err, ErrNoIndex) {
			t.Errorf("at %s: %v", at, err)
		}
	}
}

// TestTampered: an artifact that a known key is said to have signed, and has
// not, is refused whatever the trust; one that is right still counts.
func TestTampered(t *testing.T) {
	signer, keys := newKey(t)
	other, others := newKey(t)
	name := trust.Annotation + signer.ID()
	for what, c := range map[string]func(t *testing.T, s *stored) ([]image.Descriptor, map[string]string){
		"another index": func(t *testing.T, s *stored) ([]image.Descriptor, map[string]string) {
			good, _ := sign(statement(s.img.ManifestDigest, s.layer), []*trust.Signer{signer})
			return []image.Descriptor{s.blob(t, IndexMediaType, []byte("theirs")), s.layer[1]}, good
		},
		"another side": func(t *testing.T, s *stored) ([]image.Descriptor, map[string]string) {
			good, _ := sign(statement(s.img.ManifestDigest, s.layer), []*trust.Signer{signer})
			return []image.Descriptor{s.layer[0], s.blob(t, SideMediaType, []byte("theirs"))}, good
		},
		"without its side": func(t *testing.T, s *stored) ([]image.Descriptor, map[string]string) {
			good, _ := sign(statement(s.img.ManifestDigest, s.layer), []*trust.Signer{signer})
			return s.layer[:1], good
		},
		"of another image": func(t *testing.T, s *stored) ([]image.Descriptor, map[string]string) {
			good, _ := sign(statement(IndexDigest(nil), s.layer), []*trust.Signer{signer})
			return s.layer, good
		},
		"another key's": func(t *testing.T, s *stored) ([]image.Descriptor, map[string]string) {
			theirs, _ := sign(statement(s.img.ManifestDigest, s.layer), []*trust.Signer{other})
			return s.layer, map[string]string{name: theirs[trust.Annotation+other.ID()]}
		},
		"beside a good one of another key": func(t *testing.T, s *stored) ([]image.Descriptor, map[string]string) {
			theirs, _ := sign(statement(s.img.ManifestDigest, s.layer), []*trust.Signer{other})
			bad := maps.Clone(theirs)
			bad[name] = base64.StdEncoding.EncodeToString(make([]byte, 64))
			return s.layer, bad
		},
		"no base64": func(t *testing.T, s *stored) ([]image.Descriptor, map[string]string) {
			return s.layer, map[string]string{name: "?"}
		},
	} {
		t.Run(what, func(t *testing.T) {
			s := store(t, "oci:"+t.TempDir()+"/layout:app", false)
			layers, annotations := c(t, s)
			artifact := s.attach(t, layers, annotations)
			for _, at := range []Trust{Bound, Signed, Repository} {
				for _, k := range []trust.Keys{keys, slices.Concat(others, keys)} {
					_, _, err := s.fetch(t, at, k)
					if !errors.Is(err, index.ErrCorrupt) || !errors.Is(err, trust.ErrSignature) || !errors.Is(err, ErrNoIndex) ||
						!strings.Contains(err.Error(), signer.ID()) || !strings.Contains(err.Error(), artifact) {
						t.Errorf("at %s: %v", at, err)
					}
				}
			}
			if _, _, err := s.fetch(t, Local, keys); !errors.Is(err, ErrNoIndex) || errors.Is(err, index.ErrCorrupt) {
				t.Errorf("at local: %v", err)
			}
			good, _ := sign(statement(s.img.ManifestDigest, s.layer), []*trust.Signer{signer})
			s.attach(t, s.layer, good)
			for _, at := range []Trust{Signed, Repository} {
				if got, key, err := s.fetch(t, at, keys); got != Signed || key != signer.ID() {
					t.Errorf("with a good one beside it, at %s: %q by %q, %v", at, got, key, err)
				}
			}
		})
	}
}

// TestSignedAgain: the artifact of a push takes the place of that before.
func TestSignedAgain(t *testing.T) {
	repositories(t, func(t *testing.T, ref string, lists bool) {
		s := store(t, ref, false)
		first, firsts := newKey(t)
		second, seconds := newKey(t)
		unsigned := s.push(t)
		one := s.push(t, first)
		if again := s.push(t, first); again != one || one == unsigned {
			t.Errorf("unsigned %s, signed %s, signed again %s", unsigned, one, again)
		}
		two := s.push(t, second)
		if two == one {
			t.Error("another key, the same artifact")
		}
		found, err := s.repo.Referrers(t.Context(), s.img.ManifestDigest, ArtifactType)
		if err != nil || !lists && (len(found) != 1 || found[0].Digest != two) || lists && len(found) != 3 {
			t.Errorf("%v, %v; want %s", found, err, two)
		}
		if got, key, err := s.fetch(t, Signed, seconds); got != Signed || key != second.ID() {
			t.Errorf("%q by %q, %v", got, key, err)
		}
		if _, _, err := s.fetch(t, Signed, firsts); !lists && !errors.Is(err, ErrNoIndex) {
			t.Errorf("by the key of before: %v", err)
		}
		if both, other := s.push(t, first, second), s.push(t, second, first); both != other {
			t.Error("the order of keys makes another artifact")
		}
	})
}

// A list may be long, and hostile: bad artifacts do not hide a good one, as far as
// it is looked at.
func TestManyArtifacts(t *testing.T) {
	s := store(t, "oci:"+t.TempDir()+"/layout:app", false)
	signer, keys := newKey(t)
	for i := range maxArtifacts - 1 {
		s.attach(t, s.layer, map[string]string{"n": fmt.Sprint(i), trust.Annotation + signer.ID(): "bad"})
	}
	good, _ := sign(statement(s.img.ManifestDigest, s.layer), []*trust.Signer{signer})
	s.attach(t, s.layer, good)
	if got, _, err := s.fetch(t, Signed, keys); got != Signed {
		t.Errorf("%q, %v", got, err)
	}
	s = store(t, "oci:"+t.TempDir()+"/layout:app", false)
	for i := range maxArtifacts {
		s.attach(t, s.layer, map[string]string{"n": fmt.Sprint(i), trust.Annotation + signer.ID(): "bad"})
	}
	s.attach(t, s.layer, nil)
	if _, _, err := s.fetch(t, Repository, keys); !errors.Is(err, ErrNoIndex) || !errors.Is(err, index.ErrCorrupt) {
		t.Errorf("behind more than are looked at: %v", err)
	}
}
