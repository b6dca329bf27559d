package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader"
)

const defaultRoot = "/var/lib/shale"

// globals are the flags all verbs share.
type globals struct {
	root string
	json bool

	indexTrust string
	shareIndex bool
}

func (g *globals) flags(cmd *cobra.Command) {
	root := os.Getenv("SHALE_ROOT")
	if root == "" {
		root = defaultRoot
	}
	cmd.PersistentFlags().StringVar(&g.root, "root", root, "directory of the node's state (SHALE_ROOT)")
}

// jsonFlag adds --json to a verb that prints a result.
func (g *globals) jsonFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&g.json, "json", false, "print the result as JSON")
}

// trustFlag adds --index-trust to a verb that may pull.
func (g *globals) trustFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&g.indexTrust, "index-trust", "", "whose index of an unconverted image is believed: "+reader.TrustKinds+" (default: the node's configuration, or repository)")
}

// shareIndexFlag adds --share-index to a verb that may make the index of an image.
func (g *globals) shareIndexFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&g.shareIndex, "share-index", false, "if the image has no index, so that all of it is read: push the one that is made, for other nodes")
}

func (g *globals) client() *daemon.Client { return &daemon.Client{Root: g.root, Start: true} }

// source says which image a verb means, with the caller's credentials for it, and where
// they are from.
func (g *globals) source(ref, platform string) (daemon.Source, error) {
	r, err := parseRef(ref)
	if err != nil {
		return daemon.Source{}, err
	}
	if _, err := parsePlatform(platform); err != nil {
		return daemon.Source{}, err
	}
	if _, err := reader.ParseTrust(g.indexTrust); err != nil {
		return daemon.Source{}, usageError{err}
	}
	src := daemon.Source{Ref: r.String(), Platform: platform, IndexTrust: g.indexTrust, ShareIndex: g.shareIndex}
	var atHand bool
	if src.Credentials, atHand = image.CredentialsAtHand(r); !atHand {
		src.LookUp = func(ctx context.Context, missing bool) (image.Credentials, error) {
			return lookUp(ctx, r, missing, helperTime)
		}
	}
	if r.Registry() != "" {
		src.Environment = image.LookupEnvironment()
	}
	return src, nil
}

// helperTime is how long the start of what is known waits for a credential helper.
const helperTime = 20 * time.Second

// lookUp asks a credential helper. An image that the node knows starts without its answer:
// what is here can be read, and for the rest the service has it asked again.
func lookUp(ctx context.Context, r image.Ref, known bool, most time.Duration) (image.Credentials, error) {
	if !known {
		return image.ResolveCredentials(ctx, r)
	}
	within, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	c, err := image.ResolveCredentials(within, r)
	if err != nil && ctx.Err() == nil {
		fmt.Fprintf(os.Stderr, "shale: the image starts without: %v\n", err)
		return image.Credentials{}, nil
	}
	return c, err
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// size writes bytes for a person.
func size(n int64) string {
	switch f := float64(n); {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 1e6:
		return fmt.Sprintf("%.1f kB", f/1e3)
	case n < 1e9:
		return fmt.Sprintf("%.1f MB", f/1e6)
	default:
		return fmt.Sprintf("%.2f GB", f/1e9)
	}
}

// repository opens the repository of a reference from here, without the
// service.
func (g *globals) repository(ctx context.Context, ref string) (*image.Repository, error) {
	r, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	cred, err := image.ResolveCredentials(ctx, r)
	if err != nil {
		return nil, err
	}
	cfg, err := config.Load()
	if err != nil {
		return nil, err
	}
	if err := cfg.SetProxy(); err != nil {
		return nil, err
	}
	opts := cfg.Options(r, cred, "shale/"+version)
	opts.Renewal = func(ctx context.Context, _ image.Credentials) (image.Credentials, error) {
		return image.ResolveCredentials(ctx, r)
	}
	return image.Open(ctx, r, opts)
}

// parsePlatform reads the value of --platform.
func parsePlatform(s string) (image.Platform, error) {
	p, err := image.WantedPlatform(s)
	if err != nil {
		return p, usageError{err}
	}
	return p, nil
}

// parseRef reads a reference. A layout's directory is made absolute: the
// service has another working directory.
func parseRef(s string) (image.Ref, error) {
	r, err := image.ParseRef(s)
	if err != nil {
		return r, usageError{err}
	}
	if r.Dir() != "" {
		dir, err := filepath.Abs(r.Dir())
		if err != nil {
			return r, err
		}
		r = r.WithDir(dir)
	}
	return r, nil
}

// parseSize reads "64K", "1M" or a number of bytes.
func parseSize(s string) (int64, error) {
	unit := int64(1)
	switch {
	case strings.HasSuffix(s, "K"):
		unit = 1 << 10
	case strings.HasSuffix(s, "M"):
		unit = 1 << 20
	case strings.HasSuffix(s, "G"):
		unit = 1 << 30
	}
	n, err := strconv.ParseInt(strings.TrimRight(s, "KMG"), 10, 32)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("size %q: want bytes, or a number with K, M or G", s)
	}
	return n * unit, nil
}

// tellNotes passes on what the service has to say while it works.
func tellNotes(p daemon.Progress) {
	if p.Note != "" {
		fmt.Fprintf(os.Stderr, "shale: %s\n", p.Note)
	}
}
