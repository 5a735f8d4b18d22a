package ec2sim

import (
	"fmt"
	"time"
)

// SecurityGroup is what there is to know of a security group.
type SecurityGroup struct {
	ID, Region, Name, Description string
	Tags                          map[string]string
	// Ingress and Egress are its rules.
	Ingress, Egress []Rule
}

// Rule lets traffic of one protocol and range of ports in or out.
type Rule struct {
	// Protocol is "tcp", "udp", "icmp", "icmpv6" or "-1" for all.
	Protocol string
	// From and To are -1 where the protocol has no ports.
	From, To int64
	// Peer is a CIDR, a security group or a prefix list.
	Peer        string
	Description string
}

// group is a security group in its place. The cloud's mu guards it.
type group struct {
	SecurityGroup
	serial  int64
	vpc     string
	visible time.Time
}

func (g *group) order() int64 { return g.serial }

func (r *region) addDefaultGroup(serial int64) {
	g := &group{
		SecurityGroup: SecurityGroup{
			ID: r.defaultGroup(), Region: r.Name, Name: "default", Description: "default VPC security group", Tags: map[string]string{},
			Ingress: []Rule{{Protocol: "-1", From: -1, To: -1, Peer: r.defaultGroup()}},
			Egress:  []Rule{{Protocol: "-1", From: -1, To: -1, Peer: "0.0.0.0/0"}},
		},
		serial: serial, vpc: r.vpc,
	}
	r.groups[g.ID] = g
}

func (r *region) defaultGroup() string { return "sg-" + digest(r.Name, "default") }

func groupIdentifier(g *group) []element {
	return []element{text("groupId", g.ID), text("groupName", g.Name)}
}

func groupNotFound(id string) *Error {
	return refusal("InvalidGroup.NotFound", "The security group '%s' does not exist", id)
}

func (l *launch) checkGroups(r *region, now time.Time) *Error {
	for _, id := range l.groups {
		if g := r.groups[id]; g == nil || now.Before(g.visible) {
			return groupNotFound(id)
		}
	}
	return nil
}

func defaultCIDR(zone int) string { return fmt.Sprintf("172.31.%d.0/20", zone*16) }
