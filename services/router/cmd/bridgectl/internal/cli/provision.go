package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/pkg/backendgrpc"
	"github.com/compute-bridge/compute-bridge/pkg/receipt"
	"github.com/compute-bridge/compute-bridge/pkg/sshkey"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/login"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/show"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/spec"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/state"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

const (
	// provisionTime is enough for an image of some hundred MB and a VM's boot.
	provisionTime = 10 * time.Minute
	// pollEvery is how often the state is asked for while Provision blocks.
	pollEvery = 500 * time.Millisecond
	// undoTime is how long to look on while a cancelled grant is undone.
	undoTime = 15 * time.Second
	// keepStored is how long after its deadline a grant's file is kept.
	keepStored = 30 * 24 * time.Hour
	// longest is the local limit for a deadline; the backends' own is lower.
	longest = 100 * 365 * 24 * time.Hour
)

// wanted are the flags of provision.
type wanted struct {
	file, again                        string
	digest, kind, pointer              string
	cpu, ram, disk                     string
	region, isolation, network         string
	ports, env, allow                  []string
	envFile                            string
	forSpan, until                     string
	sshKey, requestID, postHash, nonce string
	seal, dryRun, showKey              bool
}

func (a *app) provisionCommand() *cobra.Command {
	w := &wanted{}
	cmd := &cobra.Command{
		Use: "provision", Short: "Send a grant and wait until its instance is ready",
		Long: `Send a grant and wait until its instance is ready to be logged in to.

The grant comes from flags, or from a file (-f) with a ProvisionRequest as JSON or
YAML, over which flags win. --dry-run prints the request in the form that -f reads.

Login: with --ssh-key, or else with ~/.ssh/id_ed25519.pub if that exists, the
instance lets your own key in. With --seal, or if there is no such file, the worker
makes a key and seals it to this machine; bridgectl ssh opens it in memory.

While the bridge can't be reached or has lost an answer, the very same request is
sent again until --timeout (10m); a request id gets one instance at most, however
often it is sent. Interrupting takes the grant back.`,
		Example: `  bridgectl provision --image-digest sha256:… --cpu 500m --ram 512Mi --disk 1Gi --for 1h
  bridgectl provision -f grant.yaml --until 2030-01-31T12:00:00Z --port 80/tcp`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.provision(cmd.Context(), w) },
	}
	f := cmd.Flags()
	f.StringVarP(&w.file, "file", "f", "", "grant as JSON or YAML (ProvisionRequest); - is the standard input")
	f.StringVar(&w.again, "again", "", "send a stored GRANT once more, as it was")
	f.StringVar(&w.digest, "image-digest", "", "digest of the image's bytes, sha256:… or blake3:…")
	f.StringVar(&w.kind, "image-kind", "", "oci-archive (default), oci-reference, disk or td-bundle")
	f.StringVar(&w.pointer, "image-pointer", "", "where in the operator's image store the image is (default: under its digest)")
	f.StringVar(&w.cpu, "cpu", "", "cores (2, 1.5) or thousandths of a core (500m)")
	f.StringVar(&w.ram, "ram", "", "memory, such as 512Mi or 2Gi")
	f.StringVar(&w.disk, "disk", "", "writable disk in whole GiB, such as 1Gi")
	f.StringVar(&w.region, "region", "", "region (default: any)")
	f.StringVar(&w.isolation, "isolation", "", "weakest isolation to accept: container (default), vm or tdx")
	f.StringArrayVar(&w.ports, "port", nil, "port of the workload to publish, such as 80/tcp; repeatable")
	f.StringArrayVar(&w.env, "env", nil, "NAME=VALUE for the workload; repeatable")
	f.StringVar(&w.envFile, "env-file", "", "file with lines of NAME=VALUE")
	f.StringVar(&w.network, "network", "", "open (default) or allowlist")
	f.StringArrayVar(&w.allow, "allow", nil, "CIDR prefix that the workload may reach, with --network allowlist; repeatable")
	f.StringVar(&w.forSpan, "for", "", "how long from now, such as 90s, 1h30m or 2d")
	f.StringVar(&w.until, "until", "", "when it ends, such as 2030-01-31T12:00:00Z")
	f.StringVar(&w.sshKey, "ssh-key", "", "own public key file (.pub) that may log in")
	f.BoolVar(&w.seal, "seal", false, "have a login key made and sealed to this machine")
	f.StringVar(&w.requestID, "request-id", "", "id of the grant, 64 hex digits (default: random)")
	f.StringVar(&w.postHash, "post-hash", "", "the market's identity of the image, 64 hex digits (default: the digest)")
	f.StringVar(&w.nonce, "nonce", "", "nonce for TDX evidence, in hex")
	f.BoolVar(&w.dryRun, "dry-run", false, "check and print the request; send nothing")
	f.BoolVar(&w.showKey, "show-login-key", false, "print a login key that the bridge made. It is a secret")
	cmd.MarkFlagsMutuallyExclusive("for", "until")
	cmd.MarkFlagsMutuallyExclusive("seal", "ssh-key")
	cmd.MarkFlagsMutuallyExclusive("again", "file")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error { return usage(cmd.ValidateFlagGroups()) }
	a.completeFlag(cmd, "region", regions)
	a.completeFlag(cmd, "isolation", words("container", "vm", "tdx"))
	a.completeFlag(cmd, "network", words("open", "allowlist"))
	return cmd
}

