package hostlease

import "golang.org/x/sys/unix"

// What stops a process, as a debugger or a machine that is suspended does.
const (
	stopSignal     = unix.SIGSTOP
	continueSignal = unix.SIGCONT
)
