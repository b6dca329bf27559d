package index

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

// parseLayers reads layers written as text, a change a line, with "--"
// between layers:
//
//	dir PATH            file PATH           sym PATH TARGET
//	link PATH TARGET    wh PATH             opq PATH
//
// "." is the root. The owner of every inode is the number of its layer, from
// 1, so that a listing shows where its metadata comes from.
func parseLayers(text string) (layers [][]Change) {
	layers = append(layers, nil)
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if f[0] == "--" {
			layers = append(layers, nil)
			continue
		}
		n := len(layers)
		if len(f) > 1 && f[1] == "." {
			f[1] = ""
		}
		c := Change{Path: f[1]}
		add := func(mode uint32, target string) {
			c.Inode = &Inode{Mode: mode, UID: uint32(n), Target: target}
		}
		switch f[0] {
		case "dir":
			add(syscall.S_IFDIR|0o700, "")
		case "file":
			add(syscall.S_IFREG|0o600, "")
		case "sym":
			add(syscall.S_IFLNK|0o777, f[2])
		case "link":
			c.Op, c.Target = Link, f[2]
		case "wh":
			c.Op = Whiteout
		case "opq":
			c.Op = Opaque
		default:
			panic("unknown change " + line)
		}
		layers[n-1] = append(layers[n-1], c)
	}
	return layers
}

