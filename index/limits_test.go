package index

import (
	"errors"
	"strings"
	"syscall"
	"testing"
)

// TestCheckLimits passes each limit by one.
func TestCheckLimits(t *testing.T) {
	tree := NewTree()
	file := &Inode{Mode: syscall.S_IFREG, Size: 5000, Xattrs: []Xattr{{"user.a", "1234"}, {"user.b", ""}}}
	tree.Root.Children = map[string]*Inode{
		"dir":  {Mode: syscall.S_IFDIR, Children: map[string]*Inode{"file": file, "link": file}},
		"soft": {Mode: syscall.S_IFLNK, Target: "dir/file"},
	}
	stream := int64(ExpansionFrom + 10*1000)
	tree.Blobs = []Blob{{Size: 1000, Spans: []Span{{Size: stream, Length: 999}}}, {Size: 5}, {Spans: []Span{{Size: 7, Length: 7}}}}
	exact := Limits{Entries: 4, FileSize: 5000, XattrBytes: 16, MetadataBytes: 3 + 4 + 4 + 4 + 16 + 8, StreamBytes: stream, Expansion: 10}
	if err := tree.CheckLimits(exact); err != nil {
		t.Error("what is just met:", err)
	}
	for says, less := range map[string]func(l *Limits){
		"/dir: limit exceeded: with the names in it there are more than 3 (Entries)":      func(l *Limits) { l.Entries-- },
		": limit exceeded: a file of 5000 bytes, want at most 4999 (FileSize)":            func(l *Limits) { l.FileSize-- },
		": limit exceeded: extended attributes of 16 bytes, want at most 15 (XattrBytes)": func(l *Limits) { l.XattrBytes-- },
		"names, targets and attributes have more than 38 bytes (MetadataBytes)":           func(l *Limits) { l.MetadataBytes-- },
		"uncompressed, want at most 268445455 (StreamBytes)":                              func(l *Limits) { l.StreamBytes-- },
		"268445456 bytes uncompressed, more than 9 for each of 1000 stored (Expansion)":   func(l *Limits) { l.Expansion-- },
	} {
		lim := exact
		less(&lim)
		err := tree.CheckLimits(lim)
		if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
		if err != nil && strings.Contains(says, "FileSize") && !strings.HasPrefix(err.Error(), "/dir/file: ") && !strings.HasPrefix(err.Error(), "/dir/link: ") {
			t.Errorf("%v, want the path", err)
		}
	}
	if err := tree.CheckLimits(Limits{}); err != nil {
		t.Error("the defaults:", err)
	}
}
