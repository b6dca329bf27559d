#!/usr/bin/env bash
# Runs every fuzz target of the module for a while: scripts/fuzz.sh 10s
set -euo pipefail
time=${1:-10s}
for package in $(go list ./...); do
	for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
		echo "== $package $target"
		# Minimizing an input of some KiB would take all of a short run.
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "$package"
	done
done
