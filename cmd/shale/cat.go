package main

import (
	"fmt"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/shale-image/shale/content"
	"github.com/shale-image/shale/inspect"
)

func newCat(g *globals) *cobra.Command {
	o := &opener{g: g}
	cmd := &cobra.Command{
		Use:   "cat REF PATH",
		Short: "Write a file of an image to standard output",
		Long: `Write a regular file of an image to standard output, as it is. Symbolic links are
followed as in a container: within the image. What the node has of the image is
read from it, as shale mount would; else only the file's chunks are fetched. Each
is verified before it is written.`,
		Example: `  shale cat localhost:5000/debian:12-shale /etc/os-release
  shale cat --bootstrap image.boot --blobs ./blobs /bin/sh >sh`,
		Args: o.args(2, 2),
		RunE: func(cmd *cobra.Command, a []string) error {
			im, rest, err := o.open(cmd.Context(), a)
			if err != nil {
				return err
			}
			defer im.Close()
			at, ino, err := inspect.Resolve(im.Tree, rest[0], true)
			if err != nil {
				return fmt.Errorf("%s: %w", im.Name, err)
			}
			if !ino.IsRegular() {
				return usageError{fmt.Errorf("/%s is %s: only regular files have content", at, kind(ino.Type()))}
			}
			if err := content.Copy(cmd.Context(), cmd.OutOrStdout(), im.Tree, im.Source, ino); err != nil {
				return fmt.Errorf("/%s: %w", at, err)
			}
			return nil
		},
	}
	o.flags(cmd)
	return cmd
}

// kind is what a person calls a type of file.
func kind(mode uint32) string {
	switch mode {
	case syscall.S_IFDIR:
		return "a directory"
	case syscall.S_IFLNK:
		return "a symbolic link"
	case syscall.S_IFCHR, syscall.S_IFBLK:
		return "a device"
	case syscall.S_IFIFO:
		return "a FIFO"
	case syscall.S_IFSOCK:
		return "a socket"
	}
	return "a file"
}
