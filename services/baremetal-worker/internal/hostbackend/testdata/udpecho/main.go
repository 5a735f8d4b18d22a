// Command udpecho answers every datagram to a port with what the second
// argument says. The test images have no program that listens to UDP.
package main

import (
	"fmt"
	"net"
	"os"
)

func main() {
	conn, err := net.ListenPacket("udp", ":"+os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	buffer := make([]byte, 1500)
	for {
		if _, from, err := conn.ReadFrom(buffer); err == nil {
			_, _ = conn.WriteTo([]byte(os.Args[2]+"\n"), from) // lost like any datagram
		}
	}
}
