package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

// store keeps the images a node knows, under the root directory:
//
//	images/<hex of the manifest digest>/record   JSON
//	                                   /config   the image's config, as stored
//	                                   /linked/  package link's directory
//	refs.json                                    reference -> manifest digest
type store struct {
	dir     string
	refs    string
	pool    *pool.Pool
	poolDir string
	engine  *fill.Engine
	cfg     *config.Config
	agent   string

	log *slog.Logger

	saving sync.Mutex // held while refs.json is written

	mu    sync.Mutex               // never held while something is written
	names map[string]string        // "<reference> <platform>" -> manifest digest
	busy  map[string]chan struct{} // by manifest digest; see lock
	uses  map[string]int           // by manifest digest

	comparing map[string]*comparison // by manifest digest

	cache cache

	keychains keychains
}

// record is what the node keeps of an image besides its config and its link.
type record struct {
	ManifestDigest string    `json:"manifest_digest"`
	Platform       string    `json:"platform"`
	Pulled         time.Time `json:"pulled"`
	// Index is where the index is from; "" in records of old, whose images
	// brought it along.
	Index reader.Trust `json:"index,omitempty"`
	// Kind is that of the index; "" in records of old.
	Kind reader.Kind `json:"kind,omitempty"`
	// IndexBytes is how large it is, stored; 0 in records of old.
	IndexBytes int64 `json:"index_bytes,omitempty"`
	// Whole says that all of the image has to be here before it is used: its registry
	// serves no parts of objects, and its layers are not read but by its index.
	Whole bool `json:"whole,omitempty"`
	// Key is the id of the key that has signed the index, if one has.
	Key string `json:"key,omitempty"`
	// Doubted says that the index turned out to be wrong, and why. The node has
	// made its own since.
	Doubted string `json:"doubted,omitempty"`
	// Wrong says how the index, or the image's config, differs from what the
	// layers are. Nobody mounts the image by that index any more.
	Wrong string `json:"wrong,omitempty"`
	// Checked says that the layers of an image that is used by tables of contents were
	// seen to be those of its config, as far as they are read at all.
	Checked bool `json:"checked,omitempty"`
	// Layers are those of its manifest; none in records of old.
	Layers []image.Descriptor `json:"layers,omitempty"`
	// Within are the digests of indexes that have led to it: it is found by these, too.
	Within []string `json:"within,omitempty"`
	// Packs are the start packs that lay beside the image when it was asked for
	// last, Landed the digests of those whose content has come.
	Packs  []reader.PackRef `json:"packs,omitempty"`
	Landed []string         `json:"landed,omitempty"`
	// Refused are packs in which something was wrong, and until when they are not
	// asked for again.
	Refused map[string]time.Time `json:"refused,omitempty"`
	traced  bool                 // traces lie beside it, too; known only when it has just been asked for
	config  json.RawMessage
}

// believed tells whether its index is one of those that trust lets through. A
// signature counts as long as its key is one of the node's. A Nydus image can be read
// by nothing but its bootstrap.
func (s *store) believed(r *record, trust reader.Trust) bool {
	if r.Kind == reader.Nydus {
		return true
	}
	from := cmp.Or(r.Index, reader.Bound)
	if from == reader.Signed && !s.cfg.Keys().Has(r.Key) {
		from = reader.Repository
	}
	return trust.Allows(from)
}

func (r *record) pulled(ref string) Pulled {
	return Pulled{Ref: ref, ManifestDigest: r.ManifestDigest, Platform: r.Platform, Config: r.config}
}

