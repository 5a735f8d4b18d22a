package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// BridgeDir is where a bridge keeps its files on a host.
const BridgeDir = "/var/lib/compute-bridge"

// runBridgeDir is where a bridge keeps what a reboot may forget.
const runBridgeDir = "/run/compute-bridge"

// podmanLocks is how many locks podman has (num_locks in containers.conf(5)).
// All stores of a host share them.
const podmanLocks = "2048"

// firstGrantUser is the lowest user id that a grant's container is mapped to,
// far above all users of a host.
const firstGrantUser = 100000

// Leftovers lists what on the host still belongs to a bridge, one line each:
// units and their control groups, containers, podman's locks, networks, network
// namespaces, images, mounts, loop devices, network interfaces, elements of nft
// sets and rules of published ports, grants' directories, processes. A host
// whose grants have all ended and been accounted for has none but images, which
// a worker may keep for the next grant: pass ignore to leave lines out that
// begin with one of its strings ("image ").
func (h *Host) Leftovers(ctx context.Context, ignore ...string) ([]string, error) {
	var left []string
	var errs []error
	for _, look := range []func(context.Context) ([]string, error){
		h.leftUnits, h.leftPodman, h.leftNft, h.leftFiles, h.leftLoops, h.leftProcesses,
	} {
		found, err := look(ctx)
		left = append(left, found...)
		errs = append(errs, err)
	}
	kept := left[:0]
	for _, line := range left {
		wanted := true
		for _, prefix := range ignore {
			wanted = wanted && !strings.HasPrefix(line, prefix)
		}
		if wanted {
			kept = append(kept, line)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return kept, fmt.Errorf("look for leftovers on %s: %w", h.Name, err)
	}
	return kept, nil
}

// lines runs a program on the host and returns its lines, each with a prefix.
func (h *Host) lines(ctx context.Context, prefix string, argv ...string) ([]string, error) {
	out, err := h.Exec(ctx, argv...)
	if err != nil {
		return nil, err
	}
	var lines []string
	for line := range strings.Lines(out) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, prefix+line)
		}
	}
	return lines, nil
}

// leftUnits lists systemd units named cb-…, whatever their state, and mounts
// and interfaces.
func (h *Host) leftUnits(ctx context.Context) ([]string, error) {
	units, err := h.lines(ctx, "unit ", "systemctl", "list-units", "--all", "--plain", "--no-legend", "cb-*")
	if err != nil {
		return nil, err
	}
	links, err := h.lines(ctx, "", "ip", "-o", "link")
	if err != nil {
		return nil, err
	}
	for _, link := range links {
		// "3: cb0123456789: <…"; podman's default network is podman0.
		fields := strings.Fields(link)
		name := strings.TrimSuffix(fields[1], ":")
		if strings.HasPrefix(name, "cb") || strings.HasPrefix(name, "podman") || strings.HasPrefix(name, "veth") {
			units = append(units, "interface "+name)
		}
	}
	mounts, err := h.lines(ctx, "", "cat", "/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	for _, mount := range mounts {
		at := strings.Fields(mount)[1]
		if strings.HasPrefix(at, BridgeDir+"/") || strings.HasPrefix(at, runBridgeDir+"/") {
			units = append(units, "mount "+at)
		}
	}
	return units, nil
}

// leftPodman lists containers, networks and images.
func (h *Host) leftPodman(ctx context.Context) ([]string, error) {
	if _, err := h.Exec(ctx, "test", "-x", "/usr/bin/podman"); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 1 {
			return nil, nil
		}
		return nil, err
	}
	var left []string
	for _, list := range [][]string{
		{"container ", "podman", "ps", "--all", "--external", "--format", "{{.Names}} {{.Status}}"},
		{"network ", "podman", "network", "ls", "--format", "{{.Name}}"},
		{"volume ", "podman", "volume", "ls", "--format", "{{.Name}}"},
		{"image ", "podman", "images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"},
	} {
		lines, err := h.lines(ctx, list[0], list[1:]...)
		if err != nil {
			return nil, err
		}
		for _, line := range lines {
			if line != "network podman" { // podman's own
				left = append(left, line)
			}
		}
	}
	free, err := h.Exec(ctx, "podman", "info", "--format", "{{.Host.FreeLocks}}")
	if err != nil {
		return nil, err
	}
	if free = strings.TrimSpace(free); free != podmanLocks {
		left = append(left, fmt.Sprintf("podman locks: %s of %s are free", free, podmanLocks))
	}
	return left, nil
}

