package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"strings"
	"sync"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/control/controlhttp/controlhttpserver"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// front is the control server that nodes see. It ends their Noise connections, records what they
// ask, answers what the test wants answered otherwise, and passes the rest on to testcontrol.
// That also keeps testcontrol alive: it ends the process on a path or body that it does not know.
type front struct {
	control  *testcontrol.Server
	upstream *upstream
	records  *recorder
	pings    *pings
	noiseKey key.MachinePrivate

	mu       sync.Mutex
	conns    map[*clientConn]bool
	numConns int
	machines map[key.MachinePublic]key.MachinePrivate // a client's key to ours towards testcontrol
	streams  map[key.NodePublic]*stream               // the newest of each node
	knobs    knobs
	cleared  chan struct{} // closed when faults are cleared

	settling sync.Mutex // approvals happen one after the other
}

// knobs are what operations set; guarded by front.mu.
type knobs struct {
	earlyPayload bool
	approval     approval
	altered      map[key.NodePublic]*alteration
	compress     string // as_asked, never, always
	canned       []*canned
	faults       []*fault
	holds        map[string]chan struct{} // stream or lite, to a channel that is closed at release
}

func newFront(control *testcontrol.Server, url string) *front {
	up, err := newUpstream(control)
	if err != nil {
		log.Panic(err)
	}
	return &front{
		control:  control,
		upstream: up,
		records:  newRecorder(),
		pings:    newPings(url),
		noiseKey: key.NewMachine(),
		conns:    map[*clientConn]bool{},
		machines: map[key.MachinePublic]key.MachinePrivate{},
		streams:  map[key.NodePublic]*stream{},
		knobs: knobs{
			compress: compressAsAsked,
			holds:    map[string]chan struct{}{},
			altered:  map[key.NodePublic]*alteration{},
		},
		cleared: make(chan struct{}),
	}
}

// ServeHTTP is the outside: the key, the upgrade to Noise, and ping answers that came in the clear.
func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	entry := record{Kind: "http", Over: "plain", Method: r.Method, Path: r.URL.RequestURI()}
	switch {
	case r.URL.Path == "/key":
		entry.Kind = "key"
	case r.URL.Path == "/ts2021":
		entry.Kind = "noise"
	case strings.HasPrefix(r.URL.Path, pingPath):
		entry.Kind = "ping"
	}
	kept := f.records.add(entry)
	seen := &statusWriter{ResponseWriter: w}
	defer func() { f.records.edit(kept, func(e *record) { e.Status = seen.status }) }()

	if answer := f.takeCanned(r.URL.Path); answer != nil {
		answer.write(seen)
		return
	}
	switch kept.Kind {
	case "key":
		f.serveKey(seen, r)
	case "noise":
		seen.status = http.StatusSwitchingProtocols
		f.serveNoise(w, r)
	case "ping":
		body, _ := io.ReadAll(io.LimitReader(r.Body, bodyLimit))
		f.pings.answer(seen, r, "plain", body)
	default:
		if r.URL.Path == "/generate_204" {
			seen.WriteHeader(http.StatusNoContent)
			return
		}
		http.NotFound(seen, r)
	}
}

func (f *front) serveKey(w http.ResponseWriter, r *http.Request) {
	if r.FormValue("v") == "" {
		http.Error(w, "the v parameter is missing", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(tailcfg.OverTLSPublicKeyResponse{PublicKey: f.noiseKey.Public()})
}

// serveNoise serves one client's connection to its end.
func (f *front) serveNoise(w http.ResponseWriter, r *http.Request) {
	var early func(int, io.Writer) error
	f.mu.Lock()
	if f.knobs.earlyPayload {
		early = writeEarlyPayload
	}
	f.mu.Unlock()
	noise, err := controlhttpserver.AcceptHTTP(r.Context(), w, r, f.noiseKey, early)
	if err != nil {
		log.Printf("noise: %v", err)
		return
	}
	defer noise.Close()

	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	up, err := f.upstream.dial(ctx, f.machineFor(noise.Peer()), uint16(noise.ProtocolVersion()))
	if err != nil {
		log.Printf("upstream: %v", err)
		return
	}
	defer up.Close()
	c := f.addConn(noise, up)
	defer f.dropConn(c)
	new(http2.Server).ServeConn(noise, &http2.ServeConnOpts{
		Context:    ctx,
		BaseConfig: &http.Server{Handler: c, ErrorLog: log.Default()},
	})
}

// writeEarlyPayload sends what Tailscale's and headscale's servers send before HTTP/2.
// Source: Tailscale, control/ts2021, Conn.readHeader.
func writeEarlyPayload(_ int, w io.Writer) error {
	text, err := json.Marshal(tailcfg.EarlyNoise{NodeKeyChallenge: key.NewChallenge().Public()})
	if err != nil {
		return err
	}
	payload := binary.BigEndian.AppendUint32([]byte("\xff\xff\xffTS"), uint32(len(text)))
	_, err = w.Write(append(payload, text...))
	return err
}

// machineFor is the machine key that stands for a client towards testcontrol, which insists that a
// node keeps its own.
func (f *front) machineFor(client key.MachinePublic) key.MachinePrivate {
	f.mu.Lock()
	defer f.mu.Unlock()
	private, ok := f.machines[client]
	if !ok {
		private = key.NewMachine()
		f.machines[client] = private
	}
	return private
}

func (f *front) addConn(noise *controlbase.Conn, up *http2.ClientConn) *clientConn {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.numConns++
	c := &clientConn{front: f, number: f.numConns, noise: noise, upstream: up}
	f.conns[c] = true
	return c
}

func (f *front) dropConn(c *clientConn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c)
}

// statusWriter remembers the status for the record.
type statusWriter struct {
	http.ResponseWriter
	status int
}

// WriteHeader notes the first status.
func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write notes the status that a first write implies.
func (w *statusWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController flush.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
