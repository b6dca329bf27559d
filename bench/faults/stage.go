package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/registry"
	"github.com/shale-image/shale/image"
)

// stage is where scripts are played: a registry that has images, and what these are.
// Several scripts may be played at a time.
type stage struct {
	shale  string
	dir    string // scratch
	url    *url.URL
	images []string // "repository:tag"; the same image, in one form or the other
	packed []string // the same with start packs beside them, for scripts on these
	packs  []string // their digests
	other  string   // another image; "" if there is none
	truth  *truth   // of all images but the other
	also   *truth   // of that one

	face string // how images are mounted; "": device, and each script once fanotify, if usable
	able error  // why fanotify cannot be used here

	// bandwidth is that of a faulty source, in bits a second: faults begin while it is
	// being read from.
	bandwidth float64
	timeout   time.Duration // of reads, where they are to fail; else five times that

	registry *registry.Registry // nil if it is the caller's
	nodes    atomic.Int64
}

// openStage has a registry of its own, with two small images in it.
func openStage(ctx context.Context, shale string) (_ *stage, err error) {
	s, err := newStage(shale)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.registry, err = registry.Start(ctx, filepath.Join(s.dir, "registry")); err != nil {
		return nil, err
	}
	if s.url, err = url.Parse(s.registry.URL()); err != nil {
		return nil, err
	}
	s.images, s.packed, s.other = []string{"faults/a:shale", "faults/a:plain"}, []string{"faults/p:shale", "faults/p:plain"}, "faults/b:shale"
	for name, seed := range map[string]uint64{"faults/a": 0, "faults/p": 0, "faults/b": 1} {
		layout := filepath.Join(s.dir, "layout-"+path.Base(name))
		if err := buildImage(layout, seed); err != nil {
			return nil, err
		}
		if err := registry.Push(ctx, s.url.String(), layout, name+":plain"); err != nil {
			return nil, err
		}
		for _, args := range [][]string{
			{"index", "-q", "--push", s.url.Host + "/" + name + ":plain"},
			{"convert", "-q", s.url.Host + "/" + name + ":plain", s.url.Host + "/" + name + ":shale"},
		} {
			if out, err := exec.CommandContext(ctx, shale, args...).CombinedOutput(); err != nil {
				return nil, fmt.Errorf("shale %s: %w: %s", args[0], err, out)
			}
		}
	}
	for _, name := range s.packed {
		digest, err := s.pack(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("the start pack of %s: %w", name, err)
		}
		s.packs = append(s.packs, digest)
	}
	if s.truth, err = s.extract(ctx, "faults/a:plain", "truth"); err == nil {
		s.also, err = s.extract(ctx, "faults/b:plain", "also")
	}
	return s, err
}

// onRegistry is a stage at a registry that there is: its URL, and an image in it. plain is
// the image there that it was converted from, "" if it was not: tar must know its layers.
func onRegistry(ctx context.Context, shale, at, name, plain string) (_ *stage, err error) {
	s, err := newStage(shale)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.url, err = url.Parse(at); err != nil || s.url.Host == "" || s.url.Path != "" {
		return nil, fmt.Errorf("%q: want the URL of a registry, such as https://registry.example", at)
	}
	s.images = []string{name}
	s.truth, err = s.extract(ctx, cmp.Or(plain, name), "truth")
	return s, err
}

func newStage(shale string) (*stage, error) {
	program, err := filepath.Abs(shale)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(program); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "shale-faults-")
	if err != nil {
		return nil, err
	}
	return &stage{shale: program, dir: dir, bandwidth: 100e6, timeout: 2 * time.Second, able: usable(dir)}, nil
}

func (s *stage) close() error {
	var err error
	if s.registry != nil {
		err = s.registry.Stop()
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// plain tells whether the registry is spoken to without TLS though it is not here.
func (s *stage) plain() bool {
	addr, err := netip.ParseAddr(s.url.Hostname())
	return s.url.Scheme == "http" && (err != nil || !addr.IsLoopback()) && s.url.Hostname() != "localhost"
}

// open opens the repository of an image at the registry.
func (s *stage) open(ctx context.Context, name string) (*image.Repository, error) {
	ref, err := image.ParseRef(s.url.Host + "/" + name)
	if err != nil {
		return nil, err
	}
	cred, err := image.ResolveCredentials(context.Background(), ref)
	if err != nil {
		return nil, err
	}
	o := image.Options{Credentials: cred}
	if s.plain() {
		o.PlainHTTP = []string{s.url.Host}
	}
	return image.Open(ctx, ref, o)
}

func (s *stage) extract(ctx context.Context, name, dir string) (*truth, error) {
	repo, err := s.open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer repo.Close()
	t, err := extract(ctx, repo, filepath.Join(s.dir, dir))
	if err != nil {
		return nil, fmt.Errorf("%s: what is right: %w", name, err)
	}
	return t, nil
}

// proxy is a source in front of the registry, to be played with.
func (s *stage) proxy() (*netmodel.Proxy, error) {
	return netmodel.Start(s.url.String(), s.model())
}

func (s *stage) model() netmodel.Model { return netmodel.Model{Bandwidth: s.bandwidth} }

// faces are those that are played with.
func (s *stage) faces() []string {
	switch {
	case s.face != "":
		return []string{s.face}
	case s.able != nil:
		return []string{device}
	}
	return []string{device, fanotify}
}

// node makes a node that reads from ref's host and, first, from mirrors. root is where
// its service keeps what it has, "" for a directory of its own.
func (s *stage) node(root, host string, timeout time.Duration, quota int64, mirrors ...string) (*node, error) {
	dir := filepath.Join(s.dir, fmt.Sprintf("node%d", s.nodes.Add(1)))
	if root == "" {
		root = filepath.Join(dir, "root")
	}
	c := settings{ReadTimeout: timeout.String(), Registries: map[string]registrySettings{}}
	c.Cache.Complete, c.Cache.Quota = "off", quota
	c.Registries[host] = registrySettings{Mirrors: mirrors, PlainHTTP: s.plain() && host == s.url.Host}
	env, err := s.login(dir, host)
	if err != nil {
		return nil, err
	}
	return newNode(s.shale, dir, root, c, env...)
}

// login has the caller's credentials for the registry sent to a proxy in front of it.
func (s *stage) login(dir, host string) (env []string, err error) {
	ref, err := image.ParseRef(s.url.Host + "/x")
	if err != nil || host == s.url.Host {
		return nil, err
	}
	cred, err := image.ResolveCredentials(context.Background(), ref)
	if err != nil || cred == (image.Credentials{}) {
		return nil, err
	}
	dir = filepath.Join(dir, "docker")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	js := fmt.Appendf(nil, `{"auths": {%q: {"username": %q, "password": %q, "identitytoken": %q, "registrytoken": %q}}}`,
		host, cred.Username, cred.Password, cred.IdentityToken, cred.RegistryToken)
	return []string{"DOCKER_CONFIG=" + dir}, os.WriteFile(filepath.Join(dir, "config.json"), js, 0o600)
}

// tell prints a list, cut short.
func tell(w io.Writer, what string, list []string) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintf(w, "  %s (%d):\n", what, len(list))
	for _, line := range list[:min(len(list), 8)] {
		fmt.Fprintf(w, "    %s\n", strings.TrimSpace(line))
	}
}
