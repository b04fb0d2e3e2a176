package packet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
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

// segment is a TCP segment in its frame, by its fields. Its bytes are made anew each time, so that what a packet should
// look like after Fairlead owes nothing to how Fairlead changes it.
type segment struct {
	ethSource, ethDestination [6]byte
	source, destination       netip.AddrPort

	ttl        uint8 // or hop limit
	tos        uint8 // or traffic class
	flowLabel  uint32
	id         uint16
	df, mf     bool
	offset     uint16 // of the fragment, in 8-byte units
	ipOptions  []layers.IPv4Option
	extensions []extension

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

// bytes is the frame, its lengths and checksums right.
func (s segment) bytes() []byte {
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(s.source.Port()), DstPort: layers.TCPPort(s.destination.Port()),
		Seq: s.sequence, Ack: s.acknowledgement, Window: s.window, Urgent: s.urgent, Options: s.options,
		FIN: s.flags&fin != 0, SYN: s.flags&syn != 0, RST: s.flags&rst != 0, PSH: s.flags&psh != 0,
		ACK: s.flags&ack != 0, URG: s.flags&urg != 0, ECE: s.flags&ece != 0, CWR: s.flags&cwr != 0,
	}
	var stack []gopacket.SerializableLayer
	var network gopacket.NetworkLayer
	etherType := layers.EthernetTypeIPv4
	if s.source.Addr().Is4() {
		ip := &layers.IPv4{
			Version: 4, TTL: s.ttl, TOS: s.tos, Id: s.id, Protocol: layers.IPProtocolTCP, FragOffset: s.offset,
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
		etherType = layers.EthernetTypeIPv6
		ip := &layers.IPv6{
			Version: 6, HopLimit: s.ttl, TrafficClass: s.tos, FlowLabel: s.flowLabel, NextHeader: layers.IPProtocolTCP,
			SrcIP: s.source.Addr().AsSlice(), DstIP: s.destination.Addr().AsSlice(),
		}
		network, stack = ip, append(stack, ip)
		for i, header := range s.extensions {
			next := uint8(layers.IPProtocolTCP)
			if i+1 < len(s.extensions) {
				next = s.extensions[i+1].number
			}
			stack = append(stack, gopacket.Payload(append([]byte{next}, header.rest...)))
		}
		if len(s.extensions) > 0 {
			ip.NextHeader = layers.IPProtocol(s.extensions[0].number)
		}
	}
	if err := tcp.SetNetworkLayerForChecksum(network); err != nil {
		panic(err)
	}
	buffer := gopacket.NewSerializeBuffer()
	options := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buffer, options, append(stack, tcp, gopacket.Payload(s.payload))...); err != nil {
		panic(fmt.Sprintf("serialize %+v: %v", s, err))
	}
	frame := slices.Concat(s.ethDestination[:], s.ethSource[:], binary.BigEndian.AppendUint16(nil, uint16(etherType)))
	return slices.Concat(frame, buffer.Bytes(), s.padding)
}

// routed is the segment as a router passes it on to a next hop.
func (s segment) routed(source, destination [6]byte) segment {
	s.ethSource, s.ethDestination = source, destination
	s.ttl--
	return s
}

// between is the segment with other ends.
func (s segment) between(source, destination netip.AddrPort) segment {
	s.source, s.destination = source, destination
	return s
}

// reset is the RST that answers the segment (RFC 9293, section 3.10.7.1), from whom it was for, its time to live 64, its
// IPv4 ID zero with DF set (RFC 6864, section 4.1). Where the segment's frame was shorter than Ethernet's least, so is
// the answer's.
func (s segment) reset() segment {
	answer := segment{
		ethSource: s.ethDestination, ethDestination: s.ethSource,
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

// tcpOffset is where the TCP header starts in the segment's frame.
func (s segment) tcpOffset() int {
	bare := s
	bare.payload, bare.padding, bare.options = nil, nil, nil
	return int(bare.length()) - 20
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
	tcp := frame[s.tcpOffset() : len(frame)-len(s.padding)]
	add(s.source.Addr().AsSlice())
	add(s.destination.Addr().AsSlice())
	sum += 6 + uint64(len(tcp))
	add(tcp)
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
