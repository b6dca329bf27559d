package plain

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/shale-image/shale/bench/oci"
)

func splitName(name string) (repo, tag string, err error) {
	i := strings.LastIndexByte(name, ':')
	if i <= 0 {
		return "", "", fmt.Errorf("%q has no tag", name)
	}
	return name[:i], name[i+1:], nil
}

// download fetches one layer into a file and verifies it. It sends ready what
// to unpack: the file when it is found right, or at once if p.Stream.
func (p *pull) download(ctx context.Context, d oci.Descriptor, res *LayerResult, ready chan<- io.ReadCloser) error {
	repo, _, err := splitName(p.Name)
	if err != nil {
		return err
	}
	name, err := oci.Layout(p.blobs).Blob(d.Digest)
	if err != nil {
		return err
	}
	body, err := p.get(ctx, repo+"/blobs/"+d.Digest)
	if err != nil {
		return err
	}
	defer body.Close()
	f, err := os.Create(filepath.Join(p.blobs, filepath.Base(name)))
	if err != nil {
		return err
	}
	defer f.Close()
	file := newGrowing(f)
	if p.Stream {
		r, err := file.follow()
		if err != nil {
			return err
		}
		ready <- r
	}
	h := sha256.New()
	n, err := io.CopyBuffer(io.MultiWriter(file, h), onlyReader{io.LimitReader(body, d.Size+1)}, make([]byte, 256<<10))
	if err == nil && (n != d.Size || "sha256:"+hex.EncodeToString(h.Sum(nil)) != d.Digest) {
		err = fmt.Errorf("layer %s: the %d bytes received are not those of the digest", d.Digest, n)
	}
	file.finish(err)
	if err != nil {
		return err
	}
	res.Digest, res.Size, res.Downloaded = d.Digest, n, p.now()
	if !p.Stream {
		r, err := os.Open(f.Name())
		if err != nil {
			return err
		}
		ready <- r
	}
	return nil
}

// onlyReader hides other methods, so that io.CopyBuffer uses its buffer.
type onlyReader struct{ io.Reader }

// growing is a file that is read while it is written. One goroutine writes.
type growing struct {
	f     *os.File
	mu    sync.Mutex
	grown *sync.Cond
	size  int64
	done  bool
	err   error // of the writing; told to readers at the end
}

func newGrowing(f *os.File) *growing {
	g := &growing{f: f}
	g.grown = sync.NewCond(&g.mu)
	return g
}

func (g *growing) Write(p []byte) (int, error) {
	n, err := g.f.Write(p)
	g.mu.Lock()
	g.size += int64(n)
	g.mu.Unlock()
	g.grown.Broadcast()
	return n, err
}

// finish tells readers that no more comes, because of err if that is not nil.
func (g *growing) finish(err error) {
	g.mu.Lock()
	g.done, g.err = true, err
	g.mu.Unlock()
	g.grown.Broadcast()
}

// follow opens a reader of all that is and will be written. finish must be
// called for its Read to end.
func (g *growing) follow() (io.ReadCloser, error) {
	f, err := os.Open(g.f.Name())
	return &follower{g: g, f: f}, err
}

type follower struct {
	g   *growing
	f   *os.File
	off int64
}

func (r *follower) Read(p []byte) (int, error) {
	g := r.g
	g.mu.Lock()
	for g.size == r.off && !g.done {
		g.grown.Wait()
	}
	left, err := g.size-r.off, g.err
	g.mu.Unlock()
	if left == 0 {
		if err == nil {
			err = io.EOF
		}
		return 0, err
	}
	n, err := r.f.Read(p[:min(int64(len(p)), left)])
	r.off += int64(n)
	return n, err
}

func (r *follower) Close() error { return r.f.Close() }
