package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/keeper"
)

// looker is the name of the process that looks credentials up. It runs as the user
// whose they are, and is not trusted: it may say what that user likes.
const looker = "shale-looker"

const (
	lookupTime = 20 * time.Second
	lookupSays = 16 << 10 // bytes at most
)

// become is what makes a process one of who called; nil if it is one as it is. This
// process can become another user if it is root's.
func become(p *keeper.Peer) (*syscall.Credential, error) {
	uid, gid := os.Geteuid(), os.Getegid()
	if uid != 0 && int(p.UID) != uid {
		return nil, fmt.Errorf("user %d cannot run anything as user %d: %w", uid, p.UID, os.ErrPermission)
	}
	groups, err := os.Getgroups()
	if err != nil {
		return nil, err
	}
	same := int(p.UID) == uid && int(p.GID) == gid && slices.EqualFunc(p.Groups, groups, func(a uint32, b int) bool { return int(a) == b })
	if uid != 0 || same {
		return nil, nil
	}
	return &syscall.Credential{Uid: p.UID, Gid: p.GID, Groups: p.Groups}, nil
}

// lookUpAs has the credentials for an image looked up by a process of the user who
// called, in that environment, which it has only when it is that user's.
func lookUpAs(ctx context.Context, caller *keeper.Peer, env image.Environment, ref image.Ref) (c image.Credentials, err error) {
	as, err := become(caller)
	if err != nil {
		return c, err
	}
	within, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	var out brief
	cmd := exec.CommandContext(within, "/proc/self/exe")
	cmd.Args, cmd.Dir = []string{looker}, "/"
	cmd.Env = append([]string{}, env...) // nothing of this process'
	cmd.Stdin, cmd.Stdout = strings.NewReader(ref.String()), &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // helpers, too
	cmd.WaitDelay = time.Second
	// What this process has inherited without knowing is not for others.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil && err != unix.ENOSYS && err != unix.EINVAL {
		return c, os.NewSyscallError("close_range", err)
	}
	if err := orSaid(ctx, runOnThread(cmd), out.said.Bytes()); err != nil {
		if within.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("it takes longer than %v", lookupTime)
		}
		return c, fmt.Errorf("%.500s", err.Error())
	}
	if err := json.Unmarshal(out.said.Bytes(), &c); err != nil {
		return image.Credentials{}, errors.New("what was looked up is no JSON of credentials")
	}
	return c, nil
}

// lookUp is that process.
func lookUp() error {
	// What the service has been promised when memory runs out its users have not.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0)
	p, err := io.ReadAll(io.LimitReader(os.Stdin, maxPacket))
	if err != nil {
		return err
	}
	ref, err := image.ParseRef(string(p))
	if err != nil {
		return err
	}
	c, err := image.ResolveCredentials(context.Background(), ref)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(c)
}

// brief keeps what a process says, and fails when that is too much.
type brief struct{ said bytes.Buffer }

func (b *brief) Write(p []byte) (int, error) {
	if b.said.Len()+len(p) > lookupSays {
		return 0, fmt.Errorf("more than %d bytes", lookupSays)
	}
	return b.said.Write(p)
}
