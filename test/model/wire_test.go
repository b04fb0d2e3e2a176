package model

import (
	"encoding/binary"
	"net/netip"
	"strings"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// What is on the wire, by the RFCs alone.

// IANA protocol numbers.
const (
	protoHopByHop    = 0
	protoICMP        = 1
	protoIPIP        = 4
	protoTCP         = 6
	protoUDP         = 17
	protoIPv6        = 41
	protoRouting     = 43
	protoFragment    = 44
	protoAH          = 51
	protoICMPv6      = 58
	protoNoNext      = 59
	protoDestination = 60
)

// EtherTypes.
const (
	etherIPv4   = 0x0800
	etherARP    = 0x0806
	ether8021Q  = 0x8100
	ether8021AD = 0x88a8
	etherIPv6   = 0x86dd
)

// TCP flags as they stand in the header's byte 13 (RFC 9293, section 3.1).
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

const guePort = 6080

type mac [6]byte

// group tells a multicast or broadcast address.
func (m mac) group() bool { return m[0]&1 != 0 }

var broadcast = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// tag is an IEEE 802.1Q tag: its EtherType, and priority and VLAN id.
type tag struct{ ether, control uint16 }

func (t tag) id() uint16 { return t.control & 0xfff }

// packet is a frame as a strict reader understands it.
type packet struct {
	frame    []byte
	to, from mac
	tags     []tag
	ether    uint16
	l3       int // where the network header stands

	// malformed says what of the network's headers contradicts itself or the frame's length, exotic what is lawful and
	// may be passed by unread.
	malformed, exotic   string
	family              uint8 // 4, 6; 0: neither
	source, destination netip.Addr
	tos, ttl            uint8
	protocol            uint8 // of what stands at l4
	l4, end             int   // where the network's payload begins, and where the packet ends
	df, mf              bool
	offset              int // of a fragment, in bytes
	id                  uint32
	fragmentHeader      int // IPv6: where it stands; 0: nowhere
	extensions          int // IPv6: how many headers before l4

	ported       bool // the ports could be read
	sport, dport uint16
}

func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }
func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }

// fragment tells whether it is a part of a packet. An atomic fragment (RFC 6946) is none.
func (p *packet) fragment() bool { return p.mf || p.offset > 0 }

// later tells a fragment other than the first.
func (p *packet) later() bool { return p.offset > 0 }

// length is the network packet's.
func (p *packet) length() int { return p.end - p.l3 }

func (p *packet) from4() netip.AddrPort { return netip.AddrPortFrom(p.source, p.sport) }
func (p *packet) to4() netip.AddrPort   { return netip.AddrPortFrom(p.destination, p.dport) }

// parse reads a frame. It never fails: what can't be read is said.
func parse(frame []byte) *packet {
	p := &packet{frame: frame}
	if len(frame) < 14 {
		p.malformed = "frame shorter than an Ethernet header"
		return p
	}
	p.to, p.from = mac(frame), mac(frame[6:])
	p.ether, p.l3 = be16(frame[12:]), 14
	for len(p.tags) < 2 && (p.ether == ether8021Q || p.ether == ether8021AD) {
		if len(frame) < p.l3+4 {
			p.malformed = "frame ends in a VLAN tag"
			return p
		}
		p.tags = append(p.tags, tag{p.ether, be16(frame[p.l3:])})
		p.ether = be16(frame[p.l3+2:])
		p.l3 += 4
	}
	switch p.ether {
	case etherIPv4:
		p.parseIPv4()
	case etherIPv6:
		p.parseIPv6()
	}
	if p.family != 0 && p.malformed == "" && !p.later() && (p.protocol == protoTCP || p.protocol == protoUDP) && p.end-p.l4 >= 4 {
		p.ported, p.sport, p.dport = true, be16(frame[p.l4:]), be16(frame[p.l4+2:])
	}
	return p
}

