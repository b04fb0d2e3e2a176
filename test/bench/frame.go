package bench

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// TCP flags.
const (
	flagSYN = 0x02
	flagRST = 0x04
	flagPSH = 0x08
	flagACK = 0x10
)

const (
	etherSize  = 14
	ipv4Size   = 20
	ipv6Size   = 40
	tcpSize    = 20
	tcpOptions = 12 // timestamps, as almost every segment has them
	udpSize    = 8
	icmpSize   = 8
	timeToLive = 64
)

// GUE (draft-ietf-intarea-gue): its port, and the first of the source ports it takes.
const (
	guePort       = 6080
	gueSourcePort = 49152
	gueSourceBits = 14
)

type mac [6]byte

// hop are a frame's MAC addresses.
type hop struct{ to, from mac }

// segment is what a frame carries beside addresses and ports.
type segment struct {
	protocol      uint8 // 0: TCP
	flags         byte  // of TCP
	sequence, ack uint32
	payload       int    // bytes of no meaning
	data          []byte // instead of payload
}

// frame is an Ethernet frame: the template of many, or one of them. Every kind of packet has four bytes first that differ
// from frame to frame: the ports, those of an ESP header (RFC 4303) that names the association, or type and code of ICMP
// and its checksum.
type frame struct {
	ipv6  bool
	l4    int // offset of what the IP packet carries
	check int // and in it, of the checksum
	bytes []byte
}

func ipSize(ipv6 bool) int {
	if ipv6 {
		return ipv6Size
	}
	return ipv4Size
}

// checkAt is where a protocol has its checksum. ESP has none: what stands there is two bytes of what it encrypts.
func checkAt(protocol uint8) int {
	switch protocol {
	case unix.IPPROTO_UDP:
		return 6
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return 2
	}
	return 16
}

// newFrame makes a frame; its checksums are right.
func newFrame(at hop, from, to netip.AddrPort, s segment) frame {
	f := frame{ipv6: from.Addr().Is6()}
	f.l4 = etherSize + ipSize(f.ipv6)
	protocol := s.protocol
	if protocol == 0 {
		protocol = unix.IPPROTO_TCP
	}
	f.check = checkAt(protocol)
	var header []byte
	switch protocol {
	case unix.IPPROTO_TCP:
		header = make([]byte, tcpSize, tcpSize+tcpOptions)
		binary.BigEndian.PutUint32(header[4:], s.sequence)
		binary.BigEndian.PutUint32(header[8:], s.ack)
		header[12], header[13] = (tcpSize+tcpOptions)/4<<4, s.flags
		binary.BigEndian.PutUint16(header[14:], 0xffff) // window
		header = append(header, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1)
	case unix.IPPROTO_UDP:
		header = make([]byte, udpSize)
		binary.BigEndian.PutUint16(header[4:], uint16(udpSize+s.payload))
	default:
		header = make([]byte, icmpSize)
	}
	data := s.data
	if data == nil {
		data = make([]byte, s.payload)
		for i := range data {
			data[i] = byte(i)
		}
	}
	f.bytes = append(ipHeader(at, from.Addr(), to.Addr(), protocol, timeToLive, len(header)+len(data)), header...)
	f.bytes = append(f.bytes, data...)
	f.setEnds(from, to)
	return f
}

// ipHeader is a frame as far as the end of its IP header, which carries so many bytes of a protocol.
func ipHeader(at hop, from, to netip.Addr, protocol, ttl uint8, size int) []byte {
	b := make([]byte, etherSize+ipSize(from.Is6()))
	ip := b[etherSize:]
	if from.Is6() {
		binary.BigEndian.PutUint16(b[12:], unix.ETH_P_IPV6)
		ip[0] = 6 << 4
		binary.BigEndian.PutUint16(ip[4:], uint16(size))
		ip[6], ip[7] = protocol, ttl
	} else {
		binary.BigEndian.PutUint16(b[12:], unix.ETH_P_IP)
		ip[0] = 4<<4 | 5
		binary.BigEndian.PutUint16(ip[2:], uint16(ipv4Size+size))
		ip[6] = 0x40 // don't fragment
		ip[8], ip[9] = ttl, protocol
	}
	f := frame{ipv6: from.Is6(), bytes: b}
	f.setHop(at)
	copy(f.addresses(), append(from.AsSlice(), to.AsSlice()...))
	f.setIPChecksum()
	return b
}

func (f frame) setHop(at hop) {
	copy(f.bytes, at.to[:])
	copy(f.bytes[6:], at.from[:])
}

func (f frame) protocol() uint8 {
	if f.ipv6 {
		return f.bytes[etherSize+6]
	}
	return f.bytes[etherSize+9]
}

// addresses are where the addresses stand, source before destination.
func (f frame) addresses() []byte {
	if f.ipv6 {
		return f.bytes[etherSize+8 : etherSize+40]
	}
	return f.bytes[etherSize+12 : etherSize+20]
}

// setEnds puts addresses and ports, and makes the checksums right.
func (f frame) setEnds(from, to netip.AddrPort) {
	copy(f.addresses(), append(from.Addr().AsSlice(), to.Addr().AsSlice()...))
	binary.BigEndian.PutUint16(f.bytes[f.l4:], from.Port())
	binary.BigEndian.PutUint16(f.bytes[f.l4+2:], to.Port())
	f.setChecksums()
}

