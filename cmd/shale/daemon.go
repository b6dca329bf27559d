package main

import (
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/daemon"
)

func newDaemon(g *globals) *cobra.Command {
	var (
		idle  time.Duration
		ready int
	)
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run the node service in the foreground",
		Long: `Run the node service in the foreground. There is no need to: verbs that need it
start it, and it ends by itself when nothing was mounted for a while.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var w io.WriteCloser
			if ready >= 0 {
				w = os.NewFile(uintptr(ready), "ready")
			}
			cfg, err := config.Load()
			if err != nil {
				return daemon.NotReady(w, err)
			}
			if err := cfg.SetProxy(); err != nil {
				return daemon.NotReady(w, err)
			}
			return daemon.Run(cmd.Context(), daemon.Config{
				Root: g.root, Idle: idle, Version: version, Ready: w, Registries: cfg,
				Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
			})
		},
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "stop",
		Short: "End the node service, if nothing is mounted",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := (&daemon.Client{Root: g.root}).Stop(cmd.Context())
			if errors.Is(err, daemon.ErrNotRunning) || errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		},
	})
	cmd.Flags().DurationVar(&idle, "idle", time.Minute, "end after this long without a mount; 0 means never")
	cmd.Flags().IntVar(&ready, "ready-fd", -1, "descriptor to tell when serving")
	cmd.Flags().MarkHidden("ready-fd")
	return cmd
}
