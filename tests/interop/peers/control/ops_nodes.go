package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"tailscale.com/net/tsaddr"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// nodeArg names a node: its key, its id, its hostname (of several with the same, the newest), or
// nothing when there is only one.
type nodeArg struct {
	Node string `json:"node"`
}

func init() {
	operations["nodes"] = does(func(b *bed, _ noArgs) (any, error) {
		return b.control.AllNodes(), nil
	})
	operations["await_node"] = waits(awaitNode)
	operations["update_node"] = does(updateNode)
	operations["fake_peer"] = does(fakePeer)
	operations["routes"] = does(setRoutes)
	operations["expire"] = does(expire)
	operations["expire_all"] = does(func(b *bed, a onArg) (any, error) {
		b.control.SetExpireAllNodes(a.On)
		return nil, nil
	})
	operations["approve"] = does(approve)
	operations["jail"] = does(jail)
	operations["masquerade"] = does(masquerade)
	operations["all_online"] = does(func(b *bed, a onArg) (any, error) {
		b.control.AllOnline = a.On
		b.wake()
		return nil, nil
	})
}

// node finds the node that an argument names.
func (b *bed) node(ref string) (*tailcfg.Node, error) {
	all := b.control.AllNodes()
	if ref == "" {
		if len(all) != 1 {
			return nil, fmt.Errorf("there are %d nodes: say which", len(all))
		}
		return all[0], nil
	}
	var newest *tailcfg.Node
	for _, n := range all {
		if named(n, ref) && (newest == nil || n.ID > newest.ID) {
			newest = n
		}
	}
	if newest == nil {
		return nil, fmt.Errorf("no node %q", ref)
	}
	return newest, nil
}

func named(n *tailcfg.Node, ref string) bool {
	if n.Key.String() == ref || strconv.FormatInt(int64(n.ID), 10) == ref {
		return true
	}
	first, _, _ := strings.Cut(n.Name, ".")
	return first == ref || strings.TrimSuffix(n.Name, ".") == strings.TrimSuffix(ref, ".")
}

// wake makes every streaming node get a new map response.
func (b *bed) wake() {
	b.control.AddDNSRecords()
}

// awaitNode waits until a node is registered and has had the first message of its map stream.
func awaitNode(b *bed, a struct {
	nodeArg
	TimeoutMS int `json:"timeout_ms"`
}) (any, error) {
	return until(waitLimit(a.TimeoutMS), "node "+a.Node, func() (*tailcfg.Node, bool) {
		n, err := b.node(a.Node)
		return n, err == nil && b.front.liveStream(n.Key) != nil
	})
}

// updateNode replaces a node, or adds one, as given in Tailscale's JSON.
func updateNode(b *bed, a struct {
	Value *tailcfg.Node `json:"value"`
}) (any, error) {
	if a.Value == nil || a.Value.Key.IsZero() {
		return nil, errors.New("value: a node with a key is needed")
	}
	if b.control.NumNodes() == 0 {
		return nil, errors.New("a first node must have registered")
	}
	b.control.UpdateNode(a.Value)
	return nil, nil
}

// fakePeer makes up a complete node for use in raw_map or update_node; nobody is behind it.
func fakePeer(b *bed, a struct {
	Name   string         `json:"name"`
	Number uint8          `json:"number"` // 1 to 255, of the test's choice: the node's id and addresses follow from it
	Routes []netip.Prefix `json:"routes"`
}) (any, error) {
	if a.Name == "" || a.Number == 0 {
		return nil, errors.New("name and number are needed")
	}
	v4 := netip.AddrFrom4([4]byte{100, 64, 200, a.Number})
	addresses := []netip.Prefix{
		netip.PrefixFrom(v4, 32),
		netip.PrefixFrom(tsaddr.Tailscale4To6(v4), 128),
	}
	id := 1000 + int64(a.Number)
	return &tailcfg.Node{
		ID:                tailcfg.NodeID(id),
		StableID:          tailcfg.StableNodeID(fmt.Sprintf("TESTCTRL%08x", id)),
		Name:              a.Name + "." + b.config.domain + ".",
		User:              tailcfg.UserID(1),
		Key:               key.NewNode().Public(),
		Machine:           key.NewMachine().Public(),
		DiscoKey:          key.NewDisco().Public(),
		Addresses:         addresses,
		AllowedIPs:        append(addresses[:2:2], a.Routes...),
		PrimaryRoutes:     a.Routes,
		HomeDERP:          b.relays[0].region,
		Hostinfo:          (&tailcfg.Hostinfo{Hostname: a.Name, OS: "linux"}).View(),
		Created:           time.Now().UTC(),
		Cap:               tailcfg.CurrentCapabilityVersion,
		Online:            new(true),
		MachineAuthorized: true,
	}, nil
}

func setRoutes(b *bed, a struct {
	nodeArg
	Prefixes []netip.Prefix `json:"prefixes"`
}) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	b.control.SetSubnetRoutes(n.Key, a.Prefixes)
	return nil, nil
}

// expire sets a node's key expiry so many milliseconds from now; 0 is at once, null is never.
func expire(b *bed, a struct {
	nodeArg
	InMS *int `json:"in_ms"`
}) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	var at time.Time
	if a.InMS != nil {
		at = time.Now().Add(time.Duration(*a.InMS)*time.Millisecond - time.Second)
	}
	b.front.expire(n.Key, at)
	b.wake()
	return nil, nil
}

func approve(b *bed, a nodeArg) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	if !b.control.CompleteDeviceApproval(b.url, b.url+"/admin", &n.Key) {
		return nil, errors.New("testcontrol did not approve")
	}
	b.wake()
	return nil, nil
}

// jail makes peer a jailed one in the eyes of node.
func jail(b *bed, a struct {
	nodeArg
	Peer string `json:"peer"`
	On   bool   `json:"on"`
}) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	peer, err := b.node(a.Peer)
	if err != nil {
		return nil, err
	}
	b.control.SetJailed(n.Key, peer.Key, a.On)
	return nil, nil
}

// masquerade replaces all pairs: node is known to peer by the address as.
func masquerade(b *bed, a struct {
	Pairs []struct {
		nodeArg
		Peer string     `json:"peer"`
		As   netip.Addr `json:"as"`
	} `json:"pairs"`
}) (any, error) {
	var pairs []testcontrol.MasqueradePair
	for _, pair := range a.Pairs {
		n, err := b.node(pair.Node)
		if err != nil {
			return nil, err
		}
		peer, err := b.node(pair.Peer)
		if err != nil {
			return nil, err
		}
		pairs = append(pairs, testcontrol.MasqueradePair{Node: n.Key, Peer: peer.Key, NodeMasqueradesAs: pair.As})
	}
	b.control.SetMasqueradeAddresses(pairs)
	return nil, nil
}
