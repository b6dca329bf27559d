package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/inspect"
)

func newDiff(g *globals) *cobra.Command {
	o := &opener{g: g}
	var stat bool
	cmd := &cobra.Command{
		Use:   "diff REF REF",
		Short: "How two images differ, and what they share",
		Long: `List the names that two images do not have alike, one a line: + added, - removed,
~ changed, with what has changed: type, or content, target (of a link), device,
mode, owner, mtime, xattrs, links. Contents are compared by the digests of their
chunks; data are only fetched of files that the images cut in different ways, and
nothing that is on the node.
The exit code is 0 if the images are alike, 1 if they differ. With --bootstrap
FILE the first image is that of FILE, and only one REF is given.

--json prints an object:
  from, to
  changes[]  path, kind ("added", "removed", "changed"), what[]
  stat       added, removed, changed (names); bytes of the different chunks that
             files have: from_bytes, to_bytes, shared_bytes (both have them);
             stored by the second image: to_stored, shared_stored`,
		Example: `  shale diff localhost:5000/app:1-shale localhost:5000/app:2-shale
  shale diff --stat oci:./layout:1 oci:./layout:2`,
		Args: o.args(2, 2),
		RunE: func(cmd *cobra.Command, a []string) error {
			from, rest, err := o.open(cmd.Context(), a)
			if err != nil {
				return err
			}
			defer from.Close()
			to, _, err := (&opener{g: g, platform: o.platform}).open(cmd.Context(), rest)
			if err != nil {
				return err
			}
			defer to.Close()
			d, err := inspect.Diff(cmd.Context(), from, to)
			if err != nil {
				return err
			}
			switch w := cmd.OutOrStdout(); {
			case g.json:
				err = printJSON(w, d)
			case stat:
				err = printStat(w, d.Stat)
			default:
				err = printChanges(w, d.Changes)
			}
			if err == nil && len(d.Changes) > 0 {
				err = exitStatus(1)
			}
			return err
		},
	}
	o.flags(cmd)
	cmd.Flags().BoolVar(&stat, "stat", false, "only count: names, and bytes in chunks that both have")
	g.jsonFlag(cmd)
	return cmd
}

func printChanges(w io.Writer, changes []inspect.Change) error {
	bw := bufio.NewWriter(w)
	mark := map[string]string{"added": "+", "removed": "-", "changed": "~"}
	for _, c := range changes {
		line := mark[c.Kind] + " " + quote(c.Path)
		if len(c.What) > 0 {
			line += " (" + strings.Join(c.What, ", ") + ")"
		}
		fmt.Fprintln(bw, line)
	}
	return bw.Flush()
}

func printStat(w io.Writer, s inspect.Stat) error {
	_, err := fmt.Fprintf(w, `names    %d added, %d removed, %d changed
content  %s and %s, shared %s%s
stored   %s, of which %s are new%s
`, s.Added, s.Removed, s.Changed,
		size(s.FromBytes), size(s.ToBytes), size(s.SharedBytes), percent(s.SharedBytes, s.ToBytes),
		size(s.ToStored), size(s.ToStored-s.SharedStored), percent(s.ToStored-s.SharedStored, s.ToStored))
	return err
}