// build makes the request of file and flags, all but the login key.
func (a *app) build(w *wanted) (*bridgev1.ProvisionRequest, error) {
	req := &bridgev1.ProvisionRequest{}
	if w.file != "" {
		data, err := a.readFile(w.file)
		if err != nil {
			return nil, usage(fmt.Errorf("--file: %w", err))
		}
		if req, err = spec.ParseFile(w.file, data); err != nil {
			return nil, &coded{code: ExitInvalid, err: err}
		}
	}
	if req.GetGrant() == nil {
		req.Grant = &bridgev1.Grant{}
	}
	if req.GetEnvelope() == nil {
		req.Envelope = &bridgev1.Envelope{}
	}
	g, e := req.GetGrant(), req.GetEnvelope()
	if g.GetImage() == nil {
		g.Image = &bridgev1.Image{}
	}
	if g.GetShape() == nil {
		g.Shape = &bridgev1.Shape{}
	}
	var problems []error
	flag := func(name string, err error) {
		if err != nil {
			problems = append(problems, fmt.Errorf("--%s %w", name, err))
		}
	}
	var err error
	if a.changed("image-digest") {
		g.Image.Digest, err = spec.Digest(w.digest)
		flag("image-digest", err)
	}
	enum := func(name, value string, d protoreflect.EnumDescriptor, set func(protoreflect.EnumNumber)) {
		if a.changed(name) {
			n, err := spec.Enum(value, d)
			if err == nil {
				set(n)
			}
			flag(name, err)
		}
	}
	enum("image-kind", w.kind, bridgev1.ImageKind(0).Descriptor(), func(n protoreflect.EnumNumber) { g.Image.Kind = bridgev1.ImageKind(n) })
	enum("isolation", w.isolation, bridgev1.IsolationLevel(0).Descriptor(), func(n protoreflect.EnumNumber) { g.MinIsolation = bridgev1.IsolationLevel(n) })
	if g.GetImage().GetKind() == bridgev1.ImageKind_IMAGE_KIND_UNSPECIFIED {
		g.Image.Kind = bridgev1.ImageKind_IMAGE_KIND_OCI_ARCHIVE
	}
	if g.GetMinIsolation() == bridgev1.IsolationLevel_ISOLATION_LEVEL_UNSPECIFIED {
		g.MinIsolation = bridgev1.IsolationLevel_ISOLATION_LEVEL_CONTAINER
	}
	for _, s := range []struct {
		name, value string
		parse       func(string) (int64, error)
		field       *int64
	}{{"cpu", w.cpu, spec.CPU, &g.Shape.CpuMillicores}, {"ram", w.ram, spec.RAM, &g.Shape.RamMib}, {"disk", w.disk, spec.Disk, &g.Shape.StorageGib}} {
		if a.changed(s.name) {
			*s.field, err = s.parse(s.value)
			flag(s.name, err)
		} else if *s.field == 0 {
			problems = append(problems, fmt.Errorf("--%s is missing", s.name))
		}
	}
	if g.GetImage().GetDigest() == nil && !a.changed("image-digest") {
		problems = append(problems, errors.New("--image-digest is missing"))
	}
	if a.changed("image-pointer") {
		e.ImagePointer = w.pointer
	}
	if a.changed("region") {
		g.Region = w.region
	}
	if a.changed("port") {
		g.Ports = nil
		for _, p := range w.ports {
			port, err := spec.Port(p)
			flag("port", err)
			g.Ports = append(g.Ports, port)
		}
	}
	flag("env", a.environment(w, g))
	if a.changed("network") || a.changed("allow") {
		g.NetworkPolicy = &bridgev1.NetworkPolicy{Mode: bridgev1.NetworkPolicyMode_NETWORK_POLICY_MODE_OPEN, AllowedPrefixes: w.allow}
		enum("network", w.network, bridgev1.NetworkPolicyMode(0).Descriptor(), func(n protoreflect.EnumNumber) { g.NetworkPolicy.Mode = bridgev1.NetworkPolicyMode(n) })
		if len(w.allow) > 0 && g.GetNetworkPolicy().GetMode() != bridgev1.NetworkPolicyMode_NETWORK_POLICY_MODE_ALLOWLIST {
			problems = append(problems, errors.New("--allow needs --network allowlist"))
		}
	}
	switch {
	case a.changed("for"):
		d, err := spec.Span(w.forSpan)
		flag("for", err)
		g.ValidTo = timestamppb.New(a.Now().Add(d).Truncate(time.Second))
	case a.changed("until"):
		t, err := time.Parse(time.RFC3339, w.until)
		if err != nil {
			err = fmt.Errorf("%q: want a time such as 2030-01-31T12:00:00Z", w.until)
		}
		flag("until", err)
		g.ValidTo = timestamppb.New(t)
	case g.GetValidTo() == nil:
		problems = append(problems, errors.New("--for or --until is missing"))
	}
	switch {
	case a.changed("request-id"):
		g.RequestId, err = spec.Bytes32(w.requestID)
		flag("request-id", err)
	case len(g.GetRequestId()) == 0:
		g.RequestId = make([]byte, len(backend.GrantID{}))
		_, _ = rand.Read(g.GetRequestId()) // It never fails.
	case len(g.GetRequestId()) != len(backend.GrantID{}):
		problems = append(problems, fmt.Errorf("grant.request_id: %d bytes, want %d", len(g.GetRequestId()), len(backend.GrantID{})))
	}
	if a.changed("post-hash") {
		g.PostHash, err = spec.Bytes32(w.postHash)
		flag("post-hash", err)
		e.PostHash = g.GetPostHash()
	}
	if len(g.GetPostHash()) == 0 {
		g.PostHash = g.GetImage().GetDigest().GetValue()
	}
	if len(e.GetPostHash()) == 0 {
		e.PostHash = g.GetPostHash()
	}
	if a.changed("nonce") {
		e.Nonce, err = hex.DecodeString(w.nonce)
		if err != nil {
			err = fmt.Errorf("%q: want hex digits", w.nonce)
		}
		flag("nonce", err)
	}
	return req, usage(errors.Join(problems...))
}

