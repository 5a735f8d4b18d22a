// Package conformance holds the built programs to the Backend contract: the
// bare-metal worker, and a router before it, as processes with mutual TLS on lab
// hosts. What dies there dies by SIGKILL. `make test` and `make test-long` build what they use.
package conformance
