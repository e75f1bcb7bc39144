package main

import (
	"encoding/json"
	"log"
	"net/netip"
	"slices"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// alteration is what the front changes in testcontrol's map responses about one node. What is absent
// stays as it is.
type alteration struct {
	// Online is what the others are told, whatever testcontrol says.
	Online *bool `json:"online"`
	// Hidden nodes are nobody's peers: as if they had been deleted.
	Hidden bool `json:"hidden"`
	// Primary are the PrimaryRoutes that the others are told; its AllowedIPs keep all routes.
	Primary *[]netip.Prefix `json:"primary"`
	// Filter is the packet filter that the node itself is sent.
	Filter []tailcfg.FilterRule `json:"filter"`
}

func init() {
	operations["alter"] = does(alter)
}

// alter replaces what is altered about a node, and tells all; without anything it is nothing.
func alter(b *bed, a struct {
	nodeArg
	alteration
}) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	b.front.mu.Lock()
	b.front.knobs.altered[n.Key] = &a.alteration
	b.front.mu.Unlock()
	b.wake()
	return nil, nil
}

// altered is a message of testcontrol as a node is to get it.
func (f *front) altered(to key.NodePublic, message []byte) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.knobs.altered) == 0 {
		return message
	}
	var response tailcfg.MapResponse
	if err := json.Unmarshal(message, &response); err != nil {
		log.Printf("alter: %v", err)
		return message
	}
	if own := f.knobs.altered[to]; own != nil && own.Filter != nil && response.PacketFilter != nil {
		response.PacketFilter = own.Filter
	}
	response.Peers = slices.DeleteFunc(response.Peers, func(peer *tailcfg.Node) bool {
		change := f.knobs.altered[peer.Key]
		return change != nil && change.Hidden
	})
	for _, peer := range response.Peers {
		if change := f.knobs.altered[peer.Key]; change != nil {
			change.apply(peer)
		}
	}
	changed, err := json.Marshal(response)
	if err != nil {
		log.Printf("alter: %v", err)
		return message
	}
	return changed
}

func (a *alteration) apply(peer *tailcfg.Node) {
	if a.Online != nil {
		peer.Online = a.Online
	}
	if a.Primary != nil {
		peer.PrimaryRoutes = *a.Primary
	}
}
