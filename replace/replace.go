// Package replace writes files that are whole or what they were before: beside, synced,
// renamed.
package replace

import (
	"io/fs"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// File writes data to a file in place of what it was. Who is killed meanwhile leaves a file beside
// it, with a dot before its name and digits behind.
func File(name string, data []byte, perm fs.FileMode) error {
	return renameio.WriteFile(name, data, perm, beside(name))
}

// Begin is File for what comes bit by bit: call CloseAtomicallyReplace on what it returns, or
// Cleanup.
func Begin(name string, perm fs.FileMode) (*renameio.PendingFile, error) {
	return renameio.NewPendingFile(name, renameio.WithPermissions(perm), beside(name))
}

// beside keeps the library from writing to TMPDIR, where that is of the same file system: it would
// try so with two files more, and nobody would look for what is left there.
func beside(name string) renameio.Option { return renameio.WithTempDir(filepath.Dir(name)) }
