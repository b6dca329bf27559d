// Package cold measures single starts of containers on a node that has nothing
// yet: a registry behind a modelled network, nodes that are directories, and
// what a start on one of them costs, by full pull and unpack or lazily.
//
//	lab, err := cold.Open(ctx, cold.Options{Shale: "bin/shale", Model: netmodel.Default})
//	defer lab.Close()
//	err = lab.Push(ctx, "oci:build/images/python-...", "python:1")
//	node := lab.Node()
//	defer node.Close()
//	cost, err := node.Lazy(ctx, "python:1", cold.Command{Args: []string{"python3", "-c", "print(1)"}})
//
// It must not know which images and commands are measured.
package cold

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/registry"
	"github.com/shale-image/shale/image"
)

// ErrNoIndex is that the program has no command that indexes images.
var ErrNoIndex = errors.New("the program has no index command")

// Options say what is measured, and through which network.
type Options struct {
	Shale string         // path of the program
	Model netmodel.Model // between the registry and the nodes

	// DropCaches has the kernel forget every file before each start. A new
	// node has no file that could be in the page cache; what is dropped is the
	// programs, and the registry's files, which are another machine's.
	DropCaches bool

	Service bool // a node's service runs before its first start
}

// Lab is a registry, the network in front of it, and a directory for nodes.
// Its methods must not be called concurrently.
type Lab struct {
	Options
	dir      string // scratch
	nodes    int    // made so far
	registry *registry.Registry
	proxy    *netmodel.Proxy
}

// Open starts a registry and a network in front of it. The caller calls Close.
func Open(ctx context.Context, o Options) (_ *Lab, err error) {
	l := &Lab{Options: o}
	if l.Shale, err = filepath.Abs(o.Shale); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.dir, err = os.MkdirTemp("", "shale-bench-"); err != nil {
		return nil, err
	}
	if l.registry, err = registry.Start(ctx, filepath.Join(l.dir, "registry")); err != nil {
		return nil, err
	}
	l.proxy, err = netmodel.Start(l.registry.URL(), o.Model)
	return l, err
}

// Close ends what Open has started and removes all that was made. Nodes are to
// be closed before.
func (l *Lab) Close() error {
	var errs []error
	if l.proxy != nil {
		errs = append(errs, l.proxy.Close())
	}
	if l.registry != nil {
		errs = append(errs, l.registry.Stop())
	}
	return errors.Join(append(errs, os.RemoveAll(l.dir))...)
}

// Host returns the address of the registry itself, not slowed down.
func (l *Lab) Host() string { return l.registry.Host() }

// Push copies the image from, any reference, to the registry as
// "repository:tag". Its bytes stay as they are.
func (l *Lab) Push(ctx context.Context, from, name string) error {
	src, err := open(ctx, from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := open(ctx, l.Host()+"/"+name)
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

func open(ctx context.Context, name string) (*image.Repository, error) {
	ref, err := image.ParseRef(name)
	if err != nil {
		return nil, err
	}
	cred, err := image.ResolveCredentials(ctx, ref)
	if err != nil {
		return nil, err
	}
	return image.Open(ctx, ref, image.Options{Credentials: cred})
}

// Convert has the program convert an image of the registry into another one
// there. What it prints goes to standard error.
func (l *Lab) Convert(ctx context.Context, from, to string, flags ...string) error {
	args := append([]string{"convert", l.Host() + "/" + from, l.Host() + "/" + to}, flags...)
	return l.shale(ctx, os.Stderr, args...)
}

// Index has the program index an image of the registry, and push the index
// beside it. The error wraps ErrNoIndex if it knows no such command.
func (l *Lab) Index(ctx context.Context, name string) error {
	// Asked for the help of a command it does not know, it gives its own.
	var help bytes.Buffer
	if err := l.shale(ctx, &help, "index", "--help"); ctx.Err() != nil {
		return ctx.Err()
	} else if err != nil || !strings.Contains(help.String(), "shale index ") {
		return ErrNoIndex
	}
	return l.shale(ctx, os.Stderr, "index", "--push", l.Host()+"/"+name)
}

// Optimize has the program make a start pack of what a command reads, and push it
// beside the image.
func (l *Lab) Optimize(ctx context.Context, name string, c Command) (err error) {
	n := l.Node()
	defer func() { err = errors.Join(err, n.Close()) }()
	args := []string{"--root", n.dir, "optimize", "--push"}
	if c.User != "" {
		args = append(args, "--user", c.User)
	}
	return l.shale(ctx, os.Stderr, append(append(args, l.Host()+"/"+name, "--"), c.Args...)...)
}

// Share has a command run on so many new nodes, which push what it has read beside the
// image.
func (l *Lab) Share(ctx context.Context, name string, c Command, nodes int) error {
	one := func() (err error) {
		n := l.Node()
		defer func() { err = errors.Join(err, n.Close()) }()
		args := []string{"--root", n.dir, "run", "--rm", "--share-traces"}
		if c.User != "" {
			args = append(args, "--user", c.User)
		}
		err = l.shale(ctx, io.Discard, append(append(args, l.Host()+"/"+name), c.Args...)...)
		return errors.Join(err, n.StopService()) // which waits for that
	}
	for range nodes {
		if err := one(); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) shale(ctx context.Context, stdout io.Writer, args ...string) error {
	cmd := command(ctx, l.Shale, args...)
	cmd.Stdout, cmd.Stderr = stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("shale %s: %w", args[0], err)
	}
	return nil
}

// command is exec.CommandContext, but what runs may clean up when ctx ends.
func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}
