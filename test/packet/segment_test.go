package packet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// TCP flags as they stand in the header's byte 13 (RFC 9293, section 3.1).
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
	urg
	ece
	cwr
)

// segment is a TCP segment or a UDP datagram in its frame, by its fields. Its bytes are made anew each time, so that what
// a packet should look like after Fairlead owes nothing to how Fairlead changes it.
type segment struct {
	ethSource, ethDestination [6]byte
	tags                      []tag
	outer                     *outer
	source, destination       netip.AddrPort

	ttl        uint8 // or hop limit
	tos        uint8 // or traffic class
	flowLabel  uint32
	id         uint16
	df, mf     bool
	offset     uint16 // of the fragment, in 8-byte units
	ipOptions  []layers.IPv4Option
	extensions []extension

	udp        bool
	noChecksum bool // of UDP: zero

	sequence, acknowledgement uint32
	flags                     uint8
	window, urgent            uint16
	options                   []layers.TCPOption

	payload []byte
	padding []byte // behind the packet, as Ethernet pads
}

// extension is an IPv6 extension header: its number, and its bytes from the second on (the first names the next one).
type extension struct {
	number uint8
	rest   []byte
}

// tag is a VLAN tag: its EtherType, and what stands behind that (IEEE 802.1Q): priority, drop eligibility, VLAN.
type tag struct {
	etherType, control uint16
}

// outer is what an encapsulated packet stands in.
type outer struct {
	source, destination netip.Addr
	tos                 uint8
	id                  uint16
	df                  bool
	gue                 bool
	port                uint16 // gue: its UDP source port
}

const (
	tunnelTTL = 64
	guePort   = 6080 // of IANA
)

func (s segment) length() uint32 { return uint32(len(s.bytes())) }

// end is the sequence number behind the segment.
func (s segment) end() uint32 {
	end := s.sequence + uint32(len(s.payload))
	if s.flags&syn != 0 {
		end++
	}
	if s.flags&fin != 0 {
		end++
	}
	return end
}

func (s segment) protocol() layers.IPProtocol {
	if s.udp {
		return layers.IPProtocolUDP
	}
	return layers.IPProtocolTCP
}

func etherTypeOf(address netip.Addr) layers.EthernetType {
	if address.Is4() {
		return layers.EthernetTypeIPv4
	}
	return layers.EthernetTypeIPv6
}

// serialize makes the bytes of layers, their lengths and checksums right.
func serialize(stack ...gopacket.SerializableLayer) []byte {
	buffer := gopacket.NewSerializeBuffer()
	options := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buffer, options, stack...); err != nil {
		panic(fmt.Sprintf("serialize %+v: %v", stack, err))
	}
	return buffer.Bytes()
}

// link is an Ethernet header with its tags.
func link(source, destination [6]byte, tags []tag, etherType layers.EthernetType) []byte {
	header := slices.Concat(destination[:], source[:])
	for _, t := range tags {
		header = binary.BigEndian.AppendUint16(header, t.etherType)
		header = binary.BigEndian.AppendUint16(header, t.control)
	}
	return binary.BigEndian.AppendUint16(header, uint16(etherType))
}

// bytes is the frame, its lengths and checksums right.
func (s segment) bytes() []byte {
	packet, first := s.packet(), s.source.Addr()
	if s.outer != nil {
		packet, first = s.outer.around(packet, first), s.outer.source
	}
	return slices.Concat(link(s.ethSource, s.ethDestination, s.tags, etherTypeOf(first)), packet, s.padding)
}

// packet is the IP packet, without what it stands in.
func (s segment) packet() []byte {
	var stack []gopacket.SerializableLayer
	var network gopacket.NetworkLayer
	if s.source.Addr().Is4() {
		ip := &layers.IPv4{
			Version: 4, TTL: s.ttl, TOS: s.tos, Id: s.id, Protocol: s.protocol(), FragOffset: s.offset,
			SrcIP: s.source.Addr().AsSlice(), DstIP: s.destination.Addr().AsSlice(), Options: s.ipOptions,
		}
		if s.df {
			ip.Flags |= layers.IPv4DontFragment
		}
		if s.mf {
			ip.Flags |= layers.IPv4MoreFragments
		}
		network, stack = ip, append(stack, ip)
	} else {
		ip := &layers.IPv6{
			Version: 6, HopLimit: s.ttl, TrafficClass: s.tos, FlowLabel: s.flowLabel, NextHeader: s.protocol(),
			SrcIP: s.source.Addr().AsSlice(), DstIP: s.destination.Addr().AsSlice(),
		}
		network, stack = ip, append(stack, ip)
		for i, header := range s.extensions {
			next := uint8(s.protocol())
			if i+1 < len(s.extensions) {
				next = s.extensions[i+1].number
			}
			stack = append(stack, gopacket.Payload(append([]byte{next}, header.rest...)))
		}
		if len(s.extensions) > 0 {
			ip.NextHeader = layers.IPProtocol(s.extensions[0].number)
		}
	}
	return serialize(append(stack, gopacket.Payload(s.transport(network)))...)
}

