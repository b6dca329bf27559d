package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// archive is a store in a tar file that is only read: a layout, or what docker
// save writes. The file's entries are listed once and read where they lie; an
// archive that is compressed as a whole is unpacked into a scratch file first.
type archive struct {
	path   string
	docker bool
	opts   Options

	once   sync.Once
	err    error
	file   *os.File
	spans  map[string]span   // by name
	links  map[string]string // name -> the name that it stands for
	saved  []saved           // of a docker archive: its images
	byHash map[string]span   // of a docker archive: its blobs
}

// span is where in the archive a file's content is.
type span struct{ off, size int64 }

// maxArchiveEntries bounds what is kept in memory of an archive.
const maxArchiveEntries = 1 << 20

func newArchive(ref Ref, opts Options) *archive {
	return &archive{path: ref.dir, docker: ref.prefix == dockerPrefix, opts: opts}
}

// open lists the archive, with the first request.
func (a *archive) open() error {
	a.once.Do(func() {
		if a.err = a.list(); a.err == nil && a.docker {
			a.err = a.loadDocker()
		}
		if a.err != nil {
			a.err = fmt.Errorf("%s: %w", a.path, a.err)
		}
	})
	return a.err
}

func (a *archive) close() error {
	a.once.Do(func() { a.err = os.ErrClosed })
	if a.file == nil {
		return nil
	}
	return a.file.Close()
}

func (a *archive) list() (err error) {
	if a.file, err = os.Open(a.path); err != nil {
		return missing(err)
	}
	if fi, err := a.file.Stat(); err != nil || !fi.Mode().IsRegular() {
		return unsupported("archive", "what is no regular file")
	}
	if err := a.unpack(); err != nil {
		return err
	}
	fi, err := a.file.Stat()
	if err != nil {
		return err
	}
	a.spans, a.links = map[string]span{}, map[string]string{}
	// The reader skips by seeking and reads no further than it must, so that
	// the file stands where an entry's content starts.
	for tr := tar.NewReader(a.file); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return corrupt("archive", "%v", err)
		}
		if len(a.spans)+len(a.links) == maxArchiveEntries {
			return overLimitN("archive", "entries", maxArchiveEntries)
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "/"))
		delete(a.spans, name)
		delete(a.links, name)
		switch h.Typeflag {
		case tar.TypeReg:
			off, err := a.file.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			for key := range h.PAXRecords {
				if strings.HasPrefix(key, "GNU.sparse.") {
					return unsupported(name, "a sparse file in an archive of an image")
				}
			}
			if h.Size > fi.Size()-off {
				return corrupt("archive", "%q has %d bytes at %d, the file ends at %d", printable(name), h.Size, off, fi.Size())
			}
			a.spans[name] = span{off, h.Size}
		case tar.TypeSymlink: // docker save: layers that are there twice
			a.links[name] = path.Join(path.Dir(name), h.Linkname)
		case tar.TypeLink:
			a.links[name] = path.Clean(h.Linkname)
		}
	}
}

// unpack puts an unpacked archive in place of one that is compressed.
func (a *archive) unpack() error {
	r, kind, err := layer.Decompress(a.file, index.Limits{})
	if err != nil {
		return err
	}
	defer r.Close()
	if kind == layer.None {
		_, err := a.file.Seek(0, io.SeekStart)
		return err
	}
	f, err := os.CreateTemp("", "shale-archive-")
	if err != nil {
		return err
	}
	os.Remove(f.Name())
	if _, err = io.Copy(f, r); err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return err
	}
	r.Close() // which reads the file
	a.file.Close()
	a.file = f
	return nil
}

// find returns where the content of a name is.
func (a *archive) find(name string) (span, error) {
	name = path.Clean(name)
	for range 8 {
		if s, ok := a.spans[name]; ok {
			return s, nil
		}
		to, ok := a.links[name]
		if !ok {
			break
		}
		name = to
	}
	return span{}, fmt.Errorf("%s: %w in the archive", printable(name), blob.ErrNotFound)
}

// readManifest reads a file of at most Options.ManifestLimit.
func (a *archive) readManifest(name string) ([]byte, error) {
	return a.read(name, a.opts.ManifestLimit, overManifestLimit)
}

// read reads a file of at most limit bytes; of a larger one over is the error.
func (a *archive) read(name string, limit int64, over func(name, what string, limit int64) error) ([]byte, error) {
	s, err := a.find(name)
	if err != nil {
		return nil, err
	}
	if s.size > limit {
		return nil, over(printable(name), "file", limit)
	}
	p := make([]byte, s.size)
	if _, err := a.file.ReadAt(p, s.off); err != nil {
		return nil, fmt.Errorf("%s: %w", printable(name), err)
	}
	return p, nil
}

func (a *archive) blob(digest string) (span, error) {
	if !reDigest.MatchString(digest) {
		return span{}, fmt.Errorf("%.100q: %w: not a sha256 digest", digest, blob.ErrNotFound)
	}
	if s, ok := a.byHash[digest]; ok {
		return s, nil
	}
	return a.find(blobPath(digest))
}

// Range implements blob.Source.
func (a *archive) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := a.open(); err != nil {
		return nil, err
	}
	s, err := a.blob(ref.Digest)
	if err != nil {
		return nil, fmt.Errorf("blob %.100s: %w", ref.Digest, err)
	}
	size := s.size
	if ref.Size > 0 {
		size = min(size, ref.Size)
	}
	if off < 0 || n <= 0 || n > size || off > size-n {
		return nil, fmt.Errorf("blob %s: %d bytes at offset %d: %w: it has %d bytes", ref.Digest, n, off, blob.ErrRange, size)
	}
	return &archived{io.NewSectionReader(a.file, s.off+off, n), ctx, ref.Digest, n}, nil
}

// archived is a range of a file in an archive.
type archived struct {
	r      io.Reader
	ctx    context.Context
	digest string
	left   int64
}

func (r *archived) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(p)
	if r.left -= int64(n); err == io.EOF && r.left > 0 { // the archive shrank since it was listed
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		err = fmt.Errorf("blob %s: %d bytes missing: %w", r.digest, r.left, err)
	}
	return n, err
}

func (r *archived) Close() error { return nil }

func (a *archive) manifest(ctx context.Context, reference string) (Manifest, error) {
	if err := ctx.Err(); err != nil {
		return Manifest{}, err
	}
	if err := a.open(); err != nil {
		return Manifest{}, err
	}
	if a.docker {
		return a.dockerManifest(reference)
	}
	m := Manifest{Digest: reference}
	if !reDigest.MatchString(reference) {
		p, err := a.readManifest("index.json")
		if err != nil {
			return Manifest{}, err
		}
		e, err := findTag(a.path, p, reference)
		if err != nil {
			return Manifest{}, err
		}
		m.MediaType, m.Digest = e.MediaType, e.Digest
	}
	var err error
	if m.Bytes, err = a.readManifest(blobPath(m.Digest)); err != nil {
		return Manifest{}, fmt.Errorf("manifest %s: %w", m.Digest, err)
	}
	if got := digestOf(m.Bytes); got != m.Digest {
		return Manifest{}, corrupt("manifest "+m.Digest, "its content has digest %s", got)
	}
	return m, nil
}

var errReadOnly = errors.New("archives are only read, not written")

func (a *archive) pushBlob(context.Context, Descriptor, func() (io.ReadCloser, error), []string) error {
	return errReadOnly
}

func (a *archive) pushManifest(context.Context, Manifest, string) error { return errReadOnly }
