package loader

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// recorder is a file that notes what is asked of it.
type recorder struct {
	io.ReaderAt
	t       testing.TB
	brought []Range
	read    []Range
}

func (r *recorder) check(off, n, least int64) {
	if off < 0 || n < least || n > maxPart || off > off+n {
		r.t.Errorf("%d bytes at %d are asked for", n, off)
	}
}

func (r *recorder) ReadAt(p []byte, off int64) (int, error) {
	r.check(off, int64(len(p)), 0)
	r.read = append(r.read, Range{off, int64(len(p))})
	return r.ReaderAt.ReadAt(p, off)
}

func (r *recorder) Bring(off, n int64) {
	r.check(off, n, 1)
	r.brought = append(r.brought, Range{off, n})
}

// load loads a file, and checks what holds of all.
func (r *recorder) load() (*Object, error) {
	var o *Object
	err := Load(r, func(x *Object) {
		if o != nil {
			r.t.Error("found twice")
		}
		o = x
	})
	if o == nil {
		if err == nil {
			r.t.Error("nothing is found, and no error")
		}
		return nil, err
	}
	if len(o.Needed) > maxNeeded || len(o.Search) > maxSearch || len(o.Code) > headSize/56 || len(r.brought) > headSize/56+1+maxNeeded+maxSearch+maxCode {
		r.t.Errorf("%d needed, %d to look in, %d parts of code, %d brought", len(o.Needed), len(o.Search), len(o.Code), len(r.brought))
	}
	for _, s := range slices.Concat(o.Needed, o.Search, []string{o.Interp}) {
		if len(s) > maxName || strings.Contains(s, "\x00") {
			r.t.Errorf("a name of %d bytes: %.100q", len(s), s)
		}
	}
	for _, x := range append(slices.Clone(o.Code), o.Data) {
		if x.Off < 0 || x.Size < 0 || x.Off > x.Off+x.Size {
			r.t.Errorf("a part of %d bytes at %d", x.Size, x.Off)
		}
	}
	return o, err
}

// missing returns how much of a range is in none of others.
func missing(x Range, in ...Range) int64 {
	in = slices.Clone(in)
	slices.SortFunc(in, func(a, b Range) int { return int(min(max(a.Off-b.Off, -1), 1)) })
	at, end, n := x.Off, x.Off+x.Size, int64(0)
	for _, r := range in {
		if r.Off > at {
			n += max(min(r.Off, end)-at, 0)
		}
		at = max(at, min(r.Off+r.Size, end))
	}
	return n + end - at
}

// machine returns the paths of programs and libraries that this machine has: no more than
// there is time for, some of them always.
func machine(t testing.TB) []string {
	const enough = 300
	var all, chosen []string
	seen := map[string]bool{}
	for _, pattern := range []string{"/usr/bin/*", "/usr/lib/x86_64-linux-gnu/*", "/usr/lib/aarch64-linux-gnu/*", "/usr/lib64/*", "/lib64/*", "/usr/sbin/*"} {
		paths, _ := filepath.Glob(pattern)
		for _, p := range paths {
			p, err := filepath.EvalSymlinks(p)
			if s, err2 := os.Stat(p); err != nil || err2 != nil || !s.Mode().IsRegular() || seen[p] {
				continue
			}
			seen[p] = true
			if f, err := os.Open(p); err == nil {
				var head [4]byte
				if io.ReadFull(f, head[:]); IsELF(head[:]) {
					all = append(all, p)
				}
				f.Close()
			}
		}
	}
	for i, p := range all {
		name := filepath.Base(p)
		always := strings.HasPrefix(name, "libc.so") || strings.HasPrefix(name, "libstdc++") || strings.HasPrefix(name, "libLLVM") ||
			strings.HasPrefix(name, "ld-linux") || strings.HasPrefix(name, "python3") || name == "true"
		if always || i*enough/len(all) != (i+1)*enough/len(all) {
			chosen = append(chosen, p)
		}
	}
	return chosen
}

