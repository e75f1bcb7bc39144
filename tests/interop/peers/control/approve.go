package main

import (
	"net/netip"
	"slices"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// approval is what happens to routes that nodes advertise: Tailscale's autoApprovers, with the delay
// that they have there and the omissions that a policy may have.
type approval struct {
	On bool `json:"on"`
	// DelayMS is between a route's being advertised and its being approved; default 300.
	DelayMS *int `json:"delay_ms"`
	// Withhold lists prefixes within which nothing is approved; what was, is withdrawn at once.
	Withhold []netip.Prefix `json:"withhold"`
	// Node limits all this to one node; empty is every node.
	nodeArg
	only key.NodePublic
}

func init() {
	operations["auto_approve"] = does(setApproval)
	operations["approved"] = does(func(b *bed, a nodeArg) (any, error) {
		n, err := b.node(a.Node)
		if err != nil {
			return nil, err
		}
		return b.front.approved(n.Key), nil
	})
}

func setApproval(b *bed, a approval) (any, error) {
	if a.DelayMS == nil {
		a.DelayMS = new(300)
	}
	if a.Node != "" {
		n, err := b.node(a.Node)
		if err != nil {
			return nil, err
		}
		a.only = n.Key
	}
	b.front.mu.Lock()
	b.front.knobs.approval = a
	b.front.mu.Unlock()
	if !a.On {
		return nil, nil
	}
	for _, n := range b.control.AllNodes() {
		if n.Hostinfo.Valid() {
			b.front.settle(n.Key, n.Hostinfo.RoutableIPs().AsSlice())
		}
	}
	return nil, nil
}

// approveRoutes gives a node what it advertises, if that is switched on, and when it is time.
func (f *front) approveRoutes(node key.NodePublic, info *tailcfg.Hostinfo) {
	f.mu.Lock()
	rules := f.knobs.approval
	f.mu.Unlock()
	if !rules.On || info == nil {
		return
	}
	routes := slices.Clone(info.RoutableIPs)
	time.AfterFunc(time.Duration(*rules.DelayMS)*time.Millisecond, func() { f.settle(node, routes) })
}

// settle approves routes that a node has advertised, beside those that it has, without what is
// withheld and what it no longer advertises.
func (f *front) settle(node key.NodePublic, routes []netip.Prefix) {
	f.settling.Lock()
	defer f.settling.Unlock()
	f.mu.Lock()
	rules := f.knobs.approval
	f.mu.Unlock()
	known := f.control.Node(node)
	if known == nil || !known.Hostinfo.Valid() || !rules.only.IsZero() && rules.only != node {
		return
	}
	now := known.Hostinfo.RoutableIPs().AsSlice()
	before := f.approved(node)
	var after []netip.Prefix
	for _, route := range now {
		within := func(wide netip.Prefix) bool { return wide.Bits() <= route.Bits() && wide.Overlaps(route) }
		wanted := slices.Contains(routes, route) || slices.Contains(before, route)
		if wanted && !slices.ContainsFunc(rules.Withhold, within) {
			after = append(after, route)
		}
	}
	if !slices.Equal(before, after) {
		f.control.SetSubnetRoutes(node, after)
	}
}

// approved are the routes of a node as testcontrol would send them to it.
func (f *front) approved(node key.NodePublic) []netip.Prefix {
	response, err := f.control.MapResponse(&tailcfg.MapRequest{NodeKey: node})
	if err != nil || response == nil {
		return nil
	}
	return response.Node.PrimaryRoutes
}
