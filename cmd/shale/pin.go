package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
)

func newPin(g *globals) *cobra.Command {
	return pinVerb(g, true, &cobra.Command{
		Use:   "pin REF",
		Short: "Keep what is here of an image, whatever the quota",
		Long: `Keep what is here of an image: it is never evicted to make room, nor pruned. What
is not here yet is fetched when it is read, or with shale pull --complete, and stays
then. The pin is the image's; shale rmi ends it, and so does shale unpin. With --json:
{ref, images[], pinned}; images are manifest digests.`,
		Example: `  shale pull --complete registry.example/app:1
  shale pin registry.example/app:1`,
	})
}

func newUnpin(g *globals) *cobra.Command {
	return pinVerb(g, false, &cobra.Command{
		Use:     "unpin REF",
		Short:   "Let an image be evicted again",
		Long:    `Let what is here of an image be evicted and pruned again. With --json: as shale pin.`,
		Example: "  shale unpin registry.example/app:1",
	})
}

func pinVerb(g *globals, pinned bool, cmd *cobra.Command) *cobra.Command {
	cmd.Args = args(cobra.ExactArgs(1))
	cmd.ValidArgsFunction = g.completeRef
	cmd.RunE = func(cmd *cobra.Command, a []string) error {
		ref, err := parseRef(a[0])
		if err != nil {
			return err
		}
		out, err := g.client().Pin(cmd.Context(), ref.String(), pinned)
		if err != nil {
			return err
		}
		if g.json {
			return printJSON(cmd.OutOrStdout(), out)
		}
		return nil
	}
	g.jsonFlag(cmd)
	return cmd
}

// completeRef completes names of images that the node knows.
func (g *globals) completeRef(cmd *cobra.Command, a []string, begun string) ([]string, cobra.ShellCompDirective) {
	if len(a) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	st, err := (&daemon.Client{Root: g.root}).Status(context.Background())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, im := range st.Images {
		for _, ref := range im.Refs {
			if strings.HasPrefix(ref, begun) {
				out = append(out, ref)
			}
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

func newPrune(g *globals) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Free what no image needs any more",
		Long: `Free what no image refers to, and images that have no name any more, since a later
pull gave it to another. With --all also all images that are neither in use nor pinned.
With --json: {refs[], images[], freed_bytes}: names and manifest digests that are no
more.`,
		Example: `  shale prune
  shale prune --all --json`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			out, err := g.client().Prune(cmd.Context(), all)
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			for _, ref := range out.Refs {
				fmt.Fprintln(cmd.OutOrStdout(), ref)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d images removed, %s freed\n", len(out.Images), size(out.FreedBytes))
			return err
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also images that are neither in use nor pinned")
	g.jsonFlag(cmd)
	return cmd
}
