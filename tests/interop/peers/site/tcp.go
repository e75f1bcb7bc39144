package main

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"net"
	"strconv"
	"strings"
	"time"
)

// resetDelay lets bytes already written reach the client before a reset overtakes them.
const resetDelay = 100 * time.Millisecond

// services are the TCP services by port. Each owns its connection until it returns; the caller
// closes it.
var services = map[int]func(*net.TCPConn){
	7:    echo,
	9:    discard,
	19:   generate,
	5001: resetAfterByte,
	5002: byeThenReset,
	5003: silent,
	5004: banner,
}

// serveHost binds every TCP service and the UDP echo on host.
func serveHost(host string) error {
	for port, service := range services {
		listener, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err != nil {
			return err
		}
		go accept(listener, service)
	}
	packets, err := net.ListenPacket("udp", net.JoinHostPort(host, "7"))
	if err != nil {
		return err
	}
	go echoPackets(packets)
	return nil
}

func accept(listener net.Listener, service func(*net.TCPConn)) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatalf("accept on %s: %v", listener.Addr(), err)
		}
		go func() {
			defer conn.Close()
			service(conn.(*net.TCPConn))
		}()
	}
}

// echo returns what comes, also what is still on its way when the client has ended its side.
func echo(conn *net.TCPConn) {
	io.Copy(conn, conn)
	conn.CloseWrite()
}

// discard tells how much came and its SHA-256, once the client has ended its side.
func discard(conn *net.TCPConn) {
	sum, err := sumOf(conn)
	if err != nil {
		return
	}
	fmt.Fprintf(conn, "%d %s\n", sum.N, sum.SHA256)
	conn.CloseWrite()
}

// generate reads a line with a number and sends that many bytes of seed 1.
func generate(conn *net.TCPConn) {
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return
	}
	n, err := strconv.ParseUint(strings.TrimSpace(line), 10, 63)
	if err != nil {
		return
	}
	io.CopyBuffer(conn, io.LimitReader(newGenerator(1), int64(n)), make([]byte, 64<<10))
	conn.CloseWrite()
	awaitEnd(conn)
}

func resetAfterByte(conn *net.TCPConn) {
	io.ReadFull(conn, make([]byte, 1))
	conn.SetLinger(0)
}

func byeThenReset(conn *net.TCPConn) {
	io.WriteString(conn, "bye")
	time.Sleep(resetDelay)
	conn.SetLinger(0)
}

// silent reads, so that it notices the client's end, and never answers.
func silent(conn *net.TCPConn) {
	awaitEnd(conn)
}

func banner(conn *net.TCPConn) {
	io.WriteString(conn, "220 hello\r\n")
	echo(conn)
}

// awaitEnd reads to the client's end: to close with unread bytes would send a reset.
func awaitEnd(conn *net.TCPConn) {
	io.Copy(io.Discard, conn)
}

func echoPackets(packets net.PacketConn) {
	buffer := make([]byte, 64<<10)
	for {
		n, from, err := packets.ReadFrom(buffer)
		if err != nil {
			log.Printf("udp echo: %v", err)
			continue
		}
		packets.WriteTo(buffer[:n], from)
	}
}
