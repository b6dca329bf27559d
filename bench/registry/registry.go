// Package registry runs a real registry, Debian's docker-registry, on
// loopback, and pushes images to it. It must not know what they are for.
package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// program is the name of the Debian package, and of what is in it.
const program = "docker-registry"

// startTimeout bounds the wait for the first answer; 0.1 s is usual.
const startTimeout = 15 * time.Second

// Registry is a running registry. It ends with Stop, or with this process.
type Registry struct {
	host    string
	logFile string
	process *os.Process
	done    chan struct{} // closed when the process has ended
	err     error         // how; valid once done is closed
}

// Start runs a registry on a free loopback port that keeps its content, a
// config and a log in dir, and waits until it answers. dir is created if need
// be; its content outlives the registry. The caller calls Stop.
//
// It is an error that wraps exec.ErrNotFound if docker-registry is missing.
func Start(ctx context.Context, dir string) (*Registry, error) {
	bin, err := lookPath()
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, "content"), 0o755); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, configFormat, filepath.Join(dir, "content")), 0o644); err != nil {
		return nil, err
	}
	r := &Registry{logFile: filepath.Join(dir, "log"), done: make(chan struct{})}
	log, err := os.Create(r.logFile)
	if err != nil {
		return nil, err
	}
	defer log.Close()

	cmd := exec.Command(bin, "serve", config)
	cmd.Env = cleanEnv(os.Environ())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends, not
		// the process: keep the thread as long as the registry.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			r.err = cmd.Wait()
			close(r.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	r.process = cmd.Process
	if err := r.wait(ctx); err != nil {
		r.Stop()
		return nil, err
	}
	return r, nil
}

// configFormat has the registry choose its port: it logs which.
const configFormat = `version: 0.1
log:
  level: info
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: %q
  cache:
    blobdescriptor: inmemory
http:
  addr: 127.0.0.1:0
  relativeurls: true
`

// lookPath finds the program, also where only root's PATH looks.
func lookPath() (string, error) {
	bin, err := exec.LookPath(program)
	if err == nil {
		return bin, nil
	}
	if bin, err2 := exec.LookPath("/usr/sbin/" + program); err2 == nil {
		return bin, nil
	}
	return "", fmt.Errorf("registry: %w (Debian package %s)", err, program)
}

// cleanEnv leaves out what the registry would take as configuration.
func cleanEnv(env []string) []string {
	var out []string
	for _, e := range env {
		if !strings.HasPrefix(e, "REGISTRY_") && !strings.HasPrefix(e, "OTEL_") {
			out = append(out, e)
		}
	}
	return out
}

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)

// wait returns when the registry has answered.
func (r *Registry) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		log, err := os.ReadFile(r.logFile)
		if err != nil {
			return err
		}
		if m := listening.FindSubmatch(log); m != nil {
			r.host = string(m[1])
			if err := ping(ctx, r.URL()); err == nil {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("registry: no answer: %w: %s", ctx.Err(), bytes.TrimSpace(log))
		case <-r.done:
			if last, err := os.ReadFile(r.logFile); err == nil {
				log = last // all that it said
			}
			return fmt.Errorf("registry: ended at once: %v: %s", r.err, bytes.TrimSpace(log))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func ping(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/v2/", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// Host returns the registry's address, "127.0.0.1:<port>".
func (r *Registry) Host() string { return r.host }

// URL returns "http://" and the registry's address.
func (r *Registry) URL() string { return "http://" + r.host }

// PID returns the process id of the registry.
func (r *Registry) PID() int { return r.process.Pid }

// Stop ends the registry and waits until it has. It may be called again.
func (r *Registry) Stop() error {
	// What the registry has acknowledged is in files: nothing to be gentle for.
	if err := r.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("registry: %w", err)
	}
	<-r.done
	return nil
}
