// Command site is the private site behind a tailnet: HTTP pages, WebSocket, and TCP and UDP
// services whose behaviour a proxy must carry faithfully (half-close, resets, silence, banners).
//
// It prints "ready" when everything listens, then one line "http ADDR" (or "https ADDR") for each
// web listener, so that port 0 can be used.
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	log.SetFlags(log.Lmicroseconds)
	log.SetPrefix("site: ")
	var (
		httpAddrs  = flag.String("http", "", "HOST:PORT[,HOST:PORT...] to serve HTTP on; port 0 is allowed")
		httpsAddrs = flag.String("https", "", "HOST:PORT[,HOST:PORT...] to serve HTTPS on; needs --cert and --key")
		certFile   = flag.String("cert", "", "PEM certificate chain for --https")
		keyFile    = flag.String("key", "", "PEM private key for --https")
		tcpHosts   = flag.String("tcp", "", "HOST[,HOST...] for the TCP services and the UDP echo")
		name       = flag.String("name", "site", "the name that / answers with")
		stdin      = flag.Bool("stdin", false, "exit when stdin ends")
	)
	flag.Parse()

	report := &strings.Builder{}
	report.WriteString("ready\n")
	server := &http.Server{Handler: newHandler(*name), ReadHeaderTimeout: 30 * time.Second}
	for _, addr := range list(*httpAddrs) {
		listener := mustListen(addr)
		fmt.Fprintf(report, "http %s\n", listener.Addr())
		go func() { log.Fatal(server.Serve(listener)) }()
	}
	for _, addr := range list(*httpsAddrs) {
		listener := mustListen(addr)
		fmt.Fprintf(report, "https %s\n", listener.Addr())
		go func() { log.Fatal(server.ServeTLS(listener, *certFile, *keyFile)) }()
	}
	for _, host := range list(*tcpHosts) {
		if err := serveHost(host); err != nil {
			log.Fatal(err)
		}
	}

	// One write: a reader that goes away after the first line must not cost us a SIGPIPE.
	os.Stdout.WriteString(report.String())
	if *stdin {
		io.Copy(io.Discard, os.Stdin)
		return
	}
	select {}
}

// list splits a comma-separated flag; an empty flag is an empty list.
func list(flagValue string) []string {
	if flagValue == "" {
		return nil
	}
	return strings.Split(flagValue, ",")
}

func mustListen(addr string) net.Listener {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		log.Fatal(err)
	}
	return listener
}
