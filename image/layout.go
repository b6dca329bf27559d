package image

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/dirblob"
	"golang.org/x/sys/unix"
)

// layout is a store in an OCI layout directory:
//
//	oci-layout            {"imageLayoutVersion":"1.0.0"}
//	index.json            an index; a tag is the annotation refName of an entry
//	blobs/sha256/<hex>    everything else
//
// Readers see a file whole or not at all. Writers of index.json, here and in
// other processes, take turns with flock(2) on the directory itself, which
// leaves no lock file behind.
type layout struct {
	dir  string
	opts Options

	mu    sync.Mutex
	blobs *dirblob.Source // opened with the first read; the directory may not exist before
}

const (
	refName       = "org.opencontainers.image.ref.name"
	layoutVersion = `{"imageLayoutVersion":"1.0.0"}`
	blobDir       = "blobs/sha256"
)

func newLayout(ref Ref, opts Options) *layout { return &layout{dir: ref.dir, opts: opts} }

func (l *layout) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.blobs == nil {
		return nil
	}
	err := l.blobs.Close()
	l.blobs = nil
	return err
}

// Range implements blob.Source.
func (l *layout) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	l.mu.Lock()
	if l.blobs == nil {
		s, err := dirblob.Open(l.dir)
		if err != nil {
			l.mu.Unlock()
			return nil, fmt.Errorf("blob %s: %w", ref.Digest, missing(err))
		}
		l.blobs = s
	}
	src := l.blobs
	l.mu.Unlock()
	return src.Range(ctx, ref, off, n)
}

// missing adds blob.ErrNotFound to what the file system calls so.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", blob.ErrNotFound, err)
	}
	return err
}

func (l *layout) manifest(ctx context.Context, reference string) (Manifest, error) {
	if err := ctx.Err(); err != nil {
		return Manifest{}, err
	}
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return Manifest{}, missing(err)
	}
	defer root.Close()
	m := Manifest{Digest: reference}
	size := int64(-1)
	if !reDigest.MatchString(reference) {
		e, err := l.find(root, reference)
		if err != nil {
			return Manifest{}, err
		}
		m.MediaType, m.Digest, size = e.MediaType, e.Digest, e.Size
	}
	name := blobPath(m.Digest)
	if m.Bytes, err = l.read(root, name); err != nil {
		return Manifest{}, fmt.Errorf("manifest %s: %w", m.Digest, err)
	}
	if got := digestOf(m.Bytes); got != m.Digest || size >= 0 && size != int64(len(m.Bytes)) {
		return Manifest{}, corrupt("manifest "+m.Digest, "its content has digest %s and %d bytes", got, len(m.Bytes))
	}
	return m, nil
}

// find looks a tag up. Without a tag it is the only entry, or "latest".
func (l *layout) find(root *os.Root, tag string) (entry, error) {
	p, err := l.read(root, "index.json")
	if err != nil {
		return entry{}, err
	}
	return findTag(l.dir, p, tag)
}

// findTag looks a tag up in the index.json of a layout that is at where.
func findTag(where string, p []byte, tag string) (entry, error) {
	idx, err := parseDocument("index.json", MediaTypeIndex, p)
	if err != nil {
		return entry{}, err
	}
	if tag == "" {
		images := slices.DeleteFunc(slices.Clone(idx.Manifests), func(e entry) bool { return isReferrersTag(e.Annotations[refName]) })
		if len(images) == 1 {
			return images[0], nil
		}
	}
	if tag == "" {
		tag = "latest"
	}
	var names []string
	for _, e := range idx.Manifests {
		name := e.Annotations[refName]
		// Some tools write the whole reference.
		if name == tag || strings.HasSuffix(name, ":"+tag) {
			return e, nil
		}
		if name != "" && len(names) < 100 {
			names = append(names, printable(name))
		}
	}
	return entry{}, notFound(where, "no tag %q; it has %d manifests, tags: %s", tag, len(idx.Manifests), strings.Join(names, ", "))
}

