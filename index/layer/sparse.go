package layer

import (
	"bytes"
	"strings"

	"github.com/shale-image/shale/index"
)

// isSparse tells whether pax records make the entry a GNU sparse file.
func (x *extension) isSparse() bool {
	if len(x.pairs) > 0 {
		return true
	}
	for key := range x.pax {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// sparse returns the map and size of a sparse file, of whose data r.data bytes
// are stored. There are four ways to write the map:
//
//	old GNU   type 'S': 4 pairs in the header, then blocks of 21
//	pax 0.0   records GNU.sparse.offset, GNU.sparse.numbytes repeated
//	pax 0.1   record GNU.sparse.map "offset,length,..."
//	pax 1.0   decimal lines before the data: number of pairs, then the pairs
func (r *Reader) sparse(h *header, x *extension) ([]Fragment, int64, error) {
	corrupt := func(format string, args ...any) error {
		return r.errorf(index.ErrCorrupt, h.at, "sparse map: "+format, args...)
	}
	var pairs []int64
	var size int64
	var err error
	version := x.pax["GNU.sparse.major"] + "." + x.pax["GNU.sparse.minor"]
	switch {
	case h.typeflag == 'S':
		if h.format != gnu || x.isSparse() {
			return nil, 0, r.errorf(index.ErrUnsupported, h.at, "a sparse file ('S') in an archive that is not GNU tar's")
		}
		var ok bool
		if size, ok = number(h.block[483:495]); !ok || size < 0 {
			return nil, 0, corrupt("the file's size is no number")
		}
		pairs, err = r.oldPairs(h, x)
	case version == "1.0":
		pairs, err = r.linePairs(h, x)
	case version != "." && version != "0.0" && version != "0.1":
		return nil, 0, r.errorf(index.ErrUnsupported, h.at, "sparse format %s", version)
	case x.pax["GNU.sparse.map"] != "":
		for s := range strings.SplitSeq(x.pax["GNU.sparse.map"], ",") {
			n, ok := decimal(s)
			if !ok {
				return nil, 0, corrupt("%q is no number", cut([]byte(s)))
			}
			pairs = append(pairs, n)
		}
	default:
		pairs = x.pairs
	}
	if err != nil {
		return nil, 0, err
	}
	if len(pairs)%2 != 0 {
		return nil, 0, corrupt("an offset without a length")
	}
	if n := x.pax["GNU.sparse.numblocks"]; n != "" {
		if n, ok := decimal(n); !ok || n != int64(len(pairs)/2) {
			return nil, 0, corrupt("%d fragments, want %q", len(pairs)/2, cut([]byte(x.pax["GNU.sparse.numblocks"])))
		}
	}
	if h.typeflag != 'S' {
		s := x.pax["GNU.sparse.realsize"]
		if s == "" {
			s = x.pax["GNU.sparse.size"]
		}
		var ok bool
		if size, ok = decimal(s); !ok {
			return nil, 0, corrupt("the file's size is %q", cut([]byte(s)))
		}
	}
	fragments := make([]Fragment, 0, len(pairs)/2)
	var end, stored int64
	for i := 0; i < len(pairs); i += 2 {
		off, n := pairs[i], pairs[i+1]
		if off < end || n < 0 || off > size || n > size-off {
			return nil, 0, corrupt("%d bytes at %d after %d in a file of %d", n, off, end, size)
		}
		end = off + n
		if stored += n; n > 0 {
			fragments = append(fragments, Fragment{off, n})
		}
	}
	if stored != r.data {
		return nil, 0, corrupt("has %d bytes of data, the archive %d", stored, r.data)
	}
	return fragments, size, nil
}

// oldPairs reads the map of an old GNU sparse file: pairs of 12-byte numbers.
func (r *Reader) oldPairs(h *header, x *extension) ([]int64, error) {
	var pairs []int64
	add := func(p []byte) error {
		for ; len(p) >= 24 && p[12] != 0; p = p[24:] { // an empty length ends the list
			off, ok1 := number(p[:12])
			n, ok2 := number(p[12:24])
			if !ok1 || !ok2 {
				return r.errorf(index.ErrCorrupt, h.at, "sparse map: an offset or length is no number")
			}
			pairs = append(pairs, off, n)
		}
		return nil
	}
	if err := add(h.block[386:482]); err != nil {
		return nil, err
	}
	for more := h.block[482] != 0; more; more = r.block[504] != 0 {
		if x.bytes += blockSize; x.bytes > r.lim.HeaderBytes {
			return nil, r.errorf(index.ErrLimit, h.at, "extended headers of more than %d bytes (HeaderBytes)", r.lim.HeaderBytes)
		}
		if err := r.full(r.block[:]); err != nil {
			return nil, err
		}
		if err := add(r.block[:504]); err != nil {
			return nil, err
		}
	}
	return pairs, nil
}

// linePairs reads the map that stands before the data in pax sparse format
// 1.0, whole blocks of lines padded with NULs.
func (r *Reader) linePairs(h *header, x *extension) ([]int64, error) {
	var pairs []int64
	count := int64(-1)
	var line []byte // its start may be in the block before
	for count < 0 || int64(len(pairs)) < 2*count {
		if x.bytes += blockSize; x.bytes > r.lim.HeaderBytes {
			return nil, r.errorf(index.ErrLimit, h.at, "extended headers of more than %d bytes (HeaderBytes)", r.lim.HeaderBytes)
		}
		if r.data < blockSize {
			return nil, r.errorf(index.ErrCorrupt, h.at, "sparse map: longer than the data it is in")
		}
		if err := r.full(r.block[:]); err != nil {
			return nil, err
		}
		r.data -= blockSize
		rest := r.block[:]
		for count < 0 || int64(len(pairs)) < 2*count {
			i := bytes.IndexByte(rest, '\n')
			if i < 0 {
				line = append(line, rest...)
				break
			}
			line = append(line, rest[:i]...)
			rest = rest[i+1:]
			n, ok := decimal(string(line))
			if !ok {
				return nil, r.errorf(index.ErrCorrupt, h.at, "sparse map: %q is no number", cut(line))
			}
			line = line[:0]
			if count < 0 {
				if count = n; n > r.lim.HeaderBytes {
					return nil, r.errorf(index.ErrLimit, h.at, "a sparse map of %d fragments (HeaderBytes)", n)
				}
				continue
			}
			pairs = append(pairs, n)
		}
		if len(line) > 20 {
			return nil, r.errorf(index.ErrCorrupt, h.at, "sparse map: %q is no number", cut(line))
		}
	}
	return pairs, nil
}
