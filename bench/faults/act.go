package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/shale-image/shale/bench/faults/disk"
	"github.com/shale-image/shale/bench/faults/script"
	"github.com/shale-image/shale/bench/netmodel"
)

// act is one script played to a node.
type act struct {
	name   string // of the script
	script *script.Script
	image  string
	face   string // how it is mounted: device, fanotify
	// healthy says that the node has another source, the registry itself, which is well;
	// the script is played from the beginning, unless the disk is to fail. Else it is
	// played when the image is mounted, but for one on start packs.
	healthy bool
	// command is run in a container too, where there is a healthy source: what it prints
	// must be what it prints without faults.
	command []string
}

func (a *act) String() string {
	words := []string{a.name, a.image}
	switch {
	case a.healthy:
		words = append(words, "beside a healthy source")
	case a.script.Network():
		words = append(words, "alone")
	}
	if a.script.Disk() {
		words = append(words, "on a disk of its own")
	}
	if a.face != device {
		words = append(words, a.face)
	}
	return strings.Join(words, ", ")
}

// outcome is what became of an act.
type outcome struct {
	took          time.Duration
	during, after *reads
	refused       bool     // the mount was, for want of room; it is one of the face device then
	met           []int    // of each fault
	why           []string // reads failed, as the service tells
	errs          []error  // what is not as it must be
	log           string   // of the service, if something is not
}

// errNothingLeft is that an image without an index is here, all of it, once it is mounted.
var errNothingLeft = errors.New("all of the image was read to mount it, and nothing is left that could fail: `shale index --push` makes it an index")

// err is what is wrong, nil if nothing is; skipped, that this could not be found out here.
func (o *outcome) err() (err error, skipped bool) {
	err = errors.Join(o.errs...)
	return err, errors.Is(err, disk.ErrUnsupported) || errors.Is(err, errNothingLeft) || errors.Is(err, errNoFace)
}

func (o *outcome) fail(format string, args ...any) {
	o.errs = append(o.errs, fmt.Errorf(format, args...))
}

const (
	readers  = 16
	diskSize = 64 << 20

	// patience is how long reads may fail after the faults have gone: what hangs is given
	// up, and who was told to come back later has.
	patience = time.Minute
)

// play plays a script, and finds out whether what must hold holds:
//
//   - no read gives a wrong byte, during and after;
//   - with a healthy source, no read fails either;
//   - without one, reads fail with EIO at worst, and when the faults have gone all are
//     right, with nothing mounted or started anew;
//   - what the script expects;
//
// but for what may fail since the disk does, and with it the face (face.go).
func (s *stage) play(ctx context.Context, a *act) *outcome {
	began := time.Now()
	o := &outcome{}
	if err := s.playTo(ctx, a, o); err != nil {
		o.errs = append(o.errs, err)
	}
	o.took = time.Since(began)
	return o
}

func (s *stage) playTo(ctx context.Context, a *act, o *outcome) (err error) {
	also := func(f func() error) { err = errors.Join(err, f()) }
	proxy, err := s.proxy()
	if err != nil {
		return err
	}
	defer also(proxy.Close)
	player := script.NewPlayer(proxy)
	player.Packs = s.packs

	var d *disk.Disk
	root := ""
	if a.script.Disk() {
		if d, err = disk.New(ctx, filepath.Join(s.dir, fmt.Sprintf("disk%d", s.nodes.Add(1))), diskSize); err != nil {
			return err
		}
		defer also(d.Close)
		root = filepath.Join(d.Dir, "root")
	}
	n, err := s.nodeFor(a, proxy, root)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, n.stop())
		if err != nil || len(o.errs) > 0 {
			o.log = n.log()
		}
		err = errors.Join(err, n.close())
	}()
	defer also(player.Stop)

	begin := func() {
		if d == nil { // no *Disk that is nil in an interface
			player.Play(a.script, nil)
		} else {
			player.Play(a.script, d)
		}
	}
	early := a.healthy && d == nil || a.script.Packs() // a pack is asked for before all else
	if early {
		begin()
	}
	mnt, err := n.mount(ctx, a.face, s.ref(a, proxy))
	if a.refused(err) {
		if room := a.room(); room >= 2*s.truth.bytes {
			return fmt.Errorf("there is room for %d bytes, the image has %d: %w", room, s.truth.bytes, err)
		}
		o.refused = true
		other := *a
		other.face = device
		a = &other
		mnt, err = n.mount(ctx, a.face, s.ref(a, proxy))
	}
	if err != nil {
		return err
	}
	if !early {
		if whole, err := n.whole(ctx); err != nil {
			return err
		} else if whole {
			return errNothingLeft
		}
		begin()
	}
	o.during = s.truth.read(mnt, s.truth.files, readers)
	o.met = player.Met()
	if err := player.Stop(); err != nil {
		return err
	}
	o.judge(a)
	if o.after, err = s.afterwards(ctx, a, mnt); err != nil {
		return err
	}
	if count, why, err := n.failures(ctx); err != nil {
		return err
	} else if o.why = why; count > 0 && a.mustNotFail() {
		o.fail("the service counts %d fetches that failed", count)
	}
	if a.healthy && len(a.command) > 0 {
		player.Play(a.script, nil)
		return s.container(ctx, a, proxy)
	}
	if d == nil {
		return nil
	}
	return s.anew(ctx, a, o, n, d, proxy)
}

