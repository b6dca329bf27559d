package debian

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// bootstrap runs mmdebstrap, which writes the tree of the recipe to tarball.
// lower are the gzip layers that the packages are installed on, none to make
// the base system.
func bootstrap(ctx context.Context, r Recipe, lower []string, tarball string, log io.Writer) error {
	args := []string{"--mode=root", "--format=tar"}
	env := append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive",
		"PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if len(lower) == 0 {
		args = append(args, "--variant=minbase")
		env = append(env, fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch))
	} else {
		// Without SOURCE_DATE_EPOCH: with it, Python compiles its library in
		// a mode that reads and hashes every source file at every import.
		// Times are made reproducible by writeLayer.
		env = without(env, "SOURCE_DATE_EPOCH")
		args = append(args, "--variant=custom", "--include="+strings.Join(r.Packages, ","))
		for _, blob := range lower {
			args = append(args, "--setup-hook="+unpackHook(blob))
		}
		if r.Prepare != "" {
			args = append(args, `--setup-hook=cd "$1" && `+r.Prepare)
		}
	}
	for _, opt := range aptOptions(ctx) {
		args = append(args, "--aptopt="+opt)
	}
	args = append(args, suite, tarball)
	sources, err := hostSources("/etc/apt")
	if err != nil {
		return err
	}
	if sources != "" {
		args = append(args, "-")
	} // else mmdebstrap knows Debian's own mirrors

	cmd := exec.CommandContext(ctx, "mmdebstrap", args...)
	cmd.Env = env
	cmd.Stdin = strings.NewReader(sources)
	var tail tailWriter
	cmd.Stderr = io.MultiWriter(log, &tail)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it cleans up
	cmd.WaitDelay = 30 * time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mmdebstrap: %w: %s", err, tail.Bytes())
	}
	return nil
}

// unpackHook returns shell that applies a gzip layer to the tree at $1. No layer
// of ours replaces a directory by something else, at which tar would fail.
func unpackHook(blob string) string {
	return "blob='" + strings.ReplaceAll(blob, `'`, `'\''`) + "'\n" + unpack
}

const unpack = `set -e
gzip -dc "$blob" | tar -C "$1" --numeric-owner --xattrs --xattrs-include='*' -xpf -
find "$1" -name '.wh.*' -exec sh -c 'for w; do b=${w##*/}; rm -rf "$w" "${w%/*}/${b#.wh.}"; done' sh {} +`

func without(env []string, name string) []string {
	var out []string
	for _, e := range env {
		if !strings.HasPrefix(e, name+"=") {
			out = append(out, e)
		}
	}
	return out
}

// aptOptions returns how the machine's apt reaches its mirrors (proxies,
// timeouts), which mmdebstrap does not take over by itself.
func aptOptions(ctx context.Context) []string {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "--format", "%f \"%v\";%n", "--no-empty").Output()
	if err != nil {
		return nil
	}
	var opts []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		for _, p := range []string{"Acquire::http::", "Acquire::https::", "Acquire::Retries "} {
			if strings.HasPrefix(line, p) {
				opts = append(opts, line)
			}
		}
	}
	return opts
}

// tailWriter keeps the last 4 KiB written to it.
type tailWriter struct{ bytes.Buffer }

func (t *tailWriter) Write(p []byte) (int, error) {
	t.Buffer.Write(p)
	if extra := t.Len() - 4<<10; extra > 0 {
		t.Next(extra)
	}
	return len(p), nil
}
