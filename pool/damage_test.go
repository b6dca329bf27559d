package pool

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/shale-image/shale/chunk"
)

// Any bit of any file but data flipped, any file cut off anywhere: an error,
// or chunks that are gone, but never wrong data; and the pool can be used.
func TestDamage(t *testing.T) {
	dir := filepath.Join(quickDir(t), "pool")
	p := open(t, dir)
	const n, stored = 8, 5
	es := entries(0, n)
	s := create(t, p, es)
	other := create(t, p, entries(n, n+2)) // unharmed
	store(t, other, other.table.entry(0).Off, content(entryNumber(other.table.entry(0), n, n+2)))
	for i := range stored {
		store(t, s, es[i].Off, content(i))
		if i == 2 {
			if err := p.Sync(); err != nil { // so that some is durable, some only live
				t.Fatal(err)
			}
		}
	}
	files := map[string][]byte{}
	for _, name := range []string{"table", "present", "data"} {
		files[name] = read(t, s, name)
	}
	p.closeFiles()
	restore := func() {
		os.RemoveAll(s.dir)
		if err := os.Mkdir(s.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, b := range files {
			if err := os.WriteFile(file(s, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	most, opened := 0, 0
	try := func(name string, b []byte, how string, at int) {
		restore()
		var err error
		if b == nil {
			err = os.Remove(file(s, name))
		} else {
			err = os.WriteFile(file(s, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		p, err := Open(dir)
		if err != nil {
			t.Fatalf("%s %s at %d: %v", name, how, at, err)
		}
		got := check(t, p, 0, n+2)
		for i := stored; i < n; i++ {
			if got[i] {
				t.Fatalf("%s %s at %d: chunk %d came from nowhere", name, how, at, i)
			}
		}
		if len(check(t, p, n, n+2)) != 1 {
			t.Fatalf("%s %s at %d: the other segment suffered", name, how, at)
		}
		if len(p.Damage()) == 0 {
			opened++
			most = max(most, len(got)-1)
		} else if _, _, ok := lookup(p, es[0].Digest, es[0].Size); ok || !errors.Is(errors.Join(p.Damage()...), chunk.ErrCorrupt) && b != nil {
			t.Fatalf("%s %s at %d: set aside: %v", name, how, at, p.Damage())
		}
		if name == "present" && len(p.Damage()) != 0 {
			t.Fatalf("present %s at %d: nothing depends on it: %v", how, at, p.Damage())
		}
		p.closeFiles()
	}
	boot := bootID
	for _, again := range []bool{false, true} {
		if again {
			reboot(t)
		}
		for _, name := range []string{"table", "present"} {
			for at := range files[name] {
				if at > 64 && at < pageSize-8 && at%61 != 0 && name == "present" {
					continue // zeros of the header
				}
				b := append([]byte(nil), files[name]...)
				b[at] ^= 1 << (at % 8)
				try(name, b, "flipped", at)
				b[at] = ^files[name][at] // eight granules
				try(name, b, "inverted", at)
				try(name, files[name][:at], "cut", at)
			}
			try(name, append(files[name], 0), "longer", 0)
			try(name, make([]byte, len(files[name])), "zeroed", 0)
			try(name, nil, "removed", 0)
		}
		try("data", files["data"][:len(files["data"])-1], "cut", 0)
		try("data", append(files["data"], 0), "longer", 0)
		try("data", nil, "removed", 0)
	}
	bootID = boot
	if most != stored || opened == 0 {
		t.Errorf("at most %d chunks survived, want %d: they could have been read again", most, stored)
	}
	// A table that is damaged takes its segment with it, not the pool.
	restore()
	os.WriteFile(file(s, "table"), nil, 0o600)
	p = open(t, dir)
	if _, err := os.Stat(s.dir + ".bad"); err != nil || len(p.Damage()) != 1 {
		t.Errorf("not set aside: %v, %v", err, p.Damage())
	}
	if again := create(t, p, entries(0, n)); again.ID != s.ID {
		t.Error("linked again, images would not find their segment")
	}
}

// closeFiles ends the use of a pool as a kill does.
func (p *Pool) closeFiles() {
	for _, s := range p.all() {
		s.close()
	}
	p.segments, p.order = nil, nil
}

func entryNumber(e Entry, from, to int) int {
	for i := from; i < to; i++ {
		if digest(i) == e.Digest {
			return i
		}
	}
	return -1
}

// Tables with a right checksum that nobody should have written.
func TestTableRefuses(t *testing.T) {
	for name, spoil := range map[string]func(es []Entry, size *int64){
		"overlap":   func(es []Entry, _ *int64) { es[1].Off = es[0].Off },
		"beyond":    func(es []Entry, _ *int64) { es[1].Off = 1 << 40 },
		"empty":     func(es []Entry, _ *int64) { es[1].Size = 0 },
		"large":     func(es []Entry, _ *int64) { es[1].Size = chunk.MaxSize + 1 },
		"algorithm": func(es []Entry, _ *int64) { es[1].Digest.Algorithm = chunk.Origin + 1 },
		"unaligned": func(_ []Entry, size *int64) { *size++ },
		"huge":      func(_ []Entry, size *int64) { *size = MaxSegment + chunk.Block },
		"negative":  func(_ []Entry, size *int64) { *size = -chunk.Block },
	} {
		es := entries(0, 3)
		size, err := place(es)
		if err != nil {
			t.Fatal(err)
		}
		spoil(es, &size)
		b, err := encodeTable(es, size, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseTable(b); !errors.Is(err, chunk.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
