package zran

// Checkpoint is a place in a gzip stream where inflating can start.
type Checkpoint struct {
	In     int64 // offset in the compressed stream of the byte with the first bit to read
	Out    int64 // offset in the decompressed stream of the first byte that comes out
	Bits   uint8 // bits of the byte at In that are before the checkpoint, 0 to 7
	Member bool  // the header of a gzip member starts here: no window is needed
}

// mark is the last checkpoint of a Reader, which is told of when it is known
// what is copied from its window.
type mark struct {
	Checkpoint
	noted  bool   // there is one
	told   bool   // it was told of
	window []byte // what was copied so far; all else is 0
	fence  int64  // what is copied from before this offset belongs into the window
}

func (m *mark) reset() { *m = mark{window: m.window[:0]} }

// checkpoint notes a checkpoint here if it is time for one.
func (z *Reader) checkpoint(cp Checkpoint) error {
	m := &z.mark
	cp.Out = z.out.offset()
	if z.opts.Span <= 0 || z.opts.Checkpoint == nil || m.noted && cp.Out-m.Out < z.opts.Span {
		return nil
	}
	if err := z.tell(); err != nil {
		return err
	}
	*m = mark{Checkpoint: cp, noted: true, window: append(m.window[:0], z.out.window()...)}
	if z.opts.Span >= WindowSize {
		clear(m.window)
		m.fence = cp.Out
	}
	return nil
}

// tell tells of the last checkpoint: nothing that follows is copied from its
// window any more.
func (z *Reader) tell() error {
	m := &z.mark
	if !m.noted || m.told {
		return nil
	}
	m.told = true
	return z.opts.Checkpoint(m.Checkpoint, m.window)
}

// needed keeps for the window what a match of length bytes at from has of it.
func (z *Reader) needed(from, length int) {
	m, o := &z.mark, &z.out
	if fence := int(m.fence - o.base); from < fence {
		copy(m.window[len(m.window)-(fence-from):], o.buf[from:min(from+length, fence)])
	}
}
