package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"math/rand/v2"
	"os"

	"github.com/klauspost/compress/zstd"

	"github.com/shale-image/shale/bench/oci"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/trace"
)

// buildImage makes an image in a layout: two layers, some 70 files of up to 3 MB, 12 MB
// in all, of which about a half compresses.
func buildImage(dir string, seed uint64) error {
	l, err := oci.Create(dir)
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(seed, 0))
	var layers []oci.Descriptor
	var ids []string
	for n, sizes := range [][]int{{3e6, 1e6, 1e6, 500e3}, {2e6, 1e6, 500e3}} {
		for range 20 {
			sizes = append(sizes, 1+r.IntN(100e3))
		}
		for range 10 {
			sizes = append(sizes, 1+r.IntN(5e3))
		}
		raw, err := layer(r, fmt.Sprintf("layer%d", n), sizes)
		if err != nil {
			return err
		}
		ids = append(ids, oci.Digest(raw))
		d := oci.Descriptor{MediaType: oci.TypeGzip}
		var stored bytes.Buffer
		if n == 0 {
			w := gzip.NewWriter(&stored)
			w.Write(raw)
			w.Close()
		} else {
			d.MediaType = oci.TypeZstd
			w, err := zstd.NewWriter(&stored)
			if err != nil {
				return err
			}
			w.Write(raw)
			w.Close()
		}
		d.Digest, d.Size = oci.Digest(stored.Bytes()), int64(stored.Len())
		name, err := l.Blob(d.Digest)
		if err != nil {
			return err
		}
		if err := os.WriteFile(name, stored.Bytes(), 0o644); err != nil {
			return err
		}
		layers = append(layers, d)
	}
	return l.Finish(oci.Image{Architecture: "amd64", OS: "linux", RootFS: oci.RootFS{Type: "layers", DiffIDs: ids}}, layers)
}

// layer is an archive of files of the given sizes.
func layer(r *rand.Rand, dir string, sizes []int) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for n, size := range sizes {
		p := make([]byte, size)
		for i := range p {
			switch x := r.Uint32(); {
			case n%2 == 0:
				p[i] = byte(x)
			default:
				p[i] = "etaoin shrdlu\n,."[x&(x>>8)&15]
			}
		}
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("%s/%03d", dir, n), Mode: 0o644, Size: int64(size), Typeflag: tar.TypeReg}); err != nil {
			return nil, err
		}
		if _, err := w.Write(p); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return b.Bytes(), err
}

// pack pushes a start pack of all that an image has, and returns its digest.
func (s *stage) pack(ctx context.Context, name string) (string, error) {
	repo, err := s.open(ctx, name)
	if err != nil {
		return "", err
	}
	defer repo.Close()
	img, err := repo.Resolve(ctx, image.Platform{})
	if err != nil {
		return "", err
	}
	tree, err := reader.Tree(ctx, repo, img, s.dir)
	if err != nil {
		return "", err
	}
	t := &trace.Trace{Manifest: img.ManifestDigest, Runs: []trace.Run{{ID: "all"}}}
	for i := range tree.Chunks {
		c := &tree.Chunks[i]
		for n := range chunk.Blocks(c.Size) {
			t.Blocks = append(t.Blocks, trace.Block{Chunk: c.Digest, Size: c.Size, Index: n})
		}
	}
	made, err := reader.MakePack(ctx, repo, img, reader.Options{TempDir: s.dir}, t, 0)
	if err != nil {
		return "", err
	}
	_, err = reader.PushPack(ctx, repo, img, made)
	return made.Blob.Digest, err
}
