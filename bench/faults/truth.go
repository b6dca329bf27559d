package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/plain"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/reader"
)

// truth is what an image has, as GNU tar extracts its layers: no code of the program
// under test has touched it.
type truth struct {
	dir   string
	files []string // regular ones that are not empty, below dir
	bytes int64    // in them
}

// errConverted is that an image has no layers that tar could extract.
var errConverted = errors.New("it was converted, and only its archives tell what is right: name the image that it was made of with -plain REPOSITORY:TAG")

// extract unpacks an image, of any repository, into dir.
func extract(ctx context.Context, repo *image.Repository, dir string) (*truth, error) {
	img, err := repo.Resolve(ctx, image.Platform{})
	if err != nil {
		return nil, err
	}
	if _, converted := reader.Bootstrap(img); converted {
		return nil, errConverted
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	for _, d := range img.Layers {
		rc, err := repo.Blob(ctx, d)
		if err != nil {
			return nil, err
		}
		err = plain.Unpack(ctx, rc, dir)
		rc.Close()
		if err != nil {
			return nil, err
		}
	}
	t := &truth{dir: dir}
	err = filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		st, err := e.Info()
		if err == nil && st.Size() > 0 {
			t.files, t.bytes = append(t.files, name[len(dir):]), t.bytes+st.Size()
		}
		return err
	})
	if err == nil && len(t.files) == 0 {
		err = errors.New("the image has no files")
	}
	return t, err
}

// reads are what became of reading files of a mount.
type reads struct {
	mu     sync.Mutex
	Bytes  int64    // that were right
	Files  int      // that were
	Failed []string // with EIO, somewhere
	Wrong  []string // what was wrong: bytes, or errors that nothing explains
}

// read reads what a mount has, files in any order, so many at a time.
func (t *truth) read(mnt string, files []string, readers int) *reads {
	files = append([]string(nil), files...)
	rand.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	out := &reads{}
	names := make(chan string)
	var wg sync.WaitGroup
	for range min(readers, len(files)) {
		wg.Go(func() {
			for name := range names {
				n, err := t.compare(mnt, name)
				out.mu.Lock()
				out.Bytes += n
				switch {
				case err == nil:
					out.Files++
				case errors.Is(err, syscall.EIO):
					out.Failed = append(out.Failed, name)
				default:
					out.Wrong = append(out.Wrong, err.Error())
				}
				out.mu.Unlock()
			}
		})
	}
	for _, name := range files {
		names <- name
	}
	close(names)
	wg.Wait()
	return out
}

// compare reads a file of a mount to its end, or up to an error, and returns how many
// bytes were right.
func (t *truth) compare(mnt, name string) (off int64, err error) {
	want, err := os.Open(filepath.Join(t.dir, name))
	if err != nil {
		return 0, fmt.Errorf("the truth: %v", err)
	}
	defer want.Close()
	got, err := os.Open(filepath.Join(mnt, name))
	if err != nil {
		return 0, err
	}
	defer got.Close()
	a, b := make([]byte, 128<<10), make([]byte, 128<<10)
	for {
		n, err := io.ReadFull(want, a)
		if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
			return off, fmt.Errorf("the truth: %v", err)
		}
		m, gerr := io.ReadFull(got, b)
		for i := range min(n, m) {
			if a[i] != b[i] {
				return off, fmt.Errorf("%s: wrong byte at %d: %#x, want %#x", name, off+int64(i), b[i], a[i])
			}
		}
		off += int64(min(n, m))
		switch {
		case gerr != nil && gerr != io.ErrUnexpectedEOF && gerr != io.EOF:
			return off, gerr
		case n != m || !bytes.Equal(a[:n], b[:n]):
			return off, fmt.Errorf("%s: it ends at %d", name, off)
		case err != nil:
			return off, nil
		}
	}
}

// forget has the kernel read files of a mount anew.
func forget(mnt string, files []string) {
	for _, name := range files {
		if f, err := os.Open(filepath.Join(mnt, name)); err == nil {
			_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
			f.Close()
		}
	}
}
