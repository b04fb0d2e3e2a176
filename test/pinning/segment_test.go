package pinning

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// TCP flags as they stand in the header's byte 13 (RFC 9293, section 3.1).
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

// XDP's actions, as the kernel's headers number them.
const (
	xdpDrop uint32 = iota + 1
	xdpPass
	xdpTX
	xdpRedirect
)

var (
	edgeMAC    = [6]byte{2, 0xe, 0, 0, 0, 1}
	clientMAC  = [6]byte{2, 0xc, 0, 0, 0, 1} // the router that all clients are behind
	backendMAC = [6]byte{2, 0xb, 0xff, 0xff, 0, 0}
)

const ethernet = 14

// segment is a TCP segment by what matters here.
type segment struct {
	source, destination netip.AddrPort
	sequence, ack       uint32
	flags               uint8
	payload             int // bytes
}

// put writes the segment's frame and answers its length. Checksums are left out: the program mends them by what it
// changes and asks for none.
func (s *segment) put(b []byte, from [6]byte) int {
	copy(b, edgeMAC[:])
	copy(b[6:], from[:])
	tcp := b[ethernet+20:]
	if s.source.Addr().Is4() {
		b[12], b[13] = 8, 0
		ip := b[ethernet:]
		clear(ip[:20])
		ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(ip[2:], uint16(40+s.payload))
		source, destination := s.source.Addr().As4(), s.destination.Addr().As4()
		copy(ip[12:], source[:])
		copy(ip[16:], destination[:])
	} else {
		b[12], b[13] = 0x86, 0xdd
		ip := b[ethernet:]
		clear(ip[:8])
		ip[0], ip[6], ip[7] = 0x60, unix.IPPROTO_TCP, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(20+s.payload))
		source, destination := s.source.Addr().As16(), s.destination.Addr().As16()
		copy(ip[8:], source[:])
		copy(ip[24:], destination[:])
		tcp = b[ethernet+40:]
	}
	clear(tcp[:20+s.payload])
	binary.BigEndian.PutUint16(tcp, s.source.Port())
	binary.BigEndian.PutUint16(tcp[2:], s.destination.Port())
	binary.BigEndian.PutUint32(tcp[4:], s.sequence)
	binary.BigEndian.PutUint32(tcp[8:], s.ack)
	tcp[12], tcp[13], tcp[14] = 5<<4, s.flags, 0xff
	return len(b) - len(tcp) + 20 + s.payload
}

// landing is what became of a frame.
type landing struct {
	action              uint32
	mac                 [6]byte // whom it goes to
	source, destination netip.AddrPort
	flags               uint8
}

func (l landing) String() string {
	switch l.action {
	case xdpDrop:
		return "dropped"
	case xdpPass:
		return "passed to the stack"
	case xdpTX, xdpRedirect:
		kind := ""
		if l.flags&rst != 0 {
			kind = "RST "
		}
		return fmt.Sprintf("%s%v > %v by %x", kind, l.source, l.destination, l.mac)
	}
	return fmt.Sprintf("action %d", l.action)
}

func landed(action uint32, b []byte) landing {
	l := landing{action: action, mac: [6]byte(b[:6])}
	if b[12] == 8 {
		tcp := b[ethernet+20:]
		l.source = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[26:])), binary.BigEndian.Uint16(tcp))
		l.destination = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[30:])), binary.BigEndian.Uint16(tcp[2:]))
		l.flags = tcp[13]
	} else {
		tcp := b[ethernet+40:]
		l.source = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[22:])), binary.BigEndian.Uint16(tcp))
		l.destination = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[38:])), binary.BigEndian.Uint16(tcp[2:]))
		l.flags = tcp[13]
	}
	return l
}

// cpu runs the program on frames, on whatever CPU its caller's thread is. It belongs to one goroutine at a time.
type cpu struct {
	attr    testRun
	in, out [160]byte
}

// testRun is the kernel's union bpf_attr for BPF_PROG_TEST_RUN. (The library's own call is right, and too slow for
// packets by the million.)
type testRun struct {
	program                uint32
	action                 uint32
	inSize, outSize        uint32
	in, out                uint64
	repeat, duration       uint32
	contextIn, contextOut  uint32
	contextFrom, contextTo uint64
	flags, onCPU, batch    uint32
	_                      uint32
}

// newCPU isn't inlined, so that what it makes is on the heap, where Go moves nothing: the kernel is told addresses.
//
//go:noinline
func newCPU(program *ebpf.Program) *cpu {
	c := new(cpu)
	c.attr.program = uint32(program.FD())
	c.attr.in, c.attr.out = uint64(uintptr(unsafe.Pointer(&c.in))), uint64(uintptr(unsafe.Pointer(&c.out)))
	return c
}

func (c *cpu) run(s *segment, from [6]byte) landing {
	c.attr.inSize, c.attr.outSize = uint32(s.put(c.in[:], from)), uint32(len(c.out))
	const programTestRun = 10
	if _, _, errno := unix.Syscall(unix.SYS_BPF, programTestRun, uintptr(unsafe.Pointer(&c.attr)),
		unsafe.Sizeof(c.attr)); errno != 0 {
		panic(fmt.Sprintf("run the program on %+v: %v", s, errno))
	}
	runtime.KeepAlive(c)
	return landed(c.attr.action, c.out[:])
}

// onCPU binds the calling goroutine to one CPU for good.
func onCPU(number int) error {
	runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
	var set unix.CPUSet
	set.Set(number)
	return unix.SchedSetaffinity(0, &set)
}
