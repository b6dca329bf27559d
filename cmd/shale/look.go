package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

// looked is an image opened for a look inside, from here, without the service.
type looked struct {
	repo *image.Repository
	img  *image.Image
	tree *index.Tree
}

func (g *globals) look(ctx context.Context, ref, platform string) (*looked, error) {
	repo, img, err := g.resolve(ctx, ref, platform)
	if err != nil {
		return nil, err
	}
	tree, err := readTree(ctx, repo, img)
	if err != nil {
		repo.Close()
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	return &looked{repo, img, tree}, nil
}

// resolve returns an image's manifest, and where it is.
func (g *globals) resolve(ctx context.Context, ref, platform string) (*image.Repository, *image.Image, error) {
	p, err := parsePlatform(platform)
	if err != nil {
		return nil, nil, err
	}
	repo, err := g.repository(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	img, err := repo.ResolveManifest(ctx, p)
	if err != nil {
		return nil, nil, errors.Join(err, repo.Close())
	}
	return repo, img, nil
}

func readTree(ctx context.Context, repo *image.Repository, img *image.Image) (*index.Tree, error) {
	opts, err := indexOptions()
	if err != nil {
		return nil, err
	}
	var tree *index.Tree
	raw, err := reader.Use(ctx, repo, img, opts, func(raw *reader.Raw) (err error) {
		tree, err = raw.Tree()
		return err
	})
	if err != nil {
		return nil, err
	}
	return tree, raw.Close()
}

// indexOptions say which index verbs look into that ask no service: any, unless
// a key of the node is said to have signed it, and has not.
func indexOptions() (reader.Options, error) {
	cfg, err := config.Load()
	if err != nil {
		return reader.Options{}, err
	}
	return reader.Options{TempDir: os.TempDir(), Keys: cfg.Keys(), Limits: cfg.Limits.Limits}, nil
}

func (l *looked) source() blob.Source { return retry.New(l.repo.Blobs(), retry.Policy{}) }

func (l *looked) close() { l.repo.Close() }
