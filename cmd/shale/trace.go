package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/fleet"
	"github.com/shale-image/shale/replace"
	"github.com/shale-image/shale/trace"
)

// exactReadAhead is the kernel's readahead, in KiB, at which nothing is read that
// nobody asked for.
const exactReadAhead = 4

func newTrace(g *globals) *cobra.Command {
	r := &runFlags{place: daemon.Place{ReadAheadKiB: exactReadAhead}}
	var output string
	cmd := &cobra.Command{
		Use:   "trace [flags] REF [--] [CMD...]",
		Short: "Run a container and record what it reads of its image",
		Long: `Run a container as shale run does, and record which blocks of which files it reads,
when, and how long it waits for them. The kernel's readahead is off, so that only
what the container itself reads is recorded; that makes it slower where nothing of
the image is here.

What runs read is always recorded on this node, at no cost that could be measured
(unless "traces" is "off" in the configuration); there shale trace show REF finds it,
of all runs together. This verb does so exactly, and with -o writes a file of this
run alone. docs/formats/trace.md tells what is in it.`,
		Example: `  shale trace --rm registry.example/app:1 -- python3 -c 'import numpy'
  shale trace show registry.example/app:1 --svg picture.svg
  shale trace --rm -o numpy.trace registry.example/app:1 -- python3 -c 'import numpy'
  shale trace merge numpy.trace web.trace -o app.trace`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if len(a) > 1 && a[1] == "--" {
				a = append(a[:1:1], a[2:]...)
			}
			r.record(func(t *trace.Trace) error {
				fmt.Fprintf(os.Stderr, "shale: %s\n", t.Summary())
				if output != "" {
					return writeTrace(output, t)
				}
				return nil
			})
			return r.execute(cmd, g, a)
		},
	}
	r.addFlags(g, cmd)
	r.shareFlag(cmd)
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write the trace of this run to")
	_ = cmd.MarkFlagFilename("output")
	cmd.AddCommand(newTraceShow(g), newTraceMerge())
	return cmd
}

// writeTrace writes a trace whole or not at all.
func writeTrace(name string, t *trace.Trace) error {
	if st, err := os.Stat(name); err == nil && !st.Mode().IsRegular() { // /dev/stdout, a pipe
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(t.Encode(f), f.Close())
	}
	return replace.With(name, 0o644, t.Encode)
}

func newTraceMerge() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "merge FILE...",
		Short: "Make one trace of several of the same image",
		Long: `Make one trace of several of the same image, of other commands, machines or days. A
block stands where the earliest of them has it. Of more than 64 runs the last are
told apart.`,
		Example: `  shale trace merge a.trace b.trace -o both.trace`,
		Args:    args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			t, err := readTraces(a)
			if err != nil {
				return err
			}
			if output == "" {
				return t.Encode(cmd.OutOrStdout())
			}
			return writeTrace(output, t)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write to (default: standard output)")
	_ = cmd.MarkFlagFilename("output")
	return cmd
}

