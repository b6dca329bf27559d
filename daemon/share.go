package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/fleet"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/replace"
	"github.com/shale-image/shale/trace"
)

// sharedFile says, in the directory of an image, what of its trace was pushed.
const sharedFile = "trace.shared"

// shared is its content. What a node has pushed it pushes anew when it has
// recorded as many runs again: a busy node does so a dozen times, not thousands.
type shared struct {
	Artifact string `json:"artifact"` // digest
	Runs     int    `json:"runs"`     // in it
	Since    int    `json:"since"`    // runs recorded since
}

// shareTraces pushes what is kept of an image, to which these recordings were
// added.
func (s *server) shareTraces(ctx context.Context, all []*recording) error {
	name := filepath.Join(s.store.path(all[0].manifest), sharedFile)
	var done shared
	if js, err := os.ReadFile(name); err == nil && json.Unmarshal(js, &done) != nil {
		done = shared{}
	}
	done.Since += len(all)
	var failed error
	if done.Since >= done.Runs {
		digest, err := s.share(ctx, all[len(all)-1], done.Artifact)
		if failed = err; err == nil {
			s.log.Info("a trace was pushed", "digest", all[0].manifest, "artifact", digest)
			done = shared{Artifact: digest, Runs: done.Runs + done.Since}
		}
	}
	js, err := json.Marshal(done)
	if err == nil {
		err = replace.File(name, js, 0o600)
	}
	if errors.Is(err, fs.ErrNotExist) { // the image was removed meanwhile
		err = nil
	}
	return errors.Join(failed, err)
}

func (s *server) share(ctx context.Context, r *recording, previous string) (digest string, err error) {
	js, err := s.pushBeside(ctx, *r.share, shareOrder{
		Manifest: r.manifest, Previous: previous, Trace: filepath.Join(s.store.path(r.manifest), traceFile),
	})
	if err == nil {
		err = json.Unmarshal(js, &digest)
	}
	return digest, err
}

// pushBeside has a process of its own push beside an image, as who asked for the image.
// It returns what that says.
func (s *server) pushBeside(ctx context.Context, src Source, o shareOrder) ([]byte, error) {
	ref, err := image.ParseRef(src.Ref)
	if err != nil {
		return nil, err
	}
	as := s.store.options(ref, src)
	o.Ref, o.Registries, o.Agent = ref.String(), s.cfg.Registries, s.store.agent
	for {
		o.Credentials = as.Credentials
		js, err := s.store.ask(ctx, "shale-sharer", o)
		if !errors.Is(err, blob.ErrUnauthorized) || as.Renewal == nil {
			return js, err
		}
		other, rerr := as.Renewal(ctx, as.Credentials)
		if rerr != nil || other == as.Credentials {
			return nil, err
		}
		as.Credentials, as.Renewal = other, nil
	}
}

// shareOrder is what to push where.
type shareOrder struct {
	Ref         string            `json:"ref"`
	Credentials image.Credentials `json:"credentials"`
	Manifest    string            `json:"manifest"` // digest of the image's
	Trace       string            `json:"trace"`    // file; "": the index
	Previous    string            `json:"previous"` // fleet.Push
	Dir         string            `json:"dir"`      // of the image; for its index
	Registries  *config.Config    `json:"registries"`
	Agent       string            `json:"agent"`
}

// sharer is the process that pushes a trace: it may have to read what others
// have pushed. Or an index, which it reads.
func sharer() error {
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
	var o shareOrder
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ref, err := image.ParseRef(o.Ref)
	if err != nil {
		return err
	}
	repo, err := image.Open(ctx, ref, o.Registries.Options(ref, o.Credentials, o.Agent))
	if err != nil {
		return err
	}
	defer repo.Close()
	img, err := repo.At(o.Manifest).ResolveManifest(ctx, image.Platform{})
	if err != nil {
		return err
	}
	if o.Trace == "" {
		out, err := o.pushIndex(ctx, repo, img)
		if err != nil {
			return fmt.Errorf("share the index of %s: %w", ref, err)
		}
		return json.NewEncoder(os.Stdout).Encode(out)
	}
	f, err := os.Open(o.Trace)
	if err != nil {
		return err
	}
	defer f.Close()
	t, err := trace.Decode(f, o.Trace)
	if err != nil {
		return err
	}
	digest, err := fleet.Push(ctx, repo, img, t, o.Previous)
	if err != nil {
		return fmt.Errorf("share the trace of %s: %w", ref, err)
	}
	return json.NewEncoder(os.Stdout).Encode(digest)
}
