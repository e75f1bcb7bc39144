package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"
)

// operation is one thing that a test can ask for.
type operation struct {
	run   func(*bed, json.RawMessage) (any, error)
	waits bool // it may take long: it runs beside the others
}

// operations by name. Each file ops_*.go adds its own.
var operations = map[string]operation{}

// answerLine is one line of output.
type answerLine struct {
	ID     json.RawMessage `json:"id,omitempty"`
	OK     bool            `json:"ok"`
	Result any             `json:"result,omitempty"`
	Error  string          `json:"error,omitempty"`
}

// does makes an operation of a function whose arguments are A's fields. Unknown arguments are
// errors: a misspelt one would otherwise make a test pass for the wrong reason.
func does[A any](run func(*bed, A) (any, error)) operation {
	return operation{run: func(b *bed, text json.RawMessage) (any, error) {
		var args A
		decoder := json.NewDecoder(bytes.NewReader(text))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&args); err != nil {
			return nil, err
		}
		return run(b, args)
	}}
}

func waits[A any](run func(*bed, A) (any, error)) operation {
	o := does(run)
	o.waits = true
	return o
}

// noArgs is for operations without arguments.
type noArgs struct{}

// onArg is for switches.
type onArg struct {
	On bool `json:"on"`
}

// serveOps runs operations until in ends.
func serveOps(b *bed, in io.Reader, out *json.Encoder) {
	var mu sync.Mutex
	answer := func(line answerLine) {
		mu.Lock()
		defer mu.Unlock()
		out.Encode(line)
	}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		text := bytes.Clone(lines.Bytes())
		if len(bytes.TrimSpace(text)) == 0 {
			continue
		}
		id, o, args, err := parseLine(text)
		if err != nil {
			answer(answerLine{ID: id, Error: err.Error()})
			continue
		}
		work := func() { answer(perform(b, id, o, args)) }
		if o.waits {
			go work()
		} else {
			work()
		}
	}
}

// parseLine takes the id and the operation out of a line; what is left are the arguments.
func parseLine(text []byte) (id json.RawMessage, o operation, args json.RawMessage, err error) {
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(text, &fields); err != nil {
		return nil, o, nil, err
	}
	id = fields["id"]
	var name string
	if err := json.Unmarshal(fields["op"], &name); err != nil {
		return id, o, nil, fmt.Errorf("op: %w", err)
	}
	o, ok := operations[name]
	if !ok {
		known := slices.Sorted(maps.Keys(operations))
		return id, o, nil, fmt.Errorf("no operation %q; there are %v", name, known)
	}
	delete(fields, "id")
	delete(fields, "op")
	args, err = json.Marshal(fields)
	return id, o, args, err
}

// perform turns a panic of testcontrol into an error: it panics on what it does not expect.
func perform(b *bed, id json.RawMessage, o operation, args json.RawMessage) (line answerLine) {
	line.ID = id
	defer func() {
		if cause := recover(); cause != nil {
			line = answerLine{ID: id, Error: fmt.Sprint(cause)}
		}
	}()
	result, err := o.run(b, args)
	if err != nil {
		line.Error = err.Error()
		return line
	}
	line.OK = true
	line.Result = result
	return line
}

// waitLimit is an operation's timeout_ms, or ten seconds.
func waitLimit(ms int) time.Duration {
	if ms == 0 {
		ms = 10_000
	}
	return time.Duration(ms) * time.Millisecond
}

// until looks every few milliseconds whether found has something, for at most limit.
func until[T any](limit time.Duration, what string, found func() (T, bool)) (T, error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		if value, ok := found(); ok {
			return value, nil
		}
		if time.Now().After(deadline) {
			var none T
			return none, fmt.Errorf("%s: not within %s", what, limit)
		}
	}
}
