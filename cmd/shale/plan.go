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
cost: bytes of metadata, bytes that are here already, bytes to fetch. About an image
that the node knows no registry is asked; of others nothing but the manifest and the
index is fetched, and nothing is kept. "In all" counts each
stored byte once, and what gzip layers need besides to be read in parts. "At most"
is a bound however the image is read: parts that overlap are fetched again. Not in
it are manifest and config, requests that fail or are slow and are made again, and
up to 64 KiB that a request passes over to bring what lies behind. With --json:
{ref, manifest_digest, known, lazy, reason, index, index_trust, layer_bytes,
metadata_bytes, content_bytes, here_bytes, start_bytes, fetch_bytes, most_bytes,
layers}; reason is why it is not lazy; start_bytes are fetched before the image
starts, fetch_bytes in all, most_bytes at most; layers[] are {digest, size,
read_bytes, pieces, one_frame}: what one read of it waits for at most, the number
of pieces that come whole (0: any part can be had), and whether it is one zstd
frame, of which nothing can be had without all that lies before it.`,
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
			if p.Lazy {
				fmt.Fprintf(w, "content\t%s, of which %s are here\n", size(p.ContentBytes), size(p.HereBytes))
			} else {
				fmt.Fprintf(w, "content\tknown when it has been read\n")
			}
			fmt.Fprintf(w, "to fetch\t%s before it starts, %s in all, %s at most\n", size(p.StartBytes), size(p.FetchBytes), size(p.MostBytes))
			if err := w.Flush(); err != nil || !p.Lazy {
				return err
			}
			fmt.Fprintf(w, "\nLAYER\tSIZE\tONE READ BRINGS AT MOST\n")
			for _, l := range p.Layers {
				fmt.Fprintf(w, "%s\t%s\t%s\n", l.Digest, size(l.Size), oneRead(l.ReadBytes, l.Pieces, l.OneFrame))
			}
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
		return fmt.Sprintf("lazily; the node has its index, of kind %s (--index-trust %s)", p.Index, p.IndexTrust)
	case p.Lazy:
		return fmt.Sprintf("lazily, by an index of kind %s (--index-trust %s)", p.Index, p.IndexTrust)
	}
	return readWhole + quote(p.Reason)
}

// readWhole is how an image starts that has no index of use; why follows.
const readWhole = "when all of it has been read, once: "

// oneRead is what one read of a layer brings at most.
func oneRead(n int64, pieces int, oneFrame bool) string {
	switch {
	case oneFrame:
		return size(n) + ", all of it: it is one zstd frame"
	case pieces == 1:
		return size(n) + ", all of it"
	}
	return size(n)
}