// read reads a regular file of at most the size of a manifest.
func (l *layout) read(root *os.Root, name string) ([]byte, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, missing(err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, notFound(name, "not a regular file")
	}
	p, err := io.ReadAll(io.LimitReader(f, l.opts.ManifestLimit+1))
	if err == nil && int64(len(p)) > l.opts.ManifestLimit {
		err = overManifestLimit(name, "file", l.opts.ManifestLimit)
	}
	return p, err
}

func (l *layout) pushBlob(ctx context.Context, d Descriptor, open func() (io.ReadCloser, error), _ []string) error {
	root, err := l.create()
	if err != nil {
		return err
	}
	defer root.Close()
	name := blobPath(d.Digest)
	if fi, err := root.Lstat(name); err == nil && fi.Mode().IsRegular() && fi.Size() == d.Size {
		return nil
	}
	r, err := open()
	if err != nil {
		return err
	}
	v := newVerifier(r, d)
	defer v.Close()
	return writeFile(root, blobDir+"/.new-"+rand.Text(), name, func(w io.Writer) error {
		_, err := io.Copy(w, contextReader{ctx, v})
		return err
	})
}

func (l *layout) pushManifest(ctx context.Context, m Manifest, tag string) error {
	d := Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Bytes))}
	if err := l.pushBytes(ctx, d, m.Bytes); err != nil || tag == "" {
		return err
	}
	return l.update(func(_ *os.Root, index []byte) ([]byte, error) {
		d.Annotations = map[string]string{refName: tag}
		return setTag(index, d)
	})
}

func (l *layout) pushBytes(ctx context.Context, d Descriptor, p []byte) error {
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }
	return l.pushBlob(ctx, d, open, nil)
}

// update replaces index.json by what change makes of it, unless that is nil.
// The layout exists.
func (l *layout) update(change func(root *os.Root, index []byte) ([]byte, error)) error {
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	unlock, err := lockDir(root)
	if err != nil {
		return err
	}
	defer unlock()
	p, err := l.read(root, "index.json")
	if errors.Is(err, fs.ErrNotExist) {
		p, err = []byte(`{"schemaVersion":2,"mediaType":"`+MediaTypeIndex+`","manifests":[]}`), nil
	}
	if err != nil {
		return err
	}
	if p, err = change(root, p); err != nil || p == nil {
		return err
	}
	if int64(len(p)) > l.opts.ManifestLimit { // nobody could read it
		return overManifestLimit("index.json", "index", l.opts.ManifestLimit)
	}
	const temp = ".index.json.new"
	if err := root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a process that died
		return err
	}
	return writeFile(root, temp, "index.json", func(w io.Writer) error {
		_, err := w.Write(p)
		return err
	})
}

// setTag returns index.json with d in place of the entry that had d's tag.
func setTag(index []byte, d Descriptor) ([]byte, error) {
	if _, err := parseDocument("index.json", MediaTypeIndex, index); err != nil {
		return nil, err
	}
	return editIndex("index.json", index, func(e entry) bool {
		name, tagged := e.Annotations[refName]
		return name == d.Annotations[refName] || !tagged && e.Digest == d.Digest
	}, d)
}

// create makes the directory a layout unless it is one.
func (l *layout) create() (*os.Root, error) {
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return nil, err
	}
	err = root.MkdirAll(blobDir, 0o755)
	if err == nil {
		if _, serr := root.Lstat("oci-layout"); errors.Is(serr, fs.ErrNotExist) {
			err = writeFile(root, ".oci-layout-"+rand.Text(), "oci-layout", func(w io.Writer) error {
				_, err := io.WriteString(w, layoutVersion)
				return err
			})
		}
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// writeFile writes temp, which must not exist, syncs it and gives it its name.
func writeFile(root *os.Root, temp, name string, write func(io.Writer) error) error {
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	if err = write(f); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = root.Rename(temp, name)
	}
	if err != nil {
		root.Remove(temp)
		return err
	}
	parent := "."
	if i := strings.LastIndexByte(name, '/'); i > 0 {
		parent = name[:i]
	}
	dir, err := root.Open(parent)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// lockDir takes the layout's lock and returns what releases it.
func lockDir(root *os.Root) (func(), error) {
	f, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", root.Name(), err)
	}
	return func() { f.Close() }, nil
}

// contextReader fails once its context is done.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
