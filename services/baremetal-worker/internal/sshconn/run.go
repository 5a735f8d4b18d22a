package sshconn

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
)

// defaultMaxOutput bounds what is kept of a command's output, each of stdout
// and stderr.
const defaultMaxOutput = 1 << 20

// maxStderrInError bounds the part of stderr that an error quotes.
const maxStderrInError = 512

// openRetry is the pause before a session is asked for again: sshd frees the
// slot of a finished session a little after it has said that it's finished.
const openRetry = 20 * time.Millisecond

// Command is a program to run on the host.
type Command struct {
	// Args is the program and its arguments. They reach it as they are: no
	// shell gets to interpret any of them.
	Args []string
	// Stdin is what the program reads; nil is an empty input.
	Stdin io.Reader
	// Timeout bounds the run. Default is the connection's CommandTimeout.
	Timeout time.Duration
	// Long marks what may take minutes, such as sending or hashing an image: at
	// most half of the connection's commands are of this kind, so that short
	// ones always find a slot.
	Long bool
	// MaxOutput bounds what is kept of stdout and of stderr, in bytes; more is
	// dropped and said in Result. Default 1 MiB.
	MaxOutput int
}

// Result is how a program ended by itself.
type Result struct {
	// Stdout and Stderr are what it wrote.
	Stdout, Stderr []byte
	// Truncated is set when there was more.
	Truncated bool
	// ExitCode is its exit code, or 128 + n when signal n ended it, or -1 for a
	// signal without a number.
	ExitCode int
	// Signal is the name of the signal that ended it, without SIG.
	Signal string
}

// Err returns nil for exit code 0, otherwise an error with the exit code and
// the end of stderr.
func (r Result) Err(program string) error {
	if r.ExitCode == 0 {
		return nil
	}
	text := strings.TrimSpace(string(r.Stderr))
	if len(text) > maxStderrInError {
		text = "…" + text[len(text)-maxStderrInError:]
	}
	if r.Signal != "" {
		return fmt.Errorf("%s: killed by signal %s: %s", program, r.Signal, strings.ToValidUTF8(text, "?"))
	}
	return fmt.Errorf("%s: exit code %d: %s", program, r.ExitCode, strings.ToValidUTF8(text, "?"))
}

// Run runs a program and waits for its end. An exit code other than 0 is no
// error. When ctx ends, or the time limit passes, the program is killed.
//
// Only a few commands run at a time on a connection; others wait for their
// turn, which the time limit includes. Prefer a forwarded socket: it costs a
// tenth.
func (c *Conn) Run(ctx context.Context, cmd Command) (Result, error) {
	line, err := Quote(cmd.Args)
	if err != nil {
		return Result{}, backenderr.Wrap(backenderr.Internal, err, "host %s", c.cfg.Name)
	}
	program := cmd.Args[0]
	timeout := cmd.Timeout
	if timeout <= 0 {
		timeout = c.cfg.CommandTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	l, err := c.current(ctx)
	if err != nil {
		return Result{}, err
	}
	if cmd.Long {
		if err := acquire(ctx, l, l.long); err != nil {
			return Result{}, c.classify(err, "run "+program)
		}
		defer func() { <-l.long }()
	}
	if err := acquire(ctx, l, l.sessions); err != nil {
		return Result{}, c.classify(err, "run "+program)
	}
	defer func() { <-l.sessions }()
	session, err := c.session(ctx, l)
	if err != nil {
		return Result{}, c.classify(err, "run "+program)
	}
	defer func() { _ = session.Close() }()

	maxOutput := cmd.MaxOutput
	if maxOutput <= 0 {
		maxOutput = defaultMaxOutput
	}
	stdout, stderr := &limited{max: maxOutput}, &limited{max: maxOutput}
	session.Stdout, session.Stderr = stdout, stderr
	var stdin io.WriteCloser
	if cmd.Stdin != nil {
		if stdin, err = session.StdinPipe(); err != nil {
			return Result{}, c.classify(err, "run "+program)
		}
	}
	// Every step below ends when the channel is closed.
	stop := context.AfterFunc(ctx, func() {
		_ = session.Signal(ssh.SIGKILL)
		_ = session.Close()
	})
	defer stop()
	if err := session.Start(line); err != nil {
		return Result{}, c.classify(lostOr(ctx, l, err), "run "+program)
	}
	fed := make(chan error, 1)
	if stdin != nil {
		go func() {
			_, err := io.CopyBuffer(onlyWriter{stdin}, onlyReader{cmd.Stdin}, make([]byte, copyBuffer))
			_ = stdin.Close()
			fed <- err
		}()
	}
	err = session.Wait()
	result := Result{Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), Truncated: stdout.dropped || stderr.dropped}
	var exit *ssh.ExitError
	switch {
	case ctx.Err() != nil:
		return result, c.classify(ctx.Err(), "run "+program)
	case err == nil:
	case errors.As(err, &exit):
		result.ExitCode, result.Signal = exit.ExitStatus(), exit.Signal()
	default:
		return result, c.classify(lostOr(ctx, l, err), "run "+program)
	}
	if stdin != nil && result.ExitCode == 0 {
		// The program read all that it wanted; what the source had to say
		// matters if it failed, not if the program closed its input.
		if err := <-fed; err != nil && !errors.Is(err, io.EOF) {
			return result, fmt.Errorf("host %s: input of %s: %w", c.cfg.Name, program, err)
		}
	}
	return result, nil
}

// copyBuffer is what the measurements of uploads found fastest.
const copyBuffer = 256 << 10

// onlyWriter and onlyReader hide ReadFrom and WriteTo, which would ignore the
// copy's buffer.
type (
	onlyWriter struct{ io.Writer }
	onlyReader struct{ io.Reader }
)

// acquire takes a slot, or says why it can't.
func acquire(ctx context.Context, l *link, slots chan struct{}) error {
	select {
	case slots <- struct{}{}:
		return nil
	case <-l.done:
		return errors.New("connection lost")
	case <-ctx.Done():
		return fmt.Errorf("wait for a free session: %w", ctx.Err())
	}
}

// await runs something that knows no context. If ctx or the connection ends
// first, what it returns later is discarded.
func await[T any](ctx context.Context, l *link, f func() (T, error), discard func(T)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	out := make(chan outcome, 1)
	go func() {
		value, err := f()
		out <- outcome{value, err}
	}()
	abandon := func(err error) (T, error) {
		go func() {
			if o := <-out; o.err == nil {
				discard(o.value)
			}
		}()
		var none T
		return none, err
	}
	select {
	case o := <-out:
		if o.err != nil {
			o.err = lostOr(ctx, l, o.err)
		}
		return o.value, o.err
	case <-ctx.Done():
		return abandon(ctx.Err())
	case <-l.done:
		return abandon(errors.New("connection lost"))
	}
}

// lostOr replaces what a dying channel says (EOF, "exited without exit status")
// by what has happened.
func lostOr(ctx context.Context, l *link, err error) error {
	select {
	case <-l.done:
		return fmt.Errorf("connection lost: %w", err)
	default:
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// limited keeps the first bytes that are written to it.
type limited struct {
	bytes.Buffer

	max     int
	dropped bool
}

// Write keeps what fits and claims to have kept all: the program shall go on.
func (l *limited) Write(p []byte) (int, error) {
	room := l.max - l.Len()
	if room < len(p) {
		l.dropped = true
		l.Buffer.Write(p[:max(room, 0)])
		return len(p), nil
	}
	return l.Buffer.Write(p)
}

// ReadFrom is here because bytes.Buffer's would ignore the limit.
func (l *limited) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(onlyWriter{l}, r)
}
