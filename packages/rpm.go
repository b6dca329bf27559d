package packages

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"github.com/shale-image/shale/index"
)

// rpmDirs are where the database may be; one is often a link to the other.
var rpmDirs = []string{"usr/lib/sysimage/rpm", "var/lib/rpm"}

// rpm reads rpmdb.sqlite, which distributions have had since 2020. Older ones have
// a Berkeley DB (Packages), SUSE has a format of its own (Packages.db).
func rpm(r *reader) ([]Package, error) {
	for _, dir := range rpmDirs {
		dir = r.really(dir, 0)
		name := path.Join(dir, "rpmdb.sqlite")
		f, err := r.open(name)
		if errors.Is(err, fs.ErrNotExist) {
			for _, old := range []string{"Packages", "Packages.db"} {
				if st, err := fs.Stat(r.root, path.Join(dir, old)); err == nil && st.Size() > 0 {
					return nil, index.Errorf(index.ErrUnsupported, path.Join(dir, old), -1, "an RPM database of this kind (rpmdb.sqlite is read)")
				}
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if st, err := fs.Stat(r.root, name+"-wal"); err == nil && st.Size() > 0 {
			return nil, index.Errorf(index.ErrUnsupported, name+"-wal", -1, "a write-ahead log with changes")
		}
		return r.rpmdb(f, name)
	}
	return nil, nil
}

func (r *reader) rpmdb(f fs.File, name string) ([]Package, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	at, ok := f.(io.ReaderAt)
	if !ok {
		return nil, fmt.Errorf("%s: it cannot be read at an offset", name)
	}
	db, err := openSQLite(at, st.Size(), name)
	if err != nil {
		return nil, err
	}
	out := []Package{}
	err = db.table("Packages", func(rec []byte) error { // hnum, blob
		cols, err := db.columns(rec, 2)
		if err != nil {
			return err
		}
		p, err := r.rpmHeader(cols[1].blob, name)
		if err != nil || p.Name == "gpg-pubkey" { // a key, kept as if it were a package
			return err
		}
		out = append(out, p)
		return r.found(&p, name)
	})
	return out, err
}

// Tags of a header.
const (
	tagName, tagVersion, tagRelease, tagEpoch, tagArch = 1000, 1001, 1002, 1003, 1022

	tagStates, tagDirs, tagBases, tagNames = 1029, 1116, 1117, 1118 // of files: state, number of the directory, name; directories
)

const maxTags = 1<<16 - 1 // of a header, as RPM itself has it

const notInstalled = 2 // state of a file: left out, as documentation may be

// rpmHeader reads a header: counts of entries and of bytes of data, entries of 16
// bytes (tag, type, offset, count; big-endian), and the data.
func (r *reader) rpmHeader(b []byte, name string) (p Package, err error) {
	be := binary.BigEndian
	if len(b) < 8 {
		return p, index.Errorf(index.ErrCorrupt, name, -1, "header of %d bytes", len(b))
	}
	entries, size := int64(be.Uint32(b)), int64(be.Uint32(b[4:]))
	if entries > maxTags {
		return p, index.Errorf(index.ErrLimit, name, -1, "a header of %d tags, want at most %d", entries, maxTags)
	}
	if 8+16*entries+size > int64(len(b)) {
		return p, index.Errorf(index.ErrCorrupt, name, -1, "header of %d bytes with %d entries and %d bytes of data", len(b), entries, size)
	}
	data := b[8+16*entries:][:size]
	tags := map[uint32]entry{}
	for i := range entries {
		e := b[8+16*i:]
		off := int64(be.Uint32(e[8:]))
		if off > size {
			return p, index.Errorf(index.ErrCorrupt, name, -1, "tag %d is at %d of %d bytes of data", be.Uint32(e), off, size)
		}
		tags[be.Uint32(e)] = entry{data[off:], int64(be.Uint32(e[12:]))}
	}
	text := func(tag uint32) string {
		if s := tags[tag].texts(1); len(s) > 0 {
			return s[0]
		}
		return ""
	}
	p.Name, p.Arch = text(tagName), text(tagArch)
	p.Version = text(tagVersion) + "-" + text(tagRelease)
	if epoch := tags[tagEpoch].numbers(); len(epoch) > 0 && epoch[0] != 0 {
		p.Version = fmt.Sprintf("%d:%s", epoch[0], p.Version)
	}
	dirs, bases, states := tags[tagNames].texts(maxFiles), tags[tagBases].texts(maxFiles), tags[tagStates]
	of := tags[tagDirs].numbers()
	if len(of) != len(bases) {
		return p, index.Errorf(index.ErrCorrupt, name, -1, "package %.100q: %d files in %d directories", p.Name, len(bases), len(of))
	}
	for i, base := range bases {
		if int64(of[i]) >= int64(len(dirs)) {
			return p, index.Errorf(index.ErrCorrupt, name, -1, "package %.100q: file %d is in directory %d of %d", p.Name, i, of[i], len(dirs))
		}
		if int64(i) < min(states.count, int64(len(states.data))) && states.data[i] == notInstalled {
			continue
		}
		if err := r.add(&p, dirs[of[i]]+base); err != nil {
			return p, err
		}
	}
	return p, nil
}

// entry is the data of a tag, from its first byte on, and how many values it has.
type entry struct {
	data  []byte
	count int64
}

func (e entry) texts(most int64) (out []string) {
	p := e.data
	for range min(e.count, most, int64(len(e.data))) {
		s, rest, ok := bytes.Cut(p, []byte{0})
		if !ok {
			break
		}
		out, p = append(out, string(s)), rest
	}
	return out
}

func (e entry) numbers() (out []uint32) {
	for i := range min(e.count, int64(len(e.data)/4)) {
		out = append(out, binary.BigEndian.Uint32(e.data[4*i:]))
	}
	return out
}
