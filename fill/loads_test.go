package fill

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/memblob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Where the parts of an object lie; addresses are offsets.
const (
	objSymbols = 0x8000     // strings and relocations, up to objCode
	objCode    = 2 * cut    // constants and code
	objCodeLen = 24 * cut   // bytes of it
	objEarly   = 10*cut + 8 // in it: the constructor
	objData    = objCode + objCodeLen
	objDataLen = cut + 100
)

// executable makes a program or library that is linked with others.
func executable(seed uint64, interp, search string, needed ...string) []byte {
	p := content(seed, objData+objDataLen)
	le := binary.LittleEndian
	strtab := []byte{0}
	name := func(s string) uint64 {
		off := len(strtab)
		strtab = append(append(strtab, s...), 0)
		return uint64(off)
	}
	var dyn []elf.Dyn64
	for _, s := range needed {
		dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: name(s)})
	}
	if search != "" {
		dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_RUNPATH), Val: name(search)})
	}
	const rela, array = objSymbols + 0x4000, objData + 0x2000
	dyn = append(dyn,
		elf.Dyn64{Tag: int64(elf.DT_STRTAB), Val: objSymbols}, elf.Dyn64{Tag: int64(elf.DT_STRSZ), Val: uint64(len(strtab))},
		elf.Dyn64{Tag: int64(elf.DT_RELA), Val: rela}, elf.Dyn64{Tag: int64(elf.DT_RELASZ), Val: 24},
		elf.Dyn64{Tag: int64(elf.DT_INIT_ARRAY), Val: array}, elf.Dyn64{Tag: int64(elf.DT_INIT_ARRAYSZ), Val: 8},
		elf.Dyn64{})
	parts := []elf.Prog64{
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R), Filesz: objCode},
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Off: objCode, Vaddr: objCode, Filesz: objCodeLen},
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W), Off: objData, Vaddr: objData, Filesz: objDataLen},
		{Type: uint32(elf.PT_DYNAMIC), Off: objData, Vaddr: objData, Filesz: uint64(16 * len(dyn))},
	}
	if interp != "" {
		parts = append(parts, elf.Prog64{Type: uint32(elf.PT_INTERP), Off: 0x800, Filesz: uint64(len(interp) + 1)})
		copy(p[0x800:], interp+"\x00")
	}
	h := elf.Header64{Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Phoff: 64, Phentsize: 56, Phnum: uint16(len(parts))}
	copy(h.Ident[:], elf.ELFMAG+string([]byte{byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)}))
	put := func(off int, v any) {
		if _, err := binary.Encode(p[off:], le, v); err != nil {
			panic(err)
		}
	}
	put(0, &h)
	put(64, parts)
	put(objData, dyn)
	put(rela, &elf.Rela64{Off: array, Info: uint64(elf.R_X86_64_RELATIVE), Addend: objEarly})
	copy(p[objSymbols:], strtab)
	binary.LittleEndian.PutUint64(p[objData+objDataLen-8:], seed) // no two are equal at their ends
	return p
}

// named gives the file that was added last a path.
func (b *builder) named(path string) {
	name := fmt.Sprintf("f%05d", b.number)
	ino := b.tree.Root.Children[name]
	delete(b.tree.Root.Children, name)
	b.at(path, ino)
}

// symlink adds a symbolic link.
func (b *builder) symlink(path, target string) {
	b.at(path, &index.Inode{Mode: syscall.S_IFLNK | 0o777, Target: target, Size: int64(len(target))})
}

// at puts an inode at a path, and makes the directories on the way.
func (b *builder) at(path string, ino *index.Inode) {
	dir := b.tree.Root
	names := strings.Split(path, "/")
	for _, name := range names[:len(names)-1] {
		if dir.Children[name] == nil {
			dir.Children[name] = &index.Inode{Mode: syscall.S_IFDIR | 0o755, Children: map[string]*index.Inode{}}
		}
		dir = dir.Children[name]
	}
	dir.Children[names[len(names)-1]] = ino
}