// readTraces reads and merges files.
func readTraces(names []string) (*trace.Trace, error) {
	var all []*trace.Trace
	for _, name := range names {
		t, err := readTrace(name)
		if err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	t, err := trace.Merge(all...)
	if errors.Is(err, trace.ErrMismatch) {
		return nil, usageError{err}
	}
	return t, err
}

func readTrace(name string) (*trace.Trace, error) {
	f := os.Stdin
	if name != "-" {
		var err error
		if f, err = os.Open(name); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	return trace.Decode(f, name)
}

// imageTrace is what this node has recorded of an image.
func (g *globals) imageTrace(ctx context.Context, ref, platform string) (*trace.Trace, error) {
	r, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	return g.client().ImageTrace(ctx, r.String(), platform)
}

// fleetTrace is what nodes that share their traces have read of an image.
func (g *globals) fleetTrace(ctx context.Context, ref, platform string) (*trace.Trace, error) {
	repo, img, err := g.resolve(ctx, ref, platform)
	if err != nil {
		return nil, err
	}
	defer repo.Close()
	return fleet.Traces(ctx, repo, img)
}

func newTraceShow(g *globals) *cobra.Command {
	var platform, svg string
	var referrers bool
	cmd := &cobra.Command{
		Use:   "show FILE|REF",
		Short: "Show what was read of an image: when, how much, what was waited for",
		Long: `Show a trace: in FILE, or of all runs of the image REF on this node, those that run
now included. A name that is a file's is the file's.

For each file, in the order of their first reads: when that was, how long readers
waited for its blocks, how much of it was read, and by how many of the runs. Files of which all that was read is
also in others are marked with "or" and these. --json writes the trace itself, as
docs/formats/trace.md has it.`,
		Example: `  shale trace show registry.example/app:1
  shale trace show --svg picture.svg numpy.trace
  shale trace show --json registry.example/app:1 >app.trace
  shale trace show --from-referrers registry.example/app:1`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			t, err := g.findTrace(cmd.Context(), a[0], platform, referrers)
			if err != nil {
				return err
			}
			if svg != "" {
				if err := drawTrace(svg, t, a[0]); err != nil {
					return err
				}
			}
			switch {
			case g.json:
				return t.Encode(cmd.OutOrStdout())
			case svg != "":
				return nil
			}
			return printTrace(cmd.OutOrStdout(), t)
		},
	}
	f := cmd.Flags()
	f.StringVar(&platform, "platform", "", "platform of the image (default: the one that is here, or this node's)")
	f.StringVar(&svg, "svg", "", "file to draw a picture to")
	_ = cmd.MarkFlagFilename("svg", "svg")
	f.BoolVar(&referrers, "from-referrers", false, "what nodes have pushed beside the image (shale run --share-traces)")
	g.jsonFlag(cmd)
	return cmd
}

// findTrace finds the trace that a name means.
func (g *globals) findTrace(ctx context.Context, name, platform string, referrers bool) (*trace.Trace, error) {
	if referrers {
		return g.fleetTrace(ctx, name, platform)
	}
	if _, err := os.Stat(name); err == nil || name == "-" {
		return readTrace(name)
	}
	t, err := g.imageTrace(ctx, name, platform)
	var usage usageError
	if errors.As(err, &usage) {
		return nil, fmt.Errorf("%s: neither a file nor a reference: %w", name, fs.ErrNotExist)
	}
	return t, err
}

func drawTrace(name string, t *trace.Trace, title string) error {
	return replace.With(name, 0o644, func(w io.Writer) error { return t.SVG(w, title) })
}

func printTrace(w io.Writer, t *trace.Trace) error {
	fmt.Fprintf(w, "image    %s\n", quote(t.Manifest))
	fmt.Fprintf(w, "read     %s\n", t.Summary())
	for _, r := range t.Runs {
		fmt.Fprintf(w, "run      %s\n", quote(describeRun(r)))
	}
	_, err := fmt.Fprintf(w, "\n%10s  %10s  %9s  %7s  FILE\n", "AT", "WAITED", "READ", "RUNS")
	for _, f := range t.ByFile() {
		if err != nil {
			return err
		}
		name := quote(f.Path)
		if f.Shared() {
			for _, p := range f.Also {
				name += " or " + quote(p)
			}
			if n := f.Others - len(f.Also); n > 0 {
				name += fmt.Sprintf(" or %d others", n)
			}
		}
		wait := "-"
		if f.Wait > 0 {
			wait = fmt.Sprintf("%.2f ms", f.Wait.Seconds()*1e3)
		}
		_, err = fmt.Fprintf(w, "%7.2f ms  %10s  %9s  %7d  %s\n", f.At.Seconds()*1e3, wait, size(f.Bytes), f.By.Len(), name)
	}
	return err
}

func describeCommand(command []string) string {
	if len(command) == 0 {
		return "(the image's own command)"
	}
	return strings.Join(command, " ")
}

func describeRun(r trace.Run) string {
	s := fmt.Sprintf("%s %s", r.ID, r.Started.Format("2006-01-02 15:04:05"))
	s += " " + describeCommand(r.Command) + fmt.Sprintf(" [%s, readahead %d KiB]", r.CPU, r.ReadAhead)
	if r.Lost {
		s += " (more was read than is here)"
	}
	return s
}
