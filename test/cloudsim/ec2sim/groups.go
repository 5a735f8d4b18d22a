package ec2sim

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
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
			Egress:  r.firstEgress(),
		},
		serial: serial, vpc: r.vpc,
	}
	r.groups[g.ID] = g
}

// firstEgress is what a new group lets out: everything, over IPv6 too if the VPC
// has a block
// (https://docs.aws.amazon.com/vpc/latest/userguide/default-security-group.html).
func (r *region) firstEgress() []Rule {
	rules := []Rule{{Protocol: "-1", From: -1, To: -1, Peer: "0.0.0.0/0"}}
	if r.ipv6 != "" {
		rules = append(rules, Rule{Protocol: "-1", From: -1, To: -1, Peer: "::/0"})
	}
	return rules
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

// Limits of security groups
// (https://docs.aws.amazon.com/vpc/latest/userguide/amazon-vpc-limits.html).
const (
	maxGroups = 2500
	maxRules  = 60
)

func createGroup(q *call) effect {
	p := q.params
	name, description, vpc := p.required("GroupName"), p.required("GroupDescription"), p.text("VpcId")
	tags := taggedAs(p, "security-group")
	if len(name) > 255 || len(description) > 255 || strings.HasPrefix(name, "sg-") || !groupText.MatchString(name) || !groupText.MatchString(description) {
		p.fail(invalidValue("Value (%s) for parameter GroupName is invalid, or that of GroupDescription", name))
	}
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		if vpc != "" && vpc != r.vpc {
			return nil, vpcNotFound(vpc)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, other := range r.groups {
			if other.Name == name {
				return nil, refusal("InvalidGroup.Duplicate", "The security group '%s' already exists for VPC '%s'", name, r.vpc)
			}
		}
		if len(r.groups) >= maxGroups {
			return nil, refusal("SecurityGroupLimitExceeded", "The maximum number of security groups for VPC '%s' has been reached.", r.vpc)
		}
		g := &group{
			SecurityGroup: SecurityGroup{
				ID: "sg-" + newID(), Region: r.Name, Name: name, Description: description, Tags: tags,
				Egress: r.firstEgress(),
			},
			serial: c.nextSerial(), vpc: r.vpc, visible: c.clock.Now().Add(c.clock.Scale(c.options.GroupVisible)),
		}
		r.groups[g.ID] = g
		return []element{text("groupId", g.ID), tagSet(g.Tags), text("securityGroupArn", g.arn())}, nil
	}
}

// groupText is what names and descriptions may have in them.
var groupText = regexp.MustCompile(`^[a-zA-Z0-9 ._\-:/()#,@\[\]+=&;{}!$*]*$`)

func (g *group) arn() string {
	return fmt.Sprintf("arn:aws:ec2:%s:%s:security-group/%s", g.Region, Account, g.ID)
}

// taggedAs reads the tags for the one kind of thing that a request makes.
func taggedAs(p params, kind string) map[string]string {
	tags := map[string]string{}
	for _, below := range p.structs("TagSpecification") {
		if given := below.required("ResourceType"); given != kind {
			p.fail(invalidValue("'%s' is not a valid taggable resource type for this operation.", given))
		}
		maps.Copy(tags, readTags(below))
	}
	return tags
}

// seen finds a group that can be seen. The caller holds the cloud's mu.
func (c *Cloud) seen(r *region, id string) (*group, *Error) {
	g := r.groups[id]
	if g == nil || c.clock.Now().Before(g.visible) {
		return nil, groupNotFound(id)
	}
	return g, nil
}

func deleteGroup(q *call) effect {
	id := q.params.required("GroupId")
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		g, fault := c.seen(r, id)
		if fault != nil {
			return nil, fault
		}
		if id == r.defaultGroup() {
			return nil, refusal("CannotDelete", "the specified group: \"%s\" name: \"default\" cannot be deleted by a user", id)
		}
		inUse := false
		for _, n := range r.interfaces {
			inUse = inUse || slices.Contains(n.SecurityGroups, id)
		}
		for _, other := range r.groups {
			names := func(rule Rule) bool { return rule.Peer == id }
			inUse = inUse || other != g && (slices.ContainsFunc(other.Ingress, names) || slices.ContainsFunc(other.Egress, names))
		}
		if inUse {
			return nil, refusal("DependencyViolation", "resource %s has a dependent object", id)
		}
		delete(r.groups, id)
		return []element{boolean("return", true), text("groupId", id)}, nil
	}
}

