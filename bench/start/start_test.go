package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/shale-image/shale/bench/debian"
	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/oci"
	"github.com/shale-image/shale/bench/start/cold"
	"github.com/shale-image/shale/runtime"
)

func TestMain(m *testing.M) {
	runtime.Init()
	os.Exit(m.Run())
}

// busybox is an image of one layer: a static shell.
func busybox(t *testing.T) string {
	t.Helper()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("busybox-static is not installed: %v", err)
	}
	var raw, layer bytes.Buffer
	w := tar.NewWriter(&raw)
	for _, e := range []struct {
		header  tar.Header
		content string
	}{
		{tar.Header{Typeflag: tar.TypeDir, Name: "bin/", Mode: 0o755}, ""},
		{tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, string(bin)},
		{tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/sh", Linkname: "busybox"}, ""},
		{tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}, ""},
		{tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, "root:x:0:0::/:/bin/sh\nme:x:1000:1000::/:/bin/sh\n"},
	} {
		e.header.Size = int64(len(e.content))
		if err := w.WriteHeader(&e.header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(&layer)
	_, err = z.Write(raw.Bytes())
	if err := errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	l, err := oci.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	d := oci.Descriptor{MediaType: oci.TypeGzip, Digest: oci.Digest(layer.Bytes()), Size: int64(layer.Len())}
	name, err := l.Blob(d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, layer.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	config := oci.Image{Architecture: goruntime.GOARCH, OS: "linux", RootFS: oci.RootFS{Type: "layers", DiffIDs: []string{oci.Digest(raw.Bytes())}}}
	if err := l.Finish(config, []oci.Descriptor{d}); err != nil {
		t.Fatal(err)
	}
	return string(l)
}

// newBench measures the command in busybox, in a scratch directory that is
// checked to be empty in the end.
func newBench(t *testing.T, modes string, w debian.Workload) *bench {
	t.Helper()
	shale := os.Getenv("SHALE")
	if shale == "" {
		t.Skip("needs SHALE, the program")
	}
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, tool := range []string{"docker-registry", "tar", "gzip"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	if _, err := runtime.Find(); err != nil {
		t.Skip(err)
	}
	tmp, err := os.MkdirTemp("", "start")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", tmp)
	t.Cleanup(func() {
		if err := os.Remove(tmp); err != nil {
			t.Errorf("something is left: %v", err)
			os.RemoveAll(tmp)
		}
	})
	image := busybox(t)
	b := &bench{
		lab: cold.Options{Shale: shale, Model: netmodel.Model{}}, runs: 1,
		image: func(context.Context, debian.Recipe) (string, error) { return image, nil },
	}
	if err := b.choose("base", modes, "gzip"); err != nil {
		t.Fatal(err)
	}
	w.Name, w.Image.Name = "shell", "busybox"
	b.workloads = []debian.Workload{w}
	return b
}

func TestRun(t *testing.T) {
	b := newBench(t, "plain,convert,none", debian.Workload{
		Command: []string{"sh", "-c", "echo first; echo by $(busybox id -u) >&2"},
		User:    "me", Line: "by 1000",
	})
	if err := b.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(b.report.Starts) != 3 {
		t.Fatalf("measured %+v", b.report.Starts)
	}
	for _, s := range b.report.Starts {
		if len(s.First) != 1 || s.Error != "" || s.First[0].Bytes < 100e3 || s.First[0].Requests < 3 || s.First[0].First <= 0 {
			t.Errorf("%+v", s)
		}
		switch {
		case s.Mode == "none" && (len(s.Again) != 1 || s.Again[0].Bytes != 0):
			t.Errorf("the second start: %+v", s.Again)
		case s.Mode != "none" && s.Again != nil:
			t.Errorf("%s has a second start", s.Mode)
		}
	}
}

func TestOneFailureIsNotAll(t *testing.T) {
	b := newBench(t, "plain", debian.Workload{Command: []string{"sh", "-c", "echo no; exit 3"}, Line: "yes"})
	good := b.workloads[0]
	good.Command = []string{"sh", "-c", "echo yes"}
	b.workloads = append(b.workloads, good)
	err := b.run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "exit code 3") || !strings.Contains(err.Error(), "no") {
		t.Errorf("error %v, want one with the exit code and what was printed", err)
	}
	if s := b.report.Starts; len(s) != 2 || s[0].Error == "" || s[1].Error != "" || len(s[1].First) != 1 {
		t.Errorf("measured %+v", s)
	}
}

// TestInterrupt ends it while a container runs, in each way to start one.
func TestInterrupt(t *testing.T) {
	for _, mode := range []string{"plain", "none"} {
		t.Run(mode, func(t *testing.T) {
			b := newBench(t, mode, debian.Workload{Command: []string{"sh", "-c", "trap exit TERM; echo >/up; busybox sleep 1000 & wait"}, Line: "up"})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				// What the container writes is in some directory of its state.
				for pattern := filepath.Join(os.TempDir(), "shale-bench-*", "node-*", "containers", "*", "*", "up"); ctx.Err() == nil; {
					if found, _ := filepath.Glob(pattern); len(found) > 0 {
						cancel()
					}
					time.Sleep(5 * time.Millisecond)
				}
			}()
			if err := b.run(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want %v", err, context.Canceled)
			}
		})
	}
}

func TestChoose(t *testing.T) {
	names := func(images, modes string) string {
		b := bench{runs: 1}
		if err := b.choose(images, modes, "zstd"); err != nil {
			return err.Error()
		}
		var out []string
		for _, w := range b.workloads {
			if w.Image.Compression != debian.Zstd {
				t.Errorf("%s has compression %q", w.Name, w.Image.Compression)
			}
			out = append(out, w.Name)
		}
		for _, m := range b.modes {
			out = append(out, m.name)
		}
		return strings.Join(out, " ")
	}
	for _, tt := range []struct{ images, modes, want string }{
		{"", "plain", "sh python numpy nginx postgres initdb java node plain"},
		{"postgres", "none,plain", "postgres initdb none plain"},
		{"openjdk,node", "index", "java node index"},
		{"initdb, sh", "convert", "sh initdb convert"},
		{"python,perl", "plain", `-images "perl": want some of base, `},
		{"", "fast", `-modes "fast": want some of plain, `},
		{"", "", "-modes: want some of plain, "},
	} {
		if got := names(tt.images, tt.modes); !strings.HasPrefix(got, tt.want) {
			t.Errorf("-images %q -modes %q: %s, want %s", tt.images, tt.modes, got, tt.want)
		}
	}
	if err := (&bench{runs: 1}).choose("", "plain", "lz4"); err == nil {
		t.Error("compression lz4 is taken")
	}
	if err := (&bench{}).choose("", "plain", "gzip"); err == nil {
		t.Error("no runs are taken")
	}
}

var golden = report{
	DelaySeconds: 0.005, Bandwidth: 100e6, Compression: debian.Gzip, Runs: 3,
	Starts: []start{
		{Workload: "python", Image: "python", Mode: "plain", First: []cold.Cost{
			{First: 9 * time.Second, Bytes: 95e6, Requests: 4}, {First: 8 * time.Second, Bytes: 95e6, Requests: 4},
			{First: 10 * time.Second, Bytes: 95e6, Requests: 4}}},
		{Workload: "python", Image: "python", Mode: "index", Absent: true, Error: "no index command"},
		{Workload: "node", Image: "nodejs", Mode: "none", First: []cold.Cost{{First: 250 * time.Millisecond, Bytes: 1234567, Requests: 17}},
			Again: []cold.Cost{{First: 30 * time.Millisecond}}},
		{Workload: "node", Image: "nodejs", Mode: "convert", Error: "boom\nmany lines"},
	},
}

func TestPrint(t *testing.T) {
	var out bytes.Buffer
	golden.print(&out)
	want := `
100 Mbit/s, 5 ms a request, layers in gzip; medians of 3 cold starts

workload   image    mode       seconds     from - to         MB   requests   stalls   2nd: seconds         bytes
python     python   plain         9.00    8.00 10.00      95.00          4        0
python     python   index     not available: no index command
node       nodejs   none          0.25    0.25  0.25       1.23         17        0           0.03             0
node       nodejs   convert   failed
`
	var got []string
	for line := range strings.Lines(out.String()) {
		got = append(got, strings.TrimRight(line, " \n")+"\n")
	}
	if got := strings.Join(got, ""); got != want {
		t.Errorf("printed:%s\nwant:%s", got, want)
	}
}

func TestWrite(t *testing.T) {
	name := filepath.Join(t.TempDir(), "r.json")
	if err := golden.write(name); err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Starts []struct {
			Mode, Error  string
			First, Again []struct{ Seconds float64 }
		}
	}
	if err := json.Unmarshal(p, &got); err != nil {
		t.Fatal(err)
	}
	if s := got.Starts; len(s) != 4 || s[0].First[2].Seconds != 10 || s[2].Again[0].Seconds != 0.03 || s[3].Error != "boom\nmany lines" {
		t.Errorf("%s", p)
	}
}