// What a file says of itself is what the standard library reads of it; what ld.so reads of
// it then is asked for, and nothing else.
func TestMachine(t *testing.T) {
	paths := machine(t)
	if len(paths) < 10 {
		t.Skipf("%d ELF files are here", len(paths))
	}
	loaded, programs, searched, constructors := 0, 0, 0, 0
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			continue // not for us
		}
		e, err := elf.NewFile(f)
		if err != nil {
			f.Close()
			continue
		}
		t.Run(filepath.Base(p), func(t *testing.T) {
			r := &recorder{ReaderAt: f, t: t}
			o, err := r.load()
			if dynamic := segments(e, func(s *elf.Prog) bool { return s.Type == elf.PT_DYNAMIC }); len(dynamic) == 0 || e.Class != elf.ELFCLASS64 {
				if !errors.Is(err, ErrNotLoaded) {
					t.Errorf("static, or of 32 bits: %+v, %v", o, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			loaded++
			sameObject(t, e, o)
			if o.Interp != "" {
				programs++
			}
			searched += len(o.Search)
			tablesAsked(t, e, r)
			constructors += codeAsked(t, e, r)
		})
		f.Close()
	}
	t.Logf("%d files, %d loaded, %d programs, %d directories to look in, %d pages with code that runs early", len(paths), loaded, programs, searched, constructors)
	if loaded < len(paths)/2 || programs == 0 || constructors < loaded/2 {
		t.Error("too little was compared")
	}
}

func segments(e *elf.File, is func(*elf.Prog) bool) (rs []Range) {
	for _, s := range e.Progs {
		if is(s) {
			rs = append(rs, Range{int64(s.Off), int64(s.Filesz)})
		}
	}
	return rs
}

func written(s *elf.Prog) bool {
	return s.Type == elf.PT_LOAD && s.Flags&elf.PF_W != 0 && s.Filesz > 0
}

func sameObject(t *testing.T, e *elf.File, o *Object) {
	t.Helper()
	interp := ""
	for _, s := range e.Progs {
		if s.Type == elf.PT_INTERP && s.Off+s.Filesz <= headSize {
			b, _ := io.ReadAll(s.Open())
			interp = strings.TrimRight(string(b), "\x00")
		}
	}
	needed, err := e.ImportedLibraries()
	if err != nil {
		t.Fatal(err)
	}
	var search []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		paths, err := e.DynString(tag)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			search = append(search, strings.Split(strings.ReplaceAll(p, "${ORIGIN}", "$ORIGIN"), ":")...)
		}
	}
	search = slices.DeleteFunc(search, func(s string) bool { return s == "" })
	flags, _ := e.DynValue(elf.DT_FLAGS_1)
	pie := len(flags) > 0 && flags[0]&uint64(elf.DF_1_PIE) != 0
	if program := e.Type == elf.ET_EXEC || interp != "" || pie; o.Program != program {
		t.Errorf("it is a program: %v, want %v", o.Program, program)
	}
	if o.Machine != e.Machine || o.Interp != interp || !slices.Equal(o.Needed, needed) || !slices.Equal(o.Search, search) {
		t.Errorf("%v %q, needs %q from %q, want %v %q, %q, %q", o.Machine, o.Interp, o.Needed, o.Search, e.Machine, interp, needed, search)
	}
	data := append(segments(e, written), Range{})[0]
	code := segments(e, func(s *elf.Prog) bool { return s.Type == elf.PT_LOAD && s.Flags&elf.PF_W == 0 && s.Off > 0 })
	if o.Data != data || !slices.Equal(o.Code, code) {
		t.Errorf("data %v, code %v, want %v, %v", o.Data, o.Code, data, code)
	}
}

// tables are the sections that ld.so reads of a file that is loaded.
var tables = []string{".dynsym", ".dynstr", ".rela.dyn", ".rela.plt", ".gnu.hash", ".hash", ".gnu.version", ".gnu.version_r"}

// tablesAsked checks that what is relocated, and by which, is asked for.
func tablesAsked(t *testing.T, e *elf.File, r *recorder) {
	t.Helper()
	want := segments(e, written)
	for _, name := range tables {
		if s := e.Section(name); s != nil && s.Type != elf.SHT_NOBITS {
			want = append(want, Range{int64(s.Offset), int64(min(s.Size, max(s.Offset, maxPart)-s.Offset))})
			if s.Type == elf.SHT_RELA && s.Size <= maxPart {
				want[len(want)-1].Size = int64(s.Size)
			}
		}
	}
	for _, x := range want {
		x.Size = min(x.Size, maxPart)
		if n := missing(x, slices.Concat(r.brought, r.read)...); n > 0 {
			t.Errorf("%d bytes of %v are not asked for: brought %v, read %v", n, x, r.brought, r.read)
		}
	}
}

// early returns the pages of a file with code that ld.so runs, by an own reading of sections.
func early(t *testing.T, e *elf.File) (pages []int64) {
	t.Helper()
	add := func(addr uint64) {
		for _, s := range e.Progs {
			if s.Type == elf.PT_LOAD && addr != 0 && addr >= s.Vaddr && addr < s.Vaddr+s.Filesz {
				pages = append(pages, int64(s.Off+addr-s.Vaddr)&^4095)
			}
		}
	}
	if v, err := e.DynValue(elf.DT_INIT); err == nil && len(v) > 0 {
		add(v[0])
	}
	var array elf.Section
	if s := e.Section(".init_array"); s != nil {
		array = *s
		words, err := s.Data()
		if err != nil {
			t.Fatal(err)
		}
		for ; len(words) >= 8; words = words[8:] {
			add(e.ByteOrder.Uint64(words))
		}
	}
	for _, s := range e.Sections {
		if s.Type != elf.SHT_RELA || s.Flags&elf.SHF_ALLOC == 0 || s.Size > maxPart {
			continue
		}
		b, err := s.Data()
		if err != nil {
			t.Fatal(err)
		}
		for _, chunk := range slices.Collect(slices.Chunk(b, 24)) {
			var x elf.Rela64
			if _, err := binary.Decode(chunk, e.ByteOrder, &x); err != nil {
				t.Fatal(err)
			}
			var name string
			switch kind := uint32(x.Info); e.Machine {
			case elf.EM_X86_64:
				name = elf.R_X86_64(kind).String()
			case elf.EM_AARCH64:
				name = elf.R_AARCH64(kind).String()
			}
			if strings.HasSuffix(name, "_IRELATIVE") || strings.HasSuffix(name, "_RELATIVE") && x.Off >= array.Addr && x.Off < array.Addr+array.Size {
				add(uint64(x.Addend))
			}
		}
	}
	slices.Sort(pages)
	return slices.Compact(pages)
}

