// Package fusetree serves a linked image file by file over a FUSE connection,
// for kernels and users that cannot mount EROFS: names and attributes come
// from the EROFS metadata, data from the flat address space.
//
// Nodes are named by their EROFS inode numbers and nothing is kept of them or
// of open files: the kernel caches names, attributes, link targets and data,
// since they never change, and forgets them when it likes.
//
// What a reader may see, and nothing else: the right bytes, or an error (EIO
// while the connection lives, ENOTCONN once its server is gone). A READ is
// never answered short of the end of the file.
//
// The package does not know where bytes come from (fusedev.Content) nor who
// mounts what (package mount).
package fusetree
