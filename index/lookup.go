package index

import (
	"fmt"
	"strings"
)

// Lookup returns the inode with a path as Walk gives it; symbolic links are
// not followed. The error wraps ErrNotExist.
func (t *Tree) Lookup(path string) (*Inode, error) {
	ino := t.Root
	if path == "" {
		return ino, nil
	}
	for name := range strings.SplitSeq(path, "/") {
		next, ok := ino.Children[name]
		if !ok {
			return nil, fmt.Errorf("/%s: %w", path, ErrNotExist)
		}
		ino = next
	}
	return ino, nil
}
