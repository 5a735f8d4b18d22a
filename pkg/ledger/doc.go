// Package ledger is the small SQL store of what no platform remembers: which
// backend a grant was given to, what was about to be created for it, that it
// was closed, and its final account. What runs is never read from here; that
// is read from the platform itself.
//
// Each table has one law, held by constraints and triggers of the database,
// not only by this code, so that a second process, an older binary or a shell
// does not break it either:
//
//   - claims: one row per grant, put if absent. Content, owner and record never
//     change. Backend and generation change only by compare-and-swap
//     ([Ledger.MoveClaim]), the generation never back, and not after the end.
//     A sealed login key is set at most once, so that a
//     retried request returns the same key.
//   - intents: the numbered attempts to create something for a grant, written
//     before the create call, with the rendered parameters, which never change:
//     a retry sends the very same ones. At most one attempt of a grant is open;
//     numbers are 1, 2, 3, ... without gaps; an attempt goes from open to gone
//     and never back; none begins once the grant is closed or has a final log.
//     A process that takes up another's attempt, and one that undoes it, each
//     say so first ([Ledger.ResumeAttempt], [Ledger.EndAttempt]): who undoes an
//     attempt must have seen the last time it was taken up, and what is being
//     undone is never taken up again.
//   - closures: put if absent, never changed, never removed. A grant may be
//     closed that was never seen: whatever arrives later for it is refused.
//   - compute_logs: an interim log is replaced only by one with a higher
//     sequence number, and by none once there is a final log. A final log is
//     put if absent and never changed or removed.
//   - fences: per grant, up to which fence calls were refused; it only grows.
//     No claim is put or moved, and no attempt begun, under such a call.
//   - instances: what the first success of an attempt returned, put if absent,
//     so that a retry returns the same bytes.
//   - workers: the processes that work for a backend, and when each last said
//     so. It has no law: nothing but the patience of a sweep depends on it.
//
// # Durability and sharing
//
// A method that returned without an error has its effect on disk. A write
// whose error is not one of the domain errors may or may not have happened;
// every write is idempotent, so that the caller asks again. The SQLite file
// may be used by many goroutines and by several processes of one machine, but
// must be on a local file system, because the write-ahead log needs shared
// memory between its users. A PostgreSQL database may be used by processes of
// any number of machines. Write transactions of one grant run one after the
// other, over all processes; with SQLite, those of all grants do.
//
// # Errors
//
// [ErrNotFound], [ErrClosed], [ErrConflict], [ErrStale] and [FencedError] speak
// about the data. When the caller's context was cancelled the error is
// [context.Canceled]. Everything else, from a locked file or a full disk to a
// corrupted page, is [ErrUnavailable]: new grants must stop, watching and
// ending old ones must go on.
//
// Byte slices and identities are opaque to this package; it knows nothing of
// the wire format or of backends. Times are stored as microseconds since the
// Unix epoch in UTC, and are returned so.
package ledger
