package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pack"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/runtime"
	"github.com/shale-image/shale/trace"
)

// optimized is what `shale optimize` prints as JSON.
type optimized struct {
	Ref            string     `json:"ref"`
	ManifestDigest string     `json:"manifest_digest"`
	PackDigest     string     `json:"pack_digest"`
	PackBytes      int64      `json:"pack_bytes"`
	MetadataBytes  int64      `json:"metadata_bytes"` // of them
	ContentBytes   int64      `json:"content_bytes"`  // what the blocks decode to
	WantedBytes    int64      `json:"wanted_bytes"`   // of all blocks in the traces
	Blocks         int        `json:"blocks"`
	Files          int        `json:"files"`
	Commands       [][]string `json:"commands"`
	Artifact       string     `json:"artifact,omitempty"` // digest of what was pushed
}

type optimizeFlags struct {
	run             runFlags
	from            []string
	push, referrers bool
	output, maxSize string
	time            time.Duration
}

func newOptimize(g *globals) *cobra.Command {
	var o optimizeFlags
	cmd := &cobra.Command{
		Use:   "optimize [flags] REF [-- CMD...]",
		Short: "Make a start pack: what a container will read, in one object beside the image",
		Long: `Make a start pack of an image: its index, and what a container reads of it when it
starts, in that order. A node that finds one beside an image asks for it at once, and
the container runs while it arrives. The image stays what it is.

What is read is seen by running CMD (without one, what the image runs by itself) in a
container, which goes to standard error, or told by traces (--from; shale trace makes
them). --time ends a container that would run on. An image has one pack for each
command: a new one takes the place of that of before. With --push it is pushed
beside the image, to its registry or OCI directory; -o writes it to a file.
With --json: {ref, manifest_digest, pack_digest, pack_bytes, metadata_bytes,
content_bytes, wanted_bytes, blocks, files, commands, artifact}.`,
		Example: `  shale optimize --push registry.example/app:1
  shale optimize --push registry.example/python:3 -- python3 -c 'import numpy'
  shale optimize --push --time 10s registry.example/nginx:1
  shale optimize --push --from a.trace --from b.trace registry.example/app:1`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if at := cmd.ArgsLenAtDash(); at == 0 || at < 0 && len(a) > 1 || at > 1 {
				return usageError{errors.New("one REF, and what is run behind --")}
			}
			o.run.flags.Args = a[1:]
			if len(o.from) > 0 && len(a) > 1 {
				return usageError{errors.New("--from and a command: what is read is told, or seen")}
			}
			if cmd.Flags().Changed("entrypoint") {
				o.run.flags.Entrypoint = &o.run.entrypoint
			}
			out, err := optimize(cmd.Context(), g, a[0], &o)
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			w := cmd.OutOrStdout()
			fmt.Fprintf(w, "%s\n%s: %s of %d files, and %s of index\n", out.PackDigest, size(out.PackBytes), size(out.ContentBytes), out.Files, size(out.MetadataBytes))
			if out.ContentBytes < out.WantedBytes {
				fmt.Fprintf(w, "%s that were read did not fit\n", size(out.WantedBytes-out.ContentBytes))
			}
			if out.Artifact != "" {
				fmt.Fprintf(w, "pushed as %s\n", out.Artifact)
			}
			return nil
		},
	}
	o.run.addFlags(g, cmd)
	f := cmd.Flags()
	f.StringArrayVar(&o.from, "from", nil, "file with a trace (may be repeated)")
	f.BoolVar(&o.push, "push", false, "push the pack beside the image")
	f.StringVarP(&o.output, "output", "o", "", "write the pack to a file")
	f.StringVar(&o.maxSize, "max-size", "64m", "of the pack, its index apart: what is read last is left out")
	f.DurationVar(&o.time, "time", 0, "end the container after this time (default: it ends by itself)")
	_ = cmd.MarkFlagFilename("from")
	_ = cmd.MarkFlagFilename("output")
	g.jsonFlag(cmd)
	return cmd
}

func optimize(ctx context.Context, g *globals, ref string, o *optimizeFlags) (*optimized, error) {
	limit, err := runtime.ParseBytes(o.maxSize)
	if err != nil {
		return nil, usageError{fmt.Errorf("--max-size: %w", err)}
	}
	l, err := g.packed(ctx, ref, o.run.platform)
	if err != nil {
		return nil, err
	}
	defer l.close()
	if o.push && !l.repo.Ref().Writable() {
		return nil, usageError{fmt.Errorf("--push: %s: archives are only read", ref)}
	}
	t, err := o.trace(ctx, g, ref)
	if err != nil {
		return nil, err
	}
	if t.Manifest != l.img.ManifestDigest {
		return nil, fmt.Errorf("%s: %w: the trace is of %s, the image is %s", ref, trace.ErrMismatch, t.Manifest, l.img.ManifestDigest)
	}
	var p bytes.Buffer
	table, err := l.build(ctx, &p, t, int64(limit))
	if err != nil {
		return nil, err
	}
	out := &optimized{
		Ref: l.repo.Ref().String(), ManifestDigest: l.img.ManifestDigest,
		PackDigest: fmt.Sprintf("sha256:%x", sha256.Sum256(p.Bytes())), PackBytes: int64(p.Len()), MetadataBytes: int64(len(l.metadata)),
		WantedBytes: t.Bytes(), Files: len(t.ByFile()), Commands: commands(t),
	}
	for _, r := range table.Runs {
		out.Blocks += r.Count
		out.ContentBytes += table.Bytes(r)
	}
	if o.output != "" {
		if err := renameio.WriteFile(o.output, p.Bytes(), 0o644); err != nil {
			return nil, err
		}
	}
	if o.push {
		ref := reader.PackRef{Index: l.indexDigest, Commands: out.Commands,
			Blob: image.Descriptor{MediaType: reader.PackMediaType, Digest: out.PackDigest, Size: out.PackBytes}}
		open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p.Bytes())), nil }
		if out.Artifact, err = reader.PushPack(ctx, l.repo, l.img, ref, open); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// commands lists the commands of a trace, each once, sorted.
