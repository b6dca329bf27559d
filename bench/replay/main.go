// Command replay runs the same cold start again and again and says what the
// fetch policy of package fill makes of it: seconds to the first byte of
// output, seconds to the end, bytes and requests. DIR is an OCI layout with a
// converted image, or with one as it is, of which an index is made first. The
// registry is a real one, the file system is the kernel's, and the network
// between them is modelled (bench/netmodel).
//
//	go run ./bench/replay [-window KIB] [-readahead KIB] ... DIR CMD [ARG...]
//
// Only fill and the kernel are measured: the image is linked beforehand, and
// the command runs in a chroot with a /tmp of its own and the host's /dev
// and /proc, not in a container. It needs root.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/registry"
	"github.com/shale-image/shale/blob/retry"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/link"
	"github.com/shale-image/shale/mount"
	"github.com/shale-image/shale/mount/fusedev"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/trace"
)

func main() {
	if len(os.Args) > 4 && os.Args[1] == insideArg {
		inside(os.Args[2], os.Args[3], os.Args[4:])
	}
	var (
		x     experiment
		runs  = flag.Int("runs", 5, "cold starts; the least of their times is shown")
		label = flag.String("label", "", "begins the line that is printed")
		trace = flag.Bool("trace", false, "list the kernel's reads and what was fetched, of the last run")
		pairs = flag.Bool("record", false, "say what recording costs: each start with it and without, by turns")
	)
	flag.BoolVar(&x.files, "files", false, "list the files that were read in the last run: bytes, read, of chunks read and fetched, of those as stored")
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
	flag.Float64Var(&x.fill.Growth, "growth", 0, "how many times window grows at most; 0 is the default, 1 not at all")
	flag.BoolVar(&x.foresight, "foresight", false, "from the second start on all is fetched that the first has read, in its order, from the first moment on: the least that a start can take")
	flag.StringVar(&x.user, "user", "0", "number of the user who runs the command")
	flag.IntVar(&x.readahead, "readahead", 0, "the kernel's readahead, KiB; 0 is that of our mounts")
	x.model = netmodel.Default
	flag.DurationVar(&x.model.Delay, "delay", netmodel.Default.Delay, "delay of each request")
	flag.Float64Var(&x.model.Bandwidth, "bandwidth", netmodel.Default.Bandwidth, "bits a second")
	flag.Parse()
	if flag.NArg() < 2 {
		flag.Usage()
		os.Exit(2)
	}
	x.command = flag.Args()[1:]
	if *pairs {
		if err := x.pairs(flag.Arg(0), *runs); err != nil {
			fmt.Fprintln(os.Stderr, "replay:", err)
			os.Exit(1)
		}
		return
	}
	all, err := x.measure(flag.Arg(0), *runs)
	if err != nil {
		fmt.Fprintln(os.Stderr, "replay:", err)
		os.Exit(1)
	}
	if *trace {
		for _, r := range all[len(all)-1].trace {
			fmt.Println(r)
		}
	}
	for _, u := range all[len(all)-1].files {
		fmt.Println(u)
	}
	fmt.Printf("%-32s %s\n", *label, sum(all))
}

