// Package lab starts real Linux hosts for tests: Debian with systemd as PID 1,
// sshd, D-Bus, podman and nftables, each in namespaces of its own.
//
// A [Lab] is a network namespace with a bridge (10.77.0.1/16). A [Host] is a
// root file system on a small disk image of its own, a network namespace with
// one leg in that bridge, and a process tree whose PID 1 is systemd. It boots
// to an answering sshd in about two seconds and costs some tens of megabytes.
// Nothing is added to the network namespace, mount namespace or sysctls of the
// machine itself, except the two names under /run/netns that `ip netns` shows.
//
// A test package calls [Main] from its TestMain. Main runs the test binary
// again inside the lab's network namespace, so that the tests, the workers that
// they start and OpenSSH's own client all reach the hosts by their addresses.
// Tests then call [NewHost]. A program that is not a test calls [Helper] first
// in its main function, and [Open].
//
// A machine ([Lab.StartMachine]) is a host that boots as a cloud's instances do:
// nothing is set up in it but what its cloud-init finds out. Package labvm makes
// instances of it.
//
// What such a host lacks: the machine's cgroup controllers, when the machine
// holds them in cgroup v1 (limits can be set and read back, but do nothing);
// virtual machines; a kernel of its own.
//
// The lab needs root, and the Debian packages mmdebstrap, iproute2, util-linux
// and e2fsprogs. A missing one is an error that names it.
package lab
