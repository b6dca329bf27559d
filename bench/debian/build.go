package debian

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/oci"
)

// Build returns the directory of the recipe's image, an OCI layout inside of
// dir, and builds it first unless it is there: that takes about 25 s for the
// base and as much again for each layer of packages. What it builds on the way,
// the images below and the one with Gzip, is kept there as well. log gets the
// progress, a line at a time. Builds of several processes in one dir wait for
// each other; an image is there whole or not at all.
func Build(ctx context.Context, r Recipe, dir string, log io.Writer) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if r = r.With(r.Compression); r.Compression != "" && !r.Compression.zstd() {
		return "", fmt.Errorf("image %s: unknown compression %q", r.Name, r.Compression)
	}
	final := filepath.Join(dir, r.key(runtime.GOARCH))
	if complete(final) {
		return final, nil
	}
	var from oci.Layout
	if below, ok := r.below(); ok {
		base, err := Build(ctx, below, dir, log)
		if err != nil {
			return "", err
		}
		from = oci.Layout(base)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(ctx, final+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if complete(final) { // another process was faster
		return final, nil
	}
	if err := build(ctx, r, from, final, log); err != nil {
		return "", fmt.Errorf("building image %s: %w", r.Name, err)
	}
	return final, nil
}

// below returns the recipe of the image that r's is made from, if there is one.
func (r Recipe) below() (Recipe, bool) {
	switch {
	case r.Compression.zstd():
		return r.With(Gzip), true
	case r.From != nil:
		return *r.From, true
	default:
		return Base, len(r.Packages) > 0
	}
}

func complete(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "index.json"))
	return err == nil
}

// lock takes an exclusive lock on the file, which it creates and leaves.
func lock(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// build makes the image beside final and renames it. The caller holds the
// lock, so that what an interrupted build left can be removed.
func build(ctx context.Context, r Recipe, from oci.Layout, final string, log io.Writer) error {
	start := time.Now()
	tmp := final + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	out, err := oci.Create(tmp)
	if err != nil {
		return err
	}
	if r.Compression.zstd() {
		fmt.Fprintf(log, "image %s: compressing it with %s\n", r.Name, r.Compression)
		err = recompress(ctx, from, out, r.Compression)
	} else {
		err = install(ctx, r, from, out, log)
	}
	if err != nil {
		return err
	}
	if err := syncFS(tmp); err != nil {
		return err
	}
	if err := os.RemoveAll(final); err != nil {
		return err
	}
	if err := os.Rename(tmp, final); err != nil {
		return err
	}
	fmt.Fprintf(log, "image %s: built in %.1f s\n", r.Name, time.Since(start).Seconds())
	return nil
}

// install makes the image of what installing the recipe's packages on from,
// "" for nothing, leads to.
func install(ctx context.Context, r Recipe, from, out oci.Layout, log io.Writer) error {
	config := oci.Image{
		Created:      time.Unix(epoch, 0).UTC().Format(time.RFC3339),
		Architecture: runtime.GOARCH,
		OS:           "linux",
		Config: oci.Process{
			Env: append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, r.Env...),
			Cmd: r.Cmd,
		},
		RootFS: oci.RootFS{Type: "layers"},
	}
	lower, err := readTree(from, out)
	if err != nil {
		return err
	}
	tarball := filepath.Join(string(out), "full.tar")
	start := time.Now()
	fmt.Fprintf(log, "image %s: installing packages\n", r.Name)
	if err := bootstrap(ctx, r, lower.blobs, tarball, log); err != nil {
		return err
	}
	fmt.Fprintf(log, "image %s: packing the layer\n", r.Name)
	layer, err := writeLayer(out, tarball, lower.names, start)
	if err != nil {
		return err
	}
	if err := os.Remove(tarball); err != nil {
		return err
	}
	config.RootFS.DiffIDs = append(lower.diffIDs, layer.diffID)
	return out.Finish(config, append(lower.layers, layer.Descriptor))
}

// syncFS makes everything written to the file system of dir durable.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}
