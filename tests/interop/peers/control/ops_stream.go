package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"

	"tailscale.com/tailcfg"
)

func init() {
	operations["recorded"] = does(func(b *bed, a selection) (any, error) {
		return b.front.records.selected(&a), nil
	})
	operations["await_recorded"] = waits(awaitRecorded)
	operations["forget"] = does(func(b *bed, _ noArgs) (any, error) {
		b.front.records.forget()
		return nil, nil
	})

	operations["answer"] = does(addCanned)
	operations["rate_limit"] = does(rateLimit)
	operations["clear_answers"] = does(func(b *bed, _ noArgs) (any, error) {
		b.front.mu.Lock()
		defer b.front.mu.Unlock()
		b.front.knobs.canned = nil
		return nil, nil
	})
	operations["early_payload"] = does(func(b *bed, a onArg) (any, error) {
		b.front.mu.Lock()
		defer b.front.mu.Unlock()
		b.front.knobs.earlyPayload = a.On
		return nil, nil
	})
	operations["close_conns"] = does(closeConns)

	operations["stream_fault"] = does(addFault)
	operations["clear_faults"] = does(func(b *bed, _ noArgs) (any, error) {
		b.front.clearFaults()
		return nil, nil
	})
	operations["break_stream"] = does(breakStream)
	operations["compress"] = does(setCompress)
	operations["hold_map"] = does(holdMap)
	operations["raw_map"] = does(rawMap)
	operations["raw_frame"] = does(rawFrame)
	operations["ping"] = waits(ping)
	operations["c2n"] = waits(c2n)
}

// awaitRecorded waits until count (1) records are there that the selection wants, and returns them.
func awaitRecorded(b *bed, a struct {
	selection
	Count     int `json:"count"`
	TimeoutMS int `json:"timeout_ms"`
}) (any, error) {
	return until(waitLimit(a.TimeoutMS), "records", func() ([]record, bool) {
		found := b.front.records.selected(&a.selection)
		return found, len(found) >= max(a.Count, 1)
	})
}

func addCanned(b *bed, a canned) (any, error) {
	if !strings.HasPrefix(a.Path, "/") || a.Status < 200 || a.Status > 599 {
		return nil, errors.New("a path and a status are needed")
	}
	b.front.mu.Lock()
	defer b.front.mu.Unlock()
	b.front.knobs.canned = append(b.front.knobs.canned, &a)
	return nil, nil
}

// rateLimit refuses the next registrations with 429.
func rateLimit(b *bed, a struct {
	Times      int    `json:"times"`
	RetryAfter string `json:"retry_after"` // seconds or an HTTP date; empty sends none
	Message    string `json:"message"`
}) (any, error) {
	answer := canned{Path: "/machine/register", Status: http.StatusTooManyRequests, Times: a.Times, Body: a.Message}
	if a.RetryAfter != "" {
		answer.Headers = map[string]string{"Retry-After": a.RetryAfter}
	}
	return addCanned(b, answer)
}

// closeConns closes every Noise connection, as a restarting server would.
func closeConns(b *bed, _ noArgs) (any, error) {
	b.front.mu.Lock()
	defer b.front.mu.Unlock()
	for c := range b.front.conns {
		c.noise.Close()
	}
	return len(b.front.conns), nil
}

// addFault arms a fault for the next stream that opens; with break_stream it can be had at once.
func addFault(b *bed, a fault) (any, error) {
	if err := a.prepare(); err != nil {
		return nil, err
	}
	if a.Node != "" {
		n, err := b.node(a.Node)
		if err != nil {
			return nil, err
		}
		a.node = n.Key
	}
	b.front.mu.Lock()
	defer b.front.mu.Unlock()
	b.front.knobs.faults = append(b.front.knobs.faults, &a)
	return nil, nil
}

func (b *bed) stream(ref string) (*stream, error) {
	n, err := b.node(ref)
	if err != nil {
		return nil, err
	}
	s := b.front.liveStream(n.Key)
	if s == nil {
		return nil, fmt.Errorf("node %q has no map stream", ref)
	}
	return s, nil
}

func breakStream(b *bed, a struct {
	nodeArg
	How string `json:"how"` // end, reset, close, silent
}) (any, error) {
	if _, ok := defaultThen[a.How]; !ok {
		return nil, fmt.Errorf("a stream cannot %q", a.How)
	}
	s, err := b.stream(a.Node)
	if err != nil {
		return nil, err
	}
	select {
	case s.cut <- a.How:
	default:
	}
	return nil, nil
}

