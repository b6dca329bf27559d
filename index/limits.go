package index

// Limits bounds what an image may make its readers do. In a zero or negative
// field the default applies. Passing one is an error that wraps ErrLimit and names
// the field.
type Limits struct {
	// Entries is the number of entries of an archive or a table of contents, and of
	// names in the tree of an image. Default 10,000,000.
	Entries int `json:"entries,omitempty"`

	// HeaderBytes is the size of all extended headers of one entry of an archive: pax
	// records, long names, sparse maps. Default 1 MiB.
	HeaderBytes int64 `json:"header_bytes,omitempty"`

	// XattrBytes is the size of one file's extended attributes, names and
	// values. Default 64 KiB, which is what Linux lets one value have.
	XattrBytes int64 `json:"xattr_bytes,omitempty"`

	// MetadataBytes is what names, link targets, extended attributes and sparse maps
	// of a layer, or of the tree of an image, together may take, and the size of a
	// table of contents, uncompressed. Default 1 GiB.
	MetadataBytes int64 `json:"metadata_bytes,omitempty"`

	// FileSize is the size of one file, holes included. Default 16 TiB.
	FileSize int64 `json:"file_bytes,omitempty"`

	// StreamBytes is the size of an uncompressed layer. Default 1 TiB.
	StreamBytes int64 `json:"stream_bytes,omitempty"`

	// Expansion is how many bytes each stored byte of a layer may stand for, from
	// ExpansionFrom on. Default 1,000: about what gzip makes of nothing but zeros.
	Expansion int64 `json:"expansion,omitempty"`

	// Window is the largest zstd window, which is memory needed. Default 128 MiB.
	Window int64 `json:"zstd_window,omitempty"`

	// Memory is what reading an image's index may take of it. Default 4 GiB.
	Memory int64 `json:"memory_bytes,omitempty"`
}

// ExpansionFrom is how many bytes of a layer are free of Limits.Expansion.
const ExpansionFrom = 256 << 20

// WithDefaults returns l with the defaults where a field does not say.
func (l Limits) WithDefaults() Limits {
	if l.Entries <= 0 {
		l.Entries = 10_000_000
	}
	for _, f := range []struct {
		field *int64
		value int64
	}{
		{&l.HeaderBytes, 1 << 20},
		{&l.XattrBytes, 64 << 10},
		{&l.MetadataBytes, 1 << 30},
		{&l.FileSize, 16 << 40},
		{&l.StreamBytes, 1 << 40},
		{&l.Expansion, 1000},
		{&l.Window, 128 << 20},
		{&l.Memory, 4 << 30},
	} {
		if *f.field <= 0 {
			*f.field = f.value
		}
	}
	l.FileSize = min(l.FileSize, 1<<62) // sums must not overflow
	return l
}

// CheckLimits refuses a tree that passes a limit. Whatever reader has made it, it is
// for this to say in the end; readers refuse earlier what they could not even read.
func (t *Tree) CheckLimits(lim Limits) error {
	c := limitCheck{lim: lim.WithDefaults(), seen: map[*Inode]struct{}{}}
	if err := c.inode("", "", t.Root); err != nil {
		return err
	}
	for i := range t.Blobs {
		if err := c.blob(&t.Blobs[i]); err != nil {
			return err
		}
	}
	return nil
}

type limitCheck struct {
	lim      Limits
	entries  int
	metadata int64
	seen     map[*Inode]struct{} // that have attributes or a target
}

func (c *limitCheck) inode(dir, name string, ino *Inode) error {
	bad := func(format string, args ...any) error {
		return Errorf(ErrLimit, dir+"/"+name, -1, format, args...)
	}
	if ino.IsRegular() && ino.Size > c.lim.FileSize {
		return bad("a file of %d bytes, want at most %d (FileSize)", ino.Size, c.lim.FileSize)
	}
	if _, ok := c.seen[ino]; !ok && (len(ino.Xattrs) > 0 || ino.Target != "") {
		c.seen[ino] = struct{}{}
		var n int64
		for _, x := range ino.Xattrs {
			n += int64(len(x.Name) + len(x.Value))
		}
		if n > c.lim.XattrBytes {
			return bad("extended attributes of %d bytes, want at most %d (XattrBytes)", n, c.lim.XattrBytes)
		}
		c.metadata += n + int64(len(ino.Target))
	}
	if c.entries += len(ino.Children); c.entries > c.lim.Entries {
		return bad("with the names in it there are more than %d (Entries)", c.lim.Entries)
	}
	for name := range ino.Children {
		c.metadata += int64(len(name))
	}
	if c.metadata > c.lim.MetadataBytes {
		return bad("with it names, targets and attributes have more than %d bytes (MetadataBytes)", c.lim.MetadataBytes)
	}
	if len(ino.Children) == 0 {
		return nil
	}
	if name != "" {
		dir += "/" + name
	}
	for name, child := range ino.Children {
		if err := c.inode(dir, name, child); err != nil {
			return err
		}
	}
	return nil
}

func (c *limitCheck) blob(b *Blob) error {
	stream, stored := b.StreamSize(), b.Size
	if stored == 0 && len(b.Spans) > 0 {
		last := &b.Spans[len(b.Spans)-1]
		stored = last.Offset + last.Length
	}
	switch {
	case stream > c.lim.StreamBytes:
		return Errorf(ErrLimit, "blob "+b.Digest, -1, "%d bytes uncompressed, want at most %d (StreamBytes)", stream, c.lim.StreamBytes)
	case stream > ExpansionFrom && (stream-ExpansionFrom)/c.lim.Expansion > stored:
		return Errorf(ErrLimit, "blob "+b.Digest, -1, "%d bytes uncompressed, more than %d for each of %d stored (Expansion)", stream, c.lim.Expansion, stored)
	}
	return nil
}