// programs make an image with a program and what it needs. Files are in the order of the paths
// that are returned; what the program needs is marked.
func programImage(n *node) (x *img, paths []string, needed map[string]bool) {
	b := newBuilder(chunk.None)
	b.blob()
	needed = map[string]bool{}
	seed := uint64(1000)
	add := func(path string, need bool, interp, search string, names ...string) {
		b.file(executable(seed, interp, search, names...))
		b.named(path)
		paths, needed[path] = append(paths, path), need
		seed++
	}
	const lib = "usr/lib/x86_64-linux-gnu/"
	add("opt/app/bin/prog", true, "/lib64/ld.so", "$ORIGIN/../lib:/nowhere", "liba.so.1", "libown.so", "missing.so", "../evil.so")
	add(lib+"ld.so.2", true, "", "")
	add(lib+"liba.so.1.2", true, "", "", "libb.so.1", "liba.so.1")
	add(lib+"libb.so.1", true, "", "", "libdeep.so")
	add("opt/app/lib/libown.so", true, "", "$ORIGIN/private", "libdeep.so")
	add("opt/app/lib/private/libdeep.so", true, "", "", "libb.so.1")
	add(lib+"libother.so.1", false, "", "")
	add("opt/other/lib/libown.so", false, "", "")
	b.symlink("lib", "usr/lib")
	b.symlink("lib64/ld.so", "../usr/lib/x86_64-linux-gnu/ld.so.2")
	b.symlink(lib+"liba.so.1", "liba.so.1.2")
	b.file([]byte("#!/usr/bin/env prog\n"))
	b.named("script")
	paths = append(paths, "script")
	b.symlink("usr/bin/prog", "/opt/app/bin/prog")
	return n.image(b), paths, needed
}

// start returns where the file number i of an image begins, of those that were added.
func (x *img) start(t testing.TB, i int) int64 {
	t.Helper()
	for k := range x.linked.Chunks() {
		if c := x.linked.Chunk(k); !c.Next {
			if i == 0 {
				return c.Flat
			}
			i--
		}
	}
	t.Fatal("no such file")
	return 0
}

// Once the first page of a program is read, all that ld.so reads comes, of it and of what
// is loaded with it, and no more.
func TestLoads(t *testing.T) {
	for _, first := range []string{"opt/app/bin/prog", "script"} {
		n := newNode(t, Options{Window: 1, Neighbours: 1})
		x, paths, needed := programImage(n)
		at := x.start(t, slices.Index(paths, first))
		must(t, x.read(t.Context(), t, at, 20))
		x.settle()
		n.asked()
		here := map[int64]bool{}
		for _, i := range x.present() {
			here[x.linked.Chunk(i).Flat] = true
		}
		for i, path := range paths[:len(paths)-1] {
			var want []int64
			if needed[path] {
				want = []int64{0, cut, objEarly / cut * cut, objData, objData + cut}
			}
			for off := int64(0); off < objData+objDataLen; off += cut {
				if got, want := here[x.start(t, i)+off], slices.Contains(want, off); got != want {
					t.Errorf("%s read: %s at %d is here: %v, want %v", first, path, off, got, want)
				}
			}
			for _, off := range want { // as ld.so would
				must(t, x.read(t.Context(), t, x.start(t, i)+off, 100))
			}
		}
		if more := n.asked(); len(more) > 0 {
			t.Errorf("%s: %d requests when ld.so read all", first, len(more))
		}
		if s := x.Stats(); s.Errors > 0 || s.Stalls > 1 {
			t.Errorf("%+v", s)
		}
	}
}

// The kernel that reads itself (fanotify) starts the same.
func TestLoadsBrought(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1})
	x, paths, _ := programImage(n)
	must(t, x.Bring(t.Context(), x.start(t, slices.Index(paths, "opt/app/bin/prog")), 4*kib))
	x.settle()
	if got := len(x.present()); got != 6*5 {
		t.Errorf("%d chunks came, want 5 of each of 6 files", got)
	}
}

// A start pack knows better, and where nobody had to wait there is nothing to do.
func TestLoadsIdle(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1})
	x, _, _ := programImage(n)
	x.expect(0, 1)
	must(t, x.expected(0))
	read := func() int {
		must(t, x.read(t.Context(), t, x.start(t, 0), 4*kib))
		x.settle()
		return len(x.loads.seen)
	}
	if got := read(); got > 0 {
		t.Errorf("nobody has waited: %d files were looked into", got)
	}
	x.stats.stalls.Store(1)
	x.landing.Store(&landing{credit: credit{left: mostCredit}})
	if got := read(); got > 0 {
		t.Errorf("a start pack arrives: %d files were looked into", got)
	}
	x.landing.Store(nil)
	if got := read(); got != 6 {
		t.Errorf("%d files were looked into, want 6", got)
	}
}

