package instance

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	gossh "golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
	"github.com/compute-bridge/compute-bridge/services/guest/internal/account"
)

// patience bounds every wait; nothing waits that long unless it fails.
const patience = 3 * time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// syncBuffer is a bytes.Buffer for concurrent use.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func newKey(t *testing.T) (ed25519.PrivateKey, gossh.PublicKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sshPublic, err := gossh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return private, sshPublic
}

// TestKeysThatCannotBeUsedAreRefused covers what guestapi can't see in a key's form.
func TestKeysThatCannotBeUsedAreRefused(t *testing.T) {
	private, public := newKey(t)
	plain, err := gossh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	encrypted := &pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte("x"), Headers: map[string]string{
		"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-128-CBC,00000000000000000000000000000000",
	}}
	signer, err := gossh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	certificate := &gossh.Certificate{Key: public, CertType: gossh.UserCert, ValidBefore: gossh.CertTimeInfinity}
	if err := certificate.SignCert(rand.Reader, signer); err != nil {
		t.Fatal(err)
	}
	good := string(gossh.MarshalAuthorizedKey(public))
	for want, tc := range map[string]struct {
		block *pem.Block
		keys  []string
	}{
		"":                                  {plain, []string{good, good}},
		"host_key_pem: is encrypted":        {encrypted, []string{good}},
		"host_key_pem: is not a private":    {&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}, []string{good}},
		"authorized_keys: key 1: certifica": {plain, []string{good, string(gossh.MarshalAuthorizedKey(certificate))}},
		"authorized_keys: key 0: ssh: no k": {plain, []string{"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5"}},
	} {
		hostKey, keys, err := parseKeys(guestapi.Config{
			HostKey: guestapi.NewHostKey(string(pem.EncodeToMemory(tc.block))), AuthorizedKeys: tc.keys,
		})
		if want == "" {
			if err != nil || hostKey == nil || len(keys) != 2 {
				t.Errorf("good keys: %v", err)
			}
			continue
		}
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// start runs an instance in this process, in a root file system where all users have this process's uid.
func start(t *testing.T, command ...string) (signals chan os.Signal, ended chan int, log *syncBuffer, dial func() *gossh.Client) {
	t.Helper()
	private, public := newKey(t)
	block, err := gossh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	passwd := fmt.Sprintf("compute:x:%d:%d::/:/bin/sh\n", os.Geteuid(), os.Getegid())
	if err := os.WriteFile(filepath.Join(root, "etc/passwd"), []byte(passwd), 0o644); err != nil {
		t.Fatal(err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address, ok := free.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("a TCP listener at %T", free.Addr())
	}
	_ = free.Close()
	signals, ended, log = make(chan os.Signal, 1), make(chan int, 1), &syncBuffer{}
	go func() {
		ended <- Run(t.Context(), Params{
			Config: guestapi.Config{
				Version: guestapi.ConfigVersion, HostKey: guestapi.NewHostKey(string(pem.EncodeToMemory(block))),
				AuthorizedKeys: []string{string(gossh.MarshalAuthorizedKey(public))}, User: "compute",
				ListenPort: address.AddrPort().Port(), Command: command, StopGraceSeconds: 1,
			},
			Environ:     []string{"PATH=/usr/bin:/bin"},
			Signals:     signals,
			Accounts:    account.Open(root),
			SFTPCommand: []string{"/no/sftp/here"},
			Logger:      slog.New(slog.NewTextHandler(log, nil)),
		})
	}()
	return signals, ended, log, func() *gossh.Client {
		// A dial to a port that nothing listens on yet can, on loopback, connect to itself.
		eventually(t, "SSH is open", func() bool { return strings.Contains(log.String(), "SSH is open") })
		client, err := gossh.Dial("tcp", address.String(), &gossh.ClientConfig{
			User: "compute", Auth: []gossh.AuthMethod{gossh.PublicKeys(signer)},
			HostKeyCallback: gossh.FixedHostKey(public), Timeout: patience,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = client.Close() })
		return client
	}
}

// eventually polls until ok, which is the only way to see another process's doing.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("did not happen: %s", what)
		}
	}
}

func exitCode(t *testing.T, ended chan int) int {
	t.Helper()
	select {
	case code := <-ended:
		return code
	case <-time.After(patience):
		t.Fatal("the instance did not end")
		return 0
	}
}

func TestInstanceEndsWithItsWorkload(t *testing.T) {
	_, ended, log, _ := start(t, "sh", "-c", "exit 7")
	if code := exitCode(t, ended); code != 7 {
		t.Errorf("exit code %d: %s", code, log)
	}
	_, ended, log, _ = start(t, "/no/such/workload")
	if code := exitCode(t, ended); code != guestapi.ExitNotFound || strings.Contains(log.String(), "SSH is open") {
		t.Errorf("exit code %d: %s", code, log)
	}
}

func TestStoppingEndsSessionsToo(t *testing.T) {
	trapped := filepath.Join(t.TempDir(), "trapped")
	for name, tc := range map[string]struct {
		command []string
		want    int
	}{
		"obeys":      {[]string{"sh", "-c", "echo > " + trapped + "; exec sleep 1000"}, 143},
		"ignores":    {[]string{"sh", "-c", "trap '' TERM; echo > " + trapped + "; while :; do sleep 0.01; done"}, 137},
		"no command": {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			_ = os.Remove(trapped)
			signals, ended, log, dial := start(t, tc.command...)
			client := dial()
			if tc.command != nil {
				eventually(t, "the workload runs", func() bool {
					_, err := os.Stat(trapped)
					return err == nil
				})
			} else {
				signals <- syscall.SIGHUP // no reason to end
			}
			signals <- syscall.SIGTERM
			if code := exitCode(t, ended); code != tc.want {
				t.Errorf("exit code %d, want %d: %s", code, tc.want, log)
			}
			closed := make(chan struct{})
			go func() {
				_ = client.Wait()
				close(closed)
			}()
			select {
			case <-closed:
			case <-time.After(patience):
				t.Error("the connection is still open")
			}
		})
	}
}
