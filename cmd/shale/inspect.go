package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/inspect"
	"github.com/shale-image/shale/reader"
)

func newInspect(g *globals) *cobra.Command {
	o := &opener{g: g}
	cmd := &cobra.Command{
		Use:   "inspect REF",
		Short: "What an image consists of: layers, blobs, chunks, sizes",
		Long: `Show what an image consists of where it is stored, and how it starts. Only its
manifest and its index are fetched, and a byte of a layer, to see whether parts can be
had; they always are, since the node keeps of an image what it takes to read it, not
how its registry has it.

--json prints an object; all sizes are bytes:
  ref, manifest_digest, platform, layer_bytes
  converted  whether it brings its index along;  format  "rafs-v6" or "oci"
  lazy       whether it starts before its data is here, by which index
             (nydus, index, toc, soci), of index_bytes, at what index_trust;
             reason  why it does not
  layers[]   digest, media_type, size, role ("layer", "blob", "bootstrap")
  blobs[]    digest, size, compressor, digester, chunk_size, chunks (in the
             blob), used_chunks (by files), used_stored, used_bytes; read_bytes
             (stored, that one read waits for at most), pieces (that come whole;
             0: any part can be had), one_frame (all of it is one zstd frame)
  content    files, directories, symlinks, others, hard_links; file_bytes,
             hole_bytes, references (of files to chunks), referenced_bytes;
             chunks (different ones), unique_bytes, stored_bytes`,
		Example: `  shale inspect localhost:5000/debian:12-shale
  shale inspect --json oci:./layout:tag
  shale inspect --bootstrap image.boot --blobs ./blobs`,
		Args: o.args(1, 1),
		RunE: func(cmd *cobra.Command, a []string) error {
			im, _, err := o.peek(cmd.Context(), a, true)
			if err != nil {
				return err
			}
			defer im.Close()
			if im.Damage != nil && !im.Spare() {
				return im.Damage
			}
			r := inspect.Inspect(im)
			if r.Lazy && !im.HasRanges(cmd.Context()) {
				r.Lazy, r.Reason = false, reader.ErrNoRanges.Error()
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), r)
			}
			return printReport(cmd.OutOrStdout(), r)
		},
	}
	o.flags(cmd)
	g.jsonFlag(cmd)
	return cmd
}

// starts tells which path an image takes to its first start.
func starts(r *inspect.Report) string {
	switch {
	case !r.Lazy:
		return readWhole + r.Reason
	case r.Converted:
		return fmt.Sprintf("lazily, by its own index of %s", size(r.IndexBytes))
	case r.Index == string(reader.SOCI):
		return fmt.Sprintf("lazily, as it is, by a SOCI index of %s, small layers included (--index-trust %s)", size(r.IndexBytes), r.IndexTrust)
	}
	return fmt.Sprintf("lazily, as it is, by an index of %s (--index-trust %s)", size(r.IndexBytes), r.IndexTrust)
}

func printReport(w io.Writer, r *inspect.Report) error {
	fmt.Fprintln(w, quote(r.Ref))
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(tw, "%s\t%s\n", name, quote(fmt.Sprintf(format, args...)))
	}
	if r.ManifestDigest != "" {
		row("manifest", "%s", r.ManifestDigest)
	}
	if r.Platform != "" {
		row("platform", "%s", r.Platform)
	}
	row("format", "%s", r.Format)
	row("starts", "%s", starts(r))
	if c := r.Content; c != nil {
		row("files", "%d files, %d directories, %d symbolic links, %d others, %d hard links",
			c.Files, c.Directories, c.Symlinks, c.Others, c.HardLinks)
		row("content", "%s, of which %s are holes", size(c.FileBytes), size(c.HoleBytes))
		row("chunks", "%d different ones of %s, stored as %s%s", c.Chunks, size(c.Unique), size(c.Stored), percent(c.Stored, c.Unique))
		row("dedup", "%s%s of the content is shared: %d references to %d chunks",
			size(c.Referenced-c.Unique), percent(c.Referenced-c.Unique, c.Referenced), c.References, c.Chunks)
	}
	if len(r.Layers) > 0 {
		row("layers", "%d of %s", len(r.Layers), size(r.LayerBytes))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if len(r.Layers) > 0 {
		fmt.Fprintf(tw, "\nLAYER\tROLE\tSIZE\tTYPE\n")
	}
	for _, l := range r.Layers {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", l.Digest, l.Role, size(l.Size), quote(l.MediaType))
	}
	if len(r.Blobs) > 0 {
		fmt.Fprintf(tw, "\nBLOB\tSIZE\tCHUNKS\tUSED\tSTORED\tCONTENT\tFORM\tONE READ BRINGS AT MOST\n")
	}
	for _, b := range r.Blobs {
		fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%s\t%s\t%s\t%s\n", quote(b.Digest), size(b.Size), b.Chunks, b.UsedChunks,
			size(b.UsedStored), size(b.UsedBytes), form(b), oneRead(b.ReadBytes, b.Pieces, b.OneFrame))
	}
	return tw.Flush()
}

// form is how a blob's chunks are cut, compressed and named.
func form(b inspect.Blob) string {
	if b.ChunkSize == 0 {
		return "-"
	}
	return fmt.Sprintf("%dK %s %s", b.ChunkSize>>10, b.Compressor, b.Digester)
}

// percent is " (34 %)", or nothing of nothing.
func percent(part, whole int64) string {
	if whole <= 0 {
		return ""
	}
	return fmt.Sprintf(" (%.0f %%)", 100*float64(part)/float64(whole))
}