// What a program loads comes before anybody has read of it, if it is known that it will
// run, and was not run before.
func TestRuns(t *testing.T) {
	for name, want := range map[string]int{
		"/opt/app/bin/prog": 6 * 5, "prog": 6 * 5, "/script": 6*5 + 1,
		"script": 0, "nothing": 0, "/nothing": 0, "opt/app/bin/prog": 0, "/opt": 0, "": 0,
	} {
		n := newNode(t, Options{Window: 1, Neighbours: 1})
		x, _, _ := programImage(n)
		runs := func() {
			x.Runs(name, []string{"/nowhere", "/usr/bin"})
			x.settle()
		}
		runs()
		if got := len(x.present()); got != want {
			t.Errorf("%q: %d chunks came, want %d", name, got, want)
		}
		if s := x.Stats(); s.Stalls > 0 || s.ReadBytes > 0 || s.Errors > 0 {
			t.Errorf("%q: %+v", name, s)
		}
		n.asked()
		x.loads.seen = nil // as if the image was mounted again
		runs()
		if more := n.asked(); len(more) > 0 {
			t.Errorf("%q: %d requests the second time", name, len(more))
		}
	}
	n := newNode(t, Options{Window: 1, Neighbours: 1})
	x, _, _ := programImage(n)
	x.expect(0, 1)
	x.settle()
	x.Runs("/opt/app/bin/prog", nil)
	x.settle()
	if got := len(x.present()); got != 1 {
		t.Errorf("%d chunks are here of what was run before", got)
	}
}

// Small libraries come as a whole, by one request.
func TestLoadsSmall(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1})
	b := newBuilder(chunk.None)
	b.blob()
	b.file(executable(1, "", "", "libsmall.so"))
	small := executable(2, "", "")
	copy(small[64+56:], make([]byte, 56)) // without the code
	b.file(append(small[:objCode:objCode], small[objData:]...))
	b.named("lib/libsmall.so")
	x := n.image(b)
	must(t, x.read(t.Context(), t, x.start(t, 0), 16))
	x.settle()
	at, whole := x.start(t, 1), 0
	for _, i := range x.present() {
		if x.linked.Chunk(i).Flat >= at {
			whole++
		}
	}
	second := x.linked.Stored(x.linked.Chunk(x.linked.Find(at))).Offset
	requests := 0
	for _, a := range n.asked() {
		if a.off >= second {
			requests++
		}
	}
	if whole != 4 || requests != 1 {
		t.Errorf("%d chunks of 4 came by %d requests", whole, requests)
	}
}

// Who reads only headers, of many files, is noticed.
func TestLoadsHeaders(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1})
	b := newBuilder(chunk.None)
	b.blob()
	const files = maxUnread + 20
	for i := range files {
		b.file(executable(uint64(i), "", ""))
	}
	x := n.image(b)
	for i := range files {
		must(t, x.read(t.Context(), t, x.start(t, i), 4*kib))
		x.settle()
	}
	if got := len(x.present()); got != files+maxUnread*4 {
		t.Errorf("%d chunks came, want one of each of %d files, and 5 of %d", got, files, maxUnread)
	}
	must(t, x.read(t.Context(), t, x.start(t, 1)+objData, 4*kib)) // what is loaded is not
	before := len(x.present())
	must(t, x.read(t.Context(), t, x.start(t, files-1), 4*kib))
	x.settle()
	if got := len(x.present()) - before; got != 4 {
		t.Errorf("%d chunks came of a file after another was loaded, want 4", got)
	}
	for i := range x.loads.unread { // and what was not is forgotten in the end
		x.loads.unread[i].since = time.Now().Add(-unreadTime)
	}
	before = len(x.present())
	must(t, x.read(t.Context(), t, x.start(t, files-2), 4*kib))
	x.settle()
	if got := len(x.present()) - before; got != 4 {
		t.Errorf("%d chunks came of a file when the others were forgotten, want 4", got)
	}
}