func (a *app) environment(w *wanted, g *bridgev1.Grant) error {
	set := map[string]string{}
	if a.changed("env-file") {
		data, err := a.readFile(w.envFile)
		if err != nil {
			return err
		}
		if set, err = spec.EnvFile(data); err != nil {
			return fmt.Errorf("%s: %w", w.envFile, err)
		}
	}
	for _, text := range w.env {
		name, value, err := spec.Env(text)
		if err != nil {
			return err
		}
		set[name] = value
	}
	if g.Environment == nil && len(set) > 0 {
		g.Environment = map[string]string{}
	}
	maps.Copy(g.GetEnvironment(), set)
	return nil
}

// loginKey settles how the requester will log in, and stores it with the grant.
func (a *app) loginKey(w *wanted, g *state.Grant) error {
	e := g.Request.GetEnvelope()
	own := e.GetSshPublicKey() != "" || len(e.GetX25519PublicKey()) > 0
	home := a.Getenv("HOME")
	path := w.sshKey
	if path == "" && !w.seal && !own && home != "" {
		path = filepath.Join(home, ".ssh", "id_ed25519.pub")
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			path = ""
		}
	}
	switch {
	case path != "":
		line, err := os.ReadFile(path)
		if err != nil {
			return usage(fmt.Errorf("--ssh-key: %w", err))
		}
		key, err := sshkey.ParsePublicKey(string(line))
		if err != nil {
			return usage(fmt.Errorf("--ssh-key %s: %w", path, err))
		}
		e.SshPublicKey, e.X25519PublicKey = key.String(), nil
	case own && !w.seal:
	case w.dryRun:
		e.SshPublicKey, e.X25519PublicKey = "", nil
		a.note(term.Faint, "The login key will be sealed to a key that is made when the request is sent.")
		return nil
	default:
		private, public, err := receipt.GenerateKey()
		if err != nil {
			return err
		}
		g.X25519, e.X25519PublicKey, e.SshPublicKey = private, public, ""
		return nil
	}
	g.Identity = identityOf(path, e.GetSshPublicKey(), home)
	return nil
}

