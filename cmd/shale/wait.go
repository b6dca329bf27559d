package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/daemon"
)

func newWait(g *globals) *cobra.Command {
	var complete bool
	cmd := &cobra.Command{
		Use:   "wait --complete REF|MOUNT",
		Short: "Wait until all of an image is on this node",
		Long: `Wait until all of an image is on this node, so that those who use it survive the loss
of its registry. It is named by a reference that the node knows, or by a mount of it (its
directory, its id or a container's). It fetches nothing: mounts are completed in the
background, and shale pull --complete does so at once. If nothing will complete the image
it would wait for ever: it is neither mounted nor being pulled, or its mounts do not fetch the
rest (--no-complete, the configuration, no room); it then says so, and the exit code is 3. With
--json: {manifest_digest, complete}.`,
		Example: `  shale wait --complete registry.example/app:1
  shale wait --complete /mnt`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: g.completeRef,
		RunE: func(cmd *cobra.Command, a []string) error {
			if !complete {
				return usageError{fmt.Errorf("wait for what? there is only --complete")}
			}
			c := g.client()
			st, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			digest, err := findImage(st, a[0])
			if err != nil {
				return err
			}
			show := func(daemon.Progress) {}
			if !g.json {
				p := newProgress()
				defer p.end()
				show = func(x daemon.Progress) { p.step("here", x.Done, x.Total) }
			}
			if err := c.WaitComplete(cmd.Context(), digest, show); err != nil {
				return err
			}
			if g.json {
				return printJSON(cmd.OutOrStdout(), map[string]any{"manifest_digest": digest, "complete": true})
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&complete, "complete", false, "until all of it is here")
	g.jsonFlag(cmd)
	return cmd
}

// findImage finds the image of a mount, or of a reference, by its manifest digest.
func findImage(st *daemon.Status, name string) (string, error) {
	if m, err := findMount(st, name); err == nil {
		return m.ManifestDigest, nil
	}
	ref, err := parseRef(name)
	if err != nil {
		return "", err
	}
	for _, im := range st.Images {
		if slices.Contains(im.Refs, ref.String()) || im.ManifestDigest == ref.Digest() {
			return im.ManifestDigest, nil
		}
	}
	return "", fmt.Errorf("%s: the node knows neither such an image nor such a mount: %w", name, blob.ErrNotFound)
}
