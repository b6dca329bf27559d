package erofs

import (
	"encoding/binary"

	"github.com/shale-image/shale/index"
)

// indexRead is how many bytes of a chunk index are read at a time.
const indexRead = 32 << 10

// content returns the extents of a regular file.
func (rd *reader) content(path []byte, in *rawInode) ([]index.Extent, error) {
	v := rd.v
	switch {
	case in.size == 0:
		return nil, nil
	case in.layout == layoutPlain && in.union == nullBlock: // one hole
		rd.runs = rd.runs[:0]
	case in.layout != layoutChunked:
		return nil, v.errorf(index.ErrUnsupported, in.pos, "%s: file with data layout %d, want %d (chunk index)", path, in.layout, layoutChunked)
	default:
		if err := rd.readIndex(path, in); err != nil {
			return nil, err
		}
	}
	if rd.extents == nil {
		return nil, nil
	}
	return rd.extents(string(path), in.size, rd.runs)
}

// readIndex fills runs from the chunk index of a file that is not empty.
func (rd *reader) readIndex(path []byte, in *rawInode) error {
	v, le := rd.v, binary.LittleEndian
	format := in.union & 0xffff
	if format&^chunkFormatMask != 0 {
		return v.errorf(index.ErrUnsupported, in.pos+16, "%s: chunk format %#x", path, format)
	}
	bits, unit := BlockBits+format&chunkBitsMask, int64(xattrUnit)
	if format&chunkIndexes != 0 {
		unit = chunkEntry
	}
	count := (in.size-1)>>bits + 1
	pos := roundUp(in.xattrEnd, unit)
	if pos > v.size || count > (v.size-pos)/unit {
		return v.errorf(index.ErrCorrupt, in.pos+8, "%s: %d chunk index entries for %d bytes do not fit the image", path, count, in.size)
	}
	if rd.limits.Runs -= count; rd.limits.Runs < 0 {
		return v.errorf(index.ErrLimit, in.pos, "%s: chunk indexes exceed the limit Runs", path)
	}
	rd.runs = rd.runs[:0]
	mask := deviceMask(len(rd.im.devices))
	for i := int64(0); i < count; {
		n := min(count-i, indexRead/unit)
		at := pos + i*unit
		b, err := v.read(at, int(n*unit))
		if err != nil {
			return err
		}
		for ; len(b) > 0; b, i, at = b[unit:], i+1, at+unit {
			r := Run{Off: i << bits, Length: min(1<<bits, in.size-i<<bits)}
			if r.Block = le.Uint32(b[unit-4:]); r.Block == nullBlock {
				continue
			}
			if unit == chunkEntry {
				raw := le.Uint16(b[2:])
				r.Index, r.Device = uint32(le.Uint16(b)), raw&mask
				if mask <= 0xff {
					r.Index |= uint32(raw>>8) << 16
				}
			}
			r.Device, r.Block = rd.im.locate(r.Device, r.Block)
			switch {
			case r.Device == 0:
				return v.errorf(index.ErrUnsupported, at, "%s: data at file offset %d lies in no device", path, r.Off)
			case int(r.Device) > len(rd.im.devices):
				return v.errorf(index.ErrCorrupt, at, "%s: data at file offset %d lies in device %d of %d", path, r.Off, r.Device, len(rd.im.devices))
			}
			rd.runs = append(rd.runs, r)
		}
	}
	return nil
}
