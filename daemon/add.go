package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/replace"
)

// add indexes and links an image and remembers it, if that was not done
// before. The caller holds its lock. It returns the pack that came along, if one
// did.
func (s *store) add(ctx context.Context, repo *image.Repository, img *image.Image, w wish, progress func(Progress)) (_ *record, pack *reader.Pack, err error) {
	rec, err := s.load(img.ManifestDigest)
	if err == nil && rec.Wrong != "" {
		if err := s.usable(rec); err != nil {
			return nil, nil, err
		}
	}
	if err == nil && (!s.believed(rec, w.trust) || rec.Doubted != "" && s.unused(img.ManifestDigest) == nil) {
		err = os.ErrNotExist // it can be had without that index
	}
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return rec, nil, err
	}
	// Unknown means in use: its record may have got lost while somebody reads it.
	if err := s.unused(img.ManifestDigest); err != nil {
		return nil, nil, err
	}
	// What there is stays until it can be replaced: by an index that is not believed
	// any more, or turned out to be wrong, the image could still be had.
	dir := s.path(img.ManifestDigest)
	made := dir + madeSuffix
	defer func() {
		err = errors.Join(err, os.RemoveAll(made))
		if err != nil && pack != nil {
			_ = pack.Close()
			pack = nil
		}
	}()
	if err := errors.Join(os.RemoveAll(made), os.MkdirAll(made, 0o700)); err != nil {
		return nil, nil, err
	}
	if rec, pack, err = s.index(ctx, repo, img, made, w, progress); err != nil {
		return nil, pack, err
	}
	rec.ManifestDigest, rec.Platform, rec.Pulled, rec.config = img.ManifestDigest, img.Platform.String(), time.Now().UTC(), img.ConfigBytes
	rec.Layers = img.Layers
	return rec, pack, s.install(made, dir, rec)
}

// madeSuffix is of the directory in which an image is made that the node may have
// already.
const madeSuffix = ".made"

// install puts what was made of an image in the place of what there is. Traces, and
// that it is pinned, stay; so does the node's own index if no other was made. A
// process that is killed meanwhile leaves a record of less trust than what is linked
// takes, at worst, or none.
func (s *store) install(made, dir string, rec *record) (err error) {
	fresh := os.Mkdir(dir, 0o700)
	if fresh != nil && !errors.Is(fresh, os.ErrExist) {
		return fresh
	}
	defer func() {
		if err != nil && fresh == nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	old := func(name string) string { return filepath.Join(dir, name) }
	exchange := func(name string, keep bool) error {
		_, err := os.Lstat(filepath.Join(made, name))
		switch {
		case err == nil:
			return errors.Join(os.RemoveAll(old(name)), os.Rename(filepath.Join(made, name), old(name)))
		case !errors.Is(err, os.ErrNotExist):
			return err
		case keep:
			return nil
		}
		return os.RemoveAll(old(name))
	}
	for _, name := range []string{sideDir, indexFile} {
		if err := exchange(name, true); err != nil {
			return err
		}
	}
	err = unix.Renameat2(unix.AT_FDCWD, filepath.Join(made, "linked"), unix.AT_FDCWD, old("linked"), unix.RENAME_EXCHANGE)
	if err != nil { // there is none, or the file system cannot
		err = exchange("linked", false)
	}
	for _, name := range []string{ztocDir, originsFile, foreignFile + ".json", foreignFile} {
		err = errors.Join(err, exchange(name, false))
	}
	if err != nil {
		return err
	}
	if err := replace.File(old("config"), rec.config, 0o600); err != nil {
		return err
	}
	return s.saveRecord(rec)
}

func (s *store) saveRecord(rec *record) error {
	js, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return err
	}
	return replace.File(filepath.Join(s.path(rec.ManifestDigest), "record"), js, 0o600)
}

// index reads the index of an image, while its config is on the way, and links
// it into dir. It returns what there is to remember of the index, and the start
// pack that is on its way, if one is. An image that has no index, or cannot be read
// by ranges, is read as a whole.
func (s *store) index(ctx context.Context, repo *image.Repository, img *image.Image, dir string, w wish, progress func(Progress)) (_ *record, _ *reader.Pack, err error) {
	linked := filepath.Join(dir, "linked")
	if raw, err := s.localIndex(img.ManifestDigest, img.Layers); err == nil {
		defer raw.Close()
		if err = errors.Join(repo.LoadConfig(ctx, img), s.linkRaw(ctx, nil, raw, linked)); !errors.Is(err, index.ErrCorrupt) {
			return &record{Index: reader.Local, Kind: raw.Kind, IndexBytes: raw.Size}, nil, err
		}
		if err := s.removeIndex(s.path(img.ManifestDigest)); err != nil {
			return nil, nil, err
		}
	}
	actx, cancel := context.WithCancel(ctx)
	defer cancel()
	ranges := true
	var linker *linkProcess
	defer func() { linker.close() }()
	var beside errgroup.Group
	beside.Go(func() error {
		err := repo.LoadConfig(actx, img)
		if err != nil {
			cancel()
		}
		return err
	})
	beside.Go(func() error {
		ranges = reader.HasRanges(actx, repo, img)
		// Not before: it takes a processor for 15 ms, and the requests so far are short.
		var err error
		linker, err = s.startLinker(ctx)
		return err
	})
	o := reader.Options{TempDir: dir, Trust: w.trust, Keys: s.cfg.Keys(), Limits: s.limits(), Start: w.start}
	raw, none := reader.Use(actx, repo, img, o, func(raw *reader.Raw) error {
		if err := beside.Wait(); err != nil {
			return err
		}
		switch {
		case !ranges && raw.Kind == reader.Nydus: // whose layers are no archives
			progress(Progress{Note: fmt.Sprintf("all of the image is read, once: %v", reader.ErrNoRanges)})
		case !ranges:
			return reader.ErrNoRanges
		}
		var keeping sync.WaitGroup
		var kept error
		keeping.Go(func() {
			kept = errors.Join(s.keepForeign(raw, dir), raw.Beside(func(ref blob.Ref, content io.Reader) error {
				return keepBeside(filepath.Join(dir, ztocDir), ref.Digest, content)
			}))
		})
		err := s.linkRaw(ctx, linker, raw, linked)
		keeping.Wait()
		err = errors.Join(kept, err)
		if reader.OfNoUse(err) && raw.Kind != reader.Nydus {
			progress(Progress{Note: fmt.Sprintf("an index of the image is of no use: %v", err)})
			err = errors.Join(err, s.removeForeign(dir))
		}
		return err
	})
	if err := beside.Wait(); err != nil {
		if raw != nil {
			err = errors.Join(err, raw.Close())
		}
		return nil, nil, err
	}
	if none == nil {
		pack := raw.Pack
		raw.Pack = nil
		whole := !ranges && raw.Kind == reader.Nydus
		return &record{Index: raw.Trust, Kind: raw.Kind, IndexBytes: raw.Stored, Key: raw.Key, Whole: whole, Packs: raw.Packs, traced: raw.Traced}, pack, raw.Close()
	}
	if !errors.Is(none, reader.ErrNoIndex) && !errors.Is(none, reader.ErrNoRanges) || ctx.Err() != nil {
		return nil, nil, none
	}
	progress(Progress{Note: fmt.Sprintf("all of the image is read, once: %v", none)})
	linker.close() // that may take long
	own, err := s.scan(ctx, repo, img, dir, progress)
	if err != nil {
		return nil, nil, err
	}
	defer own.Close()
	return &record{Index: own.Trust, Kind: own.Kind, IndexBytes: own.Size}, nil, s.linkRaw(ctx, nil, own, linked)
}
