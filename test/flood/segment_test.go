package flood

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
	xdpTX       uint32 = 3
	xdpRedirect uint32 = 4
)

var (
	edgeMAC    = [6]byte{2, 0xe, 0, 0, 0, 1}
	clientMAC  = [6]byte{2, 0xc, 0, 0, 0, 1} // the router that all clients are behind
	backendMAC = [6]byte{2, 0xb, 0xff, 0xff, 0, 0}
)

const (
	ethernet = 14
	guePort  = 6080
)

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
	ip := b[ethernet:]
	source, destination := s.source.Addr().AsSlice(), s.destination.Addr().AsSlice()
	length := 40
	if s.source.Addr().Is4() {
		b[12], b[13] = 8, 0
		clear(ip[:20])
		ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(ip[2:], uint16(40+s.payload))
		copy(ip[12:], source)
		copy(ip[16:], destination)
		length = 20
	} else {
		b[12], b[13] = 0x86, 0xdd
		clear(ip[:8])
		ip[0], ip[6], ip[7] = 0x60, unix.IPPROTO_TCP, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(20+s.payload))
		copy(ip[8:], source)
		copy(ip[24:], destination)
	}
	tcp := ip[length:]
	clear(tcp[:20+s.payload])
	binary.BigEndian.PutUint16(tcp, s.source.Port())
	binary.BigEndian.PutUint16(tcp[2:], s.destination.Port())
	binary.BigEndian.PutUint32(tcp[4:], s.sequence)
	binary.BigEndian.PutUint32(tcp[8:], s.ack)
	tcp[12], tcp[13], tcp[14] = 5<<4, s.flags, 0xff
	return ethernet + length + 20 + s.payload
}

// landing is what became of a frame.
type landing struct {
	action              uint32
	mac                 [6]byte    // whom it goes to
	tunnel              netip.Addr // the other end of the tunnel, where it is inside one
	gue                 bool
	source, destination netip.AddrPort
	flags               uint8
}

func (l landing) String() string {
	if l.action != xdpTX && l.action != xdpRedirect {
		return fmt.Sprintf("action %d", l.action)
	}
	kind := ""
	if l.flags&rst != 0 {
		kind = "RST "
	}
	return fmt.Sprintf("%s%v > %v by %x", kind, l.source, l.destination, l.mac)
}

// isReset tells whether the landing is a RST to the sender of a segment.
func (l landing) isReset(s netip.AddrPort) bool {
	return l.action == xdpTX && l.flags&rst != 0 && l.destination == s && l.mac == clientMAC
}

// header reads an IP header: its addresses, what it carries, and that.
func header(b []byte) (source, destination netip.Addr, protocol uint8, rest []byte) {
	if b[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9], b[20:]
	}
	return netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[6], b[40:]
}

func landed(action uint32, b []byte) landing {
	l := landing{action: action, mac: [6]byte(b[:6])}
	source, destination, protocol, rest := header(b[ethernet:])
	switch {
	case protocol == unix.IPPROTO_UDP && binary.BigEndian.Uint16(rest[2:]) == guePort:
		l.tunnel, l.gue = destination, true
		source, destination, protocol, rest = header(rest[8:])
	case protocol == unix.IPPROTO_IPIP || protocol == unix.IPPROTO_IPV6:
		l.tunnel = destination
		source, destination, protocol, rest = header(rest)
	}
	if protocol == unix.IPPROTO_TCP {
		l.source = netip.AddrPortFrom(source, binary.BigEndian.Uint16(rest))
		l.destination = netip.AddrPortFrom(destination, binary.BigEndian.Uint16(rest[2:]))
		l.flags = rest[13]
	}
	return l
}

// cpu runs a program on frames, on whatever CPU its caller's thread is. It belongs to one goroutine at a time.
type cpu struct {
	attr    testRun
	in, out [256]byte
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

// call runs the program on the frame that lies in c.in.
func (c *cpu) call(length int) error {
	c.attr.inSize, c.attr.outSize = uint32(length), uint32(len(c.out))
	const programTestRun = 10
	_, _, errno := unix.Syscall(unix.SYS_BPF, programTestRun, uintptr(unsafe.Pointer(&c.attr)), unsafe.Sizeof(c.attr))
	runtime.KeepAlive(c)
	if errno != 0 {
		return errno
	}
	return nil
}

func (c *cpu) run(s *segment, from [6]byte) landing {
	if err := c.call(s.put(c.in[:], from)); err != nil {
		panic(fmt.Sprintf("run the program on %+v: %v", s, err))
	}
	return landed(c.attr.action, c.out[:])
}

// onCPU binds the calling goroutine to one CPU for good.
func onCPU(number int) error {
	runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
	var set unix.CPUSet
	set.Set(number)
	return unix.SchedSetaffinity(0, &set)
}

// cpus are those that this process may use, at most four.
func cpus() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	var all []int
	for n := 0; len(all) < min(set.Count(), 4); n++ {
		if set.IsSet(n) {
			all = append(all, n)
		}
	}
	return all, nil
}
