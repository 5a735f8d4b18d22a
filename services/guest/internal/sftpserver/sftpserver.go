// Package sftpserver serves SFTP on the standard streams of a process that the SSH server starts as the session's user,
// so that the kernel's own permissions decide what the user may read and write.
package sftpserver

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/pkg/sftp"
)

// stdio makes one connection of two streams.
type stdio struct {
	io.Reader
	io.WriteCloser
}

// Serve serves one client until its input ends. Relative paths start at the process's working directory, as with
// sshd's internal-sftp.
func Serve(in io.Reader, out io.WriteCloser) error {
	// Files get the usual mode, whatever the image's engine had set.
	syscall.Umask(0o022)
	dir, err := os.Getwd()
	if err != nil {
		dir = "/"
	}
	server, err := sftp.NewServer(stdio{in, out}, sftp.WithServerWorkingDirectory(dir))
	if err != nil {
		return fmt.Errorf("start sftp server: %w", err)
	}
	defer func() { _ = server.Close() }()
	if err := server.Serve(); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("serve sftp: %w", err)
	}
	return nil
}
