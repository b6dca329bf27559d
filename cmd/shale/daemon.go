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
		quota string
	)
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run the node service in the foreground",
		Long: `Run the node service in the foreground. There is no need to: verbs that need it
start it, and it ends by itself when nothing was mounted for a while.

It is two processes: a keeper, which this one becomes, and a worker that it starts
and, should it die, replaces; who reads what is mounted (face device, Linux 6.9)
notices a pause at most.

SIGTERM and SIGINT end it at once. What is being pulled breaks off and goes on
with the next pull. Images that are mounted stay visible, but reads of what is
not in memory fail with EIO until they are unmounted and mounted again; images
that were complete when they were mounted (face direct) do not need the service. With
the face fanotify, before all of an image is here, readers would see zeros: the service
then ends when they are complete, or unmounted, and not before.
The pool of the node's chunks may take as much disk as there is, or as the quota
allows ("cache": {"quota": "20G"} in the configuration, or --cache-quota). Beyond
that, what was used longest ago is evicted, but nothing of images that are pinned,
or mounted with the face direct.
A service that verbs start writes its log to daemon.log in the root directory,
10 MiB at most and as much in daemon.log.1.`,
		Example: `  shale daemon --idle 0
  shale daemon --cache-quota 20G
  shale daemon stop`,
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
			if quota != "" {
				if cfg.Cache.Quota, err = config.ParseSize(quota); err != nil {
					return daemon.NotReady(w, usageError{err})
				}
			}
			return daemon.Run(cmd.Context(), daemon.Config{
				Root: g.root, Idle: idle, Version: version, Ready: w, Registries: cfg,
				Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
			})
		},
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "stop",
		Short: "End the node service, if nothing is mounted or being pulled",
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
	cmd.Flags().StringVar(&quota, "cache-quota", "", "bytes the pool may take on disk, like 20G (default: the configuration's, or no limit)")
	cmd.Flags().IntVar(&ready, "ready-fd", -1, "descriptor to tell when serving")
	cmd.Flags().MarkHidden("ready-fd")
	return cmd
}
