package daemon

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"syscall"
	"time"
)

const (
	kernelTrier = "shale-kernel"
	triesFor    = 10 * time.Second
)

// tryKernel is mount.TryKernel in a process of its own, which nobody kills: it outlives a
// worker that dies meanwhile, and a worker that waited for its own answer would not be
// dead, nor another begin. A kernel that could not be tried is taken for one that hides
// errors.
func tryKernel() error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{kernelTrier}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out bytes.Buffer
	cmd.Stdout = &out
	ended := make(chan error, 1)
	go func() { ended <- cmd.Run() }()
	select {
	case err := <-ended:
		return orSaid(context.Background(), err, out.Bytes())
	case <-time.After(triesFor):
		return fmt.Errorf("the kernel was tried for %v in vain", triesFor)
	}
}
