package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/compute-bridge/compute-bridge/pkg/redact"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/login"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/show"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/state"
)

// privateKey returns the login key that the bridge made for a grant, empty if
// the requester uses its own.
func privateKey(g state.Grant, r *bridgev1.Receipt) (redact.Secret, error) {
	switch k := r.GetLoginKey().(type) {
	case *bridgev1.Receipt_RequesterKey:
		return redact.Secret{}, nil
	case *bridgev1.Receipt_SealedKey:
		if g.X25519.IsZero() {
			return redact.Secret{}, fail(ExitOther, "the login key is sealed to a key that is not stored here (the grant has ended, or was made elsewhere)")
		}
		return login.Unseal(g.X25519, g.ID, k.SealedKey)
	case *bridgev1.Receipt_PlaintextKey:
		if len(k.PlaintextKey.GetPrivateKey()) > 0 {
			return redact.New(k.PlaintextKey.GetPrivateKey()), nil
		}
		return redact.Secret{}, fail(ExitOther, "the bridge sent the login key in clear, and bridgectl stores no such key: use --ssh-key or --seal")
	}
	return redact.Secret{}, fail(ExitOther, "the receipt has no login key")
}

// access returns where a stored grant's receipt leads and the key for it.
func (a *app) access(arg string) (state.Store, state.Grant, login.Destination, login.Key, error) {
	store, err := a.store()
	if err != nil {
		return store, state.Grant{}, login.Destination{}, login.Key{}, usage(err)
	}
	g, err := a.stored(store, arg)
	if err != nil {
		return store, g, login.Destination{}, login.Key{}, err
	}
	r := g.Response.GetReceipt()
	if r == nil {
		return store, g, login.Destination{}, login.Key{}, fail(ExitNotFound, "grant %s has no receipt yet; bridgectl provision --again %s fetches it", show.ID(g.ID[:]), show.ID(g.ID[:]))
	}
	dest, err := login.FromReceipt(r)
	if err != nil {
		return store, g, dest, login.Key{}, err
	}
	private, err := privateKey(g, r)
	if err != nil {
		return store, g, dest, login.Key{}, err
	}
	key := login.Key{Private: private, Public: g.Request.GetEnvelope().GetSshPublicKey(), Identity: g.Identity}
	if sealed := r.GetSealedKey(); sealed != nil {
		key.Public, key.Identity = sealed.GetPublicKey(), ""
	}
	if a.Now().After(r.GetValidTo().AsTime()) {
		a.debug("The grant's deadline has passed.")
	}
	return store, g, dest, key, nil
}

// client makes the command that runs one of OpenSSH's clients.
func (a *app) client(name, use, short, long string, arguments func(*login.Session, []string) []string, least int) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, ValidArgsFunction: a.grants,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < least {
				return usage(fmt.Errorf("usage: bridgectl %s", use))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			_, _, dest, key, err := a.access(args[0])
			if err != nil {
				return err
			}
			stdio, err := a.stdio()
			if err != nil {
				return err
			}
			session, err := login.Open(dest, key)
			if err != nil {
				return err
			}
			defer func() {
				if closeErr := session.Close(); closeErr != nil {
					err = errors.Join(err, closeErr)
				}
			}()
			rest := args[1:]
			if len(rest) > 0 && rest[0] == "--" {
				rest = rest[1:]
			}
			line := arguments(session, rest)
			a.debug("Running %s %s", name, strings.Join(line, " "))
			status, err := login.Run(cmd.Context(), name, line, stdio)
			if err != nil {
				return err
			}
			if status != 0 {
				return exitStatusError(status)
			}
			return nil
		},
	}
	// What follows the grant is for the client, flags too.
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// stdio returns the process's own files, which OpenSSH asks whether they are a
// terminal.
func (a *app) stdio() (login.Stdio, error) {
	in, inOK := a.Stdin.(*os.File)
	out, outOK := a.Stdout.(*os.File)
	stderr, errOK := a.Stderr.(*os.File)
	if !inOK || !outOK || !errOK {
		return login.Stdio{}, errors.New("this command needs files for input and output")
	}
	return login.Stdio{In: in, Out: out, Err: stderr}, nil
}

func (a *app) sshCommand() *cobra.Command {
	return a.client("ssh", "ssh GRANT [ssh options] [--] [command …]", "Log in to a grant's instance, or run a command there",
		`Log in with the stock OpenSSH client, which must be in PATH. It believes the host
key of the receipt and no other, and reads neither ~/.ssh/config nor known_hosts.
A login key that was made for the grant never touches a disk.

Options after GRANT are ssh's own: -L 8080:localhost:80, -t, -J jump, ….
The exit status is that of the remote command.`,
		(*login.Session).SSH, 1)
}

func (a *app) scpCommand() *cobra.Command {
	return a.client("scp", "scp GRANT [scp options] SOURCE … TARGET", "Copy files to or from a grant's instance",
		`Copy files with OpenSSH's scp. A path that begins with ":" is on the instance:

  bridgectl scp 1f3a site.tar :/tmp/
  bridgectl scp 1f3a -r :/var/log ./log`,
		(*login.Session).SCP, 3)
}

func (a *app) sftpCommand() *cobra.Command {
	return a.client("sftp", "sftp GRANT [sftp options]", "Open OpenSSH's sftp on a grant's instance",
		"Open OpenSSH's sftp on a grant's instance.", (*login.Session).SFTP, 1)
}

func (a *app) sshConfigCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ssh-config GRANT", Short: "Print a stanza for ssh_config(5), for rsync, editors and the like",
		Long: `Print a stanza for ~/.ssh/config by the name of "grant-" and the id's beginning. Only
for grants that let your own key in: a key that the bridge made is not in any file
for ssh to find.

The host key is written to a file beside the receipt, to which the stanza points.`,
		Args: exactly("GRANT"), ValidArgsFunction: a.grants,
		RunE: func(_ *cobra.Command, args []string) error {
			store, g, dest, key, err := a.access(args[0])
			if err != nil {
				return err
			}
			if !key.Private.IsZero() {
				return fail(ExitOther, "this grant's login key is sealed and must not be in a file; use bridgectl ssh, scp or sftp")
			}
			line, err := dest.KnownHosts()
			if err != nil {
				return err
			}
			knownHosts := store.Path(g.ID, ".known_hosts")
			if err := store.Write(knownHosts, []byte(line+"\n")); err != nil {
				return err
			}
			identity := key.Identity
			if identity == "" {
				// The public key picks the agent's key.
				identity = store.Path(g.ID, ".pub")
				if err := store.Write(identity, []byte(strings.TrimSpace(key.Public)+"\n")); err != nil {
					return err
				}
			}
			_, err = fmt.Fprint(a.Stdout, dest.Config("grant-"+show.ID(g.ID[:]), filepath.Clean(knownHosts), identity))
			return err
		},
	}
}
