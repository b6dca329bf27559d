package daemon

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/reader"
)

// content changes what a pack's content decodes to; docs/formats/pack.md has the
// layout.
func content(t *testing.T, change func(p []byte) []byte) func(*reader.MadePack) {
	return func(m *reader.MadePack) {
		t.Helper()
		at := 64 + binary.LittleEndian.Uint64(m.Bytes[8:]) + uint64(binary.LittleEndian.Uint32(m.Bytes[16:]))
		d, err := zstd.NewReader(nil)
		must(t, err)
		defer d.Close()
		p, err := d.DecodeAll(m.Bytes[at:], nil)
		must(t, err)
		e, err := zstd.NewWriter(nil, zstd.WithWindowSize(8<<20))
		must(t, err)
		defer e.Close()
		m.Bytes = e.EncodeAll(change(p), m.Bytes[:at:at])
	}
}

// zeros is a zstd frame of 128 KiB of zeros, so many times (RFC 8878: 3.1.1).
func zeros(blocks int) []byte {
	p := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x38} // a window of 128 KiB
	for i := range blocks {
		h := uint32(128<<10)<<3 | 1<<1
		if i == blocks-1 {
			h |= 1
		}
		p = append(p, byte(h), byte(h>>8), byte(h>>16), 0)
	}
	return p
}

// TestMaliciousPack: whatever lies beside an image as its pack, what is read of the
// image is right, memory and disk stay what they are, and there is a note of it. What
// is wrong is fetched once.
func TestMaliciousPack(t *testing.T) {
	// Without an API for referrers each pack takes the place of the one before.
	p := newPacksIn(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false, registry.WithReferrersSupport(false))
	recorded := p.record([]string{"half"}, halves(t))
	other := newPacks(t, strings.TrimSuffix(layoutOf(t, tarOf(t, "else", bytes.Repeat([]byte("other "), 50_000))), "shale")+"plain", false)
	elsewhere, err := reader.MakePack(background, other.repo, other.img, reader.Options{TempDir: t.TempDir()}, other.record([]string{"half"}, func(dir string) {
		_, err := os.ReadFile(filepath.Join(dir, "else"))
		must(t, err)
	}), 0)
	must(t, err)
	for name, c := range map[string]struct {
		pack func(*reader.MadePack)
		note string // what the log says; "": nothing, as all of it that is wanted is right
	}{
		"cut off":          {func(m *reader.MadePack) { m.Bytes = m.Bytes[:len(m.Bytes)-700] }, "it ends here"},
		"cut in the index": {func(m *reader.MadePack) { m.Bytes = m.Bytes[:100] }, "it ends here"},
		"no pack at all":   {func(m *reader.MadePack) { m.Bytes = bytes.Repeat([]byte("<html>"), 100) }, "not a start pack"},
		"another index":    {func(m *reader.MadePack) { m.Bytes[70] ^= 1 }, ""},
		"a bit of its end": {func(m *reader.MadePack) { m.Bytes[len(m.Bytes)-400] ^= 1 }, "corrupt"},
		"of another image": {func(m *reader.MadePack) { m.Bytes = elsewhere.Bytes }, "are content of the image"},
		"index of another": {func(m *reader.MadePack) { *m = *elsewhere }, "are content of the image"},
		"says 100 GB":      {func(m *reader.MadePack) { copy(m.Bytes[24:], "\xff\xff\xff\xff\x17") }, "at most 4294967296 are read"},
		"100 GB behind it": {func(m *reader.MadePack) { m.Bytes = append(m.Bytes, zeros(100e9>>17)...) }, ""},
		"zeros for 100 GB": {func(m *reader.MadePack) {
			content(t, func([]byte) []byte { return nil })(m)
			m.Bytes = append(m.Bytes, zeros(100e9>>17)...)
		}, "corrupt"},
		"other blocks": {content(t, func(p []byte) []byte { // their proofs are right
			last := len(p) - chunk.Block
			copy(p[last:], bytes.Repeat([]byte{1}, chunk.Block))
			return p
		}), "is another"},
		"two blocks changed places": {content(t, func(p []byte) []byte {
			a, b := p[len(p)-2*chunk.Block:len(p)-chunk.Block], p[len(p)-chunk.Block:]
			return append(append(p[:len(p)-2*chunk.Block:len(p)-2*chunk.Block], b...), a...)
		}), "is another"},
		"its blob is missing": {nil, "not found"},
	} {
		t.Run(name, func(t *testing.T) {
			m := p.push(recorded, c.pack)
			if c.pack == nil {
				p.spoiled(func(w http.ResponseWriter, r *http.Request) bool {
					if strings.Contains(r.URL.Path, m.Blob.Digest) {
						http.NotFound(w, r)
						return true
					}
					return false
				})
				defer p.spoiled(nil)
			}
			client := service(t)
			dir, mounted := attachAs(t, client, p.ref, Place{Command: []string{"half"}})
			noted := func() bool {
				log, err := os.ReadFile(filepath.Join(client.Root, logName))
				must(t, err)
				return contains(strings.Split(string(log), "\n"), "a start pack is of no use")
			}
			for i := 0; c.note != "" && !noted(); i++ {
				if i == 1000 {
					t.Fatal("no word of it")
				}
				time.Sleep(10 * time.Millisecond)
			}
			halves(t)(dir)
			if c.note == "" {
				packComes(t, client, mounted, m)
			}
			must(t, unix.Unmount(dir, 0))
			p.requests()
			dir, _ = attachAs(t, client, p.ref, Place{Command: []string{"half"}})
			halves(t)(dir)
			wholly(t, dir)
			if asked := p.requests(); c.pack != nil && contains(asked, m.Blob.Digest) {
				t.Errorf("the pack is fetched again: %v", asked)
			}
			if noted() != (c.note != "") {
				t.Errorf("noted: %v", noted())
			}
			log, err := os.ReadFile(filepath.Join(client.Root, logName))
			must(t, err)
			if !strings.Contains(string(log), c.note) {
				t.Errorf("the log does not say %q", c.note)
			}
			if n := used(t, client.Root); n > 16<<20 {
				t.Errorf("%d bytes on disk for an image of 3 MB", n)
			}
			if n := mostMemory(t, client); n > 200<<20 {
				t.Errorf("the worker has taken %d bytes of memory", n)
			}
		})
	}
}

