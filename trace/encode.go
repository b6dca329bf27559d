package trace

import (
	"bytes"
	"encoding/json"
	"io"
	"math"
	"slices"
	"time"

	"github.com/shale-image/shale/chunk"
)

// Bounds on what is written and read, besides those of a Trace.
const (
	MaxEncoded = 64 << 20  // bytes
	maxNames   = 32 << 20  // bytes of the names of files, each once
	maxValue   = 256 << 10 // bytes of a run, or of a touch: nine paths, escaped
	maxFields  = 64        // of the whole, known or not
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

func (k *touch) paths() []string { return append(slices.Clip(k.Also), k.Path) }

// Times are in milliseconds with two digits: 10 µs.
func ms(d time.Duration) float64 { return float64(d.Microseconds()/10) / 100 }

func duration(ms float64) time.Duration {
	return time.Duration(math.Round(ms*100)) * 10 * time.Microsecond
}

// Encode writes a trace as JSON, a touch a line. What does not fit into MaxEncoded
// is left out, and the runs that have read it are told to have lost some.
func (t *Trace) Encode(w io.Writer) error {
	head, err := json.Marshal(encoded{format, version, t.Manifest, append([]Run{}, t.Runs...), []touch{}})
	if err != nil {
		return err
	}
	var b bytes.Buffer
	b.Write(bytes.TrimSuffix(head, []byte("]}")))
	const room = MaxEncoded - MaxRuns*len(`,"lost":true`) - 64
	var names pathNames
	blocks := 0
	for i, k := range t.touches() {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteByte('\n')
		js, err := json.Marshal(k)
		if err != nil {
			return err
		}
		for _, p := range k.paths() {
			names.intern(p)
		}
		if b.Len()+len(js) > room || names.bytes > maxNames {
			return t.First(blocks).Encode(w)
		}
		b.Write(js)
		blocks += k.Blocks
	}
	b.WriteString("\n]}\n")
	_, err = w.Write(b.Bytes())
	return err
}

// pathNames are the names of files that a trace has, each once in memory.
type pathNames struct {
	all   map[string]string
	bytes int
}

func (n *pathNames) intern(s string) string {
	if same, ok := n.all[s]; ok {
		return same
	}
	if n.all == nil {
		n.all = map[string]string{}
	}
	n.all[s] = s
	n.bytes += len(s)
	return s
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
