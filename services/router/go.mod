module github.com/compute-bridge/compute-bridge/services/router

go 1.26.0

require (
	github.com/compute-bridge/compute-bridge/pkg v0.0.0
	github.com/compute-bridge/compute-bridge/proto/gen/go v0.0.0
	github.com/google/go-cmp v0.7.0
	go.uber.org/goleak v1.3.0
	google.golang.org/grpc v1.85.0
	google.golang.org/protobuf v1.36.12
)

require (
	buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go v1.36.12-20260825204119-511051f7f437.2 // indirect
	golang.org/x/net v0.60.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
	golang.org/x/text v0.43.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260928230214-8a89bd6388cc // indirect
)

replace (
	github.com/compute-bridge/compute-bridge/pkg => ../../pkg
	github.com/compute-bridge/compute-bridge/proto/gen/go => ../../proto/gen/go
)
