package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
)

const (
	// helperTime is long enough for a person to unlock a key ring.
	helperTime = 2 * time.Minute
	helperSays = 64 << 10 // bytes at most; tokens have a few KiB
)

// runHelper asks docker-credential-NAME for the credentials of a server.
func runHelper(ctx context.Context, name, server string) (Credentials, error) {
	if strings.ContainsAny(name, "/\x00") {
		return Credentials{}, fmt.Errorf("credential helper %q: not a name", name)
	}
	ctx, cancel := context.WithTimeout(ctx, helperTime)
	defer cancel()
	begun := time.Now()
	cmd := exec.CommandContext(ctx, "docker-credential-"+name, "get")
	cmd.Stdin = strings.NewReader(server)
	cmd.WaitDelay = time.Second
	// It ends with this process; the kernel thinks that is the thread.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var out, errs bounded
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		// This is how helpers say that they have none; it goes to stdout.
		if strings.Contains(out.said.String()+errs.said.String(), "credentials not found") {
			return Credentials{}, nil
		}
		if ctx.Err() != nil {
			err = fmt.Errorf("it was given up after %v", time.Since(begun).Round(time.Second))
		}
		return Credentials{}, fmt.Errorf("credential helper docker-credential-%s: %w: %.200q", name, err, errs.said.String())
	}
	var reply struct{ Username, Secret string }
	if err := json.Unmarshal(out.said.Bytes(), &reply); err != nil {
		return Credentials{}, fmt.Errorf("credential helper docker-credential-%s: its answer is not valid JSON", name)
	}
	if reply.Username == "<token>" {
		return Credentials{IdentityToken: reply.Secret}, nil
	}
	return Credentials{Username: reply.Username, Password: reply.Secret}, nil
}

// bounded keeps what a helper says, and fails when that is more than one may say.
type bounded struct{ said bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.said.Len()+len(p) > helperSays {
		return 0, errors.New("it says too much")
	}
	return b.said.Write(p)
}
