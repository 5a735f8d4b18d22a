package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/devca"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/show"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/spec"
	"github.com/compute-bridge/compute-bridge/services/router/cmd/bridgectl/internal/term"
)

const (
	// year is how long certificates are valid by default: development outlives
	// neither a laptop nor anyone's attention for longer.
	year = "365d"
	// trustDomain is in .internal, which ICANN reserves for private use.
	trustDomain = "compute-bridge.internal"
)

func (a *app) certsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "certs", Short: "Make a development CA and identities for mutual TLS",
		Long: `Make a certificate authority and identities for development and tests.

The authority's key lies unprotected beside what it signs: that is convenient,
and not for production.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(fmt.Errorf("unknown command %q; see %s --help", args[0], cmd.CommandPath()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.certsInitCommand(), a.certsIssueCommand())
	return cmd
}

func validity(s string) (time.Duration, error) {
	d, err := spec.Span(s)
	if err != nil {
		return 0, usage(fmt.Errorf("--valid-for %w", err))
	}
	return d, nil
}

// caError gives the authority's errors their exit codes.
func caError(err error) error {
	switch {
	case errors.Is(err, devca.ErrName):
		return usage(err)
	case errors.Is(err, devca.ErrExists):
		return &coded{code: ExitConflict, err: err}
	}
	return err
}

// files prints the paths of what was written.
func (a *app) files(identity string, paths map[string]string, human func(o show.Output) error) error {
	if !a.json() {
		return human(a.show())
	}
	out := maps.Clone(paths)
	if identity != "" {
		out["identity"] = identity
	}
	text, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.Stdout, string(text))
	return err
}

func (a *app) certsInitCommand() *cobra.Command {
	var domain, validFor string
	var force bool
	cmd := &cobra.Command{
		Use: "init DIR", Short: "Make a development CA in DIR", Args: exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			d, err := validity(validFor)
			if err != nil {
				return err
			}
			if err := devca.Init(args[0], domain, d, force); err != nil {
				return caError(err)
			}
			ca, key := filepath.Join(args[0], devca.CAFile), filepath.Join(args[0], devca.CAKeyFile)
			return a.files("", map[string]string{"ca": ca, "ca_key": key}, func(o show.Output) error {
				fmt.Fprintf(o.W, "%s for %s, valid for %s\n", o.Paint(term.Good, "Development CA"), domain, show.Span(d))
				if err := term.Fields(o.W, o.Painter, "  ", [2]string{"certificate", ca}, [2]string{"key", key + "  " + o.Paint(term.Busy, "secret, mode 0600")}); err != nil {
					return err
				}
				fmt.Fprintf(o.W, "For development only: whoever reads the key can be anyone.\nNext:  %s\n", o.Paint(term.Bold, "bridgectl certs issue "+args[0]+" NAME"))
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&domain, "trust-domain", trustDomain, "SPIFFE trust domain of the identities")
	cmd.Flags().StringVar(&validFor, "valid-for", year, "how long it is valid")
	cmd.Flags().BoolVar(&force, "force", false, "replace a CA that is there")
	return cmd
}

func (a *app) certsIssueCommand() *cobra.Command {
	var role, validFor string
	var dns, ips []string
	var force bool
	cmd := &cobra.Command{
		Use: "issue DIR NAME", Short: "Make an identity, signed by the CA in DIR",
		Long: `Make the identity spiffe://<trust domain>/NAME in DIR/NAME: cert.pem, key.pem and
ca.pem, as --identity takes them. The certificate is good for a server (NAME,
localhost, 127.0.0.1, ::1, and what --dns and --ip add) and for a client.

For development only.`,
		Args: exactly("DIR", "NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			d, err := validity(validFor)
			if err != nil {
				return err
			}
			router := role == "router"
			if !router {
				if _, err := backend.ParseRole(role); err != nil {
					return usage(fmt.Errorf("--role %q: want reader, client, operator or router", role))
				}
			}
			id := devca.Identity{Name: args[1], DNS: dns}
			for _, text := range ips {
				ip := net.ParseIP(text)
				if ip == nil {
					return usage(fmt.Errorf("--ip %q is no IP address", text))
				}
				id.IPs = append(id.IPs, ip)
			}
			uri, err := devca.Issue(args[0], id, d, force)
			if err != nil {
				return caError(err)
			}
			dir := filepath.Join(args[0], args[1])
			cert, key, ca := filepath.Join(dir, devca.CertFile), filepath.Join(dir, devca.KeyFile), filepath.Join(dir, devca.CAFile)
			return a.files(uri, map[string]string{"cert": cert, "key": key, "ca": ca}, func(o show.Output) error {
				fmt.Fprintf(o.W, "%s  valid for %s\n", o.Paint(term.Good, uri), show.Span(d))
				if err := term.Fields(o.W, o.Painter, "  ", [2]string{"certificate", cert}, [2]string{"key", key + "  " + o.Paint(term.Busy, "secret, mode 0600")}, [2]string{"authority", ca}); err != nil {
					return err
				}
				fmt.Fprintf(o.W, "For development only. A server lets it in when its configuration says\n\n[[client]]\nidentity = %s\n", strconv.Quote(uri))
				if router {
					fmt.Fprintf(o.W, "role = \"reader\"\nrouter = true\n")
				} else {
					fmt.Fprintf(o.W, "role = %s\n", strconv.Quote(role))
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&role, "role", "client", "role in the configuration that is shown: reader, client, operator or router")
	cmd.Flags().StringVar(&validFor, "valid-for", year, "how long it is valid, no longer than the CA")
	cmd.Flags().StringArrayVar(&dns, "dns", nil, "further DNS name of a server; repeatable")
	cmd.Flags().StringArrayVar(&ips, "ip", nil, "further IP address of a server; repeatable")
	cmd.Flags().BoolVar(&force, "force", false, "replace an identity that is there")
	return cmd
}
