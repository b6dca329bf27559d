package trace

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/shale-image/shale/chunk"
)

// drawing is what is in a picture, as an XML parser sees it.
type drawing struct {
	texts         []string
	ticks, waits  int
	width, height string
}

func draw(t *testing.T, tr *Trace, title string) (out drawing) {
	t.Helper()
	var b strings.Builder
	if err := tr.SVG(&b, title); err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(strings.NewReader(b.String()))
	for {
		tok, err := d.Token()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, b.String())
		}
		switch x := tok.(type) {
		case xml.StartElement:
			attr := map[string]string{}
			for _, a := range x.Attr {
				attr[a.Name.Local] = a.Value
			}
			switch {
			case x.Name.Local == "svg":
				out.width, out.height = attr["width"], attr["height"]
			case x.Name.Local == "path":
				out.ticks += strings.Count(attr["d"], "M")
			case x.Name.Local == "rect" && attr["fill-opacity"] == "0.8":
				out.waits++
			}
		case xml.CharData:
			if s := strings.TrimSpace(string(x)); s != "" {
				out.texts = append(out.texts, s)
			}
		}
	}
}

func TestSVG(t *testing.T) {
	tr := read(100, "ld/0", "sh/0", "sh/7") // each waited 1 ms, at 0, 1 and 2 ms
	tr.Blocks[2].Wait = 0
	tr.Blocks[1].Path = `<evil>&"/` + strings.Repeat("x", 100) + "/<end>"
	got := draw(t, tr, "a<b")
	all := strings.Join(got.texts, "\n")
	for _, want := range []string{"a<b", "1 run: 3 files, 3 blocks, 0.0 MB read, waited 2.0 ms", "waited for", "ld", "sh", "…xx", "/<end>", "16 KiB, waited 1.0 ms", "16 KiB", "2 ms"} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in %s", want, all)
		}
	}
	if got.waits != 2 || got.ticks != 1 || got.height != fmt.Sprint(svgTop+3*svgRow+40) {
		t.Errorf("%+v", got)
	}
}

// Much is bounded, nothing is no trouble.
func TestSVGBounds(t *testing.T) {
	tr := read(0)
	for i := range 3 * svgRows {
		for k := range 3 {
			tr.Blocks = append(tr.Blocks, Block{Chunk: digest(fmt.Sprint(i)), Size: chunk.Size, Index: k, Path: fmt.Sprint("f", i), At: maxTime * time.Millisecond / 2000})
		}
	}
	got := draw(t, tr, "many")
	if n := len(got.texts); n > 3*svgRows || !strings.Contains(strings.Join(got.texts, "\n"), fmt.Sprintf("and %d more files", 2*svgRows)) || got.ticks != svgRows {
		t.Errorf("%d texts, %d ticks", n, got.ticks)
	}
	draw(t, read(0), "none")
	if err := read(0).SVG(broken{}, "x"); !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestByFile(t *testing.T) {
	tr := read(2, "ld/0", "sh/0", "ld/3", "sh/1")
	tr.Blocks[1].Others, tr.Blocks[1].Also = 3, []string{"ash"}
	tr.Blocks[3].Size = chunk.Block + 5
	all := tr.ByFile()
	if len(all) != 2 || all[0].Path != "ld" || all[1].Path != "sh" {
		t.Fatalf("%+v", all)
	}
	ld, sh := all[0], all[1]
	if ld.At != 0 || ld.Wait != 40*time.Microsecond || ld.Bytes != 2*chunk.Block || ld.Shared() || len(ld.Blocks) != 2 {
		t.Errorf("%+v", ld)
	}
	if sh.At != time.Millisecond || sh.Bytes != chunk.Block+5 || sh.Others != 3 || sh.Also[0] != "ash" || sh.Shared() {
		t.Errorf("%+v", sh)
	}
	sh.Blocks = sh.Blocks[:1]
	if !sh.Shared() || tr.Wait() != 80*time.Microsecond {
		t.Errorf("%v, %v", sh.Shared(), tr.Wait())
	}
}
