package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shale-image/shale/bench/faults/script"
	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/registry"
)

var world struct {
	once  sync.Once
	stage *stage
	err   error
	dir   string
}

func TestMain(m *testing.M) {
	code := m.Run()
	if world.stage != nil {
		if err := world.stage.close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.RemoveAll(world.dir)
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// setup gives the stage that all tests share, or skips the test with what is missing.
func setup(t testing.TB) *stage {
	t.Helper()
	if testing.Short() {
		t.Skip("plays faults to a real node: not in short mode")
	}
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, tool := range []string{"docker-registry", "tar", "zstd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	world.once.Do(func() {
		shale := os.Getenv("SHALE")
		if world.dir, world.err = os.MkdirTemp("", "shale-faults-test-"); world.err != nil {
			return
		}
		if shale == "" {
			shale = filepath.Join(world.dir, "shale")
			if out, err := exec.Command("go", "build", "-o", shale, "../../cmd/shale").CombinedOutput(); err != nil {
				world.err = fmt.Errorf("%w\n%s", err, out)
				return
			}
		}
		world.stage, world.err = openStage(t.Context(), shale)
	})
	if world.err != nil {
		t.Fatal(world.err)
	}
	return world.stage
}

// TestFaults plays each script once, with a healthy source or without, those of the disk
// and some others with the face fanotify, too, and some by chance, the same each
// time unless SHALE_FAULTS_SEED names the first of these. make faults plays them all, in all ways.
func TestFaults(t *testing.T) {
	s := setup(t)
	all, err := s.all()
	if err != nil {
		t.Fatal(err)
	}
	ways := map[string][]*act{}
	var names []string
	for _, a := range all {
		if ways[a.name] == nil {
			names = append(names, a.name)
		}
		ways[a.name] = append(ways[a.name], a)
	}
	var acts []*act
	for i, name := range names {
		ways := ways[name]
		if last := len(ways) - 1; ways[last].face == fanotify {
			if ways[last].script.Disk() || i%4 == 0 {
				acts = append(acts, ways[last])
			}
			ways = ways[:last]
		}
		acts = append(acts, ways[(i+i/4)%len(ways)])
	}
	seed := uint64(1)
	if env := os.Getenv("SHALE_FAULTS_SEED"); env != "" {
		if seed, err = strconv.ParseUint(env, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint64(5) {
		ways := s.acts(fmt.Sprintf("seed %d", seed+i), script.Random(seed+i, 3), int(i))
		acts = append(acts, ways[0], ways[3%len(ways)]) // with another source, if the network fails, and without
		if last := ways[len(ways)-1]; i < 2 && last.face == fanotify {
			acts = append(acts, last)
		}
	}
	s.playAll(t.Context(), acts, 4, func(a *act, o *outcome) {
		var b strings.Builder
		report(&b, a, o, false)
		switch err, skipped := o.err(); {
		case skipped:
			t.Logf("skipped: %v", err)
		case err != nil:
			t.Error(b.String())
		default:
			t.Log(b.String())
		}
	})
}

// TestHanging: an image whose source hangs holds no reader of another one up.
func TestHanging(t *testing.T) {
	s := setup(t)
	for _, face := range s.faces() {
		if _, err := s.hanging(t.Context(), face, s.model(), true, 1); err != nil {
			t.Errorf("%s: %v", face, err)
		}
	}
}

// BenchmarkHanging tells how long an image is read while 64 reads of another one hang, and
// what part of its speed when nothing hangs that is, just before or after. One round is
// both, so -benchtime 9x is 9 of each; it tells medians.
func BenchmarkHanging(b *testing.B) {
	s := setup(b)
	m := netmodel.Model{Delay: 5 * time.Millisecond, Bandwidth: 1e9} // no link is to be what it waits for
	for _, face := range s.faces() {
		b.Run(face, func(b *testing.B) {
			ms, ratio := make([][]float64, len(states)), make([][]float64, len(states))
			for n := 0; b.Loop(); n++ {
				took := map[bool][]time.Duration{}
				for _, hang := range []bool{n%2 == 0, n%2 != 0} {
					var err error
					if took[hang], err = s.hanging(b.Context(), face, m, hang, 11); err != nil {
						b.Fatal(err)
					}
				}
				for i := range states {
					alone, hung := took[false][i].Seconds(), took[true][i].Seconds()
					ms[i] = append(ms[i], hung*1e3)
					ratio[i] = append(ratio[i], alone/hung)
				}
			}
			for i, state := range states {
				state = strings.ReplaceAll(state, " ", "-")
				b.ReportMetric(median(ms[i]), state+"-ms")
				b.ReportMetric(median(ratio[i]), state+"-of-alone")
			}
		})
	}
}

func median(all []float64) float64 {
	slices.Sort(all)
	return (all[(len(all)-1)/2] + all[len(all)/2]) / 2
}

// TestTells: what must hold is checked. A truth that is not what the image has, or a
// read that fails where none may, does not go unnoticed.
func TestTells(t *testing.T) {
	s := setup(t)
	right := s.truth
	defer func() { s.truth = right }()
	lie := *s.truth
	lie.dir = t.TempDir()
	if err := os.CopyFS(lie.dir, os.DirFS(s.truth.dir)); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(lie.dir, lie.files[0])
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	p[len(p)/2] ^= 1
	if err := os.WriteFile(name, p, 0o644); err != nil {
		t.Fatal(err)
	}
	parse := func(text string) *script.Script {
		sc, err := script.Parse(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return sc
	}
	for what, want := range map[string]string{
		"late 1ms":                            "wrong byte at " + strconv.Itoa(len(p)/2),
		"status 404\nexpect right":            "none is expected to",
		"late 1ms\nexpect EIO":                "some are expected to",
		"drop on /nowhere/\nexpect right":     "never met",
		"status 404 on manifests for 1000000": "",
	} {
		if s.truth = right; strings.Contains(want, "wrong byte") {
			s.truth = &lie
		}
		o := s.play(t.Context(), &act{name: what, script: parse(what), image: s.images[0], face: device})
		if err := errors.Join(o.errs...); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", what, err, want)
		}
	}
}

// TestOwnConverted: of an image of somebody's that was converted, the one that it was made
// of tells what is right, and without that nothing is played.
func TestOwnConverted(t *testing.T) {
	s := setup(t)
	if _, err := onRegistry(t.Context(), s.shale, s.url.String(), "faults/a:shale", ""); !errors.Is(err, errConverted) {
		t.Errorf("without -plain: %v, want errConverted", err)
	}
	for plain, want := range map[string]string{"faults/a:plain": "", "faults/b:plain": "wrong"} {
		own, err := onRegistry(t.Context(), s.shale, s.url.String(), "faults/a:shale", plain)
		if err != nil {
			t.Fatal(err)
		}
		sc, err := script.Parse(strings.NewReader("cut at 100kB\nexpect right"))
		if err != nil {
			t.Fatal(err)
		}
		own.face = device
		acts := own.acts("cut", sc, 0)
		if len(acts) != 2 {
			t.Errorf("%d acts, want one beside a healthy source and one alone", len(acts))
		}
		for _, a := range acts {
			if err, _ := own.play(t.Context(), a).err(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("as made of %s: %v: %v, want %q", plain, a, err, want)
			}
		}
		if err := own.close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRefused: without room for all of an image a mount of the face fanotify is refused,
// and one of device made. With room that is told.
func TestRefused(t *testing.T) {
	s := setup(t)
	if s.able != nil {
		t.Skip(s.able)
	}
	right := s.truth
	defer func() { s.truth = right }()
	small := *s.truth
	small.bytes = 1e6
	sc, err := script.Parse(strings.NewReader("quota 4MB\nexpect right"))
	if err != nil {
		t.Fatal(err)
	}
	for want, truth := range map[string]*truth{"": right, "there is room": &small} {
		s.truth = truth
		o := s.play(t.Context(), &act{name: "quota", script: sc, image: s.images[1], face: fanotify})
		if err, skipped := o.err(); skipped {
			t.Skip(err)
		} else if o.refused != (want == "") || (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("refused %v, %v, want %q", o.refused, err, want)
		}
	}
}

// TestNothingLeft: an image of a registry of somebody's, without an index, is here once
// it is mounted. That no fault is met then is nobody's failure.
func TestNothingLeft(t *testing.T) {
	s := setup(t)
	layout := filepath.Join(t.TempDir(), "layout")
	if err := buildImage(layout, 0); err != nil {
		t.Fatal(err)
	}
	if err := registry.Push(t.Context(), s.url.String(), layout, "faults/bare:plain"); err != nil {
		t.Fatal(err)
	}
	sc, err := script.Parse(strings.NewReader("drop\nexpect EIO"))
	if err != nil {
		t.Fatal(err)
	}
	acts := []*act{
		{name: "drop", script: sc, image: "faults/bare:plain", face: device, healthy: true},
		{name: "drop", script: sc, image: "faults/bare:plain", face: device},
	}
	bad := s.playAll(t.Context(), acts, 2, func(a *act, o *outcome) {
		if err, skipped := o.err(); skipped == a.healthy || a.healthy && err != nil {
			t.Errorf("%v: %v", a, err)
		}
	})
	if bad != 0 {
		t.Errorf("%d were bad", bad)
	}
}
