package grpcx

import (
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/config"
)

func TestServerConfigNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	files := newAuthority(t).issue(t, leaf{uri: "spiffe://x/a"})
	other := newAuthority(t).issue(t, leaf{uri: "spiffe://x/b"})
	valid := func() ServerConfig {
		return ServerConfig{
			Listen:  []ListenConfig{{Address: "127.0.0.1:0"}, {Address: "unix:/run/x.sock"}, {Address: "[::1]:1", Insecure: true}, {Address: "localhost:1", Insecure: true}},
			TLS:     files,
			Clients: []ClientEntry{{Identity: "a", Role: "client"}, {Identity: "b", Role: "operator", Router: true}},
		}
	}
	if err := valid().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*ServerConfig)
		want   string
	}{
		"no listener":         {func(c *ServerConfig) { c.Listen = nil }, "listen: "},
		"no address":          {func(c *ServerConfig) { c.Listen[0].Address = "" }, "listen[0].address: missing"},
		"no port":             {func(c *ServerConfig) { c.Listen[0].Address = "localhost" }, "listen[0].address: "},
		"insecure to all":     {func(c *ServerConfig) { c.Listen[2].Address = "0.0.0.0:1" }, "listen[2].insecure: "},
		"insecure to :port":   {func(c *ServerConfig) { c.Listen[2].Address = ":1" }, "listen[2].insecure: "},
		"insecure to a name":  {func(c *ServerConfig) { c.Listen[2].Address = "example.com:1" }, "listen[2].insecure: "},
		"insecure unix":       {func(c *ServerConfig) { c.Listen[1].Insecure = true }, "listen[1].insecure: "},
		"no clients":          {func(c *ServerConfig) { c.Clients = nil }, "client: "},
		"no identity":         {func(c *ServerConfig) { c.Clients[0].Identity = "" }, "client[0].identity: missing"},
		"identity twice":      {func(c *ServerConfig) { c.Clients[1].Identity = "a" }, "client[1].identity: "},
		"unknown role":        {func(c *ServerConfig) { c.Clients[1].Role = "root" }, "client[1].role: "},
		"no role":             {func(c *ServerConfig) { c.Clients[0].Role = "" }, "client[0].role: "},
		"no CA":               {func(c *ServerConfig) { c.TLS.CAFile = "" }, "tls.ca_file: missing"},
		"file isn't there":    {func(c *ServerConfig) { c.TLS.KeyFile += "x" }, "tls.key_file: "},
		"key of another":      {func(c *ServerConfig) { c.TLS.KeyFile = other.KeyFile }, "tls.cert_file"},
		"CA that is no cert":  {func(c *ServerConfig) { c.TLS.CAFile = c.TLS.KeyFile }, "tls.ca_file"},
		"age too short":       {func(c *ServerConfig) { c.MaxConnectionAge.Duration = time.Millisecond }, "max_connection_age: "},
		"negative grace":      {func(c *ServerConfig) { c.MaxConnectionAgeGrace.Duration = -1 }, "max_connection_age_grace: "},
		"cert that is no PEM": {func(c *ServerConfig) { c.TLS.CertFile = config.Path(t.TempDir()) }, "tls.cert_file"},
	} {
		c2 := valid()
		c.change(&c2)
		err := c2.Validate()
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want only %q", name, err, c.want)
		}
	}
	// Without a TCP listener with TLS no files are needed.
	c := valid()
	c.Listen, c.TLS = c.Listen[1:], TLSConfig{}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	c = valid()
	c.TLS = TLSConfig{}
	if err := c.Validate(); err == nil || strings.Count(err.Error(), "missing") != 3 {
		t.Errorf("without files: %v", err)
	}
	if err := (ServerConfig{}).Validate(); strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("not everything is reported: %v", err)
	}
}

func TestClientConfigNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	for target, c := range map[string]struct {
		insecure bool
		want     string
	}{
		"dns:///router:1":        {false, ""},
		"127.0.0.1:1":            {true, ""},
		"dns:///localhost:1":     {true, ""},
		"passthrough:///[::1]:1": {true, ""},
		"unix:/x":                {true, ""},
		"":                       {false, "router.target: missing"},
		"dns:///example.com:1":   {true, "router.insecure: "},
		"192.0.2.1:1":            {true, "router.insecure: "},
		"localhost":              {true, "router.target: "},
	} {
		err := ClientConfig{Target: target, Insecure: c.insecure}.Validate("router")
		if (err == nil) != (c.want == "") || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%q: %v, want %q", target, err, c.want)
		}
	}
}
