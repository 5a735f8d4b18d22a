package imagestore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// httpStore is an HTTPS server with files.
type httpStore struct {
	base   *url.URL
	client *http.Client
	max    int64
	idle   time.Duration
}

// maxRedirects allows a server to send us to another path of its own, which
// none does often.
const maxRedirects = 5

func newHTTPStore(base *url.URL, cfg Config) *httpStore {
	return &httpStore{
		base: base,
		max:  cfg.MaxBytes,
		idle: cfg.IdleTimeout,
		client: &http.Client{
			Transport: &http.Transport{
				Proxy:               http.ProxyFromEnvironment,
				TLSClientConfig:     &tls.Config{RootCAs: cfg.RootCAs, MinVersion: tls.VersionTLS12},
				ForceAttemptHTTP2:   true,
				DisableCompression:  true, // The digest is over the bytes as stored.
				MaxIdleConnsPerHost: 4,
				IdleConnTimeout:     90 * time.Second,
			},
			CheckRedirect: func(req *http.Request, via []*http.Request) error {
				if len(via) > maxRedirects {
					return fmt.Errorf("more than %d redirects", maxRedirects)
				}
				if req.URL.Scheme != base.Scheme || req.URL.Host != base.Host || req.URL.User != nil {
					return fmt.Errorf("redirect to another host, %s", req.URL.Host)
				}
				return nil
			},
		},
	}
}

// Close releases idle connections.
func (s *httpStore) Close() error {
	s.client.CloseIdleConnections()
	return nil
}

// Open implements [Store].
func (s *httpStore) Open(ctx context.Context, image Image) (_ io.ReadCloser, _ int64, err error) {
	path, err := image.Path(s.base.String())
	if err != nil {
		return nil, 0, err
	}
	most, err := limit(s.max, image)
	if err != nil {
		return nil, 0, err
	}
	// Segments are of unreserved characters only, so that joining is all.
	address := s.base.String() + "/" + path

	b := &httpBody{parent: ctx, idle: s.idle}
	b.ctx, b.cancel = context.WithCancelCause(ctx)
	b.watchdog = time.AfterFunc(s.idle, func() { b.cancel(errStalled) })
	defer func() {
		if err != nil {
			_ = b.Close()
		}
	}()
	req, err := http.NewRequestWithContext(b.ctx, http.MethodGet, address, http.NoBody)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrInvalidPointer, err)
	}
	resp, err := s.client.Do(req) //nolint:bodyclose // Closed with b, by the caller or above.
	b.watchdog.Stop()
	if err != nil {
		return nil, 0, b.wrap(err)
	}
	b.body = resp.Body
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound, http.StatusGone:
		return nil, 0, fmt.Errorf("%w: %s", ErrNotFound, path)
	default:
		return nil, 0, fmt.Errorf("%w: %s answers %s", ErrUnavailable, s.base.Host, strings.TrimSpace(resp.Status))
	}
	if resp.ContentLength > most {
		return nil, 0, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrTooLarge, resp.ContentLength, most)
	}
	return readCloser{NewVerifyingReader(b, image.Digest, most), b}, resp.ContentLength, nil
}

// errStalled is the cause with which the watchdog ends a transfer.
var errStalled = errors.New("no data arrived")

// httpBody is a response's body that fails when it stalls. Its watchdog runs
// only while it waits for the server, so that a slow consumer is no stall.
type httpBody struct {
	parent   context.Context //nolint:containedctx // It belongs to one call of Open.
	ctx      context.Context //nolint:containedctx // As above.
	cancel   context.CancelCauseFunc
	watchdog *time.Timer
	idle     time.Duration
	body     io.ReadCloser
}

// Read implements [io.Reader].
func (b *httpBody) Read(p []byte) (int, error) {
	b.watchdog.Reset(b.idle)
	n, err := b.body.Read(p)
	b.watchdog.Stop()
	if err != nil && !errors.Is(err, io.EOF) {
		err = b.wrap(err)
	}
	return n, err
}

// Close ends the transfer.
func (b *httpBody) Close() error {
	b.watchdog.Stop()
	b.cancel(context.Canceled)
	if b.body == nil {
		return nil
	}
	return b.body.Close()
}

// wrap tells the caller's own end, a stall and all else apart.
func (b *httpBody) wrap(err error) error {
	switch {
	case b.parent.Err() != nil:
		return b.parent.Err()
	case errors.Is(context.Cause(b.ctx), errStalled):
		return fmt.Errorf("%w: %w for %s", ErrUnavailable, errStalled, b.idle)
	default:
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
}