// codeAsked checks that code that runs early is asked for, and other code only where it is
// near to such. It returns how many pages that are.
func codeAsked(t *testing.T, e *elf.File, r *recorder) int {
	t.Helper()
	pages := early(t, e)
	found := 0
	for _, p := range pages {
		if missing(Range{p, 1}, r.brought...) == 0 && missing(Range{p, min(4096, size(t, r)-p)}, r.brought...) == 0 {
			found++
		}
	}
	if found < min(len(pages), maxCode) {
		t.Errorf("%d of %d pages with code that runs early are asked for: %x of %x", found, len(pages), r.brought, pages)
	}
	data := segments(e, written)
	last := int64(0) // of the tables
	for _, name := range append(tables, ".gnu.version_d") {
		if s := e.Section(name); s != nil {
			last = max(last, int64(s.Offset+s.Size))
		}
	}
	for _, s := range e.Progs {
		if s.Type == elf.PT_LOAD && s.Off == 0 && s.Flags&elf.PF_X == 0 {
			last = max(last, int64(s.Filesz))
		}
	}
	var strs Range
	if s := e.Section(".dynstr"); s != nil {
		strs = Range{int64(s.Offset), int64(s.Size)}
	}
	code := 0
	for _, x := range r.brought {
		if x.Size <= maxName && x.Off+x.Size > maxPart && missing(x, strs) == 0 { // a name that is far behind
			continue
		}
		if x.Off == 0 && x.Size <= last || slices.ContainsFunc(data, func(d Range) bool { return d.Off == x.Off && x.Size <= d.Size }) {
			continue
		}
		code++
		at, ok := slices.BinarySearch(pages, x.Off)
		if !ok {
			t.Errorf("%v is asked for without reason", x)
			continue
		}
		for at+1 < len(pages) && pages[at+1] < x.Off+x.Size && pages[at+1]-pages[at] <= near {
			at++
		}
		if x.Off+x.Size > pages[at]+4096 {
			t.Errorf("%v is asked for, what runs early ends at %d", x, pages[at]+4096)
		}
	}
	if code > min(len(pages), maxCode) {
		t.Errorf("%d parts of code for %d pages", code, len(pages))
	}
	return len(pages)
}

func size(t *testing.T, r *recorder) int64 {
	t.Helper()
	s, err := r.ReaderAt.(*os.File).Stat()
	if err != nil {
		t.Fatal(err)
	}
	return s.Size()
}

func TestInterpreter(t *testing.T) {
	long := strings.Repeat("x", 300)
	for _, c := range []struct {
		head string
		want []string
	}{
		{"#!/bin/sh\necho", []string{"/bin/sh"}},
		{"#! /bin/sh -e\n", []string{"/bin/sh"}},
		{"#!\t /bin/sh\t-e x y\n", []string{"/bin/sh"}},
		{"#!/bin/sh", []string{"/bin/sh"}},
		{"#!/bin/sh\r\necho\r\n", []string{"/bin/sh"}},
		{"#!/usr/bin/env python3\n", []string{"/usr/bin/env", "python3"}},
		{"#!/usr/bin/env  python3 -u\n", []string{"/usr/bin/env", "python3"}},
		{"#!/usr/bin/env -S python3 -u\n", []string{"/usr/bin/env", "python3"}},
		{"#!/usr/bin/env -S\n", []string{"/usr/bin/env"}},
		{"#!/usr/bin/env\n", []string{"/usr/bin/env"}},
		{"#!/opt/env/python -S x\n", []string{"/opt/env/python"}},
		{"#!/" + long + "\n", []string{"/" + long[:255]}},
		{"#!/bin/sh" + long + long, []string{"/bin/sh" + long[:249]}},
		{"#!bin/sh\n", nil},
		{"#!env python\n", nil},
		{"#!\n/bin/sh\n", nil},
		{"#!  \t \n", nil},
		{"#!", nil},
		{"#", nil},
		{"", nil},
		{" #!/bin/sh\n", nil},
		{"#/bin/sh\n", nil},
		{elf.ELFMAG + "#!/bin/sh\n", nil},
	} {
		if got := Interpreter([]byte(c.head)); !slices.Equal(got, c.want) {
			t.Errorf("%.50q: %q, want %q", c.head, got, c.want)
		}
	}
	for head, want := range map[string]bool{elf.ELFMAG: true, elf.ELFMAG + "\x02\x01": true, "\x7fEL": false, "": false, "#!/bin/sh": false} {
		if IsELF([]byte(head)) != want {
			t.Errorf("%q: want %v", head, want)
		}
	}
}