// identityOf returns the file of the private key that belongs to a public one:
// beside its own file, or in ~/.ssh; "" if there is none.
func identityOf(path, public, home string) string {
	key, err := sshkey.ParsePublicKey(public)
	if err != nil {
		return ""
	}
	candidates := []string{path}
	if home != "" {
		more, _ := filepath.Glob(filepath.Join(home, ".ssh", "*.pub")) // The pattern is well formed.
		candidates = append(candidates, more...)
	}
	for _, c := range candidates {
		private, ok := strings.CutSuffix(c, ".pub")
		if !ok {
			continue
		}
		line, err := os.ReadFile(c)
		if err != nil {
			continue
		}
		if other, err := sshkey.ParsePublicKey(string(line)); err != nil || !other.Equal(key) {
			continue
		}
		if _, err := os.Stat(private); err == nil {
			if abs, err := filepath.Abs(private); err == nil {
				return abs
			}
		}
	}
	return ""
}

func (a *app) provision(ctx context.Context, w *wanted) error {
	store, err := a.store()
	if err != nil {
		return usage(err)
	}
	g := state.Grant{Target: a.where(), CreatedAt: a.Now()}
	known := false
	if w.again != "" {
		if g, err = a.stored(store, w.again); err != nil {
			return err
		}
		known = true
	} else {
		if g.Request, err = a.build(w); err != nil {
			return err
		}
		g.ID = backend.GrantID(g.Request.GetGrant().GetRequestId())
		if err := a.loginKey(w, &g); err != nil {
			return err
		}
	}
	if w.dryRun {
		return a.dryRun(g.Request)
	}
	if !known {
		if _, err := store.Load(g.ID); !errors.Is(err, state.ErrNotFound) {
			return fail(ExitConflict, "grant %s is stored here already; bridgectl provision --again %s sends it once more", g.ID, show.ID(g.ID[:]))
		}
	}
	conn, err := a.dial()
	if err != nil {
		return err
	}
	limit, err := a.limit(provisionTime)
	if err != nil {
		return err
	}
	a.prune(store)
	if err := store.Save(g); err != nil {
		return err
	}
	s := &sending{
		app: a, grant: g, limit: limit, backend: bridgev1.NewBackendServiceClient(conn), inventory: bridgev1.NewInventoryServiceClient(conn),
		live: term.NewLive(a.Stderr, a.painter(a.Stderr)), quiet: a.json() && !a.verbose,
	}
	res, err := s.send(ctx)
	if err != nil {
		if s.nothingLeft && !known {
			if removeErr := store.Remove(g.ID); removeErr != nil {
				a.note(term.Busy, "warning: %v", removeErr)
			}
		}
		return err
	}
	if g.Request.GetEnvelope().GetSshPublicKey() != "" && g.Identity == "" {
		a.note(term.Faint, "The private key must be in your SSH agent: no file with it was found.")
	}
	g.Response = res
	if err := store.Save(g); err != nil {
		a.note(term.Busy, "warning: the receipt is not stored: %v", err)
	}
	if err := checkReceipt(g); err != nil {
		return err
	}
	if a.json() {
		text, err := marshal(res, "  ", w.showKey)
		if err != nil {
			return err
		}
		_, err = a.Stdout.Write(text)
		return err
	}
	o := a.show()
	if err := o.Provisioned(res); err != nil {
		return err
	}
	if w.showKey {
		key, err := privateKey(g, res.GetReceipt())
		if err != nil {
			return err
		}
		_, err = a.Stdout.Write(key.Expose())
		return err
	}
	return nil
}

