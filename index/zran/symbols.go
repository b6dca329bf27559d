package zran

// symbols decodes symbols of a block (RFC 1951, section 3.2.3) up to limit.
func (z *Reader) symbols(limit int) error {
	for z.out.n < limit {
		if z.src.fill(inSlack); z.src.end-z.src.pos >= inSlack {
			if z.fast(limit); z.out.n >= limit {
				return nil
			}
		}
		if end, err := z.symbol(); end || err != nil {
			return err
		}
	}
	return nil
}

// symbol decodes one symbol. It is what works everywhere: in the last bytes of
// the source, for what is rare and for what is wrong.
func (z *Reader) symbol() (end bool, err error) {
	s, o := &z.src, &z.out
	s.want(48) // the longest: 15+5 for a length, 15+13 for a distance
	e := z.code.lit[s.bits&(1<<litBits-1)]
	if e&flagLink != 0 {
		e = z.code.lit[e.second(s.bits>>litBits)&(litSize-1)]
	}
	if s.nbits < e.used() {
		return false, s.cut()
	}
	switch {
	case e&flagLiteral != 0:
		s.drop(e.used())
		o.buf[o.n] = e.literal()
		o.n++
		return false, nil
	case e&flagEnd != 0:
		s.drop(e.used())
		z.endBlock()
		return true, nil
	case e&flagSlow != 0:
		return false, s.missing("a literal or length has no valid code")
	}
	length := e.value(s.bits)
	s.drop(e.used())

	d := z.code.dist[s.bits&(1<<distBits-1)]
	if d&flagLink != 0 {
		d = z.code.dist[d.second(s.bits>>distBits)&(distSize-1)]
	}
	if s.nbits < d.used() {
		return false, s.cut()
	}
	if d&flagSlow != 0 {
		return false, s.missing("a distance has no valid code")
	}
	dist := d.value(s.bits)
	if dist > o.n-o.oldest {
		return false, s.bad("a match %d bytes back, where there are only %d", dist, o.n-o.oldest)
	}
	s.drop(d.used())
	z.needed(o.n-dist, length)
	for range length {
		o.buf[o.n] = o.buf[o.n-dist]
		o.n++
	}
	return false, nil
}

// missing is the error about a code that does not exist, unless the bits of it
// are not all there.
func (s *source) missing(what string) error {
	if s.nbits < maxCode {
		return s.cut()
	}
	return s.bad("%s", what)
}
