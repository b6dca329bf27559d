// Package loader knows what the dynamic loader, ld.so(8), reads of an ELF file when it
// loads it, and which other files it loads then: the header; the segment that is written,
// nearly all of which is relocated; symbols, strings and relocations; the code that
// runs before main. All of that can be known from the file alone, so it can be
// asked for before the loader comes there.
//
// The format is that of the ELF specification (System V ABI, chapters 4 and 5) and, for
// GNU's tags, of elf.h. 64-bit files only.
package loader

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// What a file may ask for. Real ones stay far below, but for parts: of the largest the
// rest is read in order, which is noticed as that of any file is.
const (
	headSize   = 4096    // where the program headers are, as linkers write them
	maxDynamic = 1 << 20 // bytes
	maxName    = 4096
	maxNeeded  = 512
	maxSearch  = 32
	maxPart    = 4 << 20
	maxCode    = 64 // places

	page = 4096      // bytes
	near = 128 << 10 // what lies so near to each other comes together
)

// ErrNotLoaded says that a file is none that ld.so loads, or a damaged one.
var ErrNotLoaded = errors.New("not a file that ld.so loads")

// File is an ELF file whose bytes may be far away.
type File interface {
	// ReadAt is that of io.ReaderAt; it waits until the bytes are here.
	io.ReaderAt
	// Bring begins to bring bytes that will be read, and returns at once.
	Bring(off, n int64)
}

// Range is a part of a file, in bytes.
type Range struct{ Off, Size int64 }

// Object is what a file says of itself.
type Object struct {
	Machine elf.Machine
	Program bool     // it is started by itself
	Interp  string   // the loader's path, of programs; libc.so.6 has one too, but far behind its header
	Needed  []string // names of libraries, some of them paths
	Search  []string // directories where to look for them first; they may begin with $ORIGIN
	Data    Range    // what is written when it is loaded
	Code    []Range  // what is read as it is needed: code, and constants
}

// IsELF tells whether a file that begins so is an ELF file.
func IsELF(head []byte) bool { return bytes.HasPrefix(head, []byte(elf.ELFMAG)) }

// Interpreter returns the path of the program that runs a script, and what that is to run
// if it is env(1); nil if what begins so is no script.
func Interpreter(head []byte) []string {
	line, ok := bytes.CutPrefix(head, []byte("#!"))
	if !ok {
		return nil
	}
	line, _, _ = bytes.Cut(line[:min(len(line), 256)], []byte("\n")) // as Linux does
	fields := strings.Fields(string(line))
	if len(fields) == 0 || fields[0][0] != '/' {
		return nil
	}
	if path.Base(fields[0]) == "env" && len(fields) > 1 {
		if fields[1] == "-S" {
			fields = slices.Delete(fields, 1, 2)
		}
		return fields[:min(2, len(fields))]
	}
	return fields[:1]
}

// Load asks for what ld.so will read of a file. It calls found as soon as it knows what
// is loaded with it, and returns when it has asked for everything. A file that is not linked
// dynamically, or is shorter than it says, is an ErrNotLoaded.
func Load(f File, found func(*Object)) error {
	l := &load{f: f}
	if err := l.head(); err != nil {
		return err
	}
	if err := l.dynamic(); err != nil {
		return err
	}
	l.tables()
	if err := l.names(); err != nil {
		return err
	}
	found(&l.Object)
	return l.code()
}

type load struct {
	Object
	f      File
	order  binary.ByteOrder
	parts  []elf.Prog64 // that are loaded
	table  elf.Prog64   // the dynamic section
	tags   map[elf.DynTag]uint64
	needed []uint64 // where in the strings the names are
	search []uint64
	first  int64 // bytes of the file's start that were asked for, mostly with all symbols
	relocs []Range
}

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrNotLoaded, fmt.Sprintf(format, args...))
}

// read reads what must be there as a whole.
func (l *load) read(off, n int64) ([]byte, error) {
	p := make([]byte, n)
	switch got, err := l.f.ReadAt(p, off); {
	case got == len(p): // whatever the error
		return p, nil
	case err == nil || err == io.EOF:
		return nil, bad("%d bytes of %d at offset %d", got, n, off)
	default:
		return nil, fmt.Errorf("%d bytes at offset %d: %w", n, off, err)
	}
}