func commands(t *trace.Trace) [][]string {
	out := [][]string{}
	for _, r := range t.Runs {
		c := append([]string{}, r.Command...)
		if !slices.ContainsFunc(out, func(x []string) bool { return slices.Equal(x, c) }) {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, slices.Compare)
	return out
}

// trace is what is read at a start: told, or seen in a run.
func (o *optimizeFlags) trace(ctx context.Context, g *globals, ref string) (*trace.Trace, error) {
	if len(o.from) > 0 {
		return readTraces(o.from)
	}
	var seen *trace.Trace
	r := &o.run
	r.remove, r.face, r.out = true, "device", os.Stderr
	r.place = daemon.Place{ReadAheadKiB: exactReadAhead, NoPack: true}
	r.ran = func(c *daemon.Client, m *daemon.Mounted) (err error) {
		seen, err = c.MountTrace(context.WithoutCancel(ctx), m.ID)
		return err
	}
	rctx := ctx
	if o.time > 0 {
		var cancel context.CancelFunc
		rctx, cancel = context.WithTimeout(ctx, o.time)
		defer cancel()
	}
	code, err := run(rctx, g, ref, r)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil && !errors.Is(err, context.DeadlineExceeded):
		return nil, err
	case code != 0 && rctx.Err() == nil:
		return nil, fmt.Errorf("%s: the container ended with exit code %d: what such a run reads makes no pack", ref, code)
	case seen == nil:
		return nil, fmt.Errorf("%s: the container was not up after %v", ref, o.time)
	}
	return seen, nil
}

// exactReadAhead is the kernel's readahead, in KiB, at which nothing is read that
// nobody asked for.
const exactReadAhead = 4

// packed is an image that a pack is made of.
type packed struct {
	*looked
	metadata    []byte // as stored; nil if a pack has none
	indexDigest string // of that
}

func (g *globals) packed(ctx context.Context, ref, platform string) (*packed, error) {
	var p image.Platform
	if platform != "" {
		var err error
		if p, err = image.ParsePlatform(platform); err != nil {
			return nil, usageError{err}
		}
	}
	repo, err := g.repository(ctx, ref)
	if err != nil {
		return nil, err
	}
	l := &packed{looked: &looked{repo: repo}}
	if err := l.load(ctx, p); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", ref, err), repo.Close())
	}
	return l, nil
}

func (l *packed) load(ctx context.Context, p image.Platform) (err error) {
	if l.img, err = l.repo.ResolveManifest(ctx, p); err != nil {
		return err
	}
	opts, err := indexOptions()
	if err != nil {
		return err
	}
	raw, err := reader.Fetch(ctx, l.repo, l.img, opts)
	if err != nil {
		return err
	}
	defer raw.Close()
	if l.tree, err = raw.Tree(); err != nil {
		return err
	}
	if raw.Kind == reader.Index { // others come in another way, before the pack or alongside
		l.metadata, l.indexDigest = make([]byte, raw.Size), raw.Name
		_, err = raw.File.ReadAt(l.metadata, 0)
	}
	return err
}

// build writes a pack of what a trace says was read.
func (l *packed) build(ctx context.Context, w io.Writer, t *trace.Trace, limit int64) (*pack.Table, error) {
	numbers := map[chunk.Digest]uint32{}
	for i := range l.tree.Chunks {
		numbers[l.tree.Chunks[i].Digest] = uint32(i)
	}
	var blocks []pack.Block
	var wanted []uint32
	seen := map[uint32]bool{}
	for _, b := range t.Blocks {
		n, ok := numbers[b.Chunk]
		if !ok || l.tree.Chunks[n].Size != b.Size || b.Chunk.Algorithm != chunk.BLAKE3 && b.Chunk.Algorithm != chunk.SHA256 {
			continue // of another index of the image
		}
		blocks = append(blocks, pack.Block{Chunk: pack.Chunk{Digest: b.Chunk, Size: b.Size}, Index: b.Index})
		if !seen[n] {
			seen[n] = true
			wanted = append(wanted, n)
		}
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("%w: nothing in the trace is content of the image's index (shale index --push makes one)", index.ErrUnsupported)
	}
	data := map[chunk.Digest][]byte{}
	err := content.Chunks(ctx, l.tree, content.Cached(l.source()), wanted, func(n uint32, p []byte) error {
		data[l.tree.Chunks[n].Digest] = bytes.Clone(p)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return pack.Build(ctx, w, l.metadata, blocks, pack.Options{Limit: limit, Content: func(_ context.Context, c pack.Chunk) ([]byte, error) {
		return data[c.Digest], nil
	}})
}
