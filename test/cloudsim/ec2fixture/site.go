// Package ec2fixture is the provider's side of a backendtest.Fixture whose
// provider is the simulator of EC2 with quick machines: what the conformance
// suite sees of it and does to it behind the worker's back, the same for a worker
// in the test's own process and for the built program.
package ec2fixture

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backendtest"
	"github.com/compute-bridge/compute-bridge/pkg/ledger/ledgertest"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2tags"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/quickvm"
)

// Options say what a site is like.
type Options struct {
	// BridgeID is the bridge's name, Backend the worker's.
	BridgeID, Backend string
	// Region is where things are planted.
	Region string
	// Speed is the cloud's: how many times faster than the real one it is.
	Speed float64
	// Buckets has the cloud throttle as the real one does. Without, nothing waits
	// for that, which would be what most of a sweep does.
	Buckets bool
	// HiddenAtLeast is how long a new instance isn't found at least.
	HiddenAtLeast time.Duration
	// Now is the cloud's time; nil for the machine's.
	Now func() time.Time
	// BootDelay is the machines'.
	BootDelay time.Duration
	// Kill makes the worker dead at once. It is called while a request of its is
	// answered, and must not wait for it.
	Kill func()
	// Ledger is where the worker's calls to its ledger pass. Optional.
	Ledger *ledgertest.Points
}

// Site is a simulated EC2 and a store of images, for one bridge. Its methods may
// be called at the same time.
type Site struct {
	// Cloud is EC2, Machines are its instances'.
	Cloud    *ec2sim.Cloud
	Machines *quickvm.Machines
	// Endpoint is where the cloud answers, StoreBase where the images are.
	Endpoint, StoreBase string
	// AccessKey and SecretKey are credentials, ImageParameter names a disk image.
	AccessKey, SecretKey, ImageParameter string
	// GuestFile is a guest binary, GuestURL is where instances fetch it.
	GuestFile, GuestURL string
	// Image is an image in the store.
	Image backend.Image

	options Options
	points  points
	refuses atomic.Bool

	mu    sync.Mutex // protects what follows
	conns map[net.Conn]struct{}
}

// Open starts a site. It ends with the test.
func Open(t testing.TB, o Options) *Site {
	t.Helper()
	s := &Site{options: o, conns: map[net.Conn]struct{}{}}
	s.options.Region = cmp.Or(o.Region, "eu-central-1")
	s.Machines = quickvm.New(quickvm.Options{BootDelay: o.BootDelay})
	s.Cloud = ec2sim.New(ec2sim.Options{
		Machines: s.Machines, Speed: o.Speed, NoBuckets: !o.Buckets, HiddenAtLeast: o.HiddenAtLeast, Now: o.Now,
	})
	s.AccessKey, s.SecretKey, s.ImageParameter = ec2sim.AccessKeyID, ec2sim.SecretAccessKey, ec2sim.ParameterDebian13
	t.Cleanup(func() {
		s.Cloud.Close()
		s.Machines.Close()
		if t.Failed() {
			s.tell(t)
		}
	})
	s.Cloud.Intercept(s.intercept)
	s.Endpoint = s.serve(t, s.Cloud)
	s.makeStore(t)
	return s
}

// tell logs what there is to know of a case that has failed.
func (s *Site) tell(t testing.TB) {
	t.Helper()
	const consoles, most = 8, 300
	told := 0
	for id, console := range s.Machines.Consoles() {
		if told++; told > consoles {
			t.Logf("and the consoles of %d others", len(s.Machines.Consoles())-consoles)
			break
		}
		t.Logf("the console of %s:\n%s", id, console)
	}
	all := s.Cloud.Requests()
	var lines strings.Builder
	for _, r := range all[max(0, len(all)-most):] {
		fmt.Fprintf(&lines, "%s %s.%s %s", r.Time.Format("05.000"), r.Service, r.Action, cmp.Or(r.Answer, "OK"))
		if r.Lost {
			lines.WriteString(", lost")
		}
		for _, grant := range r.Grants {
			fmt.Fprintf(&lines, " %.8s", grant)
		}
		lines.WriteString("\n")
	}
	t.Logf("the last requests:\n%s", lines.String())
}

