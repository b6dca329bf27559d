package zran

import "unsafe"

// fast decodes symbols until o.n is limit or more, the source has less than
// inSlack bytes in its buffer, or something comes that symbol has to look at.
//
// nbits counts in its low 6 bits only; what is above them is noise.
func (z *Reader) fast(limit int) {
	s, o := &z.src, &z.out
	var (
		in      = unsafe.Pointer(&s.buf)
		out     = unsafe.Pointer(&o.buf)
		lit     = &z.code.lit
		distTab = &z.code.dist
		pos     = s.pos
		last    = s.end - inSlack
		n       = o.n
		bits    = s.bits
		nbits   = s.nbits
		oldest  = max(o.oldest, int(z.fence-o.base)) // symbol looks at what is before the fence
	)
	bits |= load64(in, pos) << (nbits & 63)
	pos += int(7 - nbits>>3&7)
	nbits |= 56
	e := lit[bits&(1<<litBits-1)]
	for pos <= last && n < limit {
		bits |= load64(in, pos) << (nbits & 63)
		pos += int(7 - nbits>>3&7)
		nbits |= 56

		if e&flagLiteral != 0 {
			bits >>= e & 63
			nbits -= uint(e)
			store8(out, n, e.literal())
			n++
			e = lit[bits&(1<<litBits-1)]
			if e&flagLiteral != 0 {
				bits >>= e & 63
				nbits -= uint(e)
				store8(out, n, e.literal())
				n++
				e = lit[bits&(1<<litBits-1)]
				if e&flagLiteral != 0 {
					bits >>= e & 63
					nbits -= uint(e)
					store8(out, n, e.literal())
					n++
					e = lit[bits&(1<<litBits-1)]
					continue
				}
			}
		}
		if e&flagSlow != 0 {
			if e&flagLink != 0 {
				e = lit[e.second(bits>>litBits)&(litSize-1)]
				if e&flagLiteral != 0 {
					store8(out, n, e.literal())
					n++
					bits >>= e & 63
					nbits -= uint(e)
					e = lit[bits&(1<<litBits-1)]
					continue
				}
			}
			if e&flagSlow != 0 {
				break
			}
		}
		// Until the distance is known to be good, this match may have to be
		// left to symbol: keep the state before it.
		bits0, nbits0, pos0 := bits, nbits, pos
		length := e.value(bits)
		bits >>= e & 63
		nbits -= uint(e)
		bits |= load64(in, pos) << (nbits & 63)
		pos += int(7 - nbits>>3&7)
		nbits |= 56

		d := distTab[bits&(1<<distBits-1)]
		if d&flagLink != 0 {
			d = distTab[d.second(bits>>distBits)&(distSize-1)]
		}
		from := n - d.value(bits)
		if d&flagSlow != 0 || from < oldest {
			bits, nbits, pos = bits0, nbits0, pos0
			break
		}
		bits >>= d & 63
		nbits -= uint(d)
		e = lit[bits&(1<<litBits-1)]

		end := n + length
		if n-from >= 16 {
			copy16(out, n, from)
			copy16(out, n+16, from+16)
			for n += 32; n < end; n += 16 {
				from += 16
				copy16(out, n, from+16)
			}
		} else if n-from >= 8 {
			for n < end {
				store64(out, n, load64(out, from))
				n, from = n+8, from+8
			}
		} else {
			run := &runs[(n-from)&7]
			v := load64(out, from) & run.mask * run.repeat
			for n < end {
				store64(out, n, v)
				n += run.step
			}
		}
		n = end
	}
	nbits &= 63
	s.bits, s.nbits, s.pos = bits&(1<<nbits-1), nbits, pos
	o.n = n
}

// runs has, for the matches that overlap themselves within 8 bytes, how to
// make 8 bytes of one period: mask leaves the period, to multiply with repeat
// repeats it; step is how many bytes of whole periods there are in 8.
var runs [8]struct {
	mask, repeat uint64
	step         int
}

func init() {
	for d := 1; d < 8; d++ {
		r := &runs[d]
		r.mask = 1<<(8*d) - 1
		for i := 0; i < 8; i += d {
			r.repeat |= 1 << (8 * i)
		}
		r.step = 8 - 8%d
	}
}
