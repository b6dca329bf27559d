// Package mount holds the faces of a linked image: the ways its bytes reach a
// reader.
//
//   - Device mounts it as EROFS from one flat file that a fusedev.Content
//     provides, for images whose bytes are still on their way.
//   - Direct mounts it as EROFS from files on disk, for images that are
//     complete. No process is needed any longer.
//   - Fanotify mounts it as Direct does, before they are: the kernel asks before it
//     reads. When all have come the mount is one of Direct.
//   - Fuse serves its files one by one, for kernels that cannot mount EROFS and
//     for users who may not.
//
// All are a Face; Choose tells which is best for a machine. As root they give a
// detached mount, a descriptor that appears in no mount table until someone
// attaches it (Attach, or move_mount(2) in another process). It vanishes with
// its last descriptor; once attached it lives like any mount.
//
// Under Device lie three layers, of which only the top one can be seen:
//
//	EROFS mount, handed out
//	  its file: the image in a FUSE mount that was never attached
//	    /dev/fuse, read by this process
//
// The EROFS super block alone keeps the FUSE mount alive. When the last
// reference to the EROFS goes, wherever it was mounted, the FUSE super block
// goes too, the server reads ENODEV, and Mounted.Done is closed.
//
// The package knows nothing of pools or chunks. Everything but Probe and, with
// fusermount3, Fuse needs root (CAP_SYS_ADMIN in the initial user namespace).
package mount
