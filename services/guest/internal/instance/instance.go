// Package instance is the life of one instance inside its container: make the login user, start the workload, open
// SSH, pass on signals, and end when the workload does.
package instance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/environ"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/sshserver"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/workload"
)

// killWait is how long a killed workload may take to disappear before the guest ends without it; as PID 1's child, it
// then takes the rest of the container along.
const killWait = 5 * time.Second

// Params are what an instance needs from its process.
type Params struct {
	// Config has been validated.
	Config guestapi.Config
	// Environ is the process's own environment, which is the image's.
	Environ []string
	// Signals delivers what the process is sent.
	Signals <-chan os.Signal
	// Accounts is the container's user database.
	Accounts *account.Database
	// SFTPCommand starts the SFTP server.
	SFTPCommand []string
	// Stdout and Stderr become the workload's.
	Stdout, Stderr *os.File
	// Ready is called once, when the workload runs and SSH is open. Optional.
	Ready func()
	// Logger writes to the console.
	Logger *slog.Logger
}

// Run runs the instance and returns the process's exit code: the workload's, or one of guestapi's. It ends with its
// workload or by a signal; the end of ctx takes SSH away and so counts as a failure of the guest.
func Run(ctx context.Context, p Params) int {
	hostKey, keys, err := parseKeys(p.Config)
	if err != nil {
		p.Logger.Error("The configuration is refused", "error", err)
		return guestapi.ExitInvalidConfig
	}
	env := environ.Overlay(p.Environ, p.Config.Environment)
	server, err := sshserver.New(sshserver.Options{
		HostKey:        hostKey,
		AuthorizedKeys: keys,
		User:           p.Config.User,
		Banner:         p.Config.Banner,
		Accounts:       p.Accounts,
		Env:            env,
		SFTPCommand:    p.SFTPCommand,
		Logger:         p.Logger,
	})
	if err != nil {
		p.Logger.Error("The SSH server cannot be set up", "error", err)
		return guestapi.ExitGuestFailed
	}
	if err := p.Accounts.Ensure(p.Config.User); err != nil {
		p.Logger.Warn("The login user could not be made, so another is used",
			"user", p.Config.User, "used", p.Accounts.Login(p.Config.User).Name, "reason", err)
	}

	work, err := startWorkload(p, env)
	if err != nil {
		p.Logger.Error("The workload cannot run", "reason", err)
		if startErr, ok := errors.AsType[*workload.StartError](err); ok {
			return startErr.Code
		}
		return guestapi.ExitNotExecutable
	}

	// Only now: an open port means that the workload runs.
	var listen net.ListenConfig
	listener, err := listen.Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(int(p.Config.ListenPort))))
	if err != nil {
		p.Logger.Error("The SSH port cannot be opened", "error", err)
		if work != nil {
			work.Kill(killWait)
		}
		return guestapi.ExitGuestFailed
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, listener) }()
	p.Logger.Info("SSH is open", "port", p.Config.ListenPort, "user", p.Config.User)
	if p.Ready != nil {
		p.Ready()
	}

	code := supervise(p, work, served)
	cancel()
	if err := <-served; err != nil {
		p.Logger.Error("The SSH server failed", "error", err)
	}
	return code
}

// supervise returns the exit code when it is time to end.
func supervise(p Params, work *workload.Workload, served chan error) int {
	var done <-chan struct{} // never, without a workload
	if work != nil {
		done = work.Done()
		defer work.Close()
	}
	var grace <-chan time.Time
	for {
		select {
		case <-done:
			p.Logger.Info("The workload has ended", "exit_code", work.ExitCode())
			return work.ExitCode()
		case sig := <-p.Signals:
			number, ok := sig.(syscall.Signal)
			if !ok {
				continue
			}
			if work == nil {
				if number == syscall.SIGTERM || number == syscall.SIGINT || number == syscall.SIGQUIT {
					return 0
				}
				continue
			}
			// An ended workload is seen in the next round.
			_ = work.Signal(number)
			if number == syscall.SIGTERM && grace == nil {
				grace = time.After(p.Config.StopGrace())
			}
		case <-grace:
			p.Logger.Warn("The workload did not stop in time and is killed",
				"grace_seconds", int(p.Config.StopGrace()/time.Second))
			work.Kill(killWait)
			select {
			case <-work.Done():
			default:
				// It can't be killed, for example because a device doesn't answer.
				return guestapi.ExitSignalBase + int(syscall.SIGKILL)
			}
		case err := <-served:
			// Without SSH the instance is of no use to its requester; ending says so.
			served <- err
			if work != nil {
				work.Kill(killWait)
			}
			return guestapi.ExitGuestFailed
		}
	}
}

// startWorkload starts the configured command, or returns nil if there is none: the instance then lives until it is
// stopped.
func startWorkload(p Params, env []string) (*workload.Workload, error) {
	if len(p.Config.Command) == 0 {
		return nil, nil
	}
	spec := workload.Spec{
		Command: p.Config.Command,
		Env:     env,
		Dir:     p.Config.WorkingDir,
		Stdout:  p.Stdout,
		Stderr:  p.Stderr,
	}
	if p.Config.RunAs != "" {
		acct, err := p.Accounts.Resolve(p.Config.RunAs)
		if err != nil {
			return nil, &workload.StartError{Code: guestapi.ExitNotExecutable, Reason: err.Error()}
		}
		spec.Account = &acct
		spec.Env = withHome(env, p, acct)
	}
	return workload.Start(spec)
}

// withHome sets HOME for the image's user unless someone chose one: what the engine has set for the guest is root's.
func withHome(env []string, p Params, acct account.Account) []string {
	if _, chosen := p.Config.Environment["HOME"]; chosen {
		return env
	}
	current, _ := environ.Get(env, "HOME")
	if current != "" && current != p.Accounts.Login(account.RootName).Home {
		return env
	}
	home := acct.Home
	if home == "" {
		home = "/"
	}
	return environ.Set(env, "HOME", home)
}

// parseKeys parses what guestapi checks only in form. Its errors name the field and hold nothing of the host key.
func parseKeys(config guestapi.Config) (gossh.Signer, []gossh.PublicKey, error) {
	hostKey, err := gossh.ParsePrivateKey([]byte(config.HostKey.Reveal()))
	if err != nil {
		if _, ok := errors.AsType[*gossh.PassphraseMissingError](err); ok {
			return nil, nil, errors.New("host_key_pem: is encrypted with a passphrase")
		}
		return nil, nil, errors.New("host_key_pem: is not a private key that SSH can use")
	}
	if hostKey.PublicKey().Type() == gossh.InsecureKeyAlgoDSA { //nolint:staticcheck // Named to be refused.
		return nil, nil, errors.New("host_key_pem: DSA keys are not accepted")
	}
	keys := make([]gossh.PublicKey, 0, len(config.AuthorizedKeys))
	for i, line := range config.AuthorizedKeys {
		key, _, _, _, err := gossh.ParseAuthorizedKey([]byte(line))
		if err != nil {
			return nil, nil, fmt.Errorf("authorized_keys: key %d: %w", i, err)
		}
		if _, isCertificate := key.(*gossh.Certificate); isCertificate {
			return nil, nil, fmt.Errorf("authorized_keys: key %d: certificates are not accepted", i)
		}
		if key.Type() == gossh.InsecureKeyAlgoDSA { //nolint:staticcheck // Named to be refused.
			return nil, nil, fmt.Errorf("authorized_keys: key %d: DSA keys are not accepted", i)
		}
		keys = append(keys, key)
	}
	return hostKey, keys, nil
}
