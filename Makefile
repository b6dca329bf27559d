# Everything works on a fresh Debian 12 or Ubuntu: `deps` installs what is
# missing (Debian packages, a Go toolchain) and does nothing otherwise.

SHELL   := /bin/bash
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GO      := . scripts/env.sh && CGO_ENABLED=0 go
IMAGE   ?=
CMD     ?=

.PHONY: build demo faults test race lint fuzz bench deps clean

build: deps ## the program, bin/shale
	@$(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/shale ./cmd/shale

demo: build ## cold starts of a real image, pulled and lazy; IMAGE=REF CMD='...' for another
	@$(GO) run ./bench/demo $(if $(IMAGE),-image $(IMAGE)) $(CMD)

faults: build ## scripts of faults, each in each way and 100 by chance; FAULTS='-registry URL IMAGE' for yours
	@$(GO) run ./bench/faults $(FAULTS)

test: lint build ## all tests, one package at a time: they kill, fill disks and wait; those that need root say so when they are skipped
	@. scripts/env.sh && SHALE=$(CURDIR)/bin/shale CGO_ENABLED=0 go test -p 1 -timeout 40m ./...

race: build ## all tests under the race detector (needs a C compiler)
	@. scripts/env.sh && SHALE=$(CURDIR)/bin/shale CGO_ENABLED=1 go test -race -timeout 60m ./...

lint: deps ## gofmt, vet, staticcheck; import direction and package docs are tests
	@. scripts/env.sh && bad=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$bad" ] || { echo "gofmt would change: $$bad"; exit 1; }
	@$(GO) vet ./...
	@$(GO) tool staticcheck ./...

fuzz: deps ## each fuzz target for FUZZTIME (default 10s)
	@. scripts/env.sh && scripts/fuzz.sh $${FUZZTIME:-10s}

bench: build ## benchmarks
	@$(GO) test -run '^$$' -bench . -benchtime 1s ./...

deps:
	@scripts/deps.sh

clean:
	rm -rf bin build
