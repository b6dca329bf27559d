package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/packages"
	"github.com/shale-image/shale/trace"
)

func newAccessed(g *globals) *cobra.Command {
	var platform string
	var from []string
	var referrers, spdx bool
	cmd := &cobra.Command{
		Use:   "accessed REF",
		Short: "List the files and packages of an image that its runs have really read",
		Long: `List which files of an image were read by its runs, on this node or as traces tell
(--from), and which of its packages they are of: of dpkg, apk or rpm, as the database
in the image has it. Traces of shale trace are exact; in others the kernel's readahead
makes a file that was read look read to a greater part, but no other file.

Where several files have the same content nobody can tell by what was read which of
them it was; "others" counts those that it may have been instead. A package of which
nothing else was read is "possibly" read. Files without content are never read.

--json prints {ref, manifest_digest, runs, databases[], files[], packages[]}; of a file
{path, size, read_bytes, packages[], others, also[]}, of a package {name, version, arch,
status ("read", "possibly", "never"), files, size, read_files, read_bytes}. --spdx
prints an SPDX 2.3 document of what was read; that fetches and hashes these files.`,
		Example: `  shale accessed registry.example/app:1
  shale accessed --from web.trace --from job.trace --json registry.example/app:1
  shale accessed --spdx registry.example/app:1 >app.spdx.json`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			switch {
			case spdx && g.json:
				return usageError{errors.New("--spdx and --json: one or the other")}
			case referrers && len(from) > 0:
				return usageError{errors.New("--from and --from-referrers: one or the other")}
			}
			var t *trace.Trace
			var err error
			if len(from) > 0 {
				t, err = readTraces(from)
			} else if referrers {
				t, err = g.fleetTrace(cmd.Context(), a[0], platform)
			} else {
				t, err = g.imageTrace(cmd.Context(), a[0], platform)
			}
			if err != nil {
				return err
			}
			root, m, done, err := g.lookInto(cmd.Context(), a[0], platform)
			if err != nil {
				return err
			}
			defer done()
			if m.ManifestDigest != t.Manifest {
				return usageError{fmt.Errorf("%w: %s, and %s is %s", trace.ErrMismatch, t.Manifest, a[0], m.ManifestDigest)}
			}
			db, err := packages.Read(root.FS())
			if err != nil { // what was read is worth knowing all the same
				fmt.Fprintf(os.Stderr, "shale: the packages are not known: %v\n", err)
				db = &packages.Database{}
			}
			out, err := join(root, t, db)
			if err != nil {
				return err
			}
			out.Ref = m.Ref
			if n := len(out.absent); n > 0 {
				fmt.Fprintf(os.Stderr, "shale: %d names in the traces are of no file with content, %s for one: they are left out\n", n, quote(out.absent[0]))
			}
			switch {
			case g.json:
				return printJSON(cmd.OutOrStdout(), out)
			case spdx:
				return printSPDX(cmd.Context(), cmd.OutOrStdout(), root, out, t)
			}
			return printAccessed(cmd.OutOrStdout(), out)
		},
	}
	f := cmd.Flags()
	f.StringVar(&platform, "platform", "", "platform of the image (default: this node's)")
	f.StringArrayVar(&from, "from", nil, "file with a trace (may be repeated; default: what this node has recorded)")
	_ = cmd.MarkFlagFilename("from")
	f.BoolVar(&referrers, "from-referrers", false, "what nodes have pushed beside the image (shale run --share-traces)")
	f.BoolVar(&spdx, "spdx", false, "print an SPDX 2.3 document (JSON)")
	g.trustFlag(cmd)
	g.jsonFlag(cmd)
	return cmd
}

// lookInto mounts an image for this process alone, and not as a run of it. The
// caller calls done.
func (g *globals) lookInto(ctx context.Context, ref, platform string) (root *os.Root, m *daemon.Mounted, done func(), err error) {
	src, err := g.source(ref, platform)
	if err != nil {
		return nil, nil, nil, err
	}
	place := daemon.Place{Where: "shale accessed", Unrecorded: true, NoPack: true, NoComplete: true}
	cleanup := func() {}
	if os.Geteuid() != 0 { // without root an image can only be shown somewhere
		if place.Dir, err = os.MkdirTemp("", "shale-accessed-"); err != nil {
			return nil, nil, nil, err
		}
		cleanup = func() {
			_ = mount.Detach(place.Dir, false)
			_ = os.Remove(place.Dir)
		}
	}
	if m, err = g.client().Mount(ctx, src, place, tellNotes); err != nil {
		cleanup()
		return nil, nil, nil, err
	}
	dir := place.Dir
	if m.FS != nil {
		defer m.FS.Close()
		dir = fmt.Sprintf("/proc/self/fd/%d", m.FS.Fd())
	}
	if root, err = os.OpenRoot(dir); err != nil {
		cleanup()
		return nil, nil, nil, err
	}
	return root, m, func() {
		root.Close()
		cleanup()
	}, nil
}

func printAccessed(w io.Writer, a *accessed) error {
	var read, size_, total int64
	count := map[string]int{}
	for _, f := range a.Files {
		read, size_ = read+f.ReadBytes, size_+f.Size
	}
	for _, p := range a.Packages {
		count[p.Status]++
		total += p.Size
	}
	fmt.Fprintf(w, "%s\n%d runs read %s of %d files of %s\n", quote(a.Ref), a.Runs, size(read), len(a.Files), size(size_))
	if len(a.Packages) > 0 {
		fmt.Fprintf(w, "%d of %d packages were read, %d possibly, %d never; all have %s\n", count[statusRead], len(a.Packages), count[statusPossibly], count[statusNever], size(total))
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(p *accessedPackage) {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d of %d\t%s of %s\n", p.Status, quote(p.Name), quote(p.Version), p.ReadFiles, p.Files, size(p.ReadBytes), size(p.Size))
	}
	if len(a.Packages) > 0 {
		fmt.Fprintf(tw, "\nREAD\tPACKAGE\tVERSION\tFILES\tBYTES\n")
	}
	for i := range a.Packages {
		row(&a.Packages[i])
	}
	fmt.Fprintf(tw, "\nFILE\tREAD\tPACKAGE\n")
	for _, f := range a.Files {
		of := "-"
		if len(f.Packages) > 0 {
			of = f.Packages[0]
		}
		if f.Others > 0 {
			of += fmt.Sprintf(" (or one of %d others)", f.Others)
		}
		fmt.Fprintf(tw, "%s\t%s of %s\t%s\n", quote(f.Path), size(f.ReadBytes), size(f.Size), quote(of))
	}
	return tw.Flush()
}
