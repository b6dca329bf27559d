package main

import (
	"github.com/spf13/cobra"

	"github.com/shale-image/shale/export"
)

func newExport(g *globals) *cobra.Command {
	var platform string
	cmd := &cobra.Command{
		Use:   "export REF DIR|-",
		Short: "Take an image out into a directory, or as a tar archive",
		Long: `Write what a container of the image would see into an empty directory, or with -
as a tar archive to standard output. Every byte is verified on the way.`,
		Example: `  shale export localhost:5000/debian:12-shale ./rootfs
  shale export localhost:5000/debian:12-shale - | tar -t`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			l, err := g.look(cmd.Context(), a[0], platform)
			if err != nil {
				return err
			}
			defer l.close()
			if a[1] == "-" {
				return export.Tar(cmd.Context(), cmd.OutOrStdout(), l.tree, l.source())
			}
			return export.Dir(cmd.Context(), a[1], l.tree, l.source())
		},
	}
	cmd.Flags().StringVar(&platform, "platform", "", "platform of the image (default: this node's)")
	return cmd
}
