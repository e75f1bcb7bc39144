package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// pingPath begins the URLs that PingRequests ask nodes to answer to, inside Noise or outside.
const pingPath = "/ping/"

// pings are the PingRequests whose answers are waited for.
type pings struct {
	url string // of control

	mu      sync.Mutex
	waiting map[string]chan pingHit
}

// pingHit is one answer of a node.
type pingHit struct {
	Over   string          `json:"over"` // noise or plain
	Method string          `json:"method"`
	Body   json.RawMessage `json:"body,omitempty"`
}

func newPings(controlURL string) *pings {
	return &pings{url: controlURL, waiting: map[string]chan pingHit{}}
}

// open makes a URL for one PingRequest and the channel of its answers; close forgets it.
func (p *pings) open(noise bool) (answerTo string, hits <-chan pingHit, close func()) {
	token := rand.Text()
	incoming := make(chan pingHit, 16)
	p.mu.Lock()
	p.waiting[token] = incoming
	p.mu.Unlock()
	base := p.url
	if noise {
		// Inside Noise the scheme is always https. Source: Tailscale, control/ts2021, NewClient.
		if parsed, err := url.Parse(p.url); err == nil {
			base = "https://" + parsed.Host
		}
	}
	return base + pingPath + token, incoming, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.waiting, token)
	}
}

func (p *pings) answer(w http.ResponseWriter, r *http.Request, over string, body []byte) {
	p.mu.Lock()
	waiting := p.waiting[strings.TrimPrefix(r.URL.Path, pingPath)]
	p.mu.Unlock()
	if waiting == nil {
		http.NotFound(w, r)
		return
	}
	hit := pingHit{Over: over, Method: r.Method}
	if len(body) > 0 && json.Valid(body) {
		hit.Body = body
	}
	select {
	case waiting <- hit:
	default: // nobody wants so many
	}
	w.WriteHeader(http.StatusOK)
}

// collect waits for count answers, or less if the time is up.
func collect(hits <-chan pingHit, count int, limit time.Duration) []pingHit {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	got := []pingHit{}
	for len(got) < count {
		select {
		case hit := <-hits:
			got = append(got, hit)
		case <-ctx.Done():
			return got
		}
	}
	return got
}
