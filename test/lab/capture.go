package lab

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Capture collects what passes an interface, in and out. What an XDP program of that interface takes or sends is not
// seen there, but at the other end of the cable.
type Capture struct {
	file *os.File
	done chan struct{}

	mu     sync.Mutex
	frames []Frame
}

// Frame is an Ethernet frame and when it was seen.
type Frame struct {
	At   time.Time
	Data []byte
}

// Capture begins to collect those frames of an interface that keep wants, all without it. It ends with Close, or with the lab.
func (n *Node) Capture(interfaceName string, keep func(frame []byte) bool) (*Capture, error) {
	c := &Capture{done: make(chan struct{})}
	err := n.Do(func() error {
		link, err := netlink.LinkByName(interfaceName)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", interfaceName, err)
		}
		const everything = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // in network byte order
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		c.file = os.NewFile(uintptr(fd), "capture of "+interfaceName)
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer); err != nil {
			return err
		}
		// Bound last: until then the socket takes nothing.
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: link.Attrs().Index})
	})
	if err == nil {
		n.lab.mu.Lock()
		defer n.lab.mu.Unlock()
		if n.lab.closed {
			err = errors.New("the lab is closed")
		} else {
			n.lab.captures = append(n.lab.captures, c)
		}
	}
	if err != nil {
		if c.file != nil {
			c.file.Close()
		}
		return nil, n.wrap("capture "+interfaceName, err)
	}
	go c.collect(keep)
	return c, nil
}

func (c *Capture) collect(keep func([]byte) bool) {
	defer close(c.done)
	buffer := make([]byte, 1<<16)
	take := func(frame []byte) {
		if keep == nil || keep(frame) {
			c.mu.Lock()
			c.frames = append(c.frames, Frame{At: time.Now(), Data: slices.Clone(frame)})
			c.mu.Unlock()
		}
	}
	for {
		length, err := c.file.Read(buffer)
		switch {
		case err == nil:
			take(buffer[:length])
			continue
		case errors.Is(err, unix.ENETDOWN):
			continue // said once; it may come up again
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return
		}
		// Closing: what has passed so far is in the socket.
		raw, err := c.file.SyscallConn()
		if err != nil {
			return
		}
		raw.Control(func(fd uintptr) {
			for {
				length, err := unix.Read(int(fd), buffer)
				if err != nil {
					return
				}
				take(buffer[:length])
			}
		})
		return
	}
}

// Frames are those collected so far, oldest first.
func (c *Capture) Frames() []Frame {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.frames)
}

// Close ends the collecting; what has passed until then is collected. The frames stay; a second call does nothing.
func (c *Capture) Close() error {
	err := c.file.SetReadDeadline(time.Now())
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	<-c.done
	return errors.Join(err, c.file.Close())
}
