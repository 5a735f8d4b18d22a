// Package podman speaks to a bare-metal host's podman: over its REST socket,
// which the host's SSH connection forwards, and by the command lines that run
// in a workload's own systemd unit, which this package renders.
package podman

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/services/baremetal-worker/internal/sshconn"
)

const (
	// apiPrefix is the oldest version of the API that has all that is used here.
	apiPrefix = "/v4.0.0/libpod"
	// callTimeout bounds calls that only look, changeTimeout those that remove;
	// podman waits for locks of its own, without a limit.
	callTimeout   = 30 * time.Second
	changeTimeout = 2 * time.Minute
	// loadTimeout bounds the unpacking of an image.
	loadTimeout = time.Hour
	// maxReply bounds an answer: a host with thousands of images has megabytes.
	maxReply = 64 << 20
	// maxConns bounds the sockets to podman on one host.
	maxConns = 8
)

// Client is a host's podman. Its methods are safe for concurrent use. Errors
// are PROVIDER_UNAVAILABLE when the host doesn't answer and HOST_UNFIT when
// podman refuses; *APIError is in their chain then.
type Client struct {
	conn *sshconn.Conn
	http *http.Client
}

// New returns the podman of the connection's host. Its socket,
// [sshconn.PodmanSocket], must be listened on: systemd's podman.socket does.
func New(conn *sshconn.Conn) *Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return conn.DialUnix(ctx, sshconn.PodmanSocket)
		},
		MaxConnsPerHost:     maxConns,
		MaxIdleConnsPerHost: maxConns,
		// podman's service ends after 5 s without a call.
		IdleConnTimeout:    4 * time.Second,
		DisableCompression: true,
	}
	return &Client{conn: conn, http: &http.Client{Transport: transport}}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// APIError is what podman says.
type APIError struct {
	// Status is the HTTP status.
	Status int
	// Cause and Message are podman's words.
	Cause, Message string
}

// Error returns podman's words.
func (e *APIError) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("podman answers %d", e.Status)
	}
	return fmt.Sprintf("podman answers %d: %s", e.Status, e.Message)
}

// NotFound reports whether err says that podman has no such thing.
func NotFound(err error) bool {
	var e *APIError
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// call makes one call and decodes the answer into out, unless nil.
func (c *Client) call(ctx context.Context, timeout time.Duration, method, endpoint string, query url.Values, out any) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	target := "http://podman" + apiPrefix + endpoint
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, method, target, http.NoBody)
	if err != nil {
		return c.classify(err, method, endpoint)
	}
	reply, err := c.http.Do(request)
	if err != nil {
		return c.classify(err, method, endpoint)
	}
	defer func() { _ = reply.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(reply.Body, maxReply))
	if err != nil {
		return c.classify(err, method, endpoint)
	}
	if reply.StatusCode >= http.StatusBadRequest {
		return c.classify(apiError(reply.StatusCode, body), method, endpoint)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: podman: %s %s", c.conn.Name(), method, endpoint)
	}
	return nil
}

func apiError(status int, body []byte) *APIError {
	var said struct {
		Cause, Message string
	}
	_ = json.Unmarshal(body, &said) // Without, the status alone has to do.
	return &APIError{Status: status, Cause: said.Cause, Message: said.Message}
}

func (c *Client) classify(err error, method, endpoint string) error {
	if err == nil {
		return nil
	}
	var own *backenderr.Error
	var api *APIError
	switch {
	case errors.As(err, &own):
		return own
	case errors.As(err, &api):
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s: %s %s", c.conn.Name(), method, endpoint)
	case errors.Is(err, context.Canceled):
		return backenderr.Wrap(backenderr.Cancelled, err, "host %s: podman", c.conn.Name())
	}
	return backenderr.Wrap(backenderr.ProviderUnavailable, err, "host %s: podman: %s %s", c.conn.Name(), method, endpoint)
}

// Ping checks that podman answers.
func (c *Client) Ping(ctx context.Context) error {
	return c.call(ctx, callTimeout, http.MethodGet, "/_ping", nil, nil)
}

