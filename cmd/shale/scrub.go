package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/daemon"
)

func newScrub(g *globals) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "scrub",
		Short: "Verify what is here, while it is used, and fetch again what is bad",
		Long: `Verify every chunk that is here against its digest, read from the disk, in the time
that readers leave. What is bad is dropped and fetched again: at once if its image is
mounted and completed in the background, else when it is read. What lies below a direct
mount cannot be dropped: it is told, the exit code is 7, and umount and another scrub
mend it. Run it from a timer if disks are not to be trusted. With --json: {segments,
chunks, bytes, partial, origins, problems[]} as shale fsck.`,
		Example: `  shale scrub
  shale scrub --json`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			show := func(daemon.Progress) {}
			if !quiet && !g.json {
				p := newProgress()
				defer p.end()
				show = func(x daemon.Progress) { p.step("verify", x.Done, x.Total) }
			}
			out, err := g.client().Scrub(cmd.Context(), show)
			if err != nil {
				return err
			}
			left := 0
			for _, p := range out.Problems {
				if !p.Dropped {
					left++
				}
			}
			if g.json {
				err = printJSON(cmd.OutOrStdout(), out)
			} else {
				for _, p := range out.Problems {
					fmt.Fprintf(cmd.OutOrStdout(), "segment %s: offset %d: chunk %s: %s\n", p.Segment, p.Offset, p.Chunk, p.Error)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d chunks with %s; %d problems, %d dropped\n", out.Chunks, size(out.Bytes), len(out.Problems), len(out.Problems)-left)
			}
			if err == nil && left > 0 {
				err = fmt.Errorf("%w: %d chunks are bad and mounted directly: umount their images and scrub again", chunk.ErrCorrupt, left)
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	g.jsonFlag(cmd)
	return cmd
}
