// Command tiny is all that the distroless test images hold. Its first argument
// says what it does.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
)

func main() {
	mode := "serve"
	if len(os.Args) > 1 {
		mode = os.Args[1]
	}
	switch mode {
	case "serve": // until SIGTERM
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
		fmt.Println("tiny: serving")
		fmt.Println("tiny: got", <-stop)
	case "exit": // at once, with the code that follows
		code, err := strconv.Atoi(os.Args[2])
		if err != nil {
			fmt.Fprintln(os.Stderr, "tiny:", err)
			os.Exit(2)
		}
		os.Exit(code)
	case "stubborn": // ignores every signal that can be ignored
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
		fmt.Println("tiny: stubborn")
		never := make(chan os.Signal, 1)
		signal.Notify(never, syscall.SIGUSR2)
		for range never {
		}
	default:
		fmt.Fprintln(os.Stderr, "tiny: unknown mode", mode)
		os.Exit(2)
	}
}
