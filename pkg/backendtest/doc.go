// Package backendtest is the conformance suite of the Backend contract: what
// the header of backend.proto promises and the seven laws demand, as cases that
// any backend can be held to.
//
// A backend's tests call [Run] with a [Harness] that opens a [Fixture]: a fresh
// provider with a backend on it, and handles by which the suite looks behind
// the backend, makes workloads end, makes the provider fail and restarts the
// worker. Cases run in process and again over gRPC; only those that are about
// the provider's side alone run once. What can't apply to a backend is excepted
// by name and with a reason; nothing is left out silently.
//
// The groups "crash", "faults" and "orphans" sweep: they record which calls a
// clean run makes to the provider and to the ledger, and then make that run
// again for each thing that can go wrong at each of those calls. The suite tells
// how much it swept, and what it left out ([Sweep], [ReportDirectory]).
//
// A worker that is a process of its own takes part by a Backend that is a gRPC
// client of it and that picks its connection, and so its certificate, by the
// caller in the context.
//
// Some things hold in every case and are checked all the time: errors are
// classified, their reasons are those of the method, what they say about what
// exists is true; TERMINATED means that nothing is left; a grant never has two
// instances at once, nor two final logs; watches begin with the state and end
// with the log, and their logs' numbers don't go back; no secret is in an error
// or a log. Every case ends by ending its grants, after which the provider must
// hold nothing, and goroutines must be gone.
package backendtest
