// Package index is the model every image format is read into: a tree of
// files whose data is a list of chunks, and for each chunk where its bytes
// are. It is portable and belongs to the image; nothing in it depends on the
// node.
//
// A new image format is a new reader that fills in a Tree (or yields Changes
// to apply to one) and nothing else. The package knows no format, no registry
// and no disk.
package index

import (
	"fmt"
	"io/fs"
	"syscall"

	"github.com/shale-image/shale/chunk"
)

// Tree is the index of one image: its files, and the chunks and blobs their
// data lies in.
type Tree struct {
	Root   *Inode  // a directory, never nil
	Chunks []Chunk // what Extents refer to, by position
	Blobs  []Blob  // what Chunks refer to, by position

	layers uint32 // Appliers begun so far
}

// Chunk is a piece of file content and where its bytes are: in the stream of a
// blob.
type Chunk struct {
	Digest chunk.Digest // of the content
	Size   uint32       // bytes, 1 to chunk.MaxSize
	Blob   uint32       // position in Tree.Blobs
	Offset int64        // of the first byte in the blob's stream
}

// End is the offset in the blob's stream behind the chunk.
func (c *Chunk) End() int64 { return c.Offset + int64(c.Size) }

// Inode is a file of any type. Hard links are several Children entries that
// point to the same Inode.
type Inode struct {
	Mode     uint32 // st_mode: type and permission bits (syscall.S_IFREG | 0o644)
	UID, GID uint32
	Mtime    Time
	Rdev     uint64 // devices: st_rdev as in golang.org/x/sys/unix.Mkdev
	Size     int64  // regular files: bytes, holes included
	Target   string // symbolic links
	Xattrs   []Xattr
	Extents  []Extent          // regular files: in order of Off, not overlapping
	Children map[string]*Inode // directories

	layer uint32 // the Applier that wrote this inode last, counted from 1
	swept uint32 // directories: the last Applier for which nothing in it is from a lower layer
}

// Time is a time as file systems keep it. Sec may be negative; Nsec is 0 to
// 999,999,999 and counts forward from Sec.
type Time struct {
	Sec  int64
	Nsec uint32
}

// Xattr is an extended attribute under its full name ("user.mime_type").
// The value may be empty or binary.
type Xattr struct {
	Name  string
	Value string
}

// Extent says that the content of a chunk lies at an offset of a file. What no
// extent covers is a hole and reads as zeros.
type Extent struct {
	Off   int64
	Chunk uint32 // position in Tree.Chunks
}

// Type returns the S_IFMT bits of the mode.
func (i *Inode) Type() uint32 { return i.Mode & syscall.S_IFMT }

// IsDir tells whether the inode is a directory.
func (i *Inode) IsDir() bool { return i.Type() == syscall.S_IFDIR }

// IsRegular tells whether the inode is a regular file.
func (i *Inode) IsRegular() bool { return i.Type() == syscall.S_IFREG }

// ErrCorrupt is wrapped by every error about malformed input.
var ErrCorrupt = chunk.ErrCorrupt

// Sentinels for what callers branch on besides ErrCorrupt.
var (
	ErrUnsupported error = constError("not supported")
	ErrLimit       error = constError("limit exceeded")
	ErrNotExist          = fs.ErrNotExist
)

type constError string

func (e constError) Error() string { return string(e) }

// Error locates bad input: the file, blob or layer it is in, the byte offset
// in it, and what was expected there.
type Error struct {
	Name   string // file, blob digest or layer
	Offset int64  // -1 if it has no single place
	Err    error  // wraps ErrCorrupt, ErrUnsupported or ErrLimit
}

func (e *Error) Error() string {
	if e.Offset < 0 {
		return fmt.Sprintf("%s: %v", e.Name, e.Err)
	}
	return fmt.Sprintf("%s: at offset %d: %v", e.Name, e.Offset, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error that wraps kind (ErrCorrupt, ErrUnsupported or
// ErrLimit) with an explanation.
func Errorf(kind error, name string, off int64, format string, args ...any) error {
	return &Error{Name: name, Offset: off, Err: fmt.Errorf("%w: "+format, append([]any{kind}, args...)...)}
}
