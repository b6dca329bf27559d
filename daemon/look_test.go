package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/shale-image/shale/blob"
	contents "github.com/shale-image/shale/content"
	"github.com/shale-image/shale/image"
)

// asked is a source that counts, of an image's own repository or of none.
type asked struct {
	src   blob.Source
	times int
}

func (a *asked) Range(ctx context.Context, ref blob.Ref, off, n int64) (io.ReadCloser, error) {
	a.times++
	if a.src == nil {
		return nil, blob.ErrUnavailable
	}
	return a.src.Range(ctx, ref, off, n)
}

// TestLook: what the node has is looked into without anybody being asked, and no byte of
// it is believed that is not what the image says.
func TestLook(t *testing.T) {
	for _, tag := range []string{"shale", "plain"} {
		t.Run(tag, func(t *testing.T) {
			c, name := service(t), windowed(t)
			ref := refOf(t, name[:len(name)-len("shale")]+tag)
			repo, err := image.Open(background, ref, image.Options{})
			must(t, err)
			defer repo.Close()
			if _, err := Look(c.Root, ref, "linux/amd64", nil); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("of nothing: %v", err)
			}
			_, err = c.Pull(background, Source{Ref: ref.String(), Platform: "linux/amd64"}, true, nil)
			must(t, err)
			must(t, c.Stop(background))
			want := map[string][]byte{"text": longText(), "big": files["big"], "etc/hello": files["etc/hello"]}
			look := func(from *asked, may bool) {
				t.Helper()
				l, err := Look(c.Root, ref, "amd64", from)
				must(t, err)
				defer l.Close()
				for name, want := range want {
					ino, err := l.Tree.Lookup(name)
					must(t, err)
					var got bytes.Buffer
					err = contents.Copy(background, &got, l.Tree, contents.Cached(l, t.TempDir()), ino)
					if err == nil && !bytes.Equal(got.Bytes(), want) {
						t.Errorf("%s has %d bytes, want %d, or others", name, got.Len(), len(want))
					}
					if err != nil && may {
						t.Errorf("%s: %v", name, err)
					}
				}
			}
			nobody := &asked{}
			look(nobody, true)
			if nobody.times > 0 {
				t.Errorf("%d ranges were asked for", nobody.times)
			}
			all, err := filepath.Glob(filepath.Join(c.Root, "pool", "segments", "*", "data"))
			must(t, err)
			for _, name := range all { // as if all had rotted, or been evicted
				st, err := os.Stat(name)
				must(t, err)
				must(t, os.Truncate(name, 0))
				must(t, os.Truncate(name, st.Size()))
			}
			look(nobody, false)
			if nobody.times == 0 {
				t.Error("what is not here is believed")
			}
			look(&asked{src: repo.Blobs()}, true)
			for _, name := range all {
				must(t, os.Remove(name))
			}
			look(&asked{src: repo.Blobs()}, true)
			// What is wrong with the files is no reason to believe them.
			meta, err := filepath.Glob(filepath.Join(c.Root, "images", "*", "linked", "meta"))
			must(t, err)
			p, err := os.ReadFile(meta[0])
			must(t, err)
			p[len(p)/2] ^= 1
			must(t, os.WriteFile(meta[0], p, 0o600))
			if _, err := Look(c.Root, ref, "amd64", nil); err == nil {
				t.Error("damaged metadata are shown")
			}
		})
	}
}
