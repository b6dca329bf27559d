# Sourced by the Makefile and by scripts, from the top of the checkout:
#
#     . scripts/env.sh
#
# puts the Go toolchain that scripts/deps.sh fetched first on PATH, if it did,
# and the directories of programs that only root has on PATH last.

if [ -x "$PWD/build/go/bin/go" ]; then
	PATH="$PWD/build/go/bin:$PATH"
	unset GOROOT
fi
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export PATH
