// Package awssite is what an AWS worker needs around it in a lab: a simulated EC2
// whose instances are machines that really boot, and a server from which they fetch
// the guest and images. The demo and the end-to-end tests share it.
package awssite

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/labvm"
	"github.com/compute-bridge/compute-bridge/test/internal/site"
)

const (
	// Region is where grants run.
	Region = "eu-central-1"
	// Speed is how many times faster than the real one the cloud is: an instance is
	// pending for half a second and takes three to end. Its machines boot in their
	// own time.
	Speed = 10
	// endpointPort is the cloud's on the site's address.
	endpointPort = "4566"
)

// Cloud is a simulated EC2, and a server of files.
type Cloud struct {
	*ec2sim.Cloud
	// Machines are the instances'.
	Machines *labvm.Machines
	// Endpoint is the URL of all the cloud's services.
	Endpoint string
	// Store is the URL of the server with the guest and images.
	Store string

	site    *site.Site
	servers []*http.Server
	serving sync.WaitGroup
}

// Open starts a cloud for a site, in its lab. Instances get the site's guest, and
// images that are in its store. Close it, before the lab.
func Open(ctx context.Context, s *site.Site, log io.Writer) (*Cloud, error) {
	machines, err := labvm.Open(ctx, labvm.Options{Lab: s.Lab, Log: log})
	if err != nil {
		return nil, err
	}
	c := &Cloud{Machines: machines, site: s, Cloud: ec2sim.New(ec2sim.Options{Machines: machines, Speed: Speed})}
	files := http.NewServeMux()
	files.Handle("/images/", http.StripPrefix("/images/", http.FileServer(http.Dir(s.Path("images")))))
	files.HandleFunc("/guest", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, s.Program("guest")) })
	c.Endpoint, err = c.serve(ctx, net.JoinHostPort(s.IP, endpointPort), c.Cloud)
	if err == nil {
		// Where machines reach it.
		c.Store, err = c.serve(ctx, net.JoinHostPort(s.Lab.Addr().String(), "0"), files)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close(ctx))
	}
	return c, nil
}

// serve has a handler answer at an address of the lab's network.
func (c *Cloud) serve(ctx context.Context, address string, handler http.Handler) (url string, err error) {
	var listener net.Listener
	err = c.site.Lab.Inside(func() error {
		listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		return err
	})
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	c.servers = append(c.servers, server)
	c.serving.Go(func() { _ = server.Serve(listener) }) // until it is closed
	return "http://" + listener.Addr().String(), nil
}

// Close ends the cloud and all its machines, and waits for that.
func (c *Cloud) Close(ctx context.Context) error {
	var errs []error
	for _, server := range c.servers {
		errs = append(errs, server.Close())
	}
	c.serving.Wait()
	c.Cloud.Close()
	return errors.Join(append(errs, c.Machines.Close(ctx))...)
}

// Worker returns the site's worker number index, from 0, which runs grants in the
// cloud.
func (c *Cloud) Worker(name string, index int) *site.Worker {
	w := c.site.Worker(name, index)
	w.Program = "aws-worker"
	return w
}

// Config returns the text of a worker's configuration.
func (c *Cloud) Config(w *site.Worker, bridgeID string, clients ...site.Client) string {
	return w.Frame(bridgeID, clients...) + fmt.Sprintf(`
[backend]
endpoint = %q
credentials_file = "credentials"
instance_families = ["t3"]
max_concurrent_instances = 4
boot_timeout = "2m"
poll_interval = "500ms"
visibility_delay = "2s"
%s
[[backend.region]]
name = %q
image.ssm_parameter = %q

[backend.guest]
amd64 = { file = %q, url = %q }
insecure = true # machines reach this one by its address in the lab

[backend.image_store]
base = %q
insecure = true
`, c.Endpoint, w.Settings, Region, ec2sim.ParameterDebian13, c.site.Program("guest"), c.Store+"/guest", c.Store+"/images")
}

// CredentialsFile is where a worker's credentials are to be.
func (c *Cloud) CredentialsFile(w *site.Worker) string {
	return filepath.Join(filepath.Dir(w.ConfigFile()), "credentials")
}

// Credentials are those of the account, as the SDK reads them.
func (c *Cloud) Credentials() string {
	return fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", ec2sim.AccessKeyID, ec2sim.SecretAccessKey)
}