// checkReceipt refuses a receipt that is not for this grant, or not for the key
// that was sent with it.
func checkReceipt(g state.Grant) error {
	wrong := func(what string) error {
		return fail(ExitOther, "the bridge answered with a receipt that is not this grant's (%s); bridgectl terminate %s ends the grant", what, show.ID(g.ID[:]))
	}
	r := g.Response.GetReceipt()
	if !bytes.Equal(r.GetGrantId(), g.ID[:]) {
		return wrong("grant id")
	}
	if id, err := backend.Handle(g.Response.GetInstance().GetHandle()).GrantID(); err != nil || id != g.ID {
		return wrong("handle")
	}
	if _, err := login.FromReceipt(r); err != nil {
		return wrong(err.Error())
	}
	if own := g.Request.GetEnvelope().GetSshPublicKey(); own != "" {
		key, err := sshkey.ParsePublicKey(own)
		if err != nil || r.GetRequesterKey().GetFingerprint() != key.Fingerprint() {
			return wrong("login key")
		}
	}
	return nil
}

// prune forgets grants whose deadline is long past.
func (a *app) prune(store state.Store) {
	ids, _ := store.IDs() // Saving tells what is wrong.
	for _, id := range ids {
		g, err := store.Load(id)
		if err == nil && a.Now().Sub(g.Request.GetGrant().GetValidTo().AsTime()) > keepStored {
			_ = store.Remove(id) // Next time, then.
		}
	}
}

// forgetKey deletes the key to a login key that opens nothing any more.
func (a *app) forgetKey(id backend.GrantID) {
	store, err := a.store()
	if err != nil {
		return
	}
	g, err := store.Load(id)
	if err != nil || g.X25519.IsZero() {
		return
	}
	g.X25519.Wipe()
	if err := store.Save(g); err != nil {
		a.note(term.Busy, "warning: %v", err)
	}
}

// dryRun checks a request as far as that can be done here, and prints it.
func (a *app) dryRun(req *bridgev1.ProvisionRequest) error {
	text, err := marshal(req, "  ", false)
	if err != nil {
		return err
	}
	if _, err := a.Stdout.Write(text); err != nil {
		return err
	}
	// The login key may come later.
	err = backend.Validate(backendgrpc.GrantFromProto(req.GetGrant()), backendgrpc.EnvelopeFromProto(req.GetEnvelope()), a.Now(), longest)
	if err != nil {
		return &remote{err: backenderr.From(err)}
	}
	return nil
}

// sending is one Provision with its retries.
type sending struct {
	*app
	grant     state.Grant
	limit     time.Duration
	backend   bridgev1.BackendServiceClient
	inventory bridgev1.InventoryServiceClient
	live      *term.Live
	quiet     bool

	began time.Time
	// nothingLeft says that a failed grant left nothing behind.
	nothingLeft bool
}

func (s *sending) progress(style term.Style, text string) {
	if !s.quiet {
		s.live.Show(style, text, show.Span(s.Now().Sub(s.began).Truncate(time.Second)))
	}
}

