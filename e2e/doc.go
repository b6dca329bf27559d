// Package e2e holds tests on the real thing: a Debian image built from
// packages, a real registry, the kernel's EROFS, containers, and what goes
// wrong with them. They need root; without it they skip. It has no code.
package e2e
