package debian

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/shale-image/shale/bench/oci"
)

// hostFiles depend on the machine that builds, not on the recipe, and are left
// out of every layer. A name that ends in a slash stands for all in that
// directory, but not the directory itself.
var hostFiles = []string{
	"dev/", // the runtime makes its own
	"etc/hostname",
	"etc/resolv.conf",
	"etc/apt/sources.list.d/",
	"etc/apt/sources.list",
	"etc/apt/apt.conf.d/99mmdebstrap",
	"var/cache/ldconfig/", // inode numbers and times of libraries
}

func isHostFile(name string) bool {
	return slices.ContainsFunc(hostFiles, func(h string) bool {
		if strings.HasSuffix(h, "/") {
			return strings.HasPrefix(name, h)
		}
		return name == h
	})
}

// entry is all of a tar entry that makes it differ from another.
type entry struct {
	header tar.Header
	digest [sha256.Size]byte // of the content
}

// snapshot is a tree as its tar tells it, by clean relative path.
type snapshot map[string]entry

// scan calls fn for every entry of a tar, with its clean path; "." is the root.
func scan(r io.Reader, fn func(name string, h *tar.Header, body io.Reader) error) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		name := path.Clean(h.Name)
		if isHostFile(name) {
			continue
		}
		if h.Typeflag == tar.TypeLink {
			h.Linkname = path.Clean(h.Linkname)
		}
		if err := fn(name, h, tr); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}

func takeSnapshot(r io.Reader) (snapshot, error) {
	s := snapshot{}
	h := sha256.New()
	err := scan(r, func(name string, header *tar.Header, body io.Reader) error {
		h.Reset()
		if _, err := io.Copy(h, body); err != nil {
			return err
		}
		e := entry{header: *header}
		h.Sum(e.digest[:0])
		s[name] = e
		return nil
	})
	return s, err
}

func snapshotLayer(blob string) (snapshot, error) {
	f, err := os.Open(blob)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return nil, err
	}
	return takeSnapshot(z)
}

// same tells whether two entries of the same name need no entry in a layer.
func same(a, b entry) bool {
	x, y := a.header, b.header
	return x.Typeflag == y.Typeflag && x.Linkname == y.Linkname && x.Size == y.Size &&
		x.Mode == y.Mode && x.Uid == y.Uid && x.Gid == y.Gid && x.ModTime.Equal(y.ModTime) &&
		x.Devmajor == y.Devmajor && x.Devminor == y.Devminor && a.digest == b.digest &&
		slices.Equal(xattrs(&x), xattrs(&y))
}

// xattrs returns "key=value" of the header's extended attributes, sorted.
func xattrs(h *tar.Header) []string {
	var out []string
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, "SCHILY.xattr.") {
			out = append(out, k+"="+v)
		}
	}
	slices.Sort(out)
	return out
}

// changes returns which entries of upper a layer on top of lower has, and the
// names it has whiteouts for. Parents of what changed are in, as engines do
// it; all names of a hard-linked file are in if one of them is.
func changes(lower, upper snapshot) (changed map[string]bool, removed []string) {
	changed = map[string]bool{}
	add := func(name string) {
		for ; !changed[name]; name = path.Dir(name) {
			if _, ok := upper[name]; ok {
				changed[name] = true
			}
			if name == "." {
				return
			}
		}
	}
	group := func(name string) string { // the name that the others link to
		if e := upper[name]; e.header.Typeflag == tar.TypeLink {
			return e.header.Linkname
		}
		return name
	}
	groups := map[string]bool{}
	for name, e := range upper {
		if old, ok := lower[name]; !ok || !same(old, e) {
			groups[group(name)] = true
		}
	}
	for name := range upper {
		if groups[group(name)] {
			add(name)
		}
	}
	for name := range lower {
		if _, ok := upper[name]; !ok {
			// A directory that is gone, or is none any more, takes its
			// content along.
			if dir, ok := upper[path.Dir(name)]; ok && dir.header.Typeflag == tar.TypeDir {
				removed = append(removed, name)
				add(path.Dir(name))
			}
		}
	}
	slices.Sort(removed)
	return changed, removed
}

// writeLayer adds what a tar has changed against lower to the layout, as a
// gzip layer. A nil lower is the empty tree.
//
// Modification times from start on would differ with every build: they become
// the newest one that a package gave.
func writeLayer(out oci.Layout, tarball string, lower snapshot, start time.Time) (layer, error) {
	f, err := os.Open(tarball)
	if err != nil {
		return layer{}, err
	}
	defer f.Close()
	upper, err := takeSnapshot(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return layer{}, err
	}
	clamp := newest(upper, start)
	for name, e := range upper {
		e.header.ModTime = clamp(e.header.ModTime)
		upper[name] = e
	}
	changed, removed := changes(lower, upper)

	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return layer{}, err
	}
	return writeBlob(out, Gzip, func(w io.Writer) error {
		tw := tar.NewWriter(w)
		err := scan(bufio.NewReaderSize(f, 1<<20), func(name string, h *tar.Header, body io.Reader) error {
			if name == "." || !changed[name] {
				return nil
			}
			h.ModTime = clamp(h.ModTime)
			if err := tw.WriteHeader(clean(name, h)); err != nil {
				return err
			}
			_, err := io.Copy(tw, body)
			return err
		})
		for _, name := range removed {
			dir, base := path.Split(name)
			err = errors.Join(err, tw.WriteHeader(&tar.Header{
				Name: dir + whiteout + base, Mode: 0o600, ModTime: clamp(start), Format: tar.FormatPAX,
			}))
		}
		return errors.Join(err, tw.Close())
	})
}

// newest returns a function that moves times from start on to the newest
// time in s before it.
func newest(s snapshot, start time.Time) func(time.Time) time.Time {
	start = start.Truncate(time.Second)
	limit := time.Unix(epoch, 0)
	for _, e := range s {
		if t := e.header.ModTime; t.Before(start) && t.After(limit) {
			limit = t
		}
	}
	return func(t time.Time) time.Time {
		if t.Before(start) {
			return t
		}
		return limit
	}
}

// clean returns the header as layers have it: no leading "./", no user names,
// and of the PAX records only the attributes; the writer adds what it needs.
func clean(name string, h *tar.Header) *tar.Header {
	c := &tar.Header{
		Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode,
		Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor,
		Format: tar.FormatPAX,
	}
	if h.Typeflag == tar.TypeDir {
		c.Name += "/"
	}
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, "SCHILY.xattr.") {
			if c.PAXRecords == nil {
				c.PAXRecords = map[string]string{}
			}
			c.PAXRecords[k] = v
		}
	}
	return c
}
