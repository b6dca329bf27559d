package pool

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"lukechampine.com/blake3"

	"github.com/shale-image/shale/chunk"
)

// FuzzTable: whatever a table with a right checksum says, what is accepted can
// be used, and is what encodeTable writes.
func FuzzTable(f *testing.F) {
	es := entries(0, 3)
	size, _ := place(es)
	b, _ := encodeTable(es, size, 7)
	f.Add(b[:len(b)-sumSize])
	f.Add(b[:headerSize])
	f.Fuzz(func(t *testing.T, b []byte) {
		parseTable(b)
		sum := blake3.Sum256(b)
		b = append(b[:len(b):len(b)], sum[:]...)
		tab, err := parseTable(b)
		if err != nil {
			return
		}
		es := make([]Entry, tab.count)
		for i := range es {
			es[i] = tab.entry(i)
			if e, ok, _ := tab.find(&es[i], i/2); !ok || e != es[i] {
				t.Fatalf("entry %d is not found", i)
			}
			if es[i].Off+int64(es[i].Size) > tab.size {
				t.Fatalf("entry %d ends behind the segment", i)
			}
		}
		again, err := encodeTable(es, tab.size, binary.LittleEndian.Uint32(b[12:]))
		if err != nil {
			t.Fatal(err)
		}
		clearSpare := func(b []byte) []byte {
			b = bytes.Clone(b[:len(b)-sumSize])
			clear(b[24:headerSize])
			for i := headerSize; i < len(b); i += recordSize {
				clear(b[i+33 : i+36])
			}
			return b
		}
		if !bytes.Equal(clearSpare(again), clearSpare(b)) {
			t.Fatal("it does not encode to what it was")
		}
	})
}

// FuzzPresence: whatever a record file says, only what is in doubt or present
// in it is believed, and every chunk that is believed after another boot was
// durable in it or has the right digest.
func FuzzPresence(f *testing.F) {
	const granules = 100
	boot := "01234567-89ab-cdef-0123-456789abcdef"
	good := make([]byte, presenceSize(granules))
	copy(good, presenceHeader(1, granules, boot))
	encodeRecord(good[pageSize:], 1, 0, 0xff, 0x0f)
	encodeRecord(good[pageSize+recSize:], 1, 1, 1<<35, 1<<35)
	f.Add(good, true)
	beyond := bytes.Clone(good)
	encodeRecord(beyond[pageSize+recSize:], 1, 1, 1<<60, 0)
	f.Add(beyond, true)
	f.Add(good[:pageSize], false)
	f.Add([]byte{}, false)
	name := filepath.Join(f.TempDir(), "present")
	f.Fuzz(func(t *testing.T, b []byte, same bool) {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		now := boot
		if !same {
			now = "another" + boot[7:]
		}
		p, doubt, ok, err := openPresence(name, 1, granules, now)
		if err != nil {
			t.Fatal(err)
		}
		defer p.file.Close()
		for g := range int64(granules) {
			w, bit := g/64, uint64(1)<<(g%64)
			if p.durable[w]&bit != 0 && !p.has(g, g+1) || doubt[w]&bit != 0 && p.has(g, g+1) {
				t.Fatal("bits contradict each other")
			}
			if p.has(g, g+1) && p.durable[w]&bit == 0 && !bytes.Contains(b[:pageSize], []byte(now)) {
				t.Fatal("believed without a reason")
			}
		}
		if p.count() > granules {
			t.Fatal("there are more granules than there are")
		}
		if ok {
			return
		}
		if err := p.settle(doubt, now); err != nil {
			t.Fatal(err)
		}
		again, _, ok, err := openPresence(name, 1, granules, now)
		if err != nil || !ok || again.count() != p.count() {
			t.Fatalf("after settling: %v, %v", ok, err)
		}
		again.file.Close()
	})
}

func BenchmarkStore(b *testing.B) {
	p := open(b, b.TempDir())
	data := make([]byte, chunk.Size)
	s := create(b, p, []Entry{{Digest: chunk.Sum(chunk.BLAKE3, data), Size: chunk.Size}, {Digest: digest(1), Size: chunk.Size}})
	b.SetBytes(chunk.Size)
	for b.Loop() {
		store(b, s, 0, data)
	}
}

// BenchmarkLookup looks up 100,000 chunks that 50 segments of 20,000 do not have.
func BenchmarkLookup(b *testing.B) {
	p := open(b, b.TempDir())
	some := func(from, n int) []Entry {
		es := make([]Entry, n)
		for i := range es {
			es[i] = Entry{Digest: chunk.Sum(chunk.BLAKE3, binary.LittleEndian.AppendUint64(nil, uint64(from+i))), Size: 1}
		}
		return es
	}
	const segments, each = 50, 20_000
	for s := range segments {
		create(b, p, some(s*each, each))
	}
	wanted := some(segments*each, 100_000)
	for b.Loop() {
		p.Lookup(wanted)
	}
}
