package loader

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// made is an ELF file to be written. Its addresses are its offsets, but for data.
type made struct {
	order binary.ByteOrder
	head  elf.Header64
	progs []elf.Prog64
	dyn   []elf.Dyn64
	strs  string
	relas []elf.Rela64
	array []uint64
	size  int
}

// Where the parts of a made file are, as of one that the linker made.
const (
	atProgs, atInterp, atStrings, atRelas = 0x40, 0x3c0, 0x400, 0x800
	atCode, atConst                       = 0x1000, 0x5000
	atData, atArray, atDynamic            = 0x6000, 0x6400, 0x6800
	base                                  = 0x10000 // of data: address less offset
	theLoader                             = "/lib64/ld.so"
)

// example is a program, changed by fn before it is written.
func example(fn func(*made)) []byte {
	m := &made{order: binary.LittleEndian, size: 0x7000}
	m.strs = "\x00libm.so.6\x00libc.so.6\x00$ORIGIN/../lib:/opt/lib::${ORIGIN}\x00"
	str := func(s string) uint64 { return uint64(strings.Index(m.strs, s)) }
	m.head = elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: atProgs, Ehsize: 64, Phentsize: 56, Shentsize: 64,
	}
	copy(m.head.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	part := func(kind elf.ProgType, flags elf.ProgFlag, off, addr, n uint64) {
		m.progs = append(m.progs, elf.Prog64{Type: uint32(kind), Flags: uint32(flags), Off: off, Vaddr: addr, Paddr: addr, Filesz: n, Memsz: n, Align: 4096})
	}
	part(elf.PT_INTERP, elf.PF_R, atInterp, atInterp, uint64(len(theLoader)+1))
	part(elf.PT_LOAD, elf.PF_R, 0, 0, 0x900)
	part(elf.PT_LOAD, elf.PF_R|elf.PF_X, atCode, atCode, 0x4000)
	part(elf.PT_LOAD, elf.PF_R, atConst, atConst, 0x1000)
	part(elf.PT_LOAD, elf.PF_R|elf.PF_W, atData, atData+base, 0x1000)
	part(elf.PT_DYNAMIC, elf.PF_R|elf.PF_W, atDynamic, atDynamic+base, 0x200)
	m.relas = []elf.Rela64{
		{Off: atData + base, Info: uint64(elf.R_X86_64_RELATIVE), Addend: atCode + 0x10}, // a pointer
		{Off: atArray + base, Info: uint64(elf.R_X86_64_RELATIVE), Addend: atCode + 0x2010},
		{Off: atData + base + 8, Info: uint64(elf.R_X86_64_IRELATIVE), Addend: atCode + 0x3ff0},
	}
	m.array = []uint64{0, 0}
	m.dyn = []elf.Dyn64{
		{Tag: int64(elf.DT_NEEDED), Val: str("libm")}, {Tag: int64(elf.DT_NEEDED), Val: str("libc")}, {Tag: int64(elf.DT_RUNPATH), Val: str("$O")},
		{Tag: int64(elf.DT_STRTAB), Val: atStrings}, {Tag: int64(elf.DT_STRSZ), Val: uint64(len(m.strs))},
		{Tag: int64(elf.DT_RELA), Val: atRelas}, {Tag: int64(elf.DT_RELASZ), Val: 72},
		{Tag: int64(elf.DT_INIT), Val: atCode}, {Tag: int64(elf.DT_INIT_ARRAY), Val: atArray + base}, {Tag: int64(elf.DT_INIT_ARRAYSZ), Val: 16},
		{}, {Tag: int64(elf.DT_NEEDED), Val: 1}, // behind the end
	}
	if fn != nil {
		fn(m)
	}
	return m.write()
}

func (m *made) write() []byte {
	if m.head.Phnum == 0 {
		m.head.Phnum = uint16(len(m.progs))
	}
	b := make([]byte, m.size)
	put := func(at int, x any) {
		p, err := binary.Append(nil, m.order, x)
		if err != nil {
			panic(err)
		}
		if at < len(b) {
			copy(b[at:], p)
		}
	}
	put(0, m.head)
	put(int(min(m.head.Phoff, uint64(m.size))), m.progs)
	put(atInterp, []byte(theLoader))
	put(atStrings, []byte(m.strs))
	put(atRelas, m.relas)
	put(atArray, m.array)
	put(atDynamic, m.dyn)
	return b
}

