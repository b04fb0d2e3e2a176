package announce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// packetSocket sends and hears the frames of one protocol on any interface. It is bound to none: interfaces come and
// go, and what counts of their frames is for the filter to say.
type packetSocket struct {
	protocol uint16
	file     *os.File
	raw      syscall.RawConn
	bound    bool
	closed   atomic.Bool
}

func openPacketSocket(protocol uint16) (*packetSocket, error) {
	// Without a protocol it hears nothing until bound.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%w (CAP_NET_RAW is missing)", err)
	}
	if err != nil {
		return nil, err
	}
	s := &packetSocket{protocol: protocol, file: os.NewFile(uintptr(fd), "packet socket")}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *packetSocket) close() {
	s.closed.Store(true)
	s.file.Close()
}

func (s *packetSocket) control(f func(fd int) error) error {
	var err error
	if closed := s.raw.Control(func(fd uintptr) { err = f(int(fd)) }); closed != nil {
		return closed
	}
	return err
}

// listen has the socket hear the interfaces of these indexes, and no others. A busy host's other packets end in the
// filter: they are not copied, and nobody is woken.
func (s *packetSocket) listen(indexes []int) error {
	if !s.bound && len(indexes) == 0 {
		return nil
	}
	program := filter(s.protocol, indexes)
	return s.control(func(fd int) error {
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}); err != nil {
			return fmt.Errorf("attach socket filter for %d interfaces: %w", len(indexes), err)
		}
		if s.bound {
			return nil
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(s.protocol)}); err != nil {
			return fmt.Errorf("bind packet socket: %w", err)
		}
		s.bound = true
		return nil
	})
}

// send sends a frame by the interface of this index.
func (s *packetSocket) send(index int, frame []byte) error {
	return s.control(func(fd int) error {
		return unix.Sendto(fd, frame, unix.MSG_DONTWAIT,
			&unix.SockaddrLinklayer{Protocol: networkOrder(s.protocol), Ifindex: index})
	})
}

// receive hands on what is heard, until the socket is closed. The frame is the callee's only until it returns.
func (s *packetSocket) receive(each func(index int, frame []byte)) error {
	frame := make([]byte, 2048)
	for {
		var n int
		var from unix.Sockaddr
		var err error
		failed := s.raw.Read(func(fd uintptr) bool {
			n, from, err = unix.Recvfrom(int(fd), frame, 0)
			return !errors.Is(err, unix.EAGAIN)
		})
		switch {
		case failed != nil && s.closed.Load():
			return nil
		case failed != nil:
			return failed
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN), errors.Is(err, unix.ENOBUFS):
			continue
		case err != nil:
			return err
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		// Our own are not news, and those for other hosts may be of another VLAN: the kernel marks frames with a tag that
		// nobody has a device for in this way, once it has taken the tag off.
		if !ok || link.Pkttype == unix.PACKET_OUTGOING || link.Pkttype == unix.PACKET_OTHERHOST {
			continue
		}
		each(link.Ifindex, frame[:n])
	}
}

func networkOrder(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

// SKF_AD_OFF + SKF_AD_IFINDEX of linux/filter.h: where a filter finds the interface.
const filterIndex = uint32(math.MaxUint32 - 0x1000 + 1 + 8)

// filter is a classic BPF program: frames of these interfaces; and of IPv6 only solicitations, advertisements and MLD
// queries.
func filter(protocol uint16, indexes []int) []unix.SockFilter {
	load := func(size uint16, offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | size | unix.BPF_ABS, K: offset}
	}
	equal := func(k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: yes, Jf: no}
	}
	give := func(length uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: length}
	}
	program := []unix.SockFilter{load(unix.BPF_W, filterIndex)}
	for i, index := range indexes {
		// Over the rest of these and the end behind them. Conditional jumps reach 255 only, others anywhere.
		program = append(program, equal(uint32(index), 0, 1),
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(2*(len(indexes)-1-i) + 1)})
	}
	program = append(program, give(0))
	if protocol == unix.ETH_P_IPV6 {
		const l4 = ethernetLength + ipv6Length
		program = append(program,
			load(unix.BPF_B, ethernetLength+6), // next header
			equal(unix.IPPROTO_HOPOPTS, 4, 0),
			equal(unix.IPPROTO_ICMPV6, 0, 8),
			load(unix.BPF_B, l4), // type
			equal(icmpSolicitation, 5, 0),
			equal(icmpAdvertisement, 4, 5),
			load(unix.BPF_H, l4), // next header, and length 0
			equal(unix.IPPROTO_ICMPV6<<8, 0, 3),
			load(unix.BPF_B, l4+hopByHopLength),
			equal(icmpMLDQuery, 0, 1),
			give(math.MaxUint32),
			give(0))
	} else {
		program = append(program, give(math.MaxUint32))
	}
	return program
}

// membership adds group to what the device of this name lets through, or takes it out. The kernel notes it once
// however often it is added this way, beside what its own IPv6 has joined: a run that was killed leaves nothing to
// count.
func membership(fd int, name string, group mac, add bool) error {
	var request struct {
		name   [unix.IFNAMSIZ]byte
		family uint16 // AF_UNSPEC
		group  mac
		_      [64]byte // as large as the kernel's, whatever follows in it
	}
	if len(name) >= len(request.name) {
		return unix.ENODEV
	}
	copy(request.name[:], name)
	request.group = group
	command := uintptr(unix.SIOCDELMULTI)
	if add {
		command = unix.SIOCADDMULTI
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), command, uintptr(unsafe.Pointer(&request)))
	switch {
	case errno == 0:
		return nil
	case !add && errno == unix.ENOENT:
		return nil // it wasn't there
	case errno == unix.EPERM:
		return fmt.Errorf("%w (CAP_NET_ADMIN is missing)", errno)
	}
	return errno
}

// inNamespace runs f in a network namespace: what it opens belongs there.
func inNamespace(ns netns.NsHandle, f func() error) (err error) {
	if ns == netns.None() {
		return f()
	}
	var thread sync.WaitGroup
	thread.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends here
		if err = netns.Set(ns); err == nil {
			err = f()
		}
	})
	thread.Wait()
	return err
}
