package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/shale-image/shale/bench/oci"
	"github.com/shale-image/shale/bench/plain"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/runtime"
)

// copyImage copies an image as it is.
func copyImage(ctx context.Context, from, to string) error {
	open := func(s string) (*image.Repository, error) {
		ref, err := image.ParseRef(s)
		if err != nil {
			return nil, err
		}
		cred, err := image.ResolveCredentials(ref)
		if err != nil {
			return nil, err
		}
		return image.Open(ctx, ref, image.Options{Credentials: cred})
	}
	src, err := open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := open(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	img, err := src.Resolve(ctx, image.Platform{})
	if err != nil {
		return err
	}
	for _, d := range append(img.Layers, img.ConfigBlob) {
		if err := dst.PushBlob(ctx, d, func() (io.ReadCloser, error) { return src.Blob(ctx, d) }); err != nil {
			return err
		}
	}
	_, err = dst.PushManifest(ctx, img.MediaType, img.ManifestBytes, dst.Ref().Tag())
	return err
}

func (d *demo) convert(ctx context.Context) error {
	args := []string{"convert", d.registry.Host() + "/" + plainName, d.registry.Host() + "/" + convertedName}
	if d.chunkSize != "" {
		args = append(args, "--chunk-size", d.chunkSize)
	}
	cmd := exec.CommandContext(ctx, d.shale, args...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	return cmd.Run()
}

// startPlain is what an engine does: download, verify, unpack, run.
func (d *demo) startPlain(ctx context.Context, dir string) (cost, error) {
	defer os.RemoveAll(dir)
	defer runtime.Clean(filepath.Join(dir, "containers")) // of what a failed start leaves
	oci0, err := runtime.Find()
	if err != nil {
		return cost{}, err
	}
	d.proxy.Reset()
	out := newFirstByte()
	defer out.close()
	_, err = plain.Start(ctx, plain.Options{
		Registry: d.proxy.URL(), Name: plainName, Dir: dir,
		Run: func(ctx context.Context, rootfs string, config oci.Image) error {
			root, err := os.Open(rootfs)
			if err != nil {
				return err
			}
			defer root.Close()
			js, err := json.Marshal(config.Config)
			if err != nil {
				return err
			}
			var ic runtime.ImageConfig
			if err := json.Unmarshal(js, &ic); err != nil {
				return err
			}
			cfg, err := runtime.Merge(ic, runtime.Flags{Args: d.command})
			if err != nil {
				return err
			}
			o := runtime.Options{Runtime: oci0, StateDir: filepath.Join(dir, "containers"), Remove: true, Stdout: out.w, Stderr: os.Stderr}
			code, err := runtime.Run(ctx, o, root, cfg)
			if err == nil && code != 0 {
				err = fmt.Errorf("exit code %d", code)
			}
			return err
		},
	})
	if err != nil {
		return cost{}, err
	}
	return d.cost(out, dir)
}

// startLazy is shale run with nothing on the node, not even the service.
func (d *demo) startLazy(ctx context.Context, root string) (cost, error) {
	defer func() {
		stopService(d.shale, root)
		os.RemoveAll(root)
	}()
	d.proxy.Reset()
	out := newFirstByte()
	defer out.close()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, d.shale, append([]string{"--root", root, "run", "--rm", d.proxy.Host() + "/" + convertedName}, d.command...)...)
	cmd.Stdout, cmd.Stderr = out.w, &stderr
	if err := cmd.Run(); err != nil {
		return cost{}, fmt.Errorf("shale run: %w\n%s", err, stderr.Bytes())
	}
	return d.cost(out, root)
}

func (d *demo) cost(out *firstByte, dir string) (cost, error) {
	first, err := out.wait()
	if err != nil {
		return cost{}, err
	}
	t := d.proxy.Totals()
	disk, err := diskUsage(dir)
	return cost{bytes: t.Down, requests: t.Requests, first: first, disk: disk}, err
}

// stopService waits until the service of a root directory has ended; it does
// so as soon as the container's mount is gone.
func stopService(shale, root string) {
	for range 100 {
		if exec.Command(shale, "--root", root, "daemon", "stop").Run() == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// firstByte is a pipe that knows when something was first written to it.
type firstByte struct {
	w     *os.File
	start time.Time
	done  chan struct{}
	first time.Duration
	all   bytes.Buffer
	once  sync.Once
}

func newFirstByte() *firstByte {
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	f := &firstByte{w: w, start: time.Now(), done: make(chan struct{})}
	go func() {
		defer close(f.done)
		defer r.Close()
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			if n > 0 && f.first == 0 {
				f.first = time.Since(f.start)
			}
			f.all.Write(buf[:n])
			if err != nil {
				return
			}
		}
	}()
	return f
}

func (f *firstByte) close() { f.once.Do(func() { f.w.Close() }); <-f.done }

func (f *firstByte) wait() (time.Duration, error) {
	f.close()
	if f.first == 0 {
		return 0, fmt.Errorf("the command printed nothing")
	}
	fmt.Fprintf(os.Stderr, "   after %.2f s: %q\n", f.first.Seconds(), bytes.TrimSpace(f.all.Bytes()))
	return f.first, nil
}

// median takes each figure's median.
func median(c []cost) cost {
	mid := func(get func(cost) int64) int64 {
		v := make([]int64, len(c))
		for i := range c {
			v[i] = get(c[i])
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	return cost{
		bytes:    mid(func(c cost) int64 { return c.bytes }),
		disk:     mid(func(c cost) int64 { return c.disk }),
		requests: int(mid(func(c cost) int64 { return int64(c.requests) })),
		first:    time.Duration(mid(func(c cost) int64 { return int64(c.first) })),
	}
}