// parseIPv4 is RFC 791, section 3.1.
func (p *packet) parseIPv4() {
	p.family = 4
	ip := p.frame[p.l3:]
	if len(ip) < 20 {
		p.malformed = "frame ends in the IPv4 header"
		return
	}
	p.source, p.destination = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
	p.tos, p.ttl, p.protocol = ip[1], ip[8], ip[9]
	fragment := be16(ip[6:])
	p.id, p.df, p.mf, p.offset = uint32(be16(ip[4:])), fragment&0x4000 != 0, fragment&0x2000 != 0, int(fragment&0x1fff)*8
	header, total := int(ip[0]&15)*4, int(be16(ip[2:]))
	p.l4, p.end = p.l3+header, p.l3+total
	switch {
	case ip[0]>>4 != 4:
		p.malformed = "the version is not 4"
	case header < 20:
		p.malformed = "the IPv4 header's length is below its least"
	case total < header:
		p.malformed = "the total length is below the header's"
	case total > len(ip):
		p.malformed = "the total length is beyond the frame"
	}
	if p.malformed != "" {
		return
	}
	if fragment&0x8000 != 0 {
		p.exotic = "reserved flag" // RFC 791: must be zero
	}
	if header > 20 {
		p.parseOptions(ip[20:header])
	}
}

// parseOptions looks for what makes options malformed, and for source routes, whose end the destination may not be.
func (p *packet) parseOptions(options []byte) {
	for i := 0; i < len(options); {
		switch kind := options[i]; {
		case kind == 0:
			return
		case kind == 1:
			i++
		case i+1 >= len(options) || options[i+1] < 2 || i+int(options[i+1]) > len(options):
			p.exotic = "an IPv4 option's length contradicts the header's"
			return
		default:
			if kind == 131 || kind == 137 {
				p.exotic = "source route"
			}
			i += int(options[i+1])
		}
	}
}

// plainExtensions is how many extension headers everybody has to be able to read.
const plainExtensions = 3

// parseIPv6 is RFC 8200, sections 3 and 4.
func (p *packet) parseIPv6() {
	p.family = 6
	ip := p.frame[p.l3:]
	if len(ip) < 40 {
		p.malformed = "frame ends in the IPv6 header"
		return
	}
	p.source, p.destination = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
	p.tos, p.ttl, p.protocol = ip[0]<<4|ip[1]>>4, ip[7], ip[6]
	p.df = true // routers don't fragment
	p.l4, p.end = p.l3+40, p.l3+40+int(be16(ip[4:]))
	switch {
	case ip[0]>>4 != 6:
		p.malformed = "the version is not 6"
	case p.end > len(p.frame):
		p.malformed = "the payload's length is beyond the frame"
	}
	if p.malformed != "" {
		return
	}
	for {
		switch p.protocol {
		case protoHopByHop, protoRouting, protoDestination, protoAH, protoFragment:
		default:
			if p.extensions > plainExtensions && p.exotic == "" {
				p.exotic = "many extension headers"
			}
			return
		}
		if p.protocol == protoHopByHop && p.extensions > 0 {
			p.malformed = "a hop-by-hop header that is not the first"
			return
		}
		if p.end-p.l4 < 8 {
			p.malformed = "the packet ends in an extension header"
			return
		}
		header := p.frame[p.l4:]
		size := int(header[1])*8 + 8
		switch p.protocol {
		case protoAH:
			size = int(header[1])*4 + 8
			p.exotic = "authentication header"
		case protoRouting:
			if header[3] > 0 {
				p.exotic = "source route"
			}
		case protoFragment:
			size = 8
			if p.fragmentHeader != 0 {
				p.exotic = "fragment header in a fragment header"
			}
			p.fragmentHeader = p.l4
			p.mf, p.offset, p.id = header[3]&1 != 0, int(be16(header[2:])&0xfff8), be32(header[4:])
		}
		if size > p.end-p.l4 {
			p.malformed = "an extension header is longer than the packet"
			return
		}
		p.protocol = header[0]
		p.l4 += size
		p.extensions++
		if p.later() {
			return // what follows is in the middle of something
		}
	}
}

// transport is the network's payload.
func (p *packet) transport() []byte { return p.frame[p.l4:p.end] }

