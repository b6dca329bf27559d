package fusetree

import (
	"errors"
	"math"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/shale-image/shale/erofs"
	"github.com/shale-image/shale/index"
)

// forever is how many seconds names and attributes stay valid: they never
// change.
const forever = math.MaxInt32

type cancel = <-chan struct{}

// nid tells which inode a node of the protocol is: the same, but for the root,
// which the protocol calls 1. No inode lies in the boot area, so none is 1.
func (s *Server) nid(node uint64) uint64 {
	if node == fuse.FUSE_ROOT_ID {
		return s.nodes.Root()
	}
	return node
}

// status turns an error of package erofs into what the reader gets.
func (s *Server) status(nid uint64, what string, err error) fuse.Status {
	switch {
	case err == nil:
		return fuse.OK
	case errors.Is(err, index.ErrNotExist):
		return fuse.ENOENT
	}
	s.failed(nid, what, err)
	return fuse.EIO
}

func fillAttr(a *fuse.Attr, n *erofs.Node) {
	sec, nsec := uint64(n.Mtime.Sec), n.Mtime.Nsec
	*a = fuse.Attr{
		Ino: n.NID, Size: uint64(n.Size), Blocks: (uint64(n.Size) + 511) / 512,
		Atime: sec, Mtime: sec, Ctime: sec, Atimensec: nsec, Mtimensec: nsec, Ctimensec: nsec,
		Mode: n.Mode, Nlink: n.Nlink, Owner: fuse.Owner{Uid: n.UID, Gid: n.GID},
		Rdev: protocolDev(n.Rdev), Blksize: erofs.BlockSize,
	}
	if n.Mode&unix.S_IFMT == unix.S_IFREG {
		a.Blocks = (a.Blocks + 7) &^ 7 // whole 4 KiB blocks, as EROFS tells it
	}
}

// protocolDev is a device number with its minor's low 8 bits, its major, and
// the rest of the minor. Example: 8:300 is 0x10082c.
func protocolDev(dev uint64) uint32 {
	major, minor := unix.Major(dev), unix.Minor(dev)
	return minor&0xff | major&0xfff<<8 | minor&^0xff<<12
}

func (s *Server) entry(nid uint64, out *fuse.EntryOut) error {
	n, err := s.nodes.Stat(nid)
	if err != nil {
		return err
	}
	out.NodeId = nid
	out.EntryValid, out.AttrValid = forever, forever
	fillAttr(&out.Attr, &n)
	return nil
}

// Lookup implements fuse.RawFileSystem.
func (s *Server) Lookup(_ cancel, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	dir := s.nid(in.NodeId)
	nid, err := s.nodes.Lookup(dir, name)
	if errors.Is(err, index.ErrNotExist) {
		out.EntryValid = forever // node 0: the kernel may remember that there is none
		return fuse.OK
	}
	if err == nil {
		err = s.entry(nid, out)
	}
	return s.status(dir, "lookup", err)
}

// GetAttr implements fuse.RawFileSystem.
func (s *Server) GetAttr(_ cancel, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	nid := s.nid(in.NodeId)
	n, err := s.nodes.Stat(nid)
	if err == nil {
		out.AttrValid = forever
		fillAttr(&out.Attr, &n)
	}
	return s.status(nid, "stat", err)
}

// Readlink implements fuse.RawFileSystem.
func (s *Server) Readlink(_ cancel, in *fuse.InHeader) ([]byte, fuse.Status) {
	nid := s.nid(in.NodeId)
	target, err := s.nodes.Readlink(nid)
	return []byte(target), s.status(nid, "readlink", err)
}

// GetXAttr implements fuse.RawFileSystem.
func (s *Server) GetXAttr(_ cancel, in *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	nid := s.nid(in.NodeId)
	xs, err := s.nodes.Xattrs(nid)
	if err != nil {
		return 0, s.status(nid, "getxattr", err)
	}
	for _, x := range xs {
		if x.Name == name {
			return fit(dest, x.Value)
		}
	}
	return 0, fuse.ENODATA
}

// ListXAttr implements fuse.RawFileSystem. Names that only root may read are
// told to root alone, as by other file systems.
func (s *Server) ListXAttr(_ cancel, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	nid := s.nid(in.NodeId)
	xs, err := s.nodes.Xattrs(nid)
	if err != nil {
		return 0, s.status(nid, "listxattr", err)
	}
	var list []byte
	for _, x := range xs {
		if in.Uid != 0 && len(x.Name) > 8 && x.Name[:8] == "trusted." {
			continue
		}
		list = append(append(list, x.Name...), 0)
	}
	return fit(dest, string(list))
}

// fit copies v to dest. With too little room it tells how much is needed.
func fit(dest []byte, v string) (uint32, fuse.Status) {
	if len(v) > len(dest) {
		return uint32(len(v)), fuse.ERANGE
	}
	return uint32(copy(dest, v)), fuse.OK
}

// Open and OpenDir implement fuse.RawFileSystem. Not implemented is the best
// answer: the kernel then opens without asking, and keeps what it has cached of
// the file or directory from one opening to the next.
func (s *Server) Open(cancel, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

// OpenDir is like Open.
func (s *Server) OpenDir(cancel, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

// ReadDir implements fuse.RawFileSystem.
func (s *Server) ReadDir(_ cancel, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	nid := s.nid(in.NodeId)
	err := s.nodes.List(nid, int64(in.Offset), func(e erofs.Name) bool {
		return out.AddDirEntry(fuse.DirEntry{Name: e.Name, Ino: e.NID, Mode: e.Type, Off: uint64(e.Next)})
	})
	return s.status(nid, "readdir", err)
}

// ReadDirPlus implements fuse.RawFileSystem: names with attributes.
func (s *Server) ReadDirPlus(_ cancel, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	nid := s.nid(in.NodeId)
	var failed error
	err := s.nodes.List(nid, int64(in.Offset), func(e erofs.Name) bool {
		entry := out.AddDirLookupEntry(fuse.DirEntry{Name: e.Name, Ino: e.NID, Mode: e.Type, Off: uint64(e.Next)})
		if entry == nil {
			return false
		}
		if e.Name != "." && e.Name != ".." { // of these the kernel wants no node
			failed = s.entry(e.NID, entry)
		}
		return failed == nil
	})
	return s.status(nid, "readdir", errors.Join(err, failed))
}

// StatFs implements fuse.RawFileSystem.
func (s *Server) StatFs(_ cancel, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.Frsize, out.NameLen = erofs.BlockSize, erofs.BlockSize, 255
	out.Blocks = uint64(s.content.Size()) / erofs.BlockSize
	return fuse.OK
}
