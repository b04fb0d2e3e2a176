package packet

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// message is an ICMP or ICMPv6 message in its frame, by its fields: an error with what it quotes, an echo, a neighbour's
// solicitation or advertisement. Its bytes are made anew each time, checksums too.
type message struct {
	ethSource, ethDestination [6]byte
	tags                      []tag
	outer                     *outer
	source, destination       netip.Addr

	ttl        uint8 // or hop limit
	tos        uint8 // or traffic class
	flowLabel  uint32
	id         uint16
	df, mf     bool
	offset     uint16 // of the fragment, in 8-byte units
	ipOptions  []layers.IPv4Option
	extensions []extension

	kind, code uint8
	rest       uint32 // what stands behind the checksum
	body       []byte // what follows the eight bytes
	padding    []byte // behind the packet, as Ethernet pads
}

const icmpHeader = 8

// bytes is the frame, its lengths and checksums right.
func (m message) bytes() []byte {
	packet, first := m.packet(), m.source
	if m.outer != nil {
		packet, first = m.outer.around(packet, first), m.outer.source
	}
	return slices.Concat(link(m.ethSource, m.ethDestination, m.tags, etherTypeOf(first)), packet, m.padding)
}

// packet is the IP packet, without what it stands in.
func (m message) packet() []byte {
	body := slices.Concat(binary.BigEndian.AppendUint32(nil, m.rest), m.body)
	if m.source.Is4() {
		ip := &layers.IPv4{
			Version: 4, TTL: m.ttl, TOS: m.tos, Id: m.id, Protocol: layers.IPProtocolICMPv4, Options: m.ipOptions,
			FragOffset: m.offset, SrcIP: m.source.AsSlice(), DstIP: m.destination.AsSlice(),
		}
		if m.df {
			ip.Flags |= layers.IPv4DontFragment
		}
		if m.mf {
			ip.Flags |= layers.IPv4MoreFragments
		}
		return serialize(ip, &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(m.kind, m.code), Id: uint16(m.rest >> 16),
			Seq: uint16(m.rest)}, gopacket.Payload(m.body))
	}
	ip := &layers.IPv6{
		Version: 6, HopLimit: m.ttl, TrafficClass: m.tos, FlowLabel: m.flowLabel, NextHeader: layers.IPProtocolICMPv6,
		SrcIP: m.source.AsSlice(), DstIP: m.destination.AsSlice(),
	}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(m.kind, m.code)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		panic(err)
	}
	return serialize(ip, gopacket.Payload(chain(ip, m.extensions, unix.IPPROTO_ICMPV6)),
		gopacket.Payload(serialize(icmp, gopacket.Payload(body))))
}

// chain is a chain of IPv6 extension headers in front of a protocol; the IP header is made to name its first.
func chain(ip *layers.IPv6, headers []extension, protocol uint8) (bytes []byte) {
	next := protocol
	for _, header := range slices.Backward(headers) {
		bytes = slices.Concat([]byte{next}, header.rest, bytes)
		next = header.number
	}
	ip.NextHeader = layers.IPProtocol(next)
	return bytes
}

// checksumOffset is where the message's checksum stands in its frame.
func (m message) checksumOffset() int { return m.icmpOffset() + 2 }

// icmpOffset is where the message itself stands.
func (m message) icmpOffset() int {
	bare := m
	bare.body, bare.padding = nil, nil
	return len(bare.bytes()) - icmpHeader
}

// routed is the message as a router passes it on to a next hop.
func (m message) routed(source, destination [6]byte, tags ...tag) message {
	m.ethSource, m.ethDestination, m.tags = source, destination, tags
	m.ttl--
	return m
}

// residual is how wrong the message's checksum is: the one's complement sum over pseudo header and message, zero where it
// is right.
func (m message) residual(frame []byte) uint16 {
	icmp := frame[m.icmpOffset() : len(frame)-len(m.padding)]
	sum := uint64(0)
	if m.source.Is6() {
		pseudo := slices.Concat(m.source.AsSlice(), m.destination.AsSlice())
		sum = onesSum(pseudo) + uint64(len(icmp)) + unix.IPPROTO_ICMPV6
	}
	sum += onesSum(icmp)
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func onesSum(bytes []byte) (sum uint64) {
	for i := 0; i+1 < len(bytes); i += 2 {
		sum += uint64(binary.BigEndian.Uint16(bytes[i:]))
	}
	if len(bytes)%2 != 0 {
		sum += uint64(bytes[len(bytes)-1]) << 8
	}
	return sum
}

// ICMP's types (RFC 792) and ICMPv6's (RFC 4443, RFC 4861).
const (
	unreachable4      = 3
	fragmentNeeded    = 4 // a code of it
	timeExceeded4     = 11
	parameterProblem4 = 12
	echoReply4        = 0
	echoRequest4      = 8
	unreachable6      = 1
	tooBig6           = 2
	timeExceeded6     = 3
	parameterProblem6 = 4
	echoRequest6      = 128
	echoReply6        = 129
	solicitation6     = 135
	advertisement6    = 136
)
