package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/replace"
)

// An image without an index is read once, from its first layer to its last: the
// content goes straight into the pool, and the index is kept beside the image,
// as if it had come from its repository.

// Files of such an image. What lies beside its layers, if anything does, is one
// file in sideDir, named by its digest as package dirblob has it.
const (
	indexFile   = "index"
	sideDir     = "side"
	ztocDir     = "ztoc"    // what a SOCI index has beside the layers, likewise
	foreignFile = "foreign" // an index from elsewhere; what it is, in foreign.json
)

// scanOrder is what to read, with a descriptor for each layer.
type scanOrder struct {
	Job  reader.Job `json:"job"`
	Pool string     `json:"pool"` // directory
	Dir  string     `json:"dir"`  // for the files; "": only DiffIDs are compared
	Room int64      `json:"room"` // bytes of content that the pool takes

	// Foreign, if not nil, is an index from elsewhere that the one made is
	// compared with; its file is the descriptor behind those of the layers.
	Foreign *reader.Raw `json:"foreign,omitempty"`
}

// unpackedAbout is how many times as large as stored what layers unpack to is
// thought to be, to make room for it under a quota.
const unpackedAbout = 4

// scanned is what comes of it.
type scanned struct {
	Wrong string `json:"wrong,omitempty"` // how the foreign index differs
}

