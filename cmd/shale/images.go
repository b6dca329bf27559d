package main

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
)

func newImages(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "images",
		Short: "The images this node knows",
		Long: `The images this node knows. With --json: a list of
{refs, manifest_digest, platform, pulled}. One without a name (refs is empty) lost it
to a later pull; the next shale rmi frees it.`,
		Example: "  shale images",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := g.client().Status(cmd.Context())
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), st.Images)
			}
			tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(tw, "IMAGE\tPLATFORM\tDIGEST\tPULLED")
			for _, im := range st.Images {
				for _, ref := range names(im) {
					fmt.Fprintf(tw, "%s\t%s\t%.19s\t%s\n", ref, im.Platform, im.ManifestDigest, im.Pulled.Local().Format(time.DateTime))
				}
			}
			return tw.Flush()
		},
	}
	g.jsonFlag(cmd)
	return cmd
}

// names are what a list shows an image as.
func names(im daemon.ImageStatus) []string {
	if len(im.Refs) == 0 {
		return []string{"<none>"}
	}
	return im.Refs
}

func newRmi(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rmi REF...",
		Short: "Forget images, and free what only they used",
		Long: `Forget images. The data that no other image of the node refers to are freed, as
are images without a name. An image that is mounted stays (exit code 9). With
--json: a list of {ref, images, freed_bytes}.`,
		Example: "  shale rmi localhost:5000/debian:12-shale",
		Args:    args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			all := []*daemon.Removed{}
			var errs []error
			for _, arg := range a {
				ref, err := parseRef(arg)
				if err != nil {
					return err
				}
				out, err := g.client().Remove(cmd.Context(), ref.String())
				if err != nil {
					errs = append(errs, err)
					continue
				}
				all = append(all, out)
				if !g.json {
					fmt.Fprintf(cmd.OutOrStdout(), "%s: %s freed\n", out.Ref, size(out.FreedBytes))
				}
			}
			if g.json {
				errs = append(errs, printJSON(cmd.OutOrStdout(), all))
			}
			return errors.Join(errs...)
		},
	}
	g.jsonFlag(cmd)
	return cmd
}
