package ledger_test

import (
	"encoding/binary"
	"sync/atomic"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/ledger"
)

var lives atomic.Uint64 // so that each life is another grant's

// BenchmarkLedgerLife is all that the ledger does for one grant: claim, attempt,
// instance, a closure check, interim log, closure, gone, final log.
func BenchmarkLedgerLife(b *testing.B) {
	for name, l := range benched(b) {
		b.Run(name, func(b *testing.B) {
			ctx := b.Context()
			for b.Loop() {
				var id ledger.RequestID
				binary.BigEndian.PutUint64(id[24:], lives.Add(1))
				c := aClaim(1)
				c.RequestID = id
				err := func() error {
					if _, _, err := l.PutClaim(ctx, c); err != nil {
						return err
					}
					if _, _, err := l.BeginAttempt(ctx, id, c.ContentHash, render("p")); err != nil {
						return err
					}
					if _, _, err := l.PutInstance(ctx, ledger.Instance{RequestID: id, Attempt: 1}); err != nil {
						return err
					}
					if err := l.PutInterim(ctx, ledger.Log{RequestID: id, Sequence: 1}); err != nil {
						return err
					}
					if _, _, err := l.CloseGrant(ctx, ledger.Closure{RequestID: id}); err != nil {
						return err
					}
					if err := l.MarkGone(ctx, id, 1); err != nil {
						return err
					}
					_, _, err := l.PutFinal(ctx, ledger.Log{RequestID: id})
					return err
				}()
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkLedgerRead is a read of one row.
func BenchmarkLedgerRead(b *testing.B) {
	for name, l := range benched(b) {
		b.Run(name, func(b *testing.B) {
			ctx := b.Context()
			if _, _, err := l.PutClaim(ctx, aClaim(1)); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := l.Claim(ctx, id(1)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func benched(b *testing.B) map[string]*ledger.Ledger {
	b.Helper()
	return map[string]*ledger.Ledger{"sqlite": sqliteStore(b).open(b), "postgres": postgresStore(b).open(b)}
}