func (x *experiment) measure(layout string, runs int) (all []result, err error) {
	defer x.close()
	if err := x.open(layout); err != nil {
		return nil, err
	}
	for range runs {
		r, err := x.run()
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}

// experiment is one setting of everything.
type experiment struct {
	fill      fill.Options
	readahead int
	files     bool
	foresight bool
	known     []pool.Entry // what the first start has read
	model     netmodel.Model
	user      string
	command   []string

	dir      string // scratch
	registry *registry.Registry
	proxy    *netmodel.Proxy
	tree     *index.Tree
}

type result struct {
	first, end time.Duration
	stats      fill.Stats
	trace      []event
	files      []use
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

const name = "replay:image"

// open pushes the image in an OCI layout to a real registry, whose time for each
// request counts, and reads its index or makes it.
func (x *experiment) open(layout string) (err error) {
	ctx := context.Background()
	if x.dir, err = os.MkdirTemp("", "shale-replay-"); err != nil {
		return err
	}
	if x.registry, err = registry.Start(ctx, filepath.Join(x.dir, "registry")); err != nil {
		return err
	}
	if err := registry.Push(ctx, x.registry.URL(), layout, name); err != nil {
		return err
	}
	if x.proxy, err = netmodel.Start(x.registry.URL(), x.model); err != nil {
		return err
	}
	repo, err := openRepository(ctx, x.registry.Host())
	if err != nil {
		return err
	}
	defer repo.Close()
	img, err := repo.Resolve(ctx, image.Platform{})
	if err != nil {
		return err
	}
	if x.tree, err = reader.Tree(ctx, repo, img, x.dir); !errors.Is(err, reader.ErrNoIndex) {
		return err
	}
	made, err := reader.Make(ctx, reader.Job{
		Manifest: img.ManifestDigest, Layers: img.Layers, DiffIDs: img.Config.DiffIDs, TempDir: x.dir,
		Open: func(ctx context.Context, n int) (io.ReadCloser, error) { return repo.Blob(ctx, img.Layers[n]) },
	})
	if err != nil {
		return err
	}
	defer made.Close()
	x.tree = made.Tree
	_, err = reader.Push(ctx, repo, img, made)
	return err
}

func (x *experiment) close() {
	if x.proxy != nil {
		_ = x.proxy.Close()
	}
	if x.registry != nil {
		_ = x.registry.Stop()
	}
	_ = os.RemoveAll(x.dir)
}

func openRepository(ctx context.Context, host string) (*image.Repository, error) {
	ref, err := image.ParseRef(host + "/" + name)
	if err != nil {
		return nil, err
	}
	return image.Open(ctx, ref, image.Options{})
}

// run makes one cold start.
func (x *experiment) run() (_ result, err error) {
	dir, err := os.MkdirTemp(x.dir, "run-")
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

	repo, err := openRepository(context.Background(), x.proxy.Host())
	if err != nil {
		return result{}, err
	}
	defer repo.Close()
	// The first request of a connection costs more; pull has made it.
	if _, err := repo.ResolveManifest(context.Background(), image.Platform{}); err != nil {
		return result{}, err
	}

	t := &tracer{Source: retry.New(repo.Blobs(), retry.Policy{}), start: time.Now()}
	im, err := fill.New(p, x.fill).Open(linked, t)
	if err != nil {
		return result{}, err
	}
	defer im.Close()
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return result{}, err
	}
	t.Content = im
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
	ctx, cancel := context.WithCancel(context.Background())
	told := make(chan struct{})
	go func() {
		defer close(told)
		im.FetchInOrder(ctx, x.known)
	}()
	r, err := x.start(root)
	cancel()
	<-told
	if err == nil && x.foresight && x.known == nil {
		x.known, err = read(im)
	}
	r.trace = t.noted()
	r.stats = im.Stats()
	if err == nil && x.files {
		r.files, err = uses(linked, r.trace, func(c link.Chunk) bool {
			s, off := linked.Segment(c.Flat)
			ps, ok := p.Segment(s.ID)
			return ok && ps.Present(off, int64(c.Size))
		})
	}
	return r, err
}

// read lists the chunks that were read of an image, in the order of their first reads.
func read(im *fill.Image) (all []pool.Entry, err error) {
	touches, _ := im.Touched()
	t, err := trace.Resolve(im.Linked(), "", trace.Run{}, touches)
	if err != nil {
		return nil, err
	}
	for _, b := range t.Blocks {
		all = append(all, pool.Entry{Digest: b.Chunk, Size: b.Size})
	}
	return all, nil
}

const insideArg = "inside"

// inside becomes the command, in a process that does not serve the mount: an
// execve that waits for our own answers would stop the Go runtime that is to
// give them.
func inside(root, user string, command []string) {
	uid, err := strconv.Atoi(user)
	for _, step := range []func() error{
		func() error { return unix.Mount("tmpfs", filepath.Join(root, "tmp"), "tmpfs", 0, "mode=1777") },
		func() error { return unix.Mount("/dev", filepath.Join(root, "dev"), "", unix.MS_BIND, "") },
		func() error { return unix.Mount("/proc", filepath.Join(root, "proc"), "", unix.MS_BIND, "") },
		func() error { return unix.Chroot(root) },
		func() error { return unix.Chdir("/") },
		func() error { return syscall.Setgid(uid) },
		func() error { return syscall.Setuid(uid) },
	} {
		if err == nil {
			err = step()
		}
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
	cmd := exec.Command("/proc/self/exe", append([]string{insideArg, root, x.user}, x.command...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // what is mounted ends with it
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
