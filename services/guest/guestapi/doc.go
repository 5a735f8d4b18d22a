// Package guestapi is the contract between a worker and the guest binary: the configuration that the worker writes
// for one instance, the JSON that the guest's host-side helpers print or leave behind, and the paths and names that
// both sides must agree on. It imports nothing but the standard library, so that every worker can use it.
//
// # How a worker runs the guest in a container
//
// Mount the binary read-only at [ContainerBinaryPath] and the file made by [Encode] read-only at
// [ContainerConfigPath], then run `BINARY init -config FILE` as the container's entrypoint, as uid 0 of the container
// (podman: --user 0:0; the image's own USER belongs in [Config.RunAs]). The image's environment reaches the workload
// and the SSH sessions through the environment of the container; [Config.Environment] is laid over it. The container
// ends when the workload does, with the workload's exit code. An image without a command lives until it is stopped.
//
// # How a worker runs the guest in a virtual machine
//
// The worker writes a [Machine] with [EncodeMachine] and hands it, with where the guest binary is, to pkg/userdata, whose
// text turns a cloud's stock image into the grant's instance. There the guest fetches the image, checks and unpacks it,
// and runs it in a root directory of its own by the same code as in a container. SSH is open only when the workload
// runs, so a handshake with the expected host key says that the instance is ready. How it fared otherwise is on the
// machine's console, see [FindVerdict]. A reboot starts the same workload in the same root directory. What a workload
// has written is kept; hosts, hostname and resolv.conf below /etc are written anew.
//
// The workload has the capabilities that container engines give, no devices, no way to the metadata service at the
// link-local address, and neither systemd's socket nor its bus in its root directory. It shares the machine's process
// ids, though: that is order, not a wall. The machine has one tenant, and nothing in it is worth more than what the tenant
// already has: its user-data holds this one instance's host key and, while it is valid, the URL of the tenant's image.
//
// # What a requester gets
//
// The keys of the configuration log in as [Config.User] and as root. The user is added to the image's user database; if
// that can't be written or isn't there, the login runs as root, which the console says once. Shell, commands, SFTP (and
// so scp), terminals, and forwarding of ports, unix sockets (local only) and agents work as with OpenSSH's server.
// Clients may set LANG, LANGUAGE, LC_*, TERM, COLORTERM and NO_COLOR; everything else is the image's and the grant's.
// A login shell may read the image's /etc/profile, which on some distributions replaces the image's PATH; commands
// don't. In an image without a shell, a command line is split as a shell would, by quotes and backslashes only, and
// run directly.
//
// When a client goes away, a command with a terminal gets SIGHUP and 5 s later SIGKILL; one without is left running,
// with its standard streams closed. When the workload ends, all sessions get SIGHUP, 1 s later SIGKILL, and their
// results are still delivered.
package guestapi

// Paths inside the container. They are below a directory of our own, so that they can't collide with an image's files.
const (
	// ContainerBinaryPath is where the guest binary is mounted.
	ContainerBinaryPath = "/.compute-bridge/guest"
	// ContainerConfigPath is where the configuration is mounted. It holds the host key: mode 0600, owner uid 0.
	ContainerConfigPath = "/.compute-bridge/config.json"
)

// File names inside a grant's directory on the host.
const (
	// ConfigFileName is the configuration as the worker keeps it on the host, mode 0600.
	ConfigFileName = "guest.json"
	// SpoolFileName is the record that `guest spool` leaves, mode 0600, see [Spool].
	SpoolFileName = "spool.json"
	// ReserveFileName is a file of [MaxSpoolBytes] that `guest spool` removes before it writes the spool, so that there
	// is room for it on a disk that has become full.
	ReserveFileName = "spool.reserve"
	// EndedFileName is the mark that `guest spool` sets before it writes the spool. The unit has it as a condition, so
	// that an ended grant can't start again.
	EndedFileName = "ended"
)

// Names of the two nftables sets, in the table that is given to `guest spool -table`, whose elements are interface
// names with a counter each. Directions are the instance's: received is what arrives at the instance.
const (
	// CounterSetReceived counts what is forwarded to the grant's interface (oifname).
	CounterSetReceived = "rx"
	// CounterSetSent counts what comes from the grant's interface (iifname).
	CounterSetSent = "tx"
)

// Exit codes of `guest init` and `guest serve` that don't come from the workload. They follow the shell's convention.
const (
	// ExitInvalidConfig says that the configuration was missing, malformed or refused (sysexits.h EX_CONFIG).
	ExitInvalidConfig = 78
	// ExitNotExecutable says that the workload's command exists and can't be executed.
	ExitNotExecutable = 126
	// ExitNotFound says that the workload's command does not exist.
	ExitNotFound = 127
	// ExitSignalBase plus n says that the workload was killed by signal n.
	ExitSignalBase = 128
	// ExitGuestFailed says that the guest itself failed, for example because its port is taken (sysexits.h EX_OSERR).
	ExitGuestFailed = 71
)

// LogPrefix begins every line that the guest itself writes to the console, so that a reader can tell it from the
// workload's own output.
const LogPrefix = "compute-bridge guest: "
