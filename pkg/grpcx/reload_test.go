package grpcx

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"

	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// trust makes files believe in the authorities.
func trust(t *testing.T, files TLSConfig, all ...*authority) []byte {
	t.Helper()
	var bundle []byte
	for _, a := range all {
		bundle = append(bundle, a.pem...)
	}
	writeFile(t, string(files.CAFile), bundle)
	return bundle
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A watch runs through every change of certificates on both sides; new
// connections go by the files as they are.
func TestAWatchOutlivesEveryChangeOfCertificates(t *testing.T) {
	t.Parallel()
	before, after := newAuthority(t), newAuthority(t)
	serverFiles := before.issue(t, leaf{cn: "server"})
	trust(t, serverFiles, before)
	aliceFiles := before.issue(t, leaf{cn: "alice"})
	trust(t, aliceFiles, before, after)
	bobFiles := after.issue(t, leaf{cn: "bob"})
	trust(t, bobFiles, before, after)
	c := ServerConfig{
		Listen: []ListenConfig{{Address: "127.0.0.1:0"}}, TLS: serverFiles,
		Clients: []ClientEntry{{Identity: "alice", Role: "client"}, {Identity: "bob", Role: "reader"}},
	}
	r := serve(t, c)
	beat := make(chan struct{})
	r.service.watch = func(stream grpc.ServerStreamingServer[bridgev1.WatchUntilExitResponse]) error {
		for range beat {
			if err := stream.Send(&bridgev1.WatchUntilExitResponse{}); err != nil {
				return err
			}
		}
		return nil
	}
	conn := r.dial(t, ClientConfig{}, aliceFiles)
	watch, err := bridgev1.NewBackendServiceClient(conn).WatchUntilExit(t.Context(), &bridgev1.WatchUntilExitRequest{Handle: strings.Repeat("ab", 32)})
	if err != nil {
		t.Fatal(err)
	}
	lives := func(when string) {
		t.Helper()
		beat <- struct{}{}
		if _, err := watch.Recv(); err != nil {
			t.Fatalf("the watch after %s: %v", when, err)
		}
	}
	lives("it began")
	// anew connects once more and reports whether that works.
	anew := func(files TLSConfig) bool {
		conn, err := Dial(ClientConfig{Target: r.Addrs()[0].String()}, files)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_, err = name(t, conn)
		return err == nil
	}
	if anew(bobFiles) {
		t.Fatal("an authority is trusted that isn't in the file")
	}

	// The server's authorities: a file half written, both, only the new one.
	whole := trust(t, serverFiles, before, after)
	writeFile(t, string(serverFiles.CAFile), whole[:len(whole)-40])
	eventually(t, "the half-written authorities are noticed", func() bool {
		if !anew(aliceFiles) {
			t.Error("a half-written file cost a client its connection")
		}
		return r.log.count("Could not load changed TLS files") > 0
	})
	if anew(bobFiles) {
		t.Error("half of a file is in use")
	}
	trust(t, serverFiles, before, after)
	eventually(t, "the new authority is trusted", func() bool { return anew(bobFiles) })
	if !anew(aliceFiles) {
		t.Error("the old authority is not trusted beside the new one")
	}
	trust(t, serverFiles, after)
	eventually(t, "the old authority is trusted no more", func() bool { return !anew(aliceFiles) })
	if !anew(bobFiles) {
		t.Error("the new authority is not trusted alone")
	}
	lives("the server's authorities changed")
	if n := r.log.count("Could not load changed TLS files"); n != 1 {
		t.Errorf("a broken file is logged %d times", n)
	}

	// The server's certificate: of the new authority, then one without its key.
	trust(t, bobFiles, after)
	after.write(t, serverFiles, leaf{cn: "server"})
	eventually(t, "the server shows its new certificate", func() bool { return anew(bobFiles) })
	other := after.issue(t, leaf{cn: "other"})
	stolen, err := os.ReadFile(string(other.CertFile))
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, string(serverFiles.CertFile), stolen)
	eventually(t, "the wrong pair is noticed", func() bool {
		if !anew(bobFiles) {
			t.Error("a certificate without its key is in use")
		}
		return r.log.count("Could not load changed TLS files") > 1
	})
	lives("the server's certificate changed")
	close(beat)
}

// A client that connects again goes by its files as they are then.
func TestAClientTrustsWhomItsFileNames(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	files := ca.issue(t, leaf{cn: "alice"})
	c := ServerConfig{
		Listen: []ListenConfig{{Address: "127.0.0.1:0"}}, TLS: ca.issue(t, leaf{cn: "server"}),
		Clients: []ClientEntry{{Identity: "alice", Role: "client"}},
	}
	r := serve(t, c)
	c.Listen[0].Address = r.Addrs()[0].String()
	log := &lines{}
	conn, err := DialLogging(logTo(log), ClientConfig{Target: c.Listen[0].Address}, files)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := name(t, conn); err != nil {
		t.Fatal(err)
	}
	again := func() {
		t.Helper()
		r.stop()
		for err := range r.done {
			if err != nil {
				t.Error(err)
			}
		}
		r = serve(t, c)
	}
	// ask waits until there is a connection, or no hope of one.
	ask := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := bridgev1.NewBackendServiceClient(conn).Name(ctx, &bridgev1.NameRequest{}, grpc.WaitForReady(true))
		return err
	}

	writeFile(t, string(files.CAFile), []byte("-----BEGIN CERTIFICATE-----\nMIIB"))
	eventually(t, "the broken file is noticed", func() bool {
		again()
		if err := ask(); err != nil {
			t.Errorf("with a broken file the old one stays in use: %v", err)
		}
		return log.count("Could not load changed TLS files") > 0
	})
	trust(t, files, other)
	eventually(t, "the server is trusted no more", func() bool {
		again()
		_, err := name(t, conn)
		return err != nil && strings.Contains(err.Error(), "certificate")
	})
	trust(t, files, other, ca)
	if err := ask(); err != nil {
		t.Errorf("the server is not trusted again: %v", err)
	}
}

func logTo(l *lines) *slog.Logger { return slog.New(slog.NewJSONHandler(l, nil)) }
