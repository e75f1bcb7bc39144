package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
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
		NextProtos:     []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return r.cert, nil },
	}
	server.ModifyTLSConfigToAddMetaCert(trust)
	running := &runningRelay{derp: server, http: plainServer(mux), stun: cancel}
	go running.http.Serve(tls.NewListener(listener, trust))
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
	r.running.http.Close()
	r.running.derp.Close()
	r.running.stun()
	r.running = nil
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
