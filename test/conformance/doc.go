// Package conformance holds the built programs to the Backend contract: the
// bare-metal worker, and a router before it, as processes with mutual TLS on lab
// hosts. What dies there dies by SIGKILL. `make test-e2e` builds what it uses.
package conformance
