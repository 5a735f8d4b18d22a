// The pinned tools that generate code from the contract. Not part of go.work:
// the versions that these tools need must not reach what we ship.
module github.com/compute-bridge/compute-bridge/tools

go 1.26.0

tool (
	google.golang.org/grpc/cmd/protoc-gen-go-grpc
	google.golang.org/protobuf/cmd/protoc-gen-go
)

require (
	google.golang.org/grpc/cmd/protoc-gen-go-grpc v1.6.2 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)
