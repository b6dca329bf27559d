// Package source is where the layers of an image to convert come from: an image
// in a repository, a tar archive of a root file system, or a directory. Whatever
// it is, a layer is a sequence of entries (package index/layer) and is proved to
// be what its image says by the time the last entry has been read. The package
// knows nothing of what becomes of the entries.
package source

import (
	"context"
	"encoding/json"
	"io"
	"runtime"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index/layer"
)

// Image is an image to convert.
type Image struct {
	Name        string // for messages
	Config      []byte // JSON, as it came; its rootfs and history are to be replaced
	Platform    image.Platform
	Annotations map[string]string // of the manifest
	Layers      []Layer           // lowest first
}

// Layer is one layer of an image.
type Layer struct {
	Name string // for messages: the digest, or a path
	Size int64  // bytes to be read, compressed; 0 if not known

	// Open starts to read. progress is called now and then with the number of
	// bytes read so far, from any goroutine. ctx governs the whole life of the
	// Reader, and to cancel it ends a Read that waits.
	Open func(ctx context.Context, progress func(int64)) (Reader, error)
}

// Reader reads a layer's entries as layer.Reader does: Next moves on to an entry
// or returns io.EOF, Read gives the entry's data. io.EOF from Next means that
// all of the layer was read and is what the image says. Errors do not name the
// layer. It is not safe for concurrent use. Close may be called early, but not
// while a Read waits: cancel ctx first.
type Reader interface {
	Next() (*layer.Entry, error)
	io.ReadCloser
}

// bare returns the image that a root file system alone makes: with no command,
// for platform, or this machine's if that is zero.
func bare(name string, platform image.Platform, l Layer) *Image {
	if platform.OS == "" {
		platform.OS = "linux"
	}
	if platform.Architecture == "" {
		platform.Architecture = runtime.GOARCH
	}
	config, err := json.Marshal(struct {
		image.Platform
		Config struct{} `json:"config"`
	}{Platform: platform})
	if err != nil {
		panic(err) // there are only strings in it
	}
	return &Image{Name: name, Config: config, Platform: platform, Layers: []Layer{l}}
}
