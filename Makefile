# The only entry point: `make help` lists the targets.
#
# Go commands run in the workspace (go.work), where modules are tested together;
# binaries are built with GOWORK=off, as the images are, so that a module which
# imports what its own go.mod lacks does not build.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

# Tools, and what they leave behind. Binaries of ours go to bin.
TOOLS := $(CURDIR)/.bin
BUF := $(TOOLS)/buf
GOLANGCI_LINT := $(TOOLS)/golangci-lint
GOTESTSUM := $(TOOLS)/gotestsum
PLUGINS := $(TOOLS)/protoc-gen-go
PROTO_DEPS := $(TOOLS)/proto-deps/buf/validate/validate.proto

# The workspace's modules, by directory.
MODULES = $(or $(shell go list -m -f '{{.Dir}}'),$(error no module found: is go in PATH, and go.work in order?))

# Packages compiled or tested at once. Each one may start hosts, and the race
# detector multiplies memory: more than two gains nothing on a small machine.
P ?= 2
# A run that hangs should say where, long before CI gives up on it. This is for
# one package; LONG_TIMEOUT is that of `make test-long`.
TEST_TIMEOUT ?= 20m
LONG_TIMEOUT ?= 40m
# What is tested; `make test PACKAGES=./test/...` for the end-to-end tests only.
PACKAGES ?= $(ALL_PACKAGES)
# Further arguments of go test, for example TESTFLAGS='-run TestTerminate -v'.
TESTFLAGS ?=
# How long each fuzz test runs in `make fuzz`.
FUZZTIME ?= 10s
# Lab hosts that `make lab-up` starts.
N ?= 1

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- Prerequisites and tools ------------------------------------------------

.PHONY: prerequisites
prerequisites: ## Install the Debian packages that are lacking, saying so first
	@scripts/install-prerequisites

.PHONY: tools
tools: $(BUF) $(PLUGINS) $(PROTO_DEPS) $(GOLANGCI_LINT) $(GOTESTSUM) ## Build the pinned tools into .bin

# One rule a tools module: `go install tool` installs all that it pins.
$(BUF): tools/buf/go.mod tools/buf/go.sum
	@echo 'building buf'
	@GOWORK=off GOBIN=$(TOOLS) go -C tools/buf install tool
	@touch $@

$(PLUGINS): tools/go.mod tools/go.sum
	@echo 'building the code generators'
	@GOWORK=off GOBIN=$(TOOLS) go -C tools install tool
	@touch $@

$(GOLANGCI_LINT): tools/lint/go.mod tools/lint/go.sum
	@echo 'building golangci-lint'
	@GOWORK=off GOBIN=$(TOOLS) go -C tools/lint install tool
	@touch $@

$(GOTESTSUM): tools/dev/go.mod tools/dev/go.sum
	@echo 'building gotestsum and grpcurl'
	@GOWORK=off GOBIN=$(TOOLS) go -C tools/dev install tool
	@touch $@

# Checked against tools/protodeps/go.sum on its way out of the module cache.
$(PROTO_DEPS): tools/protodeps/go.mod tools/protodeps/go.sum
	@GOWORK=off go -C tools/protodeps mod download github.com/bufbuild/protovalidate
	@mkdir -p $(@D)
	@install -m 0644 "$$(GOWORK=off go -C tools/protodeps list -m -f '{{.Dir}}' github.com/bufbuild/protovalidate)/proto/protovalidate/buf/validate/validate.proto" $@

# --- Contract ---------------------------------------------------------------

# What the contract says now, as Go code, in .bin/generated.
.PHONY: generated
generated: $(BUF) $(PLUGINS) $(PROTO_DEPS)
	@rm -rf $(TOOLS)/generated
	@$(BUF) generate proto --output $(TOOLS)/generated

.PHONY: generate
generate: proto-fmt generated ## Format the contract and generate its Go code
	@rm -rf proto/gen/go/computebridge
	@mkdir -p proto/gen/go
	@cp -r $(TOOLS)/generated/computebridge proto/gen/go/

.PHONY: lock
lock: $(BUF) $(PROTO_DEPS) ## Accept the contract as it is: later changes are judged against it
	$(BUF) build proto --exclude-source-info --output proto/lock.binpb

