// Command faults plays scripts of faults to the program, and checks that nobody who
// reads an image sees a wrong byte, nor, while one source is well, an error:
//
//	go run ./bench/faults                          # each script, and 100 by chance: make faults
//	go run ./bench/faults -script FILE             # one
//	go run ./bench/faults -registry https://registry.example -script FILE team/app:1 [CMD...]
//
// In front of a real registry stands a proxy that acts the script out. A real node,
// keeper and worker, mounts an image through it, and all files are read and compared
// with what tar has extracted of the layers: once with the registry itself as a second
// source, and once without. Faults of the disk are acted out below the node's
// directory. docs/FAULTS.md has the language and what is checked.
package main

import (
	"bytes"
	"cmp"
	"context"
	"embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/shale-image/shale/bench/faults/script"
)

//go:embed scripts/*.txt
var embedded embed.FS

func main() {
	var f faults
	flag.StringVar(&f.shale, "shale", "bin/shale", "the program")
	flag.StringVar(&f.registry, "registry", "", "URL of a registry that has the image, instead of one with a small image in it")
	flag.StringVar(&f.plain, "plain", "", "`REPOSITORY:TAG` there of which the image was made, if it was converted")
	flag.StringVar(&f.script, "script", "", "file of a script, instead of all there are")
	flag.IntVar(&f.random, "random", 100, "so many more scripts of three faults by chance, if no script is named")
	flag.Uint64Var(&f.seed, "seed", 0, "of the first script by chance, and no other scripts; by default it is the time, and all others are played first")
	flag.StringVar(&f.face, "face", "", "how images are mounted: device or fanotify; by default device, and each script once with fanotify where that can be")
	flag.IntVar(&f.jobs, "jobs", 4, "scripts at a time")
	flag.DurationVar(&f.timeout, "read-timeout", 2*time.Second, "how long reads wait")
	flag.BoolVar(&f.verbose, "v", false, "tell more of those that went well")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: faults [flags] [-registry URL [-plain REPOSITORY:TAG] REPOSITORY:TAG [CMD...]]\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := f.run(ctx, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		os.Exit(1)
	}
}

type faults struct {
	shale, registry, plain, script, face string
	random, jobs                         int
	seed                                 uint64
	timeout                              time.Duration
	verbose                              bool
}

func (f *faults) run(ctx context.Context, args []string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root: run `sudo make faults`")
	}
	if f.face != "" && f.face != device && f.face != fanotify {
		return fmt.Errorf("-face %q: want %s or %s", f.face, device, fanotify)
	}
	var s *stage
	switch {
	case f.registry == "" && f.plain == "" && len(args) == 0:
		s, err = openStage(ctx, f.shale)
	case f.registry == "" || len(args) == 0:
		return errors.New("a registry of your own takes -registry URL, and an image in it: REPOSITORY:TAG [CMD...]")
	default:
		s, err = onRegistry(ctx, f.shale, f.registry, args[0], f.plain)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	s.timeout, s.face = f.timeout, f.face
	switch {
	case s.able == nil || f.face == device:
	case f.face == fanotify:
		return s.able
	default:
		fmt.Println("skip", s.able)
	}
	var acts []*act
	if f.script != "" {
		sc, err := readScript(f.script)
		if err != nil {
			return err
		}
		acts = s.acts(filepath.Base(f.script), sc, 0)
	} else {
		first := f.seed
		if first == 0 {
			first = uint64(time.Now().Unix())
		}
		if f.seed == 0 && s.other != "" {
			for _, face := range s.faces() {
				if _, err := s.hanging(ctx, face, s.model(), true, 1); err != nil {
					return fmt.Errorf("64 reads of an image hang, %s: %w", face, err)
				}
				fmt.Printf("ok   64 reads of an image hang, %s: another one is read\n", face)
			}
		}
		if f.seed == 0 {
			if acts, err = s.all(); err != nil {
				return err
			}
		}
		for seed := first; seed < first+uint64(f.random); seed++ {
			acts = append(acts, s.acts(fmt.Sprintf("seed %d", seed), script.Random(seed, 3), int(seed%1000))...)
		}
	}
	if len(args) > 1 {
		for _, a := range acts {
			a.command = args[1:]
		}
	}
	bad := s.playAll(ctx, acts, f.jobs, func(a *act, o *outcome) { report(os.Stdout, a, o, f.verbose) })
	if ctx.Err() != nil {
		return ctx.Err()
	}
	fmt.Printf("%d scripts played, %d of them badly\n", len(acts), bad)
	if bad > 0 {
		return errors.New("what must hold does not")
	}
	return nil
}

