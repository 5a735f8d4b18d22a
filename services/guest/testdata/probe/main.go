// Command probe is a static program for images that have nothing else: it does one thing, named by its first argument.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	switch os.Args[1] {
	case "args":
		fmt.Println(strings.Join(os.Args[2:], "|"))
	case "exit":
		code, err := strconv.Atoi(os.Args[2])
		if err != nil {
			os.Exit(99)
		}
		os.Exit(code)
	case "id":
		groups, err := os.Getgroups()
		fmt.Println(os.Getuid(), os.Getgid(), groups, err)
	case "sleep":
		time.Sleep(time.Hour)
	case "ignore-term":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ignoring")
		time.Sleep(time.Hour)
	case "report-signals":
		signals := make(chan os.Signal, 8)
		signal.Notify(signals)
		fmt.Println("ready")
		for sig := range signals {
			if sig == syscall.SIGURG || sig == syscall.SIGCHLD {
				continue // the Go runtime's own
			}
			fmt.Println("got", sig)
			if sig == syscall.SIGTERM {
				os.Exit(42)
			}
		}
	case "orphan":
		// Starts a child that outlives its parent for a moment and then ends without anyone of its own to wait for it.
		if err := exec.Command("/proc/self/exe", "nap").Start(); err != nil {
			os.Exit(99)
		}
	case "nap":
		time.Sleep(50 * time.Millisecond)
	}
}