func setCompress(b *bed, a struct {
	Mode string `json:"mode"` // as_asked, never, always
}) (any, error) {
	switch a.Mode {
	case compressAsAsked, compressNever, compressAlways:
	default:
		return nil, fmt.Errorf("no mode %q", a.Mode)
	}
	b.front.mu.Lock()
	defer b.front.mu.Unlock()
	b.front.knobs.compress = a.Mode
	return nil, nil
}

// holdMap holds map requests that come from now on, or lets them go.
func holdMap(b *bed, a struct {
	Which string `json:"which"` // stream, lite; empty is both
	On    bool   `json:"on"`
}) (any, error) {
	kinds := []string{"stream", "lite"}
	if a.Which != "" {
		kinds = []string{a.Which}
	}
	b.front.mu.Lock()
	defer b.front.mu.Unlock()
	for _, kind := range kinds {
		held := b.front.knobs.holds[kind]
		if a.On && held == nil {
			b.front.knobs.holds[kind] = make(chan struct{})
		} else if !a.On && held != nil {
			close(held)
			delete(b.front.knobs.holds, kind)
		}
	}
	return nil, nil
}

// rawMap sends a MapResponse; from then on testcontrol sends the node none of its own accord.
func rawMap(b *bed, a struct {
	nodeArg
	Map *tailcfg.MapResponse `json:"map"`
}) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	if a.Map == nil || !b.control.AddRawMapResponse(n.Key, a.Map) {
		return nil, errors.New("no map, or the node has no stream")
	}
	return nil, nil
}

// rawFrame sends any JSON as a message, and leaves testcontrol's own messages alone.
func rawFrame(b *bed, a struct {
	nodeArg
	Frame json.RawMessage `json:"frame"`
}) (any, error) {
	s, err := b.stream(a.Node)
	if err != nil {
		return nil, err
	}
	select {
	case s.inject <- a.Frame:
		return nil, nil
	default:
		return nil, errors.New("the stream does not take more")
	}
}

// ping sends a PingRequest and returns the answers: as many as there are types, or fewer when the
// time is up.
func ping(b *bed, a struct {
	nodeArg
	Types     string     `json:"types"` // empty for HEAD, or disco,TSMP,ICMP,peerapi
	IP        netip.Addr `json:"ip"`
	Noise     bool       `json:"noise"` // URLIsNoise
	URL       string     `json:"url"`   // instead of ours, to see whether a node follows it
	TimeoutMS int        `json:"timeout_ms"`
}) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	url, hits, done := b.front.pings.open(a.Noise)
	defer done()
	if a.URL != "" {
		url = a.URL
	}
	request := &tailcfg.PingRequest{URL: url, URLIsNoise: a.Noise, Types: a.Types, IP: a.IP, Log: true}
	if !b.control.AddPingRequest(n.Key, request) {
		return nil, errors.New("the node has no map stream")
	}
	return collect(hits, 1+strings.Count(a.Types, ","), waitLimit(a.TimeoutMS)), nil
}

// c2nAnswer is what a node answered to a request that control sent it.
type c2nAnswer struct {
	Status  int         `json:"status"`
	Headers http.Header `json:"headers"`
	Body    string      `json:"body"`
}

func c2n(b *bed, a struct {
	nodeArg
	Method    string            `json:"method"` // default GET
	Path      string            `json:"path"`
	Headers   map[string]string `json:"headers"`
	Body      string            `json:"body"`
	TimeoutMS int               `json:"timeout_ms"`
}) (any, error) {
	n, err := b.node(a.Node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit(a.TimeoutMS))
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, a.Method, "http://c2n"+a.Path, strings.NewReader(a.Body))
	if err != nil {
		return nil, err
	}
	for name, value := range a.Headers {
		request.Header.Set(name, value)
	}
	// The answer's body can be read only while testcontrol handles it.
	answers := make(chan c2nAnswer, 1)
	err = b.control.SendC2N(n.Key, request, func(answer *http.Response) {
		body, _ := io.ReadAll(answer.Body)
		answers <- c2nAnswer{Status: answer.StatusCode, Headers: answer.Header, Body: string(body)}
	})
	if err != nil {
		return nil, err
	}
	select {
	case answer := <-answers:
		return answer, nil
	case <-ctx.Done():
		return nil, errors.New("no answer in time")
	}
}
