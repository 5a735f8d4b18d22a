// Package hosttap sits between a bare-metal worker and the sshd of a lab host,
// so that the unchanged worker can be tested call by call: what it asks of the
// host is named, recorded, and made to fail.
//
// A [Tap] is an SSH server with a host key of its own, which the worker's
// inventory pins in place of the host's. Everything that the worker does on its
// connection is done on a connection to the host: sessions, forwarded unix
// sockets, subsystems, requests of the connection itself. Windows, the ends of
// streams, exit codes and refusals are the host's. The tap understands what it
// forwards: D-Bus messages, SFTP packets, commands, and HTTP requests to podman.
// Each is a [Call] at a point whose name is the same in every run:
//
//	systemd.StartTransientUnit   a method on the system bus
//	sftp.posix-rename grant.json a file operation; ids, numbers and the random
//	                             part of a temporary name are left out
//	exec.podman load             a command
//	podman.GET /networks/json    a request to podman's API
//
// The packets that read or write one open file are one call, at the first.
//
// A [Group] holds the taps of one worker. [Group.Record] lists the calls that
// mention a grant, and [Group.Inject] has the n-th of a name fail in one of the
// ways of [Kind]. At a crash point the group calls its kill function; what the
// call needed is then never forwarded, and the connections to the hosts end as
// the kernel ends those of a dead process.
//
// In a test of a worker's process:
//
//	group := hosttap.NewGroup(func() { kill -9 the worker and wait for it })
//	tap := group.Open(t, host, hosttap.Options{Address: "127.0.1.1", FirstPort: 40000, LastPort: 40019})
//	// [[backend.host]]
//	// address     = tap.Addr()              "127.0.1.1:22"
//	// host_keys   = [tap.HostKeyLine()]
//	// public_host = host.Addr               what receipts name
//	// ports       = "40000-40019"
//	stop := group.Record(grant)
//	… Provision, Terminate …
//	for _, call := range stop() {
//		fault := group.Inject(hosttap.Fault{Point: call.Point, Nth: 1, Kind: hosttap.CrashBefore, Grant: otherGrant})
//		… Provision; <-fault.Reached(): the worker is dead; start it again …
//	}
//
// The worker asks a new instance's SSH for an answer at the address that it has
// of the host, which is the tap's: so the tap forwards the host's range of ports,
// too. Give every host another loopback address; tests run in the lab's network
// namespace, where all of 127.0.0.0/8 is free.
//
// A test that plays a worker's death in its own process has the kill function
// call [Group.Refuse], which also ends all connections, and allows connections
// again for the next worker.
package hosttap
