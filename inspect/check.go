package inspect

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/rafs"
	"github.com/shale-image/shale/reader"
)

// Result is what Check found.
type Result struct {
	Ref            string   `json:"ref"`
	ManifestDigest string   `json:"manifest_digest,omitempty"`
	Converted      bool     `json:"converted"`
	Objects        int      `json:"objects"` // config, layers, blobs
	Bytes          int64    `json:"bytes"`   // of the objects
	Chunks         int      `json:"chunks"`  // verified, bad ones included
	Defects        []Defect `json:"defects"` // in the order of the objects and offsets
	Notes          []string `json:"notes,omitempty"`
}

// Defect is one thing that is not as it should be.
type Defect struct {
	Object  string   `json:"object"`           // "config sha256:...", "layer ...", "blob ...", "bootstrap"
	Offset  int64    `json:"offset"`           // in the object; -1 if it has no single place
	Length  int64    `json:"length,omitempty"` // bytes of the object that are bad
	Chunk   string   `json:"chunk,omitempty"`  // the digest it should have
	Files   []string `json:"files,omitempty"`  // that have the chunk, in byte order
	Problem string   `json:"problem"`

	object int   // its position, for sorting
	chunks []int // bad or missing ones, positions in Tree.Chunks
}

// Check verifies an image: that its tables agree with each other and with
// what the blobs say of themselves, that each object has the size and the
// digest by which the manifest names it, and each chunk its digest. Of an image
// that is not converted the index is made anew and compared with the one it has;
// without one only the objects are verified. Objects
// are fetched once, in requests of some MiB, several at a time; a blob's tables,
// and the bootstrap, once more before; gzip layers that a bootstrap tells of span
// by span once more; layers once more to make an index, and
// again if their tables of contents say what is in them. Of a bare
// bootstrap the names of blobs need not be their digests (a note tells).
//
// The error is about the check, not the image: what could not be had for
// reasons that may pass. progress may be nil; it is told bytes, from one
// goroutine at a time.
func Check(ctx context.Context, im *Image, progress func(done, total int64)) (*Result, error) {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	c := &checker{im: im, progress: progress, res: &Result{Ref: im.Name, Converted: im.Tree != nil, Defects: []Defect{}}}
	if im.Manifest != nil {
		c.res.ManifestDigest = im.Manifest.ManifestDigest
	}
	switch err := im.Damage; {
	case err == nil && im.Refuted != nil:
		c.add(Defect{Object: "index", Offset: -1, Problem: im.Refuted.Error(), object: -1})
	case err == nil:
	case errors.Is(err, reader.ErrNoIndex) && (errors.Is(err, index.ErrCorrupt) || errors.Is(err, blob.ErrRange)):
		c.add(Defect{Object: "index", Offset: -1, Problem: err.Error(), object: -1})
	case errors.Is(err, reader.ErrNoIndex):
	case errors.Is(err, index.ErrUnsupported), errors.Is(err, index.ErrLimit):
		return nil, err
	default:
		c.res.Converted = true
		c.add(Defect{Object: "bootstrap", Offset: -1, Problem: im.Damage.Error(), object: -1})
	}
	c.list()
	if err := c.measure(ctx); err != nil {
		return nil, err
	}
	if im.RAFS != nil {
		if err := c.structure(ctx); err != nil {
			return nil, err
		}
	}
	if err := c.read(ctx); err != nil {
		return nil, err
	}
	if err := c.windowedSpans(ctx); err != nil {
		return nil, err
	}
	if im.Tree != nil && im.Kind != "" && im.Kind != reader.Nydus {
		if err := c.again(ctx); err != nil {
			return nil, err
		}
	}
	c.finish()
	return c.res, nil
}

// isDefect tells an image's faults from those of the way to it.
func isDefect(err error) bool {
	return errors.Is(err, chunk.ErrCorrupt) || errors.Is(err, index.ErrUnsupported) || errors.Is(err, index.ErrLimit) ||
		errors.Is(err, blob.ErrRange) || errors.Is(err, blob.ErrNotFound)
}

type checker struct {
	im       *Image
	progress func(done, total int64)
	objects  []*object

	mu  sync.Mutex
	res *Result
}

// object is one stored object.
type object struct {
	number int
	name   string // "blob sha256:..."
	ref    blob.Ref
	digest string  // it must have; "" if its name is no digest
	size   int64   // bytes there are, at most those there should be
	whole  bool    // there are as many as there should be
	blob   int     // in Tree.Blobs, or -1
	meta   *object // that tells of it, where package rafs does
	spans  []index.Span
	chunks []int // in Tree.Chunks, by offset

	windowed bool // decoding its spans needs windows
}

