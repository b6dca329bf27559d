// Package reader finds out which format an image has and reads its index.
//
// Each format is a package under index/ that knows its bytes and no registry;
// this package knows how the formats are announced in manifests. A new format
// is a new case here.
package reader

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"sync"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/fleet"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
	"github.com/shale-image/shale/index/rafs"
	"github.com/shale-image/shale/trust"
)

// How images of the Nydus format look in a registry: blobs of chunks are
// layers of their own media type, and the last layer is an ordinary tar+gzip
// that holds the bootstrap.
const (
	NydusBlobMediaType   = "application/vnd.oci.image.layer.nydus.blob.v1"
	NydusBlob            = "containerd.io/snapshot/nydus-blob"
	NydusBootstrap       = "containerd.io/snapshot/nydus-bootstrap"
	NydusFSVersion       = "containerd.io/snapshot/nydus-fs-version"
	NydusBootstrapInside = "image/image.boot" // in the bootstrap layer
)

// maxBootstrap bounds the metadata of one image, uncompressed.
const maxBootstrap = 1 << 30

// ErrNoIndex says that nothing tells what is where in an image but its layers.
var ErrNoIndex = errors.New("the image has no index (shale index makes one, shale convert a form that has its own)")

// Kind is how an image says what is where in it.
type Kind string

// The kinds.
const (
	Nydus Kind = "nydus" // a bootstrap among its layers
	Index Kind = "index" // an artifact beside it, or a file of this node
	TOC   Kind = "toc"   // a table of contents in each of its layers
	SOCI  Kind = "soci"  // a SOCI index beside it
)

// Tree reads the index of an image. tmp is a directory for a scratch file.
func Tree(ctx context.Context, repo *image.Repository, img *image.Image, tmp string) (*index.Tree, error) {
	raw, err := Fetch(ctx, repo, img, Options{TempDir: tmp})
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	return raw.Tree()
}

// Raw is the index of an image as it was fetched. It may go to another process
// to be read: bytes from a registry, once their digest is right, are still
// somebody else's.
type Raw struct {
	Kind     Kind
	Trust    Trust              // what it takes to believe it
	Key      string             // id of one of Options.Keys that has signed it, if any
	Name     string             // for errors: the digest of what the index was in
	Manifest string             // digest of the image's
	Size     int64              // of File
	Stored   int64              // bytes that were fetched for it
	Layers   []image.Descriptor // of the image
	Side     image.Descriptor   // of Index: what lies beside the layers, if anything
	Tables   []Table            // of TOC: one for each layer
	Parts    []Part             // of SOCI: one for each layer
	TempDir  string             // of SOCI: for scratch files
	Limits   index.Limits       // of what it may say
	Metas    []Meta             // of Nydus, for some blobs; what they tell of is in File behind Size
	File     *os.File           `json:"-"` // without a name

	// Keep is given the content of layers that had to be fetched to read the
	// index of a SOCI image: scan.Options.Keep. It may be nil.
	Keep func(chunk.Digest, []byte) error `json:"-"`

	Cut uint32 `json:"-"` // of SOCI, whose indexes do not say it: scan.Options.Cut

	Packs []PackRef `json:"-"` // start packs beside it, if Options.Start asked for them
	Pack  *Pack     `json:"-"` // that of them which fits the start, on its way; nil if there is none

	Traced bool `json:"-"` // traces lie beside it, too (package fleet)

	unlisted error // why what lies beside it cannot be had
}

// Options say where an index may come from.
type Options struct {
	TempDir string     // for a scratch file
	Trust   Trust      // default Repository
	Keys    trust.Keys // whose signatures count
	Limits  index.Limits
	Start   *Start // if not nil: look for a start pack, too, and begin to fetch it

	refuted []string // names of indexes that turned out to be of no use
}

// maxRefuted is how many indexes are tried, since whether one can be used is known only
// when all of it has been read.
const maxRefuted = 4

