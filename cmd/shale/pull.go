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
		Long: `Make the node know an image, or know anew what its reference stands for. Only the
index is fetched, or with --complete all data: then nobody needs the registry any
more. An image that is mounted stays what it is. With --json: {ref,
manifest_digest, platform, config, content_bytes, missing_bytes}; config is the
image's own, and bytes are those of chunks: content_bytes in files,
missing_bytes stored and not yet on the node.`,
		Example: `  shale pull localhost:5000/debian:12-shale
  shale pull --complete --json localhost:5000/debian:12-shale`,
		Args: args(cobra.ExactArgs(1)),
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
	g.trustFlag(cmd)
	g.shareIndexFlag(cmd)
	f.BoolVar(&complete, "complete", false, "fetch all data too")
	f.BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	g.jsonFlag(cmd)
	return cmd
}
