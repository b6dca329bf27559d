package mount

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/shale-image/shale/mount/fusedev"
)

// Image is what a linked image is to a face.
type Image struct {
	Meta     string          // path of its EROFS metadata
	Segments []string        // paths of the files with its data, in the order of device slots
	Flat     []int64         // flat addresses of these, for Fanotify
	Content  fusedev.Content // its flat address space
	Complete bool            // all data are in Segments
	Meets    bool            // Segments cannot be block devices: see link.Info
	Verified bool            // the file system of these verifies what is read, now or later
}

// Face is a way to show an image as a file system. All faces show the same
// tree and the same bytes; package mounttest holds them to that. It is safe
// for concurrent use.
type Face interface {
	// Name is what users call it.
	Name() string
	// Mount mounts an image read-only, detached or, if the face cannot do
	// that, at o.Dir. Meta and Segments must stay until Mounted.Done is closed,
	// and so must Content if the mount is Served. If ctx ends first the call
	// fails; later ctx has no effect.
	Mount(ctx context.Context, im Image, o Options) (*Mounted, error)
}

// ErrIncomplete says that a face cannot show an image whose data are not all
// on the node.
var ErrIncomplete = errors.New("the image's data are not all on this node")

type face struct {
	name  string
	mount func(context.Context, Image, Options) (*Mounted, error)
}

func (f face) Name() string { return f.name }

func (f face) Mount(ctx context.Context, im Image, o Options) (*Mounted, error) {
	m, err := f.mount(ctx, im, o)
	if err != nil {
		return nil, fmt.Errorf("face %s: %w", f.name, err)
	}
	return m, nil
}

var (
	directFace Face = face{"direct", func(_ context.Context, im Image, o Options) (*Mounted, error) {
		if !im.Complete {
			return nil, ErrIncomplete
		}
		return im.direct(o)
	}}
	deviceFace Face = face{"device", func(ctx context.Context, im Image, o Options) (*Mounted, error) {
		return Device(ctx, im.Content, o)
	}}
	fanotifyFace Face = face{"fanotify", Fanotify}
	fuseFace     Face = face{"fuse", func(ctx context.Context, im Image, o Options) (*Mounted, error) {
		return Fuse(ctx, im.Meta, im.Content, o)
	}}
)

// Faces lists all faces, the best first.
func Faces() []Face { return []Face{directFace, deviceFace, fanotifyFace, fuseFace} }

// FaceAuto is the name by which users ask for the face that Choose gives.
const FaceAuto = "auto"

// FaceNames lists what users may ask for.
func FaceNames() string {
	names := []string{FaceAuto}
	for _, f := range Faces() {
		names = append(names, f.Name())
	}
	return strings.Join(names, ", ")
}

// FaceNamed returns the face with a name.
func FaceNamed(name string) (Face, error) {
	for _, f := range Faces() {
		if f.Name() == name {
			return f, nil
		}
	}
	return nil, fmt.Errorf("there is no face %q; there are %s", name, FaceNames())
}

// Choose returns the best face for a machine, a complete or incomplete image,
// and a caller who is root or not, and says why. It returns nil if there is
// none, and what is missing.
func Choose(c Capabilities, complete, root bool) (Face, string) {
	how := "EROFS mounts files"
	if !c.FileBackedEROFS {
		how = "EROFS mounts files through loop devices"
	}
	switch {
	case root && c.Device() && complete:
		return directFace, how + "; all data are here, so nothing of ours is between them and the reader"
	case root && c.Device():
		return deviceFace, how + "; a read of what is not here yet waits for it"
	case root && c.DetachedFUSE:
		return fuseFace, "EROFS cannot be mounted: " + c.why("FileBackedEROFS")
	case root:
		return nil, "neither EROFS nor FUSE can be mounted: " + c.why("DetachedFUSE")
	case c.Fusermount:
		return fuseFace, "without root only fusermount3 can mount, at a directory and for this user"
	}
	return nil, "without root fusermount3 is needed: " + c.why("Fusermount")
}

func (c Capabilities) why(field string) string {
	if err := c.Why[field]; err != nil {
		return err.Error()
	}
	return "it was not tried"
}
