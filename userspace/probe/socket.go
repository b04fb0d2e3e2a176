package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Probe is a frame to be sent, and what became of it.
type Probe struct {
	Interface uint32 // index of the device
	Frame     []byte
	Err       error // why it was not sent
}

// Sender sends probes. It may be called by several goroutines at once.
type Sender interface {
	// Send tries every probe, sets the Err of each, and answers how many went.
	Send(ctx context.Context, probes []Probe) int
}

// Socket is a Sender by an AF_PACKET socket of the network namespace that it was opened in.
//
// Frames go through the device's queueing discipline: that takes a batch where the driver's own queue is busy, it is where
// a host's operator may shape what leaves, and packet captures show them. PACKET_QDISC_BYPASS would spare little at the
// paces that probes have, and lose frames instead.
type Socket struct {
	file *os.File
	raw  syscall.RawConn
	pool sync.Pool // *messages
}

// OpenSocket opens a Socket. It takes CAP_NET_RAW.
func OpenSocket() (*Socket, error) {
	// Without a protocol it hears nothing: no packet is copied for it.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("open a packet socket to probe clients: %w (CAP_NET_RAW is missing)", err)
	}
	if err != nil {
		return nil, fmt.Errorf("open a packet socket to probe clients: %w", err)
	}
	s := &Socket{file: os.NewFile(uintptr(fd), "probes")}
	s.pool.New = func() any { return new(messages) }
	if s.raw, err = s.file.SyscallConn(); err != nil {
		s.file.Close()
		return nil, fmt.Errorf("open a packet socket to probe clients: %w", err)
	}
	return s, nil
}

// Close closes the socket. What is sent later fails.
func (s *Socket) Close() error { return s.file.Close() }

// message is the kernel's struct mmsghdr.
type message struct {
	header unix.Msghdr
	length uint32
}

// batchSize is how many frames one system call takes.
const batchSize = 64

// messages is what one system call is told, on the heap, as the kernel is given addresses.
type messages struct {
	list      [batchSize]message
	addresses [batchSize]unix.RawSockaddrLinklayer
	vectors   [batchSize]unix.Iovec
}

// fullWaits is how often a full queue is waited for before a frame is given up: a millisecond, two, and so on, 31 in all.
const fullWaits = 5

// Send sends the probes in order. A device that is gone or down fails its own probes alone. A full queue is waited for
// shortly, and once ctx ends nothing more is sent.
func (s *Socket) Send(ctx context.Context, probes []Probe) (sent int) {
	m := s.pool.Get().(*messages)
	defer s.pool.Put(m)
	for len(probes) > 0 {
		n := min(len(probes), batchSize)
		sent += s.sendBatch(ctx, m, probes[:n])
		probes = probes[n:]
	}
	return sent
}

func (s *Socket) sendBatch(ctx context.Context, m *messages, probes []Probe) (sent int) {
	for i := range probes {
		m.put(i, &probes[i])
	}
	full := 0
	for at := 0; at < len(probes); {
		err := ctx.Err()
		n := 0
		if err == nil {
			n, err = s.call(m.list[at:len(probes)])
		}
		switch {
		case err == nil:
			for i := range probes[at : at+n] {
				probes[at+i].Err = nil
			}
			at, sent, full = at+n, sent+n, 0
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EAGAIN):
			if full < fullWaits && wait(ctx, time.Millisecond<<full) == nil {
				full++
				continue
			}
		}
		probes[at].Err = fmt.Errorf("send by interface %d: %w", probes[at].Interface, err)
		at++
	}
	runtime.KeepAlive(probes)
	return sent
}

// call sends until one fails. The error is of the first; n is at least 1 without one.
func (s *Socket) call(list []message) (n int, err error) {
	if failed := s.raw.Control(func(fd uintptr) {
		r, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&list[0])), uintptr(len(list)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		n = int(r)
		if errno != 0 {
			n, err = 0, errno
		}
	}); failed != nil {
		return 0, failed
	}
	return n, err
}

func (m *messages) put(i int, p *Probe) {
	address, vector := &m.addresses[i], &m.vectors[i]
	*address = unix.RawSockaddrLinklayer{Family: unix.AF_PACKET, Ifindex: int32(p.Interface)}
	m.list[i] = message{header: unix.Msghdr{Name: (*byte)(unsafe.Pointer(address)), Namelen: unix.SizeofSockaddrLinklayer}}
	if len(p.Frame) < ethernetLength {
		return // the kernel refuses it: it has not even a header
	}
	address.Protocol = binary.NativeEndian.Uint16(p.Frame[12:])
	vector.Base = &p.Frame[0]
	vector.SetLen(len(p.Frame))
	m.list[i].header.Iov = vector
	m.list[i].header.SetIovlen(1)
}

// wait waits so long, or until ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
