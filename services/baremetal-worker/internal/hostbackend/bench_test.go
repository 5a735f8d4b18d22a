package hostbackend

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
	"github.com/compute-bridge/compute-bridge/test/lab"
	"github.com/compute-bridge/compute-bridge/test/lab/ociimage"
)

// BenchmarkGrantBesidePodman measures a grant, from Provision until SSH answers
// in the container, and beside it what an operator would type: `podman run -d`
// of the same image over the same connection. They take turns, so that whatever
// else the machine does falls on both. The metric that counts is the ratio.
func BenchmarkGrantBesidePodman(b *testing.B) {
	h := lab.NewHost(b, lab.HostOptions{})
	s := newSite(b, nil, h)
	key := newLogin(b)
	image := s.image(ociimage.Shell)
	warm, e := grant(image, key)
	s.terminate(b, s.provision(b, warm, e))
	found, err := s.driver.hosts[0].ready()
	if err != nil {
		b.Fatal(err)
	}
	unpacked, err := s.driver.hosts[0].images.unpacked(b.Context(), found, image.Digest.String())
	if err != nil {
		b.Fatal(err)
	}
	store := "--storage-opt=additionalimagestore=" + found.imageStore
	command := func(args ...string) {
		b.Helper()
		ctx, cancel := context.WithTimeout(b.Context(), callTimeout)
		defer cancel()
		result, err := s.driver.hosts[0].conn.Run(ctx, sshconn.Command{Args: args})
		if err == nil {
			err = result.Err(strings.Join(args, " "))
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	var ours, byHand time.Duration
	n := 0
	for b.Loop() {
		n++
		g, e := grant(image, key)
		began := time.Now()
		p := s.provision(b, g, e)
		ours += time.Since(began)
		conn, err := net.Dial("tcp", net.JoinHostPort(p.Receipt.Host, fmt.Sprint(p.Receipt.Port)))
		if err != nil {
			b.Fatal(err)
		}
		_ = conn.Close()
		s.terminate(b, p)

		began = time.Now()
		command("podman", store, "run", "-d", "--pids-limit=0", "--name=by-hand", "--publish=39999:22", unpacked.ID, "sleep", "1000")
		byHand += time.Since(began)
		command("podman", store, "rm", "--force", "--time=0", "by-hand")
	}
	b.ReportMetric(float64(ours.Milliseconds())/float64(n), "grant-ms")
	b.ReportMetric(float64(byHand.Milliseconds())/float64(n), "podman-ms")
	b.ReportMetric(float64(ours)/float64(byHand), "ratio")
}
