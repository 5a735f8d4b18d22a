package labvm

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// consoleLimit is how much of a console is kept, at least. EC2 keeps 64 KiB.
const consoleLimit = 1 << 20

// console is a terminal whose one end is a machine's /dev/console and whose other
// end is read and kept.
type console struct {
	terminal string // path of the machine's end
	slave    *os.File
	master   *os.File
	done     chan struct{}

	mu    sync.Mutex
	shown []byte
}

// openConsole opens a terminal.
func openConsole() (*console, error) {
	// Not blocking, so that close ends a read.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a terminal: %w", err)
	}
	master := os.NewFile(uintptr(fd), "/dev/ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("unlock a terminal: %w", err), master.Close())
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("name a terminal: %w", err), master.Close())
	}
	c := &console{terminal: fmt.Sprintf("/dev/pts/%d", n), master: master, done: make(chan struct{})}
	// Kept open: the last close of this end would end the reads of the other.
	c.slave, err = os.OpenFile(c.terminal, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, errors.Join(err, master.Close())
	}
	go c.read()
	return c, nil
}

// read keeps what the machine writes.
func (c *console) read() {
	defer close(c.done)
	buffer := make([]byte, 4096)
	for {
		n, err := c.master.Read(buffer)
		c.show(string(buffer[:n]))
		if err != nil {
			return // it was closed
		}
	}
}

// show adds to what was shown.
func (c *console) show(text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shown = append(c.shown, text...)
	if len(c.shown) > 2*consoleLimit {
		c.shown = append([]byte(nil), c.shown[len(c.shown)-consoleLimit:]...)
	}
}

// text returns what was shown.
func (c *console) text() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]byte(nil), c.shown...)
}

// close gives the terminal back. What was shown stays.
func (c *console) close() error {
	err := errors.Join(c.master.Close(), c.slave.Close())
	<-c.done
	return err
}
