package daemon

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/config"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/mount/fusedev"
	"github.com/shale-image/shale/pool"
)

// connected is a mount that is served as far as others can tell: nothing can be read of its
// connection.
func connected(t *testing.T) *mount.Mounted {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	must(t, err)
	fs, err := mount.Resume(mount.Connection{Dev: null}, nobody{}, mount.Options{Options: fusedev.Options{Logger: slog.New(slog.DiscardHandler)}})
	must(t, err)
	<-fs.Done()
	return fs
}

// nobody has no content.
type nobody struct{}

func (nobody) Size() int64                                 { return chunk.Block }
func (nobody) TryReadAt([]byte, int64) (bool, error)       { return false, nil }
func (nobody) ReadAt(context.Context, []byte, int64) error { return os.ErrInvalid }

// TestCompletionWaitsForOthers: of a mount nothing is fetched, and so it is not detached,
// before all that another worker has served are served on.
func TestCompletionWaitsForOthers(t *testing.T) {
	fs := connected(t)
	synctest.Test(t, func(t *testing.T) {
		p, err := pool.Open(filepath.Join(t.TempDir(), "pool"))
		must(t, err)
		defer p.Close()
		source, data := memblob.New(nil), make([]byte, chunk.Block)
		data[0] = 1
		ref := source.Put(data)
		tree := &index.Tree{
			Root: &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{
				"f": {Mode: syscall.S_IFREG | 0o644, Size: chunk.Block, Extents: []index.Extent{{}}},
			}},
			Chunks: []index.Chunk{{Digest: chunk.Sum(chunk.BLAKE3, data), Size: chunk.Block}},
			Blobs:  []index.Blob{{Digest: ref.Digest, Size: ref.Size}},
		}
		tree.Blobs[0].Append(index.Span{Size: chunk.Block, Length: chunk.Block})
		dir := filepath.Join(t.TempDir(), "linked")
		must(t, link.Link(t.Context(), tree, p, dir))
		l, err := link.Open(dir)
		must(t, err)
		im, err := fill.New(p, fill.Options{}).Open(l, source)
		must(t, err)
		defer im.Close()
		s := &server{cfg: Config{Registries: &config.Config{}}, log: slog.New(slog.DiscardHandler), pool: p, completing: make(chan struct{}, 1), alone: make(chan struct{}), resumed: make(chan struct{})}
		c := s.complete(&mounted{fs: fs, face: deviceFace, image: im, since: time.Now()})
		defer c.stop()
		time.Sleep(time.Hour)
		if im.Missing().Chunks != 1 {
			t.Error("it is fetched while others are not served yet")
		}
		close(s.resumed)
		time.Sleep(time.Hour)
		if im.Missing().Chunks != 0 {
			t.Error("it is never fetched")
		}
	})
}