// transport is the TCP segment or UDP datagram.
func (s segment) transport(network gopacket.NetworkLayer) []byte {
	if s.udp {
		udp := &layers.UDP{SrcPort: layers.UDPPort(s.source.Port()), DstPort: layers.UDPPort(s.destination.Port())}
		if err := udp.SetNetworkLayerForChecksum(network); err != nil {
			panic(err)
		}
		datagram := serialize(udp, gopacket.Payload(s.payload))
		if s.noChecksum {
			clear(datagram[6:8])
		}
		return datagram
	}
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(s.source.Port()), DstPort: layers.TCPPort(s.destination.Port()),
		Seq: s.sequence, Ack: s.acknowledgement, Window: s.window, Urgent: s.urgent, Options: s.options,
		FIN: s.flags&fin != 0, SYN: s.flags&syn != 0, RST: s.flags&rst != 0, PSH: s.flags&psh != 0,
		ACK: s.flags&ack != 0, URG: s.flags&urg != 0, ECE: s.flags&ece != 0, CWR: s.flags&cwr != 0,
	}
	if err := tcp.SetNetworkLayerForChecksum(network); err != nil {
		panic(err)
	}
	return serialize(tcp, gopacket.Payload(s.payload))
}

// around is a packet of an address's family in what it stands in: IP in IP (RFC 2003, RFC 2473, RFC 4213), or IP in UDP
// in IP, its checksum zero (draft-ietf-intarea-gue, variant 1).
func (o outer) around(packet []byte, of netip.Addr) []byte {
	protocol := layers.IPProtocolIPv4
	if !of.Is4() {
		protocol = layers.IPProtocolIPv6
	}
	if o.gue {
		protocol = layers.IPProtocolUDP
		header := binary.BigEndian.AppendUint16(nil, o.port)
		header = binary.BigEndian.AppendUint16(header, guePort)
		header = binary.BigEndian.AppendUint16(header, uint16(len(packet)+8))
		packet = slices.Concat(header, []byte{0, 0}, packet)
	}
	if o.source.Is4() {
		ip := &layers.IPv4{
			Version: 4, TTL: tunnelTTL, TOS: o.tos, Id: o.id, Protocol: protocol, SrcIP: o.source.AsSlice(),
			DstIP: o.destination.AsSlice(),
		}
		if o.df {
			ip.Flags = layers.IPv4DontFragment
		}
		return serialize(ip, gopacket.Payload(packet))
	}
	return serialize(&layers.IPv6{
		Version: 6, HopLimit: tunnelTTL, TrafficClass: o.tos, NextHeader: protocol, SrcIP: o.source.AsSlice(),
		DstIP: o.destination.AsSlice(),
	}, gopacket.Payload(packet))
}

// routed is the segment as a router passes it on to a next hop, with the tags of the way there.
func (s segment) routed(source, destination [6]byte, tags ...tag) segment {
	s.ethSource, s.ethDestination, s.tags = source, destination, tags
	s.ttl--
	return s
}

// tagged is the segment with other VLAN tags.
func (s segment) tagged(tags ...tag) segment {
	s.tags = tags
	return s
}

// between is the segment with other ends.
func (s segment) between(source, destination netip.AddrPort) segment {
	s.source, s.destination = source, destination
	return s
}

// identified is the segment with another identification, if it is a fragment. Numbers stand there as the host has them.
func (s segment) identified(number uint64) segment {
	if s.mf || s.offset > 0 {
		s.id = network(uint16(number))
	}
	s.extensions = slices.Clone(s.extensions)
	for i, header := range s.extensions {
		if header.number == unix.IPPROTO_FRAGMENT && header.rest[1]|header.rest[2] != 0 {
			rest := binary.NativeEndian.AppendUint32(slices.Clone(header.rest[:3]), uint32(number))
			s.extensions[i].rest = rest
		}
	}
	return s
}

