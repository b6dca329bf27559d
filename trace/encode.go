package trace

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"path"
	"slices"
	"time"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Bounds on what is written and read, besides those of a Trace.
const (
	MaxEncoded = 64 << 20 // bytes
	maxPath    = 4096
	maxID      = 64
	maxTime    = 1 << 40 // ms
)

const (
	format  = "shale-trace"
	version = 1
)

// encoded is the JSON form. Blocks that follow each other in a chunk, and were
// read by the same runs, are one touch.
type encoded struct {
	Format   string  `json:"format"`
	Version  int     `json:"version"`
	Manifest string  `json:"manifest"`
	Runs     []Run   `json:"runs"`
	Touches  []touch `json:"touches"`
}

type touch struct {
	Path   string   `json:"path"`
	Offset int64    `json:"offset"` // in the file, of the first block
	Others int      `json:"others,omitempty"`
	Also   []string `json:"also,omitempty"`
	Chunk  string   `json:"chunk"`
	Size   uint32   `json:"size"`
	Block  int      `json:"block"` // the first, in the chunk
	Blocks int      `json:"blocks"`
	At     float64  `json:"at_ms"`
	Wait   float64  `json:"wait_ms"`       // the sum of all of them
	Runs   []int    `json:"runs,omitzero"` // places in Runs; without it all of them
}

// Times are in milliseconds with two digits: 10 µs.
func ms(d time.Duration) float64 { return float64(d.Microseconds()/10) / 100 }

func duration(ms float64) time.Duration {
	return time.Duration(math.Round(ms*100)) * 10 * time.Microsecond
}

// Encode writes a trace as JSON, a touch a line.
func (t *Trace) Encode(w io.Writer) error {
	head, err := json.Marshal(encoded{format, version, t.Manifest, append([]Run{}, t.Runs...), []touch{}})
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
	if b.Len() > MaxEncoded {
		return fmt.Errorf("a trace of %d bytes, more than %d: %w", b.Len(), MaxEncoded, index.ErrLimit)
	}
	_, err = w.Write(b.Bytes())
	return err
}

func (t *Trace) touches() (out []touch) {
	var end Block // the last block of the last touch
	for _, b := range t.Blocks {
		if n := len(out); n > 0 && b.Chunk == end.Chunk && b.Index == end.Index+1 && b.Path == end.Path &&
			b.Offset == end.Offset+chunk.Block && b.By == end.By && b.Others == end.Others && slices.Equal(b.Also, end.Also) {
			out[n-1].Blocks++
			out[n-1].Wait = ms(duration(out[n-1].Wait) + b.Wait)
		} else {
			out = append(out, touch{b.Path, b.Offset, b.Others, b.Also, b.Chunk.String(), b.Size, b.Index, 1, ms(b.At), ms(b.Wait), t.places(b.By)})
		}
		end = b
	}
	return out
}

// all is the set of all runs.
func (t *Trace) all() Set { return 1<<len(t.Runs) - 1 }

// places lists the runs of a set, nil if they are all.
func (t *Trace) places(s Set) []int {
	if s == t.all() {
		return nil
	}
	out := []int{}
	for i := range t.Runs {
		if s.Has(i) {
			out = append(out, i)
		}
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
	case len(e.Runs) > MaxRuns:
		return nil, index.Errorf(index.ErrLimit, name, -1, "%d runs, at most %d are read", len(e.Runs), MaxRuns)
	}
	t := &Trace{Manifest: e.Manifest, Runs: e.Runs}
	ids := map[string]bool{}
	for i, r := range t.Runs {
		if r.ID == "" || len(r.ID) > maxID || ids[r.ID] {
			return nil, index.Errorf(index.ErrCorrupt, name, -1, "run %d has the id %.80q, want one of its own", i, r.ID)
		}
		ids[r.ID] = true
	}
	seen := map[key]bool{}
	for i, k := range e.Touches {
		b, err := k.first(t)
		if err == nil && len(t.Blocks)+k.Blocks > MaxBlocks {
			return nil, index.Errorf(index.ErrLimit, name, -1, "more than %d blocks", MaxBlocks)
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
func (k *touch) first(t *Trace) (b Block, err error) {
	d, err := chunk.Parse(k.Chunk)
	if err != nil {
		return b, err
	}
	switch {
	case k.Size == 0 || k.Size > chunk.MaxSize:
		return b, fmt.Errorf("chunk of %d bytes, want 1 to %d", k.Size, chunk.MaxSize)
	case k.Block < 0 || k.Blocks < 1 || k.Blocks > chunk.Blocks(k.Size) || k.Block > chunk.Blocks(k.Size)-k.Blocks:
		return b, fmt.Errorf("%d blocks from %d on of a chunk of %d bytes", k.Blocks, k.Block, k.Size)
	case k.Offset < 0 || k.Offset > math.MaxInt64-chunk.MaxSize || k.Others < 0 || len(k.Also) > min(k.Others, maxAlso):
		return b, fmt.Errorf("offset %d, %d other files, %d of them named", k.Offset, k.Others, len(k.Also))
	case !(k.At >= 0 && k.At <= maxTime && k.Wait >= 0 && k.Wait <= maxTime):
		return b, fmt.Errorf("at %g ms, waited %g ms", k.At, k.Wait)
	}
	for _, p := range append(k.Also, k.Path) {
		if p == "" || len(p) > maxPath || path.Clean("/"+p) != "/"+p {
			return b, fmt.Errorf("path %.100q, want one below the root, of at most %d bytes", p, maxPath)
		}
	}
	by := t.all()
	if k.Runs != nil {
		by = 0
		for _, r := range k.Runs {
			if r < 0 || r >= len(t.Runs) || by.Has(r) {
				return b, fmt.Errorf("run %d of %d", r, len(t.Runs))
			}
			by |= 1 << r
		}
	}
	return Block{
		Chunk: d, Size: k.Size, Index: k.Block, Path: k.Path, Offset: k.Offset, Others: k.Others, Also: k.Also,
		At: duration(k.At), Wait: duration(k.Wait), Runs: bits.OnesCount64(uint64(by)), By: by,
	}, nil
}
