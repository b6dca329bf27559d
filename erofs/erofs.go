// Package erofs writes and reads EROFS metadata images: everything of a file
// system but the content of its regular files, which lies in extra devices and
// is only pointed to.
//
// It is used for the images that link makes and, with an extension of the
// super block, by index/rafs. It knows nothing about where chunks come from,
// about blobs, registries or mounts; an address is what Options.Locate says.
package erofs

import (
	"github.com/shale-image/shale/index"
)

// BlockSize is EROFS' unit of addressing as we write it, in bytes, and
// BlockBits its base-2 logarithm.
const (
	BlockSize = 1 << BlockBits
	BlockBits = 12
)

// Bits of Options.Compat and Super.FeatureCompat. A reader may ignore them.
const (
	CompatChecksum = 0x1 // set by Options.Checksum
	CompatMtime    = 0x2 // inode times are modification times, not creation times
)

// MaxExt is the size in bytes of the area after the super block that
// Options.Ext is placed in.
const MaxExt = 256

// Location is the address of a chunk.
type Location struct {
	Device uint16 // slot, counted from 1
	Block  uint32 // first 4 KiB block in that device
	Index  uint32 // RAFS: the chunk's index in its blob, 24 bits; 0 in our own images
}

// Device is a slot of the device table: a file or block device that holds file
// content.
type Device struct {
	Tag    string // up to 64 bytes; names the device for tools
	Blocks uint32 // size in 4 KiB blocks
	Mapped uint32 // its first block in the flat address space; set by NewLayout unless Options.KeepMapped
}

// Options says how NewLayout lays out a tree.
type Options struct {
	Devices []Device

	// Locate returns where chunk i of the tree lies. It is called several
	// times for a chunk, by NewLayout and by WriteTo, never concurrently, and
	// must always say the same. The device must hold zeros between the end of
	// a chunk and the end of the chunk's last block, if the file goes on there.
	Locate func(chunk uint32) Location

	// ChunkBits is the base-2 logarithm of the size in bytes of an EROFS chunk,
	// for every file (RAFS: fixed; 12 to 24). 0: for each file the coarsest
	// that fits its addresses, so that a contiguous file is one entry.
	ChunkBits uint8

	UUID      [16]byte
	BuildTime index.Time
	Compat    uint32 // more feature_compat bits
	Checksum  bool   // write the super block's CRC32C and set CompatChecksum

	// Ext is placed right after the 128 bytes of the super block, at byte
	// 1152; at most MaxExt bytes. With an extension the image always declares
	// chunked files and a device table, as RAFS readers demand.
	Ext []byte

	// KeepMapped takes Device.Mapped as given. Otherwise the first device is
	// mapped where the metadata ends, or further behind with Flat, rounded up to
	// FlatAlign blocks, and each next one where the last ended, rounded up alike.
	// FlatAlign 0 is 1.
	KeepMapped bool
	FlatAlign  uint32

	// Flat has chunk indexes tell places in the flat address space. The kernel
	// reads what lies side by side there at once; if they tell device and place
	// in it, and the devices are mapped in one file, it reads page by page
	// (Linux 6.12 to 6.18 at least). RAFS has Location.Index there instead.
	//
	// If each device is a file, the kernel compares where an extent ends in its
	// device with the flat address of the next extent, and where they are equal it
	// reads on in the device (fs/erofs/fileio.c, seen on Linux 6.18): wrong
	// bytes. So with Flat and without KeepMapped no device is mapped at an address
	// that is within the largest one.
	Flat bool
}

// Super is the super block of an image.
type Super struct {
	BlockBits       uint8
	RootNID         uint64
	Inodes          uint64
	Blocks          uint32 // of the metadata, as claimed; some writers claim something else
	MetaBlkaddr     uint32
	XattrBlkaddr    uint32
	FeatureCompat   uint32
	FeatureIncompat uint32
	UUID            [16]byte
	BuildTime       index.Time
	ExtraDevices    uint16
	DevtSlotOff     uint16 // of the device table, in units of 128 bytes
	Checksum        uint32
}

// Run is one entry of a file's chunk index: a piece of the file and where its
// bytes are. Holes have no Run.
type Run struct {
	Off    int64  // in the file, bytes
	Length int64  // bytes; ends where the file ends at the latest
	Device uint16 // slot, counted from 1
	Block  uint32 // first 4 KiB block in that device
	Index  uint32 // RAFS: the chunk's index in its blob; 0 in our own images
}

// Limits bounds what Image.Tree takes from an image. A field that is 0 has
// the default. Passing a limit is an error that wraps index.ErrLimit and names
// the field.
type Limits struct {
	Entries       int   // names in all directories; 10,000,000
	MetadataBytes int64 // of these names, of symbolic links' targets, and of all attributes; 1 GiB
	PathBytes     int   // length of a path; 16 KiB; this bounds the depth, too
	Runs          int64 // chunk index entries of all files, holes included; 64 Mi
}

func (l Limits) withDefaults() Limits {
	if l.Entries == 0 {
		l.Entries = 10_000_000
	}
	if l.MetadataBytes == 0 {
		l.MetadataBytes = 1 << 30
	}
	if l.PathBytes == 0 {
		l.PathBytes = 16 << 10
	}
	if l.Runs == 0 {
		l.Runs = 64 << 20
	}
	return l
}