// container runs the command on two new nodes, with faults and without.
func (s *stage) container(ctx context.Context, a *act, proxy *netmodel.Proxy) error {
	run := func(mirrors ...string) (out []byte, err error) {
		n, err := s.node("", s.url.Host, 5*s.timeout, 0, mirrors...)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, n.close()) }()
		return n.run(ctx, append([]string{"run", "--rm", "--face", a.face, s.url.Host + "/" + a.image}, a.command...)...)
	}
	got, err := run(proxy.Host())
	if err != nil {
		return fmt.Errorf("a container: %w", err)
	}
	want, err := run()
	if err != nil {
		return fmt.Errorf("a container, without faults: %w", err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("a container prints %.200q, and %.200q without faults", got, want)
	}
	return nil
}

func (s *stage) ref(a *act, proxy *netmodel.Proxy) string {
	if a.healthy {
		return s.url.Host + "/" + a.image
	}
	return proxy.Host() + "/" + a.image
}

func (s *stage) nodeFor(a *act, proxy *netmodel.Proxy, root string) (*node, error) {
	switch {
	case a.healthy:
		return s.node(root, s.url.Host, 5*s.timeout, a.script.Quota(), proxy.Host())
	case a.script.Expect == script.Right:
		return s.node(root, proxy.Host(), 5*s.timeout, a.script.Quota())
	}
	return s.node(root, proxy.Host(), s.timeout, a.script.Quota())
}

// judge looks at the reads during the faults.
func (o *outcome) judge(a *act) {
	if len(o.during.Wrong) > 0 {
		o.fail("wrong: %s", strings.Join(o.during.Wrong, "; "))
	}
	switch failed := len(o.during.Failed); {
	case failed > 0 && a.mustNotFail() && a.healthy:
		o.fail("%d reads failed, with a healthy source", failed)
	case failed > 0 && a.mustNotFail():
		o.fail("%d reads failed, none is expected to", failed)
	case failed == 0 && !a.healthy && a.script.Expect == script.Fails:
		o.fail("no read failed, some are expected to")
	}
	if a.script.Expect != script.Either && slices.Contains(o.met, 0) {
		o.fail("a fault was never met: %d", o.met)
	}
}

// afterwards reads all again, and again what fails, until all is right; on a dead disk
// once, since there is no until.
func (s *stage) afterwards(ctx context.Context, a *act, mnt string) (*reads, error) {
	forget(mnt, s.truth.files)
	left := s.truth.files
	for end := time.Now().Add(patience); ; {
		r := s.truth.read(mnt, left, readers)
		switch {
		case len(r.Wrong) > 0:
			return r, fmt.Errorf("afterwards, wrong: %s", strings.Join(r.Wrong, "; "))
		case len(r.Failed) == 0 || a.dead():
			return r, nil
		case ctx.Err() != nil:
			return r, ctx.Err()
		case time.Now().After(end):
			return r, fmt.Errorf("after %v without faults %d reads fail", patience, len(r.Failed))
		}
		left = r.Failed
		time.Sleep(200 * time.Millisecond)
	}
}

// anew has the service end, and the disk unmounted and mounted, and reads all again:
// what the disk has lost must not be believed to be there.
func (s *stage) anew(ctx context.Context, a *act, o *outcome, n *node, d *disk.Disk, proxy *netmodel.Proxy) error {
	if err := n.stop(); err != nil {
		return err
	}
	if err := d.Remount(ctx); err != nil {
		return err
	}
	if err := n.configure((5 * s.timeout).String()); err != nil { // nothing is to fail any more
		return err
	}
	mnt, err := n.mount(ctx, a.face, s.ref(a, proxy))
	if err != nil {
		return fmt.Errorf("on the disk, mounted anew: %w", err)
	}
	if r := s.truth.read(mnt, s.truth.files, readers); len(r.Wrong)+len(r.Failed) > 0 {
		o.fail("on the disk, mounted anew: wrong: %q; failed: %q", r.Wrong, r.Failed)
	}
	return nil
}
