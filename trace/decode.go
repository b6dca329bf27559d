package trace

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
)

// Decode reads what Encode wrote. Errors wrap index.ErrCorrupt, ErrLimit or
// ErrUnsupported and name what was read, or are those of r.
//
// A trace may be anybody's. It is read value by value, since three bytes of JSON may
// become a touch of 150, and nothing is held that is beyond a bound.
func Decode(r io.Reader, name string) (*Trace, error) {
	d := decoder{t: &Trace{}, in: meter{r: r, name: name}, name: name, seen: map[key]bool{}}
	d.json = json.NewDecoder(&d.in)
	err := d.object()
	switch {
	case err == nil:
		return d.t, nil
	case d.in.err != nil:
		return nil, d.in.err
	case errors.Is(err, index.ErrCorrupt) || errors.Is(err, index.ErrLimit) || errors.Is(err, index.ErrUnsupported):
		return nil, err
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return nil, d.fault(index.ErrCorrupt, "%v", err)
}

// meter gives a decoder the bytes of one value after the other.
type meter struct {
	r     io.Reader
	name  string
	given int64
	until int64 // where the value that is being read has to end
	err   error // of r, or that there is too much
}

func (m *meter) Read(p []byte) (int, error) {
	switch room := min(m.until, MaxEncoded+1) - m.given; {
	case room > 0:
		p = p[:min(int64(len(p)), room)]
	case m.until > MaxEncoded:
		m.err = index.Errorf(index.ErrLimit, m.name, -1, "a trace of more than %d bytes", MaxEncoded)
	default:
		m.err = index.Errorf(index.ErrLimit, m.name, m.given-maxValue, "a value of more than %d bytes", maxValue)
	}
	if m.err != nil {
		return 0, m.err
	}
	n, err := m.r.Read(p)
	m.given += int64(n)
	if err != nil && err != io.EOF {
		m.err = err
	}
	return n, err
}

type decoder struct {
	t     *Trace
	json  *json.Decoder
	in    meter
	name  string
	names pathNames
	seen  map[key]bool // blocks

	format        string
	version       int
	runs, touches bool // were there
}

func (d *decoder) fault(kind error, format string, args ...any) error {
	return index.Errorf(kind, d.name, d.json.InputOffset(), format, args...)
}

// value decodes what comes next.
func (d *decoder) value(v any) error {
	d.in.until = d.json.InputOffset() + maxValue
	return d.json.Decode(v)
}

// expect reads a bracket, or the end if want is 0.
func (d *decoder) expect(want json.Delim) error {
	d.in.until = d.json.InputOffset() + maxValue
	got, err := d.json.Token()
	switch {
	case err == io.EOF && want == 0:
		return nil
	case err != nil:
		return err
	case want == 0:
		return d.fault(index.ErrCorrupt, "%.40q behind the end", fmt.Sprint(got))
	case got != want:
		return d.fault(index.ErrCorrupt, "%.40q, want %q", fmt.Sprint(got), want.String())
	}
	return nil
}

// more tells whether a list or an object goes on.
func (d *decoder) more() bool {
	d.in.until = d.json.InputOffset() + maxValue
	return d.json.More()
}

// list has one called for each value of a list.
func (d *decoder) list(one func(n int) error) error {
	if err := d.expect('['); err != nil {
		return err
	}
	for n := 0; d.more(); n++ {
		if err := one(n); err != nil {
			return err
		}
	}
	return d.expect(']')
}

func (d *decoder) object() error {
	if err := d.expect('{'); err != nil {
		return err
	}
	for n := 0; d.more(); n++ {
		if n == maxFields {
			return d.fault(index.ErrLimit, "more than %d fields", maxFields)
		}
		key, err := d.json.Token()
		if err != nil {
			return err
		}
		if err := d.field(fmt.Sprint(key)); err != nil {
			return err
		}
	}
	if err := d.expect('}'); err != nil {
		return err
	}
	if d.format != format || d.version != version {
		return d.fault(index.ErrCorrupt, "format %.40q, version %d, want %q and %d", d.format, d.version, format, version)
	}
	return d.expect(0)
}

func (d *decoder) field(name string) error {
	switch name {
	case "format":
		if err := d.value(&d.format); err != nil || d.format == format {
			return err
		}
		return d.fault(index.ErrCorrupt, "format %.40q, want %q", d.format, format)
	case "version":
		if err := d.value(&d.version); err != nil || d.version == version {
			return err
		}
		return d.fault(index.ErrUnsupported, "version %d of a trace, this program reads %d", d.version, version)
	case "manifest":
		return d.value(&d.t.Manifest)
	case "runs":
		if d.runs || d.touches {
			return d.fault(index.ErrCorrupt, "runs behind touches, or other runs")
		}
		d.runs = true
		return d.list(d.run)
	case "touches":
		if d.touches {
			return d.fault(index.ErrCorrupt, "touches behind other touches")
		}
		d.touches = true
		return d.list(d.touch)
	}
	var skipped json.RawMessage
	return d.value(&skipped)
}

func (d *decoder) run(n int) error {
	if n == MaxRuns {
		return d.fault(index.ErrLimit, "more than %d runs", MaxRuns)
	}
	var r Run
	if err := d.value(&r); err != nil {
		return err
	}
	if r.ID == "" || len(r.ID) > maxID || slices.ContainsFunc(d.t.Runs, func(x Run) bool { return x.ID == r.ID }) {
		return d.fault(index.ErrCorrupt, "run %d has the id %.80q, want one of its own", n, r.ID)
	}
	d.t.Runs = append(d.t.Runs, r)
	return nil
}

func (d *decoder) touch(n int) error {
	var k touch
	if err := d.value(&k); err != nil {
		return err
	}
	b, err := k.first(d.t)
	if err != nil {
		return d.fault(index.ErrCorrupt, "touch %d: %v", n, err)
	}
	b.Path = d.names.intern(b.Path)
	for i := range b.Also {
		b.Also[i] = d.names.intern(b.Also[i])
	}
	switch {
	case len(d.t.Blocks)+k.Blocks > MaxBlocks:
		return d.fault(index.ErrLimit, "more than %d blocks", MaxBlocks)
	case d.names.bytes > maxNames:
		return d.fault(index.ErrLimit, "names of files of more than %d bytes", maxNames)
	}
	for range k.Blocks {
		at := key{b.Chunk, b.Index}
		if d.seen[at] {
			return d.fault(index.ErrCorrupt, "touch %d: block %d of chunk %s for the second time", n, b.Index, b.Chunk)
		}
		d.seen[at] = true
		d.t.Blocks = append(d.t.Blocks, b)
		b.Index, b.Offset, b.Wait = b.Index+1, b.Offset+chunk.Block, 0
	}
	return nil
}

// first is the first block of a touch.
func (k *touch) first(t *Trace) (b Block, err error) {
	d, err := chunk.ParseName(k.Chunk)
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
	for _, p := range k.paths() {
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
		At: duration(k.At), Wait: duration(k.Wait), Runs: by.Len(), By: by,
	}, nil
}
