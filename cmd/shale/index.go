package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/trust"
)

// indexed is what `shale index` prints as JSON.
type indexed struct {
	Ref            string   `json:"ref"`
	ManifestDigest string   `json:"manifest_digest"`
	IndexDigest    string   `json:"index_digest"`
	IndexBytes     int64    `json:"index_bytes"`
	SideBytes      int64    `json:"side_bytes"`
	LayerBytes     int64    `json:"layer_bytes"`
	Artifact       string   `json:"artifact,omitempty"` // digest of what was pushed
	Bound          *bound   `json:"bound,omitempty"`    // with --bind
	Keys           []string `json:"keys,omitempty"`     // ids of those that signed them
	OneFrame       []string `json:"one_frame"`          // digests of layers that come whole
}

// bound is the image that --bind has pushed.
type bound struct {
	Ref            string `json:"ref"`
	ManifestDigest string `json:"manifest_digest"`
	Artifact       string `json:"artifact"`
}

func newIndex(g *globals) *cobra.Command {
	var (
		platform, bind string
		push, quiet    bool
		keys           []string
	)
	cmd := &cobra.Command{
		Use:   "index REF",
		Short: "Make the index of an image as it is, so that it starts lazily",
		Long: `Read the layers of an image once, and make its index: what lies where in them.
The image stays what it is. With --push the index is pushed beside it, as an OCI
artifact that refers to it; every node that pulls the image then starts it
lazily. The same image gives the same index. Layers are tar, tar+gzip or tar+zstd.

Whose index nodes believe they say with --index-trust. --key signs what is pushed, for
those that have the public key and say signed (shale key new makes keys); it replaces
what was pushed before. --bind pushes the image once more, as NEWREF, with the digest of
its index in its manifest, and the index beside that, for those that say bound: they
believe whoever they believe the manifest. It has the same layers and another digest,
and is of one platform.

With --json: {ref, manifest_digest, index_digest, index_bytes, side_bytes,
layer_bytes, artifact, bound {ref, manifest_digest, artifact}, keys, one_frame};
side_bytes lie beside the layers and are fetched with the data they serve; one_frame
are layers of 1 MiB or more that are one zstd frame which cannot be cut: no part of
them can be had without all that lies before it.`,
		Example: `  shale index --push registry.example/app:1
  shale index --push --key team.key registry.example/app:1
  shale index --bind registry.example/app:1-bound registry.example/app:1
  shale index oci:./layout:app`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			p, err := parsePlatform(platform)
			if err != nil {
				return err
			}
			if len(keys) > 0 && !push && bind == "" {
				return usageError{errors.New("--key without --push or --bind: a signature is of what is pushed")}
			}
			var signers []*trust.Signer
			for _, file := range keys {
				s, err := trust.ReadSigner(file)
				if err != nil {
					return err
				}
				signers = append(signers, s)
			}
			repo, err := g.repository(cmd.Context(), a[0])
			if err != nil {
				return err
			}
			defer repo.Close()
			if push && !repo.Ref().Writable() {
				return usageError{fmt.Errorf("--push: %s: archives are only read", a[0])}
			}
			to, err := g.bindTo(cmd.Context(), bind)
			if err != nil {
				return err
			}
			if to != nil {
				defer to.Close()
			}
			img, err := repo.Resolve(cmd.Context(), p)
			if err != nil {
				return err
			}
			if _, ok := reader.Bootstrap(img); ok {
				return usageError{errors.New("the image is converted: it brings its index along")}
			}
			if d := img.Annotations[reader.BoundIndex]; push && d != "" {
				return usageError{fmt.Errorf("--push: the image's manifest names its index, %s, and no other can be that", d)}
			}
			made, err := makeIndex(cmd.Context(), repo, img, !quiet && !g.json)
			if err != nil {
				return err
			}
			defer made.Close()
			out := indexed{Ref: repo.Ref().String(), ManifestDigest: img.ManifestDigest, IndexDigest: reader.IndexDigest(made.Encoded),
				IndexBytes: int64(len(made.Encoded)), SideBytes: made.Side.Size}
			for _, l := range img.Layers {
				out.LayerBytes += l.Size
			}
			for _, s := range signers {
				out.Keys = append(out.Keys, s.ID())
			}
			out.OneFrame = oneFrame(made.Tree)
			for _, d := range out.OneFrame {
				fmt.Fprintf(os.Stderr, "shale: layer %s is one zstd frame: whatever is read of it, all of it comes; a start pack helps (shale optimize), or frames of some MiB\n", d)
			}
			if push {
				if out.Artifact, err = reader.Push(cmd.Context(), repo, img, made, signers...); err != nil {
					return err
				}
			}
			if to != nil {
				out.Bound = &bound{Ref: to.Ref().String()}
				if out.Bound.ManifestDigest, out.Bound.Artifact, err = reader.Bind(cmd.Context(), repo, img, to, made, signers...); err != nil {
					return err
				}
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s of index for %s of layers, %s beside them\n", out.IndexDigest, size(out.IndexBytes), size(out.LayerBytes), size(out.SideBytes))
			if push {
				fmt.Fprintf(cmd.OutOrStdout(), "pushed as %s\n", out.Artifact)
			}
			if b := out.Bound; b != nil {
				fmt.Fprintf(cmd.OutOrStdout(), "bound by %s\n%s\n", b.Ref, b.ManifestDigest)
			}
			for _, id := range out.Keys {
				fmt.Fprintf(cmd.OutOrStdout(), "signed by key %s\n", id)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&platform, "platform", "", "platform of the image (default: this node's)")
	f.BoolVar(&push, "push", false, "push the index beside the image")
	f.StringVar(&bind, "bind", "", "push the image as this reference, too, its manifest naming the index")
	f.StringArrayVar(&keys, "key", nil, "file of a private key to sign what is pushed with (may be repeated)")
	_ = cmd.MarkFlagFilename("key")
	f.BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	g.jsonFlag(cmd)
	return cmd
}

// oneFrame lists the layers that are one zstd frame and large enough for it to matter.
func oneFrame(t *index.Tree) []string {
	out := []string{}
	r := index.Reads{Chunks: make([]uint32, len(t.Chunks))}
	for i := range r.Chunks {
		r.Chunks[i] = uint32(i)
	}
	for i, c := range t.Costs(r) {
		if c.OneFrame && c.Read >= 1<<20 {
			out = append(out, t.Blobs[i].Digest)
		}
	}
	return out
}

// bindTo opens what --bind names, nil if nothing.
func (g *globals) bindTo(ctx context.Context, ref string) (*image.Repository, error) {
	if ref == "" {
		return nil, nil
	}
	repo, err := g.repository(ctx, ref)
	if err != nil {
		return nil, err
	}
	switch r := repo.Ref(); {
	case !r.Writable():
		err = fmt.Errorf("--bind: %s: archives are only read", ref)
	case r.Digest() != "":
		err = fmt.Errorf("--bind: %s: the digest of what is to be made cannot be chosen", ref)
	}
	if err != nil {
		return nil, usageError{errors.Join(err, repo.Close())}
	}
	return repo, nil
}

// makeIndex makes the index of an image from here, without the service.
func makeIndex(ctx context.Context, repo *image.Repository, img *image.Image, show bool) (*reader.Made, error) {
	cfg, err := config.Load()
	if err != nil {
		return nil, err
	}
	step := func(int) {}
	if show {
		p := newProgress()
		defer p.end()
		var done atomic.Int64
		var total int64
		for _, l := range img.Layers {
			total += l.Size
		}
		step = func(n int) { p.step("read", done.Add(int64(n)), total) }
	}
	return reader.Make(ctx, reader.Job{
		Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs, TempDir: os.TempDir(), Limits: cfg.Limits.Limits,
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) {
			r, err := repo.Blob(ctx, img.Layers[n])
			if err != nil {
				return nil, err
			}
			return &stepped{r, step}, nil
		},
	})
}

// stepped tells of what is read.
type stepped struct {
	io.ReadCloser
	step func(int)
}

func (s *stepped) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	s.step(n)
	return n, err
}