// leftNft lists the elements of all sets and maps, and netavark's rules for
// single ports and networks. Tables, chains and empty sets may stay.
func (h *Host) leftNft(ctx context.Context) ([]string, error) {
	out, err := h.Exec(ctx, "nft", "-j", "list", "ruleset")
	if err != nil {
		return nil, err
	}
	return nftLeftovers([]byte(out))
}

// nftLeftovers reads `nft -j list ruleset`.
func nftLeftovers(ruleset []byte) ([]string, error) {
	type set struct {
		Family string            `json:"family"`
		Table  string            `json:"table"`
		Name   string            `json:"name"`
		Flags  any               `json:"flags"`
		Elem   []json.RawMessage `json:"elem"`
	}
	var list struct {
		Nftables []struct {
			Set  *set `json:"set"`
			Map  *set `json:"map"`
			Rule *struct {
				Table string          `json:"table"`
				Chain string          `json:"chain"`
				Expr  json.RawMessage `json:"expr"`
			} `json:"rule"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal(ruleset, &list); err != nil {
		return nil, fmt.Errorf("nft's ruleset: %w", err)
	}
	var left []string
	for _, item := range list.Nftables {
		for _, s := range []*set{item.Set, item.Map} {
			if s == nil {
				continue
			}
			for _, element := range s.Elem {
				left = append(left, fmt.Sprintf("nft element %s %s %s: %s", s.Family, s.Table, s.Name, element))
			}
		}
		// netavark gives each network chains and each published port a rule.
		if r := item.Rule; r != nil && r.Table == "netavark" &&
			(strings.HasPrefix(r.Chain, "nv_") || r.Chain == "NETAVARK-HOSTPORT-DNAT") {
			left = append(left, fmt.Sprintf("nft rule %s %s: %s", r.Table, r.Chain, r.Expr))
		}
	}
	return left, nil
}

// leftFiles lists grants' directories and half-written files of the caches; and
// what systemd, podman and its runtime keep of a container or a unit. (podman
// forgets an empty directory in /run/libpod/persist for each container that it
// could not start.)
func (h *Host) leftFiles(ctx context.Context) ([]string, error) {
	return h.lines(ctx, "file ", "sh", "-c", `
		[ ! -d "$1" ] || find "$1" -path '*/grants/*' -prune -print -o -name '.tmp-*' -print
		[ ! -d "$2" ] || find "$2" -regextype egrep -maxdepth 2 -regex '.*/[0-9a-f]{64}'
		for dir in /run/netns /run/crun /run/libpod/exits; do
			[ ! -d "$dir" ] || find "$dir" -mindepth 1 -maxdepth 1 ! -name '.*'
		done
		find /run /sys/fs/cgroup -maxdepth 3 -name 'cb-*'`,
		"sh", BridgeDir, runBridgeDir)
}

// leftLoops lists loop devices whose image is, or was, on the host. The kernel
// shows every host all of them; the image's file system tells whose it is. That
// is known of a file: an overlay has one number for itself and one for those.
func (h *Host) leftLoops(ctx context.Context) ([]string, error) {
	return h.lines(ctx, "loop device ", "sh", "-c", `
		touch "$1" && own=$(stat --format %Hd:%Ld "$1") && rm "$1" || exit
		losetup --list --noheadings --output BACK-MAJ:MIN,NAME,BACK-FILE | while read -r at name file; do
			[ "$at" != "$own" ] || echo "$name $file"
		done`, "sh", "/var/lib/.lab-own")
}

// leftProcesses lists processes of grants' units or of a bridge's programs, and
// containers' monitors.
func (h *Host) leftProcesses(ctx context.Context) ([]string, error) {
	all, err := h.lines(ctx, "", "ps", "-e", "-ww", "-o", "pid=,uid=,cgroup=,args=")
	if err != nil {
		return nil, err
	}
	var left []string
	for _, line := range all {
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		user, err := strconv.Atoi(fields[1])
		if err != nil {
			return nil, fmt.Errorf("ps says %q: %w", line, err)
		}
		group, args := fields[2], strings.Join(fields[3:], " ")
		program := fields[3]
		if strings.HasPrefix(program, BridgeDir) && len(fields) > 4 && fields[4] == "lease" {
			continue // a worker's own that is there, not a grant's
		}
		if user >= firstGrantUser || strings.Contains(group, "/cb-") || strings.Contains(group, "/libpod-") ||
			strings.HasPrefix(program, BridgeDir) || strings.HasSuffix(program, "/conmon") {
			left = append(left, fmt.Sprintf("process %s: %s", fields[0], args))
		}
	}
	return left, nil
}
