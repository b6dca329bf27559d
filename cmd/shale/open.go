package main

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/inspect"
)

// opener is how the verbs that look into an image name it: REF, or in its place
// --bootstrap FILE.
type opener struct {
	g                          *globals
	platform, bootstrap, blobs string
}

func (o *opener) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.platform, "platform", "", "platform of the image (default: this node's)")
	f.StringVar(&o.bootstrap, "bootstrap", "", "instead of REF: a bootstrap, or a Nydus blob that carries one")
	f.StringVar(&o.blobs, "blobs", "", "with --bootstrap: directory of the blobs (default: that of FILE)")
	_ = cmd.MarkFlagFilename("bootstrap")
	_ = cmd.MarkFlagDirname("blobs")
}

// args checks the number of arguments, REF among them.
func (o *opener) args(least, most int) cobra.PositionalArgs {
	return func(c *cobra.Command, a []string) error {
		least, most := least, most
		switch {
		case o.bootstrap != "":
			least, most = least-1, most-1
		case o.blobs != "":
			return usageError{errors.New("--blobs without --bootstrap")}
		}
		return args(cobra.RangeArgs(least, most))(c, a)
	}
}

// open opens the image that the arguments begin with and returns the rest of
// them. The image's index is there, else it is an error.
func (o *opener) open(ctx context.Context, a []string) (*inspect.Image, []string, error) {
	if o.bootstrap != "" {
		return o.peek(ctx, a, false)
	}
	if im, err := o.known(a[0]); im != nil || err != nil {
		return im, a[1:], err
	}
	l, err := o.g.look(ctx, a[0], o.platform)
	if err != nil {
		return nil, nil, err
	}
	release := func() error {
		l.close()
		return nil
	}
	return &inspect.Image{
		Name: l.repo.Ref().String(), Manifest: l.img, Tree: l.tree, Source: l.source(), Release: release,
	}, a[1:], nil
}

// known opens an image that the node has, from its files. It returns nothing if the node
// has it not, or cannot tell this user.
func (o *opener) known(name string) (*inspect.Image, error) {
	ref, err := parseRef(name)
	if err != nil {
		return nil, err
	}
	if _, err := parsePlatform(o.platform); err != nil {
		return nil, err
	}
	if _, err := indexOptions(); err != nil {
		return nil, err
	}
	more := &lazily{open: func(ctx context.Context) (*image.Repository, error) { return o.g.repository(ctx, name) }}
	l, err := daemon.Look(o.g.root, ref, o.platform, more)
	if err != nil {
		return nil, nil // what is damaged is fetched again, too
	}
	return &inspect.Image{
		Name: ref.String(), Tree: l.Tree, Source: l, Release: func() error { return errors.Join(l.Close(), more.close()) },
	}, nil
}

// lazily is a repository's blobs, opened when one is asked for.
type lazily struct {
	open func(context.Context) (*image.Repository, error)

	mu   sync.Mutex
	repo *image.Repository
}

// Range implements blob.Source.
func (l *lazily) Range(ctx context.Context, ref blob.Ref, off, n int64) (_ io.ReadCloser, err error) {
	l.mu.Lock()
	if l.repo == nil {
		l.repo, err = l.open(ctx)
	}
	repo := l.repo
	l.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return retry.New(repo.Blobs(), retry.Policy{}).Range(ctx, ref, off, n)
}

func (l *lazily) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.repo == nil {
		return nil
	}
	return l.repo.Close()
}

// peek is open for verbs that have something to say also if there is no index:
// because the image is not converted, or because of what Damage says. config
// asks for the configuration too.
func (o *opener) peek(ctx context.Context, a []string, config bool) (*inspect.Image, []string, error) {
	if o.bootstrap != "" {
		if o.platform != "" {
			return nil, nil, usageError{errors.New("--platform with --bootstrap: a bootstrap is of one platform")}
		}
		im, err := inspect.OpenFile(o.bootstrap, o.blobs)
		return im, a, err
	}
	p, err := parsePlatform(o.platform)
	if err != nil {
		return nil, nil, err
	}
	repo, err := o.g.repository(ctx, a[0])
	if err != nil {
		return nil, nil, err
	}
	resolve := repo.ResolveManifest
	if config {
		resolve = repo.Resolve
	}
	img, err := resolve(ctx, p)
	if err != nil {
		repo.Close()
		return nil, nil, err
	}
	opts, err := indexOptions()
	if err != nil {
		repo.Close()
		return nil, nil, err
	}
	im, err := inspect.Open(ctx, repo, img, opts)
	if err != nil {
		repo.Close()
		return nil, nil, err
	}
	return im, a[1:], nil
}
