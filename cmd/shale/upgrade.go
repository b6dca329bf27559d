package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
)

func newUpgrade(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "upgrade [PROGRAM]",
		Short: "Have the running service go on with another version of this program",
		Long: `Have the running service go on with this program, or with PROGRAM. Images stay
mounted, and who reads them notices no more than a pause. The service's worker is
exchanged; its keeper, which only holds what must not go away, stays as it is until
the service ends. If the new program cannot serve the service stays what it was. If
no service runs there is nothing to do. With --json: {processes[]}.`,
		Example: `  cp shale-new /usr/local/bin/shale && shale upgrade`,
		Args:    args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			name := "/proc/self/exe"
			if len(a) == 1 {
				name = a[0]
			}
			exe, err := os.Open(name)
			if err != nil {
				return err
			}
			defer exe.Close()
			st, err := (&daemon.Client{Root: g.root}).Upgrade(cmd.Context(), exe)
			if errors.Is(err, daemon.ErrNotRunning) || errors.Is(err, fs.ErrNotExist) {
				st = &daemon.Status{Processes: []daemon.Process{}}
			} else if err != nil {
				return fmt.Errorf("upgrade: %w", err)
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), map[string]any{"processes": st.Processes})
			}
			return nil
		},
	}
	g.jsonFlag(cmd)
	return cmd
}