// serve has a handler answer on loopback.
func (s *Site) serve(t testing.TB, h http.Handler) (url string) {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, ConnState: s.track}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Errorf("close the server: %v", err)
		}
		serving.Wait()
	})
	return "http://" + listener.Addr().String()
}

// track knows the open connections.
func (s *Site) track(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.conns[c] = struct{}{}
	case http.StateClosed, http.StateHijacked:
		delete(s.conns, c)
	case http.StateActive, http.StateIdle:
	}
}

// Refuse has the cloud answer nobody any more, or again: to a worker that is dead
// nothing comes through. Its machines aren't concerned.
func (s *Site) Refuse(on bool) {
	s.refuses.Store(on)
	if !on {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close()
	}
}

// makeStore makes a guest binary, which no quick machine executes, and an image.
func (s *Site) makeStore(t testing.TB) {
	t.Helper()
	dir := t.TempDir()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	layout := []byte(`{"imageLayoutVersion":"1.0.0"}`)
	if err := w.WriteHeader(&tar.Header{Name: "oci-layout", Mode: 0o644, Size: int64(len(layout))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(layout); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(archive.Bytes())
	s.Image = backend.Image{Digest: backend.Digest{Algorithm: backend.SHA256, Sum: sum}, Kind: backend.ImageOCIArchive}
	s.GuestFile = filepath.Join(dir, "guest")
	for name, data := range map[string][]byte{
		"guest": []byte("#!/bin/false\n"),
		filepath.Join("images", "sha256", hex.EncodeToString(sum[:])): archive.Bytes(),
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// A kill cuts the worker off from the cloud, and machines from nothing.
	store := &Site{conns: map[net.Conn]struct{}{}}
	url := store.serve(t, http.FileServer(http.Dir(dir)))
	s.StoreBase, s.GuestURL = url+"/images", url+"/guest"
}

// Fill sets those parts of a fixture that are the cloud's. The grants of the
// fixture must have NAME=value in their environment.
func (s *Site) Fill(t testing.TB, f *backendtest.Fixture) {
	t.Helper()
	f.Login = backendtest.LogIn
	f.Leftovers = s.leftovers
	f.History = s.history
	f.Mutations = s.mutations
	f.Runs = func(id backend.GrantID) bool { return len(s.Machines.Running(id.String())) > 0 }
	f.Exit = func(id backend.GrantID, status backendtest.ExitStatus) error {
		return s.Machines.Exit(t.Context(), id.String(), status.Code, status.Signal)
	}
	f.Vanish = func(id backend.GrantID) error { return s.each(id, s.Cloud.Vanish) }
	f.Interrupt = func(id backend.GrantID) error { return s.each(id, s.Cloud.Interrupt) }
	f.FailBoot = s.Machines.FailNext
	f.CreatePoint, f.ReadPoint, f.Faults = createPoint, readPoint, faultsOf
	f.Record = s.record
	f.Inject = s.inject
	f.Plant = s.plant
	f.Uproot = s.uproot
}

// errNone says that a grant has no instance.
var errNone = errors.New("no instance")

// each does something with the instances of a grant that aren't terminated.
func (s *Site) each(id backend.GrantID, do func(instance string) error) error {
	var errs []error
	found := false
	for _, i := range s.Cloud.Instances() {
		if i.Tags[ec2tags.Grant] == id.String() && i.State != ec2sim.StateTerminated {
			found = true
			errs = append(errs, do(i.ID))
		}
	}
	if !found {
		return fmt.Errorf("grant %s: %w", id, errNone)
	}
	return errors.Join(errs...)
}

// leftovers lists what bears a grant's tag, of any bridge.
func (s *Site) leftovers(context.Context) ([]backendtest.Leftover, error) {
	var out []backendtest.Leftover
	var errs []error
	add := func(kind, name, state string, tags map[string]string) {
		text, ok := tags[ec2tags.Grant]
		if !ok {
			return
		}
		id, err := backend.ParseGrantID(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", kind, name, err))
		}
		out = append(out, backendtest.Leftover{GrantID: id, Name: strings.TrimSpace(kind + " " + name + " " + state)})
	}
	for _, i := range s.Cloud.Instances() {
		if i.State != ec2sim.StateTerminated {
			add("instance", i.ID, string(i.State), i.Tags)
		}
	}
	for _, v := range s.Cloud.Volumes() {
		add("volume", v.ID, "", v.Tags)
	}
	for _, n := range s.Cloud.NetworkInterfaces() {
		add("interface", n.ID, "", n.Tags)
	}
	for _, c := range s.Cloud.Schedules() {
		add("schedule", c.Name, c.State, map[string]string{ec2tags.Grant: grantOf(c.Name)})
	}
	return out, errors.Join(errs...)
}

// grantOf reads the grant in a schedule's name, which ends with its id in base64
// and the attempt: schedules have no tags.
func grantOf(name string) string {
	name, _, _ = strings.Cut(name, ".")
	digits := base64.RawURLEncoding.EncodedLen(len(backend.GrantID{}))
	id, err := base64.RawURLEncoding.DecodeString(name[max(0, len(name)-digits):])
	if err != nil {
		return ""
	}
	return hex.EncodeToString(id)
}

// history counts the instances that there ever were of a grant.
func (s *Site) history(id backend.GrantID) backendtest.History {
	type change struct {
		at time.Time
		by int
	}
	var changes []change
	var out backendtest.History
	for _, i := range s.Cloud.History() {
		if i.Tags[ec2tags.Grant] != id.String() {
			continue
		}
		out.Created++
		changes = append(changes, change{i.Launched, 1})
		if !i.Terminated.IsZero() {
			changes = append(changes, change{i.Terminated, -1})
		}
	}
	slices.SortFunc(changes, func(a, b change) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.by, b.by)) })
	now := 0
	for _, c := range changes {
		now += c.by
		out.AtOnce = max(out.AtOnce, now)
	}
	return out
}