// prog returns the nth segment of a type.
func (m *made) prog(kind elf.ProgType, n int) *elf.Prog64 {
	for i := range m.progs {
		if elf.ProgType(m.progs[i].Type) == kind {
			if n--; n < 0 {
				return &m.progs[i]
			}
		}
	}
	panic(kind)
}

func (m *made) tag(tag elf.DynTag) *uint64 {
	return &m.dyn[slices.IndexFunc(m.dyn, func(d elf.Dyn64) bool { return d.Tag == int64(tag) })].Val
}

func of(t testing.TB, b []byte) *recorder { return &recorder{ReaderAt: bytes.NewReader(b), t: t} }

// endless is a file that goes on with zeros for ever.
type endless []byte

func (e endless) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	copy(p, e[min(int64(len(e)), off):])
	return len(p), nil
}

func TestExample(t *testing.T) {
	r := of(t, example(nil))
	o, err := r.load()
	if err != nil {
		t.Fatal(err)
	}
	want := Object{
		Machine: elf.EM_X86_64, Program: true, Interp: theLoader, Needed: []string{"libm.so.6", "libc.so.6"},
		Search: []string{"$ORIGIN/../lib", "/opt/lib", "$ORIGIN"}, Data: Range{atData, 0x1000}, Code: []Range{{atCode, 0x4000}, {atConst, 0x1000}},
	}
	if fmt.Sprint(*o) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", *o, want)
	}
	// Code from that of DT_INIT to that of the IFUNC, 12 KiB behind it.
	if got := []Range{{0, 0x900}, {atData, 0x1000}, {atCode, 0x4000}}; !slices.Equal(r.brought, got) {
		t.Errorf("brought %v, want %v", r.brought, got)
	}
}

