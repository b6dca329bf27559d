package inspect

import (
	"syscall"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/reader"
)

// Report is what an image consists of. Sizes are bytes.
type Report struct {
	Ref            string   `json:"ref"`
	ManifestDigest string   `json:"manifest_digest,omitempty"` // none of a bare bootstrap
	Platform       string   `json:"platform,omitempty"`
	Converted      bool     `json:"converted"`
	Lazy           bool     `json:"lazy"`                  // it starts before its data is here
	Reason         string   `json:"reason,omitempty"`      // why it does not
	Format         string   `json:"format"`                // "rafs-v6" or "oci"
	Index          string   `json:"index,omitempty"`       // kind of the index that tells what is where
	IndexTrust     string   `json:"index_trust,omitempty"` // what it takes to believe it
	IndexBytes     int64    `json:"index_bytes,omitempty"` // stored
	Layers         []Layer  `json:"layers"`                // of the manifest, lowest first
	LayerBytes     int64    `json:"layer_bytes"`
	Blobs          []Blob   `json:"blobs"`             // that chunks lie in
	Content        *Content `json:"content,omitempty"` // if the image has an index
}

// Layer is a layer of the manifest.
type Layer struct {
	Digest    string `json:"digest"`
	MediaType string `json:"media_type"`
	Size      int64  `json:"size"`
	Role      string `json:"role"` // "layer", "blob" or "bootstrap"
}

// Blob is an object that holds chunks.
type Blob struct {
	Digest     string `json:"digest"`
	Size       int64  `json:"size"`
	Compressor string `json:"compressor,omitempty"`
	Digester   string `json:"digester,omitempty"`
	ChunkSize  uint32 `json:"chunk_size,omitempty"`
	Chunks     int    `json:"chunks,omitempty"` // in the blob
	UsedChunks int    `json:"used_chunks"`      // that files of this image have
	UsedStored int64  `json:"used_stored"`      // of UsedChunks, as stored
	UsedBytes  int64  `json:"used_bytes"`       // of UsedChunks, decoded
	ReadBytes  int64  `json:"read_bytes"`       // stored, that the read of one chunk waits for at most: index.Cost
	Pieces     int    `json:"pieces"`           // that have used chunks and come whole; 0 if any part can be had
	OneFrame   bool   `json:"one_frame"`        // it is one zstd frame: whatever is read, all comes
}

// Content is what the files of an image are and share.
type Content struct {
	Files       int `json:"files"` // regular files, hard links counted once
	Directories int `json:"directories"`
	Symlinks    int `json:"symlinks"`
	Others      int `json:"others"`     // devices, FIFOs, sockets
	HardLinks   int `json:"hard_links"` // further names of files

	FileBytes  int64 `json:"file_bytes"` // sizes of the files
	HoleBytes  int64 `json:"hole_bytes"` // of FileBytes, what no chunk covers
	References int   `json:"references"` // of files to chunks
	Referenced int64 `json:"referenced_bytes"`

	Chunks int   `json:"chunks"` // different ones that files have
	Unique int64 `json:"unique_bytes"`
	Stored int64 `json:"stored_bytes"` // of these, as stored
}

// Roles of layers.
const (
	roleLayer     = "layer"
	roleBlob      = "blob"
	roleBootstrap = "bootstrap"
)

// Inspect reports what an image consists of. No data is read.
func Inspect(im *Image) *Report {
	r := &Report{Ref: im.Name, Format: "oci", Layers: []Layer{}, Blobs: []Blob{}}
	if im.Tree != nil {
		r.Lazy, r.Content = true, &Content{}
		r.Index, r.IndexTrust, r.IndexBytes = string(im.Kind), string(im.Trust), im.Metadata
		r.count(im)
	} else if im.Damage != nil {
		r.Reason = im.Damage.Error()
	}
	if im.RAFS != nil {
		r.Converted, r.Format = true, "rafs-v6"
		for i, b := range im.RAFS.Blobs() {
			o := &r.Blobs[i]
			o.Compressor, o.Digester = b.Compressor.String(), b.Digester.String()
			o.ChunkSize, o.Chunks = b.ChunkSize, int(b.ChunkCount)
		}
	}
	if im.Manifest != nil {
		r.manifest(im.Manifest)
	}
	return r
}

func (r *Report) manifest(m *image.Image) {
	r.ManifestDigest = m.ManifestDigest
	if m.Platform != (image.Platform{}) {
		r.Platform = m.Platform.String()
	}
	boot, converted := reader.Bootstrap(m)
	blobs := map[string]bool{}
	for _, b := range r.Blobs {
		blobs[b.Digest] = true
	}
	for _, l := range m.Layers {
		role := roleLayer
		switch {
		case converted && l.Digest == boot.Digest:
			role = roleBootstrap
		case converted && (blobs[l.Digest] || l.Annotations[reader.NydusRef] != ""):
			role = roleBlob
		}
		r.Layers = append(r.Layers, Layer{l.Digest, l.MediaType, l.Size, role})
		r.LayerBytes += l.Size
	}
}

// count adds up the tree.
func (r *Report) count(im *Image) {
	t := im.Tree
	for _, b := range t.Blobs {
		if b.Data == nil { // which are last
			r.Blobs = append(r.Blobs, Blob{Digest: b.Digest, Size: b.Size})
		}
	}
	c := r.Content
	used := make([]bool, len(t.Chunks))
	seen := map[*index.Inode]bool{}
	t.Walk(func(_ string, ino *index.Inode) error {
		switch {
		case seen[ino]:
			c.HardLinks++
			return nil
		case ino.IsDir():
			c.Directories++
		case ino.IsRegular():
			c.Files++
			c.FileBytes += ino.Size
			covered := int64(0)
			for _, e := range ino.Extents {
				used[e.Chunk] = true
				c.References++
				c.Referenced += int64(t.Chunks[e.Chunk].Size)
				covered += min(int64(t.Chunks[e.Chunk].Size), max(0, ino.Size-e.Off))
			}
			c.HoleBytes += max(0, ino.Size-covered)
		case ino.Type() == syscall.S_IFLNK:
			c.Symlinks++
		default:
			c.Others++
		}
		seen[ino] = true
		return nil
	})
	distinct := map[chunk.Digest]bool{}
	reads := index.Reads{Local: func(blob uint32) bool { // a SOCI index has the windows
		return im.Kind == reader.SOCI && int(blob) >= len(im.Manifest.Layers)
	}}
	for i, ok := range used {
		if !ok {
			continue
		}
		reads.Chunks = append(reads.Chunks, uint32(i))
		ch := &t.Chunks[i]
		b := &r.Blobs[ch.Blob]
		b.UsedChunks++
		stored := t.StoredShare(ch)
		b.UsedStored += stored
		b.UsedBytes += int64(ch.Size)
		if !distinct[ch.Digest] {
			distinct[ch.Digest] = true
			c.Chunks++
			c.Unique += int64(ch.Size)
			c.Stored += stored
		}
	}
	costs := t.Costs(reads)
	for i := range r.Blobs {
		b := &r.Blobs[i]
		b.ReadBytes, b.Pieces, b.OneFrame = costs[i].Read, costs[i].Pieces, costs[i].OneFrame
	}
}
