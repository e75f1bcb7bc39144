package main

import (
	"crypto/tls"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"time"

	"tailscale.com/envknob"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/logger"
)

// config is what the flags say.
type config struct {
	addr, host, domain               string
	controlPort, canaryPort          int
	derpPorts, stunPorts             [2]int
	https, derpInsecure, verbose     bool
	certFile, keyFile, caFile, caOut string
}

// bed is everything that one process runs.
type bed struct {
	config  *config
	control *testcontrol.Server
	front   *front
	lock    *lock // nil while it is off
	relays  [2]*relay
	url     string // of control, no trailing slash
	canary  string
	caPEM   string
}

// readyReport is the first line's content: where everything listens.
type readyReport struct {
	Control string        `json:"control"`
	Canary  string        `json:"canary"`
	Domain  string        `json:"domain"`
	CAPEM   string        `json:"ca_pem"`
	DERP    []relayReport `json:"derp"`
}

func newBed(c *config) (*bed, error) {
	envknob.SetNoLogsNoSupport()
	if _, err := netip.ParseAddr(c.addr); err != nil {
		return nil, fmt.Errorf("--addr: %w", err)
	}
	if c.host == "" {
		c.host = c.addr
	}
	b := &bed{config: c}
	identity, err := b.identity()
	if err != nil {
		return nil, err
	}
	if err := b.startRelays(identity); err != nil {
		return nil, err
	}
	if err := b.startControl(identity); err != nil {
		return nil, err
	}
	return b, b.startCanary()
}

// identity is the CA-signed certificate: the one given, or one of a CA made for this process.
func (b *bed) identity() (*tls.Certificate, error) {
	if b.config.certFile != "" {
		if b.config.caFile != "" {
			pem, err := os.ReadFile(b.config.caFile)
			if err != nil {
				return nil, err
			}
			b.caPEM = string(pem)
		}
		cert, err := tls.LoadX509KeyPair(b.config.certFile, b.config.keyFile)
		return &cert, err
	}
	caPEM, cert, err := newAuthority([]string{b.config.addr, b.config.host})
	if err != nil {
		return nil, err
	}
	b.caPEM = caPEM
	if b.config.caOut != "" {
		if err := os.WriteFile(b.config.caOut, []byte(caPEM), 0o644); err != nil {
			return nil, err
		}
	}
	return cert, nil
}

func (b *bed) startRelays(identity *tls.Certificate) error {
	pinned, certName, err := newPinned([]string{b.config.addr, b.config.host})
	if err != nil {
		return err
	}
	b.relays[0] = newRelay(b.config, 0, identity, "")
	b.relays[1] = newRelay(b.config, 1, pinned, certName)
	b.relays[0].insecure = b.config.derpInsecure
	for _, r := range b.relays {
		if err := r.start(); err != nil {
			return err
		}
	}
	return nil
}

func (b *bed) startControl(identity *tls.Certificate) error {
	listener, err := b.listen(b.config.controlPort)
	if err != nil {
		return err
	}
	scheme := "http"
	if b.config.https {
		scheme = "https"
		listener = tls.NewListener(listener, &tls.Config{
			Certificates: []tls.Certificate{*identity},
			NextProtos:   []string{"http/1.1"}, // HTTP/2 cannot be upgraded to Noise
		})
	}
	b.url = scheme + "://" + hostPort(b.config.host, portOf(listener.Addr()))
	b.control = &testcontrol.Server{
		ExplicitBaseURL: b.url,
		DERPMap:         b.derpMap(),
		MagicDNSDomain:  b.config.domain,
		DNSConfig:       &tailcfg.DNSConfig{Proxied: true, Domains: []string{b.config.domain}},
		AllOnline:       true,
		Logf:            logger.Logf(log.Printf),
	}
	b.front = newFront(b.control, b.url)
	go func() { log.Fatal(plainServer(b.front).Serve(listener)) }()
	return nil
}

// startCanary listens where no client has a reason to go: a hit is a client that followed an
// address which it should not have.
func (b *bed) startCanary() error {
	listener, err := b.listen(b.config.canaryPort)
	if err != nil {
		return err
	}
	b.canary = "http://" + hostPort(b.config.host, portOf(listener.Addr()))
	go func() {
		log.Fatal(plainServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b.front.records.add(record{Kind: "canary", Over: "plain", Method: r.Method, Path: r.URL.Path, Status: 200})
		})).Serve(listener))
	}()
	return nil
}

func (b *bed) listen(port int) (net.Listener, error) {
	return net.Listen("tcp", hostPort(b.config.addr, port))
}

func (b *bed) derpMap() *tailcfg.DERPMap {
	m := &tailcfg.DERPMap{OmitDefaultRegions: true, Regions: map[int]*tailcfg.DERPRegion{}}
	for _, r := range b.relays {
		m.Regions[r.region] = r.mapEntry()
	}
	return m
}

func (b *bed) ready() readyReport {
	report := readyReport{Control: b.url, Canary: b.canary, Domain: b.config.domain, CAPEM: b.caPEM}
	for _, r := range b.relays {
		report.DERP = append(report.DERP, r.report())
	}
	return report
}

func plainServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 30 * time.Second,
		ErrorLog:          log.Default(),
	}
}

func hostPort(host string, port int) string {
	return net.JoinHostPort(host, strconv.Itoa(port))
}

func portOf(addr net.Addr) int {
	return addr.(*net.TCPAddr).Port
}
