package agreement

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	fin = 1 << iota
	syn
	rst
	_
	ack
)

const ethernet = 14 // bytes

// clientMAC is where the clients' frames come from, and so where what is refused goes back to. Those of next hops are
// made from numbers instead.
var clientMAC = [6]byte{0x02, 0xc1}

// frame is a TCP segment without options or payload, made once and then patched for each tuple. Its checksums stay
// zero: the data plane mends checksums by what it changes, and looks at none.
type frame struct {
	bytes     []byte
	addresses int // offset of the two addresses
	size      int // of one of them
	tcp       int // offset of the TCP header
}

func newFrame(ipv6 bool) frame {
	f := frame{addresses: ethernet + 12, size: 4, tcp: ethernet + 20}
	if ipv6 {
		f = frame{addresses: ethernet + 8, size: 16, tcp: ethernet + 40}
	}
	f.bytes = make([]byte, f.tcp+20)
	copy(f.bytes, []byte{0x02, 0xed})
	copy(f.bytes[6:], clientMAC[:])
	ip := f.bytes[ethernet:]
	if ipv6 {
		binary.BigEndian.PutUint16(f.bytes[12:], unix.ETH_P_IPV6)
		ip[0], ip[5], ip[6], ip[7] = 0x60, 20, unix.IPPROTO_TCP, 64
	} else {
		binary.BigEndian.PutUint16(f.bytes[12:], unix.ETH_P_IP)
		ip[0], ip[3], ip[8], ip[9] = 0x45, 40, 64, unix.IPPROTO_TCP
	}
	f.bytes[f.tcp+12] = 5 << 4
	return f
}

// numbers are what a segment's TCP header says beside its ports.
type numbers struct {
	flags                     byte
	sequence, acknowledgement uint32
}

func (f frame) patch(source, destination netip.AddrPort, tcp numbers) {
	copy(f.bytes[f.addresses:], source.Addr().AsSlice())
	copy(f.bytes[f.addresses+f.size:], destination.Addr().AsSlice())
	header := f.bytes[f.tcp:]
	binary.BigEndian.PutUint16(header, source.Port())
	binary.BigEndian.PutUint16(header[2:], destination.Port())
	binary.BigEndian.PutUint32(header[4:], tcp.sequence)
	binary.BigEndian.PutUint32(header[8:], tcp.acknowledgement)
	header[13] = tcp.flags
}

// outcome reads what became of a frame of f's layout; what is longer stands inside another packet.
func (f frame) outcome(action uint32, bytes []byte) (o outcome) {
	o.action, o.mac = action, [6]byte(bytes)
	if longer := len(bytes) - len(f.bytes); longer > 0 {
		ip := bytes[ethernet:]
		if ip[0]>>4 == 4 {
			o.outer = netip.AddrFrom4([4]byte(ip[16:]))
		} else {
			o.outer = netip.AddrFrom16([16]byte(ip[24:]))
		}
		bytes = bytes[longer:]
	}
	end := func(n int) netip.AddrPort {
		at := f.addresses + n*f.size
		address, _ := netip.AddrFromSlice(bytes[at : at+f.size])
		return netip.AddrPortFrom(address, binary.BigEndian.Uint16(bytes[f.tcp+2*n:]))
	}
	o.source, o.destination, o.flags = end(0), end(1), bytes[f.tcp+13]
	return o
}

// outcome is what became of a frame.
type outcome struct {
	action              uint32
	mac                 [6]byte    // of the next hop
	outer               netip.Addr // where a packet around it goes
	source, destination netip.AddrPort
	flags               byte
}

func (o outcome) String() string {
	return fmt.Sprintf("action %d, to %x, from %v to %v, flags %#x, inside of a packet to %v",
		o.action, o.mac, o.source, o.destination, o.flags, o.outer)
}
