package ec2backend

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// counter is a shared read that counts how often it was made and takes a second.
func counter(reads *atomic.Int64, fail error) func(context.Context) (int64, error) {
	return func(ctx context.Context) (int64, error) {
		n := reads.Add(1)
		return n, errors.Join(sleep(ctx, time.Second), fail)
	}
}

func TestManyWhoAskAtOnceShareReads(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		s := newShared(t.Context(), time.Second, counter(&reads, nil))
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				if err := sleep(t.Context(), time.Duration(i)*10*time.Millisecond); err != nil { // over two seconds
					t.Error(err)
				}
				asked := time.Now()
				got, err := s.now(t.Context())
				if err != nil || got.asked.Before(asked) {
					t.Errorf("asked at %v, got what was read at %v: %v", asked, got.asked, err)
				}
			})
		}
		wg.Wait()
		if n := reads.Load(); n > 4 {
			t.Errorf("200 questions within 2 s made %d reads of 1 s", n)
		}
		s.reads.Wait()
	})
}

func TestWhoPollsUsesWhatOthersRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		s := newShared(t.Context(), 0, counter(&reads, nil))
		first, err := s.now(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var polled result[int64]
		var wg sync.WaitGroup
		wg.Go(func() { polled, _ = s.next(t.Context(), first.asked, time.Minute) })
		synctest.Wait()
		fresh, err := s.now(t.Context())
		wg.Wait()
		if err != nil || polled != fresh || reads.Load() != 2 {
			t.Errorf("polled %+v, read %+v (%v), %d reads", polled, fresh, err, reads.Load())
		}
		before := time.Now()
		if _, err := s.next(t.Context(), fresh.asked, time.Minute); err != nil || time.Since(before) < 58*time.Second {
			t.Errorf("with nobody else asking, the poll came after %s: %v", time.Since(before), err)
		}
		s.reads.Wait()
	})
}

func TestReadThatFailsIsToldToAllWhoWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		broken := errors.New("broken")
		s := newShared(t.Context(), 0, counter(&reads, broken))
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := s.now(t.Context()); !errors.Is(err, broken) {
					t.Errorf("got %v", err)
				}
			})
		}
		wg.Wait()
		s.reads.Wait()
	})
}

func TestReadOutlivesWhoAskedFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		life, end := context.WithCancel(t.Context())
		s := newShared(life, 0, counter(&reads, nil))
		impatient, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := s.now(impatient); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		end()
		if _, err := s.now(t.Context()); !errors.Is(err, context.Canceled) {
			t.Errorf("after the end of the process: %v", err)
		}
		s.reads.Wait()
	})
}