// Files that are like none that the machine has.
func TestMade(t *testing.T) {
	brings := func(x ...Range) func(*testing.T, *recorder, *Object) {
		return func(t *testing.T, r *recorder, o *Object) {
			t.Helper()
			for _, x := range x {
				if missing(x, r.brought...) > 0 {
					t.Errorf("%v is not in %v", x, r.brought)
				}
			}
		}
	}
	count := func(needed, search int) func(*testing.T, *recorder, *Object) {
		return func(t *testing.T, r *recorder, o *Object) {
			t.Helper()
			if len(o.Needed) != needed || len(o.Search) != search {
				t.Errorf("%d needed, %d to look in, want %d, %d", len(o.Needed), len(o.Search), needed, search)
			}
		}
	}
	const many = 60000
	for name, c := range map[string]struct {
		fn    func(*made)
		check func(*testing.T, *recorder, *Object) // nil: it is an ErrNotLoaded
	}{
		"empty":     {func(m *made) { m.size = 0 }, nil},
		"magic":     {func(m *made) { m.size = 4 }, nil},
		"no header": {func(m *made) { m.size = 63 }, nil},
		"header":    {func(m *made) { m.size = 64 }, nil},
		"other":     {func(m *made) { m.head.Ident[1] = 'e' }, nil},
		"32 bits":   {func(m *made) { m.head.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS32) }, nil},
		"static":    {func(m *made) { m.prog(elf.PT_DYNAMIC, 0).Type = uint32(elf.PT_NOTE) }, nil},
		"relocatable": {func(m *made) {
			m.progs, m.head.Type, m.head.Phoff, m.head.Phentsize = nil, uint16(elf.ET_REL), 0, 0
		}, nil},
		"nothing loaded": {func(m *made) {
			for i := range m.progs {
				if m.progs[i].Type == uint32(elf.PT_LOAD) {
					m.progs[i].Type = uint32(elf.PT_NULL)
				}
			}
		}, nil},
		"headers are far":   {func(m *made) { m.head.Phoff = 0x1000 - 56 }, nil},
		"headers are wide":  {func(m *made) { m.head.Phentsize = 64 }, nil},
		"many headers":      {func(m *made) { m.head.Phnum = math.MaxUint16 }, nil},
		"headers wrap":      {func(m *made) { m.head.Phoff = math.MaxUint64 - 100 }, nil},
		"large dynamic":     {func(m *made) { m.prog(elf.PT_DYNAMIC, 0).Filesz = maxDynamic + 16 }, nil},
		"far dynamic":       {func(m *made) { m.prog(elf.PT_DYNAMIC, 0).Off = 1 << 61 }, nil},
		"segment wraps":     {func(m *made) { m.prog(elf.PT_LOAD, 1).Off = math.MaxUint64 - 10 }, nil},
		"segment is large":  {func(m *made) { m.prog(elf.PT_LOAD, 1).Filesz = 1 << 63 }, nil},
		"address is large":  {func(m *made) { m.prog(elf.PT_LOAD, 1).Vaddr = math.MaxUint64 }, nil},
		"name out of range": {func(m *made) { *m.tag(elf.DT_NEEDED) = uint64(len(m.strs)) }, nil},
		"name wraps":        {func(m *made) { *m.tag(elf.DT_RUNPATH) = math.MaxUint64 }, nil},
		"strings elsewhere": {func(m *made) { *m.tag(elf.DT_STRTAB) = 1 << 40 }, nil},
		"strings wrap":      {func(m *made) { *m.tag(elf.DT_STRSZ) = math.MaxUint64 }, nil},
		"no strings":        {func(m *made) { *m.tag(elf.DT_STRTAB), *m.tag(elf.DT_STRSZ) = 0, 0 }, nil},
		"shorter":           {func(m *made) { m.size = atDynamic + 0x1f0 }, nil},

		"no names":        {func(m *made) { m.dyn = m.dyn[3:] }, count(0, 0)},
		"nothing dynamic": {func(m *made) { m.dyn = nil }, count(0, 0)},
		"no end":          {func(m *made) { m.dyn, m.prog(elf.PT_DYNAMIC, 0).Filesz = m.dyn[:3+7], 10*16+7 }, count(2, 3)},
		"last name":       {func(m *made) { *m.tag(elf.DT_NEEDED) = uint64(len(m.strs) - 1) }, count(2, 3)},
		"s390x": {func(m *made) {
			m.order, m.head.Machine, m.head.Ident[elf.EI_DATA] = binary.BigEndian, uint16(elf.EM_S390), byte(elf.ELFDATA2MSB)
			m.relas[1].Info, m.relas[2].Info = uint64(elf.R_390_RELATIVE), 61
		}, func(t *testing.T, r *recorder, o *Object) {
			count(2, 3)(t, r, o)
			brings(Range{0, 0x900}, Range{atData, 0x1000}, Range{atCode, 0x4000})(t, r, o)
			if o.Machine != elf.EM_S390 || o.Needed[1] != "libc.so.6" {
				t.Errorf("%+v", o)
			}
		}},
		"unknown machine": {func(m *made) { m.head.Machine = uint16(elf.EM_SPARCV9) }, brings(Range{atCode, 4096})},
		"code first": {func(m *made) { // as of programs with fixed addresses
			m.prog(elf.PT_LOAD, 0).Flags |= uint32(elf.PF_X)
		}, func(t *testing.T, r *recorder, o *Object) {
			if want := (Range{0, atRelas + 72}); !slices.Contains(r.brought, want) || missing(Range{atData, 0x1000}, r.brought...) > 0 {
				t.Errorf("brought %v, want %v", r.brought, want)
			}
		}},
		"fixed addresses": {func(m *made) {
			*m.tag(elf.DT_RELASZ), m.array = 0, []uint64{atCode + 0x1010, atCode + 0x2010}
		}, func(t *testing.T, r *recorder, o *Object) {
			brings(Range{atCode, 0x3000})(t, r, o)
			if missing(Range{atCode + 0x3000, 4096}, r.brought...) == 0 {
				t.Errorf("brought %v", r.brought)
			}
		}},
		"all in one": {func(m *made) {
			m.prog(elf.PT_LOAD, 0).Flags, m.prog(elf.PT_LOAD, 0).Filesz = uint32(elf.PF_R|elf.PF_W|elf.PF_X), atConst
		}, brings(Range{0, atConst})},
		"two written": {func(m *made) {
			m.prog(elf.PT_LOAD, 2).Flags |= uint32(elf.PF_W)
			m.progs = append(m.progs, elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_W), Off: 0x7000, Vaddr: 1 << 40, Memsz: 4096})
		}, func(t *testing.T, r *recorder, o *Object) {
			brings(Range{atConst, 0x1000}, Range{atData, 0x1000})(t, r, o)
			if o.Data != (Range{atConst, 0x1000}) {
				t.Errorf("data is %v", o.Data)
			}
		}},
		"path of the loader goes on": {func(m *made) { m.prog(elf.PT_INTERP, 0).Off = headSize - 3 }, func(t *testing.T, r *recorder, o *Object) {
			if o.Interp != "" {
				t.Errorf("%q", o.Interp)
			}
		}},
		"relocations elsewhere": {func(m *made) { *m.tag(elf.DT_RELA) = math.MaxUint64 - 8 }, brings(Range{0, 0x900}, Range{atCode, 4096})},
		"constructors wrap":     {func(m *made) { *m.tag(elf.DT_INIT_ARRAYSZ) = math.MaxUint64 }, brings(Range{0, 0x900}, Range{atCode + 0x2000, 4096})},
		"many constructors": {func(m *made) {
			m.prog(elf.PT_LOAD, 3).Filesz, *m.tag(elf.DT_INIT_ARRAYSZ) = 1<<30, maxPart+8
		}, brings(Range{atCode, 0x4000})},
		"strings behind the first segment": {func(m *made) { // as patchelf moves them
			m.prog(elf.PT_LOAD, 0).Filesz = atStrings - 0x100
			m.prog(elf.PT_LOAD, 2).Off, *m.tag(elf.DT_STRTAB), *m.tag(elf.DT_RELA) = atStrings, atConst, atConst+atRelas-atStrings
		}, func(t *testing.T, r *recorder, o *Object) {
			count(2, 3)(t, r, o)
			brings(Range{0, atStrings - 0x100}, Range{atStrings + 1, 55}, Range{atCode, 0x4000})(t, r, o)
		}},
		"large segments": {func(m *made) {
			for n := range 4 {
				m.prog(elf.PT_LOAD, n).Filesz = 1 << 61
			}
		}, brings(Range{0, maxPart}, Range{atData, maxPart})},
		"large relocations": {func(m *made) {
			m.prog(elf.PT_LOAD, 0).Filesz, *m.tag(elf.DT_RELASZ), m.size = 1<<40, 1<<39, 1<<20
		}, brings(Range{0, maxPart}, Range{atCode, 4096})},
		"many names": {func(m *made) {
			long := strings.Repeat(strings.Repeat("d", 63)+":", 100)
			m.strs += long[:len(long)-1] // without an end
			m.dyn = []elf.Dyn64{{Tag: int64(elf.DT_STRTAB), Val: atStrings}, {Tag: int64(elf.DT_STRSZ), Val: uint64(len(m.strs))}}
			for i := range many {
				m.dyn = append(m.dyn, elf.Dyn64{Tag: []int64{int64(elf.DT_NEEDED), int64(elf.DT_RPATH)}[i%2], Val: uint64(len(m.strs) - 6000 + i%2000)})
			}
			m.prog(elf.PT_DYNAMIC, 0).Filesz, m.size = many*16, atDynamic+many*16
			m.prog(elf.PT_LOAD, 0).Filesz, m.relas = 0x4000, nil
		}, count(maxNeeded, maxSearch)},
	} {
		t.Run(name, func(t *testing.T) {
			b := example(c.fn)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			r := of(t, b)
			o, err := r.load()
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
				t.Errorf("%d bytes allocated", n)
			}
			if c.check == nil {
				if !errors.Is(err, ErrNotLoaded) {
					t.Errorf("%+v, %v", o, err)
				}
				return
			}
			if o == nil || err != nil && name != "large segments" {
				t.Fatal(o, err)
			}
			c.check(t, r, o)
		})
	}
}

