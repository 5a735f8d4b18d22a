package hostbackend

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func TestGrantIsProvisionedOnce(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)

	var wg sync.WaitGroup
	answers := make([]backend.Provisioned, 20)
	errs := make([]error, len(answers))
	for i := range answers {
		wg.Go(func() { answers[i], errs[i] = s.runtime.Provision(caller(t.Context()), g, e) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	for _, a := range append([]backend.Provisioned{s.provision(t, g, e)}, answers...) {
		if a.Instance.ID != answers[0].Instance.ID || a.Receipt.HostKey != answers[0].Receipt.HostKey || a.Receipt.Port != answers[0].Receipt.Port {
			t.Fatalf("two answers for one grant:\n%+v\n%+v", answers[0], a)
		}
	}
	if n := containers(t, h); n != 1 {
		t.Errorf("%d containers", n)
	}
	other := g
	other.Shape.CPU++
	_, err := s.runtime.Provision(caller(t.Context()), other, e)
	refused(t, err, backenderr.GrantConflict)

	s.terminate(t, answers[0])
	_, err = s.runtime.Provision(caller(t.Context()), g, e)
	refused(t, err, backenderr.GrantEnded)
	// Once more is no error.
	s.terminate(t, answers[0])
}

// containers counts the containers of all grants on a host by their monitors.
func containers(t *testing.T, h *lab.Host) int {
	t.Helper()
	out, err := h.Exec(t.Context(), "sh", "-c", "ls -d /proc/[0-9]*/ | while read p; do tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^/usr/bin/conmon ' && echo one; done; true")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(out, "one")
}

func TestParallelGrantsNeverExceedTheHost(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	const room = 3
	s := newSite(t, func(c *Config) { c.Hosts[0].CPUMillicores = room * 500 }, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var ran []backend.Provisioned
	for range 2 * room {
		g, e := grant(image, key)
		wg.Go(func() {
			p, err := s.runtime.Provision(caller(t.Context()), g, e)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				ran = append(ran, p)
				return
			}
			if !backenderr.Is(err, backenderr.CapacityExhausted) || backenderr.CreatedOf(err) != backenderr.CreatedNone {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
	if len(ran) != room || containers(t, h) != room {
		t.Errorf("%d run and there are %d containers; there is room for %d", len(ran), containers(t, h), room)
	}
	// Each end frees its own place and no other.
	for i, p := range ran {
		s.terminate(t, p)
		c, err := s.runtime.Capabilities(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if want := backend.Millicores(500 * (i + 1)); c.Regions[0].Free.CPU != want {
			t.Errorf("%d free after %d ends, want %d", c.Regions[0].Free.CPU, i+1, want)
		}
	}
}

func TestGrantsThatDoNotFitAreRefused(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, func(c *Config) { c.Hosts[0].Ports, c.Hosts[0].MaxInstances = "40000-40002", 2 }, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	first, e := grant(image, key)
	first.Ports = []backend.Port{{Number: 80, Protocol: backend.TCP}}
	held := s.provision(t, first, e)
	defer s.terminate(t, held)

	for _, tt := range []struct {
		name   string
		change func(*backend.Grant, *backend.Envelope)
		want   backenderr.Reason
		text   string
	}{
		{"no ports now", func(g *backend.Grant, _ *backend.Envelope) { g.Ports = first.Ports }, backenderr.CapacityExhausted, h.Name},
		{"no ports ever", func(g *backend.Grant, _ *backend.Envelope) {
			for n := range uint16(3) {
				g.Ports = append(g.Ports, backend.Port{Number: n + 1, Protocol: backend.UDP})
			}
		}, backenderr.GrantNotSatisfiable, "3 ports"},
		{"no room now", func(g *backend.Grant, _ *backend.Envelope) { g.Shape.CPU = 4000 }, backenderr.CapacityExhausted, h.Name},
		{"no room ever", func(g *backend.Grant, _ *backend.Envelope) { g.Shape.RAM = 1 << 20 }, backenderr.GrantNotSatisfiable, "no single host"},
		{"no such region", func(g *backend.Grant, _ *backend.Envelope) { g.Region = "mars" }, backenderr.GrantNotSatisfiable, `no host in region "mars"; there are lab`},
		{"no such region, hinted", func(_ *backend.Grant, e *backend.Envelope) { e.RegionHint = "mars" }, backenderr.GrantNotSatisfiable, "mars"},
		{"no virtual machines", func(g *backend.Grant, _ *backend.Envelope) { g.MinIsolation = backend.IsolationVM }, backenderr.GrantNotSatisfiable, "isolation vm"},
		{"no TDX", func(g *backend.Grant, _ *backend.Envelope) { g.MinIsolation = backend.IsolationTDX }, backenderr.GrantNotSatisfiable, "isolation tdx"},
		{"disk image", func(g *backend.Grant, _ *backend.Envelope) { g.Image.Kind = backend.ImageDisk }, backenderr.GrantNotSatisfiable, "disk image"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, e := grant(image, key)
			tt.change(&g, &e)
			_, err := s.runtime.Provision(caller(t.Context()), g, e)
			refused(t, err, tt.want, tt.text)
		})
	}
}

// Nothing that a grant says becomes anything but itself.
func TestStringsStayStrings(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	image := s.image(ociimage.Shell)
	g, e := grant(image, key)
	g.Environment = map[string]string{
		"A": "%i %n %H %%", "B": "$HOME ${HOME}", "C": "$(touch /tmp/pwned)", "D": "`touch /tmp/pwned`; touch /tmp/pwned", "E": `'"\`,
		"F": "é ☃ 𝄞", "G": " leading and trailing ", "H": "--privileged", "I": "* ? [a]", "J": "a\tb", "K": "", "L": "!@#&|<>(){}",
	}
	p := s.provision(t, g, e)
	defer s.terminate(t, p)
	for name, want := range g.Environment {
		if got, err := run(t, p, key, "printf %s \"$"+name+"\""); err != nil || got != want {
			t.Errorf("%s is %q in a session, want %q (%v)", name, got, want, err)
		}
	}
	if out, err := run(t, p, key, "tr '\\0' '\\n' </proc/$(pgrep -x sh | head -n 1)/environ; ls /tmp"); err != nil || strings.Contains(out, "pwned\n") {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := h.Exec(t.Context(), "test", "!", "-e", "/tmp/pwned"); err != nil {
		t.Error("a string was run on the host")
	}

	for _, tt := range []struct {
		field  string
		change func(*backend.Grant, *backend.Envelope)
	}{
		{`grant.environment["X"]`, func(g *backend.Grant, _ *backend.Envelope) { g.Environment = map[string]string{"X": "a\nb"} }},
		{`grant.environment["X"]`, func(g *backend.Grant, _ *backend.Envelope) { g.Environment = map[string]string{"X": "a\x00b"} }},
		{`grant.environment["A=B"]`, func(g *backend.Grant, _ *backend.Envelope) { g.Environment = map[string]string{"A=B": "x"} }},
		{`grant.environment["$(reboot)"]`, func(g *backend.Grant, _ *backend.Envelope) { g.Environment = map[string]string{"$(reboot)": "x"} }},
		{"grant.region", func(g *backend.Grant, _ *backend.Envelope) { g.Region = "$(reboot)" }},
		{"grant.region", func(g *backend.Grant, _ *backend.Envelope) { g.Region = "%i" }},
		{"envelope.region_hint", func(_ *backend.Grant, e *backend.Envelope) { e.RegionHint = "../lab" }},
		{"grant.network_policy.allowed_prefixes[0]", func(g *backend.Grant, _ *backend.Envelope) {
			g.Network = backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"10.0.0.0/8 }; flush ruleset; #"}}
		}},
		{"grant.network_policy.allowed_prefixes[0]", func(g *backend.Grant, _ *backend.Envelope) {
			g.Network = backend.NetworkPolicy{Mode: backend.NetworkAllowlist, AllowedPrefixes: []string{"fe80::%eth0/64"}}
		}},
		{"envelope.ssh_public_key", func(_ *backend.Grant, e *backend.Envelope) { e.SSHPublicKey = `command="reboot" ` + e.SSHPublicKey }},
		{"envelope.ssh_public_key", func(_ *backend.Grant, e *backend.Envelope) { e.SSHPublicKey += "\n" + e.SSHPublicKey }},
		// Only an image that isn't cached is looked for by its pointer.
		{"envelope.image_pointer", func(g *backend.Grant, e *backend.Envelope) {
			g.Image.Digest.Sum[0]++
			e.ImagePointer = "../../etc/passwd"
		}},
		{"envelope.image_pointer", func(g *backend.Grant, e *backend.Envelope) { g.Image.Digest.Sum[0]++; e.ImagePointer = "/etc/passwd" }},
		{"envelope.image_pointer", func(g *backend.Grant, e *backend.Envelope) {
			g.Image.Digest.Sum[0]++
			e.ImagePointer = "http://192.0.2.1/x"
		}},
	} {
		g, e := grant(image, key)
		tt.change(&g, &e)
		_, err := s.runtime.Provision(caller(t.Context()), g, e)
		refused(t, err, backenderr.GrantInvalid)
		var own *backenderr.Error
		named := func(v backenderr.Violation) bool { return strings.HasPrefix(v.Field, tt.field) }
		if !errors.As(err, &own) || !slices.ContainsFunc(own.Violations, named) {
			t.Errorf("%s: got %+v", tt.field, err)
		}
	}
}

// stage cancels a Provision when its progress says a text.
func stage(t *testing.T, s *site, id backend.GrantID, text string, then func()) {
	t.Helper()
	go func() {
		tick := time.NewTicker(time.Millisecond) // as often as it may change
		defer tick.Stop()
		for t.Context().Err() == nil {
			for _, i := range s.runtime.Instances(caller(context.WithoutCancel(t.Context()))) {
				if i.GrantID == id && strings.Contains(i.Progress, text) {
					then()
					return
				}
			}
			select {
			case <-tick.C:
			case <-t.Context().Done():
			}
		}
	}()
}

func TestUnknownGrantIsTerminatedOnlyIfAllHostsWereSeen(t *testing.T) {
	t.Parallel()
	one, two := lab.NewHost(t, lab.HostOptions{}), lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, one, two)
	var id backend.GrantID
	id[0] = 1
	end, err := s.runtime.Terminate(caller(t.Context()), backend.HandleFor(id))
	if err != nil || end.State != backend.StateTerminated || end.Log != nil {
		t.Errorf("got %+v, %v", end, err)
	}
	if err := two.CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	id[0] = 2
	end, err = s.runtime.Terminate(caller(ctx), backend.HandleFor(id))
	if end.State == backend.StateTerminated || (err != nil && !backenderr.Is(err, backenderr.ProviderUnavailable)) {
		t.Errorf("with a host cut off: got %+v, %v", end, err)
	}
	if err := two.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	soon(t, func() error {
		end, err := s.runtime.Terminate(caller(t.Context()), backend.HandleFor(id))
		if err == nil && end.State != backend.StateTerminated {
			err = fmt.Errorf("state %s", end.State)
		}
		return err
	})
}
