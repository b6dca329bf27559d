package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/debian"
	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/oci"
	"github.com/shale-image/shale/bench/plain"
	"github.com/shale-image/shale/bench/registry"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
	"github.com/shale-image/shale/index/soci/socitest"
	"github.com/shale-image/shale/reader"
)

// golden is the image of index/soci/testdata, in the registry as the real tools
// push it: v1 and v2, with an index of each version.
type golden struct {
	repository string
	truth      string // its tree as tar unpacks it
	objects    map[string][]byte
	sociV1     string // digest of that index
	layers     []string
	ztocs      []string
}

func (w *world) golden(t *testing.T) *golden {
	t.Helper()
	g := &golden{repository: "e2e/soci", truth: filepath.Join(t.TempDir(), "truth"), objects: map[string][]byte{}}
	f, err := os.Open("../index/soci/testdata/soci.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		var p []byte
		if err == nil {
			p, err = io.ReadAll(r)
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(h.Name, "blobs/") && h.Typeflag == tar.TypeReg {
			g.objects[digest(p)] = p
		}
	}
	g.push(t, w)
	if err := os.Mkdir(g.truth, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range g.layers {
		in, _, err := layer.Decompress(bytes.NewReader(g.objects[d]), index.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		p, err := io.ReadAll(in)
		in.Close()
		if err == nil {
			err = plain.Unpack(t.Context(), bytes.NewReader(gzipped(p)), g.truth)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// A directory that a layer has again has the attributes of that layer alone;
	// tar leaves those that are there.
	if err := unix.Removexattr(filepath.Join(g.truth, "dir"), "user.bin"); err != nil {
		t.Fatal(err)
	}
	return g
}

// push pushes all objects: what is no manifest, then manifests, then indexes.
func (g *golden) push(t *testing.T, w *world) {
	repo := w.repository(t, g.repository+":v1")
	type manifest struct {
		MediaType         string
		Config            image.Descriptor
		Layers, Manifests []image.Descriptor
		Subject           *image.Descriptor
	}
	var manifests, indexes []string
	parsed := map[string]manifest{}
	for d, p := range g.objects {
		var m manifest
		if p[0] == '{' && json.Unmarshal(p, &m) == nil && m.MediaType != "" {
			if parsed[d] = m; m.Manifests != nil {
				indexes = append(indexes, d)
			} else {
				manifests = append(manifests, d)
			}
			continue
		}
		blob := image.Descriptor{Digest: d, Size: int64(len(p))}
		if err := repo.PushBlob(t.Context(), blob, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }); err != nil {
			t.Fatal(err)
		}
	}
	put := func(kind string, p []byte, tag string) {
		if _, err := repo.PushManifest(t.Context(), kind, p, tag); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range manifests {
		m, tag := parsed[d], ""
		switch {
		case m.Subject != nil:
			g.sociV1 = d
			list := encode(t, map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeIndex, "manifests": []any{map[string]any{
				"mediaType": m.MediaType, "digest": d, "size": len(g.objects[d]), "artifactType": reader.SOCIType1,
			}}})
			defer put(image.MediaTypeIndex, list, strings.Replace(m.Subject.Digest, ":", "-", 1)) // as oras does where the registry has no list
			for _, l := range m.Layers {
				g.ztocs = append(g.ztocs, l.Digest)
			}
		case m.Config.MediaType == image.MediaTypeConfig && !bytes.Contains(g.objects[d], []byte("com.amazon.soci")):
			tag = "v1"
			for _, l := range m.Layers {
				g.layers = append(g.layers, l.Digest)
			}
		}
		put(m.MediaType, g.objects[d], tag)
	}
	for _, d := range indexes {
		put(parsed[d].MediaType, g.objects[d], "v2")
	}
}

func (w *world) repository(t *testing.T, name string) *image.Repository {
	t.Helper()
	ref, err := image.ParseRef(w.registry.Host() + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(t.Context(), ref, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}

// TestSOCI: what the real soci has pushed starts lazily, and is what tar unpacks.
func TestSOCI(t *testing.T) {
	w := setup(t)
	g := w.golden(t)
	for tag, trust := range map[string]string{"v1": "repository", "v2": "bound"} {
		for _, face := range []string{"device", "fuse"} {
			t.Run(tag+" "+face, func(t *testing.T) {
				n, p := w.node(t), w.proxy(t)
				ref := p.Host() + "/" + g.repository + ":" + tag
				plan := n.shale(0, "plan", "--json", "--index-trust", trust, ref)
				var what struct{ Index, IndexTrust string }
				if err := json.Unmarshal([]byte(strings.ReplaceAll(plan, "index_trust", "IndexTrust")), &what); err != nil || what.Index != "soci" || what.IndexTrust != trust {
					t.Errorf("%v: %s", err, plan)
				}
				// What is complete is compared with its layers, unless nobody is to complete it.
				_, errout, code := n.try("mount", "--no-complete", "--face", face, "--index-trust", trust, ref, n.mnt)
				if code != 0 || strings.Contains(errout, noteRead) {
					t.Fatalf("exit code %d: %s", code, errout)
				}
				compare(t, g.truth, n.mnt)
				m := n.status().Mounts[0]
				if m.Fill.Errors != 0 || m.Source.Bytes == 0 {
					t.Errorf("%+v, %+v", m.Fill, m.Source)
				}
				n.shale(0, "umount", n.mnt)
				// All of it stays: nothing is asked of the registry any more.
				n.stop()
				before := p.Totals().Requests
				n.shale(0, "mount", "--no-complete", "--face", face, "--index-trust", trust, ref, n.mnt)
				compare(t, g.truth, n.mnt)
				if after := p.Totals().Requests; after != before {
					t.Errorf("%d requests for what is here", after-before)
				}
				n.shale(0, "umount", n.mnt)
				// Both runs are recorded, chunks without a digest, too.
				n.stop()
				if js := n.shale(0, "trace", "show", "--json", ref); strings.Count(js, `{"id":`) != 2 || !strings.Contains(js, `"chunk":"origin:`) {
					t.Errorf("the trace is\n%s", js)
				}
				n.shale(0, "accessed", ref)
				n.shale(0, "pull", "--complete", "--index-trust", trust, ref)
				n.shale(0, "mount", "--face", face, "--index-trust", trust, ref, n.mnt)
				compare(t, g.truth, n.mnt)
				n.shale(0, "umount", n.mnt)
				n.shale(0, "check", w.registry.Host()+"/"+g.repository+":"+tag)
			})
		}
	}
	// Who takes nobody's word but the manifest's reads all of v1.
	n := w.node(t)
	_, errout, code := n.try("mount", "--index-trust", "bound", w.registry.Host()+"/"+g.repository+":v1", n.mnt)
	if code != 0 || !strings.Contains(errout, noteRead) {
		t.Errorf("exit code %d: %s", code, errout)
	}
	compare(t, g.truth, n.mnt)
}

// TestSOCIDamage: an index that is damaged does not keep an image from starting, and
// stored bytes that are not what the ztoc says never reach a reader.
func TestSOCIDamage(t *testing.T) {
	w := setup(t)
	g := w.golden(t)
	for what, part := range map[string]string{"manifest": "/manifests/" + g.sociV1, "ztoc": "/blobs/" + g.ztocs[0]} {
		for how, fault := range map[string]netmodel.Fault{"flipped": {Flip: []int64{300}}, "gone": {Status: http.StatusNotFound}} {
			t.Run(what+" "+how, func(t *testing.T) {
				n, p := w.node(t), w.proxy(t)
				damage(p, part, fault)
				_, errout, code := n.try("mount", p.Host()+"/"+g.repository+":v1", n.mnt)
				if code != 0 || !strings.Contains(errout, noteRead) {
					t.Fatalf("exit code %d: %s", code, errout)
				}
				compare(t, g.truth, n.mnt)
			})
		}
	}
	for i, layer := range g.layers {
		t.Run("layer", func(t *testing.T) {
			n, p := w.node(t), w.proxy(t)
			_, errout, code := n.try("mount", p.Host()+"/"+g.repository+":v2", n.mnt)
			if code != 0 || strings.Contains(errout, noteRead) {
				t.Fatalf("exit code %d: %s", code, errout)
			}
			damage(p, layer, netmodel.Fault{Flip: []int64{100}})
			failed := readAll(t, n.mnt, g.truth)
			if wholly := i == 1; wholly != (len(failed) == 0) { // that one was read before the start
				t.Errorf("layer %d: %q cannot be read", i, failed)
			}
			p.SetFaults(nil)
			if failed := readAll(t, n.mnt, g.truth); len(failed) > 0 {
				t.Errorf("%q still cannot be read", failed)
			}
			n.shale(0, "umount", n.mnt)
		})
	}
}

// TestSOCILies pushes indexes of version 1 that are well made and wrong. Where the
// digest of a span is, readers get what the layers have all the same; where a file is
// said to have another name, that is found out once the layers are read.
func TestSOCILies(t *testing.T) {
	w := setup(t)
	g := w.golden(t)
	for what, lie := range map[string]struct {
		change func(z []byte) []byte
		told   bool
	}{
		"span": {func(z []byte) []byte {
			at := bytes.LastIndex(z, []byte("sha256:")) + len("sha256:")
			if z[at]++; z[at] > '9' {
				z[at] = '0'
			}
			return z
		}, false},
		"name": {func(z []byte) []byte { return bytes.ReplaceAll(z, []byte("./dir/plain"), []byte("./dir/other")) }, true},
	} {
		t.Run(what, func(t *testing.T) {
			g := *g
			g.repository = "e2e/socilies-" + what
			g.push(t, w)
			repo := w.repository(t, g.repository+":v1")
			img, err := repo.Resolve(t.Context(), image.Platform{})
			if err != nil {
				t.Fatal(err)
			}
			var m struct{ Layers []image.Descriptor }
			if err := json.Unmarshal(g.objects[g.sociV1], &m); err != nil {
				t.Fatal(err)
			}
			for i, l := range m.Layers {
				z := lie.change(bytes.Clone(g.objects[l.Digest]))
				m.Layers[i].Digest = digest(z)
				if err := repo.PushBlob(t.Context(), m.Layers[i], func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(z)), nil }); err != nil {
					t.Fatal(err)
				}
			}
			subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
			_, err = repo.PushArtifact(t.Context(), subject, reader.SOCIType1, m.Layers, nil, func(image.Descriptor) bool { return true })
			if err != nil {
				t.Fatal(err)
			}
			n := w.node(t)
			ref := w.registry.Host() + "/" + g.repository + ":v1"
			if !lie.told {
				n.shale(0, "mount", ref, n.mnt)
				compare(t, g.truth, n.mnt)
				if st := n.status(); st.Mounts[0].Fill.Errors != 0 {
					t.Errorf("readers saw it: %+v", st.Mounts[0].Fill)
				}
				n.shale(0, "umount", n.mnt)
			}
			_, errout, code := n.try("pull", "--complete", ref)
			if code != 0 || strings.Contains(errout, "no longer used") != lie.told {
				t.Errorf("exit code %d: %s", code, errout)
			}
			n.shale(0, "mount", ref, n.mnt)
			compare(t, g.truth, n.mnt)
			n.shale(0, "umount", n.mnt)
		})
	}
	// A true one is found to be.
	n := w.node(t)
	_, errout, code := n.try("pull", "--complete", w.registry.Host()+"/"+g.repository+":v1")
	if code != 0 || strings.Contains(errout, "no longer used") {
		t.Errorf("exit code %d: %s", code, errout)
	}
}

// TestSOCIRun runs a program of a Debian image by a SOCI index, cold, and fetches a
// part of it.
func TestSOCIRun(t *testing.T) {
	w := setup(t)
	layout, err := debian.Build(t.Context(), debian.Python, "../build/images", os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	const name = "e2e/socidebian:plain"
	if err := registry.Push(context.Background(), w.registry.URL(), layout, name); err != nil {
		t.Fatal(err)
	}
	repo := w.repository(t, name)
	img, err := repo.Resolve(t.Context(), image.Platform{})
	if err != nil {
		t.Fatal(err)
	}
	var total int64
	var ztocs []image.Descriptor
	for _, l := range img.Layers {
		path, err := oci.Layout(layout).Blob(l.Digest)
		if err != nil {
			t.Fatal(err)
		}
		p, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		z, err := socitest.Build(p, 4<<20)
		if err != nil {
			t.Fatal(err)
		}
		total += l.Size
		d := image.Descriptor{MediaType: "application/octet-stream", Digest: digest(z), Size: int64(len(z)), Annotations: map[string]string{reader.SOCILayer: l.Digest}}
		if err := repo.PushBlob(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(z)), nil }); err != nil {
			t.Fatal(err)
		}
		ztocs = append(ztocs, d)
	}
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	if _, err := repo.PushArtifact(t.Context(), subject, reader.SOCIType1, ztocs, nil, nil); err != nil {
		t.Fatal(err)
	}
	n, p := w.node(t), w.proxy(t)
	out := n.shale(0, "run", "--rm", p.Host()+"/"+name, "python3", "-c", "import json; print(json.dumps([1]))")
	if out != "[1]\n" {
		t.Errorf("%q", out)
	}
	if sent := p.Totals().Down; sent > total/2 {
		t.Errorf("%d of %d bytes were fetched", sent, total)
	} else {
		t.Logf("%d of %d bytes in %d requests", sent, total, p.Totals().Requests)
	}
}
