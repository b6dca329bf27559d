// Package rafs reads and writes RAFS v6, the image format of Nydus: an EROFS
// image of metadata (the bootstrap) beside blobs of compressed chunks.
//
// A bootstrap is an EROFS image the kernel can mount, with tables of its own
// that tell where each chunk lies in its blob and what its digest is:
//
//	   0  1 KiB of zeros
//	1024  EROFS super block, 128 bytes
//	1152  extended super block, 256 bytes: flags, where the tables are
//	1408  device slots, 128 bytes a blob: id, blocks, mapped address
//	....  inodes and directories (package erofs)
//	....  blob table, 256 bytes a blob
//	....  chunk table, 80 bytes a chunk
//	....  prefetch table, 4 bytes a file (optional)
//
// A blob holds the chunks and, behind them, what a reader needs to know about
// them. Every part is followed by its tar header, so that a blob can be written
// in one pass and still be taken for an archive, read from its end:
//
//	chunk 0 | chunk 1 | ...             | tar header image.blob
//	chunk info, 16 or 24 bytes a chunk,
//	header of 4096 bytes                | tar header blob.meta
//	digests, 32 bytes a chunk           | tar header blob.digest
//	table of contents, 128 bytes a part | tar header rafs.blob.toc
//
// A chunk has two places: where its stored bytes are in the blob, and its
// address, where its content would be if the blob were decompressed into a
// device of 4 KiB blocks. EROFS knows addresses alone, and a device of that
// content is all the kernel needs to mount a bootstrap.
//
// docs/formats/rafs-v6.md describes each field. The package knows no registry,
// no pool and no mount; compression and digests are package chunk's, EROFS is
// package erofs'.
package rafs
