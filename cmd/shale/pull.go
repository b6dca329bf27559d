package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
)

func newPull(g *globals) *cobra.Command {
	var (
		platform        string
		complete, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "pull REF",
		Short: "Make the node know an image: its index, or with --complete all of it",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			src, err := g.source(a[0], platform)
			if err != nil {
				return err
			}
			src.Refresh = true
			show := tellNotes
			if !quiet && !g.json {
				p := newProgress()
				defer p.end()
				show = func(x daemon.Progress) {
					if x.Note != "" {
						tellNotes(x)
						return
					}
					p.step("fetch", x.Done, x.Total)
				}
			}
			res, err := g.client().Pull(cmd.Context(), src, complete, show)
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), res)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s\n%s of content, %s not fetched yet\n", res.Ref, res.ManifestDigest,
				size(res.ContentBytes), size(res.MissingBytes))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&platform, "platform", "", "platform of the image (default: this node's)")
	f.BoolVar(&complete, "complete", false, "fetch all data too")
	f.BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	g.jsonFlag(cmd)
	return cmd
}
