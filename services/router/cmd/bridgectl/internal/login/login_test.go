package login_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/receipt"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/login"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func key(t *testing.T) sshkey.KeyPair {
	t.Helper()
	pair, err := sshkey.GenerateLoginKey()
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

func TestReceiptsThatMeanMoreThanADestinationAreRefused(t *testing.T) {
	t.Parallel()
	hostKey := key(t).Public.String()
	good := func() *bridgev1.Receipt {
		return &bridgev1.Receipt{InstanceHost: "198.51.100.7", InstancePort: 22, User: "compute", HostKey: hostKey}
	}
	for name, change := range map[string]func(*bridgev1.Receipt){
		"option as host":   func(r *bridgev1.Receipt) { r.InstanceHost = "-oProxyCommand=id" },
		"pattern":          func(r *bridgev1.Receipt) { r.InstanceHost = "*" },
		"list":             func(r *bridgev1.Receipt) { r.InstanceHost = "a,b" },
		"token":            func(r *bridgev1.Receipt) { r.InstanceHost = "%d" },
		"brackets":         func(r *bridgev1.Receipt) { r.InstanceHost = "[::1]" },
		"space":            func(r *bridgev1.Receipt) { r.InstanceHost = "a b" },
		"line":             func(r *bridgev1.Receipt) { r.InstanceHost = "a\nHost *" },
		"no host":          func(r *bridgev1.Receipt) { r.InstanceHost = "" },
		"no port":          func(r *bridgev1.Receipt) { r.InstancePort = 0 },
		"port":             func(r *bridgev1.Receipt) { r.InstancePort = 65536 },
		"option as user":   func(r *bridgev1.Receipt) { r.User = "-oProxyCommand=id" },
		"user with host":   func(r *bridgev1.Receipt) { r.User = "a@b" },
		"user with shell":  func(r *bridgev1.Receipt) { r.User = "a$(id)" },
		"no user":          func(r *bridgev1.Receipt) { r.User = "" },
		"no host key":      func(r *bridgev1.Receipt) { r.HostKey = "" },
		"two host keys":    func(r *bridgev1.Receipt) { r.HostKey += "\n" + hostKey },
		"host key options": func(r *bridgev1.Receipt) { r.HostKey = "@cert-authority * " + hostKey },
	} {
		r := good()
		change(r)
		if d, err := login.FromReceipt(r); err == nil {
			t.Errorf("%s: %+v", name, d)
		}
	}
	for _, host := range []string{"198.51.100.7", "2001:db8::1", "host.example"} {
		r := good()
		r.InstanceHost = host
		if _, err := login.FromReceipt(r); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
}

func TestAgentHoldsOneKeyAndTakesNoOther(t *testing.T) {
	t.Parallel()
	pair := key(t)
	dest := login.Destination{Host: "2001:db8::1", Port: 40000, User: "compute", HostKey: key(t).Public}
	s, err := login.Open(dest, login.Key{Private: pair.Private, Public: pair.Public.String()})
	if err != nil {
		t.Fatal(err)
	}
	args := strings.Join(s.SSH([]string{"uname"}), " ")
	for _, want := range []string{"-F none", "StrictHostKeyChecking=yes", "GlobalKnownHostsFile=none", "HostKeyAlgorithms=ssh-ed25519", "IdentitiesOnly=yes", "2001:db8::1 uname"} {
		if !strings.Contains(args, want) {
			t.Errorf("%q is missing in %s", want, args)
		}
	}
	if scp := strings.Join(s.SCP([]string{"-r", ":/a", "b"}), " "); !strings.HasSuffix(scp, "-r [2001:db8::1]:/a b") {
		t.Error(scp)
	}
	_, rest, _ := strings.Cut(args, `IdentityAgent="`)
	path, _, _ := strings.Cut(rest, `"`)
	dir := filepath.Dir(path)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	client := agent.NewClient(conn)
	keys, err := client.List()
	if err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	signature, err := client.Sign(keys[0], []byte("data"))
	if err != nil {
		t.Fatal(err)
	}
	if err := pair.Public.SSH().Verify([]byte("data"), signature); err != nil {
		t.Error(err)
	}
	other, err := ssh.ParseRawPrivateKey(key(t).Private.Expose())
	if err != nil {
		t.Fatal(err)
	}
	if client.Add(agent.AddedKey{PrivateKey: other}) == nil || client.RemoveAll() == nil || client.Lock([]byte("x")) == nil {
		t.Error("the agent can be changed")
	}
	// An open connection does not hold the end up.
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	_ = conn.Close()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestKeysThatDontBelongTogetherAreRefused(t *testing.T) {
	t.Parallel()
	dest := login.Destination{Host: "h", Port: 22, User: "u", HostKey: key(t).Public}
	if s, err := login.Open(dest, login.Key{Private: key(t).Private, Public: key(t).Public.String()}); err == nil {
		t.Error("a session with two halves of different keys", s.Close())
	}
}

func TestSealedKeyOpensForItsGrantOnly(t *testing.T) {
	t.Parallel()
	private, public, err := receipt.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	pair := key(t)
	id := backend.GrantID{1}
	sealed, err := receipt.Seal(public, id, pair.Private)
	if err != nil {
		t.Fatal(err)
	}
	got, err := login.Unseal(private, id, &bridgev1.SealedKey{Sealed: sealed})
	if err != nil || !got.Equal(pair.Private) {
		t.Error(err)
	}
	if _, err := login.Unseal(private, backend.GrantID{2}, &bridgev1.SealedKey{Sealed: sealed}); !errors.Is(err, receipt.ErrOpen) {
		t.Error(err)
	}
}
