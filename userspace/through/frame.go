package through

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"fairlead/maps"
)

const (
	ethernetLength = 14
	tagLength      = 4
	tagID          = 0x0fff

	// As bpf/tunnel.h has them.
	tunnelTTL     = 64
	gueSourcePort = 49152
	guePort       = 6080
)

// flow is how a connection's packets become frames.
type flow struct {
	head    []byte // Ethernet header, tags and outer headers, without what depends on the packet's length
	outer   int    // where the outer IP header stands in it; its end: there is none
	gue     bool
	address unix.SockaddrLinklayer
	failed  chan error // the first refusal of the kernel's to send
}

// newFlow prepares the frames of a connection from source to a destination's service.
func newFlow(d *Destination, source netip.AddrPort) (*flow, error) {
	hop := &d.Hop
	if !hop.Known {
		return nil, fmt.Errorf("no next hop to %v: %s", d.Backend, hop.Reason)
	}
	if d.Method == maps.MethodDSR && hop.Gateway {
		return nil, fmt.Errorf("%v is behind a router: dsr takes a backend that is on-link", d.Backend)
	}
	f := &flow{
		head: make([]byte, 0, ethernetLength+2*tagLength+header.IPv6MinimumSize+header.UDPMinimumSize),
		gue:  d.Method == maps.MethodGUE, failed: make(chan error, 1),
		address: unix.SockaddrLinklayer{Ifindex: int(hop.Interface), Halen: uint8(len(hop.MAC))},
	}
	copy(f.address.Addr[:], hop.MAC[:])
	f.head = append(append(f.head, hop.MAC[:]...), hop.SourceMAC[:]...)
	for _, tag := range hop.VLAN {
		if tag == 0 {
			break
		}
		kind := uint16(unix.ETH_P_8021Q)
		if tag&maps.Tag8021AD != 0 {
			kind = unix.ETH_P_8021AD
		}
		f.head = binary.BigEndian.AppendUint16(f.head, kind)
		f.head = binary.BigEndian.AppendUint16(f.head, tag&tagID)
	}
	carried, tunnel := d.Service.Addr(), d.Method != maps.MethodDSR
	if tunnel {
		carried = d.Backend
	}
	kind := uint16(unix.ETH_P_IPV6)
	if carried.Is4() {
		kind = unix.ETH_P_IP
	}
	f.head = binary.BigEndian.AppendUint16(f.head, kind)
	f.outer = len(f.head)
	switch d.Method {
	case maps.MethodDSR:
	case maps.MethodIPIP, maps.MethodGUE:
		if d.TunnelSource.Addr().Is4() != d.Backend.Is4() || !d.TunnelSource.IsValid() {
			return nil, fmt.Errorf("no outer source address for %v", d.Backend)
		}
		f.head = appendOuter(f.head, d, source)
	default:
		return nil, fmt.Errorf("method %v: checks go through dsr, ipip and gue alone", d.Method)
	}
	return f, nil
}

// appendOuter appends the outer headers towards the end of a tunnel, as bpf/tunnel.h writes them: the hash of the inner
// connection chooses the source address, and GUE's port. What depends on the packet's length is left 0.
func appendOuter(b []byte, d *Destination, source netip.AddrPort) []byte {
	hash := maps.Tuple{Source: source, Destination: d.Service, Protocol: uint8(header.TCPProtocolNumber)}.Hash()
	from, to := varied(d.TunnelSource, uint32(hash)), d.Backend
	protocol := uint8(unix.IPPROTO_IPV6)
	if d.Service.Addr().Is4() {
		protocol = unix.IPPROTO_IPIP
	}
	if d.Method == maps.MethodGUE {
		protocol = unix.IPPROTO_UDP
	}
	if to.Is4() {
		ip := header.IPv4(make([]byte, header.IPv4MinimumSize))
		ip.Encode(&header.IPv4Fields{
			TTL: tunnelTTL, Flags: header.IPv4FlagDontFragment, Protocol: protocol, SrcAddr: address(from), DstAddr: address(to),
		})
		b = append(b, ip...)
	} else {
		ip := header.IPv6(make([]byte, header.IPv6MinimumSize))
		ip.Encode(&header.IPv6Fields{
			HopLimit: tunnelTTL, TransportProtocol: tcpip.TransportProtocolNumber(protocol), SrcAddr: address(from), DstAddr: address(to),
		})
		b = append(b, ip...)
	}
	if d.Method == maps.MethodGUE {
		b = binary.BigEndian.AppendUint16(b, gueSourcePort|uint16(hash>>16)&0x3fff)
		b = binary.BigEndian.AppendUint16(b, guePort)
		b = append(b, 0, 0, 0, 0) // checksum 0: the inner packet has its own (RFC 6935)
	}
	return b
}

