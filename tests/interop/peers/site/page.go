package main

import (
	"encoding/base64"
	"fmt"
	"html"
	"net/http"
	"strconv"
	"strings"
)

// resources is how many subresources /page asks for: more than the six connections that a browser
// opens to one host, so that some wait for a free one.
const resources = 30

// pixel is a transparent GIF of one pixel.
var pixel = func() []byte {
	gif, err := base64.StdEncoding.DecodeString("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
	if err != nil {
		panic(err)
	}
	return gif
}()

// kindOf is what /r/N is: the four kinds take turns.
func kindOf(n int) string {
	return [...]string{"style", "script", "image", "fetch"}[n%4]
}

// pageHead counts what arrives; only when all have settled does it say so, in the title and in
// #result, where a driver of a headless browser can wait for it.
const pageHead = `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>loading</title>
<script>
let loaded = 0, failed = 0, ws = 'pending';
function settle() {
  if (loaded + failed < %d || ws === 'pending') return;
  const text = 'resources=' + loaded + ' ws=' + ws;
  const show = () => { document.getElementById('result').textContent = text; document.title = text; };
  if (document.getElementById('result')) show(); else addEventListener('DOMContentLoaded', show);
}
function ok() { loaded++; settle(); }
function bad() { failed++; settle(); }
function get(url) {
  const path = new URL(url, location).pathname;
  fetch(url).then(r => r.ok ? r.text() : Promise.reject(r.status)).then(t => t === path ? ok() : bad()).catch(bad);
}
function echo() {
  const socket = new WebSocket((location.protocol === 'https:' ? 'wss://' : 'ws://') + location.host + '/ws');
  const end = (state) => { if (ws === 'pending') { ws = state; settle(); } };
  socket.onopen = () => socket.send('hello');
  socket.onmessage = (event) => { end(event.data === 'hello' ? 'ok' : 'wrong'); socket.close(); };
  socket.onerror = () => end('error');
  socket.onclose = () => end('closed');
}
echo();
</script>
`

// servePage serves the page. Its subresources come from the hosts in the host= parameters in turn, or
// from its own without any.
func servePage(w http.ResponseWriter, r *http.Request) {
	hosts := r.URL.Query()["host"]
	head, body := &strings.Builder{}, &strings.Builder{}
	fmt.Fprintf(head, pageHead, resources)
	for n := 1; n <= resources; n++ {
		path := fmt.Sprintf("/r/%d", n)
		if len(hosts) > 0 {
			path = "http://" + html.EscapeString(hosts[n%len(hosts)]) + path
		}
		switch kindOf(n) {
		case "style":
			fmt.Fprintf(head, "<link rel=\"stylesheet\" href=\"%s\" onload=\"ok()\" onerror=\"bad()\">\n", path)
		case "script":
			fmt.Fprintf(body, "<script async src=\"%s\" onload=\"ok()\" onerror=\"bad()\"></script>\n", path)
		case "image":
			fmt.Fprintf(body, "<img src=\"%s\" alt=\"\" onload=\"ok()\" onerror=\"bad()\">\n", path)
		case "fetch":
			fmt.Fprintf(body, "<script>get('%s')</script>\n", path)
		}
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	fmt.Fprintf(w, "%s</head>\n<body>\n<p id=\"result\">loading</p>\n%s</body>\n</html>\n", head, body)
}

func serveResource(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.Atoi(r.PathValue("n"))
	if err != nil || n < 1 || n > resources {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Access-Control-Allow-Origin", "*") // pages of other hosts fetch it too
	switch kindOf(n) {
	case "style":
		w.Header().Set("Content-Type", "text/css; charset=utf-8")
		fmt.Fprintf(w, ".r%d { color: #%06x }\n", n, n*0x10101)
	case "script":
		w.Header().Set("Content-Type", "text/javascript; charset=utf-8")
		fmt.Fprintf(w, "globalThis.r%d = true;\n", n)
	case "image":
		w.Header().Set("Content-Type", "image/gif")
		w.Write(pixel)
	case "fetch":
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprint(w, r.URL.Path)
	}
}
