package main

import (
	"encoding/json"
	"slices"
	"sync"
	"time"
)

// record is one request as the front saw it. What is known only later (the status, a stream's end)
// is filled in when it is.
type record struct {
	Seq     int             `json:"seq"`            // from 1, in order of arrival
	AtMS    float64         `json:"at_ms"`          // since the process started
	Kind    string          `json:"kind"`           // key, noise, register, map, ping, canary, http, or other (inside Noise)
	Over    string          `json:"over"`           // noise or plain
	Conn    int             `json:"conn,omitempty"` // the Noise connection's number
	Method  string          `json:"method"`         //
	Path    string          `json:"path"`           // with the query
	Machine string          `json:"machine,omitempty"`
	Version int             `json:"noise_version,omitempty"` // the protocol version of the Noise prologue
	NodeKey string          `json:"node_key,omitempty"`
	Body    json.RawMessage `json:"body,omitempty"` // of JSON bodies
	Text    string          `json:"text,omitempty"` // of other bodies
	Logout  bool            `json:"logout,omitempty"`
	Stream  bool            `json:"stream,omitempty"`
	Status  int             `json:"status,omitempty"`
	Fault   string          `json:"fault,omitempty"`    // of a stream that was broken on purpose
	Frames  int             `json:"frames,omitempty"`   // map responses sent
	EndedMS float64         `json:"ended_ms,omitempty"` // when a stream was over
}

// recorder keeps every request until it is told to forget.
type recorder struct {
	started time.Time

	mu      sync.Mutex
	seq     int
	records []*record
}

func newRecorder() *recorder {
	return &recorder{started: time.Now()}
}

func (r *recorder) now() float64 {
	return float64(time.Since(r.started).Microseconds()) / 1000
}

// add stores a request and returns it for later updates by edit.
func (r *recorder) add(entry record) *record {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seq++
	entry.Seq = r.seq
	entry.AtMS = r.now()
	r.records = append(r.records, &entry)
	return &entry
}

func (r *recorder) edit(entry *record, change func(*record)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(entry)
}

// selection says which records are wanted; what is absent does not matter.
type selection struct {
	Since   int    `json:"since"` // only those with a greater seq
	Kind    string `json:"kind"`
	NodeKey string `json:"node_key"`
	Path    string `json:"path"`
	Logout  *bool  `json:"logout"`
	Stream  *bool  `json:"stream"`
}

func (s *selection) wants(entry *record) bool {
	return entry.Seq > s.Since &&
		(s.Kind == "" || s.Kind == entry.Kind) &&
		(s.NodeKey == "" || s.NodeKey == entry.NodeKey) &&
		(s.Path == "" || s.Path == entry.Path) &&
		(s.Logout == nil || *s.Logout == entry.Logout) &&
		(s.Stream == nil || *s.Stream == entry.Stream)
}

func (r *recorder) selected(s *selection) []record {
	r.mu.Lock()
	defer r.mu.Unlock()
	found := []record{}
	for _, entry := range r.records {
		if s.wants(entry) {
			found = append(found, *entry)
		}
	}
	return found
}

func (r *recorder) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records = slices.Delete(r.records, 0, len(r.records))
}
