package hostbackend

import (
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

func TestGrantRunsAndLeavesNothing(t *testing.T) {
	t.Parallel()
	h := lab.NewHost(t, lab.HostOptions{})
	s := newSite(t, nil, h)
	key := newLogin(t)
	g, e := grant(s.image(ociimage.Shell), key)
	began := time.Now()
	p, err := s.runtime.Provision(caller(t.Context()), g, e)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("cold: %s", time.Since(began))
	out, err := run(t, p, key, "id; echo hello; df -h /; hostname")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Log(out)
	if !strings.Contains(out, "hello") {
		t.Errorf("output %q", out)
	}
	g2, e2 := grant(g.Image, key)
	began = time.Now()
	p2, err := s.runtime.Provision(caller(t.Context()), g2, e2)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("warm: %s", time.Since(began))
	for _, x := range []backend.Provisioned{p, p2} {
		began = time.Now()
		end, err := s.runtime.Terminate(caller(t.Context()), x.Instance.Handle)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("terminate: %s %+v", time.Since(began), end.Log.Log)
		if end.State != backend.StateTerminated || end.Log.Log.Usage.CPU == nil {
			t.Errorf("%+v", end)
		}
	}
	left, err := h.Leftovers(t.Context(), "image ")
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
