package zran

// block reads the header of a block (RFC 1951, section 3.2.3).
func (z *Reader) block() error {
	s := &z.src
	if s.skip != 0 { // a checkpoint is in the middle of a byte
		if _, err := s.take(uint(s.skip)); err != nil {
			return err
		}
		s.skip = 0
	}
	if err := z.checkpoint(Checkpoint{In: s.offset(), Bits: s.bitsUsed()}); err != nil {
		return err
	}
	head, err := s.take(3)
	if err != nil {
		return err
	}
	z.final = head&1 != 0
	switch head >> 1 {
	case 0:
		return z.storedBlock()
	case 1:
		z.code = fixed()
	case 2:
		if err := z.dynamicBlock(); err != nil {
			return err
		}
		z.code = &z.own
	default:
		return s.bad("block type 3 is not defined")
	}
	z.state = inCodes
	return nil
}

// endBlock is what follows a block.
func (z *Reader) endBlock() {
	z.state = atBlock
	if z.final {
		z.state = atTrailer
	}
}

// storedBlock reads the lengths of a block without compression (section 3.2.4).
func (z *Reader) storedBlock() error {
	s := &z.src
	s.align()
	n, err := s.take(32)
	if err != nil {
		return err
	}
	if uint16(n) != ^uint16(n>>16) {
		return s.bad("the length of a stored block and its complement differ: %#04x, %#04x", uint16(n), uint16(n>>16))
	}
	s.align()
	z.stored = int(uint16(n))
	z.state = inStored
	return nil
}

// copyStored copies a stored block's bytes up to limit.
func (z *Reader) copyStored(limit int) error {
	for s, o := &z.src, &z.out; z.stored > 0 && o.n < limit; {
		if _, err := s.peek(1); err != nil {
			return err
		}
		n := copy(o.buf[o.n:limit], s.buf[s.pos:min(s.end, s.pos+z.stored)])
		s.pos += n
		o.n += n
		z.stored -= n
	}
	if z.stored == 0 {
		z.endBlock()
	}
	return nil
}

// The order of the code lengths of the code that the code lengths are in.
var preOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamicBlock reads the codes of a block (section 3.2.7) to z.own.
func (z *Reader) dynamicBlock() error {
	s := &z.src
	head, err := s.take(14)
	if err != nil {
		return err
	}
	lits, dists, pres := int(head&31)+257, int(head>>5&31)+1, int(head>>10)+4
	if lits > maxDynLit || dists > maxDynDist {
		return s.bad("codes for %d literals and lengths and %d distances, want at most %d and %d", lits, dists, maxDynLit, maxDynDist)
	}
	var preLens [19]uint8
	for _, sym := range preOrder[:pres] {
		n, err := s.take(3)
		if err != nil {
			return err
		}
		preLens[sym] = uint8(n)
	}
	if !z.tmp.set(preLens[:], false) {
		return s.bad("the code of code lengths is not a complete Huffman code")
	}
	var pre [preSize]entry
	z.tmp.fill(pre[:], preBits, preSyms[:])

	var lens [maxDynLit + maxDynDist]uint8
	for i := 0; i < lits+dists; {
		s.want(preBits + 7)
		e := pre[s.bits&(preSize-1)]
		used, sym := e.used(), uint8(e>>16)
		extra := uint(0)
		switch sym {
		case 16:
			extra = 2
		case 17:
			extra = 3
		case 18:
			extra = 7
		}
		if s.nbits < used+extra {
			return s.cut()
		}
		if e&flagSlow != 0 {
			return s.bad("a code length has no valid code")
		}
		s.drop(used)
		repeat, value := 1, sym
		if sym >= 16 {
			repeat, value = 3+int(s.bits&(1<<extra-1)), 0
			s.drop(extra)
			if sym == 18 {
				repeat += 8
			}
			if sym == 16 {
				if i == 0 {
					return s.bad("the first code length repeats one before it")
				}
				value = lens[i-1]
			}
			if repeat > lits+dists-i {
				return s.bad("%d more code lengths than there are symbols", repeat-(lits+dists-i))
			}
		}
		for range repeat {
			lens[i] = value
			i++
		}
	}
	if lens[endOfBlock] == 0 {
		return s.bad("no code for the end of the block")
	}
	t := &z.own
	if !z.tmp.set(lens[:lits], false) {
		return s.bad("the literals and lengths have no complete Huffman code")
	}
	z.tmp.fill(t.lit[:], litBits, litSyms[:])
	if !z.tmp.set(lens[lits:lits+dists], true) {
		return s.bad("the distances have no complete Huffman code")
	}
	z.tmp.fill(t.dist[:], distBits, distSyms[:])
	return nil
}
