package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/runtime"
	"github.com/shale-image/shale/trace"
)

type runFlags struct {
	platform, face, network, hostname, memory, runtime, entrypoint string
	volumes                                                        []string
	remove, interactive, terminal, readOnly                        bool
	cpus                                                           float64
	flags                                                          runtime.Flags

	place daemon.Place // how the image is mounted; what run says of it is added
	out   *os.File     // what the container prints goes there; default standard output
	// ran, if not nil, is called when the container has ended and its mount is
	// still there.
	ran func(*daemon.Client, *daemon.Mounted) error
}

func newRun(g *globals) *cobra.Command {
	r := &runFlags{}
	var file string
	cmd := &cobra.Command{
		Use:   "run [flags] REF [CMD...]",
		Short: "Run a container of an image, at once",
		Long: `Run a container of an image in the foreground. It starts as soon as the image's
index is here; data come when they are read. Everything after REF belongs to the
command. The exit code is the container's; 125, 126 and 127 mean what they mean
for docker run. Interrupted before there is a container, nothing is left and the
code is 130.`,
		Example: `  shale run --rm localhost:5000/debian:12-shale python3 -c 'print(1)'
  shale run --rm -it -v ./src:/src -w /src localhost:5000/debian:12-shale bash`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if file != "" {
				r.record(func(t *trace.Trace) error { return writeTrace(file, t) })
			}
			return r.execute(cmd, g, a)
		},
	}
	r.addFlags(g, cmd)
	r.shareFlag(cmd)
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().StringVar(&file, "trace", "", "file to write to what was read of the image, with the usual readahead (see shale trace)")
	_ = cmd.MarkFlagFilename("trace")
	return cmd
}

// execute runs the container of a command line.
func (r *runFlags) execute(cmd *cobra.Command, g *globals, a []string) error {
	r.flags.Args = a[1:]
	if r.place.ShareTraces {
		r.served()
	}
	if cmd.Flags().Changed("entrypoint") {
		r.flags.Entrypoint = &r.entrypoint
	}
	code, err := run(cmd.Context(), g, a[0], r)
	var usage usageError
	switch {
	case errors.As(err, &usage):
		return err
	case errors.Is(err, context.Canceled):
		return err
	case err != nil:
		tell(err)
	}
	if code != 0 {
		return exitStatus(code)
	}
	return nil
}

// served makes the face one that the service serves, unless another is asked for:
// what the kernel reads alone, of a complete image, nobody can record.
func (r *runFlags) served() {
	if r.face == mount.FaceAuto {
		r.face = "device"
	}
}

// record has fn called with what the container has read.
func (r *runFlags) record(fn func(*trace.Trace) error) {
	r.served()
	r.ran = func(c *daemon.Client, m *daemon.Mounted) error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // also if the container was interrupted
		defer cancel()
		t, err := c.MountTrace(ctx, m.ID)
		if err != nil {
			return err
		}
		return fn(t)
	}
}

func (r *runFlags) shareFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&r.place.ShareTraces, "share-traces", false, "push what was read beside the image when the container ends")
}

// addFlags adds the flags of a run to a command.
func (r *runFlags) addFlags(g *globals, cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&r.remove, "rm", false, "remove what the container wrote when it ends")
	f.BoolVarP(&r.interactive, "interactive", "i", false, "keep standard input open")
	f.BoolVarP(&r.terminal, "tty", "t", false, "give the container a terminal")
	f.StringArrayVarP(&r.flags.Env, "env", "e", nil, "K=V, or K for the caller's value")
	f.StringArrayVarP(&r.volumes, "volume", "v", nil, "SRC:DST[:ro]: show a host path in the container")
	f.StringVarP(&r.flags.WorkingDir, "workdir", "w", "", "working directory")
	f.StringVarP(&r.flags.User, "user", "u", "", "user[:group], names or numbers")
	f.StringVar(&r.entrypoint, "entrypoint", "", "instead of the image's")
	f.StringVar(&r.hostname, "hostname", "", "host name in the container")
	f.StringVar(&r.network, "net", "host", "host or none")
	f.StringVarP(&r.memory, "memory", "m", "", "memory limit (512m, 2g)")
	f.Float64Var(&r.cpus, "cpus", 0, "limit in processors (1.5)")
	f.BoolVar(&r.readOnly, "read-only", false, "no writes to the root file system")
	f.StringVar(&r.platform, "platform", "", "platform of the image (default: this node's)")
	g.trustFlag(cmd)
	g.shareIndexFlag(cmd)
	faceFlag(cmd, &r.face)
	completeFlag(cmd, &r.place.NoComplete)
	f.StringVar(&r.runtime, "runtime", "", "OCI runtime (default: crun, else runc)")
}

