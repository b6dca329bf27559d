package reader

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pack"
)

// How a start pack looks in a registry: docs/formats/pack.md. Its annotations are
// repeated by the list of referrers, so that it can be asked for at once.
const (
	PackArtifactType = "application/vnd.shale.pack.v1"
	PackMediaType    = "application/vnd.shale.pack.v1+binary"

	packDigest   = "io.github.shale-image.pack.digest"
	packSize     = "io.github.shale-image.pack.size"
	packIndex    = "io.github.shale-image.pack.index"
	packCommands = "io.github.shale-image.pack.commands"
	packProgram  = "io.github.shale-image.pack.entrypoint"
)

// Bounds on what a list of referrers may have one look at.
const (
	maxPacks    = 64
	maxCommands = 256
	maxPackBlob = pack.MaxSize + pack.MaxMetadata
)

// PackRef is a start pack that lies beside an image, as the list of referrers
// describes it.
type PackRef struct {
	Artifact image.Descriptor `json:"artifact"`
	Blob     image.Descriptor `json:"blob"`
	Index    string           `json:"index,omitempty"` // digest of the metadata; "" if there are none
	Commands [][]string       `json:"commands"`        // that it is of: what was said behind the image's name
	// Entrypoint says that the image has one, so that these are arguments of it.
	Entrypoint bool `json:"entrypoint,omitempty"`
}

// annotations are those of the pack's artifact.
func (p *PackRef) annotations() (map[string]string, error) {
	js, err := json.Marshal(p.Commands)
	a := map[string]string{
		packDigest: p.Blob.Digest, packSize: strconv.FormatInt(p.Blob.Size, 10), packIndex: p.Index, packCommands: string(js),
	}
	if p.Entrypoint {
		a[packProgram] = "true"
	}
	return a, err
}

var reSHA256 = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// packRefs are the packs in a list of referrers. What makes no sense is left out.
func packRefs(found []image.Referrer) (out []PackRef) {
	for _, d := range found {
		a := d.Annotations
		size, err := strconv.ParseInt(a[packSize], 10, 64)
		p := PackRef{Artifact: d.Descriptor, Index: a[packIndex], Entrypoint: a[packProgram] == "true", Blob: image.Descriptor{MediaType: PackMediaType, Digest: a[packDigest], Size: size}}
		p.Artifact.Annotations = nil
		if d.Type != PackArtifactType || err != nil || size <= 0 || size > maxPackBlob || !reSHA256.MatchString(p.Blob.Digest) ||
			p.Index != "" && !reSHA256.MatchString(p.Index) ||
			json.Unmarshal([]byte(a[packCommands]), &p.Commands) != nil || len(p.Commands) > maxCommands || len(out) == maxPacks {
			continue
		}
		out = append(out, p)
	}
	return out
}

// Start says that an image is about to be started, and how.
type Start struct {
	Args []string `json:"args,omitempty"` // what is said behind the image's name
	Any  bool     `json:"any,omitempty"`  // what will run is not known
	// Entrypoint says that the image has one, so that Args are arguments of it.
	Entrypoint bool `json:"entrypoint,omitempty"`
}

// Fit tells how well what is known of a command fits the start, 0 for not at all:
// the same command fits best, and of the same program that with the longest
// beginning in common. Other arguments of the image's own entrypoint fit least.
func (s *Start) Fit(command []string) int {
	n := 0
	for n < min(len(command), len(s.Args)) && command[n] == s.Args[n] {
		n++
	}
	if slices.Equal(command, s.Args) {
		n++
	}
	if s.Any || n == 0 && s.Entrypoint && !otherProgram(s.Args) && !otherProgram(command) {
		return 2*n + 1
	}
	return 2 * n
}

// OtherEntrypoint begins the first word of a command that is of another program than the
// image's entrypoint, which follows.
const OtherEntrypoint = "--entrypoint="

// otherProgram tells whether a command is not of the image's entrypoint.
func otherProgram(command []string) bool {
	return len(command) > 0 && strings.HasPrefix(command[0], OtherEntrypoint)
}

// Choose returns the pack that fits a start best, nil if none does. Of several it is the
// one of the fewest commands, which has the least that this one does not read, and of
// these the smallest.
func (s *Start) Choose(packs []PackRef) (best *PackRef) {
	most := 0
	for i := range packs {
		p := &packs[i]
		of := Start{s.Args, s.Any, s.Entrypoint || p.Entrypoint}
		fit := 0
		for _, c := range p.Commands {
			fit = max(fit, of.Fit(c))
		}
		if fit > most || fit > 0 && fit == most && cmp.Or(len(p.Commands)-len(best.Commands), cmp.Compare(p.Blob.Size, best.Blob.Size)) < 0 {
			best, most = p, fit
		}
	}
	return best
}

// Pack is a start pack that is being fetched. Its methods must not be called
// concurrently, but for Stop.
type Pack struct {
	PackRef
	cancel context.CancelFunc
	spool  *spool
	reader *pack.Reader

	checked  chan struct{} // closed when it is known whether the manifest is right
	checkErr error
}