// Version returns podman's version, "5.4.2".
func (c *Client) Version(ctx context.Context) (string, error) {
	var v struct{ Version string }
	err := c.call(ctx, callTimeout, http.MethodGet, "/version", nil, &v)
	return v.Version, err
}

// GraphRoot returns the directory of the host's own store of images and
// containers.
func (c *Client) GraphRoot(ctx context.Context) (string, error) {
	var info struct {
		Store struct {
			GraphRoot string `json:"graphRoot"`
		} `json:"store"`
	}
	if err := c.call(ctx, callTimeout, http.MethodGet, "/info", nil, &info); err != nil {
		return "", err
	}
	if !path.IsAbs(info.Store.GraphRoot) {
		return "", backenderr.New(backenderr.HostUnfit, "host %s: podman's store is at %q", c.conn.Name(), info.Store.GraphRoot)
	}
	return info.Store.GraphRoot, nil
}

// Image is what a container of an image would run, and the image's name.
type Image struct {
	// ID is the hash of the image's configuration, in hex.
	ID string
	// Names are its names, "localhost/x:latest".
	Names []string
	// Size is in bytes.
	Size int64
	// Created is when it was built.
	Created time.Time
	// Entrypoint and Cmd are what it runs; Env are "NAME=value".
	Entrypoint, Cmd, Env []string
	// User and WorkingDir are as whom and where.
	User, WorkingDir string
	// ExposedPorts are "80/tcp".
	ExposedPorts []string
	// Architecture and OS are what it is for.
	Architecture, OS string
	// Labels are the image's own.
	Labels map[string]string
}

// inspectReply is how podman describes an image.
type inspectReply struct {
	ID           string `json:"Id"`
	RepoTags     []string
	Size         int64
	Created      time.Time
	Architecture string
	Os           string
	Labels       map[string]string
	ManifestType string
	Config       struct {
		User         string
		ExposedPorts map[string]struct{}
		Env          []string
		Entrypoint   []string
		Cmd          []string
		WorkingDir   string
	}
}

func (r inspectReply) image() Image {
	return Image{
		ID: r.ID, Names: r.RepoTags, Size: r.Size, Created: r.Created,
		Entrypoint: r.Config.Entrypoint, Cmd: r.Config.Cmd, Env: r.Config.Env,
		User: r.Config.User, WorkingDir: r.Config.WorkingDir, ExposedPorts: slices.Sorted(maps.Keys(r.Config.ExposedPorts)),
		Architecture: r.Architecture, OS: r.Os, Labels: r.Labels,
	}
}

// ErrNotAnImage says that an archive is not exactly one image in OCI's format.
var ErrNotAnImage = errors.New("archive is not exactly one OCI image")

// loadedLine is what `podman load` prints for each image.
var loadedLine = regexp.MustCompile(`^Loaded image(?:\(s\))?: (.+)$`)

// ociManifest is how podman calls the manifest of an image in OCI's own format.
const ociManifest = "application/vnd.oci.image.manifest.v1+json"

// LoadImage unpacks an OCI image archive that is on the host (plain or
// compressed) into a store and describes the image. The names that the archive
// gives it are somebody else's words: they are taken off again, and the image is
// known by its id alone. Calls for one store must not run at the same time.
//
// An archive that isn't exactly one OCI image is ErrNotAnImage in the chain of
// IMAGE_INVALID, and nothing of it is left in the store.
func (c *Client) LoadImage(ctx context.Context, e Engine, file string) (Image, error) {
	if !path.IsAbs(file) {
		return Image{}, backenderr.New(backenderr.Internal, "image archive %q: not an absolute path", file)
	}
	result, err := c.run(ctx, e, loadTimeout, "load", "--quiet", "--input="+file)
	if err != nil {
		return Image{}, err
	}
	if err := result.Err("podman load"); err != nil {
		stderr := string(result.Stderr)
		switch {
		case strings.Contains(stderr, "no space left"):
			return Image{}, backenderr.Wrap(backenderr.HostUnfit, err, "host %s: disk is full", c.conn.Name())
		case strings.Contains(stderr, "payload does not match any of the supported image formats"), strings.Contains(stderr, "no such file or directory") && !strings.Contains(stderr, file+": no such file"):
			return Image{}, backenderr.Wrap(backenderr.ImageInvalid, errors.Join(ErrNotAnImage, err), "host %s", c.conn.Name())
		}
		return Image{}, backenderr.Wrap(backenderr.HostUnfit, err, "host %s", c.conn.Name())
	}
	names := parseLoaded(string(result.Stdout))
	image, err := c.describe(ctx, e, names)
	if err != nil {
		return Image{}, errors.Join(err, c.DropImages(context.WithoutCancel(ctx), e, names...))
	}
	for _, name := range names {
		if strings.HasPrefix(name, "sha256:") {
			continue
		}
		if result, err = c.run(ctx, e, changeTimeout, "untag", name); err != nil {
			return Image{}, err
		}
		if err := result.Err("podman untag"); err != nil {
			return Image{}, backenderr.Wrap(backenderr.HostUnfit, err, "host %s", c.conn.Name())
		}
	}
	return image, nil
}