// transportFault says what is wrong with the TCP or UDP header of a whole packet or first fragment; "": nothing.
func (p *packet) transportFault() string {
	t := p.transport()
	switch p.protocol {
	case protoTCP: // RFC 9293, section 3.1
		switch {
		case len(t) < 20:
			return "the packet ends in the TCP header"
		case t[12]>>4 < 5:
			return "the TCP header's length is below its least"
		case int(t[12]>>4)*4 > len(t):
			return "the TCP header is longer than the packet"
		}
	case protoUDP: // RFC 768
		switch {
		case len(t) < 8:
			return "the packet ends in the UDP header"
		case be16(t[4:]) < 8:
			return "the UDP length is below the header's"
		case int(be16(t[4:])) > len(t) && !p.fragment():
			return "the UDP length is beyond the packet"
		}
	}
	return ""
}

// The ones' complement sum of RFC 1071, section 1.

func sum(b []byte) (s uint64) {
	for len(b) >= 8 {
		s += uint64(be32(b)) + uint64(be32(b[4:]))
		b = b[8:]
	}
	for len(b) >= 2 {
		s += uint64(be16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

func fold(s uint64) uint16 {
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// residue is a sum's class: 0xffff and 0 are the same number in ones' complement.
func residue(s uint64) uint16 { return fold(s) % 0xffff }

// pseudo is the sum of a pseudo header (RFC 9293, section 3.1; RFC 768; RFC 8200, section 8.1).
func pseudo(source, destination netip.Addr, protocol uint8, length int) uint64 {
	return sum(source.AsSlice()) + sum(destination.AsSlice()) + uint64(protocol) + uint64(length)
}

// wrongness is how wrong a transport checksum is, 0 where it is right. Of a fragment it is a number that must not change
// either. ICMP has no pseudo header.
func (p *packet) wrongness() uint16 {
	s := sum(p.transport())
	if p.protocol != protoICMP {
		s += pseudo(p.source, p.destination, p.protocol, p.end-p.l4)
	}
	return residue(s)
}

// headerWrongness is the same of the IPv4 header's checksum.
func (p *packet) headerWrongness() uint16 {
	if p.family != 4 {
		return 0
	}
	return residue(sum(p.frame[p.l3:p.l4]))
}

// checksumAt is where the transport header has its checksum; -1: nowhere.
func checksumAt(protocol uint8) int {
	switch protocol {
	case protoTCP:
		return 16
	case protoUDP:
		return 6
	case protoICMP, protoICMPv6:
		return 2
	}
	return -1
}

// computed is the checksum that RFC 1071 computes over a whole segment whose own field counts as zero. UDP sends ones
// instead of a zero (RFC 768).
func computed(source, destination netip.Addr, protocol uint8, segment []byte) uint16 {
	at := checksumAt(protocol)
	s := sum(segment) - sum(segment[at:at+2])
	if protocol != protoICMP {
		s += pseudo(source, destination, protocol, len(segment))
	}
	c := ^fold(s)
	if c == 0 && protocol == protoUDP {
		c = 0xffff
	}
	return c
}

// headerChecksum is that of an IPv4 header whose own field counts as zero.
func headerChecksum(header []byte) uint16 {
	return ^fold(sum(header) - sum(header[10:12]))
}

// unicast tells a source that one host can have, and to which an answer may go (RFC 1122, section 3.2.1.3; RFC 4291,
// sections 2.5.2, 2.5.3 and 2.7).
func unicast(a netip.Addr) bool {
	if a.Is4() {
		first := a.As4()[0]
		return first != 0 && first != 127 && first < 224
	}
	return !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback()
}

// secondOpinion is what gopacket finds wrong with a packet's network header, and with the transport header of a whole one;
// "": nothing. TCP's options are the ends' own matter.
func secondOpinion(p *packet) string {
	if p.family == 0 {
		return ""
	}
	all := gopacket.NewPacket(p.frame, layers.LayerTypeEthernet, gopacket.DecodeOptions{Lazy: true, NoCopy: true})
	network := all.NetworkLayer()
	failed := func() string {
		if failure := all.ErrorLayer(); failure != nil {
			return failure.Error().Error()
		}
		return "cut short"
	}
	if network == nil || p.extensions == 0 && all.Metadata().Truncated { // a hop-by-hop header it takes for a missing part
		return failed()
	}
	if p.fragment() || p.extensions > 0 || p.protocol != protoTCP && p.protocol != protoUDP {
		return ""
	}
	if transport := all.TransportLayer(); transport == nil {
		if fault := failed(); !strings.Contains(fault, "option") {
			return fault
		}
	}
	return ""
}
