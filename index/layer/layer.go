// Package layer reads OCI layers: tar archives, compressed or not, as a
// sequence of changes to a tree (index.Change) and the file data that goes
// with them. It must not know registries, the pool or what becomes of the data.
//
// What cannot be kept is refused by name, never dropped without a word: an
// image is either shown as it was built or not at all.
//
// # Archives
//
// The tar formats v7, ustar, star, GNU (old and new, all kinds of sparse
// files) and pax are read, with these decisions where they leave a choice:
//
//   - Leading "/" and "./" of names are dropped; ".." is refused.
//   - A file ('0', NUL, '7') with a trailing slash in its name is a directory,
//     as in v7 archives.
//   - Links, directories and devices have no data. If the header of one gives
//     a size all the same, data is skipped unless the next block is a header
//     or the end. ('1' with data is allowed by pax; in old archives the size is
//     that of the file linked to.)
//   - The metadata in the header of a hard link is ignored: it is that of the
//     file linked to.
//   - A GNU directory listing ('D') is a directory, and the listing is
//     skipped, as by an extraction that is not incremental. A volume label ('V') is skipped.
//     All other types are refused: 'M' (continued from another volume), 'N',
//     'A', 'E', 'I', 'X' and unknown ones.
//   - Two zero blocks end the archive, and so does the end of the stream at a
//     block boundary, after one zero block or none. What follows the end is
//     read and ignored.
//   - A pax header and a GNU long name that disagree are refused, and so are
//     two extended headers of a kind for one entry, since readers differ.
//   - User and group are the numbers; names of users and groups are ignored.
//   - Times have nanoseconds; finer fractions are rounded down.
//
// # Whiteouts
//
// An entry .wh.NAME of any type is a Whiteout of NAME and .wh..wh..opq is
// Opaque for its directory. Other names that start with .wh..wh. are the
// housekeeping of aufs (.wh..wh.plnk, .wh..wh.aufs) and skipped with what is
// below them. Any other element of a path that starts with .wh. is refused: it
// cannot be told apart from a whiteout in the next layer.
//
// A character device 0:0 is refused, and so are the extended attributes
// trusted.overlay.* and user.overlay.*: all of them are instructions to the
// overlay file system above the image, not files.
//
// # Extended attributes and pax records
//
// Extended attributes come from SCHILY.xattr.NAME (raw, GNU tar's %3D and %25
// in names decoded) and, where that is absent, LIBARCHIVE.xattr.NAME
// (URL-encoded name, base64 value); an empty value is kept. The name must start with user., trusted. or security., or be
// system.posix_acl_access or system.posix_acl_default; others are refused.
//
// The records path, linkpath, size, uid, gid, mtime, SCHILY.devmajor,
// SCHILY.devminor and GNU.sparse.* are applied, those in a global header as
// well except that it may not give a path, linkpath, size or sparse map.
// hdrcharset may be BINARY or UTF-8; names are bytes here either way.
//
// Records that say nothing about the tree are ignored: comment, atime, ctime,
// charset, uname, gname, LIBARCHIVE.creationtime, SCHILY.dev, .ino, .nlink and
// .fflags (chattr flags, which images do not have), GNU.dumpdir and
// GNU.volume.label. All other records of POSIX and of the vendors GNU, SCHILY,
// LIBARCHIVE, RHT, SUN and MSWINDOWS are refused, since they may say
// something about the tree: SCHILY.acl.* and RHT.security.selinux, for example, are access
// rules in forms no kernel takes. Records of further vendors
// (APK-TOOLS.checksum.SHA1) are ignored, as POSIX wants it and as every
// program does that images are built and unpacked with today.
package layer

import "github.com/shale-image/shale/index"

// Fragment is a piece of a file for which the archive has data: Length bytes
// that belong at Off in the file. What no fragment covers is a hole.
type Fragment struct {
	Off, Length int64
}

// Entry is one change a layer makes, and where the data of the file it adds
// is.
//
// The Inode belongs to the caller. It has no Extents: making them from the
// data is up to the caller.
type Entry struct {
	index.Change

	// DataOffset is where in the uncompressed archive the stored data of a
	// regular file starts: all Fragments, one right after the other.
	DataOffset int64

	// Fragments is in order of Off and without overlap or empty fragments: one
	// for most files, none if there is no data, many for a sparse file.
	Fragments []Fragment

	one [1]Fragment // what Fragments mostly is
}
