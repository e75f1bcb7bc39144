package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/coder/websocket"
)

// newHandler is the whole web side of the site.
func newHandler(name string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "tailcar site %s\n", name)
	})
	mux.HandleFunc("/page", servePage)
	mux.HandleFunc("/r/{n}", serveResource)
	mux.HandleFunc("/ws", serveEcho)
	mux.HandleFunc("/bytes", serveBytes)
	mux.HandleFunc("/sum", serveSum)
	mux.HandleFunc("POST /upload", serveUpload)
	mux.HandleFunc("PUT /upload", serveUpload)
	mux.HandleFunc("/slow", serveSlow)
	mux.HandleFunc("/headers", serveHeaders)
	mux.HandleFunc("/chunked", serveChunked)
	mux.HandleFunc("/status/{code}", serveStatus)
	mux.HandleFunc("/close", serveClose)
	mux.HandleFunc("/continue", serveContinue)
	return mux
}

// uintParam is the query's number, or the default when it is absent. It answers 400 and reports
// false when it is no number.
func uintParam(w http.ResponseWriter, r *http.Request, name string, otherwise uint64) (uint64, bool) {
	text := r.FormValue(name)
	if text == "" {
		return otherwise, true
	}
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil {
		http.Error(w, name+" is not a number", http.StatusBadRequest)
		return 0, false
	}
	return n, true
}

// generated is the body that n= and seed= ask for, and its length.
func generated(w http.ResponseWriter, r *http.Request) (body io.Reader, n uint64, ok bool) {
	n, ok = uintParam(w, r, "n", 0)
	if !ok {
		return nil, 0, false
	}
	seed, ok := uintParam(w, r, "seed", 1)
	if !ok {
		return nil, 0, false
	}
	return io.LimitReader(newGenerator(seed), int64(n)), n, true
}

func serveBytes(w http.ResponseWriter, r *http.Request) {
	body, n, ok := generated(w, r)
	if !ok {
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatUint(n, 10))
	io.CopyBuffer(w, body, make([]byte, 64<<10))
}

func serveSum(w http.ResponseWriter, r *http.Request) {
	body, _, ok := generated(w, r)
	if !ok {
		return
	}
	sum, _ := sumOf(body)
	fmt.Fprintln(w, sum.SHA256)
}

func serveChunked(w http.ResponseWriter, r *http.Request) {
	body, _, ok := generated(w, r)
	if !ok {
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	controller := http.NewResponseController(w)
	controller.Flush() // the head goes first, so that the length cannot be known
	chunk := make([]byte, 4096)
	for {
		n, err := body.Read(chunk)
		if n > 0 {
			if _, err := w.Write(chunk[:n]); err != nil {
				return
			}
			controller.Flush()
		}
		if err != nil {
			return
		}
	}
}

func serveUpload(w http.ResponseWriter, r *http.Request) {
	sum, err := sumOf(r.Body)
	if err != nil {
		log.Printf("upload: %v", err)
		return
	}
	writeJSON(w, sum)
}

// serveContinue is an upload that must have been announced with Expect: 100-continue; net/http
// sends the interim answer when the body is first read.
func serveContinue(w http.ResponseWriter, r *http.Request) {
	expect := r.Header.Get("Expect")
	sum, err := sumOf(r.Body)
	if err != nil {
		log.Printf("continue: %v", err)
		return
	}
	writeJSON(w, struct {
		summed
		Expect string `json:"expect"`
	}{sum, expect})
}

func serveSlow(w http.ResponseWriter, r *http.Request) {
	ms, ok := uintParam(w, r, "ms", 1000)
	if !ok {
		return
	}
	select {
	case <-time.After(time.Duration(ms) * time.Millisecond):
		fmt.Fprintf(w, "slept %d ms\n", ms)
	case <-r.Context().Done():
	}
}

func serveHeaders(w http.ResponseWriter, r *http.Request) {
	sum, err := sumOf(r.Body)
	if err != nil {
		log.Printf("headers: %v", err)
		return
	}
	writeJSON(w, map[string]any{
		"method":      r.Method,
		"target":      r.RequestURI,
		"proto":       r.Proto,
		"host":        r.Host,
		"remote":      r.RemoteAddr,
		"local":       fmt.Sprint(r.Context().Value(http.LocalAddrContextKey)),
		"headers":     r.Header,
		"body_n":      sum.N,
		"body_sha256": sum.SHA256,
		"trailers":    r.Trailer,
	})
}

func serveStatus(w http.ResponseWriter, r *http.Request) {
	code, err := strconv.Atoi(r.PathValue("code"))
	if err != nil || code < 200 || code > 599 {
		http.Error(w, "code is 200 to 599", http.StatusBadRequest)
		return
	}
	w.WriteHeader(code)
	if code != http.StatusNoContent && code != http.StatusNotModified {
		fmt.Fprintf(w, "%d %s\n", code, http.StatusText(code))
	}
}

// serveClose promises a megabyte, sends a thousand bytes and closes; with reset=1 by RST.
func serveClose(w http.ResponseWriter, r *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n")
	io.CopyN(conn, newGenerator(1), 1000)
	if tcp, ok := conn.(*net.TCPConn); ok && r.FormValue("reset") == "1" {
		time.Sleep(resetDelay)
		tcp.SetLinger(0)
	}
}

// serveEcho returns every WebSocket message as it came, until the client closes.
func serveEcho(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		log.Printf("ws: %v", err)
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(64 << 20)
	for {
		kind, message, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		if err := conn.Write(r.Context(), kind, message); err != nil {
			return
		}
	}
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(value); err != nil {
		log.Printf("answer: %v", err)
	}
}
