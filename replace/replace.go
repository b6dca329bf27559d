// Package replace writes files that are whole or what they were before: beside, synced,
// renamed.
package replace

import (
	"io"
	"io/fs"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// File writes data to a file in place of what it was, with its permissions, or perm if there was
// none. Who is killed meanwhile leaves a file beside it, with a dot before its name and digits
// behind.
func File(name string, data []byte, perm fs.FileMode) error {
	return With(name, perm, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// With is File of what write writes, unless that fails.
func With(name string, perm fs.FileMode, write func(io.Writer) error) error {
	// The library would write to TMPDIR where that is of the same file system, which it tries with two
	// files more, and nobody would look there for what is left.
	beside := renameio.WithTempDir(filepath.Dir(name))
	f, err := renameio.NewPendingFile(name, renameio.WithPermissions(perm), renameio.WithExistingPermissions(), beside)
	if err != nil {
		return err
	}
	defer f.Cleanup()
	if err := write(f); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}
