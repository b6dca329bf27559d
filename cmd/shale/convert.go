package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/convert"
	"github.com/shale-image/shale/image"
)

func newConvert(g *globals) *cobra.Command {
	var (
		platform, compressor, chunkSize string
		quiet                           bool
	)
	cmd := &cobra.Command{
		Use:   "convert SRC DST",
		Short: "Make the form of an image that starts lazily",
		Long: `Read the image SRC and push its converted form to DST: RAFS v6, the format of
Nydus. SRC and DST are references of a registry or oci:DIR[:TAG]. What is pushed
has been read back and compared with SRC. The same SRC gives the same bytes.`,
		Example: `  shale convert registry.example/app:1 registry.example/app:1-shale
  shale convert oci:./layout:app oci:./converted:app`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			o := convert.Options{Compress: true}
			var err error
			if o.Compressor, err = chunk.ParseCodec(compressor); err != nil {
				return usageError{err}
			}
			n, err := parseSize(chunkSize)
			if err != nil || n < 4<<10 || n > 16<<20 || n&(n-1) != 0 {
				return usageError{fmt.Errorf("--chunk-size %q: want a power of two from 4K to 16M", chunkSize)}
			}
			o.ChunkSize = uint32(n)
			if platform != "" {
				if o.Platform, err = image.ParsePlatform(platform); err != nil {
					return usageError{err}
				}
			}
			src, err := g.repository(cmd.Context(), a[0])
			if err != nil {
				return err
			}
			defer src.Close()
			dst, err := g.repository(cmd.Context(), a[1])
			if err != nil {
				return err
			}
			defer dst.Close()
			if dst.Ref().Digest() != "" {
				return usageError{errors.New("DST must be a tag: its digest is not known before")}
			}
			if !quiet && !g.json {
				p := newProgress()
				defer p.end()
				o.Progress = func(e convert.Event) {
					name := e.What
					if e.Layer >= 0 {
						name = fmt.Sprintf("%s %d", e.What, e.Layer+1)
					}
					p.step(name, e.Done, e.Total)
				}
			}
			res, err := convert.Convert(cmd.Context(), src, dst, o)
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), res)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s in layers, %s converted (%d files, %d chunks, %s of content)\n",
				dst.Ref().WithDigest(res.ManifestDigest), size(res.SourceBytes), size(res.Bytes), res.Files, res.Chunks, size(res.ContentBytes))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&platform, "platform", "", "platform to convert (default: this node's)")
	f.StringVar(&compressor, "compressor", "zstd", "zstd, lz4 or none")
	f.StringVar(&chunkSize, "chunk-size", "64K", "4K to 16M; what is cut alike is shared")
	f.BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	g.jsonFlag(cmd)
	return cmd
}