// Use fetches an index and has it used. One that turns out to be of no use is passed
// over for another that the image may have: what is wrong with an index beside it, which
// whoever may push has put there, hides neither another one nor the tables of contents
// of its layers. If none is left, the error wraps ErrNoIndex and what was wrong with the
// first. The caller closes the Raw, which is the one that use took.
func Use(ctx context.Context, repo *image.Repository, img *image.Image, o Options, use func(*Raw) error) (*Raw, error) {
	var bad error
	for {
		raw, err := Fetch(ctx, repo, img, o)
		if bad != nil && errors.Is(err, ErrNoIndex) {
			return nil, bad
		}
		if err != nil {
			return nil, err
		}
		if err = use(raw); err == nil {
			return raw, nil
		}
		err = errors.Join(err, raw.Close())
		if raw.Kind == Nydus || !OfNoUse(err) || ctx.Err() != nil {
			return nil, err
		}
		if bad == nil {
			bad = err
			if !errors.Is(err, ErrNoIndex) {
				bad = fmt.Errorf("%s: %w: %w", img.ManifestDigest, ErrNoIndex, err)
			}
		}
		o.refuted = append(slices.Clip(o.refuted), raw.Name)
		if len(o.refuted) == maxRefuted {
			return nil, bad
		}
	}
}

// OfNoUse tells what is wrong with an index from what is wrong with this node.
func OfNoUse(err error) bool {
	return errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrUnsupported) || errors.Is(err, index.ErrLimit) || errors.Is(err, ErrNoIndex)
}

// Fetch fetches the index of an image into a scratch file, verified but for tables
// of contents. Those, and SOCI indexes, are for images that have nothing else: an
// index cuts files smaller, and has digests of their content. The caller closes the
// Raw.
func Fetch(ctx context.Context, repo *image.Repository, img *image.Image, o Options) (_ *Raw, err error) {
	raw := &Raw{Kind: Nydus, Trust: Bound, Manifest: img.ManifestDigest, Layers: img.Layers, Limits: o.Limits}
	defer func() {
		if err != nil && raw.Pack != nil {
			_ = raw.Pack.Close()
		}
	}()
	boot, ok := Bootstrap(img)
	if !ok {
		// What is wrong with one of them says nothing about the others.
		err := raw.fetchIndex(ctx, repo, img, o)
		for _, fetch := range []func(context.Context, *image.Repository, *image.Image, Options) error{raw.fetchTables, raw.fetchSOCI} {
			if !errors.Is(err, ErrNoIndex) || o.Trust == Local || ctx.Err() != nil {
				break
			}
			told := useless(err) || errors.As(err, new(needsTrust)) // more than that there is none
			if none := fetch(ctx, repo, img, o); !told || !errors.Is(none, ErrNoIndex) {
				err = none
			}
		}
		if err != nil {
			return nil, err
		}
		return raw, nil
	}
	if v := boot.Annotations[NydusFSVersion]; v != "" && v != "6" {
		return nil, fmt.Errorf("%s: RAFS version %s: %w", boot.Digest, v, index.ErrUnsupported)
	}
	var packs sync.WaitGroup
	if o.Start != nil {
		packs.Go(func() {
			// What goes wrong with it is no reason not to start the image.
			found, _ := raw.list(ctx, repo, img, PackArtifactType, fleet.ArtifactType)
			raw.openPack(ctx, repo, found, o)
		})
	}
	err = raw.fetchBootstrap(ctx, repo, boot, o.TempDir)
	packs.Wait()
	if err != nil {
		return nil, err
	}
	return raw, nil
}

// Close gives up the scratch file, and the pack if it is still there.
func (r *Raw) Close() error {
	if r.Pack != nil {
		_ = r.Pack.Close()
	}
	return r.File.Close()
}

// openPack begins to fetch the pack that fits the start that is planned.
func (r *Raw) openPack(ctx context.Context, repo *image.Repository, found []image.Referrer, o Options) {
	if o.Start == nil {
		return
	}
	r.Packs = packRefs(found)
	r.Traced = slices.ContainsFunc(found, func(d image.Referrer) bool { return d.Type == fleet.ArtifactType })
	if p := o.Start.Choose(r.Packs); p != nil {
		r.Pack = OpenPack(context.WithoutCancel(ctx), repo, *p, r.Manifest)
	}
}

// Tree reads the index.
func (r *Raw) Tree() (*index.Tree, error) {
	_, t, err := r.Open()
	return t, err
}

