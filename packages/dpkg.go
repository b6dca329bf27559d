package packages

import (
	"errors"
	"io/fs"
	"path"
	"strings"
)

const dpkgDir = "var/lib/dpkg"

// dpkg reads var/lib/dpkg: the file status, a paragraph a package, and its list of
// files in info; or, in images without dpkg (distroless), status.d, where each
// package has its paragraph, and its files as md5sums.
func dpkg(r *reader) ([]Package, error) {
	var out []Package
	found := false
	err := r.paragraphs(path.Join(dpkgDir, "status"), func(p paragraph) error {
		found = true
		if p.Name == "" || !strings.HasSuffix(p.status, " installed") {
			return nil
		}
		out = append(out, p.Package)
		return r.found(&p.Package, dpkgDir)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	diverted, err := r.diversions()
	if err != nil {
		return nil, err
	}
	for i := range out {
		p := &out[i]
		list := func(name string) error {
			return r.lines(path.Join(dpkgDir, "info", name+".list"), func(line string) error {
				if d, ok := diverted[line]; ok && d.by != p.Name {
					line = d.to
				}
				return r.add(p, line)
			})
		}
		err := list(p.Name + ":" + p.Arch) // of packages of which several architectures fit together
		if errors.Is(err, fs.ErrNotExist) {
			err = list(p.Name)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	more, err := r.statusDir()
	if err != nil {
		return nil, err
	}
	if found && out == nil {
		out = []Package{}
	}
	return append(out, more...), nil
}

// statusDir reads var/lib/dpkg/status.d.
func (r *reader) statusDir() ([]Package, error) {
	dir := path.Join(dpkgDir, "status.d")
	names, err := fs.ReadDir(r.root, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := []Package{}
	for _, de := range names {
		if de.IsDir() || strings.HasSuffix(de.Name(), ".md5sums") {
			continue
		}
		name := path.Join(dir, de.Name())
		var p Package
		if err := r.paragraphs(name, func(q paragraph) error { p = q.Package; return nil }); err != nil {
			return nil, err
		}
		if p.Name == "" {
			continue
		}
		err := r.lines(name+".md5sums", func(line string) error {
			_, file, ok := strings.Cut(line, "  ")
			if !ok {
				return nil
			}
			return r.add(&p, file)
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err := r.found(&p, name); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// paragraph is what is of use here of a paragraph of a control file.
type paragraph struct {
	Package
	status string
}

// paragraphs calls fn for the paragraphs of a control file (deb822(5)).
func (r *reader) paragraphs(name string, fn func(paragraph) error) error {
	var p paragraph
	some := false
	end := func() error {
		q, was := p, some
		p, some = paragraph{}, false
		if !was {
			return nil
		}
		return fn(q)
	}
	err := r.lines(name, func(line string) error {
		if strings.TrimSpace(line) == "" {
			return end()
		}
		some = true
		field, value, ok := strings.Cut(line, ":")
		if !ok || line[0] == ' ' || line[0] == '\t' {
			return nil // the line before goes on
		}
		value = strings.TrimSpace(value)
		switch strings.ToLower(field) {
		case "package":
			p.Name = value
		case "version":
			p.Version = value
		case "architecture":
			p.Arch = value
		case "status":
			p.status = value
		}
		return nil
	})
	if err != nil {
		return err
	}
	return end()
}

type diversion struct{ to, by string }

// diversions reads which files lie elsewhere because another package wants their
// place: three lines each, from, to, by.
func (r *reader) diversions() (map[string]diversion, error) {
	out := map[string]diversion{}
	var three []string
	err := r.lines(path.Join(dpkgDir, "diversions"), func(line string) error {
		if three = append(three, line); len(three) == 3 {
			out[three[0]] = diversion{three[1], three[2]}
			three = nil
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return out, nil
}
