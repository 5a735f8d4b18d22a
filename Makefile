# The only entry point: `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

BIN := $(CURDIR)/.bin

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- Tools ------------------------------------------------------------------

BUF := $(BIN)/buf

$(BUF): tools/buf/go.mod tools/buf/go.sum
	GOWORK=off GOBIN=$(BIN) go -C tools/buf install tool
	@touch $@

$(BIN)/protoc-gen-go: tools/go.mod tools/go.sum
	GOWORK=off GOBIN=$(BIN) go -C tools install tool
	@touch $@

PROTO_DEPS := $(BIN)/proto-deps/buf/validate/validate.proto

$(PROTO_DEPS): tools/protodeps/go.mod tools/protodeps/go.sum
	GOWORK=off go -C tools/protodeps mod download github.com/bufbuild/protovalidate
	@mkdir -p $(@D)
	install -m 0644 "$$(GOWORK=off go -C tools/protodeps list -m -f '{{.Dir}}' github.com/bufbuild/protovalidate)/proto/protovalidate/buf/validate/validate.proto" $@

# --- Contract ---------------------------------------------------------------

.PHONY: generate
generate: $(BUF) $(BIN)/protoc-gen-go $(PROTO_DEPS) ## Format the contract and generate its Go code
	$(BUF) format --write proto
	rm -rf $(BIN)/generated
	$(BUF) generate proto --output $(BIN)/generated
	rm -rf proto/gen/go/computebridge
	mkdir -p proto/gen/go
	cp -r $(BIN)/generated/computebridge proto/gen/go/

.PHONY: lock
lock: $(BUF) $(PROTO_DEPS) ## Accept the contract as it is: rebuild the image that breaking changes are judged by
	$(BUF) build proto --exclude-source-info --output proto/lock.binpb
