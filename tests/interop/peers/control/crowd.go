package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"tailscale.com/net/tsaddr"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

func init() {
	operations["crowd"] = does(crowd)
}

// crowd adds nodes crowd-N for N from first onwards, at 100.80.0.0 plus N, with endpoints; nobody is behind them.
func crowd(b *bed, a struct {
	First uint16 `json:"first"`
	Count uint16 `json:"count"`
}) (any, error) {
	if b.control.NumNodes() == 0 {
		return nil, errors.New("a first node must have registered")
	}
	for i := range int(a.Count) {
		b.control.UpdateNode(b.madeUp(int(a.First) + i))
	}
	return nil, nil
}

// nearby is where real peers are, so that pings to those made up go nowhere else.
var nearby = netip.AddrFrom4([4]byte{10, 99, 0, 31})

func (b *bed) madeUp(i int) *tailcfg.Node {
	name, id := fmt.Sprintf("crowd-%d", i), 100_000+i
	v4 := netip.AddrFrom4([4]byte{100, 80, byte(i >> 8), byte(i)})
	addresses := []netip.Prefix{
		netip.PrefixFrom(v4, 32),
		netip.PrefixFrom(tsaddr.Tailscale4To6(v4), 128),
	}
	hostinfo := &tailcfg.Hostinfo{Hostname: name, OS: "linux", OSVersion: "6.12", GoArch: "amd64"}
	return &tailcfg.Node{
		ID:         tailcfg.NodeID(id),
		StableID:   tailcfg.StableNodeID(fmt.Sprintf("TESTCTRL%08x", id)),
		Name:       name + "." + b.config.domain + ".",
		User:       tailcfg.UserID(1),
		Key:        key.NewNode().Public(),
		Machine:    key.NewMachine().Public(),
		DiscoKey:   key.NewDisco().Public(),
		Addresses:  addresses,
		AllowedIPs: addresses,
		Endpoints: []netip.AddrPort{
			netip.AddrPortFrom(nearby, uint16(20_000+i)),
			netip.AddrPortFrom(nearby, uint16(40_000+i)),
		},
		HomeDERP:          b.relays[0].region,
		Hostinfo:          hostinfo.View(),
		Created:           time.Now().UTC(),
		Cap:               tailcfg.CurrentCapabilityVersion,
		MachineAuthorized: true,
	}
}