// Code that runs early all over a large file is asked for in parts of bounded size, and number.
func TestScattered(t *testing.T) {
	for _, c := range []struct {
		apart uint64
		parts int
	}{{4096, 1}, {near, 2}, {near + 4096, maxCode}} {
		r := &recorder{t: t}
		b := example(func(m *made) {
			m.prog(elf.PT_LOAD, 1).Filesz, m.prog(elf.PT_LOAD, 2).Vaddr = 1<<30, 1<<40
			m.prog(elf.PT_LOAD, 3).Vaddr, *m.tag(elf.DT_INIT_ARRAY) = 1<<41, 1<<41+atArray-atData
			m.relas = nil
			for i := range uint64(40) {
				m.relas = append(m.relas, elf.Rela64{Off: atData, Info: uint64(elf.R_X86_64_IRELATIVE), Addend: int64(atCode + 99 + i*c.apart)})
			}
			m.array = nil
			for i := range uint64(60) {
				m.array = append(m.array, atCode+(40+i)*c.apart)
			}
			*m.tag(elf.DT_RELASZ), *m.tag(elf.DT_INIT_ARRAYSZ) = 24*40, 8*60
			m.prog(elf.PT_LOAD, 0).Filesz = 0x1000
		})
		r.ReaderAt = endless(b)
		if _, err := r.load(); err != nil {
			t.Fatal(err)
		}
		code := slices.DeleteFunc(r.brought, func(x Range) bool { return x.Off < atCode || x.Off == atData && x.Size == 0x1000 })
		if len(code) != c.parts {
			t.Errorf("%d bytes apart: %d parts, want %d", c.apart, len(code), c.parts)
		}
		for i := range int64(maxCode) {
			if missing(Range{atCode + i*int64(c.apart), 4096}, code...) > 0 {
				t.Errorf("%d bytes apart: page %d is missing", c.apart, i)
			}
		}
	}
}