// send sends the request until there is an answer that ends it.
func (s *sending) send(parent context.Context) (*bridgev1.ProvisionResponse, error) {
	s.began = s.Now()
	ctx, cancel := context.WithTimeout(parent, s.limit)
	defer cancel()
	defer s.live.Clear()
	if !s.quiet {
		s.live.Line("Grant " + s.painter(s.Stderr).Paint(term.Accent, s.grant.ID.String()))
	}
	for try := 0; ; try++ {
		res, err := s.once(ctx)
		if err == nil {
			return res, nil
		}
		e := backenderr.From(err)
		failure := &remote{err: e, provisioning: &s.grant.ID}
		switch {
		case ctx.Err() != nil:
			return nil, s.takenBack(parent)
		case !ambiguous(e) && (e.Reason != backenderr.Unknown || try >= 3):
			s.nothingLeft = backenderr.CreatedOf(e) == backenderr.CreatedNone
			if tlsFailure(e) { // No request ever got through.
				s.nothingLeft, failure.provisioning = try == 0, nil
			}
			return nil, failure
		}
		p := pause(try, e)
		deadline, _ := ctx.Deadline()
		if p >= time.Until(deadline) {
			return nil, failure
		}
		s.progress(term.Busy, fmt.Sprintf("%s: %s; sending it again", e.Reason, message(e)))
		if wait(ctx, p) != nil {
			return nil, s.takenBack(parent)
		}
	}
}

// once sends the request, and shows how it goes until the answer comes.
func (s *sending) once(ctx context.Context) (*bridgev1.ProvisionResponse, error) {
	type answer struct {
		res *bridgev1.ProvisionResponse
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	answers := make(chan answer, 1)
	states := make(chan *bridgev1.Instance, 1)
	polled := make(chan struct{})
	defer func() {
		cancel()
		<-polled
	}()
	go func() {
		res, err := s.backend.Provision(ctx, s.grant.Request)
		if err == nil && (res.GetInstance().GetHandle() == "" || res.GetReceipt() == nil) {
			err = backenderr.New(backenderr.Unknown, "the answer holds no instance or receipt")
		}
		answers <- answer{res, err}
	}()
	go func() {
		defer close(polled)
		s.poll(ctx, states)
	}()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	text, style := "sent", term.Busy
	for {
		select {
		case a := <-answers:
			return a.res, a.err
		case i := <-states:
			text, style = show.State(i.GetState()), show.StateStyle(i.GetState())
			if i.GetProgress() != "" {
				text += ": " + i.GetProgress()
			}
		case <-tick.C:
		}
		s.progress(style, text)
	}
}

// poll asks for the grant's state until ctx ends. What it can't learn, it keeps
// to itself: Provision's own answer tells.
func (s *sending) poll(ctx context.Context, states chan<- *bridgev1.Instance) {
	for wait(ctx, pollEvery) == nil {
		res, err := s.inventory.ListInstances(ctx, &bridgev1.ListInstancesRequest{RequestId: s.grant.ID[:]})
		if err != nil {
			continue
		}
		for _, i := range res.GetInstances() {
			select {
			case states <- i:
			case <-ctx.Done():
			}
		}
	}
}

// takenBack waits a little while the bridge undoes what the caller has left.
func (s *sending) takenBack(parent context.Context) error {
	code, why := ExitUnavailable, "timed out"
	if parent.Err() != nil {
		code, why = ExitInterrupted, "interrupted"
	}
	s.progress(term.Busy, why+"; the bridge takes the grant back")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(parent), undoTime)
	defer cancel()
	for {
		res, err := s.inventory.ListInstances(ctx, &bridgev1.ListInstancesRequest{RequestId: s.grant.ID[:]})
		if err == nil && len(res.GetUnreachableBackends()) == 0 {
			exists := false
			for _, i := range res.GetInstances() {
				switch i.GetState() {
				case bridgev1.InstanceState_INSTANCE_STATE_FAILED, bridgev1.InstanceState_INSTANCE_STATE_TERMINATED:
				default:
					exists = true
				}
			}
			if !exists {
				s.nothingLeft = true
				return fail(code, "%s; grant %s was taken back, nothing of it is left", why, show.ID(s.grant.ID[:]))
			}
		}
		if wait(ctx, pollEvery) != nil {
			return fail(code, "%s; the bridge is still taking grant %s back: bridgectl terminate %[2]s makes sure", why, show.ID(s.grant.ID[:]))
		}
	}
}

