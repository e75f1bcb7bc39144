package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"tailscale.com/tailcfg"
)

func init() {
	operations["dns"] = does(func(b *bed, a struct {
		Config *tailcfg.DNSConfig `json:"config"`
	}) (any, error) {
		b.control.DNSConfig = a.Config
		b.wake()
		return nil, nil
	})
	operations["dns_records"] = does(func(b *bed, a struct {
		Records []tailcfg.DNSRecord `json:"records"`
	}) (any, error) {
		b.control.AddDNSRecords(a.Records...)
		return nil, nil
	})
	operations["cap_map"] = does(func(b *bed, a struct {
		nodeArg
		Caps tailcfg.NodeCapMap `json:"caps"`
	}) (any, error) {
		n, err := b.node(a.Node)
		if err != nil {
			return nil, err
		}
		b.control.SetNodeCapMap(n.Key, a.Caps)
		b.wake() // the node itself: SetNodeCapMap may find its wake-up slot taken
		return nil, nil
	})
	operations["app_caps"] = does(func(b *bed, a struct {
		Caps tailcfg.PeerCapMap `json:"caps"`
	}) (any, error) {
		b.control.SetGlobalAppCaps(a.Caps)
		return nil, nil
	})
	operations["tag_owners"] = does(func(b *bed, a struct {
		Owners map[string][]string `json:"owners"`
	}) (any, error) {
		b.control.TagOwners = a.Owners
		return nil, nil
	})
	operations["same_user"] = does(func(b *bed, a onArg) (any, error) {
		b.control.AllNodesSameUser = a.On
		return nil, nil
	})
	operations["require_auth_key"] = does(func(b *bed, a struct {
		Key string `json:"key"`
	}) (any, error) {
		b.control.RequireAuthKey = a.Key
		return nil, nil
	})
	operations["require_auth"] = does(func(b *bed, a onArg) (any, error) {
		b.control.RequireAuth = a.On
		return nil, nil
	})
	operations["complete_auth"] = does(func(b *bed, a struct {
		URL string `json:"url"`
	}) (any, error) {
		if !b.control.CompleteAuth(a.URL) {
			return nil, errors.New("no such login")
		}
		return nil, nil
	})
	operations["require_approval"] = does(func(b *bed, a onArg) (any, error) {
		b.control.RequireMachineAuth = a.On
		return nil, nil
	})

	operations["derp_map"] = does(func(b *bed, a struct {
		Map *tailcfg.DERPMap `json:"map"` // null: our own two regions
	}) (any, error) {
		if a.Map == nil {
			a.Map = b.derpMap()
		}
		b.control.DERPMap = a.Map
		b.wake()
		return a.Map, nil
	})
	operations["derp_stop"] = does(func(b *bed, a regionArg) (any, error) {
		r, err := b.relay(a)
		if err != nil {
			return nil, err
		}
		return nil, r.stop()
	})
	operations["derp_start"] = does(func(b *bed, a regionArg) (any, error) {
		r, err := b.relay(a)
		if err != nil {
			return nil, err
		}
		return nil, r.start()
	})
	operations["derp_connected"] = does(derpConnected)
	operations["derp_frame"] = does(func(b *bed, a struct {
		regionArg
		From string `json:"from"` // the client's IP address
		Kind byte   `json:"kind"`
		Hex  string `json:"hex"`
	}) (any, error) {
		r, err := b.relay(a.regionArg)
		if err != nil {
			return nil, err
		}
		payload, err := hex.DecodeString(a.Hex)
		if err != nil {
			return nil, err
		}
		return r.send(a.From, a.Kind, payload)
	})
	operations["derp_limit"] = does(func(b *bed, a struct {
		regionArg
		Rate uint64 `json:"rate"`
	}) (any, error) {
		r, err := b.relay(a.regionArg)
		if err != nil {
			return nil, err
		}
		return nil, r.limit(a.Rate)
	})
	// The relay restarts with a certificate that nobody knows.
	operations["derp_strange"] = does(func(b *bed, a regionArg) (any, error) {
		r, err := b.relay(a)
		if err != nil {
			return nil, err
		}
		strange, _, err := newPinned([]string{b.config.addr, b.config.host})
		if err != nil {
			return nil, err
		}
		if err := r.stop(); err != nil {
			return nil, err
		}
		r.mu.Lock()
		r.cert = strange
		r.mu.Unlock()
		// The old STUN server gives its port back a moment later.
		return until(5*time.Second, "the relay's ports", func() (any, bool) { return nil, r.start() == nil })
	})
}

// regionArg names one of our regions; 1 when absent.
type regionArg struct {
	Region int `json:"region"`
}

func (b *bed) relay(a regionArg) (*relay, error) {
	if a.Region == 0 {
		a.Region = 1
	}
	for _, r := range b.relays {
		if r.region == a.Region {
			return r, nil
		}
	}
	return nil, fmt.Errorf("no region %d", a.Region)
}

// derpConnected lists the regions that a node is connected to.
func derpConnected(b *bed, a nodeArg) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	regions := []int{}
	for _, r := range b.relays {
		if r.connected(n.Key) {
			regions = append(regions, r.region)
		}
	}
	return regions, nil
}
