package index

// Op is what a Change does to a tree.
type Op uint8

// The operations.
const (
	Add      Op = iota // create or replace the inode at Path
	Link               // give the inode at Target another name, Path
	Whiteout           // remove Path, as far as it came from lower layers
	Opaque             // remove everything in directory Path that came from lower layers
)

// Change is one entry of a layer: layers are sequences of Changes, and an
// image's tree is what remains when the Changes of all its layers are applied
// in order, lowest layer first (Tree.Apply).
type Change struct {
	Op     Op
	Path   string // relative, '/'-separated, no empty, "." or ".." elements; "" is the root
	Inode  *Inode // Add: Children is ignored; an existing directory keeps its own
	Target string // Link: the path of the inode to link to, same rules as Path
}
