package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/daemon"
)

func newFsck(g *globals) *cobra.Command {
	var repair bool
	cmd := &cobra.Command{
		Use:   "fsck",
		Short: "Check what this node keeps, while no service runs",
		Long: `Check what this node keeps, while no service runs (shale daemon stop): the tables of
the pool, every chunk that is here against its digest, read from the disk, and what
images are linked to. If something is bad the exit code is 7. With --repair what is bad
is dropped, to be made or fetched again when it is used; then nothing may be mounted, and
the code is 0. Neither asks a registry. Chunks of which only a part is here, and those of
SOCI indexes, have no digest to be compared with.
With --json: {segments, chunks, bytes, partial, origins, images, problems[],
image_problems[], repaired}; a problem is {segment, offset, chunk, error, dropped}, one
of an image {manifest_digest, error}.`,
		Example: `  shale daemon stop && shale fsck
  shale fsck --repair --json`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			out, err := daemon.Fsck(cmd.Context(), g.root, repair)
			if err != nil {
				return err
			}
			if g.json {
				err = printJSON(cmd.OutOrStdout(), out)
			} else {
				err = printChecked(cmd.OutOrStdout(), out)
			}
			if n := len(out.Problems) + len(out.Bad); err == nil && n > 0 && !repair {
				err = fmt.Errorf("%s: %w: problems found: %d (shale fsck --repair drops what is bad)", g.root, chunk.ErrCorrupt, n)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "drop what is bad: it is made or fetched again")
	g.jsonFlag(cmd)
	return cmd
}

func printChecked(w io.Writer, c *daemon.Checked) error {
	for _, p := range c.Problems {
		what := "segment " + p.Segment
		if p.Offset >= 0 {
			what = fmt.Sprintf("%s: offset %d: chunk %s", what, p.Offset, p.Chunk)
		}
		fmt.Fprintf(w, "%s: %s\n", what, p.Error)
	}
	for _, p := range c.Bad {
		fmt.Fprintf(w, "image %s: %s\n", p.ManifestDigest, p.Error)
	}
	_, err := fmt.Fprintf(w, "%d segments, %d chunks with %s, %d images; %d problems\n", c.Segments, c.Chunks, size(c.Bytes), c.Images, len(c.Problems)+len(c.Bad))
	return err
}
