package keeper

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestJournalTorn: whatever the end of a write that was cut off, the version before, or
// the new one, is there.
func TestJournalTorn(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	content := func() []byte {
		p, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	if _, err := readJournal(f); err == nil {
		t.Error("an empty journal is read")
	}
	before := content()
	for i := range 6 {
		m := mountOf("a")
		m.Show = json.RawMessage(`"` + strings.Repeat(string(rune('a'+i)), 100*(7-i)) + `"`)
		if err := writeJournal(f, &m); err != nil {
			t.Fatal(err)
		}
		after := content()
		got, err := readJournal(f)
		if err != nil || !bytes.Equal(got.Show, m.Show) || got.ID != "a" || !got.Settled {
			t.Fatalf("%d: %+v, %v", i, got, err)
		}
		// Cut off at each byte of the place that was written: before it the two are the same.
		from := 0
		for from < min(len(before), len(after)) && before[from] == after[from] {
			from++
		}
		for cut := max(from, journalPlace*(i%2)); i > 0 && cut < len(after) && cut < from+1500; cut++ {
			torn := bytes.Clone(after[:cut])
			if cut < len(before) {
				torn = append(torn, before[cut:]...)
			}
			got, err := readJournal(bytes.NewReader(torn))
			if err != nil || len(got.Show) < 100 {
				t.Fatalf("%d, cut at %d: %+v, %v", i, cut, got, err)
			}
		}
		before = after
	}
}

func FuzzJournal(f *testing.F) {
	file, err := os.Create(filepath.Join(f.TempDir(), "journal"))
	if err != nil {
		f.Fatal(err)
	}
	defer file.Close()
	m := mountOf("a")
	if err := writeJournal(file, &m); err != nil {
		f.Fatal(err)
	}
	p, err := os.ReadFile(file.Name())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		if m, err := readJournal(bytes.NewReader(p)); err == nil && len(m.Files) != 0 {
			t.Error("files out of nowhere")
		}
	})
}
