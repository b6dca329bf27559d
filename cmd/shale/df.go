package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/pool"
)

func newDf(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "df",
		Short: "What the images take on this node",
		Long: `What of each image is on this node, and what the pool takes of the disk. HERE is what
can be read without the registry, SHARED what of that another image has, too. With
--json: {images[], pool}; an image is {refs, manifest_digest, platform, content_bytes,
present_bytes, shared_bytes, complete, pinned, in_use}, the pool {segments,
sealed_segments, address_bytes, present_bytes, disk_bytes, quota_bytes, evicted_bytes}.
Sealed segments are those that the file system verifies whenever they are read (fs-verity).`,
		Example: `  shale df
  shale df --json`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := g.client().Df(cmd.Context())
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if g.json {
				return printJSON(w, d)
			}
			tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
			fmt.Fprintln(tw, "IMAGE\tSIZE\tHERE\tSHARED\tSTATE")
			for _, im := range d.Images {
				for _, ref := range names(daemon.ImageStatus{Refs: im.Refs}) {
					fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", ref, size(im.ContentBytes), size(im.PresentBytes), size(im.SharedBytes), diskState(im))
				}
			}
			if err := tw.Flush(); err != nil {
				return err
			}
			_, err = fmt.Fprintf(w, "\npool: %s on disk%s%s\n", size(d.Pool.Disk), quotaOf(d.Pool), sealedOf(d.Pool))
			return err
		},
	}
	g.jsonFlag(cmd)
	return cmd
}

func diskState(im daemon.ImageDisk) string {
	state := "incomplete"
	if im.Complete {
		state = "complete"
	}
	if im.Pinned {
		state += ", pinned"
	}
	if im.InUse {
		state += ", in use"
	}
	return state
}

// sealedOf tells how much the file system itself verifies, if it can.
func sealedOf(u pool.Usage) string {
	if u.Sealed == 0 {
		return ""
	}
	return fmt.Sprintf("; %d of %d segments are sealed (fs-verity)", u.Sealed, u.Segments)
}
