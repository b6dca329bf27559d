// Command demo shows what Shale is for, on real input: a Debian image with
// python3 is built from Debian packages and pushed to a real registry, then
// started cold twice through a modelled network: by full pull and unpack, and
// lazily. It prints what both cost and leaves nothing behind but the cached
// image.
//
//	go run ./bench/demo [-image REF] [CMD...]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"

	"github.com/shale-image/shale/bench/debian"
	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/start/cold"
	"github.com/shale-image/shale/runtime"
)

func main() {
	runtime.Init() // does not return in a process that package runtime started
	var d demo
	flag.StringVar(&d.image, "image", "", "any image reference, instead of the built Debian image")
	flag.StringVar(&d.shale, "shale", "bin/shale", "the program")
	flag.StringVar(&d.cache, "cache", "build/images", "where the built image is kept")
	d.model = netmodel.Default
	flag.DurationVar(&d.model.Delay, "delay", netmodel.Default.Delay, "delay of each request")
	flag.Float64Var(&d.model.Bandwidth, "bandwidth", netmodel.Default.Bandwidth, "bits a second")
	flag.StringVar(&d.chunkSize, "chunk-size", "", "of the converted image (default: the program's)")
	flag.IntVar(&d.runs, "runs", 3, "cold starts of each kind; medians are shown")
	flag.Parse()
	d.command = flag.Args()
	if len(d.command) == 0 && d.image == "" {
		d.command = []string{"python3", "-c", `print("hello")`}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := d.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

type demo struct {
	image, shale, cache string
	chunkSize           string
	command             []string
	model               netmodel.Model
	runs                int
}

const (
	plainName     = "demo:plain"
	convertedName = "demo:shale"
)

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "== "+format+"\n", args...) }

func (d *demo) run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root: run `sudo make demo`")
	}
	ref := d.image
	if ref == "" {
		say("building the Debian image (once; about a minute)")
		dir, err := debian.Build(ctx, debian.Python, d.cache, os.Stderr)
		if err != nil {
			return err
		}
		ref = "oci:" + dir
	}
	lab, err := cold.Open(ctx, cold.Options{Shale: d.shale, Model: d.model})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	say("pushing it to a registry on %s", lab.Host())
	if err := lab.Push(ctx, ref, plainName); err != nil {
		return err
	}
	say("converting it")
	var flags []string
	if d.chunkSize != "" {
		flags = []string{"--chunk-size", d.chunkSize}
	}
	if err := lab.Convert(ctx, plainName, convertedName, flags...); err != nil {
		return err
	}

	command := cold.Command{Args: d.command}
	var plain, lazy []cold.Cost
	for i := range d.runs {
		say("cold start %d of %d: pull, unpack, run", i+1, d.runs)
		c, err := onNewNode(lab, func(n *cold.Node) (cold.Cost, error) { return n.Plain(ctx, plainName, command) })
		if err != nil {
			return err
		}
		plain = append(plain, c)
		say("cold start %d of %d: shale run", i+1, d.runs)
		c, err = onNewNode(lab, func(n *cold.Node) (cold.Cost, error) { return n.Lazy(ctx, convertedName, command) })
		if err != nil {
			return err
		}
		lazy = append(lazy, c)
	}
	d.print(cold.Median(plain), cold.Median(lazy))
	return nil
}

func onNewNode(lab *cold.Lab, start func(*cold.Node) (cold.Cost, error)) (cold.Cost, error) {
	n := lab.Node()
	c, err := start(n)
	return c, errors.Join(err, n.Close())
}

func (d *demo) print(p, l cold.Cost) {
	fmt.Printf("\n%v, %.0f Mbit/s, %v a request; medians of %d cold starts\n\n", d.command, d.model.Bandwidth/1e6, d.model.Delay, d.runs)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\tpull + unpack\tshale run\tratio\t\n")
	fmt.Fprintf(w, "bytes from the registry\t%.1f MB\t%.1f MB\t%.1f%%\t\n", mb(p.Bytes), mb(l.Bytes), 100*float64(l.Bytes)/float64(p.Bytes))
	fmt.Fprintf(w, "requests\t%d\t%d\t\t\n", p.Requests, l.Requests)
	fmt.Fprintf(w, "seconds to first output\t%.2f\t%.2f\t%.1fx sooner\t\n", p.First.Seconds(), l.First.Seconds(), p.First.Seconds()/l.First.Seconds())
	fmt.Fprintf(w, "disk used\t%.1f MB\t%.1f MB\t%.1f%%\t\n", mb(p.Disk), mb(l.Disk), 100*float64(l.Disk)/float64(p.Disk))
	w.Flush()
}

func mb(n int64) float64 { return float64(n) / 1e6 }
