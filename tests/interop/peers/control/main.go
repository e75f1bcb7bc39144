// Command control (binary tbcontrol) is a control plane that does what a test asks: Tailscale's own
// testcontrol with two DERP regions and STUN, behind a Noise front that records every request and
// can break the map stream in all the ways that a network or a server may.
//
// It is driven by JSON lines. The first line on stdout is {"ready":{...}}; after that each line on
// stdin, {"id":1,"op":"...",...}, gets one line {"id":1,"ok":true,"result":...} or
// {"id":1,"ok":false,"error":"..."}. Operations that wait (await_*, ping, c2n) do not hold up the
// others. The process ends when stdin does. Logs go to stderr.
package main

import (
	"encoding/json"
	"flag"
	"io"
	"log"
	"os"
)

func main() {
	log.SetFlags(log.Lmicroseconds)
	log.SetPrefix("tbcontrol: ")
	var c config
	flag.StringVar(&c.addr, "addr", "127.0.0.1", "IP address that everything binds")
	flag.StringVar(&c.host, "host", "", "name used in URLs and the DERP map instead of --addr")
	flag.StringVar(&c.domain, "domain", "tb.example", "MagicDNS domain")
	flag.IntVar(&c.controlPort, "control-port", 9443, "TCP port of control; 0 takes a free one, as for all ports")
	flag.IntVar(&c.derpPorts[0], "derp-port", 9444, "TCP port of region 1, whose certificate a CA signed")
	flag.IntVar(&c.derpPorts[1], "derp2-port", 9445, "TCP port of region 2, whose certificate is pinned by sha256-raw")
	flag.IntVar(&c.stunPorts[0], "stun-port", 3479, "UDP port of region 1's STUN")
	flag.IntVar(&c.stunPorts[1], "stun2-port", 3480, "UDP port of region 2's STUN")
	flag.IntVar(&c.canaryPort, "canary-port", 0, "TCP port of an HTTP server that only records who came")
	flag.BoolVar(&c.https, "https", false, "serve control over HTTPS")
	flag.StringVar(&c.certFile, "cert", "", "PEM chain for control and region 1; without it a CA is made")
	flag.StringVar(&c.keyFile, "key", "", "PEM private key of --cert")
	flag.StringVar(&c.caFile, "ca", "", "PEM of the CA behind --cert, only to be reported")
	flag.StringVar(&c.caOut, "ca-out", "", "file to write the CA's PEM to")
	flag.BoolVar(&c.derpInsecure, "derp-insecure", false, "tell clients not to verify region 1's certificate (InsecureForTests)")
	flag.BoolVar(&c.verbose, "verbose", false, "log what the servers say")
	flag.Parse()
	if flag.NArg() > 0 {
		log.Fatalf("unexpected argument %q", flag.Arg(0))
	}
	if !c.verbose {
		log.SetOutput(io.Discard)
	}

	bed, err := newBed(&c)
	if err != nil {
		log.SetOutput(os.Stderr)
		log.Fatal(err)
	}
	out := json.NewEncoder(os.Stdout)
	out.Encode(map[string]any{"ready": bed.ready()})
	serveOps(bed, os.Stdin, out)
}
