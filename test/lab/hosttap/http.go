package hosttap

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// maxHead bounds a request's head.
const maxHead = 1 << 20

var errHTTP = errors.New("no HTTP request")

// apiVersion is the front of the paths of podman's API.
var apiVersion = regexp.MustCompile(`^/v[0-9.]+/libpod`)

// httpStream is a connection to podman's API. Its client sends a request only
// after the answer to the one before.
type httpStream struct {
	body int64 // what the request still has to send; of the requests' side alone

	mu      sync.Mutex
	id      uint32
	waiting bool // for the beginning of an answer
}

func newHTTP() *httpStream { return &httpStream{} }

// request implements protocol.
func (h *httpStream) request(b []byte) (unit, error) {
	if h.body > 0 {
		n := min(int64(len(b)), h.body)
		h.body -= n
		return unit{length: int(n), part: true}, nil
	}
	end := bytes.Index(b, []byte("\r\n\r\n"))
	if end < 0 {
		if len(b) > maxHead {
			return unit{}, errHTTP
		}
		return unit{}, nil
	}
	end += len("\r\n\r\n")
	first, fields, _ := strings.Cut(string(b[:end]), "\r\n")
	words := strings.Split(first, " ")
	if len(words) != 3 || !strings.HasPrefix(words[2], "HTTP/1.") || !strings.HasPrefix(words[1], "/") {
		return unit{}, errHTTP
	}
	for field := range strings.SplitSeq(fields, "\r\n") {
		name, value, _ := strings.Cut(field, ":")
		switch strings.ToLower(name) {
		case "content-length":
			n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil || n < 0 {
				return unit{}, errHTTP
			}
			h.body = n
		case "transfer-encoding", "upgrade":
			return unit{}, errHTTP // not used; forwarded as it is
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.id++
	h.waiting = true
	target, _, _ := strings.Cut(words[1], "?")
	return unit{length: end, id: h.id, answers: true, call: &Call{
		Point:    stable("podman." + words[0] + " " + apiVersion.ReplaceAllString(target, "")),
		Mutates:  words[0] != http.MethodGet && words[0] != http.MethodHead,
		Mentions: mentioned([]byte(words[1])),
	}}, nil
}

// answer implements protocol.
func (h *httpStream) answer(b []byte) (unit, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	u := unit{length: len(b), id: h.id, answers: h.waiting}
	h.waiting = false
	return u, nil
}

// refuse implements protocol.
func (h *httpStream) refuse(_ uint32, kind Kind) []byte {
	h.mu.Lock()
	h.waiting = false
	h.mu.Unlock()
	status := http.StatusInternalServerError
	switch kind {
	case Denied, Unauthenticated:
		status = http.StatusForbidden
	case Throttled:
		status = http.StatusServiceUnavailable
	case Capacity, Quota, Unavailable, Slow, LostAnswer, CrashBefore, CrashAfter:
	}
	body := fmt.Sprintf(`{"cause":%q,"message":%q,"response":%d}`, said(kind), said(kind), status)
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", status, http.StatusText(status), len(body), body)
}