// describe inspects what a load has loaded.
func (c *Client) describe(ctx context.Context, e Engine, names []string) (Image, error) {
	if len(names) != 1 {
		return Image{}, backenderr.Wrap(backenderr.ImageInvalid, ErrNotAnImage, "host %s: the archive has %d images; exactly one is allowed", c.conn.Name(), len(names))
	}
	result, err := c.run(ctx, e, callTimeout, "image", "inspect", names[0])
	if err != nil {
		return Image{}, err
	}
	if err := result.Err("podman image inspect"); err != nil {
		return Image{}, backenderr.Wrap(backenderr.HostUnfit, err, "host %s", c.conn.Name())
	}
	var replies []inspectReply
	if err := json.Unmarshal(result.Stdout, &replies); err != nil || len(replies) != 1 {
		return Image{}, backenderr.New(backenderr.HostUnfit, "host %s: podman image inspect describes %d images: %v", c.conn.Name(), len(replies), err)
	}
	if t := replies[0].ManifestType; t != ociManifest {
		return Image{}, backenderr.Wrap(backenderr.ImageInvalid, ErrNotAnImage, "host %s: the archive's manifest is of type %s, not OCI's", c.conn.Name(), t)
	}
	return replies[0].image(), nil
}

// DropImages removes images from a store by name or id, with all their names.
// Missing ones are fine.
func (c *Client) DropImages(ctx context.Context, e Engine, images ...string) error {
	if len(images) == 0 {
		return nil
	}
	result, err := c.run(ctx, e, changeTimeout, append([]string{"rmi", "--force", "--ignore"}, images...)...)
	if err != nil {
		return err
	}
	if err := result.Err("podman rmi"); err != nil {
		return backenderr.Wrap(backenderr.HostUnfit, err, "host %s", c.conn.Name())
	}
	return nil
}

func (c *Client) run(ctx context.Context, e Engine, timeout time.Duration, args ...string) (sshconn.Result, error) {
	engine, err := e.args()
	if err != nil {
		return sshconn.Result{}, backenderr.Wrap(backenderr.Internal, err, "podman")
	}
	command := append(append([]string{"env", "LC_ALL=C"}, engine...), args...)
	return c.conn.Run(ctx, sshconn.Command{Args: command, Timeout: timeout, Long: timeout == loadTimeout})
}

// parseLoaded reads the output of `podman load`.
func parseLoaded(output string) []string {
	var names []string
	for line := range strings.Lines(output) {
		match := loadedLine.FindStringSubmatch(strings.TrimSpace(line))
		if match == nil {
			continue
		}
		for name := range strings.SplitSeq(match[1], ",") {
			if name = strings.TrimSpace(name); name != "" {
				names = append(names, name)
			}
		}
	}
	return names
}

// ListedContainer is a container as ListContainers shows it.
type ListedContainer struct {
	ID       string            `json:"Id"`
	Names    []string          `json:"Names"`
	ImageID  string            `json:"ImageID"`
	State    string            `json:"State"`
	Labels   map[string]string `json:"Labels"`
	ExitCode int               `json:"ExitCode"`
	Networks []string          `json:"Networks"`
}

