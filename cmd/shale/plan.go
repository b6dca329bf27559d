package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
)

func newPlan(g *globals) *cobra.Command {
	var platform string
	cmd := &cobra.Command{
		Use:   "plan REF",
		Short: "Tell what the first start of an image will cost on this node",
		Long: `Tell which path an image takes to its first start on this node, and what it will
cost: bytes of metadata, bytes that are here already, bytes to fetch. Nothing but
the manifest and the index is fetched, and nothing is kept. With --json: {ref,
manifest_digest, known, lazy, index, index_trust, layer_bytes, metadata_bytes,
content_bytes, here_bytes, fetch_bytes, start_bytes}; start_bytes are fetched
before the image starts, fetch_bytes all in all.`,
		Example: `  shale plan registry.example/app:1`,
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			src, err := g.source(a[0], platform)
			if err != nil {
				return err
			}
			p, err := g.client().Plan(cmd.Context(), src)
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), p)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintf(w, "%s\n", p.Ref)
			fmt.Fprintf(w, "starts\t%s\n", planned(p))
			fmt.Fprintf(w, "metadata\t%s\n", size(p.MetadataBytes))
			fmt.Fprintf(w, "content\t%s, of which %s are here\n", size(p.ContentBytes), size(p.HereBytes))
			fmt.Fprintf(w, "to fetch\t%s before it starts, %s at most\n", size(p.StartBytes), size(p.FetchBytes))
			return w.Flush()
		},
	}
	cmd.Flags().StringVar(&platform, "platform", "", "platform of the image (default: this node's)")
	g.trustFlag(cmd)
	g.jsonFlag(cmd)
	return cmd
}

func planned(p *daemon.Plan) string {
	switch {
	case p.Lazy && p.Known:
		return "lazily; the node has its index"
	case p.Lazy:
		return fmt.Sprintf("lazily, by an index of kind %s (--index-trust %s)", p.Index, p.IndexTrust)
	}
	return "when all of it has been read, once; shale index --push or shale convert make it start lazily"
}