// A file that ends anywhere, or has any word exchanged, is an error or is loaded; as of all that
// is loaded, what it asks for is bounded.
func TestDamaged(t *testing.T) {
	whole := example(nil)
	for n := range len(whole) {
		if n > 0x900 && n < atArray-16 {
			continue
		}
		if o, err := of(t, whole[:n]).load(); err == nil && n < atDynamic+0x200 {
			t.Errorf("%d bytes: %+v", n, o)
		} else if err != nil && !errors.Is(err, ErrNotLoaded) && o == nil {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	words := []uint64{0, 1, 7, 0x7fffffff, 1<<32 - 1, 1 << 32, 1<<61 - 8, 1 << 61, 1<<62 - 1, 1 << 62, 1<<62 + 1, 1<<63 - 4096, 1<<63 - 1, 1 << 63, 1<<63 + 1,
		math.MaxUint64 - 4095, math.MaxUint64 - 15, math.MaxUint64 - 1, math.MaxUint64}
	loaded := 0
	for _, part := range [][2]int{{0, atProgs + 6*56}, {atStrings, atStrings + 48}, {atRelas, atRelas + 72}, {atArray, atArray + 16}, {atDynamic, atDynamic + 12*16}} {
		for at := part[0]; at < part[1]; at += 4 {
			for _, w := range words {
				b := slices.Clone(whole)
				binary.LittleEndian.PutUint64(b[at:], w)
				if o, _ := of(t, b).load(); o != nil {
					loaded++
				}
				r := &recorder{ReaderAt: endless(b), t: t}
				if _, err := r.load(); err != nil && !errors.Is(err, ErrNotLoaded) {
					t.Errorf("%#x at %#x: %v", w, at, err)
				}
			}
		}
	}
	if loaded < 1000 {
		t.Errorf("only %d were loaded", loaded)
	}
}

// broken is a file of which the nth read goes wrong.
type broken struct {
	io.ReaderAt
	n    int
	less int
	err  error
}

func (b *broken) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.ReaderAt.ReadAt(p, off)
	if b.n--; b.n == -1 {
		return max(n-b.less, 0), b.err
	}
	return n, err
}

func TestBroken(t *testing.T) {
	whole := example(func(m *made) { m.size = 0x9000 })
	r := of(t, whole)
	if _, err := r.load(); err != nil {
		t.Fatal(err)
	}
	wrong := errors.New("wrong")
	for n := range r.read {
		for _, c := range []struct {
			less      int
			err, want error
		}{{0, io.EOF, nil}, {1 << 20, wrong, wrong}, {1, wrong, wrong}, {1 << 20, io.EOF, ErrNotLoaded}, {1, io.EOF, ErrNotLoaded}, {1, nil, ErrNotLoaded}} {
			if n == 0 && c.less == 1 && c.err != wrong { // the headers are shorter
				c.want = nil
			}
			var o *Object
			f := of(t, nil)
			f.ReaderAt = &broken{bytes.NewReader(whole), n, c.less, c.err}
			err := Load(f, func(x *Object) { o = x })
			if !errors.Is(err, c.want) || err == nil && len(o.Needed) != 2 {
				t.Errorf("read %d, %d bytes less, %v: %+v, %v, want %v", n, c.less, c.err, o, err, c.want)
			}
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(example(nil), false)
	f.Add(example(func(m *made) {
		m.order, m.head.Machine, m.head.Ident[elf.EI_DATA] = binary.BigEndian, uint16(elf.EM_S390), byte(elf.ELFDATA2MSB)
	}), true)
	f.Add([]byte("#!/usr/bin/env -S python3\n"), false)
	for _, p := range machine(f) {
		if b, err := os.ReadFile(p); err == nil && len(b) < 20<<10 {
			f.Add(b, false)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, more bool) {
		for _, s := range Interpreter(b) {
			if s == "" || len(s) > 256 {
				t.Errorf("interpreter %q", s)
			}
		}
		r := of(t, b)
		if more {
			r.ReaderAt = endless(b)
		}
		r.load()
	})
}
