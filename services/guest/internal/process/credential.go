package process

import (
	"bytes"
	"os"
	"syscall"

	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
)

// Credential is what SysProcAttr needs to run a child as the account. It is nil when the guest isn't root and so
// can't change identity: the child then runs as what the guest runs as.
func Credential(a account.Account) *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	// In a user namespace made without privilege, the kernel refuses setgroups altogether.
	policy, err := os.ReadFile("/proc/self/setgroups")
	denied := err == nil && bytes.Equal(bytes.TrimSpace(policy), []byte("deny"))
	return &syscall.Credential{Uid: a.UID, Gid: a.GID, Groups: a.Groups, NoSetGroups: denied}
}