func (o *object) defect(off int64, problem string) Defect {
	return Defect{Object: o.name, Offset: off, Problem: problem, object: o.number}
}

func (c *checker) add(d Defect) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.res.Defects = append(c.res.Defects, d)
}

// list finds the objects, and which chunks lie in each.
func (c *checker) list() {
	add := func(kind, digest string, size int64, verify bool) *object {
		i := slices.IndexFunc(c.objects, func(o *object) bool { return o.ref.Digest == digest })
		if i >= 0 {
			return c.objects[i]
		}
		o := &object{number: len(c.objects), name: kind + " " + digest, ref: blob.Ref{Digest: digest, Size: size}, blob: -1}
		if verify {
			o.digest = digest
		}
		c.objects = append(c.objects, o)
		return o
	}
	blobs := map[string]bool{}
	if c.im.Tree != nil {
		for _, b := range c.im.Tree.Blobs {
			blobs[b.Digest] = true
		}
	}
	if m := c.im.Manifest; m != nil {
		add("config", m.ConfigBlob.Digest, m.ConfigBlob.Size, true)
		for _, l := range m.Layers {
			kind := "layer"
			if blobs[l.Digest] {
				kind = "blob"
			}
			add(kind, l.Digest, l.Size, true)
		}
	}
	if c.im.Tree == nil {
		return
	}
	of := make([]*object, len(c.im.Tree.Blobs))
	for i, b := range c.im.Tree.Blobs {
		if b.Data != nil { // no object
			continue
		}
		// What the manifest of a Nydus image does not list is named by its digest.
		of[i] = add("blob", b.Digest, b.Size, (c.im.RAFS != nil || c.im.Kind == reader.Index) && c.im.Manifest != nil)
		of[i].blob = i
		if c.im.Kind == "" || c.im.Kind == reader.Nydus || c.im.Kind == reader.Index { // else again looks
			of[i].spans = b.Spans
			of[i].windowed = slices.ContainsFunc(b.Spans, func(s index.Span) bool { return s.Windowed() })
		}
		if c.im.RAFS == nil {
			continue
		}
		of[i].meta = of[i]
		if info := &c.im.RAFS.Blobs()[i]; info.Features&rafs.FeatureSeparate != 0 {
			digest, size := info.MetaDigest(), info.MetaSize
			if f, ok := c.im.Source.(*files); ok && digest == "" {
				digest, size = f.name, f.size
			}
			of[i].meta = add("blob", digest, size, c.im.Manifest != nil)
		}
	}
	chunks := c.im.Tree.Chunks
	for i := range chunks {
		o := of[chunks[i].Blob]
		o.chunks = append(o.chunks, i)
	}
	for _, o := range of {
		if o == nil {
			continue
		}
		slices.SortFunc(o.chunks, func(a, b int) int { return cmp.Compare(chunks[a].Offset, chunks[b].Offset) })
	}
}

// finish names the files that have bad chunks, and brings all in order.
func (c *checker) finish() {
	r := c.res
	of := map[int][]int{} // chunk -> defects
	for i := range r.Defects {
		for _, ch := range r.Defects[i].chunks {
			of[ch] = append(of[ch], i)
		}
	}
	if len(of) > 0 {
		c.im.Tree.Walk(func(path string, ino *index.Inode) error {
			for _, e := range ino.Extents {
				for _, i := range of[int(e.Chunk)] {
					d, name := &r.Defects[i], "/"+path
					if n := len(d.Files); n == 0 || d.Files[n-1] != name {
						d.Files = append(d.Files, name)
					}
				}
			}
			return nil
		})
	}
	slices.SortStableFunc(r.Defects, func(a, b Defect) int {
		return cmp.Or(cmp.Compare(a.object, b.object), cmp.Compare(a.Offset, b.Offset), strings.Compare(a.Problem, b.Problem))
	})
	r.Objects = len(c.objects)
	for _, o := range c.objects {
		r.Bytes += o.size
		r.Chunks += len(o.chunks)
	}
}

// compareDigest tells whether an object's content is what names it.
func (c *checker) compareDigest(o *object, sum []byte) {
	got := "sha256:" + hex.EncodeToString(sum)
	switch {
	case o.digest != "" && got != o.digest:
		c.add(o.defect(-1, fmt.Sprintf("its content has digest %s", got)))
	case o.digest == "" && strings.HasPrefix(o.ref.Digest, "sha256:") && got != o.ref.Digest:
		c.mu.Lock()
		c.res.Notes = append(c.res.Notes, fmt.Sprintf("%s: its name is not its digest, %s", o.name, got))
		c.mu.Unlock()
	}
}