// What could not be fetched ahead is fetched when it is read, as if nobody had tried.
func TestLoadsFail(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1, Requests: 1})
	x, paths, _ := programImage(n)
	program := x.start(t, 0)
	stored := x.linked.Stored(x.linked.Chunk(x.linked.Find(program)))
	n.setFault(func(_ context.Context, _ blob.Ref, off, _ int64) *memblob.Fault {
		if off == stored.Offset {
			return nil
		}
		return &memblob.Fault{Err: fmt.Errorf("broken: %w", blob.ErrUnavailable)}
	})
	must(t, x.read(t.Context(), t, program, 16))
	x.settle()
	times := map[asked]int{}
	for _, a := range n.asked() {
		if times[a]++; times[a] > 1 {
			t.Errorf("%+v was asked for again", a)
		}
	}
	if len(times) < 3 {
		t.Errorf("%d requests", len(times))
	}
	if s := x.Stats(); s.Errors > 0 {
		t.Errorf("nobody read what could not be fetched: %+v", s)
	}
	n.setFault(nil)
	for i := range paths {
		must(t, x.read(t.Context(), t, x.start(t, i), 16))
	}
	must(t, x.read(t.Context(), t, program+objData, 4*kib))
}

// Who reads what a request was made for that hangs, for nobody, asks for it in the end.
func TestLoadsHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Options{Window: 1, Neighbours: 1})
		x, _, _ := programImage(n)
		program := x.start(t, 0)
		data := x.linked.Stored(x.linked.Chunk(x.linked.Find(program + objData))).Offset
		var times atomic.Int32
		n.setFault(func(ctx context.Context, _ blob.Ref, off, _ int64) *memblob.Fault {
			if off != data || times.Add(1) > 1 {
				return nil
			}
			<-ctx.Done()
			return &memblob.Fault{Err: ctx.Err()}
		})
		must(t, x.read(t.Context(), t, program, 16))
		for times.Load() == 0 {
			time.Sleep(time.Millisecond)
		}
		began := time.Now()
		must(t, x.read(t.Context(), t, program+objData, 4*kib))
		if waited := time.Since(began); waited > guessedWait || times.Load() != 2 {
			t.Errorf("waited %v, asked %d times", waited, times.Load())
		}
		x.close(t)
	})
}

// An image is closed while libraries are on their way from a source that hangs.
func TestLoadsClose(t *testing.T) {
	n := newNode(t, Options{Window: 1, Neighbours: 1})
	x, _, _ := programImage(n)
	program := x.start(t, 0)
	stored := x.linked.Stored(x.linked.Chunk(x.linked.Find(program)))
	hangs := make(chan struct{})
	var once sync.Once
	n.setFault(func(ctx context.Context, _ blob.Ref, off, _ int64) *memblob.Fault {
		if off == stored.Offset {
			return nil
		}
		once.Do(func() { close(hangs) })
		<-ctx.Done()
		return &memblob.Fault{Err: ctx.Err()}
	})
	must(t, x.read(t.Context(), t, program, 16))
	<-hangs
	x.close(t)
}

// Any bytes may stand in a file that begins as one.
func FuzzLoads(f *testing.F) {
	f.Add(executable(1, "/lib/ld.so", "$ORIGIN", "f00001", "f00000"))
	f.Add(append([]byte(elf.ELFMAG), bytes.Repeat([]byte{0xff}, 200)...))
	f.Add([]byte("#!/f00000"))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) == 0 {
			return
		}
		n := newNode(t, Options{})
		b := newBuilder(chunk.None)
		b.blob()
		b.file(p)
		b.files(3*cut, 100)
		x := n.image(b)
		x.all(t)
		x.settle()
		x.close(t)
	})
}

// Of a library's code more comes the more of it is read.
func TestLoadsWindow(t *testing.T) {
	n := newNode(t, Options{Window: 16 * cut, Neighbours: cut})
	b := newBuilder(chunk.None)
	b.blob()
	b.file(executable(1, "", "", "library"))
	b.files(16 * cut) // what comes along
	b.file(executable(2, "", ""))
	b.named("lib/library")
	x := n.image(b)
	at := x.start(t, 2)
	must(t, x.read(t.Context(), t, x.start(t, 0), 16))
	x.settle()
	came := func(off int64) int {
		before := len(x.present())
		must(t, x.read(t.Context(), t, at+off, 4*kib))
		x.settle()
		return len(x.present()) - before
	}
	// The constructor is here, and was not read.
	if got := came(objCode + 2*cut); got != 1 {
		t.Errorf("%d chunks came of code of which nothing was read", got)
	}
	if got := came(objCode + 4*cut); got != 3 {
		t.Errorf("%d chunks came after one was read, want 3", got)
	}
	if got := came(objCode + 16*cut); got < 4 {
		t.Errorf("%d chunks came after two were read", got)
	}
}
