#!/bin/sh
# Installs what `make demo` and `make test` need, on Debian 12 or later and
# Ubuntu: packages through apt-get, and a Go toolchain under build/go if there
# is none new enough. Run again, it finds all there and does nothing.
#
# It asks for root through sudo, and only if something is missing. No service
# is started or enabled. GOPROXY, and apt's own configuration, say where
# things come from.
set -eu
cd "$(dirname "$0")/.."
. scripts/env.sh

# What each is for:
packages="
	mmdebstrap debian-archive-keyring
	docker-registry
	crun runc
	erofs-utils fuse3 e2fsprogs
	busybox-static attr isal zstd xz-utils
	gcc libc6-dev
"
# mmdebstrap, debian-archive-keyring  the images of bench/debian
# docker-registry                     the registry of bench/registry
# crun, runc                          runtime/
# erofs-utils, fuse3                  fsck.erofs and fusermount3, in tests
# e2fsprogs                           mkfs.ext4, for disks that fail
# busybox-static, zstd, xz            test containers and archives
# attr                                setfattr, for what the tests' layers carry
# isal                                igzip, for the peer of bench/plain
# gcc, libc6-dev                      go test -race

# The toolchain is the Go module golang.org/toolchain, as `go` itself fetches
# it; sums are of the module's zip files.
toolchain=1.26.8
sum_amd64=30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7
sum_arm64=02b36b6787b3ac767668f630e2998df45a3b1f9ffee08d1bf3ef6487cd658d99

say() { echo "deps: $*" >&2; }
die() { say "$*"; exit 1; }

# missing prints those of the given packages that are not installed.
missing() {
	installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null |
		sed -n 's/ installed$//p')
	for p in "$@"; do
		echo "$installed" | grep -qx "$p" || printf '%s ' "$p"
	done
}

# as_root runs a command as root.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	else
		sudo -- "$@"
	fi
}

# quietly runs a command and shows its output only if it fails.
quietly() {
	"$@" >"$log" 2>&1 || { cat "$log" >&2; die "failed: $*"; }
}

# restore undoes what kept services from starting.
policy=/usr/sbin/policy-rc.d
restore() {
	[ -n "${denied-}" ] || return 0
	denied=
	if [ -e "$policy.before-shale" ]; then
		as_root mv "$policy.before-shale" "$policy"
	else
		as_root rm -f "$policy"
	fi
}

# install_packages installs what $need says. Packages that have a service (the
# registry) ask policy-rc.d whether they may start it: not now.
install_packages() {
	[ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
		die "must be root to install $need(run this as root, or install sudo)"
	say "installing $need"
	printf '#!/bin/sh\nexit 101\n' >"$tmp/policy"
	denied=yes
	if [ -e "$policy" ] && [ ! -e "$policy.before-shale" ]; then
		as_root mv "$policy" "$policy.before-shale"
	fi
	as_root install -m 755 "$tmp/policy" "$policy"
	# The lists may be recent enough; if not, fetch them and try again.
	apt="env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq"
	install="$apt install -y --no-install-recommends"
	# shellcheck disable=SC2086 # words are meant to be split
	as_root $install $need >"$log" 2>&1 || {
		quietly as_root $apt update
		quietly as_root $install $need
	}
	restore
	case " $need" in
	*" docker-registry "*) # nor at the next boot
		quietly as_root update-rc.d docker-registry disable
		;;
	esac
}

# go_ok tells whether `go` is as new as go.mod wants. Inside of a module, go
# 1.21 and later fetch the toolchain they need by themselves.
go_ok() {
	command -v go >/dev/null || return 1
	have=$(go version 2>/dev/null | sed -n 's/^go version go\([0-9.]*\).*/\1/p')
	want=$(sed -n 's/^go \([0-9.]*\).*/\1/p' go.mod)
	[ -n "$have" ] && [ "$(printf '%s\n' "$want" "$have" | sort -V | head -n 1)" = "$want" ]
}

install_go() {
	arch=$(dpkg --print-architecture)
	case $arch in
	amd64) sum=$sum_amd64 ;;
	arm64) sum=$sum_arm64 ;;
	*) die "no Go toolchain is known for $arch: install Go $(sed -n 's/^go //p' go.mod) or later" ;;
	esac
	need=$(missing curl ca-certificates unzip)
	[ -z "$need" ] || install_packages
	name="golang.org/toolchain@v0.0.1-go$toolchain.linux-$arch"
	say "fetching Go $toolchain"
	fetched=
	for proxy in $(echo "${GOPROXY:-https://proxy.golang.org}" | tr ',|' '  '); do
		case $proxy in
		direct | off) continue ;;
		esac
		if curl -fsSL --retry 3 -o "$tmp/go.zip" \
			"${proxy%/}/golang.org/toolchain/@v/${name#*@}.zip" 2>"$log"; then
			fetched=yes
			break
		fi
	done
	[ -n "$fetched" ] || { cat "$log" >&2; die "cannot fetch Go: set GOPROXY, or install Go yourself"; }
	echo "$sum  $tmp/go.zip" | sha256sum --check --status ||
		die "what was fetched as Go $toolchain has another sha256 than $sum"
	quietly unzip -q "$tmp/go.zip" -d "$tmp/go"
	# A module's zip can keep neither modes nor nested modules.
	chmod -R u+w "$tmp/go/$name"
	chmod +x "$tmp/go/$name"/bin/* "$tmp/go/$name"/pkg/tool/*/*
	find "$tmp/go/$name" -name _go.mod -execdir cp {} go.mod \;
	rm -rf build/go
	mv "$tmp/go/$name" build/go
	. scripts/env.sh
	go_ok || die "the Go toolchain in build/go does not run"
}

command -v apt-get >/dev/null || die "this needs Debian or Ubuntu; elsewhere install the packages named in scripts/deps.sh"
mkdir -p build
tmp=$(mktemp -d build/deps.XXXXXX)
log=$tmp/log
trap 'restore; rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM HUP

# shellcheck disable=SC2086 # words are meant to be split
need=$(missing $packages)
[ -z "$need" ] || install_packages
go_ok || install_go
