package hostbackend

import (
	"context"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// runsAGrant proves that a site works.
func runsAGrant(t *testing.T, s *site) {
	t.Helper()
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	p := s.provision(t, g, e)
	if _, err := run(t, p, key, "true"); err != nil {
		t.Error(err)
	}
	s.terminate(t, p)
}

func TestBootNamesWhatIsWrongWithAHost(t *testing.T) {
	t.Parallel()
	good := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, good)
	s.stop()
	valid := s.config
	t.Run("wrong host key", func(t *testing.T) {
		other := newLogin(t)
		s.config.Hosts = append([]HostConfig(nil), valid.Hosts...)
		s.config.Hosts[0].HostKeys = []string{other.line}
		err := s.tryStart()
		if err == nil {
			t.Fatal("started")
		}
		for _, want := range []string{good.Name, ssh.FingerprintSHA256(other.signer.PublicKey()), ssh.FingerprintSHA256(good.HostKey)} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("error doesn't name %s: %v", want, err)
			}
		}
	})
	t.Run("clock skew", func(t *testing.T) {
		s.config = valid
		if err := good.SetClockSkew(t.Context(), 90*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := s.tryStart(); !backenderr.Is(err, backenderr.ClockSkew) || !strings.Contains(err.Error(), "1m30s") {
			t.Errorf("got %v", err)
		}
		if err := good.SetClockSkew(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("no podman", func(t *testing.T) {
		bare := lab.NewHost(t, lab.HostOptions{NoPodman: true})
		s.config = valid
		s.config.Hosts = append([]HostConfig(nil), valid.Hosts...)
		s.config.Hosts[0].Address = bare.Addr.String() + ":22"
		s.config.Hosts[0].HostKeys = []string{bare.HostKeyLine()}
		if err := s.tryStart(); !backenderr.Is(err, backenderr.HostUnfit) || !strings.Contains(err.Error(), "/usr/bin/podman (package podman)") {
			t.Errorf("got %v", err)
		}
	})
	s.config = valid
	s.start()
	runsAGrant(t, s)
}

func TestUnreachableHostAtBoot(t *testing.T) {
	t.Parallel()
	good, gone := lab.NewHost(t, lab.HostOptions{}), lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, good, gone)
	s.stop()
	if err := gone.CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.config.ConnectTimeout.Duration = 2 * time.Second
	if err := s.tryStart(); err == nil || !strings.Contains(err.Error(), gone.Name) {
		t.Fatalf("without lenient_boot: %v", err)
	}
	s.config.LenientBoot = true
	s.start()
	soon(t, func() error { _, err := s.driver.byName[good.Name].usable(); return err })
	c, err := s.runtime.Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r := c.Regions[0]; len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], gone.Name) || r.Free.CPU != 4000 || r.Total.CPU != 8000 {
		t.Errorf("capabilities %+v", c)
	}
	// What may be on a host that can't be seen isn't said to be gone.
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	end, err := s.runtime.Terminate(caller(ctx), backend.HandleFor(backend.GrantID{1}))
	if end.State == backend.StateTerminated || (err != nil && !backenderr.Is(err, backenderr.ProviderUnavailable)) {
		t.Errorf("terminate of an unknown grant: %+v, %v", end, err)
	}
	runsAGrant(t, s)
	if err := gone.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	soon(t, func() error { _, err := s.driver.byName[gone.Name].ready(); return err })
}

func TestHostsWithStrictSSHServers(t *testing.T) {
	t.Parallel()
	for _, line := range []string{"AllowStreamLocalForwarding no", "AllowTcpForwarding no", "MaxSessions 4"} {
		t.Run(line, func(t *testing.T) {
			runsAGrant(t, newSite(t, nil, lab.NewHost(t, lab.HostOptions{SSHDConfig: []string{line}})))
		})
	}
}

func TestSweepTakesOnlyItsOwn(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	p := s.provision(t, g, e)
	saved, err := h.Exec(t.Context(), "cat", s.driver.dirs.grant(g.ID)+"/"+recordFile)
	if err != nil {
		t.Fatal(err)
	}
	s.terminate(t, p)

	// The same directory and a unit again, as if the end had been undone; and
	// once more for another bridge.
	put := func(bridge string) (dir, unit string) {
		t.Helper()
		dir = stateDir + "/" + bridge + "/grants/" + g.ID.String()
		unit = names{bridge: bridge, grant: g.ID, attempt: 1}.unit()
		if err := h.Run(t.Context(), strings.NewReader(saved), nil, nil, "sh", "-c", `mkdir -p "$1" && cat >"$1/grant.json"`, "sh", dir); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Exec(t.Context(), "systemd-run", "--quiet", "--collect", "--unit="+unit, "sleep", "600"); err != nil {
			t.Fatal(err)
		}
		return dir, unit
	}
	dir, unit := put("test")
	otherDir, otherUnit := put("test-2")
	swept, err := s.runtime.Sweep(t.Context(), true)
	if err != nil || len(swept) != 1 || swept[0].Deleted || swept[0].Resource.GrantID != g.ID {
		t.Errorf("dry run: %+v, %v", swept, err)
	}
	is := func(dir, unit string) (bool, bool) {
		_, errDir := h.Exec(t.Context(), "test", "-e", dir)
		_, errUnit := h.Exec(t.Context(), "systemctl", "is-active", "--quiet", unit)
		return errDir == nil, errUnit == nil
	}
	soon(t, func() error {
		if d, u := is(dir, unit); d || u {
			return backenderr.New(backenderr.Unknown, "directory %t, unit %t", d, u)
		}
		return nil
	})
	if d, u := is(otherDir, otherUnit); !d || !u {
		t.Errorf("of the other bridge: directory %t, unit %t", d, u)
	}
	if _, err := h.Exec(t.Context(), "sh", "-c", `systemctl stop "$1" && rm -r "$2"`, "sh", otherUnit, stateDir+"/test-2"); err != nil {
		t.Fatal(err)
	}
}
