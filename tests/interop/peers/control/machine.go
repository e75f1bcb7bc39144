package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// bodyLimit bounds a request's body, as Tailscale's servers do.
const bodyLimit = 1 << 20

// clientConn is one node's Noise connection: the handler of the HTTP/2 requests inside it.
type clientConn struct {
	front    *front
	number   int
	noise    *controlbase.Conn
	upstream *http2.ClientConn
}

// ServeHTTP records a request and sends it where it belongs.
func (c *clientConn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, bodyLimit))
	if err != nil {
		return
	}
	entry := c.record(r, body)
	seen := &statusWriter{ResponseWriter: w}
	defer func() { c.front.records.edit(entry, func(e *record) { e.Status = seen.status }) }()

	if answer := c.front.takeCanned(r.URL.Path); answer != nil {
		answer.write(seen)
		return
	}
	switch path := r.URL.Path; {
	case path == "/machine/register":
		c.serveRegister(seen, r, body, entry)
	case path == "/machine/map":
		c.serveMap(seen, r, body, entry)
	case strings.HasPrefix(path, pingPath):
		c.front.pings.answer(seen, r, "noise", body)
	case knownUpstream(path):
		c.forward(seen, r, body)
	default:
		http.NotFound(seen, r)
	}
}

// knownUpstream tells the paths that testcontrol serves from those that end its process.
func knownUpstream(path string) bool {
	switch path {
	case "/machine/set-dns", "/machine/update-health",
		"/machine/tka/init/begin", "/machine/tka/init/finish", "/machine/tka/bootstrap",
		"/machine/tka/sync/offer", "/machine/tka/sign":
		return true
	}
	return strings.HasPrefix(path, "/c2n/") ||
		strings.HasPrefix(path, "/machine/webclient/init/") ||
		strings.HasPrefix(path, "/machine/webclient/wait/")
}

func (c *clientConn) record(r *http.Request, body []byte) *record {
	entry := record{
		Kind:    "other",
		Over:    "noise",
		Conn:    c.number,
		Method:  r.Method,
		Path:    r.URL.RequestURI(),
		Machine: c.noise.Peer().String(),
		Version: c.noise.ProtocolVersion(),
	}
	switch {
	case r.URL.Path == "/machine/register":
		entry.Kind = "register"
	case r.URL.Path == "/machine/map":
		entry.Kind = "map"
	case strings.HasPrefix(r.URL.Path, pingPath):
		entry.Kind = "ping"
	}
	if json.Valid(body) {
		entry.Body = body
	} else {
		entry.Text = string(body)
	}
	return c.front.records.add(entry)
}

func (c *clientConn) serveRegister(w http.ResponseWriter, r *http.Request, body []byte, entry *record) {
	var request tailcfg.RegisterRequest
	if err := decodeRequest(body, &request, &request.NodeKey, &request.Version); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	logout := !request.Expiry.IsZero() && request.Expiry.Before(time.Now())
	c.front.records.edit(entry, func(e *record) {
		e.NodeKey = request.NodeKey.String()
		e.Logout = logout
	})
	if logout {
		// testcontrol would ask for the auth key again, and would let the node stay as it is.
		c.front.expire(request.NodeKey, time.Now().Add(-time.Second))
		json.NewEncoder(w).Encode(tailcfg.RegisterResponse{NodeKeyExpired: true})
		return
	}
	if request.Hostinfo == nil {
		http.Error(w, "register without Hostinfo", http.StatusBadRequest)
		return
	}
	c.forward(w, r, body)
	c.front.keepSignature(&request)
}

// decodeRequest decodes and checks what testcontrol would end the process for.
func decodeRequest(body []byte, request any, node *key.NodePublic, version *tailcfg.CapabilityVersion) error {
	if err := json.Unmarshal(body, request); err != nil {
		return err
	}
	if node.IsZero() {
		return errors.New("no NodeKey")
	}
	if *version == 0 {
		return errors.New("no Version")
	}
	return nil
}

// expire sets a node's key expiry and tells its peers.
func (f *front) expire(node key.NodePublic, at time.Time) bool {
	known := f.control.Node(node)
	if known == nil {
		return false
	}
	known.KeyExpiry = at
	f.control.UpdateNode(known)
	return true
}

// forward passes a request on and copies the answer as it comes.
func (c *clientConn) forward(w http.ResponseWriter, r *http.Request, body []byte) {
	answer, err := c.ask(r, body)
	if err != nil {
		log.Printf("upstream %s: %v", r.URL.Path, err)
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer answer.Body.Close()
	copyHead(w, answer)
	io.Copy(w, answer.Body)
}

// ask sends the request to testcontrol with another body.
func (c *clientConn) ask(r *http.Request, body []byte) (*http.Response, error) {
	request, err := http.NewRequestWithContext(r.Context(), r.Method, "https://testcontrol"+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for name, values := range r.Header {
		if name != "Content-Length" {
			request.Header[name] = values
		}
	}
	return c.upstream.RoundTrip(request)
}

func copyHead(w http.ResponseWriter, answer *http.Response) {
	for name, values := range answer.Header {
		if name != "Content-Length" {
			w.Header()[name] = values
		}
	}
	w.WriteHeader(answer.StatusCode)
}
