package zran

import (
	"encoding/binary"
	"unsafe"
)

// Memory without bounds checks, for fast, which sees to it that its positions
// are within the buffers: with checks, inflating takes a quarter more CPU time.

func at8(b unsafe.Pointer, i int) *[8]byte { return (*[8]byte)(unsafe.Add(b, i)) }

func load64(b unsafe.Pointer, i int) uint64 { return binary.LittleEndian.Uint64(at8(b, i)[:]) }

func store64(b unsafe.Pointer, i int, v uint64) { binary.LittleEndian.PutUint64(at8(b, i)[:], v) }

func store8(b unsafe.Pointer, i int, v uint8) { *(*uint8)(unsafe.Add(b, i)) = v }

// copy16 copies 16 bytes; those at to and from must not overlap.
func copy16(b unsafe.Pointer, to, from int) {
	*(*[16]byte)(unsafe.Add(b, to)) = *(*[16]byte)(unsafe.Add(b, from))
}
