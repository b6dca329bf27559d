package cold

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"github.com/shale-image/shale/bench/oci"
	"github.com/shale-image/shale/bench/plain"
	"github.com/shale-image/shale/runtime"
)

// Command is what is run in a container.
type Command struct {
	Args []string // none: the image's
	User string   // "" is the image's

	// Line is how the line begins that is waited for, on either stream. If it
	// is empty, the first byte on standard output is.
	Line string
}

// Cost is what one start took.
type Cost struct {
	First       time.Duration // from the command to its output; see Command.Line
	Bytes, Disk int64         // from the registry, body bytes; on the node when the command has ended
	Requests    int           // to the registry
	Stalls      int           // reads that waited for a request, where the program tells
}

// MarshalJSON says the unit: {"seconds":0.25,"bytes":81920,"requests":7,"disk":4096,"stalls":0}.
func (c Cost) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Seconds  float64 `json:"seconds"`
		Bytes    int64   `json:"bytes"`
		Requests int     `json:"requests"`
		Disk     int64   `json:"disk"`
		Stalls   int     `json:"stalls"`
	}{c.First.Seconds(), c.Bytes, c.Requests, c.Disk, c.Stalls})
}

// Node is a machine that starts containers: a directory. Its methods must not
// be called concurrently.
type Node struct {
	lab   *Lab
	dir   string
	ended int // mounts
}

// Node returns a new node, with nothing on it. The caller calls Close.
func (l *Lab) Node() *Node {
	l.nodes++
	return &Node{lab: l, dir: filepath.Join(l.dir, "node-"+strconv.Itoa(l.nodes))}
}

// Close ends what runs on the node and removes it.
func (n *Node) Close() error {
	// What starts have left that failed or were broken off.
	_, err := runtime.Clean(n.containers())
	return errors.Join(err, n.StopService(), os.RemoveAll(n.dir))
}

func (n *Node) containers() string { return filepath.Join(n.dir, "containers") }

// StopService ends the program's service on the node, if there is one, and
// waits until it has ended. That takes until the last mount is gone.
func (n *Node) StopService() error {
	var err error
	for range 100 {
		var out []byte
		if out, err = exec.Command(n.lab.Shale, "--root", n.dir, "daemon", "stop").CombinedOutput(); err == nil {
			return nil
		}
		err = fmt.Errorf("shale daemon stop: %w: %s", err, bytes.TrimSpace(out))
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// StartService has the program's service run on the node.
func (n *Node) StartService(ctx context.Context) error {
	if out, err := command(ctx, n.lab.Shale, "--root", n.dir, "images").CombinedOutput(); err != nil {
		return fmt.Errorf("shale images: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Plain does what an engine does with the image "repository:tag": download,
// verify, unpack, run.
func (n *Node) Plain(ctx context.Context, name string, c Command) (Cost, error) {
	crun, err := runtime.Find()
	if err != nil {
		return Cost{}, err
	}
	out, err := n.begin(c)
	if err != nil {
		return Cost{}, err
	}
	defer out.close()
	stderr := os.Stderr
	if c.Line != "" {
		stderr = out.w
	}
	_, err = plain.Start(ctx, plain.Options{
		Registry: n.lab.proxy.URL(), Name: name, Dir: n.dir,
		Run: func(ctx context.Context, rootfs string, config oci.Image) error {
			root, err := os.Open(rootfs)
			if err != nil {
				return err
			}
			defer root.Close()
			js, err := json.Marshal(config.Config)
			if err != nil {
				return err
			}
			var ic runtime.ImageConfig
			if err := json.Unmarshal(js, &ic); err != nil {
				return err
			}
			cfg, err := runtime.Merge(ic, runtime.Flags{Args: c.Args, User: c.User})
			if err != nil {
				return err
			}
			o := runtime.Options{Runtime: crun, StateDir: n.containers(), Remove: true, Stdout: out.w, Stderr: stderr}
			code, err := runtime.Run(ctx, o, root, cfg)
			if err == nil && code != 0 {
				err = fmt.Errorf("exit code %d", code)
			}
			return err
		},
	})
	return n.end(out, err)
}

// Lazy is shale run. On a new node not even the service runs yet; it does
// when Lazy returns.
func (n *Node) Lazy(ctx context.Context, name string, c Command) (Cost, error) {
	args := []string{"--root", n.dir, "run", "--rm"}
	if c.User != "" {
		args = append(args, "--user", c.User)
	}
	args = append(args, n.lab.proxy.Host()+"/"+name)
	cmd := command(ctx, n.lab.Shale, append(args, c.Args...)...)
	out, err := n.begin(c)
	if err != nil {
		return Cost{}, err
	}
	defer out.close()
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = out.w, &stderr
	if c.Line != "" {
		cmd.Stderr = out.w
	}
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("shale run: %w\n%s", err, stderr.Bytes())
	}
	cost, err := n.end(out, err)
	if err == nil {
		cost.Stalls = n.stalls()
	}
	return cost, err
}

var reStalls = regexp.MustCompile(` stalls=(\d+)`)

// stalls is what the service says of the last mount when that has ended.
func (n *Node) stalls() (last int) {
	log, _ := os.ReadFile(filepath.Join(n.dir, "daemon.log"))
	all := reStalls.FindAllSubmatch(log, -1)
	n.ended++
	for range 100 {
		if len(all) >= n.ended {
			break
		}
		time.Sleep(10 * time.Millisecond)
		log, _ = os.ReadFile(filepath.Join(n.dir, "daemon.log"))
		all = reStalls.FindAllSubmatch(log, -1)
	}
	if len(all) > 0 {
		last, _ = strconv.Atoi(string(all[len(all)-1][1]))
	}
	return last
}

// begin starts to measure.
func (n *Node) begin(c Command) (*output, error) {
	if n.lab.DropCaches {
		syscall.Sync()
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return nil, err
		}
	}
	n.lab.proxy.Reset()
	return newOutput(c.Line)
}

// end tells what was measured of a start, which may have failed.
func (n *Node) end(out *output, err error) (Cost, error) {
	t := n.lab.proxy.Totals()
	out.close()
	if err != nil {
		return Cost{}, out.explain(err)
	}
	first, err := out.first()
	if err != nil {
		return Cost{}, err
	}
	disk, err := diskUsage(n.dir)
	return Cost{First: first, Bytes: t.Down, Requests: t.Requests, Disk: disk}, err
}

// diskUsage adds up the blocks of a directory's files. The service may be
// removing some of them.
func diskUsage(dir string) (n int64, err error) {
	seen := map[[2]uint64]bool{}
	err = filepath.WalkDir(dir, func(_ string, de fs.DirEntry, err error) error {
		var info fs.FileInfo
		if err == nil {
			info, err = de.Info()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if key := [2]uint64{uint64(st.Dev), st.Ino}; !seen[key] {
			seen[key] = true
			n += st.Blocks * 512
		}
		return nil
	})
	return n, err
}