// listing writes a tree a name a line: "a/ 1", "a/f 2", "l 1 -> a", "g 2 = a/f".
func listing(t *testing.T, tree *Tree) string {
	t.Helper()
	var b strings.Builder
	first := map[*Inode]string{}
	err := tree.Walk(func(path string, ino *Inode) error {
		if path == "" {
			path = "."
		}
		slash := ""
		if ino.IsDir() {
			slash = "/"
		}
		fmt.Fprintf(&b, "%s%s %d", path, slash, ino.UID)
		if ino.Target != "" {
			fmt.Fprintf(&b, " -> %s", ino.Target)
		}
		if was, ok := first[ino]; ok {
			fmt.Fprintf(&b, " = %s", was)
		} else {
			first[ino] = path
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestApply runs testdata/apply.txt: for each case its name after "#", the
// layers, "=" and the listing of the tree, or "! " and a part of the error.
// SHALE_UPDATE=1 writes the listings anew.
func TestApply(t *testing.T) {
	const file = "testdata/apply.txt"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for i, part := range strings.Split(string(text), "# ") {
		if i == 0 {
			out.WriteString(part)
			continue
		}
		name, body, _ := strings.Cut(part, "\n")
		input, want, ok := strings.Cut(body, "\n=\n")
		if !ok {
			t.Fatalf("%s: no result", name)
		}
		want = strings.TrimSpace(want)
		t.Run(name, func(t *testing.T) {
			tree := NewTree()
			var err error
			for _, layer := range parseLayers(input) {
				if err = tree.Apply(layer); err != nil {
					break
				}
			}
			got := ""
			if err != nil {
				got = "! " + err.Error()
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("error is not ErrCorrupt: %v", err)
				}
			} else {
				got = strings.TrimSpace(listing(t, tree))
			}
			fmt.Fprintf(&out, "# %s\n%s\n=\n%s\n\n", name, input, got)
			if got != want && os.Getenv("SHALE_UPDATE") == "" {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
	if os.Getenv("SHALE_UPDATE") != "" {
		if err := os.WriteFile(file, []byte(strings.TrimSpace(out.String())+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWhiteoutOrder checks that it does not matter where in a layer the
// whiteouts stand, as long as its other changes keep their order.
func TestWhiteoutOrder(t *testing.T) {
	lower := parseLayers("dir a\ndir a/b\nfile a/b/f\nfile a/g\nfile h\nlink k h\ndir c\nfile c/x")[0]
	adds := parseLayers("--\nfile a/new\nlink a/b/k h\ndir c\nfile c/y\nfile d/e/f\nlink h2 h\ndir a/b/dir")[1]
	hides := []string{"wh a", "opq a", "wh a/b", "opq a/b", "wh k", "wh c", "opq c", "wh c/x", "wh c/y", "wh d", "opq d/e", "wh h2", "wh absent/x", "opq .", "wh a/b/f"}
	for mask := range 1 << len(hides) {
		if n := mask; n&(n-1) != 0 && (n&(n-1))&((n&(n-1))-1) != 0 {
			continue // at most two at once
		}
		var text string
		for i, h := range hides {
			if mask>>i&1 != 0 {
				text += h + "\n"
			}
		}
		wh := parseLayers("--\n" + text)[1]
		var want string
		for at := 0; at <= len(adds); at++ {
			tree := NewTree()
			if err := tree.Apply(clone(lower)); err != nil {
				t.Fatal(err)
			}
			mine := clone(adds)
			// Links need their target, so what hides it cannot stand before.
			if strings.Contains(text, "opq .") && at < 6 {
				continue
			}
			layer := append(append(append([]Change{}, mine[:at]...), wh...), mine[at:]...)
			if err := tree.Apply(layer); err != nil {
				t.Fatalf("%q at %d: %v", text, at, err)
			}
			got := listing(t, tree)
			if want == "" {
				want = got
			}
			if got != want {
				t.Fatalf("%q at %d: got\n%s\nearlier\n%s", text, at, got, want)
			}
		}
	}
}

func clone(layer []Change) []Change {
	out := make([]Change, len(layer))
	for i, c := range layer {
		if c.Inode != nil {
			ino := *c.Inode
			c.Inode = &ino
		}
		out[i] = c
	}
	return out
}

func TestApplyRefuses(t *testing.T) {
	file := func() *Inode { return &Inode{Mode: syscall.S_IFREG | 0o644} }
	long := strings.Repeat("n", 256)
	for _, c := range []Change{
		{Path: "..", Inode: file()},
		{Path: "a/../b", Inode: file()},
		{Path: "./a", Inode: file()},
		{Path: "/a", Inode: file()},
		{Path: "a//b", Inode: file()},
		{Path: "a/", Inode: file()},
		{Path: "a\x00b", Inode: file()},
		{Path: long, Inode: file()},
		{Path: strings.Repeat("a/", 2048) + "b", Inode: file()},
		{Path: "", Inode: file()},
		{Path: "a"},
		{Path: "a", Inode: &Inode{Mode: 0o644}},
		{Path: "a", Inode: &Inode{Mode: syscall.S_IFLNK | 0o777}},
		{Path: "a", Inode: &Inode{Mode: syscall.S_IFLNK | 0o777, Target: strings.Repeat("t", 4096)}},
		{Op: Link, Path: "a", Target: "../b"},
		{Op: Link, Path: "a", Target: ""},
		{Op: Link, Path: "", Target: "a"},
		{Op: Whiteout, Path: ""},
		{Op: 9, Path: "a"},
	} {
		if err := NewTree().Apply([]Change{c}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%.80v: %v, want ErrCorrupt", c, err)
		}
	}
}

func TestApplyDepth(t *testing.T) {
	// Through links a tree could get deeper with every entry.
	tree := NewTree()
	a := tree.Begin()
	var err error
	for i := 0; i < 100 && err == nil; i++ {
		up := ""
		if i > 0 {
			up = fmt.Sprintf("s%d/", i-1)
		}
		dir := up + strings.Repeat("d/", 1000)
		if err = a.Apply(Change{Path: dir + "f", Inode: &Inode{Mode: syscall.S_IFREG}}); err == nil {
			err = a.Apply(Change{Path: fmt.Sprintf("s%d", i), Inode: &Inode{Mode: syscall.S_IFLNK, Target: strings.TrimSuffix(dir, "/")}})
		}
	}
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "4096") {
		t.Errorf("%v, want a limit on the depth", err)
	}
}

func TestApplyImplied(t *testing.T) {
	a := NewTree().Begin()
	var err error
	for i := 0; err == nil && i < maxImplied; i++ {
		err = a.Apply(Change{Path: fmt.Sprintf("%d/%sf", i, strings.Repeat("d/", 100)), Inode: &Inode{Mode: syscall.S_IFREG}})
	}
	if !errors.Is(err, ErrLimit) {
		t.Errorf("%v, want ErrLimit", err)
	}
}

// The work for a whiteout must not grow with what the layer itself has added.
func TestWhiteoutCost(t *testing.T) {
	const n = 50000
	tree := NewTree()
	if err := tree.Apply(parseLayers("dir a\nfile a/f")[0]); err != nil {
		t.Fatal(err)
	}
	var layer []Change
	for i := range n {
		layer = append(layer,
			Change{Path: fmt.Sprintf("a/%d", i), Inode: &Inode{Mode: syscall.S_IFREG}},
			Change{Op: Whiteout, Path: "a"}, Change{Op: Opaque, Path: "a"})
	}
	if err := tree.Apply(layer); err != nil { // minutes if it were quadratic
		t.Fatal(err)
	}
	if got := len(tree.Root.Children["a"].Children); got != n {
		t.Errorf("%d files left, want %d", got, n)
	}
}

func FuzzApply(f *testing.F) {
	text, err := os.ReadFile("testdata/apply.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, part := range strings.Split(string(text), "# ")[1:] {
		_, body, _ := strings.Cut(part, "\n")
		input, _, _ := strings.Cut(body, "\n=\n")
		f.Add(input)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for line := range strings.Lines(text) {
			switch f := strings.Fields(line); {
			case len(f) == 0 || f[0] == "--":
			case (f[0] == "sym" || f[0] == "link") && len(f) < 3, len(f) < 2,
				!strings.Contains(" dir file sym link wh opq ", " "+f[0]+" "):
				return
			}
		}
		tree := NewTree()
		for _, layer := range parseLayers(text) {
			if tree.Apply(layer) != nil {
				return
			}
		}
		dirs := map[*Inode]bool{}
		err := tree.Walk(func(path string, ino *Inode) error {
			if ino.IsDir() {
				if dirs[ino] {
					return fmt.Errorf("directory %q has two names", path)
				}
				dirs[ino] = true
			} else if ino.Children != nil {
				return fmt.Errorf("file %q has children", path)
			}
			return checkPath(path, path)
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkApply(b *testing.B) {
	for b.Loop() {
		a := NewTree().Begin()
		for i := range 1000 {
			dir := fmt.Sprintf("usr/lib/dir%d", i)
			for j := range 100 {
				if err := a.Apply(Change{Path: fmt.Sprintf("%s/file%d", dir, j), Inode: &Inode{Mode: syscall.S_IFREG}}); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1e5, "ns/entry")
}
