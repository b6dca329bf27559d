// Command start measures cold starts of real images through a modelled
// network, in every way there is to start them: by full pull and unpack, and
// lazily, converted or as they are, with and without an index. It prints a
// table of medians and leaves nothing behind but the cached images.
//
//	go run ./bench/start [-images python,numpy] [-modes plain,convert,index,none,pack,traces,soci]
//	    [-compression gzip|zstd|zstd-frames] [-service] [-runs 3] [-json FILE]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/shale-image/shale/bench/debian"
	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/start/cold"
	"github.com/shale-image/shale/runtime"
)

func main() {
	runtime.Init() // does not return in a process that package runtime started
	var b bench
	images := flag.String("images", "", "comma-separated names of images or workloads (default all)")
	modes := flag.String("modes", "plain,convert,index,none", "comma-separated ways to start")
	compression := flag.String("compression", string(debian.Gzip), "of the images' layers: gzip, zstd or zstd-frames")
	jsonFile := flag.String("json", "", "file to write all that was measured to")
	flag.IntVar(&b.runs, "runs", 3, "cold starts of each kind")
	cache := flag.String("cache", "build/images", "where the built images are kept")
	flag.StringVar(&b.lab.Shale, "shale", "bin/shale", "the program")
	flag.BoolVar(&b.lab.Service, "service", false, "the node's service runs before the start")
	b.lab.Model = netmodel.Default
	flag.DurationVar(&b.lab.Model.Delay, "delay", netmodel.Default.Delay, "delay of each request")
	flag.Float64Var(&b.lab.Model.Bandwidth, "bandwidth", netmodel.Default.Bandwidth, "bits a second")
	flag.BoolVar(&b.lab.DropCaches, "drop-caches", false, "drop the machine's page cache before each start: also programs come from disk then")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.choose(*images, *modes, *compression); err != nil {
		fmt.Fprintln(os.Stderr, "start:", err)
		os.Exit(2)
	}
	b.image = func(ctx context.Context, r debian.Recipe) (string, error) {
		return debian.Build(ctx, r, *cache, os.Stderr)
	}
	err := b.run(ctx)
	if len(b.report.Starts) > 0 { // also what was measured before an error
		b.report.print(os.Stdout)
		if *jsonFile != "" {
			err = errors.Join(err, b.report.write(*jsonFile))
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "start:", err)
		os.Exit(1)
	}
}

// bench is one run of the program.
type bench struct {
	lab         cold.Options
	image       func(context.Context, debian.Recipe) (dir string, err error)
	runs        int
	compression debian.Compression
	workloads   []debian.Workload
	modes       []mode
	report      report
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "== "+format+"\n", args...) }

// run measures everything. What fails for one workload keeps none of the
// others from being measured; errors are told together.
func (b *bench) run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root")
	}
	dirs := map[string]string{} // of images, by name
	for _, w := range b.workloads {
		if dirs[w.Image.Name], err = b.image(ctx, w.Image); err != nil {
			return err
		}
	}
	lab, err := cold.Open(ctx, b.lab)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	b.report = report{
		DelaySeconds: b.lab.Model.Delay.Seconds(), Bandwidth: b.lab.Model.Bandwidth,
		Compression: b.compression, Runs: b.runs,
	}
	ready := map[string]error{} // what preparing a repository has led to
	var failed error
	for _, w := range b.workloads {
		for _, m := range b.modes {
			repo := m.repo(w)
			if _, ok := ready[repo]; !ok {
				ready[repo] = m.prepare(ctx, lab, "oci:"+dirs[w.Image.Name], w)
			}
		}
		failed = errors.Join(failed, b.measure(ctx, lab, w, ready))
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return failed
}

// measure starts one workload in all modes, by turns, so that what else the
// machine does meets all alike.
func (b *bench) measure(ctx context.Context, lab *cold.Lab, w debian.Workload, ready map[string]error) error {
	starts := make([]start, len(b.modes))
	errs := make([]error, len(b.modes))
	for i, m := range b.modes {
		starts[i] = start{Workload: w.Name, Image: w.Image.Name, Mode: m.name}
		errs[i] = ready[m.repo(w)]
	}
	for run := range b.runs {
		for i, m := range b.modes {
			if errs[i] != nil || ctx.Err() != nil {
				continue
			}
			say("%s, %s: cold start %d of %d", w.Name, m.name, run+1, b.runs)
			errs[i] = starts[i].once(ctx, lab, m, w)
		}
	}
	if ctx.Err() != nil {
		return ctx.Err() // half of it says nothing
	}
	var failed error
	for i, m := range b.modes {
		if err := errs[i]; err != nil {
			starts[i].Error = err.Error()
			starts[i].Absent = errors.Is(err, cold.ErrNoIndex)
			if !starts[i].Absent {
				failed = errors.Join(failed, fmt.Errorf("%s, %s: %w", w.Name, m.name, err))
			}
		}
	}
	b.report.Starts = append(b.report.Starts, starts...)
	return failed
}

// once measures a start on a new node, and another one there if the mode is
// one that must not fetch anything twice.
func (s *start) once(ctx context.Context, lab *cold.Lab, m mode, w debian.Workload) (err error) {
	node := lab.Node()
	defer func() { err = errors.Join(err, node.Close()) }()
	if lab.Service {
		if err := node.StartService(ctx); err != nil {
			return err
		}
	}
	name := m.repo(w) + ":" + m.tag
	command := cold.Command{Args: w.Command, User: w.User, Line: w.Line}
	first, err := m.start(node, ctx, name, command)
	if err != nil {
		return err
	}
	s.First = append(s.First, first)
	if !m.again {
		return nil
	}
	// What is on the node must do, not only what its service remembers.
	if err := node.StopService(); err != nil {
		return err
	}
	again, err := m.start(node, ctx, name, command)
	if err != nil {
		return fmt.Errorf("second start: %w", err)
	}
	s.Again = append(s.Again, again)
	return nil
}
