package backend

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const someHex = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

func FuzzParseGrantIDReadsWhatStringWrites(f *testing.F) {
	for _, s := range []string{someHex, strings.ToUpper(someHex), someHex[1:], someHex + "0", "", strings.Repeat("g", 64), strings.Repeat("é", 32), " " + someHex[1:]} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseGrantID(s)
		if err != nil {
			if id != (GrantID{}) {
				t.Errorf("%q: an error and an id", s)
			}
			return
		}
		if id.String() != strings.ToLower(s) {
			t.Errorf("%q came back as %s", s, id)
		}
		if again, err := ParseGrantID(id.String()); err != nil || again != id {
			t.Errorf("%s isn't read as itself: %v", id, err)
		}
	})
}

func FuzzParseDigestReadsWhatStringWrites(f *testing.F) {
	for _, s := range []string{
		"sha256:" + someHex, "blake3:" + strings.ToUpper(someHex), someHex, "sha512:" + someHex, "sha256:", "sha256", ":" + someHex,
		"sha256:" + someHex[2:], "SHA256:" + someHex, "sha256:sha256:" + someHex, "digest(0):" + someHex,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDigest(s)
		if err != nil {
			if d != (Digest{}) {
				t.Errorf("%q: an error and a digest", s)
			}
			return
		}
		if d.String() != strings.ToLower(s) {
			t.Errorf("%q came back as %s", s, d)
		}
		if again, err := ParseDigest(d.String()); err != nil || again != d {
			t.Errorf("%s isn't read as itself: %v", d, err)
		}
	})
}

func TestParseDigestRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ in, want string }{
		"no algorithm":      {someHex, "no algorithm"},
		"unknown algorithm": {"md5:" + someHex, `unknown algorithm "md5"`},
		"too short":         {"sha256:" + someHex[2:], "62 hex digits"},
		"not hex":           {"sha256:" + strings.Repeat("x", 64), "invalid byte"},
	} {
		if _, err := ParseDigest(c.in); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestHandleCarriesThePathThroughRouters(t *testing.T) {
	t.Parallel()
	id := GrantID{1, 2, 3}
	h := HandleFor(id)
	if _, _, routed := h.Split(); routed {
		t.Errorf("a worker's handle %s has a path", h)
	}
	h = h.Via("metal").Via("site")
	if want := Handle("site/metal/" + id.String()); h != want {
		t.Fatalf("handle is %s, want %s", h, want)
	}
	if got, err := h.GrantID(); err != nil || got != id {
		t.Errorf("%s names %s, %v", h, got, err)
	}
	name, rest, ok := h.Split()
	if !ok || name != "site" {
		t.Errorf("first hop is %q, %t", name, ok)
	}
	name, rest, ok = rest.Split()
	if !ok || name != "metal" || rest != HandleFor(id) {
		t.Errorf("second hop is %q with %s left, %t", name, rest, ok)
	}
	for _, bad := range []Handle{"", "/", "site/", "site/metal", Handle(id.String()) + "/", "x" + Handle(id.String())} {
		if _, err := bad.GrantID(); err == nil {
			t.Errorf("handle %q names a grant", bad)
		}
	}
}

func FuzzHandle(f *testing.F) {
	f.Add("a/"+someHex, "b")
	f.Add("", "")
	f.Add("//", "x")
	f.Fuzz(func(t *testing.T, s, name string) {
		h := Handle(s)
		id, err := h.GrantID()
		if err == nil && id.String() != strings.ToLower(s[len(s)-64:]) {
			t.Errorf("%q names %s", s, id)
		}
		if strings.Contains(name, "/") {
			return
		}
		got, rest, ok := h.Via(name).Split()
		if !ok || got != name || rest != h {
			t.Errorf("%q via %q splits into %q and %q", s, name, got, rest)
		}
		if through, viaErr := h.Via(name).GrantID(); through != id || (viaErr == nil) != (err == nil) {
			t.Errorf("%q names another grant via %q", s, name)
		}
	})
}

func TestRegionHintCountsOnlyWithoutARegion(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ own, hint, want Region }{
		{"", "", ""}, {"", "west", "west"}, {"east", "west", "east"}, {"east", "", "east"},
	} {
		g := Grant{Region: c.own}
		if got := g.WithRegionHint(c.hint).Region; got != c.want {
			t.Errorf("region %q with hint %q is %q, want %q", c.own, c.hint, got, c.want)
		}
		if diff := cmp.Diff(Grant{Region: c.own}, g); diff != "" {
			t.Errorf("the grant itself changed:\n%s", diff)
		}
	}
}

// An unknown number of every enumeration prints as its number, not as another
// value and not as a panic.
func TestNamesOfEnumerations(t *testing.T) {
	t.Parallel()
	for want, got := range map[string]string{
		"container": IsolationContainer.String(), "vm": IsolationVM.String(), "tdx": IsolationTDX.String(), "isolation(9)": Isolation(9).String(),
		"sha256": SHA256.String(), "blake3": BLAKE3.String(), "digest(-1)": DigestAlgorithm(-1).String(),
		"OCI archive": ImageOCIArchive.String(), "OCI reference": ImageOCIReference.String(), "disk image": ImageDisk.String(),
		"TD bundle": ImageTDBundle.String(), "image kind 0": ImageKind(0).String(),
		"53/udp": Port{Number: 53, Protocol: UDP}.String(), "80/tcp": Port{Number: 80, Protocol: TCP}.String(), "protocol(7)": Protocol(7).String(),
		"open": NetworkOpen.String(), "allowlist": NetworkAllowlist.String(), "network mode 0": NetworkMode(0).String(),
		"PENDING": StatePending.String(), "FAILED": StateFailed.String(), "STATE(0)": State(0).String(), "STATE(99)": State(99).String(), "STATE(-1)": State(-1).String(),
		"WORKLOAD_EXITED": EndWorkloadExited.String(), "PROVISION_FAILED": EndProvisionFailed.String(), "": EndReason(0).String(),
		"END_REASON(99)": EndReason(99).String(), "END_REASON(-3)": EndReason(-3).String(),
		"janitor": EnforcedByJanitor.String(), "guest": EnforcedByGuest.String(), "platform": EnforcedByPlatform.String(), "enforcement(0)": DeadlineEnforcement(0).String(),
		"allocated": UsageAllocated.String(), "host": UsageHostMeasured.String(), "hypervisor": UsageHypervisorMeasured.String(),
		"monitoring": UsageProviderMonitoring.String(), "source(0)": UsageSource(0).String(),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