# --- Format, lint, tidy -----------------------------------------------------

.PHONY: proto-fmt
proto-fmt: $(BUF) $(PROTO_DEPS)
	@$(BUF) format --write proto

.PHONY: fmt
fmt: proto-fmt $(GOLANGCI_LINT) ## Format the contract and all Go code
	@for module in $(MODULES); do (cd "$$module" && $(GOLANGCI_LINT) fmt); done

# golangci-lint reads one module at a time. All of them run before it fails.
.PHONY: lint
lint: $(GOLANGCI_LINT) $(BUF) $(PROTO_DEPS) ## Lint and check the format of Go code and contract
	@$(BUF) format --diff --exit-code proto
	@$(BUF) lint proto
	@failed=; for module in $(MODULES); do \
		echo "lint $${module#$(CURDIR)/}"; \
		(cd "$$module" && $(GOLANGCI_LINT) run --allow-serial-runners) || failed="$$failed $${module#$(CURDIR)/}"; \
	done; \
	if [[ -n $$failed ]]; then echo "lint failed in:$$failed" >&2; exit 1; fi

# Agreeing on versions can change what is tidy, hence twice.
TIDY = for module in $(MODULES); do echo "tidy $${module\#$(CURDIR)/}"; (cd "$$module" && GOWORK=off go mod tidy); done

.PHONY: fix
fix: $(GOLANGCI_LINT) ## Let the linters repair what they can
	@for module in $(MODULES); do echo "fix $${module#$(CURDIR)/}"; (cd "$$module" && $(GOLANGCI_LINT) run --allow-serial-runners --fix) || true; done

.PHONY: tidy
tidy: ## Tidy every module and agree on versions in the workspace
	@$(TIDY)
	go work sync
	@$(TIDY)

# --- Build ------------------------------------------------------------------

# A module's directory, the binary's name, the package.
go_build = CGO_ENABLED=0 GOWORK=off go build -C $(1) -trimpath -ldflags='-s -w' -o $(CURDIR)/bin/$(2) $(3)

.PHONY: build
build: ## Build the static binaries into bin
	@mkdir -p bin
	@# Hosts keep the guest under its digest: the same sources give the same bytes.
	$(call go_build,services/guest,guest,-buildvcs=false .)
	$(call go_build,services/router,router,.)
	$(call go_build,services/router,bridgectl,./cmd/bridgectl)
	$(call go_build,services/baremetal-worker,baremetal-worker,.)
	$(call go_build,services/aws-worker,aws-worker,.)
	$(call go_build,test,lab,./lab/cmd/lab)
	$(call go_build,test,demo,./demo)

# --- Test -------------------------------------------------------------------

# Those with hosts take longest and mostly wait: they begin first, so that what is
# quick fills the gaps, and the end isn't one of them alone.
ALL_PACKAGES = $$(go list work | awk '/\/compute-bridge\/test(\/|$$)|conformance|hostbackend/ {print; next} {rest = rest $$0 "\n"} END {printf "%s", rest}')

# Tests whose names begin with TestLong take minutes each. They are run by
# `make test-long`, all others by `make test`; nothing is skipped by either. The
# long ones repeat thousands of times what the others do once under the race
# detector, and go without it: it would take a third of what is swept. The one
# that takes longest begins first.
LONG_PACKAGES = $$(grep -rl --include='*_test.go' '^func TestLong' . | xargs -r dirname | sort -ru)

GO_TEST = GOTESTSUM=$(GOTESTSUM) RESULTS=$(TOOLS)/results scripts/test $(1) -shuffle=on -p $(P)

.PHONY: test
test: prerequisites build $(GOTESTSUM) ## Install what is lacking, build, and run the tests of every module: below 20 min on 2 cores
	@$(call GO_TEST,test) -race -skip '^TestLong' -timeout $(TEST_TIMEOUT) $(TESTFLAGS) $(PACKAGES)

.PHONY: test-long
test-long: prerequisites build $(GOTESTSUM) ## The same for the long ones: every crash point and fault, on real hosts, with the built binaries
	@packages="$(LONG_PACKAGES)"; [[ -n $$packages ]] || { echo 'no long tests found' >&2; exit 1; }; \
	$(call GO_TEST,test-long) -run '^TestLong' -timeout $(LONG_TIMEOUT) $(TESTFLAGS) $$packages

