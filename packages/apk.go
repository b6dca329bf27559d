package packages

import (
	"errors"
	"io/fs"
	"path"
)

// apk reads lib/apk/db/installed, or usr/lib/apk/db/installed: lines of a letter
// and a value, an empty line behind each package.
//
//	P:musl  V:1.2.5-r0  A:x86_64   name, version, architecture
//	F:lib                          a directory; the files R: that follow are in it
//	R:ld-musl-x86_64.so.1
func apk(r *reader) ([]Package, error) {
	for _, name := range []string{"lib/apk/db/installed", "usr/lib/apk/db/installed"} {
		out := []Package{}
		var p Package
		dir := ""
		end := func() error {
			q := p
			if p, dir = (Package{}), ""; q.Name == "" {
				return nil
			}
			out = append(out, q)
			return r.found(&q, name)
		}
		err := r.lines(name, func(line string) error {
			if line == "" {
				return end()
			}
			if len(line) < 2 || line[1] != ':' {
				return nil
			}
			value := line[2:]
			switch line[0] {
			case 'P':
				p.Name = value
			case 'V':
				p.Version = value
			case 'A':
				p.Arch = value
			case 'F':
				dir = value
			case 'R':
				return r.add(&p, path.Join(dir, value))
			}
			return nil
		})
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = end()
		}
		return out, err
	}
	return nil, nil
}