func (f frame) setChecksums() {
	binary.BigEndian.PutUint16(f.bytes[f.l4+f.check:], 0)
	sum := checksum(f.l4Sum())
	if sum == 0 && f.protocol() == unix.IPPROTO_UDP {
		sum = 0xffff // RFC 768
	}
	binary.BigEndian.PutUint16(f.bytes[f.l4+f.check:], sum)
	f.setIPChecksum()
}

func (f frame) setIPChecksum() {
	if !f.ipv6 {
		ip := f.bytes[etherSize : etherSize+ipv4Size]
		binary.BigEndian.PutUint16(ip[10:], 0)
		binary.BigEndian.PutUint16(ip[10:], checksum(sum(ip)))
	}
}

// pseudo tells whether the addresses are in the checksum behind the IP header (RFC 9293, section 3.1; RFC 8200,
// section 8.1). ICMP leaves them out.
func (f frame) pseudo() bool { return f.protocol() != unix.IPPROTO_ICMP }

// l4Sum is the sum of what the checksum behind the IP header is of.
func (f frame) l4Sum() uint64 {
	if !f.pseudo() {
		return sum(f.bytes[f.l4:])
	}
	return sum(f.addresses()) + uint64(f.protocol()) + uint64(len(f.bytes)-f.l4) + sum(f.bytes[f.l4:])
}

func (f frame) decrementTTL() {
	if f.ipv6 {
		f.bytes[etherSize+7]--
		return
	}
	f.bytes[etherSize+8]--
	f.setIPChecksum()
}

// inside is the frame in a tunnel from one address to another: by gue with a hash of its connection, else by ipip.
func (f frame) inside(at hop, from, to netip.Addr, gue bool, hash uint64) frame {
	inner := f.bytes[etherSize:]
	protocol := uint8(unix.IPPROTO_IPIP)
	if f.ipv6 {
		protocol = unix.IPPROTO_IPV6
	}
	var between []byte
	if gue {
		protocol = unix.IPPROTO_UDP
		between = make([]byte, udpSize) // without a checksum (RFC 6935)
		binary.BigEndian.PutUint16(between, uint16(gueSourcePort|hash>>16&(1<<gueSourceBits-1)))
		binary.BigEndian.PutUint16(between[2:], guePort)
		binary.BigEndian.PutUint16(between[4:], uint16(udpSize+len(inner)))
	}
	out := frame{ipv6: from.Is6(), l4: etherSize + ipSize(from.Is6())}
	out.bytes = append(ipHeader(at, from, to, protocol, timeToLive, len(between)+len(inner)), between...)
	out.bytes = append(out.bytes, inner...)
	return out
}

func (f frame) clone() frame {
	f.bytes = append([]byte(nil), f.bytes...)
	return f
}

// sum adds up 16-bit words; an odd last byte is the high half of one.
func sum(b []byte) (total uint64) {
	for ; len(b) > 1; b = b[2:] {
		total += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		total += uint64(b[0]) << 8
	}
	return total
}

// checksum is the Internet checksum (RFC 1071) of a sum.
func checksum(sum uint64) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// orderer makes entries of the harness's order from what all frames share and the ends of each: a million takes no time
// to speak of.
type orderer struct {
	ipv6, pseudo, udp bool
	ip, l4            uint64 // sums of what all frames share
}

func newOrderer(template frame) orderer {
	t := template.clone()
	addresses := t.addresses()
	if t.ipv6 {
		clear(addresses[12:16])
		clear(addresses[28:])
	} else {
		clear(addresses)
		clear(t.bytes[etherSize+10 : etherSize+12])
	}
	clear(t.bytes[t.l4 : t.l4+4])
	clear(t.bytes[t.l4+t.check : t.l4+t.check+2])
	return orderer{t.ipv6, t.pseudo(), t.protocol() == unix.IPPROTO_UDP, sum(t.bytes[etherSize:t.l4]), t.l4Sum()}
}

// entry is the frame from one end to the other. IPv6 addresses must be of the template's networks of 96 bits.
func (o *orderer) entry(from, to netip.AddrPort) harnessEnds {
	var words [2][4]byte
	for i, a := range [2]netip.Addr{from.Addr(), to.Addr()} {
		if o.ipv6 {
			b := a.As16()
			words[i] = [4]byte(b[12:])
		} else {
			words[i] = a.As4()
		}
	}
	addresses := sum(words[0][:]) + sum(words[1][:])
	l4 := o.l4 + uint64(from.Port()) + uint64(to.Port())
	if o.pseudo {
		l4 += addresses
	}
	check := checksum(l4)
	if o.udp && check == 0 {
		check = 0xffff
	}
	return harnessEnds{
		Saddr: binary.NativeEndian.Uint32(words[0][:]), Daddr: binary.NativeEndian.Uint32(words[1][:]),
		Sport: wire(from.Port()), Dport: wire(to.Port()), IpCheck: wire(checksum(o.ip + addresses)), L4Check: wire(check),
	}
}

// wire is a number of two bytes in network byte order, as the host reads it.
func wire(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}

// asReset makes the headers those of an answer of our own: no options, no window, the lengths of what is there.
func (f frame) asReset() frame {
	ip, l4 := f.bytes[etherSize:], f.bytes[f.l4:]
	if f.ipv6 {
		binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)))
	} else {
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	}
	l4[12] = tcpSize / 4 << 4
	clear(l4[14:tcpSize])
	f.setChecksums()
	if len(f.bytes) < frameMin {
		f.bytes = append(f.bytes, make([]byte, frameMin-len(f.bytes))...)
	}
	return f
}

// frameMin is what the data plane pads its own frames to.
const frameMin = 60
