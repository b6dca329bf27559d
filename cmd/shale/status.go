package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
)

func newStatus(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "What is mounted, what was fetched, what is missing",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := (&daemon.Client{Root: g.root}).Status(cmd.Context())
			if errors.Is(err, daemon.ErrNotRunning) || errors.Is(err, fs.ErrNotExist) {
				st = &daemon.Status{
					Root: g.root, Version: version, Processes: []daemon.Process{},
					Mounts: []daemon.MountStatus{}, Images: []daemon.ImageStatus{},
				}
			} else if err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), st)
			}
			return printStatus(cmd.OutOrStdout(), st)
		},
	}
	g.jsonFlag(cmd)
	return cmd
}

func printStatus(w io.Writer, st *daemon.Status) error {
	if len(st.Processes) == 0 {
		fmt.Fprintf(w, "no service runs on %s, nothing is mounted\n", st.Root)
		return nil
	}
	fmt.Fprintf(w, "service  %s, pid %d, up %v\n", st.Root, st.Processes[0].PID, time.Since(*st.Started).Round(time.Second))
	fmt.Fprintf(w, "pool     %s here of %s known, %s on disk\n", size(st.Pool.Present), size(st.Pool.Address), size(st.Pool.Disk))
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(st.Images) > 0 {
		fmt.Fprintf(tw, "\nIMAGE\tPLATFORM\tDIGEST\n")
	}
	for _, im := range st.Images {
		for _, ref := range im.Refs {
			fmt.Fprintf(tw, "%s\t%s\t%.19s\n", ref, im.Platform, im.ManifestDigest)
		}
	}
	if len(st.Mounts) > 0 {
		fmt.Fprintf(tw, "\nMOUNT\tIMAGE\tFACE\tREQUESTS\tFETCHED\tMISSING\tERRORS\n")
	}
	for _, m := range st.Mounts {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%s\t%s\t%d\n", m.Where, m.Ref, m.Face, m.Fill.Requests,
			size(m.Fill.FetchedBytes), size(m.MissingBytes), m.Fill.Errors)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, m := range st.Mounts {
		for _, f := range m.Fill.LastErrors {
			fmt.Fprintf(w, "\n%s: %s: %s\n", m.Where, f.Time.Format(time.RFC3339), f.Error)
		}
	}
	return nil
}
