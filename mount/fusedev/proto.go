package fusedev

import "encoding/binary"

// The part of the FUSE protocol (7.12 and later) that one read-only file
// needs. All numbers are in the machine's byte order.
//
//	fuse_in_header (40)   len u32, opcode u32, unique u64, nodeid u64,
//	                      uid u32, gid u32, pid u32, extlen u16, pad u16
//	fuse_out_header (16)  len u32, error s32 (0 or -errno), unique u64
var ne = binary.NativeEndian

const (
	inHeaderSize  = 40
	outHeaderSize = 16

	entryOutSize  = 40 + attrSize
	attrOutSize   = 16 + attrSize
	attrSize      = 88
	openOutSize   = 16
	initInMinSize = 16
	initOutSize   = 64
	statfsOutSize = 80
	readInMinSize = 24 // fh u64, offset u64, size u32, read_flags u32; 40 bytes since 7.9
)

const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReleasedir  = 29
	opAccess      = 34
	opInterrupt   = 36
	opDestroy     = 38
	opNotifyReply = 41
	opBatchForget = 42
)

// Bits of INIT's flags; those above 31 travel in flags2.
const (
	flagAsyncRead      = 1 << 0  // several READs of one readahead at a time
	flagAsyncDIO       = 1 << 15 // direct reads do not wait for one another
	flagParallelDirops = 1 << 18
	flagMaxPages       = 1 << 22 // READs larger than 128 KiB
	flagInitExt        = 1 << 30 // flags2 is valid
	flagHasResend      = 1 << 39 // the kernel knows notifyResend

	wantedFlags = flagAsyncRead | flagAsyncDIO | flagParallelDirops | flagMaxPages | flagInitExt | flagHasResend
)

const (
	openDirectIO  = 1 << 0
	openKeepCache = 1 << 1
	openNoFlush   = 1 << 5

	notifyInvalInode = 2
	notifyStore      = 4
	notifyResend     = 7
)

const (
	rootNode = 1
	fileNode = 2

	forever = 1 << 32 // seconds that attributes and names stay valid: they never change
)

// putNotification writes the header of the notification p.
func putNotification(p []byte, code uint32) {
	ne.PutUint32(p[0:], uint32(len(p)))
	ne.PutUint32(p[4:], code) // in place of the error
	ne.PutUint64(p[8:], 0)
}

// request is a view of one request as read from /dev/fuse.
type request struct {
	op     uint32
	unique uint64 // echoed as it is: a resent request has bit 63 set, an INTERRUPT bit 0
	node   uint64
	arg    []byte
}

// parse splits a request. ok is false if p is not one whole request.
func parse(p []byte) (r request, ok bool) {
	if len(p) < inHeaderSize || uint64(ne.Uint32(p)) != uint64(len(p)) {
		return request{}, false
	}
	return request{
		op:     ne.Uint32(p[4:]),
		unique: ne.Uint64(p[8:]),
		node:   ne.Uint64(p[16:]),
		arg:    p[inHeaderSize:],
	}, true
}
