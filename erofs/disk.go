package erofs

import (
	"hash/crc32"
	"math/bits"
)

// The format, little-endian. An image as we write it:
//
//	   0  zeros
//	1024  super block, 128 bytes
//	1152  extension, 256 bytes (RAFS; zeros in our own images)
//	1408  device table, 128 bytes a slot: tag[64], blocks u32, mapped u32
//	      inodes, each at a multiple of 32, the root first:
//	          inode, 64 bytes
//	          attributes, if any
//	          and one of: the last part of a directory | the target of a
//	          symbolic link | the chunk index, 8 bytes an entry
//	      from the next block on: what directories have in whole blocks
//
// An inode is named by its nid: the number of 32-byte slots between the block
// meta_blkaddr and the inode. Example: with one device the root lies at
// 1408+128 = 1536 in block 0, so meta_blkaddr is 0 and the root's nid 48.
const (
	superOff   = 1024
	superSize  = 128
	superMagic = 0xE0F5E1E2
	extOff     = superOff + superSize
	slotSize   = 128                          // a device slot, and the unit of devt_slotoff
	devtSlot   = (extOff + MaxExt) / slotSize // 11
	maxTag     = 64
	maxDevices = 1<<16 - 1
)

// Super block fields by offset.
const (
	sbMagic        = 0
	sbChecksum     = 4
	sbCompat       = 8
	sbBlockBits    = 12
	sbExtSlots     = 13
	sbRootNID      = 14
	sbInodes       = 16
	sbEpoch        = 24
	sbNsec         = 32
	sbBlocks       = 36
	sbMetaBlkaddr  = 40
	sbXattrBlkaddr = 44
	sbUUID         = 48
	sbIncompat     = 80
	sbExtraDevices = 86
	sbDevtSlotOff  = 88
	sbDirBlockBits = 90
)

// Features a reader must know.
const (
	incompatChunkedFile = 0x4
	incompatDeviceTable = 0x8
)

// incompatNames has the names of all feature_incompat bits known to the kernel
// (Linux 6.18), for refusing them by name.
var incompatNames = [...]string{
	"LZ4_0PADDING", "COMPR_CFGS or BIG_PCLUSTER", "CHUNKED_FILE", "DEVICE_TABLE or COMPR_HEAD2",
	"ZTAILPACKING", "FRAGMENTS or DEDUPE", "XATTR_PREFIXES", "48BIT", "METABOX",
}

// Inodes. i_format is version | layout<<1.
const (
	slotBits     = 5
	inodeSlot    = 1 << slotBits // the unit of nids
	compactSize  = 32
	extendedSize = 64

	formatExtended  = 1
	formatMask      = 0x1f
	formatBit4      = 0x10 // directories: "." is left out; else, compact: nlink is 1
	layoutPlain     = 0    // data in whole blocks at i_u
	layoutInline    = 2    // the same, but what is left over follows the inode
	layoutChunked   = 4    // a chunk index follows the inode
	layoutMax       = 4
	chunkBitsMask   = 0x1f // of i_u of a chunked file: log2 of blocks a chunk
	chunkIndexes    = 0x20 // of i_u: 8-byte entries instead of 4-byte ones
	chunkFormatMask = chunkBitsMask | chunkIndexes
	maxChunkBits    = BlockBits + chunkBitsMask

	// A chunk index entry is {u16, u16 device, u32 block}. RAFS keeps the chunk's
	// index in its blob in the bits that the kernel ignores: 0-15 in the first
	// field and 16-23 in the upper byte of the device. The kernel masks the
	// device with the smallest 2^n-1 that covers all devices.
	chunkEntry = 8

	nullBlock = 0xffffffff // a hole
)

// Extended attributes: a 12-byte header {name filter u32, shared count u8}, the
// ids of shared ones (u32), then entries {name length u8, prefix u8, value
// length u16, name, value}, each padded to 4 bytes. i_xattr_icount counts the
// 4-byte units after the header, plus one.
const (
	xattrHeader   = 12
	xattrEntry    = 4
	xattrUnit     = 4
	maxXattrName  = 255
	maxXattrValue = 1<<16 - 1
	maxXattrBody  = xattrHeader + (1<<16-2)*xattrUnit
)

// Directory entries: {nid u64, name offset u16, file type u8, reserved u8}; in
// each block first all entries, then all names.
const (
	direntSize = 12
	maxName    = 255
	maxTarget  = BlockSize - 1 // of a symbolic link, as everywhere in Linux
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum is the super block's: the CRC32C, without the final inversion, of
// block 0 from the super block on, with the field itself taken as zero.
func checksum(block0 []byte) uint32 {
	var zero [4]byte
	at := superOff + sbChecksum
	sum := crc32.Update(0, castagnoli, block0[superOff:at])
	sum = crc32.Update(sum, castagnoli, zero[:])
	sum = crc32.Update(sum, castagnoli, block0[at+4:BlockSize])
	return ^sum
}

// deviceMask is what the kernel masks device numbers in chunk indexes with:
// the smallest 2^n-1 that covers all of up to maxDevices devices.
func deviceMask(devices int) uint16 { return uint16(1)<<bits.Len(uint(devices)) - 1 }

// fileType returns the d_type of a mode: 1 regular, 2 directory, 3 character
// device, 4 block device, 5 fifo, 6 socket, 7 symbolic link; 0 if it is none.
func fileType(mode uint32) uint8 {
	return [16]uint8{0o10: 1, 0o04: 2, 0o02: 3, 0o06: 4, 0o01: 5, 0o14: 6, 0o12: 7}[mode>>12&0xf]
}

func roundUp[T int | int64 | uint64](n, unit T) T { return (n + unit - 1) / unit * unit }
