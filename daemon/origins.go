package daemon

import (
	"bytes"
	"io"
	"os"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/replace"
)

// An index that has told the origins of chunks only, and is wrong about how to get
// at them, is mended by one that this node makes: what lies where in the layers is
// known then. The file has 64 bytes a chunk, in order: the origin's sum, and the
// BLAKE3 of the content.
const (
	originsFile = "origins"
	originSize  = 64
)

// identify gives the chunks of an index from elsewhere that have an origin the
// digest of their content, which the layers have been seen to have at their places,
// and writes the file.
func identify(t *index.Tree, made *reader.Made, path string) error {
	var all [][originSize]byte
	for i := range t.Chunks {
		c := &t.Chunks[i]
		if c.Digest.Algorithm != chunk.Origin {
			continue
		}
		d, ok := made.Identify(c)
		if !ok {
			continue // Equal tells
		}
		all = append(all, [originSize]byte(append(c.Digest.Sum[:], d.Sum[:]...)))
		c.Digest = d
	}
	if len(all) == 0 {
		return nil
	}
	slices.SortFunc(all, func(a, b [originSize]byte) int { return bytes.Compare(a[:], b[:]) })
	var b bytes.Buffer
	for i := range all {
		b.Write(all[i][:])
	}
	return replace.File(path, b.Bytes(), 0o600)
}

// origins looks up in the file.
func origins(path string) func(chunk.Digest) (chunk.Digest, bool) {
	return func(d chunk.Digest) (chunk.Digest, bool) {
		f, err := os.Open(path)
		if err != nil {
			return d, false
		}
		defer f.Close()
		end, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return d, false
		}
		for lo, hi := int64(0), end/originSize; lo < hi; {
			var r [originSize]byte
			mid := (lo + hi) / 2
			if _, err := f.ReadAt(r[:], mid*originSize); err != nil {
				return d, false
			}
			switch bytes.Compare(r[:32], d.Sum[:]) {
			case 0:
				return chunk.Digest{Algorithm: chunk.BLAKE3, Sum: [32]byte(r[32:])}, true
			case -1:
				lo = mid + 1
			default:
				hi = mid
			}
		}
		return d, false
	}
}
