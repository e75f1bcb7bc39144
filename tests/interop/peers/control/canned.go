package main

import (
	"io"
	"net/http"
	"slices"
)

// canned is an answer that the front gives instead of the server: a refusal, a rate limit, an error
// page of something in between, a register response with fields of the test's choice.
type canned struct {
	Path    string            `json:"path"` // the whole path, such as /machine/register or /key
	Status  int               `json:"status"`
	Headers map[string]string `json:"headers"`
	Body    string            `json:"body"`
	Times   int               `json:"times"` // how often; 0 is until cleared
}

// takeCanned is the oldest canned answer for path, or nil.
func (f *front) takeCanned(path string) *canned {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.knobs.canned, func(a *canned) bool { return a.Path == path })
	if i < 0 {
		return nil
	}
	answer := f.knobs.canned[i]
	if answer.Times == 1 {
		f.knobs.canned = slices.Delete(f.knobs.canned, i, i+1)
	} else if answer.Times > 1 {
		answer.Times--
	}
	return answer
}

func (a *canned) write(w http.ResponseWriter) {
	for name, value := range a.Headers {
		w.Header().Set(name, value)
	}
	w.WriteHeader(a.Status)
	io.WriteString(w, a.Body)
}