// command is what says which of an image's programs runs, for traces and packs.
func (r *runFlags) command() []string {
	if r.flags.Entrypoint == nil {
		return r.flags.Args
	}
	return append([]string{reader.OtherEntrypoint + *r.flags.Entrypoint}, r.flags.Args...)
}

// imageConfig is what of an image's config a run needs.
type imageConfig struct {
	Config runtime.ImageConfig `json:"config"`
}

func run(ctx context.Context, g *globals, ref string, r *runFlags) (int, error) {
	if err := checkFace(r.face); err != nil {
		return runtime.ExitFailed, err
	}
	src, err := g.source(ref, r.platform)
	if err != nil {
		return runtime.ExitFailed, err
	}
	var names []string
	if r.runtime != "" {
		names = []string{r.runtime}
	}
	oci, err := runtime.Find(names...)
	if err != nil {
		return runtime.ExitFailed, err
	}
	state := filepath.Join(g.root, "containers")
	if _, err := runtime.Clean(state); err != nil {
		return runtime.ExitFailed, err
	}
	o := runtime.Options{Runtime: oci, StateDir: state, Remove: r.remove, Stdout: os.Stdout, Stderr: os.Stderr}
	if r.out != nil {
		o.Stdout = r.out
	}
	if r.interactive || r.terminal {
		o.Stdin = os.Stdin
	}
	for _, v := range r.volumes {
		m, err := runtime.ParseMount(v)
		if err != nil {
			return runtime.ExitFailed, usageError{err}
		}
		o.Mounts = append(o.Mounts, m)
	}
	// The container's process comes up while the image is resolved.
	c, err := runtime.Start(o)
	if err != nil {
		return runtime.ExitFailed, err
	}
	defer c.Close()
	client := g.client()
	place := r.place
	place.Where, place.Face, place.Command = "container "+c.ID, r.face, r.command()
	m, err := client.Mount(ctx, src, place, tellNotes)
	if err != nil {
		return runtime.ExitFailed, err
	}
	defer m.FS.Close()
	cfg, err := r.config(m.Config)
	if err != nil {
		return runtime.ExitFailed, err
	}
	code, err := c.Run(ctx, m.FS, cfg)
	if code != 0 {
		tellFailures(client, m)
	}
	if r.ran != nil && (err == nil || ctx.Err() != nil) {
		if e := r.ran(client, m); e != nil && err == nil {
			err = e
			if code == 0 {
				code = runtime.ExitFailed
			}
		}
	}
	return code, err
}

func (r *runFlags) config(image json.RawMessage) (runtime.Config, error) {
	var ic imageConfig
	if err := json.Unmarshal(image, &ic); err != nil {
		return runtime.Config{}, fmt.Errorf("image config: %w", err)
	}
	cfg, err := runtime.Merge(ic.Config, r.flags)
	if err != nil {
		return cfg, usageError{err}
	}
	cfg.Terminal, cfg.ReadonlyRootfs = r.terminal, r.readOnly
	cfg.Hostname, cfg.CPUs = r.hostname, r.cpus
	switch r.network {
	case "host":
		cfg.Network = runtime.Host
	case "none":
		cfg.Network = runtime.None
	default:
		return cfg, usageError{fmt.Errorf("--net %q: want host or none", r.network)}
	}
	if r.memory != "" {
		if cfg.Memory, err = runtime.ParseBytes(r.memory); err != nil {
			return cfg, usageError{err}
		}
	}
	return cfg, nil
}

// tellFailures says why the container's reads failed, if they did: the
// container itself only saw EIO.
func tellFailures(client *daemon.Client, m *daemon.Mounted) {
	if m.Face == "direct" { // the kernel alone read it
		return
	}
	st, err := (&daemon.Client{Root: client.Root}).Status(context.Background())
	if err == nil {
		for _, s := range st.Mounts {
			if s.ID == m.ID {
				tellReads(s.Fill)
				return
			}
		}
		err = errors.New("another one runs now")
	}
	fmt.Fprintf(os.Stderr, "shale: the node service that served the image is gone, or stuck (%v): reads may have failed with I/O errors; its log is %s\n",
		err, filepath.Join(client.Root, "daemon.log"))
}

func tellReads(s fill.Stats) {
	if s.Errors == 0 {
		return
	}
	fmt.Fprintf(os.Stderr, "shale: %d reads of the image failed with I/O errors:\n", s.Errors)
	for _, f := range s.LastErrors {
		fmt.Fprintf(os.Stderr, "  %s\n", f.Error)
	}
}
