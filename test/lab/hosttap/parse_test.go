package hosttap

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

func TestCommandNamesAreStable(t *testing.T) {
	id := strings.Repeat("ab", 32)
	for line, want := range map[string]string{
		`'env' LC_ALL=C nft --file -`:                                                            "exec.nft!",
		`'env' LC_ALL=C nft --json 'list table inet x'`:                                          "exec.nft list",
		`'/var/lib/compute-bridge/b/guest/` + id + `' digest -algorithm sha256 /x`:               "exec.guest digest",
		`'env' LC_ALL=C /usr/bin/podman --root=/x --runroot=/y load --quiet --input=/f`:          "exec.podman load!",
		`'env' 'LC_ALL=C' sh -c 'cat > "$1" && sync "$1" && stat -c %s -- "$1"' sh /x/.tmp-0011`: "exec.sh cat!",
		`'sh' -c 'it'\''s' sh`:         "exec.sh it's!",
		`'date' -u +%s.%N`:             "exec.date",
		`'ip' -netns x address show`:   "exec.ip show",
		`'systemd-stdio-bridge'`:       bridgeDBus,
		`'podman' system dial-stdio`:   bridgePodman,
		`''`:                           "exec..!",
		``:                             "exec.?!",
		`'x' 'unfinished`:              "exec.x!",
		`'/sbin/tool17' --port 40000`:  "exec.toolN!",
		`'podman' network reload cb-x`: "exec.podman network reload!",
	} {
		c := parseCommand(line)
		got := c.bridge
		if c.call != nil {
			got = names([]Call{*c.call})[0]
		}
		if got != want {
			t.Errorf("%s is %q, want %q", line, got, want)
		}
	}
}

func FuzzDBus(f *testing.F) {
	f.Add(callMessage(7, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "StartUnit", "org.freedesktop.systemd1", "a.service", "replace"))
	f.Add(errorMessage(9, "org.freedesktop.DBus.Error.AccessDenied", "no"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, n, err := parseMessage(b)
		if err != nil || n == 0 {
			return
		}
		if n > len(b) || n < dbusFixed {
			t.Fatalf("%d bytes of %d", n, len(b))
		}
		if got, k, err := parseMessage(b[:n]); err != nil || k != n || got != m {
			t.Errorf("the message alone is %+v, %d, %v; with more behind it %+v", got, k, err, m)
		}
		if _, k, err := parseMessage(b[:n-1]); err != nil || k != 0 {
			t.Errorf("a part of the message is %d, %v", k, err)
		}
		_ = m.point()
	})
}

func TestDBusErrorIsWhatItSays(t *testing.T) {
	b := errorMessage(9, "org.freedesktop.DBus.Error.AccessDenied", "no")
	m, n, err := parseMessage(b)
	if err != nil || n != len(b) || m.kind != dbusError || m.replySerial != 9 || m.errorName != "org.freedesktop.DBus.Error.AccessDenied" {
		t.Errorf("%+v, %d of %d, %v", m, n, len(b), err)
	}
}

func FuzzSFTP(f *testing.F) {
	packet := func(body []byte) []byte { return append([]byte{0, 0, 0, byte(len(body))}, body...) }
	f.Add(packet(frame(sftpOpen, 3, text("/x"), make([]byte, 8))), packet(frame(sftpHandle, 3, text("h"))))
	f.Add(packet(frame(sftpExtended, 8, text("posix-rename@openssh.com"), text("/a"), text("/b"))), packet(frame(sftpStatus, 8, make([]byte, 4))))
	f.Add(packet([]byte{sftpInit, 0, 0, 0, 3}), packet([]byte{sftpVersion, 0, 0, 0, 3}))
	f.Fuzz(func(t *testing.T, request, answer []byte) {
		s := newSFTP()
		for _, parse := range []func([]byte) (unit, error){s.request, s.answer, s.request} {
			b := slices.Concat(request, answer)
			for len(b) > 0 {
				u, err := parse(b)
				if err != nil || u.length == 0 {
					break
				}
				if u.length > len(b) {
					t.Fatalf("%d bytes of %d", u.length, len(b))
				}
				if u.call != nil && !strings.HasPrefix(u.call.Point, "sftp.") {
					t.Errorf("call %q", u.call.Point)
				}
				b = b[u.length:]
			}
		}
		if p, n, err := parsePacket(s.refuse(7, Denied)); err != nil || n == 0 || p.id != 7 || status(p) != sftpDenied {
			t.Errorf("refusal: %+v, %d, %v", p, n, err)
		}
	})
}

func FuzzHTTP(f *testing.F) {
	f.Add([]byte("GET /v4.0.0/libpod/networks/json HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Add([]byte("POST /v4.0.0/libpod/x HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h := newHTTP()
		for rest := b; len(rest) > 0; {
			u, err := h.request(rest)
			if err != nil || u.length == 0 {
				return
			}
			if u.length > len(rest) {
				t.Fatalf("%d bytes of %d", u.length, len(rest))
			}
			rest = rest[u.length:]
		}
	})
}

func FuzzCommand(f *testing.F) {
	f.Add(`'env' LC_ALL=C nft --file -`)
	f.Fuzz(func(t *testing.T, line string) {
		c := parseCommand(line)
		if (c.call == nil) == (c.bridge == "") {
			t.Errorf("%q is both or neither: %+v", line, c)
		}
	})
}

func TestHTTPRequestsWithBodies(t *testing.T) {
	h := newHTTP()
	b := []byte("POST /v4.0.0/libpod/build?x=1 HTTP/1.1\r\ncontent-length: 5\r\n\r\nhelloGET /v4.0.0/libpod/info HTTP/1.1\r\n\r\n")
	var got []string
	var bodies [][]byte
	for len(b) > 0 {
		u, err := h.request(b)
		if err != nil || u.length == 0 {
			t.Fatal(u, err)
		}
		if u.part {
			bodies = append(bodies, b[:u.length])
		} else {
			got = append(got, names([]Call{*u.call})...)
		}
		b = b[u.length:]
	}
	if !slices.Equal(got, []string{"podman.POST /build!", "podman.GET /info"}) || string(bytes.Join(bodies, nil)) != "hello" {
		t.Errorf("%q with %q", got, bodies)
	}
}
