// Package fusedev serves one read-only file over a FUSE connection: the flat
// address space of a linked image, from which the kernel mounts EROFS.
//
// It speaks the raw protocol of /dev/fuse and keeps no state between requests:
// node ids are fixed, file handles are ignored, INIT is answered whenever it
// is seen. A successor process that holds a descriptor of the same connection
// can therefore take it over at any moment, also after a kill -9: it calls
// Resend and serves.
//
// What a reader may see, and nothing else: the right bytes, or EIO. A READ is
// never answered short of the end of the file, since the kernel would fill the
// rest with zeros; it is answered in full or with an error, at the latest when
// Options.ReadTimeout has passed.
//
// A reader that is killed while its READ is in work is gone only when the READ
// is answered, so ReadTimeout bounds that as well. FUSE_INTERRUPT is of no use
// here and is switched off: it tells of any signal, not only of deadly ones,
// and other readers may wait for the same page.
//
// The package does not know where bytes come from (Content) nor who mounts
// what (package mount).
package fusedev