// mutations counts the requests that changed something.
func (s *Site) mutations() int {
	n := 0
	for _, r := range s.Cloud.Requests() {
		if r.Mutates && !r.DryRun {
			n++
		}
	}
	return n
}

// plant makes an instance as a worker does, with everything that it has.
func (s *Site) plant(_ context.Context, p backendtest.Planted) error {
	bridge := cmp.Or(p.Bridge, s.options.BridgeID)
	_, err := s.Cloud.Plant(s.options.Region, map[string]string{
		ec2tags.Bridge: bridge, ec2tags.Backend: s.options.Backend, ec2tags.Grant: p.GrantID.String(), ec2tags.Attempt: "1",
		ec2tags.ValidTo: p.ValidTo.UTC().Format(time.RFC3339), ec2tags.Shape: "500/512/1",
		ec2tags.Name: fmt.Sprintf("cb-%s-%.12s-1", bridge, p.GrantID),
	})
	return err
}

// uproot removes what plant made.
func (s *Site) uproot(_ context.Context, p backendtest.Planted) error {
	return s.each(p.GrantID, s.Cloud.Vanish)
}

// CheckNothingIsLeft fails if anything bears a grant's tag.
func (s *Site) CheckNothingIsLeft(t testing.TB) {
	t.Helper()
	left, err := s.leftovers(t.Context())
	if err != nil {
		t.Error(err)
	}
	for _, l := range left {
		t.Errorf("left behind: %s of grant %s", l.Name, l.GrantID)
	}
}