// scanner is the process that reads layers.
func scanner() (err error) {
	var o scanOrder
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	o.Job.Open = func(_ context.Context, n int) (io.ReadCloser, error) {
		return os.NewFile(uintptr(firstFile+n), o.Job.Layers[n].Digest), nil
	}
	if o.Dir == "" {
		if err := reader.CheckLayers(ctx, o.Job); err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(scanned{})
	}
	p, err := pool.OpenTables(o.Pool)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	b, err := p.Build()
	if err != nil {
		return err
	}
	b.Limit(o.Room)
	o.Job.Keep, o.Job.TempDir = b.Add, o.Dir
	o.Job.Places = o.Foreign != nil && o.Foreign.Kind == reader.SOCI
	made, err := reader.Make(ctx, o.Job)
	if err != nil {
		return errors.Join(err, b.Abort())
	}
	defer made.Close()
	if _, err := b.Commit(); err != nil {
		return err
	}
	if err := keepSide(filepath.Join(o.Dir, sideDir), made); err != nil {
		return err
	}
	if err := replace.File(filepath.Join(o.Dir, indexFile), made.Encoded, 0o600); err != nil {
		return err
	}
	var out scanned
	if o.Foreign != nil {
		o.Foreign.File = os.NewFile(uintptr(firstFile+len(o.Job.Layers)), o.Foreign.Name)
		o.Foreign.Cut = o.Job.Cut
		told, err := o.Foreign.Tree()
		if err == nil {
			err = identify(told, made, filepath.Join(o.Dir, originsFile))
		}
		if err == nil {
			err = index.Equal(made.Tree, told)
		}
		if err != nil {
			out.Wrong = err.Error()
		}
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

func keepSide(dir string, made *reader.Made) error {
	if made.Side.Size == 0 {
		return nil
	}
	side, err := made.OpenSide()
	if err != nil {
		return err
	}
	defer side.Close()
	return keepBeside(dir, made.Side.Digest, side)
}

// keepBeside makes a file that package dirblob finds in dir by its digest.
func keepBeside(dir, digest string, content io.Reader) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	_, hex, _ := strings.Cut(digest, ":")
	return keepFile(filepath.Join(dir, hex), content)
}

func keepFile(path string, content io.Reader) error {
	return replace.With(path, 0o600, func(w io.Writer) error {
		_, err := io.Copy(w, content)
		return err
	})
}

// scan has the layers of an image read, and returns its index, whose files are
// in dir. The caller closes it.
func (s *store) scan(ctx context.Context, repo *image.Repository, img *image.Image, dir string, progress func(Progress)) (*reader.Raw, error) {
	if _, err := s.read(ctx, repo, img, dir, 0, nil, nil, progress); err != nil {
		return nil, err
	}
	return localIndex(dir, img.ManifestDigest, img.Layers, s.limits())
}

// readTries is how often layers are read when sources give wrong bytes: such a source
// comes last from then on, so that this is also how many there may be.
const readTries = 4

// read is scan that compares what is made with an index from elsewhere, if there
// is one. Files are cut at multiples of cut, if that is not 0. With a pace layers are
// fetched one after the other, and at that. Without a dir nothing is made, and the layers
// are compared with the image's config.
func (s *store) read(ctx context.Context, repo *image.Repository, img *image.Image, dir string, cut uint32, foreign *reader.Raw, slow *pace, progress func(Progress)) (scanned, error) {
	out, err := s.readOnce(ctx, repo, img, dir, cut, foreign, slow, progress)
	for tries := 1; tries < readTries && errors.Is(err, image.ErrElsewhere); tries++ {
		s.log.Warn("layers are read again", "ref", repo.Ref().String(), "err", err)
		out, err = s.readOnce(ctx, repo, img, dir, cut, foreign, slow, progress)
	}
	return out, err
}

func (s *store) readOnce(ctx context.Context, repo *image.Repository, img *image.Image, dir string, cut uint32, foreign *reader.Raw, slow *pace, progress func(Progress)) (out scanned, _ error) {
	var ours, theirs []*os.File
	defer func() {
		for _, f := range append(ours, theirs...) {
			f.Close()
		}
	}()
	var total int64
	for _, l := range img.Layers {
		r, w, err := os.Pipe()
		if err != nil {
			return out, err
		}
		ours, theirs = append(ours, w), append(theirs, r)
		total += l.Size
	}
	var room int64
	if dir != "" {
		n, release := s.pool.Reserve(unpackedAbout * total)
		defer release()
		room = n
	}
	var done atomic.Int64
	o := scanOrder{Room: room, Job: reader.Job{Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs, Cut: cut, Limits: s.limits()}, Pool: s.poolDir, Dir: dir, Foreign: foreign}
	files := theirs
	if foreign != nil {
		files = append(slices.Clone(theirs), foreign.File)
	}
	g, gctx := errgroup.WithContext(ctx)
	var copied error
	g.Go(func() error {
		parent := gctx
		if repo.Mirrored() {
			parent = ctx
		}
		layers, lctx := errgroup.WithContext(parent)
		layers.SetLimit(reader.Parallel)
		if slow != nil {
			layers.SetLimit(1)
		}
		for n, l := range img.Layers {
			layers.Go(func() error {
				defer ours[n].Close()
				if err := lctx.Err(); err != nil {
					return err
				}
				body, err := repo.Blob(lctx, l)
				if err != nil {
					return err
				}
				defer body.Close()
				_, err = io.Copy(ours[n], &counter{slow.reader(lctx, body), func(m int) { progress(Progress{Done: done.Add(int64(m)), Total: total}) }})
				if errors.Is(err, syscall.EPIPE) {
					// It says itself why it reads no more. Are wrong bytes why?
					if err = nil; repo.Mirrored() {
						_, err = io.Copy(io.Discard, body)
					}
				}
				return err
			})
		}
		copied = layers.Wait()
		return copied
	})
	g.Go(func() error {
		js, err := s.ask(gctx, "shale-scanner", o, files...)
		if err == nil {
			err = json.Unmarshal(js, &out)
		}
		for _, f := range theirs { // or a copy to nobody would wait for ever
			f.Close()
		}
		return err
	})
	err := g.Wait()
	if copied != nil && ctx.Err() == nil && !errors.Is(copied, context.Canceled) {
		err = copied // the other saw layers that are cut off
	}
	return out, err
}

func (s *store) removeIndex(dir string) error {
	return errors.Join(os.RemoveAll(filepath.Join(dir, indexFile)), os.RemoveAll(filepath.Join(dir, sideDir)))
}

// localIndex opens the index that this node has made of an image.
func (s *store) localIndex(manifest string, layers []image.Descriptor) (*reader.Raw, error) {
	return localIndex(s.path(manifest), manifest, layers, s.limits())
}

func localIndex(dir, manifest string, layers []image.Descriptor, lim index.Limits) (*reader.Raw, error) {
	f, err := os.Open(filepath.Join(dir, indexFile))
	if err != nil {
		return nil, err
	}
	var side image.Descriptor
	if names, err := os.ReadDir(filepath.Join(dir, sideDir)); err == nil && len(names) == 1 {
		if st, err := names[0].Info(); err == nil {
			side = image.Descriptor{Digest: "sha256:" + names[0].Name(), Size: st.Size()}
		}
	}
	raw, err := reader.LocalIndex(manifest, layers, f, side)
	if err != nil {
		f.Close()
		return nil, err
	}
	raw.Limits = lim
	return raw, nil
}

// counter tells of what is read.
type counter struct {
	io.Reader
	tell func(int)
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.tell(n)
	return n, err
}
