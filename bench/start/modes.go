package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/shale-image/shale/bench/debian"
	"github.com/shale-image/shale/bench/start/cold"
)

// mode is a way to start an image. Each has a repository of its own for it:
// what lies beside an image changes how it is started.
type mode struct {
	name string
	tag  string // of what is started

	// ready makes that out of the image that was pushed to the repository with
	// the tag "plain", at no cost to the start. It is nil if nothing is needed.
	ready func(ctx context.Context, lab *cold.Lab, repo string, w debian.Workload) error
	start func(n *cold.Node, ctx context.Context, name string, c cold.Command) (cold.Cost, error)
	again bool // measure a second start on the same node, too
	each  bool // what makes it ready is for one workload, not for its image
}

var allModes = []mode{
	{name: "plain", tag: "plain", start: (*cold.Node).Plain},
	{name: "convert", tag: "converted", start: (*cold.Node).Lazy,
		ready: func(ctx context.Context, lab *cold.Lab, repo string, _ debian.Workload) error {
			return lab.Convert(ctx, repo+":plain", repo+":converted")
		}},
	{name: "index", tag: "plain", start: (*cold.Node).Lazy, again: true,
		ready: func(ctx context.Context, lab *cold.Lab, repo string, _ debian.Workload) error {
			return lab.Index(ctx, repo+":plain")
		}},
	{name: "pack", tag: "plain", start: (*cold.Node).Lazy, again: true, each: true,
		ready: func(ctx context.Context, lab *cold.Lab, repo string, w debian.Workload) error {
			if err := lab.Index(ctx, repo+":plain"); err != nil {
				return err
			}
			return lab.Optimize(ctx, repo+":plain", cold.Command{Args: w.Command, User: w.User})
		}},
	{name: "traces", tag: "plain", start: (*cold.Node).Lazy, each: true, // of as many nodes as may share theirs
		ready: func(ctx context.Context, lab *cold.Lab, repo string, w debian.Workload) error {
			if err := lab.Index(ctx, repo+":plain"); err != nil {
				return err
			}
			return lab.Share(ctx, repo+":plain", cold.Command{Args: w.Command, User: w.User}, 16)
		}},
	{name: "other-pack", tag: "plain", start: (*cold.Node).Lazy, each: true, // of another use of the program
		ready: func(ctx context.Context, lab *cold.Lab, repo string, w debian.Workload) error {
			if err := lab.Index(ctx, repo+":plain"); err != nil {
				return err
			}
			return lab.Optimize(ctx, repo+":plain", cold.Command{Args: w.Other, User: w.User})
		}},
	{name: "convert-pack", tag: "converted", start: (*cold.Node).Lazy, again: true, each: true,
		ready: func(ctx context.Context, lab *cold.Lab, repo string, w debian.Workload) error {
			if err := lab.Convert(ctx, repo+":plain", repo+":converted"); err != nil {
				return err
			}
			return lab.Optimize(ctx, repo+":converted", cold.Command{Args: w.Command, User: w.User})
		}},
	{name: "soci", tag: "plain", start: (*cold.Node).Lazy, again: true,
		ready: func(ctx context.Context, lab *cold.Lab, repo string, _ debian.Workload) error {
			return lab.SOCI(ctx, repo+":plain")
		}},
	{name: "none", tag: "plain", start: (*cold.Node).Lazy, again: true},
}

// repo returns the repository of a workload's image for the mode.
func (m mode) repo(w debian.Workload) string {
	if m.each {
		return w.Name + "-" + m.name
	}
	return w.Image.Name + "-" + m.name
}

// prepare pushes an image and makes it ready to be started.
func (m mode) prepare(ctx context.Context, lab *cold.Lab, from string, w debian.Workload) error {
	say("%s: preparing it for mode %s", w.Image.Name, m.name)
	if err := lab.Push(ctx, from, m.repo(w)+":plain"); err != nil {
		return fmt.Errorf("pushing the image: %w", err)
	}
	if m.ready == nil {
		return nil
	}
	return m.ready(ctx, lab, m.repo(w), w)
}

// choose reads the flags that say what to measure.
func (b *bench) choose(images, modes, compression string) error {
	b.compression = debian.Compression(compression)
	if !slices.Contains([]debian.Compression{debian.Gzip, debian.Zstd, debian.ZstdFrames}, b.compression) {
		return fmt.Errorf("-compression %q: want %s, %s or %s", compression, debian.Gzip, debian.Zstd, debian.ZstdFrames)
	}
	if b.runs < 1 {
		return fmt.Errorf("-runs %d: want at least 1", b.runs)
	}
	var all []string
	wanted := words(images)
	for _, w := range debian.Workloads {
		all = append(all, w.Name, w.Image.Name)
		if len(wanted) == 0 || slices.Contains(wanted, w.Image.Name) || slices.Contains(wanted, w.Name) {
			w.Image = w.Image.With(b.compression)
			b.workloads = append(b.workloads, w)
		}
	}
	for _, name := range wanted {
		if !slices.Contains(all, name) {
			slices.Sort(all)
			return fmt.Errorf("-images %q: want some of %s", name, strings.Join(slices.Compact(all), ", "))
		}
	}
	for _, name := range words(modes) {
		i := slices.IndexFunc(allModes, func(m mode) bool { return m.name == name })
		if i < 0 {
			return fmt.Errorf("-modes %q: want some of %s", name, modeNames())
		}
		b.modes = append(b.modes, allModes[i])
	}
	if b.modes == nil {
		return fmt.Errorf("-modes: want some of %s", modeNames())
	}
	return nil
}

func modeNames() string {
	var names []string
	for _, m := range allModes {
		names = append(names, m.name)
	}
	return strings.Join(names, ", ")
}

// words splits what is separated by commas.
func words(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}
