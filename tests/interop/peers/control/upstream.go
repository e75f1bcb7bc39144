package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/net/memnet"
	"tailscale.com/net/netutil"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// upstream is the way to testcontrol, in memory. Its handlers for register and map accept only
// requests that came through its own Noise server, so the front is a Noise client to it: one
// connection, and one machine key, for each of the front's own clients.
type upstream struct {
	listener *memnet.Listener
	noiseKey key.MachinePublic
}

func newUpstream(control *testcontrol.Server) (*upstream, error) {
	// Asking for the key also makes testcontrol generate it.
	answer := httptest.NewRecorder()
	control.ServeHTTP(answer, httptest.NewRequest("GET", fmt.Sprintf("/key?v=%d", tailcfg.CurrentCapabilityVersion), nil))
	var keys tailcfg.OverTLSPublicKeyResponse
	if err := json.NewDecoder(answer.Body).Decode(&keys); err != nil {
		return nil, err
	}
	u := &upstream{listener: memnet.Listen("testcontrol:80"), noiseKey: keys.PublicKey}
	go plainServer(control).Serve(u.listener)
	return u, nil
}

// dial does what a node does: upgrade, Noise handshake, HTTP/2.
// Source: Tailscale, control/controlhttp, Dialer.tryURLUpgrade.
func (u *upstream) dial(ctx context.Context, machine key.MachinePrivate, version uint16) (*http2.ClientConn, error) {
	conn, err := u.listener.Dial(ctx, "tcp", "testcontrol:80")
	if err != nil {
		return nil, err
	}
	client, err := u.handshake(ctx, conn, machine, version)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return client, nil
}

func (u *upstream) handshake(ctx context.Context, conn net.Conn, machine key.MachinePrivate, version uint16) (*http2.ClientConn, error) {
	initiation, finish, err := controlbase.ClientDeferred(machine, u.noiseKey, version)
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintf(conn, "POST /ts2021 HTTP/1.1\r\nHost: testcontrol\r\nConnection: upgrade\r\n"+
		"Upgrade: tailscale-control-protocol\r\nX-Tailscale-Handshake: %s\r\nContent-Length: 0\r\n\r\n",
		base64.StdEncoding.EncodeToString(initiation))
	if err != nil {
		return nil, err
	}
	buffered := bufio.NewReader(conn)
	answer, err := http.ReadResponse(buffered, nil)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusSwitchingProtocols {
		return nil, errors.New("testcontrol answered " + answer.Status)
	}
	noise, err := finish(ctx, netutil.NewDrainBufConn(conn, buffered))
	if err != nil {
		return nil, err
	}
	return new(http2.Transport).NewClientConn(noise)
}
