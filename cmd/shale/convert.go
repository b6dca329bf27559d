package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/convert"
	"github.com/shale-image/shale/convert/source"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index/rafs"
	"github.com/shale-image/shale/reader"
)

// allPlatforms is what --platform says for an image for several.
const allPlatforms = "all"

// conversion is what the flags of convert say.
type conversion struct {
	g                                                          *globals
	platform, compressor, chunkSize, batchSize, dict, prefetch string
	quiet                                                      bool
}

func newConvert(g *globals) *cobra.Command {
	c := &conversion{g: g}
	cmd := &cobra.Command{
		Use:   "convert SRC DST",
		Short: "Make the form of an image that starts lazily",
		Long: `Read the image SRC and push its converted form to DST: RAFS v6, the format of
Nydus. What is pushed has been read back and compared with SRC, and only what DST
lacks is sent. The same SRC gives the same bytes.

SRC is a reference of a registry, or one of
  oci:DIR[:TAG]               a directory in the OCI image layout
  oci-archive:FILE[:TAG]      a tar archive of one
  docker-archive:FILE[:TAG]   what docker save writes
  tar:FILE                    a root file system in a tar archive; - is standard input
  dir:PATH                    a root file system in a directory
Archives may be compressed. DST is a reference of a registry or oci:DIR[:TAG].

With --chunk-dict, chunks that another converted image has are referred to and not
stored again. --prefetch names a file with a path on each line: what is to be
fetched first, directories with all that is below them.`,
		Example: `  shale convert registry.example/app:1 registry.example/app:1-shale
  shale convert --platform all registry.example/app:1 registry.example/app:1-shale
  docker save app:1 | gzip > app.tar.gz && shale convert docker-archive:app.tar.gz oci:./converted:app
  tar -C rootfs -c . | shale convert tar:- oci:./converted:rootfs`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			res, ref, err := c.run(cmd.Context(), a[0], a[1])
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), res)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s\n", ref.WithDigest(res.ManifestDigest))
			all := res.Platforms
			if all == nil {
				all = []*convert.Result{res}
			}
			for _, r := range all {
				fmt.Fprintf(cmd.OutOrStdout(), "%s: ", r.Platform)
				if r.SourceBytes > 0 {
					fmt.Fprintf(cmd.OutOrStdout(), "%s in layers, ", size(r.SourceBytes))
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s converted (%d files, %d chunks, %s of content)\n", size(r.Bytes), r.Files, r.Chunks, size(r.ContentBytes))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.platform, "platform", "", "platform to convert, or all (default: this node's)")
	f.StringVar(&c.compressor, "compressor", "zstd", "zstd, lz4 or none")
	f.StringVar(&c.chunkSize, "chunk-size", defaultChunkSize(), "4K to 16M; what is cut alike is shared")
	f.StringVar(&c.batchSize, "batch-size", fmt.Sprintf("%dK", convert.DefaultBatchSize>>10), "small files compressed together, up to 16M; 0: each alone")
	f.StringVar(&c.dict, "chunk-dict", "", "converted image whose chunks are referred to")
	f.StringVar(&c.prefetch, "prefetch", "", "file with paths to fetch first, one a line")
	_ = cmd.MarkFlagFilename("prefetch")
	f.BoolVarP(&c.quiet, "quiet", "q", false, "show no progress")
	g.jsonFlag(cmd)
	return cmd
}

func defaultChunkSize() string { return fmt.Sprintf("%dK", chunk.Size>>10) }

func (c *conversion) run(ctx context.Context, from, to string) (*convert.Result, image.Ref, error) {
	none := image.Ref{}
	o, err := c.options()
	if err != nil {
		return nil, none, err
	}
	dst, err := c.g.repository(ctx, to)
	if err != nil {
		return nil, none, err
	}
	defer dst.Close()
	ref := dst.Ref()
	switch {
	case !ref.Writable():
		return nil, none, usageError{fmt.Errorf("DST %s: archives are only read", to)}
	case ref.Digest() != "":
		return nil, none, usageError{errors.New("DST must be a tag: its digest is not known before")}
	}
	src, done, err := c.open(ctx, from, ref, o)
	if err != nil {
		return nil, none, err
	}
	defer done()
	if c.dict != "" {
		repo, err := c.g.repository(ctx, c.dict)
		if err != nil {
			return nil, none, err
		}
		defer repo.Close()
		if o.Dict, err = convert.OpenDict(ctx, repo, o.Platform); errors.Is(err, reader.ErrNoIndex) {
			return nil, none, usageError{fmt.Errorf("--chunk-dict: %w", err)}
		} else if err != nil {
			return nil, none, err
		}
	}
	if !c.quiet && !c.g.json {
		p := newProgress()
		defer p.end()
		o.Progress = func(e convert.Event) {
			name := e.What
			if e.Layer >= 0 {
				name = fmt.Sprintf("%s %d", e.What, e.Layer+1)
			}
			if e.Platform != "" {
				name = e.Platform + ": " + name
			}
			p.step(name, e.Done, e.Total)
		}
	}
	var res *convert.Result
	if c.platform == allPlatforms {
		res, err = convert.Images(ctx, src, dst, o)
	} else {
		res, err = convert.Image(ctx, src[0], dst, o)
	}
	return res, ref, err
}

func (c *conversion) options() (o convert.Options, err error) {
	o.Compress = true
	if o.Compressor, err = chunk.ParseCodec(c.compressor); err != nil {
		return o, usageError{err}
	}
	n, err := parseSize(c.chunkSize)
	if err != nil || n < 4<<10 || n > 16<<20 || n&(n-1) != 0 {
		return o, usageError{fmt.Errorf("--chunk-size %q: want a power of two from 4K to 16M", c.chunkSize)}
	}
	o.ChunkSize = uint32(n)
	if n, err = parseSize(c.batchSize); err != nil || n > rafs.MaxChunkSize {
		return o, usageError{fmt.Errorf("--batch-size %q: want at most 16M", c.batchSize)}
	}
	o.BatchSize = max(1, uint32(n))
	if c.platform != allPlatforms {
		if o.Platform, err = parsePlatform(c.platform); err != nil {
			return o, err
		}
	}
	if c.prefetch != "" {
		o.Prefetch, err = readLines(c.prefetch)
	}
	return o, err
}

// open opens the images that SRC stands for, more than one only for all
// platforms. done is to be called when they have been read.
func (c *conversion) open(ctx context.Context, from string, dst image.Ref, o convert.Options) (_ []*source.Image, done func(), err error) {
	done = func() {}
	one := func(img *source.Image, err error) ([]*source.Image, func(), error) {
		return []*source.Image{img}, done, err
	}
	if file, ok := strings.CutPrefix(from, "tar:"); ok {
		return one(source.Tar(file, o.Platform))
	}
	if dir, ok := strings.CutPrefix(from, "dir:"); ok {
		return one(source.Dir(dir, o.Platform))
	}
	repo, err := c.g.repository(ctx, from)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			repo.Close()
		}
	}()
	done = func() { repo.Close() }
	if err := convert.CheckRefs(repo.Ref(), dst); err != nil {
		return nil, nil, usageError{err}
	}
	if c.platform == allPlatforms {
		all, err := source.Platforms(ctx, repo)
		return all, done, err
	}
	return one(source.Repository(ctx, repo, o.Platform))
}

// readLines reads the lines of a file that are not empty.
func readLines(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var lines []string
	for s := bufio.NewScanner(f); ; {
		if !s.Scan() {
			return lines, s.Err()
		}
		if line := strings.TrimSpace(s.Text()); line != "" {
			lines = append(lines, line)
		}
	}
}