func readScript(file string) (*script.Script, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	sc, err := script.Parse(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return sc, nil
}

// acts are the ways in which a script is played: with another source, if the network is
// to fail, and without, of each form of the image; and the last of them with the other
// face, once, in the n-th of these ways.
func (s *stage) acts(name string, sc *script.Script, n int) (all []*act) {
	images := s.images
	if sc.Packs() {
		images = s.packed
	}
	for _, image := range images {
		if sc.Network() {
			all = append(all, &act{name: name, script: sc, image: image, face: cmp.Or(s.face, device), healthy: true})
		}
		all = append(all, &act{name: name, script: sc, image: image, face: cmp.Or(s.face, device)})
	}
	if s.face == "" && s.able == nil && len(all) > 0 {
		once := *all[n%len(all)]
		once.face = fanotify
		all = append(all, &once)
	}
	return all
}

// all are the acts of all scripts of the suite.
func (s *stage) all() (all []*act, err error) {
	files, err := embedded.ReadDir("scripts")
	if err != nil {
		return nil, err
	}
	for n, e := range files {
		b, err := embedded.ReadFile("scripts/" + e.Name())
		if err != nil {
			return nil, err
		}
		sc, err := script.Parse(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.Name(), err)
		}
		all = append(all, s.acts(strings.TrimSuffix(e.Name(), ".txt"), sc, n)...)
	}
	return all, nil
}

// playAll plays acts, some at a time and in any order, and returns how many were bad.
func (s *stage) playAll(ctx context.Context, acts []*act, jobs int, done func(*act, *outcome)) (bad int) {
	acts = slices.Clone(acts)
	// Those that wait and those that work are mixed.
	rand.Shuffle(len(acts), func(i, j int) { acts[i], acts[j] = acts[j], acts[i] })
	next := make(chan *act)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range jobs {
		wg.Go(func() {
			for a := range next {
				o := s.play(ctx, a)
				mu.Lock()
				if err, skipped := o.err(); err != nil && !skipped {
					bad++
				}
				done(a, o)
				mu.Unlock()
			}
		})
	}
	for _, a := range acts {
		if ctx.Err() != nil {
			break
		}
		next <- a
	}
	close(next)
	wg.Wait()
	return bad
}

// report tells how an act went.
func report(w io.Writer, a *act, o *outcome, verbose bool) {
	state := "ok  "
	switch err, skipped := o.err(); {
	case skipped:
		state = "skip"
	case err != nil:
		state = "BAD "
	}
	fmt.Fprintf(w, "%s %v: %.1f s", state, a, o.took.Seconds())
	if o.refused {
		fmt.Fprintf(w, ", %s refused for want of room", a.face)
	}
	if o.during != nil {
		fmt.Fprintf(w, ", %d files right, %d failed; faults met: %d", o.during.Files, len(o.during.Failed), o.met)
	}
	fmt.Fprintln(w)
	if state == "BAD " || verbose {
		fmt.Fprintf(w, "  %s\n", strings.ReplaceAll(strings.TrimSpace(a.script.String()), "\n", "\n  "))
		tell(w, "reads failed", o.why)
	}
	if state != "ok  " {
		for _, err := range o.errs {
			fmt.Fprintf(w, "  %v\n", err)
		}
	}
	if state == "BAD " {
		fmt.Fprintf(w, "  the end of the service's log:\n    %s\n", strings.ReplaceAll(strings.TrimSpace(o.log), "\n", "\n    "))
	}
}