// varied is an address of a prefix: the bits behind it, 32 at most, are those of a hash. Bytes of the hash count as the
// data plane counts them, in the host's order.
func varied(prefix netip.Prefix, hash uint32) netip.Addr {
	a := prefix.Masked().Addr().AsSlice()
	behind := min(len(a)*8-prefix.Bits(), 32)
	var mask, bits [4]byte
	binary.BigEndian.PutUint32(mask[:], uint32(1<<behind-1))
	binary.NativeEndian.PutUint32(bits[:], hash)
	last := a[len(a)-4:]
	for i := range last {
		last[i] |= bits[i] & mask[i]
	}
	out, _ := netip.AddrFromSlice(a)
	return out
}

// overhead is the length of the outer headers, in bytes.
func (f *flow) overhead() int { return len(f.head) - f.outer }

// appendFrame appends the frame that carries a packet.
func (f *flow) appendFrame(b, packet []byte) []byte {
	start := len(b)
	b = append(append(b, f.head...), packet...)
	length := f.overhead() + len(packet)
	if f.overhead() == 0 {
		return b
	}
	outer := b[start+f.outer:]
	rest := uint16(length - header.IPv4MinimumSize)
	if outer[0]>>4 == 4 {
		ip := header.IPv4(outer)
		ip.SetTotalLength(uint16(length))
		ip.SetChecksum(0)
		ip.SetChecksum(^checksum.Checksum(outer[:header.IPv4MinimumSize], 0))
		outer = outer[header.IPv4MinimumSize:]
	} else {
		rest = uint16(length - header.IPv6MinimumSize)
		header.IPv6(outer).SetPayloadLength(rest)
		outer = outer[header.IPv6MinimumSize:]
	}
	if f.gue {
		header.UDP(outer).SetLength(rest)
	}
	return b
}

// decode finds the IP packet in a frame that answers a check: a whole one, no fragment, that carries TCP. It may change
// the frame: see finishChecksum.
func decode(frame []byte) (packet []byte, ok bool) {
	if len(frame) < ethernetLength {
		return nil, false
	}
	kind, packet := binary.BigEndian.Uint16(frame[12:]), frame[ethernetLength:]
	for range 2 {
		if kind != unix.ETH_P_8021Q && kind != unix.ETH_P_8021AD || len(packet) < tagLength {
			break
		}
		kind, packet = binary.BigEndian.Uint16(packet[2:]), packet[tagLength:]
	}
	switch kind {
	case unix.ETH_P_IP:
		return decode4(packet)
	case unix.ETH_P_IPV6:
		return decode6(packet)
	}
	return nil, false
}

func decode4(packet []byte) ([]byte, bool) {
	ip := header.IPv4(packet)
	if !ip.IsValid(len(packet)) || ip.TransportProtocol() != header.TCPProtocolNumber || ip.More() || ip.FragmentOffset() != 0 {
		return nil, false
	}
	packet = packet[:ip.TotalLength()]
	pseudo := header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), ip.PayloadLength())
	return packet, finishChecksum(packet[ip.HeaderLength():], pseudo)
}

// decode6 takes no extension headers: no backend's TCP sends any.
func decode6(packet []byte) ([]byte, bool) {
	ip := header.IPv6(packet)
	if !ip.IsValid(len(packet)) || ip.TransportProtocol() != header.TCPProtocolNumber {
		return nil, false
	}
	packet = packet[:header.IPv6MinimumSize+int(ip.PayloadLength())]
	pseudo := header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), ip.PayloadLength())
	return packet, finishChecksum(packet[header.IPv6MinimumSize:], pseudo)
}

// finishChecksum computes the checksum of a TCP segment whose sender has left that to a card it never met: between
// virtual machines or namespaces of one host, XDP sees frames whose checksum is that of the pseudo-header alone. Others
// stay as they are, and the stack looks at them.
func finishChecksum(segment []byte, pseudo uint16) (ok bool) {
	if len(segment) < header.TCPMinimumSize {
		return false
	}
	segmentTCP := header.TCP(segment)
	if segmentTCP.Checksum() == pseudo && checksum.Checksum(segment, pseudo) != 0xffff {
		segmentTCP.SetChecksum(^checksum.Checksum(segment, 0))
	}
	return true
}
