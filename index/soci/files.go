package soci

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"time"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/layer"
)

// The fields of a file.
const (
	fileName = iota
	fileType
	fileOffset // of its data in the archive
	fileSize
	fileLink
	fileMode
	fileUID
	fileGID
	_ // names of its owner
	_
	fileTime
	fileMajor
	fileMinor
	fileRecords // of its pax header
)

// types are the types of files, and how archives call them.
var types = map[string]byte{"reg": '0', "hardlink": '1', "symlink": '2', "char": '3', "block": '4', "dir": '5', "fifo": '6'}

const tarBlock = 512

// files makes changes and chunks of the list of files.
func (r *reader) files(toc int) error {
	at, n := r.vector(toc, 0, 4)
	list := layer.NewLister(r.name, r.lim)
	left := r.lim.WithDefaults().MetadataBytes // tables may be there once, and be named often
	var end int64                              // of the data before
	for i := range n {
		f := r.indirect(at + 4*i)
		name, kind := r.bytes(f, fileName), r.bytes(f, fileType)
		h := layer.Header{
			Type: types[string(cut(kind))], Mode: r.i64(f, fileMode), UID: int64(r.u32(f, fileUID)), GID: int64(r.u32(f, fileGID)),
			DataOffset: r.i64(f, fileOffset), Size: r.i64(f, fileSize), Major: r.i64(f, fileMajor), Minor: r.i64(f, fileMinor),
		}
		link, when := r.bytes(f, fileLink), r.bytes(f, fileTime)
		left -= int64(len(name) + len(kind) + len(link) + len(when))
		h.Records = r.records(f, &left)
		switch {
		case r.err != nil:
			return r.errorf(index.ErrCorrupt, "file %d: %v", i, r.err)
		case left < 0:
			return r.errorf(index.ErrLimit, "names and attributes take too much (MetadataBytes)")
		case h.Type == 0:
			return r.errorf(index.ErrUnsupported, "%q is of type %q, which is unknown", cut(name), cut(kind))
		case h.DataOffset < end+tarBlock || h.DataOffset%tarBlock != 0 || h.DataOffset > r.stream:
			return r.errorf(index.ErrCorrupt, "%q lies at offset %d of the archive of %d bytes, want it behind %d", cut(name), h.DataOffset, r.stream, end)
		}
		end = h.DataOffset
		if h.Type == '0' {
			if h.Size < 0 || h.Size > r.stream-h.DataOffset {
				return r.errorf(index.ErrCorrupt, "%q has %d bytes at offset %d of the archive of %d", cut(name), h.Size, h.DataOffset, r.stream)
			}
			end += (h.Size + tarBlock - 1) &^ (tarBlock - 1)
		}
		t, err := time.Parse(time.RFC3339Nano, cut(when))
		if err != nil {
			return r.errorf(index.ErrUnsupported, "%q was modified at %q, want a time like 2006-01-02T15:04:05Z", cut(name), cut(when))
		}
		h.Mtime = index.Time{Sec: t.Unix(), Nsec: uint32(t.Nanosecond())}
		h.Name, h.Linkname = string(name), string(link)
		e, err := list.Entry(&h)
		if err != nil {
			return err
		}
		if e == nil {
			continue
		}
		if e.Inode != nil && e.Inode.IsRegular() {
			r.cut(e.Inode, h.DataOffset)
		}
		r.out.Changes = append(r.out.Changes, e.Change)
	}
	if r.err != nil {
		return r.errorf(index.ErrCorrupt, "%v", r.err)
	}
	return nil
}

// records returns the pax records of a file. What they take is taken from left,
// which is negative where they are not read.
func (r *reader) records(f int, left *int64) map[string]string {
	at, n := r.vector(f, fileRecords, 4)
	if n == 0 {
		return nil
	}
	records := map[string]string{}
	for i := 0; i < n && *left >= 0; i++ {
		x := r.indirect(at + 4*i)
		key, value := r.bytes(x, 0), r.bytes(x, 1)
		if *left -= int64(len(key) + len(value) + 1); *left >= 0 {
			records[string(key)] = string(value)
		}
	}
	return records
}

// cut gives a file its content, which lies in the archive in one piece.
func (r *reader) cut(ino *index.Inode, at int64) {
	cut := int64(cmp.Or(r.of.Cut, chunk.Size))
	for off := int64(0); off < ino.Size; off += cut {
		n := uint32(min(cut, ino.Size-off))
		ino.Extents = append(ino.Extents, index.Extent{Off: off, Chunk: uint32(len(r.out.Chunks))})
		r.out.Chunks = append(r.out.Chunks, index.Chunk{Digest: r.of.origin(at+off, n), Size: n, Offset: at + off})
	}
}

// origin names a piece of a layer's archive as a ztoc has it. All that decides
// what the bytes are is in it: the ztoc says which stored bytes decode to them, what
// the digests of these are, and by which windows. So whoever shares an origin
// shares that, whoever has made the ztoc, and no other ztoc has the same.
func (of *Subject) origin(at int64, size uint32) chunk.Digest {
	h := sha256.New()
	io.WriteString(h, "soci\x00"+of.Layer+"\x00"+of.Ztoc+"\x00")
	h.Write(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(nil, uint64(at)), size))
	return chunk.Digest{Algorithm: chunk.Origin, Sum: [32]byte(h.Sum(nil))}
}
