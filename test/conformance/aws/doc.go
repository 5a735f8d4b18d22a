// Package aws holds the built AWS worker to the Backend contract: as a process
// with mutual TLS, on a simulated EC2 with quick machines. It dies by SIGKILL.
// `make test` and `make test-long` build what they use.
package aws
