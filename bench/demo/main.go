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
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/shale-image/shale/bench/debian"
	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/registry"
	"github.com/shale-image/shale/runtime"
)

func main() {
	runtime.Init() // does not return in a process that package runtime started
	var d demo
	flag.StringVar(&d.image, "image", "", "any image reference, instead of the built Debian image")
	flag.StringVar(&d.shale, "shale", "bin/shale", "the program")
	flag.StringVar(&d.cache, "cache", "build/images", "where the built image is kept")
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

	dir      string // scratch
	registry *registry.Registry
	proxy    *netmodel.Proxy
}

const (
	plainName     = "demo:plain"
	convertedName = "demo:shale"
)

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "== "+format+"\n", args...) }

func (d *demo) run(ctx context.Context) (err error) {
	if d.shale, err = filepath.Abs(d.shale); err != nil {
		return err
	}
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
	if d.dir, err = os.MkdirTemp("", "shale-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	if d.registry, err = registry.Start(ctx, filepath.Join(d.dir, "registry")); err != nil {
		return err
	}
	defer d.registry.Stop()
	say("pushing it to a registry on %s", d.registry.Host())
	if err := copyImage(ctx, ref, d.registry.Host()+"/"+plainName); err != nil {
		return err
	}
	say("converting it")
	if err := d.convert(ctx); err != nil {
		return err
	}
	if d.proxy, err = netmodel.Start(d.registry.URL(), d.model); err != nil {
		return err
	}
	defer d.proxy.Close()

	var plain, lazy []cost
	for i := range d.runs {
		say("cold start %d of %d: pull, unpack, run", i+1, d.runs)
		c, err := d.startPlain(ctx, filepath.Join(d.dir, fmt.Sprintf("plain-%d", i)))
		if err != nil {
			return err
		}
		plain = append(plain, c)
		say("cold start %d of %d: shale run", i+1, d.runs)
		if c, err = d.startLazy(ctx, filepath.Join(d.dir, fmt.Sprintf("shale-%d", i))); err != nil {
			return err
		}
		lazy = append(lazy, c)
	}
	d.print(median(plain), median(lazy))
	return nil
}

func (d *demo) print(p, l cost) {
	fmt.Printf("\n%v, %.0f Mbit/s, %v a request; medians of %d cold starts\n\n", d.command, d.model.Bandwidth/1e6, d.model.Delay, d.runs)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\tpull + unpack\tshale run\tratio\t\n")
	fmt.Fprintf(w, "bytes from the registry\t%.1f MB\t%.1f MB\t%.1f%%\t\n", mb(p.bytes), mb(l.bytes), 100*float64(l.bytes)/float64(p.bytes))
	fmt.Fprintf(w, "requests\t%d\t%d\t\t\n", p.requests, l.requests)
	fmt.Fprintf(w, "seconds to first output\t%.2f\t%.2f\t%.1fx sooner\t\n", p.first.Seconds(), l.first.Seconds(), p.first.Seconds()/l.first.Seconds())
	fmt.Fprintf(w, "disk used\t%.1f MB\t%.1f MB\t%.1f%%\t\n", mb(p.disk), mb(l.disk), 100*float64(l.disk)/float64(p.disk))
	w.Flush()
}

func mb(n int64) float64 { return float64(n) / 1e6 }

// cost is what one start took.
type cost struct {
	bytes, disk int64
	requests    int
	first       time.Duration
}

// diskUsage adds up the blocks of a directory's files.
func diskUsage(dir string) (n int64, err error) {
	seen := map[[2]uint64]bool{}
	err = filepath.WalkDir(dir, func(_ string, de fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := de.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if key := [2]uint64{st.Dev, st.Ino}; !seen[key] {
			seen[key] = true
			n += st.Blocks * 512
		}
		return nil
	})
	return n, err
}
