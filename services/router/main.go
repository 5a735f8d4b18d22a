// Command router serves the union of several backends as one backend: it gives
// each grant to the first backend, in the operator's order, that satisfies it.
package main

import "github.com/compute-bridge/compute-bridge/services/router/internal/server"

func main() { server.Program().Main() }
