#!/usr/bin/env bash
# Runs every fuzz target of the module for a while: scripts/fuzz.sh 10s
set -euo pipefail
time=${1:-10s}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for package in $(go list ./...); do
	for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
		echo "== $package $target"
		# Minimizing an input of some KiB would take all of a short run.
		if go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "$package" >"$log" 2>&1; then
			tail -n 1 "$log"
			continue
		fi
		# On a busy machine go test may call its own end of time a failure.
		# A finding always comes with its input.
		if ! grep -q 'Failing input written' "$log" && grep -q '^ *context deadline exceeded$' "$log"; then
			echo "ended late, no finding"
			continue
		fi
		cat "$log"
		exit 1
	done
done
