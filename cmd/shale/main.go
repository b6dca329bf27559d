// Command shale starts containers from images of any size in about the time
// their first bytes take to arrive. Each verb is a file of this package.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/daemon"
	"github.com/shale-image/shale/export"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/pool"
	"github.com/shale-image/shale/reader"
	"github.com/shale-image/shale/runtime"
)

// version is set by the linker.
var version = "dev"

func main() {
	// Neither returns in a process that its package started.
	runtime.Init()
	daemon.Init()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := newRoot().ExecuteContext(ctx)
	if err == nil {
		return
	}
	var status exitStatus
	if errors.As(err, &status) {
		os.Exit(int(status))
	}
	tell(err)
	os.Exit(codeFor(err))
}

// tell writes an error for a person.
func tell(err error) {
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	fmt.Fprintf(os.Stderr, "shale: %v\n", err)
	if hint := hintFor(err); hint != "" {
		fmt.Fprintf(os.Stderr, "hint: %s\n", hint)
	}
}

// exitStatus is a container's exit status, passed on without a word.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// usageError is bad use of the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// The exit codes, as `shale help exit-codes` tells them.
const (
	codeFailure      = 1
	codeUsage        = 2
	codeNotFound     = 3
	codeUnauthorized = 4
	codeNotImage     = 5
	codePlatform     = 6
	codeCorrupt      = 7
	codeNoSpace      = 8
	codeBusy         = 9
	codeUnavailable  = 10
	codeNotEmpty     = 11
	codeInterrupted  = 130
)

func codeFor(err error) int {
	var usage usageError
	for _, c := range []struct {
		is   bool
		code int
	}{
		{errors.As(err, &usage), codeUsage},
		{errors.Is(err, context.Canceled), codeInterrupted},
		{errors.Is(err, pool.ErrNoSpace), codeNoSpace},
		{errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT), codeNoSpace},
		{errors.Is(err, blob.ErrUnauthorized), codeUnauthorized},
		{errors.Is(err, image.ErrPlatform), codePlatform},
		{errors.Is(err, image.ErrNotImage), codeNotImage},
		{errors.Is(err, reader.ErrNoIndex), codeNotImage},
		{errors.Is(err, export.ErrNotEmpty), codeNotEmpty},
		{errors.Is(err, chunk.ErrCorrupt), codeCorrupt},
		// An object that is shorter than its descriptor says.
		{errors.Is(err, blob.ErrRange), codeCorrupt},
		{errors.Is(err, daemon.ErrBusy), codeBusy},
		{errors.Is(err, blob.ErrUnavailable), codeUnavailable},
		{errors.Is(err, blob.ErrNotFound), codeNotFound},
		{errors.Is(err, fs.ErrNotExist), codeNotFound},
	} {
		if c.is {
			return c.code
		}
	}
	return codeFailure
}

func hintFor(err error) string {
	switch {
	case errors.Is(err, blob.ErrUnauthorized):
		return "log in with `docker login` or `skopeo login`: shale reads Docker's config.json and its credential helpers"
	case errors.Is(err, index.ErrLimit):
		return "the limits protect this node from hostile images; see docs/ARCHITECTURE.md"
	case errors.Is(err, pool.ErrNoSpace):
		return "`shale prune --all` frees what images take that are neither in use nor pinned, `shale rmi` that of one; `shale df` lists them"
	case errors.Is(err, fs.ErrPermission):
		return "the node's state belongs to root, unless --root (or SHALE_ROOT) names another directory"
	case errors.Is(err, syscall.EROFS):
		return "the node's state has to be written: --root (or SHALE_ROOT) can name another directory"
	case errors.Is(err, daemon.ErrNotRunning):
		return "the service starts by itself with `shale mount` or `shale run`"
	}
	return ""
}

func newRoot() *cobra.Command {
	g := &globals{}
	cmd := &cobra.Command{
		Use:   "shale",
		Short: "Start containers before their image is here",
		Long: `Shale starts containers from images of any size in about the time their first
bytes take to arrive: it mounts an image at once through the kernel's EROFS and
fetches, verifies and keeps each chunk when something first reads it.`,
		Example: `  # convert an image once, then start it lazily
  shale convert registry.example/app:1 registry.example/app:1-shale
  shale run --rm registry.example/app:1-shale

  # or only mount it
  shale mount registry.example/app:1-shale /mnt
  shale umount /mnt`,
		// With these a word that is no verb is bad use like any other.
		Args:          args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version,
	}
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (see `%s --help`)", err, c.CommandPath())}
	})
	g.flags(cmd)
	cmd.AddCommand(newConvert(g), newIndex(g), newOptimize(g), newKey(g), newPlan(g), newInspect(g), newLs(g), newCat(g), newCheck(g), newDiff(g), newExport(g),
		newPull(g), newMount(g), newUmount(g), newRun(g), newTrace(g), newAccessed(g), newWait(g), newImages(g), newDf(g), newPin(g), newUnpin(g), newRmi(g), newPrune(g), newFsck(g), newScrub(g), newStatus(g), newDoctor(g), newDaemon(g), newUpgrade(g), &cobra.Command{
			Use:   "exit-codes",
			Short: "What the exit codes mean",
			Long: `  0    it worked
  1    it failed for another reason than those below
  2    bad use of the command line
  3    no such reference, file or mount
  4    unauthorized
  5    the reference names something that is no image, or none that can be started
  6    the image has no variant for this platform
  7    corrupt data: a digest did not match, or a format was malformed
  8    no space left
  9    in use
  10   the registry is unavailable
  11   the directory to write into is not empty
  130  interrupted
shale diff has 1 for images that differ. shale run passes on the container's own
code, and has 125 for its own failures, 126 for a command that cannot be
executed and 127 for one that is not there.`,
		})
	return cmd
}

// args wraps a check of positional arguments so that its failure is usage.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, a []string) error {
		if err := check(c, a); err != nil {
			return usageError{fmt.Errorf("%w\nusage: %s", err, c.UseLine())}
		}
		return nil
	}
}