// Open is Tree for tools that also look at the tables of a Nydus bootstrap; of
// other images there are none. If tables of contents turn out to be of no use,
// the error wraps ErrNoIndex and the cause. Of the rafs.Image only what is in memory may be
// used (Blobs, Flags, ...) once the Raw is closed.
func (r *Raw) Open() (im *rafs.Image, t *index.Tree, err error) {
	switch r.Kind {
	case Nydus:
		im, t, err = r.rafs()
	case Index:
		t, err = r.artifact()
	case TOC:
		t, err = r.toc()
	case SOCI:
		t, err = r.soci()
	default:
		err = fmt.Errorf("index of kind %q: %w", r.Kind, index.ErrUnsupported)
	}
	if err != nil {
		return nil, nil, err
	}
	if err := t.CheckLimits(r.Limits); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", r.Name, err)
	}
	return im, t, nil
}

// Bootstrap returns the layer of a Nydus image that holds its metadata.
func Bootstrap(img *image.Image) (image.Descriptor, bool) {
	for _, l := range img.Layers {
		if l.Annotations[NydusBootstrap] == "true" {
			return l, true
		}
	}
	return image.Descriptor{}, false
}

// spoolBootstrap fetches the bootstrap layer and takes the bootstrap out of it,
// into an unlinked file. Nothing looks at the layer before all of it is here
// and its digest is right.
func spoolBootstrap(ctx context.Context, repo *image.Repository, boot image.Descriptor, tmp string) (_ *os.File, size int64, err error) {
	if boot.Size > maxBootstrap {
		return nil, 0, index.Errorf(index.ErrLimit, boot.Digest, -1, "bootstrap layer of %d bytes, at most %d are read", boot.Size, maxBootstrap)
	}
	compressed, err := scratch(tmp)
	if err != nil {
		return nil, 0, err
	}
	defer compressed.Close()
	if _, err := repo.Spool(ctx, boot, compressed, 0); err != nil {
		return nil, 0, err
	}
	if _, err := compressed.Seek(0, io.SeekStart); err != nil {
		return nil, 0, err
	}
	f, err := scratch(tmp)
	if err != nil {
		return nil, 0, err
	}
	if size, err = Unpack(f, compressed); err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("bootstrap layer %s: %w", boot.Digest, err)
	}
	return f, size, nil
}

// scratch makes a file without a name.
func scratch(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".bootstrap-")
	if err == nil {
		os.Remove(f.Name())
	}
	return f, err
}

// Unpack copies the bootstrap that is in a bootstrap layer, a tar archive
// compressed or not, to w and returns its size. What follows it in the layer is
// not read. Errors wrap index.ErrCorrupt or index.ErrLimit, or are those of w
// and the layer's reader.
func Unpack(w io.Writer, blob io.Reader) (int64, error) {
	// Some room for entries before it: the limit is on all that is unpacked.
	zr, _, err := layer.Decompress(blob, index.Limits{StreamBytes: maxBootstrap + 1<<20})
	if err != nil {
		return 0, err
	}
	defer zr.Close()
	unpacked := &source{r: zr}
	corrupt := func(err error) error {
		if unpacked.err != nil { // the stream's own, not what tar makes of it
			return unpacked.err
		}
		return fmt.Errorf("%w: %v", index.ErrCorrupt, err)
	}
	for tr := tar.NewReader(unpacked); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return 0, fmt.Errorf("%w: no %s inside", index.ErrCorrupt, NydusBootstrapInside)
		}
		if err != nil {
			return 0, corrupt(err)
		}
		if h.Typeflag != tar.TypeReg || path.Clean("/"+h.Name) != "/"+NydusBootstrapInside {
			continue
		}
		if h.Size > maxBootstrap {
			return 0, fmt.Errorf("%w: %s has %d bytes, at most %d are read", index.ErrLimit, h.Name, h.Size, maxBootstrap)
		}
		in := &source{r: tr}
		n, err := io.Copy(w, in)
		if in.err != nil {
			err = corrupt(in.err)
		}
		return n, err
	}
}

// source keeps the error of a reader, to tell it from what others say about the
// bytes.
type source struct {
	r   io.Reader
	err error // not io.EOF
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}
