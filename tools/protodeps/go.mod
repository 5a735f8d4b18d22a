// Protocol buffer sources that the contract imports. This module has no Go
// code: it only pins, with the checksums in go.sum, the release whose .proto
// files `make generate` copies to .bin/proto-deps. `go mod tidy` would find
// nothing imported and drop the pin, so it is not run here.
module github.com/compute-bridge/compute-bridge/tools/protodeps

go 1.26.0

require github.com/bufbuild/protovalidate v1.2.2
