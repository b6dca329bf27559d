package main

import (
	"github.com/spf13/cobra"

	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/export"
)

func newExport(g *globals) *cobra.Command {
	o := &opener{g: g}
	cmd := &cobra.Command{
		Use:   "export REF DIR|-",
		Short: "Take an image out into a directory, or as a tar archive",
		Long: `Write what a container of the image would see into an empty directory, or with -
as a tar archive to standard output. What the node has of the image is read from it,
as shale mount would; the rest is fetched. Every byte is verified on the way.`,
		Example: `  shale export localhost:5000/debian:12-shale ./rootfs
  shale export localhost:5000/debian:12-shale - | tar -t`,
		Args: o.args(2, 2),
		RunE: func(cmd *cobra.Command, a []string) error {
			im, rest, err := o.open(cmd.Context(), a)
			if err != nil {
				return err
			}
			defer im.Close()
			if rest[0] == "-" {
				return export.Tar(cmd.Context(), cmd.OutOrStdout(), im.Tree, content.Cached(im.Source, ""))
			}
			return export.Dir(cmd.Context(), rest[0], im.Tree, content.Cached(im.Source, ""))
		},
	}
	o.flags(cmd)
	return cmd
}
