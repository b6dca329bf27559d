package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/inspect"
)

func newCheck(g *globals) *cobra.Command {
	o := &opener{g: g}
	var quiet bool
	cmd := &cobra.Command{
		Use:   "check REF",
		Short: "Verify an image: its structure, then every byte",
		Long: `Verify an image where it is stored: that bootstrap, manifest and blobs agree with
each other, that each object has the size and the digest by which it is named,
and each chunk its digest. All of it is fetched, also of an image that is on the
node: what that has is verified by shale fsck and shale scrub. Every defect is printed,
with the files it touches; if there is one, the exit code is 7. Of an image that
is not converted the objects are verified.

--json prints an object:
  ref, manifest_digest, converted; objects and bytes (verified), chunks
  defects[]  object ("blob sha256:..."), offset in it (-1: no single place),
             length (bytes there that are bad), chunk (the digest it should
             have), files (that have the chunk), problem
  notes[]    what is odd, but no defect`,
		Example: `  shale check localhost:5000/debian:12-shale
  shale check --bootstrap image.boot --blobs ./blobs`,
		Args: o.args(1, 1),
		RunE: func(cmd *cobra.Command, a []string) error {
			im, _, err := o.peek(cmd.Context(), a, false)
			if err != nil {
				return err
			}
			defer im.Close()
			var show func(done, total int64)
			if !quiet && !g.json {
				p := newProgress()
				defer p.end()
				show = func(done, total int64) { p.step("check", done, total) }
			}
			r, err := inspect.Check(cmd.Context(), im, show)
			if err != nil {
				return err
			}
			if g.json {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				err = printResult(cmd.OutOrStdout(), r)
			}
			if n := len(r.Defects); err == nil && n > 0 {
				err = fmt.Errorf("%s: %w: defects found: %d", im.Name, chunk.ErrCorrupt, n)
			}
			return err
		},
	}
	o.flags(cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	g.jsonFlag(cmd)
	return cmd
}

// shownFiles is how many files of a defect are named to a person.
const shownFiles = 5

func printResult(w io.Writer, r *inspect.Result) error {
	for _, d := range r.Defects {
		line := quote(d.Object)
		if d.Offset >= 0 {
			line += fmt.Sprintf(": at offset %d", d.Offset)
		}
		if d.Chunk != "" {
			line += fmt.Sprintf(": chunk %s of %d stored bytes", d.Chunk, d.Length)
		}
		fmt.Fprintf(w, "%s: %s\n", line, quote(d.Problem))
		if len(d.Files) > 0 {
			fmt.Fprintf(w, "  in %s\n", someOf(d.Files))
		}
	}
	for _, n := range r.Notes {
		fmt.Fprintf(w, "note: %s\n", quote(n))
	}
	if len(r.Defects) > 0 {
		return nil // the error says the rest
	}
	what := "not converted"
	if r.Converted {
		what = fmt.Sprintf("%d chunks", r.Chunks)
	}
	_, err := fmt.Fprintf(w, "%s: no defect in %d objects of %s (%s)\n", quote(r.Ref), r.Objects, size(r.Bytes), what)
	return err
}

func someOf(files []string) string {
	shown := make([]string, 0, shownFiles)
	for _, f := range files[:min(len(files), shownFiles)] {
		shown = append(shown, quote(f))
	}
	s := strings.Join(shown, ", ")
	if n := len(files) - len(shown); n > 0 {
		s += fmt.Sprintf(" and %d more", n)
	}
	return s
}
