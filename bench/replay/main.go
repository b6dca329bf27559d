// Command replay runs the same cold start again and again and says what the
// fetch policy of package fill makes of it: seconds to the first byte of
// output, seconds to the end, bytes and requests. The image is a real one, its
// file system is the kernel's, and the network is modelled (bench/netmodel).
//
//	go run ./bench/replay [-window KIB] [-readahead KIB] ... oci:DIR:TAG CMD [ARG...]
//
// Only fill and the kernel are measured: the image is linked beforehand, and
// the command runs in a chroot, not in a container. It needs root.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/blob/httpblob"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/mount/fusedev"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
)

func main() {
	if len(os.Args) > 3 && os.Args[1] == insideArg {
		inside(os.Args[2], os.Args[3:])
	}
	var (
		x     experiment
		runs  = flag.Int("runs", 5, "cold starts; the least of their times is shown")
		label = flag.String("label", "", "begins the line that is printed")
		trace = flag.Bool("trace", false, "list the kernel's reads of the last run")
	)
	kib := func(name string, p *int64, usage string) {
		flag.Func(name, usage+", KiB", func(s string) error {
			_, err := fmt.Sscan(s, p)
			*p <<= 10
			return err
		})
	}
	kib("window", &x.fill.Window, "stored bytes a miss fetches of a file")
	kib("ahead", &x.fill.Ahead, "how far to fetch ahead of a sequential reader")
	kib("neighbours", &x.fill.Neighbours, "stored bytes of the files behind it")
	flag.IntVar(&x.readahead, "readahead", 0, "the kernel's readahead, KiB; 0 is its default of 128")
	flag.DurationVar(&x.model.Delay, "delay", netmodel.Default.Delay, "delay of each request")
	flag.Float64Var(&x.model.Bandwidth, "bandwidth", netmodel.Default.Bandwidth, "bits a second")
	flag.Parse()
	if flag.NArg() < 2 {
		flag.Usage()
		os.Exit(2)
	}
	x.command = flag.Args()[1:]
	if err := x.open(flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "replay:", err)
		os.Exit(1)
	}
	var all []result
	for range *runs {
		r, err := x.run()
		if err != nil {
			fmt.Fprintln(os.Stderr, "replay:", err)
			os.Exit(1)
		}
		all = append(all, r)
	}
	if *trace {
		for _, r := range all[len(all)-1].trace {
			fmt.Println(r)
		}
	}
	fmt.Printf("%-32s %s\n", *label, sum(all))
}

// experiment is one setting of everything.
type experiment struct {
	fill      fill.Options
	readahead int
	model     netmodel.Model
	command   []string

	blobs string // directory of the layout's blobs
	tree  *index.Tree
}

type result struct {
	first, end time.Duration
	stats      fill.Stats
	trace      []read
}

// sum gives the least times, since other work on the machine only adds to
// them, and the medians of what was fetched.
func sum(all []result) string {
	mid := func(get func(result) float64) float64 {
		v := make([]float64, len(all))
		for i, r := range all {
			v[i] = get(r)
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	least := func(get func(result) time.Duration) float64 {
		d := get(all[0])
		for _, r := range all {
			d = min(d, get(r))
		}
		return d.Seconds()
	}
	return fmt.Sprintf("first %.3f s, end %.3f s, %.2f MB, %.0f requests",
		least(func(r result) time.Duration { return r.first }),
		least(func(r result) time.Duration { return r.end }),
		mid(func(r result) float64 { return float64(r.stats.FetchedBytes) / 1e6 }),
		mid(func(r result) float64 { return float64(r.stats.Requests) }))
}

// open reads the index of a converted image in an OCI layout.
func (x *experiment) open(name string) error {
	ctx := context.Background()
	ref, err := image.ParseRef(name)
	if err != nil {
		return err
	}
	repo, err := image.Open(ctx, ref, image.Options{})
	if err != nil {
		return err
	}
	defer repo.Close()
	img, err := repo.Resolve(ctx, image.Platform{})
	if err != nil {
		return err
	}
	if x.tree, err = reader.Tree(ctx, repo, img, os.TempDir()); err != nil {
		return err
	}
	dir, _, _ := strings.Cut(strings.TrimPrefix(name, "oci:"), ":")
	x.blobs = filepath.Join(dir, "blobs", "sha256")
	return nil
}

// run makes one cold start.
func (x *experiment) run() (_ result, err error) {
	dir, err := os.MkdirTemp("", "shale-replay-")
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	p, err := pool.Open(filepath.Join(dir, "pool"))
	if err != nil {
		return result{}, err
	}
	defer p.Close()
	if err := link.Link(context.Background(), x.tree, p, filepath.Join(dir, "linked")); err != nil {
		return result{}, err
	}
	linked, err := link.Open(filepath.Join(dir, "linked"))
	if err != nil {
		return result{}, err
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return result{}, err
	}
	server := &http.Server{Handler: http.FileServer(http.Dir(x.blobs))}
	go server.Serve(l)
	defer server.Close()
	proxy, err := netmodel.Start("http://"+l.Addr().String(), x.model)
	if err != nil {
		return result{}, err
	}
	defer proxy.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	defer client.CloseIdleConnections()
	source := httpblob.New(client, func(ref blob.Ref) string {
		return proxy.URL() + "/" + strings.TrimPrefix(ref.Digest, "sha256:")
	})

	im, err := fill.New(p, x.fill).Open(linked, source)
	if err != nil {
		return result{}, err
	}
	defer im.Close()
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return result{}, err
	}
	t := &tracer{Content: im}
	m, err := mount.Device(context.Background(), t, mount.Options{Options: fusedev.Options{Name: "replay"}, ReadAheadKiB: x.readahead})
	if err != nil {
		return result{}, err
	}
	defer func() {
		m.Close()
		err = errors.Join(err, unix.Unmount(root, unix.MNT_DETACH))
		<-m.Done()
	}()
	if err := mount.Attach(m.FD(), root); err != nil {
		return result{}, err
	}
	t.start = time.Now()
	r, err := x.start(root)
	r.trace = t.reads
	r.stats = im.Stats()
	return r, err
}

const insideArg = "inside"

// inside becomes the command, in a process that does not serve the mount: an
// execve that waits for our own answers would stop the Go runtime that is to
// give them.
func inside(root string, command []string) {
	err := unix.Chroot(root)
	if err == nil {
		err = unix.Chdir("/")
	}
	if err == nil {
		path := command[0]
		if !filepath.IsAbs(path) {
			path = filepath.Join("/usr/bin", path)
		}
		err = unix.Exec(path, command, []string{"PATH=/usr/bin", "PYTHONDONTWRITEBYTECODE=1"})
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(127)
}

// start runs the command in the root directory until its end.
func (x *experiment) start(root string) (r result, err error) {
	var stderr bytes.Buffer
	cmd := exec.Command("/proc/self/exe", append([]string{insideArg, root}, x.command...)...)
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return r, err
	}
	buf := make([]byte, 64<<10)
	if _, err := out.Read(buf); err == nil {
		r.first = time.Since(start)
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, out, buf)
	if e := cmd.Wait(); e != nil {
		return r, fmt.Errorf("%v: %w\n%s", x.command, e, stderr.Bytes())
	}
	r.end = time.Since(start)
	return r, err
}
