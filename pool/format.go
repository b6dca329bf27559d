package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/replace"
)

// The file format is {"format":"shale-pool","version":1}. Its version speaks
// for all files of the pool: a program that changes any of them in a way that
// an older one must not meet counts it up.
//
// Version 1: tables, data and presence as described in docs/formats/pool.md.
// Version 2 adds sealed data files. A pool gets it with the first of them.
const (
	formatName    = "shale-pool"
	firstVersion  = 1
	sealVersion   = 2
	formatVersion = sealVersion // the greatest that is known
)

type format struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
}

// Suffixes of directories that are not segments.
const (
	newSuffix     = ".new" // not finished
	deletedSuffix = ".del" // being deleted
	badSuffix     = ".bad" // set aside
)

// openFormat checks that the pool in dir is one this program knows, makes it
// if there is none, and returns the directory of its segments.
func openFormat(dir string) (segments string, err error) {
	segments = filepath.Join(dir, "segments")
	name := filepath.Join(dir, "format")
	_, err = readFormat(name)
	if errors.Is(err, os.ErrNotExist) {
		return segments, initialize(dir, name, segments)
	}
	if err != nil {
		return "", err
	}
	return segments, os.MkdirAll(segments, 0o700)
}

// readFormat returns the version of a pool, one that this program knows.
func readFormat(name string) (version int, err error) {
	js, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	const remedy = "or remove the pool's directory, what it holds is fetched again"
	var f format
	if err := json.Unmarshal(js, &f); err != nil || f.Format != formatName || f.Version < firstVersion {
		return 0, fmt.Errorf("%s: %w: want {\"format\":%q,\"version\":%d}; restore the file, %s", name, chunk.ErrCorrupt, formatName, formatVersion, remedy)
	}
	if f.Version > formatVersion {
		return 0, fmt.Errorf("%s: pool of format version %d: %w by this program, which knows version %d; run the newer program that made it, %s",
			name, f.Version, index.ErrUnsupported, formatVersion, remedy)
	}
	return f.Version, nil
}

func encodeFormat(version int) []byte {
	return fmt.Appendf(nil, "{\"format\":%q,\"version\":%d}\n", formatName, version)
}

// initialize makes an empty pool. The format is written last: without it,
// there are no segments.
func initialize(dir, name, segments string) error {
	if err := os.MkdirAll(segments, 0o700); err != nil {
		return err
	}
	has, err := os.ReadDir(segments)
	if err != nil {
		return err
	}
	if len(has) > 0 {
		return fmt.Errorf("%s: %w: there are segments but no such file; restore it, or remove the pool's directory, what it holds is fetched again", name, chunk.ErrCorrupt)
	}
	if err := replace.File(name, encodeFormat(firstVersion), 0o600); err != nil {
		return noSpace(err)
	}
	return errors.Join(syncDir(dir), syncDir(filepath.Dir(dir)))
}

func segmentName(id uint32) string { return fmt.Sprintf("%08x", id) }

// parseName takes apart the name of a directory, "0badcafe" or "0badcafe.new".
func parseName(name string) (id uint32, suffix string, ok bool) {
	if len(name) < 8 {
		return 0, "", false
	}
	n, err := strconv.ParseUint(name[:8], 16, 32)
	if err != nil || segmentName(uint32(n)) != name[:8] {
		return 0, "", false
	}
	return uint32(n), name[8:], true
}

// setAside renames a damaged segment so that nothing finds it.
func setAside(path string) error {
	if err := os.RemoveAll(path + badSuffix); err != nil {
		return err
	}
	if err := os.Rename(path, path+badSuffix); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// writeSynced writes a file of a size, of which b is the beginning.
func writeSynced(path string, b []byte, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(b); err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