.PHONY: bench
bench: ## Run the benchmarks, six times each, for benchstat
	go test -run='^$$' -bench=. -benchmem -count=6 -p 1 $(TESTFLAGS) work

.PHONY: fuzz
fuzz: ## Run every fuzz test for FUZZTIME (10s)
	@scripts/fuzz $(FUZZTIME)

# --- Check ------------------------------------------------------------------

.PHONY: check
check: check-generated check-tidy check-modules lint test test-long ## All that CI runs

.PHONY: check-generated
check-generated: generated ## Compare the generated code with the contract, and the contract with its lock
	@diff -r $(TOOLS)/generated/computebridge proto/gen/go/computebridge || \
		{ echo 'generated code and contract differ: run make generate' >&2; exit 1; }
	$(BUF) breaking proto --against proto/lock.binpb

.PHONY: check-tidy
check-tidy: ## Fail when a go.mod or go.sum is not tidy
	@failed=; for module in $(MODULES); do (cd "$$module" && GOWORK=off go mod tidy -diff) || failed=1; done; \
	if [[ -n $$failed ]]; then echo 'not tidy: run make tidy' >&2; exit 1; fi

.PHONY: check-modules
check-modules: ## Build each module by itself, tests included, as an importer outside the workspace would
	@for module in $(MODULES); do echo "vet $${module#$(CURDIR)/} (GOWORK=off)"; (cd "$$module" && GOWORK=off go vet ./...); done

.PHONY: deps-golden
deps-golden: ## Accept the modules that the router links as they are now
	cd services/router && GOWORK=off go list -deps -f '{{with .Module}}{{.Path}}{{end}}' . | sort -u > deps.golden

# --- Lab and demo -----------------------------------------------------------

.PHONY: lab-up
lab-up: prerequisites build ## Start N (1) lab hosts: Debian with systemd, sshd and podman
	bin/lab up -n $(N)

.PHONY: lab-shell
lab-shell: ## Log in to a lab host (HOST=name; the first one without)
	@bin/lab ssh $(HOST)

.PHONY: lab-down
lab-down: ## Destroy the lab hosts
	bin/lab down

.PHONY: demo
demo: prerequisites build ## A grant from the router to a container on a lab host, end to end (KEEP=1: leave it running)
	@bin/demo $(if $(KEEP),-keep)

.PHONY: demo-aws
demo-aws: prerequisites build ## The same with the AWS worker, on a simulated EC2 whose instance boots Debian (KEEP=1: leave it running)
	@bin/demo -aws $(if $(KEEP),-keep)

# The real AWS. It costs money and wants to be told so: docs/aws.md.
.PHONY: live-aws
live-aws: ## Check the AWS worker against AWS itself (CONFIG=worker.toml IMAGE=sha256:HEX; CLEAN=1; costs money)
	@mkdir -p bin
	@$(call go_build,services/aws-worker,live-aws,./cmd/live-aws)
	@bin/live-aws $(if $(CONFIG),-config '$(CONFIG)') $(if $(IMAGE),-image '$(IMAGE)') \
		$(if $(CLEAN),-clean) $(if $(filter 1,$(LIVE_AWS_I_WILL_PAY)),-i-will-pay)

# --- Containers, for development --------------------------------------------

# Files of .dev belong to whoever runs this, and so do the containers' processes.
COMPOSE ?= docker compose
export CB_USER = $(shell id -u):$(shell id -g)

.PHONY: compose-up
compose-up: ## Build and start router and bare-metal worker in containers (see docker-compose.yml)
	@mkdir -p .dev/certs .dev/router/state .dev/baremetal-worker/{config,state}
	$(COMPOSE) up --build --detach --wait

.PHONY: compose-down
compose-down: ## Stop the containers of compose-up
	$(COMPOSE) down

# --- Clean ------------------------------------------------------------------

.PHONY: clean
clean: ## Remove built binaries and test results; keep the tools
	rm -rf bin $(TOOLS)/generated $(TOOLS)/results

.PHONY: distclean
distclean: clean ## Remove the tools too
	rm -rf $(TOOLS)
