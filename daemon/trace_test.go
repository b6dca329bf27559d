package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/fleet"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/trace"
)

// exact mounts with the face that records, and no readahead.
var exact = Place{Face: "device", ReadAheadKiB: 4}

// readBlock reads one page of a block of a file.
func readBlock(t *testing.T, dir, name string, block int64) {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 100), block*chunk.Block); err != nil && block > 0 {
		t.Fatal(err)
	}
}

// blocks is what a trace has, "file/block".
func blocks(t *trace.Trace) (out []string) {
	for _, b := range t.Blocks {
		out = append(out, fmt.Sprintf("%s/%d", b.Path, b.Offset/chunk.Block))
	}
	return out
}

func imageTrace(t *testing.T, c *Client, ref string) *trace.Trace {
	t.Helper()
	tr, err := c.ImageTrace(background, ref, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// kept waits for the file that has what so many runs have read.
func kept(t *testing.T, c *Client, m *Mounted, runs int) *trace.Trace {
	t.Helper()
	var tr *trace.Trace
	eventually(t, "the trace is kept", func() bool {
		f, err := os.Open(traceOf(c, m))
		if err != nil {
			return false
		}
		defer f.Close()
		tr, err = trace.Decode(f, f.Name())
		return err == nil && len(tr.Runs) == runs
	})
	return tr
}

func traceOf(c *Client, m *Mounted) string {
	return filepath.Join(imageDir(c, m.ManifestDigest), traceFile)
}

func TestTrace(t *testing.T) {
	c, ref := service(t), windowed(t)
	if _, err := c.ImageTrace(background, ref, ""); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("of an image that is not known: %v", err)
	}
	began := time.Now()
	place := exact
	place.Command = []string{"cat", strings.Repeat("x", 1000)}
	dir, m := attachAs(t, c, ref, place)
	readBlock(t, dir, "text", 70)
	readBlock(t, dir, "etc/hello", 0)
	readBlock(t, dir, "text", 3)
	want := []string{"text/70", "etc/hello/0", "text/3"}
	check := func(what string, tr *trace.Trace, runs int, want []string) {
		t.Helper()
		if got := blocks(tr); !slices.Equal(got, want) || len(tr.Runs) != runs || tr.Manifest != m.ManifestDigest {
			t.Errorf("%s: %q in %d runs of %s, want %q in %d", what, got, len(tr.Runs), tr.Manifest, want, runs)
		}
	}
	// While it is mounted: through this mount, and of the image.
	tr, err := c.MountTrace(background, m.ID)
	if err != nil {
		t.Fatal(err)
	}
	check("mounted", tr, 1, want)
	check("of the image", imageTrace(t, c, ref), 1, want)
	r := tr.Runs[0]
	if r.ID != m.ID || r.ReadAhead != 4 || r.Lost || r.Arch == "" || r.Started.Before(began.Add(-time.Second)) || time.Since(r.Started) < 0 {
		t.Errorf("%+v", r)
	}
	if len(r.Command) != 2 || r.Command[0] != "cat" || len(r.Command[1]) > 250 {
		t.Errorf("command %q", r.Command)
	}
	for _, b := range tr.Blocks {
		if b.At < 0 || b.At > time.Since(began) || b.Wait > time.Since(began) {
			t.Errorf("%+v", b)
		}
	}
	if tr.Blocks[0].Wait == 0 {
		t.Error("nobody waited for the first block, which was fetched")
	}
	// Afterwards: at once, and when it is kept.
	unmount(t, c, dir)
	check("unmounted", imageTrace(t, c, ref), 1, want)
	check("kept", kept(t, c, m, 1), 1, want)
	check("read again", imageTrace(t, c, ref), 1, want)
	if _, err := c.MountTrace(background, m.ID); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("of a mount that is no more: %v", err)
	}
	// Another run.
	dir, m2 := attachAs(t, c, ref, exact)
	readBlock(t, dir, "text", 3)
	readBlock(t, dir, "text", 5)
	both := []string{"text/70", "text/3", "etc/hello/0", "text/5"}
	check("while the second runs", imageTrace(t, c, ref), 2, both)
	tr, err = c.MountTrace(background, m2.ID)
	if err != nil {
		t.Fatal(err)
	}
	check("the second alone", tr, 1, []string{"text/3", "text/5"})
	unmount(t, c, dir)
	tr = kept(t, c, m, 2)
	check("both", tr, 2, both)
	for _, b := range tr.Blocks {
		if want := map[string]int{"text/3": 2}[fmt.Sprintf("%s/%d", b.Path, b.Offset/chunk.Block)]; b.Runs != max(want, 1) {
			t.Errorf("%s at %d was read by %d runs", b.Path, b.Offset, b.Runs)
		}
	}
	// Until the service has forgotten what is kept it merges that again, which may change the order.
	eventually(t, "the second is kept alone", func() bool { return slices.Equal(blocks(imageTrace(t, c, ref)), both) })
	// One that reads nothing is none; nor is one that says so.
	dir, _ = attachAs(t, c, ref, exact)
	unmount(t, c, dir)
	place = exact
	place.Unrecorded = true
	dir, _ = attachAs(t, c, ref, place)
	readBlock(t, dir, "text", 9)
	check("not recorded", imageTrace(t, c, ref), 2, both)
	unmount(t, c, dir)
	check("not recorded", imageTrace(t, c, ref), 2, both)
	// A damaged one is set aside, and a service that is told to end keeps all.
	if err := os.WriteFile(traceOf(c, m), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir, _ = attachAs(t, c, ref, exact)
	readBlock(t, dir, "text", 1)
	unmount(t, c, dir)
	if err := c.Stop(background); err != nil {
		t.Fatal(err)
	}
	end(t, c)
	check("after the end", kept(t, c, m, 1), 1, []string{"text/1"})
	bad, err := os.ReadFile(filepath.Join(filepath.Dir(traceOf(c, m)), badFile))
	log, lerr := os.ReadFile(filepath.Join(c.Root, logName))
	if err != nil || string(bad) != "{" || lerr != nil || !strings.Contains(string(log), "set aside") {
		t.Errorf("the damaged one is %q, %v, %v; the log says\n%s", bad, err, lerr, log)
	}
	removed, err := c.Remove(background, ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(traceOf(c, m)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the trace of a removed image is there: %v, %+v", err, removed)
	}
}

// The kernel alone reads a complete image, and nobody sees what.
func TestTraceDirect(t *testing.T) {
	c, ref := service(t), windowed(t)
	if _, err := c.Pull(background, Source{Ref: ref, Platform: "linux/amd64"}, true, nil); err != nil {
		t.Fatal(err)
	}
	dir, m := attachAs(t, c, ref, Place{Face: "direct"})
	readBlock(t, dir, "text", 1)
	if _, err := c.MountTrace(background, m.ID); !errors.Is(err, blob.ErrNotFound) {
		t.Error(err)
	}
	dir, m = attachAs(t, c, ref, exact)
	readBlock(t, dir, "text", 2)
	tr, err := c.MountTrace(background, m.ID)
	if err != nil || !slices.Equal(blocks(tr), []string{"text/2"}) {
		t.Errorf("%v, %v", tr, err)
	}
}

func TestTracesOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(`{"traces": "off"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SHALE_TEST_CONFIG", path)
	c, ref := service(t), windowed(t)
	dir, m := attachAs(t, c, ref, exact)
	readBlock(t, dir, "text", 1)
	if tr, err := c.MountTrace(background, m.ID); err != nil || len(tr.Blocks) != 1 { // who asks is told
		t.Errorf("%v, %v", tr, err)
	}
	unmount(t, c, dir)
	if err := c.Stop(background); err != nil {
		t.Fatal(err)
	}
	end(t, c)
	if _, err := os.Stat(traceOf(c, m)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a trace was kept: %v", err)
	}
}

// Addresses of a linked image that is no more mean nothing.
func TestTraceOfAnotherLink(t *testing.T) {
	c, ref := service(t), windowed(t)
	dir, m := attachAs(t, c, ref, exact)
	readBlock(t, dir, "text", 1)
	o := traceOrder{Dir: filepath.Dir(traceOf(c, m)), Manifest: m.ManifestDigest, Kept: true, Recordings: []*recording{
		{Run: trace.Run{ID: "x"}, Touches: []trace.Touch{{Flat: 1 << 20}}, MetaSum: strings.Repeat("0", 64)},
	}}
	tr, err := o.merge()
	if err != nil || len(tr.Blocks) != 0 || len(tr.Runs) != 0 || tr.Manifest != m.ManifestDigest {
		t.Errorf("%+v, %v", tr, err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
}

// What runs have read comes to lie beside the image: of the first run, and when
// there are as many again.
func TestShareTraces(t *testing.T) {
	c, ref := service(t), windowed(t)
	r, err := image.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := image.Open(background, r, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	img, err := repo.Resolve(background, image.Platform{OS: "linux", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	for run, want := range []int{1, 2, 2, 4} {
		place := exact
		place.ShareTraces = true
		dir, _ := attachAs(t, c, ref, place)
		readBlock(t, dir, "text", int64(run))
		unmount(t, c, dir)
		if err := c.Stop(background); err != nil { // which has all kept and shared
			t.Fatal(err)
		}
		end(t, c)
		tr, err := fleet.Traces(background, repo, img)
		if err != nil {
			t.Fatal(err)
		}
		if len(tr.Runs) != want || len(tr.Blocks) != want {
			t.Errorf("after %d runs: %d with %q, want %d", run+1, len(tr.Runs), blocks(tr), want)
		}
	}
	found, err := repo.Referrers(background, img.ManifestDigest, fleet.ArtifactType)
	if err != nil || len(found) != 1 {
		t.Errorf("one node has %d traces there: %v", len(found), err)
	}
	// Who does not share does not.
	dir, _ := attachAs(t, c, ref, exact)
	readBlock(t, dir, "text", 40)
	unmount(t, c, dir)
	if err := c.Stop(background); err != nil {
		t.Fatal(err)
	}
	end(t, c)
	if tr, err := fleet.Traces(background, repo, img); err != nil || len(tr.Runs) != 4 {
		t.Errorf("%v, %v", tr, err)
	}
}
