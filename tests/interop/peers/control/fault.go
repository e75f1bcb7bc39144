package main

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log"
	"slices"
	"time"

	"tailscale.com/types/key"
)

// fault is something that happens to a map stream once, at a chosen message.
type fault struct {
	// Kind is what happens:
	//
	//	silent          nothing more is sent
	//	no_head         not even the response's head is sent
	//	half_frame      a length, half the message that it promises, then Then (silent)
	//	oversize        a length of Size, Fill bytes, then Then (silent)
	//	garbage         a well-framed message that is no JSON
	//	bad_zstd        a well-framed message that no zstd decoder takes
	//	empty           a message of no bytes
	//	frame           the message JSON
	//	bytes           the bytes Hex, as they are
	//	dribble         from now on all is sent Chunk bytes at a time
	//	unknown_fields  from now on messages have fields that no client knows
	//	end             the response ends in order
	//	reset           RST_STREAM
	//	close           the whole connection is closed
	Kind    string          `json:"kind"`
	Node    string          `json:"node"`     // empty: any
	After   *int            `json:"after"`    // messages sent before; default 1, but 0 for dribble and unknown_fields
	DelayMS int             `json:"delay_ms"` // and so long after that
	Times   *int            `json:"times"`    // streams to break; default 1, 0 is until cleared
	Then    string          `json:"then"`     // what follows: go_on, silent, end, reset, close
	Size    *uint32         `json:"size"`     // default 0xffffffff
	Fill    int             `json:"fill"`
	Hex     string          `json:"hex"`
	JSON    json.RawMessage `json:"json"`
	Chunk   int             `json:"chunk"` // default 7

	node  key.NodePublic
	bytes []byte
	used  int
}

// defaultThen is what follows each kind if the test does not say, and with that the list of kinds.
var defaultThen = map[string]string{
	"silent":         "silent",
	"no_head":        "silent",
	"half_frame":     "silent",
	"oversize":       "silent",
	"garbage":        "go_on",
	"bad_zstd":       "go_on",
	"empty":          "go_on",
	"frame":          "go_on",
	"bytes":          "go_on",
	"dribble":        "go_on",
	"unknown_fields": "go_on",
	"end":            "end",
	"reset":          "reset",
	"close":          "close",
}

// prepare checks a fault and fills in the defaults.
func (f *fault) prepare() error {
	then, ok := defaultThen[f.Kind]
	if !ok {
		return fmt.Errorf("no fault of kind %q", f.Kind)
	}
	if f.Then == "" {
		f.Then = then
	}
	if !slices.Contains([]string{"go_on", "silent", "end", "reset", "close"}, f.Then) {
		return fmt.Errorf("nothing follows as %q", f.Then)
	}
	if f.After == nil {
		f.After = new(1)
		if f.Kind == "dribble" || f.Kind == "unknown_fields" {
			f.After = new(0)
		}
	}
	if f.Times == nil {
		f.Times = new(1)
	}
	if f.Size == nil {
		f.Size = new(^uint32(0))
	}
	if f.Chunk == 0 {
		f.Chunk = 7
	}
	var err error
	f.bytes, err = hex.DecodeString(f.Hex)
	return err
}

// strike does what the fault says and returns what follows.
func (s *stream) strike(ctx context.Context, f *fault) (then string) {
	log.Printf("fault %s on the stream of %s", f.Kind, s.node.ShortString())
	select {
	case <-time.After(time.Duration(f.DelayMS) * time.Millisecond):
	case <-ctx.Done():
		return "end"
	}
	var err error
	switch f.Kind {
	case "half_frame":
		whole := framed([]byte(`{"KeepAlive":true,"Domain":"this message never ends"}`))
		err = s.write(ctx, whole[:len(whole)/2])
	case "oversize":
		err = s.write(ctx, append(binary.LittleEndian.AppendUint32(nil, *f.Size), make([]byte, f.Fill)...))
	case "garbage":
		err = s.send(ctx, []byte(`{"KeepAlive":tru`))
	case "bad_zstd":
		err = s.write(ctx, framed([]byte("\x28\xb5\x2f\xfdnot a zstd frame")))
	case "empty":
		err = s.write(ctx, framed(nil))
	case "frame":
		err = s.send(ctx, f.JSON)
	case "bytes":
		err = s.write(ctx, f.bytes)
	case "dribble":
		s.chunk = f.Chunk
	case "unknown_fields":
		s.alien = true
	}
	if err != nil {
		return "end"
	}
	return f.Then
}

// takeFault is the oldest fault that is meant for this node, or nil.
func (f *front) takeFault(node key.NodePublic) *fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.knobs.faults, func(armed *fault) bool {
		return armed.node.IsZero() || armed.node == node
	})
	if i < 0 {
		return nil
	}
	armed := f.knobs.faults[i]
	armed.used++
	if armed.used == *armed.Times {
		f.knobs.faults = slices.Delete(f.knobs.faults, i, i+1)
	}
	return armed
}

// silence lasts until the client goes away or the faults are cleared.
func (f *front) silence(ctx context.Context) {
	f.mu.Lock()
	cleared := f.cleared
	f.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-cleared:
	}
}

// clearFaults disarms what waits and ends the streams that are silent.
func (f *front) clearFaults() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.knobs.faults = nil
	close(f.cleared)
	f.cleared = make(chan struct{})
}

// withUnknownFields adds members of every JSON type to a MapResponse, wherever a client decodes a
// structure.
func withUnknownFields(message []byte) []byte {
	var root map[string]any
	if err := json.Unmarshal(message, &root); err != nil {
		return message
	}
	alienate(root)
	for _, name := range []string{"Node", "DNSConfig", "DERPMap", "Debug", "PingRequest"} {
		alienate(root[name])
	}
	for _, name := range []string{"Peers", "PeersChanged", "PeersChangedPatch", "PacketFilter", "UserProfiles"} {
		list, _ := root[name].([]any)
		for _, item := range list {
			alienate(item)
			if object, ok := item.(map[string]any); ok {
				alienate(object["Hostinfo"])
			}
		}
	}
	changed, err := json.Marshal(root)
	if err != nil {
		return message
	}
	return changed
}

func alienate(value any) {
	object, ok := value.(map[string]any)
	if !ok {
		return
	}
	object["ZzObject"] = map[string]any{"a": []any{1, "x", nil}, "b": map[string]any{}}
	object["ZzNumber"] = 1e300
	object["ZzText"] = "\u0000 \u2028 \U0001f511"
	object["ZzNull"] = nil
	object["ZzFlag"] = true
}
