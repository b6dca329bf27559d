package layer

import "io"

// Piece is a chunk of a file that is being cut.
type Piece struct {
	Off  int64 // in the file
	Size int
	At   int64 // in the archive, if all of it lies there in one piece; else -1
}

// Cut reads the data of a regular file and cuts it at multiples of step. For
// each chunk that some fragment of the file touches it calls begin, which
// returns room for the content and a function that is called when the content
// is there; the rest of the file are holes, and Cut tells whether there are any.
func Cut(r io.Reader, e *Entry, step int64, begin func(Piece) (p []byte, done func(), err error)) (holes bool, err error) {
	var (
		size      = e.Inode.Size
		fragments = e.Fragments
		next      int64 // behind the last chunk
		at        = e.DataOffset
	)
	for len(fragments) > 0 {
		off := fragments[0].Off / step * step
		end := min(off+step, size)
		holes = holes || off > next
		next = end
		piece := Piece{Off: off, Size: int(end - off), At: -1}
		if f := &fragments[0]; f.Off <= off && f.Off+f.Length >= end {
			piece.At = at
		}
		raw, done, err := begin(piece)
		if err != nil {
			return holes, err
		}
		pos := off // raw is filled up to here
		for len(fragments) > 0 && fragments[0].Off < end {
			f := &fragments[0]
			clear(raw[pos-off : f.Off-off])
			n := min(f.Length, end-f.Off)
			if _, err := io.ReadFull(r, raw[f.Off-off:f.Off-off+n]); err != nil {
				return holes, err
			}
			pos = f.Off + n
			at += n
			if f.Length == n {
				fragments = fragments[1:]
			} else {
				f.Off, f.Length = f.Off+n, f.Length-n
			}
		}
		clear(raw[pos-off:])
		done()
	}
	return holes || next < size, nil
}