// readRules reads IpPermissions.N, each of which may have many peers.
func readRules(p params) []Rule {
	var rules []Rule
	permissions := p.structs("IpPermissions")
	if len(permissions) == 0 {
		p.fail(refusal("MissingParameter", "The request must contain the parameter IpPermissions"))
	}
	for _, below := range permissions {
		rule := Rule{Protocol: protocolName(below.required("IpProtocol")), From: below.integer("FromPort", -1), To: below.integer("ToPort", -1)}
		switch rule.Protocol {
		case "-1":
			// All ports, whatever was said.
			rule.From, rule.To = -1, -1
		case "tcp", "udp":
			if rule.From < 0 || rule.To < rule.From || rule.To > 65535 {
				p.fail(invalidValue("Invalid TCP/UDP port range (%d:%d)", rule.From, rule.To))
			}
		case "icmp", "icmpv6":
		default:
			p.fail(invalidValue("Invalid value '%s' for IP protocol. Unknown protocol.", rule.Protocol))
		}
		before := len(rules)
		add := func(below params, name string, valid func(string) bool) {
			one := rule
			one.Peer, one.Description = below.required(name), below.text("Description")
			if !valid(one.Peer) {
				p.fail(invalidValue("CIDR block %s is malformed", one.Peer))
			}
			rules = append(rules, one)
		}
		for _, peer := range below.structs("IpRanges") {
			add(peer, "CidrIp", func(cidr string) bool {
				prefix, err := netip.ParsePrefix(cidr)
				return err == nil && prefix.Addr().Is4()
			})
		}
		for _, peer := range below.structs("Ipv6Ranges") {
			add(peer, "CidrIpv6", func(cidr string) bool {
				prefix, err := netip.ParsePrefix(cidr)
				return err == nil && prefix.Addr().Is6()
			})
		}
		for _, peer := range below.structs("PrefixListIds") {
			add(peer, "PrefixListId", func(id string) bool { return strings.HasPrefix(id, "pl-") })
		}
		for _, peer := range below.structs("Groups") {
			peer.text("UserId")
			add(peer, "GroupId", func(id string) bool { return strings.HasPrefix(id, "sg-") })
		}
		if len(rules) == before {
			p.fail(invalidValue("A permission must name at least one source or destination"))
		}
	}
	return rules
}

func protocolName(protocol string) string {
	names := map[string]string{"6": "tcp", "17": "udp", "1": "icmp", "58": "icmpv6"}
	if name, ok := names[protocol]; ok {
		return name
	}
	return protocol
}

// same says whether two rules let the same traffic through.
func (r Rule) same(other Rule) bool {
	r.Description, other.Description = "", ""
	return r == other
}

func (r Rule) String() string {
	return fmt.Sprintf("peer: %s, %s, from port: %d, to port: %d, ALLOW", r.Peer, strings.ToUpper(r.Protocol), r.From, r.To)
}

func (g *group) rules(egress bool) *[]Rule {
	if egress {
		return &g.Egress
	}
	return &g.Ingress
}

func authorizeGroup(egress bool) func(*call) effect {
	return func(q *call) effect {
		id := q.params.required("GroupId")
		wanted := readRules(q.params)
		taggedAs(q.params, "security-group-rule")
		return func() (any, *Error) {
			c, r := q.cloud, q.region
			c.mu.Lock()
			defer c.mu.Unlock()
			g, fault := c.seen(r, id)
			if fault != nil {
				return nil, fault
			}
			rules := slices.Clone(*g.rules(egress))
			for _, rule := range wanted {
				if slices.ContainsFunc(rules, rule.same) {
					return nil, refusal("InvalidPermission.Duplicate", "the specified rule \"%s\" already exists", rule)
				}
				if fault := r.checkPeer(rule.Peer); fault != nil {
					return nil, fault
				}
				rules = append(rules, rule)
			}
			if overfull(rules) {
				return nil, refusal("RulesPerSecurityGroupLimitExceeded", "The maximum number of rules per security group has been reached.")
			}
			*g.rules(egress) = rules
			return []element{boolean("return", true), set("securityGroupRuleSet", wanted, func(rule Rule) []element {
				return g.ruleElements(rule, egress)
			})}, nil
		}
	}
}

// overfull says that there are more rules than a direction may have, of either
// version of IP; what is neither's counts for both.
func overfull(rules []Rule) bool {
	four, six := 0, 0
	for _, rule := range rules {
		switch prefix, err := netip.ParsePrefix(rule.Peer); {
		case err != nil:
			four++
			six++
		case prefix.Addr().Is6():
			six++
		default:
			four++
		}
	}
	return max(four, six) > maxRules
}

func (r *region) checkPeer(peer string) *Error {
	switch {
	case strings.HasPrefix(peer, "pl-"):
		_, fault := r.prefixList(peer)
		return fault
	case strings.HasPrefix(peer, "sg-") && r.groups[peer] == nil:
		return groupNotFound(peer)
	default:
		return nil
	}
}

