package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/mount"
)

// readSlack lets the error of a fetch that has given up reach its readers, which
// says more than that the time is over; half of it is for the last try of a fetch, which is
// made when the time is over.
const readSlack = 5 * time.Second

// show mounts an image with the face that was asked for, or the best one, and
// tells which. An incomplete image is device as root and fuse otherwise, so
// that the machine need not be probed first: that takes tens of milliseconds.
func (s *server) show(ctx context.Context, m *mounted, p mountArgs) (*mount.Mounted, string, error) {
	im := m.image
	image, err := s.imageOf(im)
	if err != nil {
		return nil, "", err
	}
	o := s.mountOptions(p, im)
	o.Keep = func(c mount.Connection) error {
		m.kept, m.face, m.number = true, deviceFace, c.Number
		return s.keepMount(m, []*os.File{c.Dev, c.Abort})
	}
	o.Watch = func(w mount.Watching) error { return s.keepWatched(m, w) }
	if p.Face != "" && p.Face != mount.FaceAuto {
		face, err := mount.FaceNamed(p.Face)
		if err != nil {
			return nil, "", err
		}
		name := face.Name()
		if name == fanotifyFace && image.Complete {
			name = directFace // it is just that
		}
		fs, err := face.Mount(ctx, image, o)
		return fs, name, err
	}
	root := os.Geteuid() == 0
	able := mount.Capabilities{FileBackedEROFS: true, DetachedFUSE: true, Fusermount: true}
	first, _ := mount.Choose(able, image.Complete, root)
	fs, err := first.Mount(ctx, image, o)
	if err == nil || ctx.Err() != nil {
		return fs, first.Name(), err
	}
	// It cannot be done here, or not with this pool's file system: find out
	// what can.
	s.log.Warn("the best face does not work here", "face", first.Name(), "err", err)
	for _, complete := range []bool{image.Complete, false} {
		face, why := mount.Choose(mount.Probe(), complete, root)
		if face == nil {
			return nil, "", fmt.Errorf("%w (%s; see `shale doctor`)", err, why)
		}
		if face.Name() == first.Name() {
			continue
		}
		fs, err := face.Mount(ctx, image, o)
		return fs, face.Name(), err
	}
	return nil, "", err
}

// imageOf is what the image is to a face.
func (s *server) imageOf(im *fill.Image) (mount.Image, error) {
	l := im.Linked()
	missing := im.Missing().Chunks
	out := mount.Image{Meta: filepath.Join(l.Dir, "meta"), Content: im, Complete: missing == 0, Meets: l.Meets}
	for _, ls := range l.Segments {
		segment, ok := s.pool.Segment(ls.ID)
		if !ok {
			return mount.Image{}, fmt.Errorf("segment %08x: %w", ls.ID, fill.ErrStale)
		}
		out.Segments, out.Flat = append(out.Segments, segment.Path()), append(out.Flat, ls.Flat)
		out.Verified = out.Verified || segment.CanSeal()
	}
	return out, nil
}

// served counts the mounts whose readers need this process. s.mu is held.
func (s *server) served() (n int) {
	for _, m := range s.mounts {
		if m.fs.Served() {
			n++
		}
	}
	return n + s.lost
}
