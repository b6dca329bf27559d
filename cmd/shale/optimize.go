package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/fleet"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/replace"
	"github.com/shale-image/shale/runtime"
	"github.com/shale-image/shale/trace"
)

// optimized is what `shale optimize` prints as JSON.
type optimized struct {
	Ref            string          `json:"ref"`
	ManifestDigest string          `json:"manifest_digest"`
	Packs          []optimizedPack `json:"packs"`
}

type optimizedPack struct {
	PackDigest    string     `json:"pack_digest"`
	PackBytes     int64      `json:"pack_bytes"`
	MetadataBytes int64      `json:"metadata_bytes"` // of them
	ContentBytes  int64      `json:"content_bytes"`  // what the blocks decode to
	WantedBytes   int64      `json:"wanted_bytes"`   // of all blocks that were chosen
	RareBytes     int64      `json:"rare_bytes"`     // of those that were not: too few runs have read them, or too late
	Blocks        int        `json:"blocks"`
	Files         int        `json:"files"`
	Runs          int        `json:"runs"`
	Commands      [][]string `json:"commands"`
	Artifact      string     `json:"artifact,omitempty"` // digest of what was pushed
}

// maxMade is how many packs are made at a time.
const maxMade = 16

type optimizeFlags struct {
	run             runFlags
	from            []string
	push, referrers bool
	together        bool
	output, maxSize string
	time            time.Duration
	share           float64
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
container, which goes to standard error, or told by traces: --from files (shale trace
makes them), --from-referrers those that nodes have shared beside the image. --time ends
a container that would run on, and of traces it leaves out what was first read later; of
those that nodes have shared, after a minute. So is left out what fewer than a quarter of the runs (--share)
have read: nodes record all that a container reads while it lives.

An image has one pack for each command: a new one takes the place of that of before, and
traces of several commands make several, 16 at most, unless --together makes one of all.
With --push they are pushed beside the image, to its registry or OCI directory; -o writes
one to a file.
With --json: {ref, manifest_digest, packs[]}; of a pack {pack_digest, pack_bytes,
metadata_bytes, content_bytes, wanted_bytes, rare_bytes, blocks, files, runs, commands,
artifact}.`,
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
			if (len(o.from) > 0 || o.referrers) && len(a) > 1 {
				return usageError{errors.New("a command and traces: what is read is seen, or told")}
			}
			if cmd.Flags().Changed("entrypoint") {
				o.run.flags.Entrypoint = &o.run.entrypoint
			}
			if o.referrers && !cmd.Flags().Changed("time") {
				o.time = time.Minute
			}
			out, err := optimize(cmd.Context(), g, a[0], &o)
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			return printOptimized(cmd.OutOrStdout(), out)
		},
	}
	o.run.addFlags(g, cmd)
	f := cmd.Flags()
	f.StringArrayVar(&o.from, "from", nil, "file with a trace (may be repeated)")
	f.BoolVar(&o.referrers, "from-referrers", false, "take the traces that nodes have shared beside the image (shale run --share-traces)")
	f.BoolVar(&o.push, "push", false, "push the pack beside the image")
	f.BoolVar(&o.together, "together", false, "make one pack of all commands in the traces")
	f.Float64Var(&o.share, "share", 0.25, "of the runs in traces: leave out what fewer have read")
	f.StringVarP(&o.output, "output", "o", "", "write the pack to a file")
	f.StringVar(&o.maxSize, "max-size", "64m", "of the pack, its index apart: what is read last is left out")
	f.DurationVar(&o.time, "time", 0, "end the container after this time; of traces, leave out what was first read later (default: never, of shared traces 1m)")
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
	if !(o.share >= 0 && o.share <= 1) {
		return nil, usageError{fmt.Errorf("--share %g: want 0 to 1", o.share)}
	}
	p, err := parsePlatform(o.run.platform)
	if err != nil {
		return nil, err
	}
	repo, err := g.repository(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer repo.Close()
	if o.push && !repo.Ref().Writable() {
		return nil, usageError{fmt.Errorf("--push: %s: archives are only read", ref)}
	}
	img, err := repo.ResolveManifest(ctx, p)
	if err != nil {
		return nil, err
	}
	t, err := o.trace(ctx, g, repo, img)
	if err != nil {
		return nil, err
	}
	opts, err := indexOptions()
	if err != nil {
		return nil, err
	}
	apart := []*trace.Trace{t}
	if all := t.ByCommand(); len(all) > 0 && !o.together {
		apart = all
	}
	if n := len(apart) - maxMade; n > 0 {
		fmt.Fprintf(os.Stderr, "shale: of %d commands the %d that ran most often get a pack\n", len(apart), maxMade)
		apart = apart[:maxMade]
	}
	if o.output != "" && len(apart) > 1 {
		return nil, usageError{fmt.Errorf("-o: the traces are of %d commands, which makes as many packs (--together makes one)", len(apart))}
	}
	packer, err := reader.NewPacker(ctx, repo, img, opts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	out := &optimized{Ref: repo.Ref().String(), ManifestDigest: img.ManifestDigest}
	for _, t := range apart {
		pack, err := o.pack(ctx, repo, img, packer, t, limit)
		if errors.Is(err, index.ErrUnsupported) && len(apart) > 1 {
			fmt.Fprintf(os.Stderr, "shale: no pack for %s: %v\n", quote(describeCommand(t.Runs[0].Command)), err)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", ref, err)
		}
		out.Packs = append(out.Packs, *pack)
	}
	if len(out.Packs) == 0 {
		return nil, fmt.Errorf("%s: %w: there is no command to make a pack for", ref, index.ErrUnsupported)
	}
	return out, nil
}

// pack makes the pack of a trace, and puts it where it was asked for.
func (o *optimizeFlags) pack(ctx context.Context, repo *image.Repository, img *image.Image, p *reader.Packer, all *trace.Trace, limit int64) (*optimizedPack, error) {
	t := all
	if len(o.from) > 0 || o.referrers {
		if t = all.Start(o.share, o.time); len(t.Blocks) == 0 {
			return nil, usageError{fmt.Errorf("nothing that was read by %g of the runs (--share) was read before %v (--time)", o.share, o.time)}
		}
	}
	made, err := p.Make(ctx, t, limit)
	if err != nil {
		return nil, err
	}
	out := &optimizedPack{
		PackDigest: made.Blob.Digest, PackBytes: made.Blob.Size, MetadataBytes: made.Metadata,
		WantedBytes: t.Bytes(), RareBytes: all.Bytes() - t.Bytes(), Files: len(t.ByFile()), Runs: len(t.Runs), Commands: made.Commands,
	}
	for _, r := range made.Table.Runs {
		out.Blocks += r.Count
		out.ContentBytes += made.Table.Bytes(r)
	}
	if o.output != "" {
		if err := replace.File(o.output, made.Bytes, 0o644); err != nil {
			return nil, err
		}
	}
	if o.push {
		if out.Artifact, err = reader.PushPack(ctx, repo, img, made); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func printOptimized(w io.Writer, out *optimized) error {
	for _, p := range out.Packs {
		if len(out.Packs) > 1 {
			fmt.Fprintf(w, "%s: %d runs\n", quote(describeCommand(p.Commands[0])), p.Runs)
		}
		fmt.Fprintf(w, "%s\n%s: %s of %d files, and %s of index\n", p.PackDigest, size(p.PackBytes), size(p.ContentBytes), p.Files, size(p.MetadataBytes))
		if p.RareBytes > 0 {
			fmt.Fprintf(w, "%s that few runs have read, or late, are left out\n", size(p.RareBytes))
		}
		if p.ContentBytes < p.WantedBytes {
			fmt.Fprintf(w, "%s that were read did not fit\n", size(p.WantedBytes-p.ContentBytes))
		}
		if p.Artifact != "" {
			fmt.Fprintf(w, "pushed as %s\n", p.Artifact)
		}
	}
	return nil
}

// trace is what is read at a start: told, or seen in a run.
func (o *optimizeFlags) trace(ctx context.Context, g *globals, repo *image.Repository, img *image.Image) (*trace.Trace, error) {
	var told []*trace.Trace
	if len(o.from) > 0 {
		t, err := readTraces(o.from)
		if err != nil {
			return nil, err
		}
		told = append(told, t)
	}
	if o.referrers {
		t, err := fleet.Traces(ctx, repo, img)
		if err != nil {
			return nil, err
		}
		told = append(told, t)
	}
	if len(told) > 0 {
		return trace.Merge(told...)
	}
	ref := repo.Ref().String()
	var seen *trace.Trace
	r := &o.run
	r.remove = true
	// A pipe, as engines give it: node reads other parts of itself to write to a file.
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(os.Stderr, out)
	}()
	defer func() {
		_ = in.Close()
		<-copied
		_ = out.Close()
	}()
	r.out = in
	r.place = daemon.Place{Rehearsal: true, NoComplete: true}
	r.record(func(t *trace.Trace) error {
		seen = t
		return nil
	})
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
	case rctx.Err() != nil && seen != nil: // it was ended, as was asked for
		return seen, nil
	case rctx.Err() != nil:
		return nil, fmt.Errorf("%s: the container was not up after %v", ref, o.time)
	case err != nil:
		return nil, err
	case code != 0:
		return nil, fmt.Errorf("%s: the container ended with exit code %d: what such a run reads makes no pack", ref, code)
	}
	return seen, nil
}