// OpenPack begins to fetch a pack of the image with a manifest, and to see whether
// it is what the list of referrers says. It does not wait. ctx bounds all of it;
// the caller calls Close.
func OpenPack(ctx context.Context, repo *image.Repository, ref PackRef, manifest string) *Pack {
	p := &Pack{PackRef: ref, checked: make(chan struct{})}
	ctx, p.cancel = context.WithCancel(ctx)
	p.spool = newSpool(ctx, func(ctx context.Context) (io.ReadCloser, error) {
		return retry.New(repo.Blobs(), retry.Policy{}).Range(ctx, ref.Blob.Ref(), 0, ref.Blob.Size)
	})
	go func() {
		defer close(p.checked)
		p.checkErr = ref.check(ctx, repo, manifest)
	}()
	return p
}

// check compares a list's word with the artifact itself.
func (p *PackRef) check(ctx context.Context, repo *image.Repository, manifest string) error {
	a, err := repo.Artifact(ctx, p.Artifact, manifest)
	if err != nil {
		return err
	}
	if len(a.Layers) != 1 || a.Layers[0].Digest != p.Blob.Digest || a.Layers[0].Size != p.Blob.Size || a.Annotations[packIndex] != p.Index {
		return index.Errorf(index.ErrCorrupt, "start pack "+p.Artifact.Digest, -1, "its manifest does not say what the list of referrers does")
	}
	return nil
}

// Reader returns the pack as it arrives, once its beginning is here and its
// manifest is right.
func (p *Pack) Reader() (*pack.Reader, error) {
	<-p.checked
	if p.checkErr != nil {
		return nil, p.checkErr
	}
	return p.open()
}

func (p *Pack) open() (*pack.Reader, error) {
	if p.reader == nil {
		r, err := pack.NewReader(p.spool, "start pack "+p.Blob.Digest)
		if err != nil {
			return nil, err
		}
		p.reader = r
	}
	return p.reader, nil
}

// For how long an image waits for an index that is in a pack, before it is fetched by
// itself: for the first bytes of it packFirst; and then, looked at each packLook, as long
// as the rest would come in packRest.
const (
	packFirst = 2 * time.Second
	packLook  = 500 * time.Millisecond
	packRest  = 3 * time.Second
)

// watch stops the pack if size bytes, of which came have come, take too long. It ends with
// ctx.
func (p *Pack) watch(ctx context.Context, size int64, came *atomic.Int64) {
	for last, waited := int64(0), packLook; ; waited += packLook {
		select {
		case <-ctx.Done():
			return
		case <-time.After(packLook):
		}
		now := came.Load()
		if now == 0 && waited < packFirst {
			continue
		}
		if rest, lately := size-now, now-last; rest > lately*int64(packRest/packLook) {
			p.Stop()
			return
		}
		last = now
	}
}

// metadata writes the pack's metadata to f if they are the object that d names.
// An error says that they are not, or did not come in time.
func (p *Pack) metadata(f *os.File, d image.Descriptor) error {
	var came counter
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go p.watch(ctx, d.Size, &came.Int64)
	r, err := p.open()
	if err != nil {
		return err
	}
	if r.MetadataSize() != d.Size {
		return fmt.Errorf("start pack %s: %d bytes of metadata, want %d", p.Blob.Digest, r.MetadataSize(), d.Size)
	}
	sum := sha256.New()
	if err := r.Metadata(io.MultiWriter(f, sum, &came)); err != nil {
		return err
	}
	if got := fmt.Sprintf("sha256:%x", sum.Sum(nil)); got != d.Digest {
		return index.Errorf(index.ErrCorrupt, "start pack "+p.Blob.Digest, -1, "its metadata are %s, want %s", got, d.Digest)
	}
	return nil
}

// counter counts what is written to it.
type counter struct{ atomic.Int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.Add(int64(len(p)))
	return len(p), nil
}

// Stop ends the fetch. Who reads the pack gets an error.
func (p *Pack) Stop() {
	p.cancel()
	_ = p.spool.Close()
}

// Close is Stop that gives up the rest, too. The Reader must not be in use.
func (p *Pack) Close() error {
	p.Stop()
	<-p.checked
	if p.reader != nil {
		p.reader.Close()
	}
	return nil
}

// PushPack pushes a start pack beside an image, in place of those of the same
// commands, and returns the digest of the artifact.
func PushPack(ctx context.Context, repo *image.Repository, img *image.Image, m *MadePack) (string, error) {
	if len(m.Commands) > maxCommands {
		return "", fmt.Errorf("start pack: %w: it is of %d commands, at most %d", index.ErrLimit, len(m.Commands), maxCommands)
	}
	annotations, err := m.annotations()
	if err != nil {
		return "", err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(m.Bytes)), nil }
	if err := repo.PushBlob(ctx, m.Blob, open); err != nil {
		return "", err
	}
	subject := image.Descriptor{MediaType: img.MediaType, Digest: img.ManifestDigest, Size: int64(len(img.ManifestBytes))}
	return repo.PushArtifact(ctx, subject, PackArtifactType, []image.Descriptor{m.Blob}, annotations, func(d image.Descriptor) bool {
		return d.Annotations[packCommands] == annotations[packCommands]
	})
}