// stored returns a grant that is stored here.
func (a *app) stored(store state.Store, arg string) (state.Grant, error) {
	prefix := strings.ToLower(arg)
	if id, err := backend.Handle(arg).GrantID(); err == nil {
		prefix = id.String()
	}
	if strings.Trim(prefix, "0123456789abcdef") != "" || len(prefix) < idPrefix || len(prefix) > 64 {
		return state.Grant{}, usage(fmt.Errorf("%q: want a grant's id, at least the first %d hex digits of it, or its handle", arg, idPrefix))
	}
	ids, err := store.IDs()
	if err != nil {
		return state.Grant{}, err
	}
	var found []string
	var one backend.GrantID
	for _, id := range ids {
		if strings.HasPrefix(id.String(), prefix) {
			found, one = append(found, id.String()), id
		}
	}
	switch len(found) {
	case 0:
		return state.Grant{}, fail(ExitNotFound, "no grant that begins with %s is stored on this machine", prefix)
	case 1:
		return store.Load(one)
	}
	return state.Grant{}, usage(fmt.Errorf("%q is the beginning of %d grants: %s", arg, len(found), strings.Join(found, ", ")))
}

func (a *app) terminateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "terminate GRANT", Aliases: []string{"rm"}, Short: "End a grant for good, and show what it used",
		Long: `End a grant for good, wait until nothing of it is left, and show what it used.
A grant that was terminated never runs again. It may be repeated.`,
		Args: exactly("GRANT"), ValidArgsFunction: a.grants,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel, err := a.within(cmd.Context(), 5*time.Minute)
			if err != nil {
				return err
			}
			defer cancel()
			handle, id, err := a.resolve(ctx, args[0])
			if err != nil {
				return err
			}
			conn, err := a.dial()
			if err != nil {
				return err
			}
			return a.terminate(ctx, bridgev1.NewBackendServiceClient(conn), handle, id)
		},
	}
}

// during calls progress from time to time until call returns.
func during(progress func(), call func() error) error {
	done := make(chan error, 1)
	go func() { done <- call() }()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		progress()
		select {
		case err := <-done:
			return err
		case <-tick.C:
		}
	}
}

// terminateCall is how long one call may block before it is made again.
const terminateCall = 30 * time.Second

func (a *app) terminate(ctx context.Context, service bridgev1.BackendServiceClient, handle string, id backend.GrantID) error {
	live := term.NewLive(a.Stderr, a.painter(a.Stderr))
	defer live.Clear()
	began := a.Now()
	consequence := "if the bridge was reached, the grant is being ended all the same"
	text := "terminating"
	progress := func() {
		if !a.json() || a.verbose {
			live.Show(term.Busy, text, show.Span(a.Now().Sub(began).Truncate(time.Second)))
		}
	}
	for try := 0; ; try++ {
		var res *bridgev1.TerminateResponse
		err := during(progress, func() (err error) {
			call, cancel := context.WithTimeout(ctx, terminateCall)
			defer cancel()
			res, err = service.Terminate(call, &bridgev1.TerminateRequest{Handle: handle})
			return err
		})
		switch {
		case ctx.Err() != nil:
			return interrupted(ctx, consequence)
		case err != nil && !ambiguous(backenderr.From(err)) && reason(err) != backenderr.DeadlineExceeded:
			return rpc(err)
		case err != nil:
			p := pause(try, err)
			if deadline, ok := ctx.Deadline(); ok && p >= time.Until(deadline) {
				return rpc(err)
			}
			text = message(backenderr.From(err)) + "; trying again"
			progress()
			if wait(ctx, p) != nil {
				return interrupted(ctx, consequence)
			}
			continue
		case res.GetState() != bridgev1.InstanceState_INSTANCE_STATE_TERMINATED:
			if wait(ctx, pollEvery) != nil {
				return interrupted(ctx, consequence)
			}
			try = -1
			continue
		}
		live.Clear()
		a.forgetKey(id)
		return a.print(res, func(o show.Output) error {
			fmt.Fprintln(o.W, o.Paint(term.Good, "Terminated:"), "nothing of it is left.")
			if res.GetComputeLog() == nil {
				fmt.Fprintln(o.W, "It never ran: there is no compute log.")
				return nil
			}
			checked, err := check(proto.CloneOf(res.GetComputeLog()), false, nil)
			if err != nil {
				return err
			}
			return o.Log(checked)
		})
	}
}