func (g *group) ruleElements(rule Rule, egress bool) []element {
	elements := []element{
		text("securityGroupRuleId", "sgr-"+digest(g.ID, strconv.FormatBool(egress), rule.String())), text("groupId", g.ID), text("groupOwnerId", Account),
		boolean("isEgress", egress), text("ipProtocol", rule.Protocol), number("fromPort", rule.From), number("toPort", rule.To),
		optional("description", rule.Description),
	}
	switch rule.peerKind() {
	case "prefixListIds":
		return append(elements, text("prefixListId", rule.Peer))
	case "groups":
		return append(elements, node("referencedGroupInfo", text("groupId", rule.Peer), text("userId", Account)))
	case "ipv6Ranges":
		return append(elements, text("cidrIpv6", rule.Peer))
	default:
		return append(elements, text("cidrIpv4", rule.Peer))
	}
}

// peerKind is the list that the peer is in where rules are shown.
func (r Rule) peerKind() string {
	switch {
	case strings.HasPrefix(r.Peer, "pl-"):
		return "prefixListIds"
	case strings.HasPrefix(r.Peer, "sg-"):
		return "groups"
	case strings.Contains(r.Peer, ":"):
		return "ipv6Ranges"
	default:
		return "ipRanges"
	}
}

func revokeEgress(q *call) effect {
	id := q.params.required("GroupId")
	unwanted := readRules(q.params)
	return func() (any, *Error) {
		c := q.cloud
		c.mu.Lock()
		defer c.mu.Unlock()
		g, fault := c.seen(q.region, id)
		if fault != nil {
			return nil, fault
		}
		rules := slices.Clone(g.Egress)
		for _, rule := range unwanted {
			i := slices.IndexFunc(rules, rule.same)
			if i < 0 {
				return nil, refusal("InvalidPermission.NotFound", "The specified rule does not exist in this security group.")
			}
			rules = slices.Delete(rules, i, i+1)
		}
		g.Egress = rules
		return []element{boolean("return", true)}, nil
	}
}

func describeGroups(q *call) effect {
	known := attributes[*group]{
		"description": func(g *group) []string { return []string{g.Description} },
		"group-id":    func(g *group) []string { return []string{g.ID} },
		"group-name":  func(g *group) []string { return []string{g.Name} },
		"owner-id":    func(*group) []string { return []string{Account} },
		"vpc-id":      func(g *group) []string { return []string{g.vpc} },
	}
	ids, names := q.params.list("GroupId"), q.params.list("GroupName")
	filters := readFilters(q.params, known, true)
	wanted := readPage(q.params, 5, 1000, ids)
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		hidden := func(g *group) bool { return c.clock.Now().Before(g.visible) }
		all, fault := pick(ids, r.groups, hidden, groupNotFound)
		if fault != nil {
			return nil, fault
		}
		for _, name := range names {
			if !slices.ContainsFunc(all, func(g *group) bool { return g.Name == name }) {
				return nil, groupNotFound(name)
			}
		}
		all = slices.DeleteFunc(all, func(g *group) bool {
			return len(names) > 0 && !slices.Contains(names, g.Name) || !passes(g, filters, known, g.Tags)
		})
		all, token := cut(all, wanted, (*group).order)
		return []element{set("securityGroupInfo", all, func(g *group) []element {
			return []element{
				text("ownerId", Account), text("groupId", g.ID), text("groupName", g.Name), text("groupDescription", g.Description),
				text("vpcId", g.vpc), tagSet(g.Tags), permissions("ipPermissions", g.Ingress), permissions("ipPermissionsEgress", g.Egress),
			}
		}), token}, nil
	}
}

// permissions shows rules, those of the same ports as one.
func permissions(name string, rules []Rule) element {
	var ports []Rule
	for _, rule := range rules {
		rule.Peer, rule.Description = "", ""
		if !slices.Contains(ports, rule) {
			ports = append(ports, rule)
		}
	}
	return set(name, ports, func(port Rule) []element {
		elements := []element{text("ipProtocol", port.Protocol)}
		if port.Protocol != "-1" {
			elements = append(elements, number("fromPort", port.From), number("toPort", port.To))
		}
		for _, kind := range []struct{ list, item string }{
			{"ipRanges", "cidrIp"}, {"ipv6Ranges", "cidrIpv6"}, {"prefixListIds", "prefixListId"}, {"groups", "groupId"},
		} {
			list := element{name: kind.list}
			for _, rule := range rules {
				if rule.Protocol == port.Protocol && rule.From == port.From && rule.To == port.To && rule.peerKind() == kind.list {
					list.kids = append(list.kids, node("item", text(kind.item, rule.Peer), optional("description", rule.Description)))
				}
			}
			elements = append(elements, list)
		}
		return elements
	})
}
