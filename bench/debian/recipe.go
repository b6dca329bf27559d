// Package debian builds real Debian 12 images, as OCI layouts, out of Debian
// packages: what a start reads of them is what it reads of the images people
// run. An image has the layers `docker build` would give it: the base system,
// and one with exactly what installing the recipe's packages changed.
//
// It takes root, mmdebstrap and an apt mirror (the one the machine is
// configured for, else Debian's). The same packages give the same bytes. It
// must not know what the images are measured with.
package debian

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
)

// Recipe says what is in an image.
type Recipe struct {
	Name     string   // names the cached image, next to a hash of the recipe
	Packages []string // of the second layer; none: the image is the base layer alone
	Env      []string // besides PATH
	Cmd      []string
}

// Base is minimal Debian 12: 170 MB unpacked.
var Base = Recipe{Name: "base", Cmd: []string{"bash"}}

// Python is Base with Python 3.11 and numpy.
var Python = Recipe{
	Name:     "python",
	Packages: []string{"python3", "python3-numpy"},
	Env:      []string{"LANG=C.UTF-8"},
	Cmd:      []string{"python3"},
}

// The workloads that are measured besides Base and Python.
var (
	Nginx    = Recipe{Name: "nginx", Packages: []string{"nginx"}, Cmd: []string{"nginx", "-g", "daemon off;"}}
	Postgres = Recipe{Name: "postgres", Packages: []string{"postgresql"}, Cmd: []string{"/usr/lib/postgresql/15/bin/postgres"}}
	Java     = Recipe{Name: "java", Packages: []string{"openjdk-17-jre-headless"}, Cmd: []string{"java", "-version"}}
	Node     = Recipe{Name: "node", Packages: []string{"nodejs"}, Cmd: []string{"node"}}
)

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
	return r.Name + "-" + hex.EncodeToString(sum[:6])
}
