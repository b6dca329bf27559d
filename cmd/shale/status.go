package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/pool"
)

func newStatus(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [MOUNT]",
		Short: "What is mounted, what was fetched, what is missing",
		Long: `What is mounted, what was fetched and what is missing; of one mount, in detail.
MOUNT is its directory, its id or a container's id. It starts no service,
and answers within a second; where no processor is free even for that it fails after three.

With --json: {root, version, processes[], started, mounts[], images[], pool, full}, or of
one mount: {id, ref, manifest_digest, platform, where, face, since, dev,
content_bytes, missing_chunks, missing_bytes, survives, detached, incomplete, wrong, fill, source}.
survives says that the mount needs its registry no more: all of its image is here.
detached says that it needs no process of the service either, incomplete why the rest is
not fetched in the background, or what went wrong when it was last. wrong says how
what is mounted differs from the image, if the index it is mounted by turned out to
be untrue. fill is what readers caused: {read_bytes, requests, fetched_bytes, chunks, content_bytes, errors,
last_errors[]}. source is what was asked of the registry for it: {requests, retries,
bytes, errors}.`,
		Example: `  shale status
  shale status --json /mnt`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			st, err := (&daemon.Client{Root: g.root}).Status(cmd.Context())
			if errors.Is(err, daemon.ErrNotRunning) || errors.Is(err, fs.ErrNotExist) {
				st = &daemon.Status{
					Root: g.root, Version: version, Processes: []daemon.Process{},
					Mounts: []daemon.MountStatus{}, Images: []daemon.ImageStatus{},
				}
			} else if err != nil {
				return err
			}
			if len(a) == 1 {
				m, err := findMount(st, a[0])
				switch {
				case err != nil:
					return err
				case g.json:
					return printJSON(cmd.OutOrStdout(), m)
				}
				return printMount(cmd.OutOrStdout(), m)
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

// findMount finds a mount by its directory, its id or its container's; if one
// directory has several, the topmost, which came last.
func findMount(st *daemon.Status, name string) (*daemon.MountStatus, error) {
	dir, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	var found *daemon.MountStatus
	for i := range st.Mounts {
		m := &st.Mounts[i]
		if m.ID == name || m.Where == dir || m.Where == "container "+name {
			found = m
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%s: no mount of the service on %s: %w", name, st.Root, blob.ErrNotFound)
	}
	return found, nil
}

func printMount(w io.Writer, m *daemon.MountStatus) error {
	for _, line := range [][2]string{
		{"mount", fmt.Sprintf("%s, id %s, device %d:%d, face %s, up %v", m.Where, m.ID, unix.Major(m.Dev), unix.Minor(m.Dev),
			m.Face, time.Since(m.Since).Round(time.Second))},
		{"image", m.Ref},
		{"digest", m.ManifestDigest},
		{"platform", m.Platform},
		{"content", size(m.ContentBytes)},
		{"missing", missing(m)},
		{"read", size(m.Fill.ReadBytes) + " by the kernel"},
		{"fetched", fmt.Sprintf("%d chunks with %s of content, %s in %d requests, %d failed", m.Fill.Chunks,
			size(m.Fill.ContentBytes), size(m.Fill.FetchedBytes), m.Fill.Requests, m.Fill.Errors)},
		{"source", fmt.Sprintf("%s received in %d requests, %d of them retries, %d failed", size(m.Source.Bytes),
			m.Source.Requests, m.Source.Retries, m.Source.Errors)},
	} {
		if _, err := fmt.Fprintf(w, "%-9s %s\n", line[0], line[1]); err != nil {
			return err
		}
	}
	return printFailures(w, m)
}

// missing tells what is not here.
func missing(m *daemon.MountStatus) string {
	if m.Survives && m.Detached {
		return "0 chunks: it survives the loss of its registry, and of this service"
	}
	if m.Survives {
		return "0 chunks: it survives the loss of its registry"
	}
	s := fmt.Sprintf("%d chunks, %s to be fetched", m.MissingChunks, size(m.MissingBytes))
	if m.Incomplete != "" {
		s += "; " + quote(m.Incomplete)
	}
	return s
}

func printFailures(w io.Writer, m *daemon.MountStatus) error {
	if m.Wrong != "" {
		if _, err := fmt.Fprintf(w, "\n%s: this is not the image: %s\n", m.Where, m.Wrong); err != nil {
			return err
		}
	}
	for _, f := range m.Fill.LastErrors {
		if _, err := fmt.Fprintf(w, "\n%s: %s: %s\n", m.Where, f.Time.Format(time.RFC3339), f.Error); err != nil {
			return err
		}
	}
	return nil
}

// quotaOf is what there is to say about the quota.
func quotaOf(u pool.Usage) string {
	if u.Quota == 0 {
		return ""
	}
	return fmt.Sprintf(" of at most %s, %s evicted", size(u.Quota), size(u.Evicted))
}

func printStatus(w io.Writer, st *daemon.Status) error {
	if len(st.Processes) == 0 {
		_, err := fmt.Fprintf(w, "no service runs on %s, nothing is mounted that needs one\n", st.Root)
		return err
	}
	var pids []string
	for _, p := range st.Processes {
		pids = append(pids, fmt.Sprintf("%s %d", p.Role, p.PID))
	}
	if st.Started == nil || st.Pool == nil { // the keeper says so
		fmt.Fprintf(w, "service  %s, %s: the worker does not answer, or is being started\n", st.Root, strings.Join(pids, ", "))
	} else {
		fmt.Fprintf(w, "service  %s, %s, up %v\n", st.Root, strings.Join(pids, ", "), time.Since(*st.Started).Round(time.Second))
		fmt.Fprintf(w, "pool     %s here of %s known, %s on disk\n", size(st.Pool.Present), size(st.Pool.Address), size(st.Pool.Disk)+quotaOf(*st.Pool))
	}
	if st.Full {
		fmt.Fprintf(w, "         it is full, or cannot be written: what is fetched is served from memory, and not kept\n")
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(st.Images) > 0 {
		fmt.Fprintf(tw, "\nIMAGE\tPLATFORM\tDIGEST\n")
	}
	for _, im := range st.Images {
		for _, ref := range names(im) {
			fmt.Fprintf(tw, "%s\t%s\t%.19s\n", ref, im.Platform, im.ManifestDigest)
		}
	}
	if len(st.Mounts) > 0 {
		fmt.Fprintf(tw, "\nMOUNT\tIMAGE\tFACE\tREQUESTS\tRECEIVED\tMISSING\tERRORS\n")
	}
	for _, m := range st.Mounts {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%s\t%s\t%d\n", m.Where, m.Ref, m.Face, m.Source.Requests,
			size(m.Source.Bytes), size(m.MissingBytes), m.Fill.Errors)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for i := range st.Mounts {
		if err := printFailures(w, &st.Mounts[i]); err != nil {
			return err
		}
	}
	return nil
}
