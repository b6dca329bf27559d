package main

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"github.com/shale-image/shale/packages"
	"github.com/shale-image/shale/trace"
)

// accessed is what runs of an image have read of its files and packages.
type accessed struct {
	Ref            string            `json:"ref"`
	ManifestDigest string            `json:"manifest_digest"`
	Runs           int               `json:"runs"`
	Databases      []string          `json:"databases"` // of package managers
	Files          []accessedFile    `json:"files"`     // by name
	Packages       []accessedPackage `json:"packages"`  // those read most first

	absent []string // what traces name and the image has no such file of
}

type accessedFile struct {
	Path      string   `json:"path"`
	Size      int64    `json:"size"`
	ReadBytes int64    `json:"read_bytes"`
	Packages  []string `json:"packages"`
	Others    int      `json:"others,omitempty"` // files with all of what was read
	Also      []string `json:"also,omitempty"`   // some of them
}

type accessedPackage struct {
	Name      string `json:"name"`
	Version   string `json:"version"`
	Arch      string `json:"arch"`
	Status    string `json:"status"`
	Files     int    `json:"files"` // with content
	Size      int64  `json:"size"`
	ReadFiles int    `json:"read_files"`
	ReadBytes int64  `json:"read_bytes"`
}

const (
	statusRead     = "read"
	statusPossibly = "possibly"
	statusNever    = "never"
)

// join joins what was read to the packages of an image. A file is what its inode
// is: packages may know it by another of its names.
func join(root *os.Root, t *trace.Trace, db *packages.Database) (*accessed, error) {
	out := &accessed{ManifestDigest: t.Manifest, Runs: len(t.Runs), Databases: append([]string{}, db.Kinds...), Files: []accessedFile{}, Packages: []accessedPackage{}}
	owners := map[uint64][]int{} // places in out.Packages
	for i, p := range db.Packages {
		out.Packages = append(out.Packages, accessedPackage{Name: p.Name, Version: p.Version, Arch: p.Arch, Status: statusNever})
		for _, name := range p.Files {
			ino, size, err := regular(root, name)
			if err != nil {
				return nil, err
			}
			if size == 0 || slices.Contains(owners[ino], i) {
				continue
			}
			owners[ino] = append(owners[ino], i)
			out.Packages[i].Files++
			out.Packages[i].Size += size
		}
	}
	for _, f := range t.ByFile() {
		ino, size, err := regular(root, f.Path)
		if err != nil {
			return nil, err
		}
		if size == 0 { // a trace may be anybody's
			out.absent = append(out.absent, f.Path)
			continue
		}
		a := accessedFile{Path: f.Path, Size: size, ReadBytes: min(f.Bytes, size), Packages: []string{}}
		if f.Shared() {
			a.Others, a.Also = f.Others, f.Also
		}
		of := owners[ino]
		if source := packages.Source(f.Path); len(of) == 0 && source != "" {
			if ino, _, err = regular(root, source); err != nil {
				return nil, err
			}
			of = owners[ino]
		}
		for _, i := range of {
			p := &out.Packages[i]
			a.Packages = append(a.Packages, p.Name)
			p.ReadFiles++
			p.ReadBytes += a.ReadBytes
			// Of a file that others are like it is not known that it was this one.
			if a.Others == 0 || p.Status == statusNever {
				p.Status = map[bool]string{true: statusRead, false: statusPossibly}[a.Others == 0]
			}
		}
		for _, name := range a.Also {
			also, _, err := regular(root, name)
			if err != nil {
				return nil, err
			}
			for _, i := range owners[also] {
				if out.Packages[i].Status == statusNever {
					out.Packages[i].Status = statusPossibly
				}
			}
		}
		out.Files = append(out.Files, a)
	}
	slices.SortFunc(out.Files, func(a, b accessedFile) int { return cmp.Compare(a.Path, b.Path) })
	order := []string{statusRead, statusPossibly, statusNever}
	slices.SortStableFunc(out.Packages, func(a, b accessedPackage) int {
		return cmp.Or(cmp.Compare(slices.Index(order, a.Status), slices.Index(order, b.Status)), cmp.Compare(b.ReadBytes, a.ReadBytes),
			cmp.Compare(b.Size, a.Size), cmp.Compare(a.Name, b.Name))
	})
	return out, nil
}

// regular tells which regular file a name is, and how long it is: 0 bytes if it is
// none, or not there. Names are from outside: only what says that the image cannot be
// read is an error.
func regular(root *os.Root, name string) (ino uint64, size int64, err error) {
	st, err := root.Lstat(name)
	for _, broken := range []error{syscall.EIO, syscall.ENOTCONN, syscall.EACCES, syscall.ENOMEM, fs.ErrClosed} {
		if errors.Is(err, broken) {
			return 0, 0, err
		}
	}
	if err != nil || !st.Mode().IsRegular() {
		return 0, 0, nil
	}
	return st.Sys().(*syscall.Stat_t).Ino, st.Size(), nil
}