// head reads the header and the program headers, and asks for what is written.
func (l *load) head() error {
	p := make([]byte, headSize)
	n, err := l.f.ReadAt(p, 0)
	if p = p[:n]; err != nil && err != io.EOF {
		return err
	}
	var h elf.Header64
	if !IsELF(p) || len(p) < binary.Size(h) || p[elf.EI_CLASS] != byte(elf.ELFCLASS64) {
		return bad("no header of a 64-bit file")
	}
	l.order = binary.LittleEndian
	if p[elf.EI_DATA] == byte(elf.ELFDATA2MSB) {
		l.order = binary.BigEndian
	}
	if _, err := binary.Decode(p, l.order, &h); err != nil {
		return err
	}
	l.Machine, l.Program = elf.Machine(h.Machine), elf.Type(h.Type) == elf.ET_EXEC
	var one elf.Prog64
	size := uint64(binary.Size(one))
	if uint64(h.Phentsize) != size || h.Phoff > uint64(len(p)) || uint64(len(p))-h.Phoff < uint64(h.Phnum)*size {
		return bad("%d program headers at offset %d", h.Phnum, h.Phoff)
	}
	for i := range uint64(h.Phnum) {
		if _, err := binary.Decode(p[h.Phoff+i*size:], l.order, &one); err != nil {
			return err
		}
		if one.Off > 1<<62 || one.Filesz > 1<<62-one.Off || one.Vaddr > 1<<63 {
			return bad("a segment of %d bytes at offset %d", one.Filesz, one.Off)
		}
		switch elf.ProgType(one.Type) {
		case elf.PT_LOAD:
			l.parts = append(l.parts, one)
		case elf.PT_DYNAMIC:
			l.table = one
		case elf.PT_INTERP:
			if one.Off+one.Filesz <= uint64(len(p)) {
				name, _, _ := bytes.Cut(p[one.Off:one.Off+one.Filesz], []byte{0})
				l.Interp = string(name)
			}
		}
	}
	if l.table.Filesz == 0 || len(l.parts) == 0 {
		return bad("it is linked statically")
	}
	for _, s := range l.parts {
		r := Range{int64(s.Off), int64(s.Filesz)}
		switch {
		case elf.ProgFlag(s.Flags)&elf.PF_W != 0:
			if l.Data.Size == 0 { // the first is relocated, lld makes two; others may be zeros only
				l.Data = r
			}
			l.bring(r)
		case s.Off > 0:
			l.Code = append(l.Code, r)
		case elf.ProgFlag(s.Flags)&elf.PF_X == 0: // else it has code, and goes on behind what is read
			l.start(r.Size)
		}
	}
	return nil
}

func (l *load) bring(r Range) {
	if r.Size > 0 {
		l.f.Bring(r.Off, min(r.Size, maxPart))
	}
}

func (l *load) start(n int64) {
	l.first = min(n, maxPart)
	l.bring(Range{0, n})
}

// offset returns where in the file n bytes at an address are.
func (l *load) offset(addr, n uint64) (int64, bool) {
	for _, s := range l.parts {
		if addr >= s.Vaddr && addr-s.Vaddr <= s.Filesz && n <= s.Filesz-(addr-s.Vaddr) {
			return int64(s.Off + addr - s.Vaddr), true
		}
	}
	return 0, false
}

// dynamic reads the dynamic section.
func (l *load) dynamic() error {
	if l.table.Filesz > maxDynamic {
		return bad("%d bytes of dynamic section", l.table.Filesz)
	}
	p, err := l.read(int64(l.table.Off), int64(l.table.Filesz))
	if err != nil {
		return err
	}
	l.tags = map[elf.DynTag]uint64{}
	defer func() {
		l.Program = l.Program || l.Interp != "" || l.tags[elf.DT_FLAGS_1]&uint64(elf.DF_1_PIE) != 0
	}()
	for ; len(p) >= 16; p = p[16:] {
		tag, value := elf.DynTag(l.order.Uint64(p)), l.order.Uint64(p[8:])
		switch tag {
		case elf.DT_NULL:
			return nil
		case elf.DT_NEEDED:
			if len(l.needed) < maxNeeded {
				l.needed = append(l.needed, value)
			}
		case elf.DT_RPATH, elf.DT_RUNPATH:
			if len(l.search) < maxSearch {
				l.search = append(l.search, value)
			}
		default:
			l.tags[tag] = value
		}
	}
	return nil
}