// reset is the RST that answers the segment (RFC 9293, section 3.10.7.1), from whom it was for, its time to live 64, its
// IPv4 ID zero with DF set (RFC 6864, section 4.1). Where the segment's frame was shorter than Ethernet's least, so is
// the answer's.
func (s segment) reset() segment {
	answer := segment{
		ethSource: s.ethDestination, ethDestination: s.ethSource, tags: s.tags,
		source: s.destination, destination: s.source,
		ttl: 64, df: true,
	}
	if s.flags&ack != 0 {
		answer.sequence, answer.flags = s.acknowledgement, rst
	} else {
		answer.acknowledgement, answer.flags = s.end(), rst|ack
	}
	if room := min(int(s.length()), 60) - int(answer.length()); room > 0 {
		answer.padding = make([]byte, room)
	}
	return answer
}

// quoteMost is how much of a packet an ICMP error quotes at most.
const quoteMost = 512

// refused is the ICMP error that answers the packet, from whom it was for (RFC 792, RFC 4443): its time to live 64, its
// IPv4 ID zero with DF set, the frame's tags kept. Behind it stands what the frame holds of the packet, up to quoteMost.
func (s segment) refused(kind, code uint8, mtu uint32) []byte {
	quote := s.packet()
	quote = quote[:min(len(quote), quoteMost)]
	frame := link(s.ethDestination, s.ethSource, s.tags, etherTypeOf(s.source.Addr()))
	rest := binary.BigEndian.AppendUint32(nil, mtu)
	if s.source.Addr().Is4() {
		return slices.Concat(frame, serialize(
			&layers.IPv4{Version: 4, TTL: 64, Flags: layers.IPv4DontFragment, Protocol: layers.IPProtocolICMPv4,
				SrcIP: s.destination.Addr().AsSlice(), DstIP: s.source.Addr().AsSlice()},
			&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(kind, code), Id: uint16(mtu >> 16), Seq: uint16(mtu)},
			gopacket.Payload(quote)))
	}
	ip := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolICMPv6,
		SrcIP: s.destination.Addr().AsSlice(), DstIP: s.source.Addr().AsSlice()}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, code)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		panic(err)
	}
	return slices.Concat(frame, serialize(ip, icmp, gopacket.Payload(rest), gopacket.Payload(quote)))
}

// unreachable tells the packet's sender that nobody is at its port.
func (s segment) unreachable() []byte {
	if s.source.Addr().Is4() {
		return s.refused(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodePort, 0)
	}
	return s.refused(layers.ICMPv6TypeDestinationUnreachable, layers.ICMPv6CodePortUnreachable, 0)
}

// tooBig tells the packet's sender how much its way takes.
func (s segment) tooBig(mtu uint32) []byte {
	if s.source.Addr().Is4() {
		return s.refused(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodeFragmentationNeeded, mtu)
	}
	return s.refused(layers.ICMPv6TypePacketTooBig, 0, mtu)
}

// transportOffset is where the TCP or UDP header starts in the segment's frame.
func (s segment) transportOffset() int {
	bare := s
	bare.payload, bare.padding, bare.options = nil, nil, nil
	if s.udp {
		return int(bare.length()) - 8
	}
	return int(bare.length()) - 20
}

// checksumOffset is where its checksum stands.
func (s segment) checksumOffset() int {
	if s.udp {
		return s.transportOffset() + 6
	}
	return s.transportOffset() + 16
}

// residual is the one's complement sum over pseudo header and segment: zero where the checksum is right, else how wrong
// it is.
func (s segment) residual(frame []byte) uint16 {
	var sum uint64
	add := func(bytes []byte) {
		for i := 0; i+1 < len(bytes); i += 2 {
			sum += uint64(binary.BigEndian.Uint16(bytes[i:]))
		}
		if len(bytes)%2 != 0 {
			sum += uint64(bytes[len(bytes)-1]) << 8
		}
	}
	transport := frame[s.transportOffset() : len(frame)-len(s.padding)]
	add(s.source.Addr().AsSlice())
	add(s.destination.Addr().AsSlice())
	sum += uint64(s.protocol()) + uint64(len(transport))
	add(transport)
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