// spoiled has requests answered otherwise, if f says that it did.
func (p *packs) spoiled(f func(http.ResponseWriter, *http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spoil = f
}

// used is what files below a directory take of the disk, in bytes.
func used(t *testing.T, dir string) (n int64) {
	t.Helper()
	must(t, filepath.Walk(dir, func(_ string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().IsRegular() {
			n += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil // it may be gone
	}))
	return n
}

// mostMemory is the most that the worker has had, in bytes.
func mostMemory(t *testing.T, c *Client) (n int64) {
	t.Helper()
	st, err := c.Status(background)
	must(t, err)
	for _, p := range st.Processes {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
		must(t, err)
		_, rest, _ := strings.Cut(string(status), "VmHWM:")
		rest, _, _ = strings.Cut(rest, "kB")
		kb, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64)
		must(t, err)
		n = max(n, kb<<10)
	}
	return n
}

// TestReorderedPack: a pack in another order than that of reading is as right, and
// so is one of the whole image.
func TestReorderedPack(t *testing.T) {
	p := newPacks(t, strings.TrimSuffix(windowed(t), "shale")+"plain", false)
	for name, run := range map[string]func(dir string){"half": halves(t), "all": func(dir string) { wholly(t, dir) }} {
		recorded := p.record([]string{name}, run)
		slices.Reverse(recorded.Blocks)
		p.push(recorded, nil)
		dir, _ := attachAs(t, service(t), p.ref, Place{Command: []string{name}})
		halves(t)(dir)
		wholly(t, dir)
	}
}
