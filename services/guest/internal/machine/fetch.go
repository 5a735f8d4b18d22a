package machine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"lukechampine.com/blake3"

	"github.com/compute-bridge/compute-bridge/services/guest/guestapi"
)

// Waits of a fetch.
const (
	// patience is how long a machine tries: some minutes after its start, its network is up or never will be.
	patience = 5 * time.Minute
	// stallTimeout is how long a store may send nothing.
	stallTimeout = 30 * time.Second
	firstPause   = 500 * time.Millisecond
	maxPause     = 10 * time.Second
	// mismatches is how often another digest is taken for an accident of the transfer.
	mismatches = 2
)

// fetcher fetches an image by its digest.
type fetcher struct {
	client   *http.Client
	patience time.Duration
	stall    time.Duration
	pause    time.Duration
	// told hears of each attempt that failed.
	told func(*FailureError)
}

func newFetcher(told func(*FailureError)) *fetcher {
	return &fetcher{
		client: &http.Client{Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			TLSHandshakeTimeout:   10 * time.Second,
			ResponseHeaderTimeout: stallTimeout,
			// The digest is that of the bytes as they are stored.
			DisableCompression: true,
		}},
		patience: patience, stall: stallTimeout, pause: firstPause, told: told,
	}
}

// fetch writes the image to file. It tries again as long as another attempt may go better. Failures never name the
// URL, which may be signed.
func (f *fetcher) fetch(ctx context.Context, image guestapi.MachineImage, file string) *FailureError {
	defer f.client.CloseIdleConnections()
	giveUp := time.Now().Add(f.patience)
	wrong := 0
	for pause := f.pause; ; pause = min(2*pause, maxPause) {
		failure := f.attempt(ctx, image, file)
		if failure == nil {
			return nil
		}
		if failure.Reason == guestapi.ReasonImageHashMismatch {
			wrong++
		}
		if failure.final || wrong == mismatches || ctx.Err() != nil || time.Now().Add(pause).After(giveUp) {
			return failure
		}
		f.told(failure)
		select {
		case <-ctx.Done():
			return failure
		case <-time.After(pause):
		}
	}
}

func (f *fetcher) attempt(ctx context.Context, image guestapi.MachineImage, file string) *FailureError {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, image.URL, http.NoBody)
	if err != nil {
		return finally(guestapi.ReasonImageUnavailable, "the image's URL is none")
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return failed(guestapi.ReasonImageUnavailable, "the image can't be fetched: %v", withoutURL(err))
	}
	defer resp.Body.Close()
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
	case code >= 400 && code < 500 && code != http.StatusRequestTimeout && code != http.StatusTooManyRequests:
		return finally(guestapi.ReasonImageUnavailable, "the image can't be fetched: the store answers %s", status(code))
	default:
		return failed(guestapi.ReasonImageUnavailable, "the image can't be fetched: the store answers %s", status(code))
	}
	if resp.ContentLength > image.MaxBytes {
		return finally(guestapi.ReasonImageInvalid, "the image has %d bytes, at most %d are allowed", resp.ContentLength,
			image.MaxBytes)
	}
	body := &watchedReader{r: resp.Body, timeout: f.stall, watchdog: time.AfterFunc(f.stall, func() { cancel(errStalled) })}
	defer body.watchdog.Stop()
	if failure := f.save(body, image, file); failure != nil {
		if errors.Is(context.Cause(ctx), errStalled) {
			return failed(guestapi.ReasonImageUnavailable, "the image can't be fetched: no data arrived for %s", f.stall)
		}
		return failure
	}
	return nil
}

// save writes what is read and compares its digest.
func (f *fetcher) save(body io.Reader, image guestapi.MachineImage, file string) *FailureError {
	out, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return unfit(err)
	}
	defer out.Close()
	algorithm, want, _ := strings.Cut(image.Digest, ":")
	h := newHash(algorithm)
	sink := &sinkWriter{w: out}
	n, err := io.CopyBuffer(io.MultiWriter(sink, h), io.LimitReader(body, image.MaxBytes+1), make([]byte, 1<<20))
	switch {
	case sink.err != nil:
		return unfit(sink.err)
	case err != nil:
		return failed(guestapi.ReasonImageUnavailable, "the image can't be fetched: %v", withoutURL(err))
	case n > image.MaxBytes:
		return finally(guestapi.ReasonImageInvalid, "the image has more than the %d bytes that are allowed", image.MaxBytes)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return failed(guestapi.ReasonImageHashMismatch, "the image has %s %s, not %s", algorithm, got, want)
	}
	if err := out.Close(); err != nil {
		return unfit(err)
	}
	return nil
}

// newHash knows the two algorithms that guestapi accepts.
func newHash(algorithm string) hash.Hash {
	if algorithm == "blake3" {
		return blake3.New(32, nil)
	}
	return sha256.New()
}

// sinkWriter tells a full disk from a lost connection: io.Copy doesn't.
type sinkWriter struct {
	w   io.Writer
	err error
}

// Write implements io.Writer.
func (s *sinkWriter) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.err = err
	return n, err
}

var errStalled = errors.New("no data arrived")

// watchedReader gives its watchdog more time with each Read. The disk's time counts as well: it is far below the limit.
type watchedReader struct {
	r        io.Reader
	timeout  time.Duration
	watchdog *time.Timer
}

// Read implements io.Reader.
func (w *watchedReader) Read(p []byte) (int, error) {
	w.watchdog.Reset(w.timeout)
	return w.r.Read(p)
}

func status(code int) string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", code, http.StatusText(code)))
}

// withoutURL is the cause of a request's error: net/http quotes the whole URL.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}

// unfit is a failure of the machine itself.
func unfit(err error) *FailureError {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return finally(guestapi.ReasonHostUnfit, "the machine's disk is too small for the image: %v", err)
	}
	return finally(guestapi.ReasonHostUnfit, "%v", err)
}
