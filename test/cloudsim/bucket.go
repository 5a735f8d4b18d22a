package cloudsim

import "time"

// Limit is how large a token bucket is and how fast it fills again.
type Limit struct {
	Burst     float64
	PerSecond float64
}

// Bucket is a cloud's token bucket for one kind of request. It is full at first.
// It is not safe for concurrent use.
type Bucket struct {
	limit  Limit
	tokens float64
	last   time.Time
}

// NewBucket makes a full bucket.
func NewBucket(limit Limit, now time.Time) *Bucket {
	return &Bucket{limit: limit, tokens: limit.Burst, last: now}
}

// Take takes n tokens if there are as many, and says whether it did.
func (b *Bucket) Take(n float64, now time.Time) bool {
	if since := now.Sub(b.last); since > 0 {
		b.tokens = min(b.limit.Burst, b.tokens+since.Seconds()*b.limit.PerSecond)
		b.last = now
	}
	if b.tokens < n {
		return false
	}
	b.tokens -= n
	return true
}
