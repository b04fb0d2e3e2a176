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
	tcpSize    = 20
	tcpOptions = 12 // timestamps, as almost every segment has them
	udpSize    = 8
	timeToLive = 64
	// l4Check is where TCP has its checksum. In UDP it is within the payload: what is written there makes the checksum of
	// the header, which is the same in all frames, right.
	l4Check  = 16
	udpCheck = 0x5eed
)

type mac [6]byte

// hop are a frame's MAC addresses.
type hop struct{ to, from mac }

// segment is what a frame carries beside addresses and ports.
type segment struct {
	flags         byte // of TCP
	sequence, ack uint32
	payload       int // bytes
	udp           bool
}

// frame is an Ethernet frame: the template of many, or one of them.
type frame struct {
	ipv6  bool
	l4    int // offset of the TCP or UDP header
	bytes []byte
}

// newFrame makes a frame; its checksums are right.
func newFrame(at hop, from, to netip.AddrPort, s segment) frame {
	f := frame{ipv6: from.Addr().Is6(), l4: etherSize + 20}
	if f.ipv6 {
		f.l4 = etherSize + 40
	}
	protocol, size := uint8(unix.IPPROTO_TCP), tcpSize+tcpOptions+s.payload
	if s.udp {
		protocol, size = unix.IPPROTO_UDP, udpSize+s.payload
	}
	f.bytes = make([]byte, f.l4+size)
	f.setHop(at)
	ip, l4 := f.bytes[etherSize:], f.bytes[f.l4:]
	if f.ipv6 {
		binary.BigEndian.PutUint16(f.bytes[12:], unix.ETH_P_IPV6)
		ip[0] = 6 << 4
		binary.BigEndian.PutUint16(ip[4:], uint16(size))
		ip[6], ip[7] = protocol, timeToLive
	} else {
		binary.BigEndian.PutUint16(f.bytes[12:], unix.ETH_P_IP)
		ip[0] = 4<<4 | 5
		binary.BigEndian.PutUint16(ip[2:], uint16(20+size))
		ip[6] = 0x40 // don't fragment
		ip[8], ip[9] = timeToLive, protocol
	}
	if s.udp {
		binary.BigEndian.PutUint16(l4[4:], uint16(size))
		binary.BigEndian.PutUint16(l4[6:], udpCheck)
	} else {
		binary.BigEndian.PutUint32(l4[4:], s.sequence)
		binary.BigEndian.PutUint32(l4[8:], s.ack)
		l4[12], l4[13] = (tcpSize+tcpOptions)/4<<4, s.flags
		binary.BigEndian.PutUint16(l4[14:], 0xffff) // window
		copy(l4[tcpSize:], []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1})
	}
	for i := f.l4 + size - s.payload; i < len(f.bytes); i++ {
		f.bytes[i] = byte(i)
	}
	f.setEnds(from, to)
	return f
}

func (f frame) setHop(at hop) {
	copy(f.bytes, at.to[:])
	copy(f.bytes[6:], at.from[:])
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
	binary.BigEndian.PutUint16(f.bytes[f.l4+l4Check:], 0)
	binary.BigEndian.PutUint16(f.bytes[f.l4+l4Check:], checksum(f.l4Sum()))
	if !f.ipv6 {
		ip := f.bytes[etherSize:f.l4]
		binary.BigEndian.PutUint16(ip[10:], 0)
		binary.BigEndian.PutUint16(ip[10:], checksum(sum(ip)))
	}
}

// l4Sum is the sum of pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1) and segment.
func (f frame) l4Sum() uint64 {
	protocol := f.bytes[etherSize+9]
	if f.ipv6 {
		protocol = f.bytes[etherSize+6]
	}
	return sum(f.addresses()) + uint64(protocol) + uint64(len(f.bytes)-f.l4) + sum(f.bytes[f.l4:])
}

func (f frame) decrementTTL() {
	if f.ipv6 {
		f.bytes[etherSize+7]--
		return
	}
	f.bytes[etherSize+8]--
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
	ipv6   bool
	ip, l4 uint64 // sums of what all frames share
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
	clear(t.bytes[t.l4+l4Check : t.l4+l4Check+2])
	return orderer{t.ipv6, sum(t.bytes[etherSize:t.l4]), t.l4Sum()}
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
	return harnessEnds{
		Saddr: binary.NativeEndian.Uint32(words[0][:]), Daddr: binary.NativeEndian.Uint32(words[1][:]),
		Sport: wire(from.Port()), Dport: wire(to.Port()),
		IpCheck: wire(checksum(o.ip + addresses)),
		L4Check: wire(checksum(o.l4 + addresses + uint64(from.Port()) + uint64(to.Port()))),
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
