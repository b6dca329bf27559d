// Package lint holds the rules of docs/ARCHITECTURE.md as tests: which package
// may import which, and that each says what it is for. It has no code.
package lint
