// Package debian builds real Debian 12 images, as OCI layouts, out of Debian
// packages: what a start reads of them is what it reads of the images people
// run. An image has the layers `docker build` would give it: the base system,
// the same bytes in all images, and on it one or two with exactly what
// installing packages changed. It also says what the images are run with.
//
// It takes root, mmdebstrap and an apt mirror (the one the machine is
// configured for, else Debian's). The same packages give the same bytes, but
// for what their scripts make at random: the key of ssl-cert, the archive of
// classes of openjdk. The package must not know what the images are measured
// with.
package debian

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
)

// Recipe says what is in an image. Its JSON is what its place in a cache is
// derived from: a new field is left out of that when it is empty.
type Recipe struct {
	Name     string   // names the cached image, next to a hash of the recipe
	Packages []string // of the top layer; none: the image is the base layer alone
	Env      []string // besides PATH
	Cmd      []string

	From        *Recipe     `json:",omitempty"` // what Packages are installed on; nil: Base
	Prepare     string      `json:",omitempty"` // shell command, run in the tree before Packages are installed
	Compression Compression `json:",omitempty"` // of all layers; "" is Gzip
}

// Compression is how the layers of an image are compressed.
type Compression string

// The compressions an image can be built with. One recipe gives the same tar
// archives with each of them.
const (
	Gzip       Compression = "gzip"
	Zstd       Compression = "zstd"        // of one frame, as most tools make it
	ZstdFrames Compression = "zstd-frames" // of frames with 256 KiB each: it can be read from each of them
)

// With returns the recipe of the same image with another compression.
func (r Recipe) With(c Compression) Recipe {
	r.Compression = c
	if c == Gzip {
		r.Compression = "" // one image, one place
	}
	return r
}

// Base is minimal Debian 12: 170 MB unpacked.
var Base = Recipe{Name: "base", Cmd: []string{"bash"}}

// Python is Base with Python 3.11 and numpy, in one layer.
var Python = Recipe{
	Name:     "python",
	Packages: []string{"python3", "python3-numpy"},
	Env:      []string{"LANG=C.UTF-8"},
	Cmd:      []string{"python3"},
}

// Layers that several images have, or could have, above Base.
var (
	python3 = Recipe{Name: "python3", Packages: []string{"python3"}, Cmd: []string{"python3"}}
	tools   = Recipe{Name: "tools", Packages: []string{"ca-certificates", "curl"}, Cmd: []string{"bash"}}
)

// The images that are measured besides Base and Python.
var (
	Numpy = Recipe{
		Name: "numpy", From: &python3, Packages: []string{"python3-numpy"},
		Env: []string{"LANG=C.UTF-8"}, Cmd: []string{"python3"},
	}
	Nginx = Recipe{
		Name: "nginx", Packages: []string{"nginx"},
		Cmd: []string{"nginx", "-g", "daemon off;"},
	}
	Postgres = Recipe{
		Name: "postgres", Packages: []string{"postgresql"},
		Cmd: []string{postgresBin + "postgres"},
		// As in Docker's image: databases are made where they are used.
		Prepare: `mkdir -p etc/postgresql-common && echo "create_main_cluster = false" >etc/postgresql-common/createcluster.conf`,
	}
	OpenJDK = Recipe{
		Name: "openjdk", From: &tools, Packages: []string{"openjdk-17-jre-headless"},
		Cmd: []string{"java", "-version"},
	}
	NodeJS = Recipe{
		Name: "nodejs", From: &tools, Packages: []string{"nodejs"},
		Cmd: []string{"node"},
	}
)

// Images are all images that are measured.
var Images = []Recipe{Base, Python, Numpy, Nginx, Postgres, OpenJDK, NodeJS}

const (
	suite = "bookworm"

	// epoch is the SOURCE_DATE_EPOCH of the base system, in Unix seconds, and
	// the creation time of every image: 2025-01-01.
	epoch = 1735689600

	// version is part of every cache key; it changes when the same recipe
	// would give another image.
	version = 1
)

// key returns a name for the recipe's image in a cache: it changes with
// everything that the image depends on but the state of the mirror.
func (r Recipe) key(arch string) string {
	p, err := json.Marshal(struct {
		Recipe  Recipe
		Arch    string
		Version int
	}{r, arch, version})
	if err != nil {
		panic(err) // strings and numbers can be marshalled
	}
	sum := sha256.Sum256(p)
	name := r.Name
	if r.Compression != "" {
		name += "-" + string(r.Compression)
	}
	return name + "-" + hex.EncodeToString(sum[:6])
}
