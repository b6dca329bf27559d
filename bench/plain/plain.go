// Package plain starts a container as engines do without lazy loading: fetch
// every layer whole, verify it, unpack it, run. It is the peer that the
// product is measured against, and made as fast as that way can be: each layer
// is unpacked while later ones arrive, by GNU tar and the fastest gzip (or zstd)
// there is, straight into one tree.
//
// Its trees are also the truth that others are compared with: GNU tar decides
// what a layer means. Images are taken to be benign; a hostile one may write
// outside of its tree. The package must not know the product.
package plain

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/bench/oci"
)

// Options say what to start and how.
type Options struct {
	Registry string // URL: "http://127.0.0.1:5000"
	Name     string // "repository:tag"
	Dir      string // created; gets layers/ and rootfs/

	// Parallel is how many layers are downloaded at once, 1 if it is 0: on one
	// link that is the fastest, as the lowest layer is the first to arrive
	// and is unpacked while others do. Engines take 3: 8.9 s instead of 8.2
	// for 95 MB in two layers at 100 Mbit/s (with pigz for igzip 10.2 and 8.4).
	Parallel int

	// Stream unpacks layers while they arrive, before their digest is known
	// to be right. No engine does that; it shows how fast one could be.
	Stream bool

	// Run, if set, starts the container and returns when it has ended.
	Run func(ctx context.Context, rootfs string, config oci.Image) error
}

// Result tells when things were done, since the start.
type Result struct {
	Rootfs     string
	Config     oci.Image
	Bytes      int64         // downloaded: manifest, config, layers
	Manifest   time.Duration // manifest and config are there
	Downloaded time.Duration // the last layer is there, verified
	Unpacked   time.Duration // the tree is ready
	Total      time.Duration // Run has returned; Unpacked if there is none
	Layers     []LayerResult // lowest first
}

// LayerResult is Result for one layer.
type LayerResult struct {
	Digest                          string
	Size                            int64 // bytes as stored
	Downloaded, Unpacking, Unpacked time.Duration
}

// accept are the kinds of manifest that are understood.
const accept = oci.TypeManifest + ", application/vnd.docker.distribution.manifest.v2+json"

// Start pulls, unpacks and runs an image. What it made in Dir is the caller's
// to remove, also after an error.
func Start(ctx context.Context, o Options) (Result, error) {
	res, err := start(ctx, o)
	if err != nil {
		return res, fmt.Errorf("plain start of %s: %w", o.Name, err)
	}
	return res, nil
}

func start(ctx context.Context, o Options) (Result, error) {
	p := &pull{Options: o, begin: time.Now()}
	if p.Parallel <= 0 {
		p.Parallel = 1
	}
	p.res.Rootfs = filepath.Join(o.Dir, "rootfs")
	p.blobs = filepath.Join(o.Dir, "layers")
	for _, dir := range []string{p.blobs, p.res.Rootfs} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return p.res, err
		}
	}
	// One connection a download: HTTP/1.1 would queue them behind each other.
	transport := &http.Transport{MaxIdleConnsPerHost: p.Parallel, DisableCompression: true}
	defer transport.CloseIdleConnections()
	p.client = &http.Client{Transport: transport}

	m, err := p.manifest(ctx)
	if err != nil {
		return p.res, err
	}
	if err := p.layers(ctx, m.Layers); err != nil {
		return p.res, err
	}
	p.res.Unpacked = p.now()
	if o.Run != nil {
		if err := o.Run(ctx, p.res.Rootfs, p.res.Config); err != nil {
			return p.res, fmt.Errorf("run: %w", err)
		}
	}
	p.res.Total = p.now()
	return p.res, nil
}

// pull is one Start on its way.
type pull struct {
	Options
	begin  time.Time
	client *http.Client
	blobs  string // directory of downloaded layers
	res    Result
}

func (p *pull) now() time.Duration { return time.Since(p.begin) }

// manifest fetches manifest and config.
func (p *pull) manifest(ctx context.Context) (oci.Manifest, error) {
	var m oci.Manifest
	repo, tag, err := splitName(p.Name)
	if err != nil {
		return m, err
	}
	raw, err := p.document(ctx, repo+"/manifests/"+tag)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	config, err := p.document(ctx, repo+"/blobs/"+m.Config.Digest)
	if err != nil {
		return m, err
	}
	if err := oci.Parse(config, m.Config.Digest, &p.res.Config); err != nil {
		return m, err
	}
	if len(m.Layers) == 0 {
		return m, fmt.Errorf("manifest of %s has no layers", p.Name)
	}
	p.res.Bytes = int64(len(raw) + len(config))
	p.res.Manifest = p.now()
	return m, nil
}

func (p *pull) document(ctx context.Context, path string) ([]byte, error) {
	body, err := p.get(ctx, path)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return oci.ReadDocument(body)
}

func (p *pull) get(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.Registry+"/v2/"+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", accept)
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return resp.Body, nil
}

// layers downloads all layers and unpacks them in order.
func (p *pull) layers(ctx context.Context, layers []oci.Descriptor) error {
	p.res.Layers = make([]LayerResult, len(layers))
	ready := make([]chan io.ReadCloser, len(layers)) // what to unpack
	for i := range ready {
		ready[i] = make(chan io.ReadCloser, 1)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		downloads, ctx := errgroup.WithContext(ctx)
		downloads.SetLimit(p.Parallel)
		for i, d := range layers {
			downloads.Go(func() error {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				return p.download(ctx, d, &p.res.Layers[i], ready[i])
			})
		}
		err := downloads.Wait()
		p.res.Downloaded = p.now()
		return err
	})
	g.Go(func() error {
		for i := range layers {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case r := <-ready[i]:
				p.res.Layers[i].Unpacking = p.now()
				err := Unpack(ctx, r, p.res.Rootfs)
				r.Close()
				if err != nil {
					return fmt.Errorf("layer %s: %w", layers[i].Digest, err)
				}
				p.res.Layers[i].Unpacked = p.now()
			}
		}
		return nil
	})
	err := g.Wait()
	for _, r := range ready { // not taken because of an error
		select {
		case r := <-r:
			r.Close()
		default:
		}
	}
	if err != nil {
		return err
	}
	for _, l := range p.res.Layers {
		p.res.Bytes += l.Size
	}
	return nil
}
