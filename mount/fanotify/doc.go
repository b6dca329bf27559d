// Package fanotify makes readers of files wait for bytes that are not there yet: the
// kernel asks before each read of a marked file (FAN_PRE_ACCESS, Linux 6.14), and
// goes on when it is answered.
//
// What a process has been asked and has not answered survives it, if somebody else
// holds the group's descriptor and the journal:
//
//	group     readers wait as long as anybody has it open. When nobody does, the
//	          kernel lets all of them read what is there, zeros perhaps.
//	journal   memory (memfd) that the kernel itself writes an event to when it is
//	          read: what read(2) has taken from the group is in the journal, at
//	          whatever moment the process is killed.
//
// An event that was read is not told again, but can be answered by anybody who has
// the group, by the number that its descriptor had in the process that read it.
//
// Who writes to a marked file, or reads from it for its own purposes, uses a
// descriptor that was opened before the mark: for such a one nothing is asked. With
// one opened later it would wait for itself.
//
// The package knows nothing of images and mounts.
package fanotify
