// Package backendfake is an in-memory provider of compute with faults on
// demand, and a worker.Driver on it. It is for tests: of the worker's runtime,
// of the router, and of the conformance suite in package backendtest.
//
// A [Provider] holds hosts and the instances on them, and plays the part of a
// cloud or of real machines: it goes on when the worker is gone, ends
// instances at their deadline by itself, makes creates idempotent by token,
// takes time to delete, and may show new instances late. A test holds the
// Provider and opens a [Driver] on it, more than one in turn to play restarts
// of the worker.
//
// Every call of the provider's API passes one hook point, named by an [Op].
// [Provider.Inject] puts a [Fault] there: a refusal, an outage, a call that
// hangs, an answer that is lost after its effect, or the death of the calling
// process before or after the effect.
//
// The provider doesn't stop a driver from putting more on a host than it has
// room for, unless it is told to: as on bare metal, that is the driver's task.
package backendfake
