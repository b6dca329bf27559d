// Package bench is the root of the measuring side of the project: everything
// that says how fast a container starts, and what it is compared with.
//
//	debian    builds real Debian images as OCI layouts
//	oci       the few OCI documents the others read and write
//	registry  runs a real registry on loopback and pushes to it
//	netmodel  makes loopback behave like a network: delay, bandwidth, faults
//	plain     the peer: full pull and unpack, as a container engine does it
//	treecmp   compares two directory trees exactly
//	start     measures starts: real images, each way they can start
//	replay    measures what the fetch policy makes of one start
//	demo      one image, the product and its peer: make demo
//
// A measured start is always the same chain: an image of debian, pushed to
// registry, read through netmodel, once by the product and once by plain.
// The packages below this one know nothing of the product, so that the peer
// and the network cannot favour it; only programs, what they share
// (start/cold) and end-to-end tests import both sides.
package bench