func openStore(cfg Config, p *pool.Pool, e *fill.Engine) (*store, error) {
	s := &store{
		dir: filepath.Join(cfg.Root, "images"), refs: filepath.Join(cfg.Root, "refs.json"), pool: p, poolDir: poolDir(cfg.Root), engine: e,
		cfg: cfg.Registries, agent: "shale/" + cfg.Version, log: cfg.Logger,
		names: map[string]string{}, busy: map[string]chan struct{}{}, uses: map[string]int{},
		comparing: map[string]*comparison{},
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	if err := s.removeLeftovers(); err != nil {
		return nil, err
	}
	if err := s.loadNames(); err != nil {
		return nil, err
	}
	if err := s.openCache(); err != nil {
		return nil, err
	}
	return s, nil
}

func poolDir(root string) string { return filepath.Join(root, "pool") }

func (s *store) path(digest string) string {
	_, hex, _ := strings.Cut(digest, ":")
	return filepath.Join(s.dir, hex)
}

// use is an image that somebody uses: until Close it is not removed.
type use struct {
	*record
	repo   *image.Repository
	open   opener       // for who reads on when the use has ended
	origin *origin      // where its bytes come from
	pack   *reader.Pack // a start pack on its way, nil if there is none
	packed bool         // there is one that fits what starts, here or on its way
	store  *store
}

// opener opens the repository of an image, as the user who asked for it.
type opener func(context.Context) (*image.Repository, error)

// Close ends the use.
func (u *use) Close() error {
	u.store.endUse(u.ManifestDigest)
	u.origin.close()
	if u.pack != nil {
		_ = u.pack.Close()
	}
	return u.repo.Close()
}

func (s *store) endUse(digest string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.uses[digest]--; s.uses[digest] == 0 {
		delete(s.uses, digest)
	}
}

// pull finds the image of a reference: on the node if it is there, else, or if
// the caller wants to know anew, in its repository. The caller closes the use.
// start, if not nil, says what it is about to do: then the use may have a pack.
func (s *store) pull(ctx context.Context, src Source, start *reader.Start, progress func(Progress)) (_ *use, err error) {
	ref, err := image.ParseRef(src.Ref)
	if err != nil {
		return nil, err
	}
	platform, err := image.WantedPlatform(src.Platform)
	if err != nil {
		return nil, err
	}
	trust, err := reader.ParseTrust(cmp.Or(src.IndexTrust, s.indexTrust()))
	if err != nil {
		return nil, err
	}
	open := s.opens(ref, src)
	repo, err := open(ctx)
	if err != nil {
		return nil, err
	}
	key := nameKey(ref.String(), src.Platform)
	if !src.Refresh {
		if u, err := s.known(key, ref, platform, repo); err == nil {
			if s.believed(u.record, trust) && (u.Doubted == "" || u.Wrong == "" && !s.alone(u.ManifestDigest)) {
				u.open = open
				return u, nil
			}
			s.endUse(u.ManifestDigest)
			u.origin.close()
		} else if !errors.Is(err, os.ErrNotExist) {
			return nil, errors.Join(err, repo.Close())
		}
	}
	if src.Unasked {
		return nil, errors.Join(fmt.Errorf("%s: the node does not know it: %w: %w", ref, ErrUnasked, blob.ErrNotFound), repo.Close())
	}
	u, err := s.fetch(ctx, key, repo, wish{platform, trust, start}, progress)
	if err != nil {
		return nil, errors.Join(err, repo.Close())
	}
	u.open = open
	return u, nil
}

// opens opens the repository of an image, which costs nothing until it is asked for something.
func (s *store) opens(ref image.Ref, src Source) func(context.Context) (*image.Repository, error) {
	return func(ctx context.Context) (*image.Repository, error) {
		return image.Open(ctx, ref, s.options(ref, src))
	}
}

// known begins the use of an image that the node has under a name, or by its digest; if
// there is none the error wraps os.ErrNotExist.
func (s *store) known(key string, ref image.Ref, platform image.Platform, repo *image.Repository) (*use, error) {
	s.mu.Lock()
	digest, named := s.names[key]
	if named {
		s.uses[digest]++ // so that it stays while it is looked at
	}
	s.mu.Unlock()
	if !named {
		if digest = s.byDigest(ref, platform, s.isComplete); digest == "" {
			return nil, os.ErrNotExist
		}
		s.mu.Lock()
		s.uses[digest]++
		s.mu.Unlock()
	}
	rec, err := s.load(digest)
	if err != nil {
		s.endUse(digest)
		return nil, err
	}
	if !named {
		if err := s.name(key, digest); err != nil {
			s.log.Warn("a name is not kept", "ref", ref.String(), "err", err)
		}
	}
	return s.newUse(rec, repo), nil
}

// name gives an image that is in use a name.
func (s *store) name(key, digest string) error {
	s.mu.Lock()
	news := s.names[key] != digest
	s.names[key] = digest
	s.mu.Unlock()
	if !news {
		return nil
	}
	return s.saveNames()
}

// newUse makes a use that is counted already.
func (s *store) newUse(rec *record, repo *image.Repository) *use {
	return &use{record: rec, repo: repo, origin: newOrigin(repo, s.path(rec.ManifestDigest), s.cfg.ReadWait()), store: s}
}

// wish is what is wanted of an image.
type wish struct {
	platform image.Platform
	trust    reader.Trust
	start    *reader.Start // nil if it is not started
}

// fetch asks the repository what it has, and gives it the name.
func (s *store) fetch(ctx context.Context, key string, repo *image.Repository, w wish, progress func(Progress)) (*use, error) {
	if w.start != nil {
		repo.Warm(ctx, 3) // of what a start asks for at once
	}
	img, err := repo.ResolveManifest(ctx, w.platform)
	if err != nil {
		return nil, err
	}
	s.breakOff(img.ManifestDigest)
	unlock, err := s.lock(ctx, img.ManifestDigest)
	if err != nil {
		return nil, err
	}
	defer unlock()
	rec, pack, err := s.add(ctx, repo, img, w, progress)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.uses[rec.ManifestDigest]++
	s.mu.Unlock()
	if err := errors.Join(s.name(key, rec.ManifestDigest), s.noteManifest(rec, img)); err != nil {
		s.endUse(rec.ManifestDigest)
		if pack != nil {
			_ = pack.Close()
		}
		return nil, err
	}
	u := s.newUse(rec, repo)
	u.pack = pack
	return u, nil
}

// lock keeps others from making or removing the image until the caller calls
// unlock.
func (s *store) lock(ctx context.Context, digest string) (unlock func(), err error) {
	s.mu.Lock()
	l := s.busy[digest]
	if l == nil {
		l = make(chan struct{}, 1)
		s.busy[digest] = l
	}
	s.mu.Unlock()
	select {
	case l <- struct{}{}:
		return func() { <-l }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// load reads what is kept of an image. If that is not there, or damaged, the
// error wraps os.ErrNotExist: it can be made again.
func (s *store) load(digest string) (*record, error) {
	rec, err := s.loadRecord(digest)
	if err != nil {
		return nil, err
	}
	rec.config, err = os.ReadFile(filepath.Join(s.path(digest), "config"))
	if err == nil && !json.Valid(rec.config) {
		err = fmt.Errorf("%s/config is damaged: %w", s.path(digest), os.ErrNotExist)
	}
	return rec, err
}

func (s *store) loadRecord(digest string) (*record, error) {
	js, err := os.ReadFile(filepath.Join(s.path(digest), "record"))
	if err != nil {
		return nil, err
	}
	rec := &record{}
	if json.Unmarshal(js, rec) != nil || rec.ManifestDigest != digest {
		return nil, fmt.Errorf("%s/record is damaged: %w", s.path(digest), os.ErrNotExist)
	}
	return rec, nil
}

func (s *store) link(rec *record) (*link.Image, error) {
	return link.Open(filepath.Join(s.path(rec.ManifestDigest), "linked"))
}

// list lists the images that the node knows, those last that have no name: a
// later pull gave it to another.
func (s *store) list() []ImageStatus {
	refs := map[string][]string{}
	digests, err := s.digests()
	if err != nil {
		s.log.Error("list images", "err", err) // those that have names are known
	}
	for _, digest := range digests {
		refs[digest] = []string{}
	}
	s.mu.Lock()
	for key, digest := range s.names {
		if ref, _, ok := splitKey(key); ok {
			refs[digest] = append(refs[digest], ref)
		}
	}
	s.mu.Unlock()
	out := []ImageStatus{}
	for digest, names := range refs {
		rec, err := s.loadRecord(digest)
		if err != nil {
			continue // removed by hand; the next pull brings it back
		}
		slices.Sort(names)
		out = append(out, ImageStatus{Refs: slices.Compact(names), ManifestDigest: digest, Platform: rec.Platform, Pulled: rec.Pulled})
	}
	slices.SortFunc(out, func(a, b ImageStatus) int {
		if len(a.Refs) == 0 || len(b.Refs) == 0 {
			return cmp.Or(cmp.Compare(len(b.Refs), len(a.Refs)), cmp.Compare(a.ManifestDigest, b.ManifestDigest))
		}
		return cmp.Compare(a.Refs[0], b.Refs[0])
	})
	return out
}

// digests lists the images there are on disk, named or not.
func (s *store) digests() (out []string, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	for _, de := range entries {
		if digest := "sha256:" + de.Name(); reDigest.MatchString(digest) {
			out = append(out, digest)
		}
	}
	return out, nil
}

// limits are those of what is read.
func (s *store) limits() index.Limits { return limits(s.cfg) }

// limits are those of a configuration, which may be nil. Memory is what it says, or a
// quarter of the machine's if that is less than the default.
func limits(c *config.Config) (l index.Limits) {
	if c != nil {
		l = c.Limits.Limits
	}
	var machine unix.Sysinfo_t
	unset := l.Memory <= 0
	l = l.WithDefaults()
	if unset && unix.Sysinfo(&machine) == nil {
		l.Memory = min(l.Memory, int64(uint64(machine.Totalram)*uint64(machine.Unit))/4)
	}
	return l
}

// indexTrust is what the node's configuration says.
func (s *store) indexTrust() string {
	if s.cfg == nil {
		return ""
	}
	return s.cfg.IndexTrust
}
