package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stunserver"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// relay is one DERP region: a DERP server over TLS and a STUN server. It can be stopped and started
// again on the same ports and with the same key, as a restarted machine would be.
type relay struct {
	region   int
	host     string
	addr     string
	cert     *tls.Certificate
	certName string // DERPNode.CertName; empty when a CA signed cert
	insecure bool

	mu       sync.Mutex
	key      key.NodePrivate
	port     int // 0 until the first start
	stunPort int
	running  *runningRelay // nil while stopped
	taps     map[*tap]struct{}
}

// tap is a client's connection that frames can be put into which no derpserver sends.
type tap struct {
	net.Conn
	relay *relay
	mu    sync.Mutex
}

func (t *tap) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.Conn.Write(p)
}

func (t *tap) Close() error {
	t.relay.mu.Lock()
	delete(t.relay.taps, t)
	t.relay.mu.Unlock()
	return t.Conn.Close()
}

// tapListener makes taps of what it accepts.
type tapListener struct {
	net.Listener
	relay *relay
}

func (l tapListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	t := &tap{Conn: conn, relay: l.relay}
	l.relay.mu.Lock()
	defer l.relay.mu.Unlock()
	l.relay.taps[t] = struct{}{}
	return t, nil
}

type runningRelay struct {
	derp *derpserver.Server
	http *http.Server
	stun context.CancelFunc
}

// relayReport tells a test where a region is and why a client should trust it.
type relayReport struct {
	Region   int    `json:"region"`
	Addr     string `json:"addr"`
	STUN     string `json:"stun"`
	CertName string `json:"cert_name,omitempty"`
	Key      string `json:"key"`
}

func newRelay(c *config, index int, cert *tls.Certificate, certName string) *relay {
	return &relay{
		region:   index + 1,
		host:     c.host,
		addr:     c.addr,
		cert:     cert,
		certName: certName,
		key:      key.NewNode(),
		port:     c.derpPorts[index],
		stunPort: c.stunPorts[index],
		taps:     map[*tap]struct{}{},
	}
}

func (r *relay) start() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running != nil {
		return errors.New("already running")
	}
	listener, err := net.Listen("tcp", hostPort(r.addr, r.port))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	stun := stunserver.New(ctx)
	if err := stun.Listen(hostPort(r.addr, r.stunPort)); err != nil {
		cancel()
		listener.Close()
		return err
	}
	r.port = portOf(listener.Addr())
	r.stunPort = stun.LocalAddr().(*net.UDPAddr).Port

	server := derpserver.New(r.key, logger.WithPrefix(log.Printf, fmt.Sprintf("derp %d: ", r.region)))
	mux := http.NewServeMux()
	mux.Handle("/derp", derpserver.AddWebSocketSupport(server, derpserver.Handler(server)))
	mux.HandleFunc("/derp/probe", derpserver.ProbeHandler)
	mux.HandleFunc("/derp/latency-check", derpserver.ProbeHandler)
	mux.HandleFunc("/generate_204", derpserver.ServeNoContent)
	trust := &tls.Config{
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.cert, nil
		},
	}
	server.ModifyTLSConfigToAddMetaCert(trust)
	running := &runningRelay{derp: server, http: plainServer(mux), stun: cancel}
	go running.http.Serve(tapListener{tls.NewListener(listener, trust), r})
	go stun.Serve()
	r.running = running
	return nil
}

// stop closes the listeners and every client's connection.
func (r *relay) stop() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running == nil {
		return errors.New("not running")
	}
	running := r.running
	r.running = nil
	// Closing a connection needs the lock.
	r.mu.Unlock()
	running.http.Close()
	running.derp.Close()
	running.stun()
	r.mu.Lock()
	return nil
}

// send puts a frame between those of the server, for every client at an address. Nothing else may be on its way to
// them: a server's frame may leave in two writes.
func (r *relay) send(from string, kind byte, payload []byte) (int, error) {
	frame := append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(payload))), payload...)
	r.mu.Lock()
	taps := slices.Collect(maps.Keys(r.taps))
	r.mu.Unlock()
	sent := 0
	for _, t := range taps {
		if host, _, _ := net.SplitHostPort(t.RemoteAddr().String()); host != from {
			continue
		}
		if _, err := t.Write(frame); err != nil {
			return sent, err
		}
		sent++
	}
	return sent, nil
}

// limit sets how many bytes a second the relay reads of a client; 0 is all.
func (r *relay) limit(rate uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running == nil {
		return errors.New("not running")
	}
	r.running.derp.UpdateRateLimits(derpserver.RateConfig{PerClientRateLimitBytesPerSec: rate})
	return nil
}

func (r *relay) connected(node key.NodePublic) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running != nil && r.running.derp.IsClientConnectedForTest(node)
}

func (r *relay) mapEntry() *tailcfg.DERPRegion {
	r.mu.Lock()
	defer r.mu.Unlock()
	node := &tailcfg.DERPNode{
		Name:             fmt.Sprintf("%da", r.region),
		RegionID:         r.region,
		HostName:         r.host,
		CertName:         r.certName,
		DERPPort:         r.port,
		STUNPort:         r.stunPort,
		InsecureForTests: r.insecure,
	}
	if netip.MustParseAddr(r.addr).Is4() {
		node.IPv4, node.IPv6 = r.addr, "none"
	} else {
		node.IPv4, node.IPv6 = "none", r.addr
	}
	return &tailcfg.DERPRegion{
		RegionID:   r.region,
		RegionCode: fmt.Sprintf("tb%d", r.region),
		RegionName: fmt.Sprintf("Test bed %d", r.region),
		Nodes:      []*tailcfg.DERPNode{node},
	}
}

func (r *relay) report() relayReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	return relayReport{
		Region:   r.region,
		Addr:     hostPort(r.addr, r.port),
		STUN:     hostPort(r.addr, r.stunPort),
		CertName: r.certName,
		Key:      r.key.Public().String(),
	}
}
