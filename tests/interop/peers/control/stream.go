package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"slices"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/util/zstdframe"
)

// How map responses are compressed, whatever testcontrol would do.
const (
	compressAsAsked = "as_asked"
	compressNever   = "never"
	compressAlways  = "always"
)

// stream is one map request being answered: frames from testcontrol, frames that the test injects,
// and at most one fault.
type stream struct {
	conn     *clientConn
	node     key.NodePublic
	w        http.ResponseWriter
	entry    *record
	compress bool
	inject   chan []byte
	cut      chan string // end, reset or close
	sent     int
	chunk    int  // frames go out in pieces of so many bytes; 0 is whole
	alien    bool // frames get fields that no client knows
}

// serveMap answers streaming and other map requests. testcontrol is always asked for plain JSON, so
// that frames can be seen and changed here.
func (c *clientConn) serveMap(w http.ResponseWriter, r *http.Request, body []byte, entry *record) {
	var request tailcfg.MapRequest
	if err := decodeRequest(body, &request, &request.NodeKey, &request.Version); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c.front.records.edit(entry, func(e *record) {
		e.NodeKey = request.NodeKey.String()
		e.Stream = request.Stream
	})
	if !c.front.awaitRelease(r.Context(), request.Stream) {
		return
	}
	plain, err := withoutCompress(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s := &stream{
		conn:     c,
		node:     request.NodeKey,
		w:        w,
		entry:    entry,
		compress: c.front.compresses(request.Compress != ""),
		inject:   make(chan []byte, 64),
		cut:      make(chan string, 1),
	}
	defer func() {
		c.front.records.edit(entry, func(e *record) { e.EndedMS = c.front.records.now() })
	}()
	var broken *fault
	if request.Stream {
		broken = c.front.takeFault(request.NodeKey)
	}
	if broken != nil && broken.Kind == "no_head" {
		s.note(broken)
		c.front.silence(r.Context())
		return
	}

	answer, err := c.ask(r, plain)
	if err != nil {
		log.Printf("map: %v", err)
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer answer.Body.Close()
	copyHead(w, answer)
	c.front.records.edit(entry, func(e *record) { e.Status = answer.StatusCode })
	if answer.StatusCode != http.StatusOK {
		io.Copy(w, answer.Body)
		return
	}
	s.flush()
	if request.Stream {
		c.front.setStream(s)
		defer c.front.endStream(s)
	} else {
		c.front.approveRoutes(request.NodeKey, request.Hostinfo)
	}
	s.run(r.Context(), answer.Body, broken)
}

// run passes frames on until either side ends or a fault ends it.
func (s *stream) run(ctx context.Context, from io.Reader, broken *fault) {
	frames := make(chan []byte)
	go readFrames(ctx, from, frames)
	for {
		if broken != nil && s.sent >= *broken.After {
			s.note(broken)
			if then := s.strike(ctx, broken); then != "go_on" {
				s.leave(ctx, then)
				return
			}
			broken = nil
		}
		select {
		case <-ctx.Done():
			return
		case how := <-s.cut:
			s.leave(ctx, how)
			return
		case frame := <-s.inject:
			if s.send(ctx, frame) != nil {
				return
			}
		case frame, ok := <-frames:
			if !ok || s.send(ctx, s.conn.front.altered(s.node, frame)) != nil {
				return
			}
		}
	}
}

// leave ends the stream in the way that a fault or an operation asks for.
func (s *stream) leave(ctx context.Context, how string) {
	switch how {
	case "silent":
		s.conn.front.silence(ctx)
	case "reset":
		panic(http.ErrAbortHandler) // net/http's way to ask for RST_STREAM
	case "close":
		s.conn.noise.Close()
	}
}

// readFrames cuts testcontrol's answer into its messages and closes the channel at its end.
// Source: Tailscale, tstest/integration/testcontrol, Server.sendMapMsg.
func readFrames(ctx context.Context, from io.Reader, frames chan<- []byte) {
	defer close(frames)
	for {
		var size [4]byte
		if _, err := io.ReadFull(from, size[:]); err != nil {
			return
		}
		frame := make([]byte, binary.LittleEndian.Uint32(size[:]))
		if _, err := io.ReadFull(from, frame); err != nil {
			return
		}
		select {
		case frames <- frame:
		case <-ctx.Done():
			return
		}
	}
}

// send frames one MapResponse given as JSON.
func (s *stream) send(ctx context.Context, message []byte) error {
	if s.alien {
		message = withUnknownFields(message)
	}
	if s.compress {
		message = zstdframe.AppendEncode(nil, message, zstdframe.FastestCompression)
	}
	if err := s.write(ctx, framed(message)); err != nil {
		return err
	}
	s.sent++
	s.conn.front.records.edit(s.entry, func(e *record) { e.Frames = s.sent })
	return nil
}

func framed(payload []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(payload))), payload...)
}

// write puts bytes on the stream, in small pieces if a fault said so.
func (s *stream) write(ctx context.Context, data []byte) error {
	if s.chunk == 0 {
		if _, err := s.w.Write(data); err != nil {
			return err
		}
		return s.flush()
	}
	for piece := range slices.Chunk(data, s.chunk) {
		if _, err := s.w.Write(piece); err != nil {
			return err
		}
		if err := s.flush(); err != nil {
			return err
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (s *stream) flush() error {
	return http.NewResponseController(s.w).Flush()
}

func (s *stream) note(f *fault) {
	s.conn.front.records.edit(s.entry, func(e *record) { e.Fault = f.Kind })
}

// setStream makes s the node's newest stream, the one that injected frames go to.
func (f *front) setStream(s *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.streams[s.node] = s
}

func (f *front) endStream(s *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.streams[s.node] == s {
		delete(f.streams, s.node)
	}
}

// liveStream is the node's stream if it has had a first message.
func (f *front) liveStream(node key.NodePublic) *stream {
	f.mu.Lock()
	s := f.streams[node]
	f.mu.Unlock()
	if s == nil {
		return nil
	}
	served := false
	f.records.edit(s.entry, func(e *record) { served = e.Frames > 0 })
	if !served {
		return nil
	}
	return s
}

func (f *front) compresses(asked bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.knobs.compress == compressAlways || asked && f.knobs.compress == compressAsAsked
}

// awaitRelease blocks while map requests of this sort are held; false if the client went away.
func (f *front) awaitRelease(ctx context.Context, streaming bool) bool {
	which := "lite"
	if streaming {
		which = "stream"
	}
	f.mu.Lock()
	held := f.knobs.holds[which]
	f.mu.Unlock()
	if held == nil {
		return true
	}
	select {
	case <-held:
		return true
	case <-ctx.Done():
		return false
	}
}

func withoutCompress(body []byte) ([]byte, error) {
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(body, &fields); err != nil {
		return nil, err
	}
	delete(fields, "Compress")
	return json.Marshal(fields)
}
