// Package ec2tags has the tags that the AWS worker puts on all that it makes, as
// docs/aws.md names them. Tests read them here and not from the worker, so that a
// worker which renames one is found out.
package ec2tags

// Tags of an instance, its volumes and its network interfaces.
const (
	// Bridge is the bridge's id. Nothing without it is ever touched.
	Bridge = "compute-bridge:bridge"
	// Backend is the backend's name.
	Backend = "compute-bridge:backend"
	// Grant is the grant's request id, 64 hexadecimal digits.
	Grant = "compute-bridge:grant"
	// Attempt counts the attempts for the grant, from 1 on.
	Attempt = "compute-bridge:attempt"
	// ValidTo is the grant's deadline, RFC 3339 in UTC.
	ValidTo = "compute-bridge:valid-to"
	// Shape is what the grant asked for: "<millicores>/<MiB>/<GiB>".
	Shape = "compute-bridge:shape"
	// Name is what the console shows: "cb-<bridge>-<12 digits>-<attempt>".
	Name = "Name"
)

// Group is the tag of a security group that grants share, beside [Bridge]: a hash
// of its rules.
const Group = "compute-bridge:group"