// ListContainers returns the containers with a label, running or not. Label is
// "name" or "name=value".
func (c *Client) ListContainers(ctx context.Context, label string) ([]ListedContainer, error) {
	query := filters("label", label)
	query.Set("all", "true")
	var containers []ListedContainer
	err := c.call(ctx, callTimeout, http.MethodGet, "/containers/json", query, &containers)
	return containers, err
}

// Container is what is known about a container.
type Container struct {
	ID      string
	Name    string
	ImageID string
	Labels  map[string]string
	// State is "created", "running", "exited", ….
	State string
	// ExitCode is that of the main process, once it has ended.
	ExitCode int
	// OOMKilled is whether the kernel ended it for want of memory.
	OOMKilled bool
	// Started and Finished are zero if it never did.
	Started, Finished time.Time
	// PID is that of the main process, 0 if it doesn't run.
	PID int
	// Error is why it could not be started.
	Error string
}

// InspectContainer describes a container; see NotFound.
func (c *Client) InspectContainer(ctx context.Context, name string) (Container, error) {
	var reply struct {
		ID    string `json:"Id"`
		Name  string
		Image string
		State struct {
			Status     string
			ExitCode   int
			OOMKilled  bool
			StartedAt  time.Time
			FinishedAt time.Time
			Pid        int
			Error      string
		}
		Config struct{ Labels map[string]string }
	}
	if err := c.call(ctx, callTimeout, http.MethodGet, "/containers/"+url.PathEscape(name)+"/json", nil, &reply); err != nil {
		return Container{}, err
	}
	return Container{
		ID: reply.ID, Name: reply.Name, ImageID: reply.Image, Labels: reply.Config.Labels, State: reply.State.Status,
		ExitCode: reply.State.ExitCode, OOMKilled: reply.State.OOMKilled, Started: known(reply.State.StartedAt), Finished: known(reply.State.FinishedAt),
		PID: reply.State.Pid, Error: reply.State.Error,
	}, nil
}

// known turns podman's "never" (year 1, or the epoch) into the zero time.
func known(t time.Time) time.Time {
	if t.Year() <= 1970 {
		return time.Time{}
	}
	return t
}

// RemoveContainer kills and removes a container with its anonymous volumes. One
// that isn't there is fine.
func (c *Client) RemoveContainer(ctx context.Context, name string) error {
	query := url.Values{"force": {"true"}, "ignore": {"true"}, "v": {"true"}, "timeout": {"0"}}
	err := c.call(ctx, changeTimeout, http.MethodDelete, "/containers/"+url.PathEscape(name), query, nil)
	if NotFound(err) {
		return nil
	}
	return err
}

// Network is a podman network.
type Network struct {
	Name string `json:"name"`
	ID   string `json:"id"`
	// Interface is the bridge's name on the host.
	Interface string            `json:"network_interface"`
	Labels    map[string]string `json:"labels"`
	Subnets   []struct {
		Subnet  string `json:"subnet"`
		Gateway string `json:"gateway"`
	} `json:"subnets"`
}

// ListNetworks returns the networks with a label, "name" or "name=value".
func (c *Client) ListNetworks(ctx context.Context, label string) ([]Network, error) {
	var networks []Network
	err := c.call(ctx, callTimeout, http.MethodGet, "/networks/json", filters("label", label), &networks)
	return networks, err
}

// RemoveNetwork removes a network and the containers on it. One that isn't
// there is fine.
func (c *Client) RemoveNetwork(ctx context.Context, name string) error {
	err := c.call(ctx, changeTimeout, http.MethodDelete, "/networks/"+url.PathEscape(name), url.Values{"force": {"true"}}, nil)
	if NotFound(err) {
		return nil
	}
	return err
}

// filters renders podman's filter parameter.
func filters(key, value string) url.Values {
	encoded, _ := json.Marshal(map[string][]string{key: {value}}) // Strings always can.
	return url.Values{"filters": {string(encoded)}}
}
