package trace

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Bounds on what Decode takes.
const (
	MaxEncoded = 64 << 20 // bytes
	maxBlocks  = 1 << 18  // 4 GiB of content
	maxRuns    = 1 << 12
	maxPath    = 4096
)

const (
	format  = "shale-trace"
	version = 1
)

// encoded is the JSON form. Blocks that follow each other in a chunk, and were
// read by the same number of runs, are one touch.
type encoded struct {
	Format   string  `json:"format"`
	Version  int     `json:"version"`
	Manifest string  `json:"manifest"`
	Runs     []Run   `json:"runs"`
	Touches  []touch `json:"touches"`
}

type touch struct {
	Path   string  `json:"path"`
	Offset int64   `json:"offset"` // in the file, of the first block
	Others int     `json:"others,omitempty"`
	Chunk  string  `json:"chunk"`
	Size   uint32  `json:"size"`
	Block  int     `json:"block"` // the first, in the chunk
	Blocks int     `json:"blocks"`
	At     float64 `json:"at_ms"`
	Wait   float64 `json:"wait_ms"` // all of them
	Runs   int     `json:"runs"`
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()/10) / 100 }

func duration(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

// Encode writes a trace as JSON, a touch a line.
func (t *Trace) Encode(w io.Writer) error {
	head, err := json.Marshal(encoded{format, version, t.Manifest, t.Runs, []touch{}})
	if err != nil {
		return err
	}
	var b bytes.Buffer
	b.Write(bytes.TrimSuffix(head, []byte("]}")))
	for i, k := range t.touches() {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteByte('\n')
		js, err := json.Marshal(k)
		if err != nil {
			return err
		}
		b.Write(js)
	}
	b.WriteString("\n]}\n")
	_, err = w.Write(b.Bytes())
	return err
}

func (t *Trace) touches() (out []touch) {
	var end Block // the last block of the last touch
	for _, b := range t.Blocks {
		if n := len(out); n > 0 && b.Chunk == end.Chunk && b.Index == end.Index+1 && b.Path == end.Path &&
			b.Offset == end.Offset+chunk.Block && b.Runs == end.Runs && b.Others == end.Others {
			out[n-1].Blocks++
			out[n-1].Wait += ms(b.Wait)
		} else {
			out = append(out, touch{b.Path, b.Offset, b.Others, b.Chunk.String(), b.Size, b.Index, 1, ms(b.At), ms(b.Wait), b.Runs})
		}
		end = b
	}
	return out
}

// Decode reads what Encode wrote. Errors wrap index.ErrCorrupt, ErrLimit or
// ErrUnsupported and name what was read.
func Decode(r io.Reader, name string) (*Trace, error) {
	p, err := io.ReadAll(io.LimitReader(r, MaxEncoded+1))
	if err != nil {
		return nil, err
	}
	if len(p) > MaxEncoded {
		return nil, index.Errorf(index.ErrLimit, name, -1, "a trace of more than %d bytes", MaxEncoded)
	}
	var e encoded
	if err := json.Unmarshal(p, &e); err != nil {
		off := int64(-1)
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			off = syntax.Offset
		}
		return nil, index.Errorf(index.ErrCorrupt, name, off, "%v", err)
	}
	switch {
	case e.Format != format:
		return nil, index.Errorf(index.ErrCorrupt, name, -1, "format %.40q, want %q", e.Format, format)
	case e.Version != version:
		return nil, index.Errorf(index.ErrUnsupported, name, -1, "version %d of a trace, this program reads %d", e.Version, version)
	case len(e.Runs) > maxRuns:
		return nil, index.Errorf(index.ErrLimit, name, -1, "%d runs, at most %d are read", len(e.Runs), maxRuns)
	}
	t := &Trace{Manifest: e.Manifest, Runs: e.Runs}
	seen := map[key]bool{}
	for i, k := range e.Touches {
		b, err := k.first()
		if err == nil && len(t.Blocks)+k.Blocks > maxBlocks {
			return nil, index.Errorf(index.ErrLimit, name, -1, "more than %d blocks", maxBlocks)
		}
		for n := 0; err == nil && n < k.Blocks; n++ {
			at := key{b.Chunk, b.Index}
			if seen[at] {
				err = fmt.Errorf("block %d of chunk %s for the second time", b.Index, b.Chunk)
			}
			seen[at] = true
			t.Blocks = append(t.Blocks, b)
			b.Index, b.Offset, b.Wait = b.Index+1, b.Offset+chunk.Block, 0
		}
		if err != nil {
			return nil, index.Errorf(index.ErrCorrupt, name, -1, "touch %d: %v", i, err)
		}
	}
	return t, nil
}

// first is the first block of a touch.
func (k *touch) first() (b Block, err error) {
	d, err := chunk.Parse(k.Chunk)
	if err != nil {
		return b, err
	}
	switch {
	case k.Size == 0 || k.Size > chunk.MaxSize:
		return b, fmt.Errorf("chunk of %d bytes, want 1 to %d", k.Size, chunk.MaxSize)
	case k.Block < 0 || k.Blocks < 1 || k.Blocks > chunk.Blocks(k.Size) || k.Block > chunk.Blocks(k.Size)-k.Blocks:
		return b, fmt.Errorf("%d blocks from %d on of a chunk of %d bytes", k.Blocks, k.Block, k.Size)
	case len(k.Path) > maxPath || k.Offset < 0 || k.Runs < 1 || k.Others < 0:
		return b, fmt.Errorf("path of %d bytes, offset %d, %d runs, %d other files", len(k.Path), k.Offset, k.Runs, k.Others)
	}
	return Block{
		Chunk: d, Size: k.Size, Index: k.Block, Path: k.Path, Offset: k.Offset, Others: k.Others,
		At: duration(k.At), Wait: duration(k.Wait), Runs: k.Runs,
	}, nil
}