// names reads the names of what is needed, and where to look for it. In large files they lie
// far from one another.
func (l *load) names() error {
	size := l.tags[elf.DT_STRSZ]
	at, ok := l.offset(l.tags[elf.DT_STRTAB], size)
	offs := slices.Concat(l.needed, l.search)
	for _, off := range offs {
		if !ok || off >= size {
			return bad("a name at %d of %d bytes of strings at address %#x", off, size, l.tags[elf.DT_STRTAB])
		}
		if n := int64(min(size-off, maxName)); at+int64(off)+n > l.first {
			l.f.Bring(at+int64(off), n)
		}
	}
	names := make([]string, len(offs))
	for i, off := range offs {
		p, err := l.read(at+int64(off), int64(min(size-off, maxName)))
		if err != nil {
			return err
		}
		p, _, _ = bytes.Cut(p, []byte{0})
		names[i] = string(p)
	}
	l.Needed = names[:len(l.needed):len(l.needed)]
	for _, name := range names[len(l.needed):] {
		for _, dir := range strings.Split(name, ":") {
			if dir = strings.ReplaceAll(dir, "${ORIGIN}", "$ORIGIN"); dir != "" && len(l.Search) < maxSearch {
				l.Search = append(l.Search, dir)
			}
		}
	}
	return nil
}

// tables asks for symbols, strings and relocations, if head did not.
func (l *load) tables() {
	type table struct{ at, size elf.DynTag }
	end := int64(0)
	for _, t := range []table{{elf.DT_RELA, elf.DT_RELASZ}, {elf.DT_JMPREL, elf.DT_PLTRELSZ}, {elf.DT_STRTAB, elf.DT_STRSZ}} {
		n := l.tags[t.size]
		off, ok := l.offset(l.tags[t.at], n)
		if !ok || n == 0 {
			continue
		}
		end = max(end, off+int64(n))
		if t.at != elf.DT_STRTAB && n <= maxPart {
			l.relocs = append(l.relocs, Range{off, int64(n)})
		}
	}
	if l.first == 0 {
		l.start(end)
	}
}

// code asks for the code that is run before main: functions that choose others (IFUNC), and
// constructors.
func (l *load) code() error {
	places := l.codeAt(nil, l.tags[elf.DT_INIT])
	for _, r := range l.relocs {
		p, err := l.read(r.Off, r.Size)
		if err != nil {
			return err
		}
		places = l.early(places, p)
	}
	// Of a program with fixed addresses, or with short relocations (RELR), the words are there.
	first, n := l.tags[elf.DT_INIT_ARRAY], l.tags[elf.DT_INIT_ARRAYSZ]
	if off, ok := l.offset(first, n); ok && n > 0 && n <= maxPart {
		p, err := l.read(off, int64(n))
		if err != nil {
			return err
		}
		for ; len(p) >= 8; p = p[8:] {
			places = l.codeAt(places, l.order.Uint64(p))
		}
	}
	slices.Sort(places)
	for i := 0; i < len(places); {
		from, to := places[i], places[i]
		for ; i < len(places) && places[i]-to <= near && places[i]-from < maxPart; i++ {
			to = places[i]
		}
		l.f.Bring(from, to+page-from)
	}
	return nil
}

// codeAt adds where in the file the page is that has code at an address: many are in few.
func (l *load) codeAt(places []int64, addr uint64) []int64 {
	off, ok := l.offset(addr, 1)
	if off &^= page - 1; ok && addr != 0 && len(places) < maxCode && !slices.Contains(places, off) {
		places = append(places, off)
	}
	return places
}

// relative are the relocations of each machine that put an address into a word, and that
// ask a function for it.
var relative = map[elf.Machine]struct{ word, function uint32 }{
	elf.EM_X86_64:  {uint32(elf.R_X86_64_RELATIVE), uint32(elf.R_X86_64_IRELATIVE)},
	elf.EM_AARCH64: {uint32(elf.R_AARCH64_RELATIVE), uint32(elf.R_AARCH64_IRELATIVE)},
	elf.EM_RISCV:   {uint32(elf.R_RISCV_RELATIVE), 58},
	elf.EM_PPC64:   {uint32(elf.R_PPC64_RELATIVE), uint32(elf.R_PPC64_JMP_IREL)},
	elf.EM_S390:    {uint32(elf.R_390_RELATIVE), 61},
}

// early adds what relocations name that is run before main.
func (l *load) early(places []int64, relocations []byte) []int64 {
	kinds, ok := relative[l.Machine]
	if !ok {
		return places
	}
	first := l.tags[elf.DT_INIT_ARRAY]
	n := l.tags[elf.DT_INIT_ARRAYSZ]
	for r := relocations; len(r) >= 24; r = r[24:] {
		at, kind, addend := l.order.Uint64(r), uint32(l.order.Uint64(r[8:])), l.order.Uint64(r[16:])
		if kind == kinds.function || kind == kinds.word && at-first < n {
			places = l.codeAt(places, addend)
		}
	}
	return places
}
