module github.com/compute-bridge/compute-bridge/services/baremetal-worker

go 1.26.0

require (
	github.com/compute-bridge/compute-bridge/pkg v0.0.0
	github.com/compute-bridge/compute-bridge/services/guest v0.0.0-00010101000000-000000000000
	github.com/compute-bridge/compute-bridge/test v0.0.0
	github.com/coreos/go-systemd/v22 v22.7.0
	github.com/godbus/dbus/v5 v5.2.4
	github.com/google/go-cmp v0.7.0
	github.com/pkg/sftp v1.13.12
	golang.org/x/crypto v0.58.0
	golang.org/x/sys v0.49.0
)

require (
	buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go v1.36.12-20260825204119-511051f7f437.2 // indirect
	github.com/compute-bridge/compute-bridge/proto/gen/go v0.0.0 // indirect
	github.com/klauspost/cpuid/v2 v2.0.9 // indirect
	github.com/kr/fs v0.1.0 // indirect
	github.com/pelletier/go-toml/v2 v2.4.3 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	golang.org/x/net v0.60.0 // indirect
	golang.org/x/text v0.43.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260928230214-8a89bd6388cc // indirect
	google.golang.org/grpc v1.85.0 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
	lukechampine.com/blake3 v1.4.1 // indirect
)

replace (
	github.com/compute-bridge/compute-bridge/pkg => ../../pkg
	github.com/compute-bridge/compute-bridge/proto/gen/go => ../../proto/gen/go
	github.com/compute-bridge/compute-bridge/services/guest => ../guest
	github.com/compute-bridge/compute-bridge/test => ../../test
)
