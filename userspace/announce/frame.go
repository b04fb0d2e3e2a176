package announce

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// mac is an Ethernet address.
type mac [6]byte

func (m mac) hardware() net.HardwareAddr { return slices.Clone(m[:]) }
func (m mac) String() string             { return net.HardwareAddr(m[:]).String() }

// oneHost says whether m is the address of one host: not a group's, and not empty.
func (m mac) oneHost() bool { return m[0]&1 == 0 && m != mac{} }

const (
	ethernetLength = 14
	arpLength      = 28
	ipv6Length     = 40
	ndpLength      = 24 // a solicitation or advertisement without options
	hopByHopLength = 8  // the options header in front of MLD: a router alert alone
	mldLength      = 24 // a query or report of version 1

	arpRequest = 1
	arpReply   = 2

	icmpMLDQuery      = 130
	icmpMLDReport     = 131
	icmpSolicitation  = 135
	icmpAdvertisement = 136
	icmpMLDReport2    = 143

	optionSourceMAC = 1
	optionTargetMAC = 2

	flagOverride = 0x20

	// MODE_IS_EXCLUDE and CHANGE_TO_EXCLUDE_MODE (RFC 3810, 5.2.12), of no sources: all of the group is wanted.
	recordIsExclude = 2
	recordToExclude = 4
	recordLength    = 20
)

var (
	broadcastMAC = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	allNodes     = netip.MustParseAddr("ff02::1")
	allRouters2  = netip.MustParseAddr("ff02::16") // that know MLDv2
)

// solicitedNode is the group that solicitations for address go to (RFC 4291, 2.7.1).
func solicitedNode(address netip.Addr) netip.Addr {
	a := address.As16()
	return netip.AddrFrom16([16]byte{0xff, 0x02, 11: 0x01, 12: 0xff, 13: a[13], 14: a[14], 15: a[15]})
}

// groupMAC is where frames to an IPv6 group go (RFC 2464, 7).
func groupMAC(group netip.Addr) mac {
	a := group.As16()
	return mac{0x33, 0x33, a[12], a[13], a[14], a[15]}
}

// protocolOf reads a frame's EtherType.
func protocolOf(frame []byte) uint16 { return binary.BigEndian.Uint16(frame[12:]) }

func ethernet(to, from mac, protocol uint16, length int) []byte {
	b := make([]byte, ethernetLength, ethernetLength+length)
	copy(b, to[:])
	copy(b[6:], from[:])
	binary.BigEndian.PutUint16(b[12:], protocol)
	return b
}

// buildARP writes an ARP packet for Ethernet and IPv4 (RFC 826).
func buildARP(to, from mac, operation uint16, sender netip.Addr, targetMAC mac, target netip.Addr) []byte {
	b := ethernet(to, from, unix.ETH_P_ARP, arpLength)
	b = append(b, 0, 1, 8, 0, 6, 4)
	b = binary.BigEndian.AppendUint16(b, operation)
	b = append(b, from[:]...)
	b = append(b, sender.AsSlice()...)
	b = append(b, targetMAC[:]...)
	return append(b, target.AsSlice()...)
}

// buildNDP writes a solicitation or an advertisement of target, with an option that tells a MAC where there is one.
func buildNDP(from mac, source, destination netip.Addr, kind, flags uint8, target netip.Addr, option uint8) []byte {
	length := ndpLength
	if option != 0 {
		length += 8
	}
	b := ethernet(groupMAC(destination), from, unix.ETH_P_IPV6, ipv6Length+length)
	b = appendIPv6(b, source, destination, unix.IPPROTO_ICMPV6, 255, length)
	icmp := len(b)
	b = append(b, kind, 0, 0, 0, flags, 0, 0, 0)
	b = append(b, target.AsSlice()...)
	if option != 0 {
		b = append(b, option, 1)
		b = append(b, from[:]...)
	}
	return sealICMP(b, icmp, source, destination)
}

func appendIPv6(b []byte, source, destination netip.Addr, next, hops uint8, length int) []byte {
	b = append(b, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	b = append(b, next, hops)
	b = append(b, source.WithZone("").AsSlice()...)
	return append(b, destination.AsSlice()...)
}

// sealICMP writes the checksum of the ICMPv6 message at offset.
func sealICMP(b []byte, offset int, source, destination netip.Addr) []byte {
	binary.BigEndian.PutUint16(b[offset+2:], checksumICMP(b[offset:], source, destination))
	return b
}

// checksumICMP is the checksum of a message whose own field is 0, and 0 for one that holds the right one.
func checksumICMP(message []byte, source, destination netip.Addr) uint16 {
	sum := uint32(len(message)) + unix.IPPROTO_ICMPV6
	from, to := source.As16(), destination.As16()
	for _, part := range [][]byte{from[:], to[:], message} {
		for i := 0; i+1 < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
		if len(part)%2 == 1 {
			sum += uint32(part[len(part)-1]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// probeFrame asks whether anyone has address, without telling anyone that we might: RFC 5227, 2.1.1; RFC 4862, 5.4.2.
func probeFrame(from mac, address netip.Addr) []byte {
	if address.Is4() {
		return buildARP(broadcastMAC, from, arpRequest, netip.IPv4Unspecified(), mac{}, address)
	}
	return buildNDP(from, netip.IPv6Unspecified(), solicitedNode(address), icmpSolicitation, 0, address, 0)
}

// announcementFrame tells everyone who has address now: RFC 5227, 2.3; RFC 4861, 7.2.6.
func announcementFrame(from mac, address netip.Addr) []byte {
	if address.Is4() {
		return buildARP(broadcastMAC, from, arpRequest, address, mac{}, address)
	}
	return buildNDP(from, address, allNodes, icmpAdvertisement, flagOverride, address, optionTargetMAC)
}

// answerFrame answers another's probe. A prober of IPv6 has no address yet: all nodes get it (RFC 4861, 7.2.4).
func answerFrame(from mac, address netip.Addr, prober mac) []byte {
	if address.Is4() {
		return buildARP(prober, from, arpReply, address, prober, netip.IPv4Unspecified())
	}
	return announcementFrame(from, address)
}

// groupsAFrame is how many groups one report names: it fits into 1280 bytes, which every IPv6 link takes.
const groupsAFrame = 60

// reportFrame tells switches that look into MLD which groups are wanted at this port (RFC 3810, 5.2). source is a
// link-local address, or unspecified where there is none (RFC 3590).
func reportFrame(from mac, source netip.Addr, record uint8, groups []netip.Addr) []byte {
	message := []byte{icmpMLDReport2, 0, 0, 0, 0, 0}
	message = binary.BigEndian.AppendUint16(message, uint16(len(groups)))
	for _, g := range groups {
		message = append(message, record, 0, 0, 0)
		message = append(message, g.AsSlice()...)
	}
	return buildMLD(from, source, allRouters2, message)
}

// oldReportFrame is the same of one group for who knows MLDv1 alone (RFC 2710, 3).
func oldReportFrame(from mac, source, group netip.Addr) []byte {
	return buildMLD(from, source, group, append([]byte{icmpMLDReport, 0, 0, 0, 0, 0, 0, 0}, group.AsSlice()...))
}

func buildMLD(from mac, source, destination netip.Addr, message []byte) []byte {
	length := hopByHopLength + len(message)
	b := ethernet(groupMAC(destination), from, unix.ETH_P_IPV6, ipv6Length+length)
	b = appendIPv6(b, source, destination, unix.IPPROTO_HOPOPTS, 1, length)
	b = append(b, unix.IPPROTO_ICMPV6, 0, 5, 2, 0, 0, 1, 0) // router alert: MLD; padding
	icmp := len(b)
	return sealICMP(append(b, message...), icmp, source, destination)
}

// kind is what a frame says of an address.
type kind uint8

const (
	used    kind = iota // a host has it
	probed              // a host asks whether it may have it
	queried             // a router or switch asks who wants groups
)

// message is what a frame says.
type message struct {
	kind    kind
	address netip.Addr // used, probed
	host    mac        // whose message it is: where it tells a MAC itself, that one
	// Of a query: in how much time it wants to be answered, and whether in the old way.
	within time.Duration
	old    bool
}

// parse reads a frame. It returns false for what says nothing about who has an address, and for what is broken.
func parse(frame []byte) (message, bool) {
	if len(frame) < ethernetLength {
		return message{}, false
	}
	from := mac(frame[6:12])
	body := frame[ethernetLength:]
	switch protocolOf(frame) {
	case unix.ETH_P_ARP:
		return parseARP(body)
	case unix.ETH_P_IPV6:
		return parseIPv6(body, from)
	}
	return message{}, false
}

func parseARP(b []byte) (message, bool) {
	if len(b) < arpLength || [6]byte(b) != [6]byte{0, 1, 8, 0, 6, 4} {
		return message{}, false
	}
	operation := binary.BigEndian.Uint16(b[6:])
	m := message{kind: used, host: mac(b[8:14]), address: netip.AddrFrom4([4]byte(b[14:]))}
	if m.address.IsUnspecified() {
		m.kind, m.address = probed, netip.AddrFrom4([4]byte(b[24:]))
		if operation != arpRequest {
			return message{}, false
		}
	}
	return m, m.host.oneHost() && (operation == arpRequest || operation == arpReply)
}

func parseIPv6(b []byte, from mac) (message, bool) {
	if len(b) < ipv6Length || b[0]>>4 != 6 {
		return message{}, false
	}
	length, next, hops := int(binary.BigEndian.Uint16(b[4:])), b[6], b[7]
	source, destination := netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	if length > len(b)-ipv6Length {
		return message{}, false
	}
	b = b[ipv6Length : ipv6Length+length]
	switch {
	case next == unix.IPPROTO_ICMPV6 && hops == 255 && len(b) >= ndpLength:
		if checksumICMP(b, source, destination) != 0 {
			return message{}, false
		}
		return parseNDP(b, from, source, destination)
	case next == unix.IPPROTO_HOPOPTS && hops == 1 && len(b) >= hopByHopLength+mldLength:
		if b[0] != unix.IPPROTO_ICMPV6 || b[1] != 0 || checksumICMP(b[hopByHopLength:], source, destination) != 0 {
			return message{}, false
		}
		return parseQuery(b[hopByHopLength:], source)
	}
	return message{}, false
}

// parseNDP checks what RFC 4861, 7.1.1 and 7.1.2 say.
func parseNDP(b []byte, from mac, source, destination netip.Addr) (message, bool) {
	kind, code, target := b[0], b[1], netip.AddrFrom16([16]byte(b[8:]))
	if code != 0 || target.IsMulticast() || target.IsUnspecified() {
		return message{}, false
	}
	m := message{kind: used, host: from}
	want := uint8(optionTargetMAC)
	if kind == icmpSolicitation {
		want = optionSourceMAC
	}
	told := false
	for b = b[ndpLength:]; len(b) >= 2; {
		size := 8 * int(b[1])
		if size == 0 || size > len(b) {
			return message{}, false
		}
		if b[0] == want && size == 8 {
			m.host, told = mac(b[2:8]), true
		}
		b = b[size:]
	}
	switch {
	case kind == icmpAdvertisement:
		m.address = target
	case kind == icmpSolicitation && source.IsUnspecified():
		if told || destination != solicitedNode(target) {
			return message{}, false
		}
		m.kind, m.address = probed, target
	case kind == icmpSolicitation:
		m.address = source // who asks by it has it
	default:
		return message{}, false
	}
	return m, len(b) == 0 && m.host.oneHost() && !m.address.IsMulticast()
}

func parseQuery(b []byte, source netip.Addr) (message, bool) {
	if b[0] != icmpMLDQuery || b[1] != 0 || !source.IsLinkLocalUnicast() {
		return message{}, false
	}
	code := binary.BigEndian.Uint16(b[4:])
	within := time.Duration(code)
	if len(b) > mldLength && code >= 1<<15 { // RFC 3810, 5.1.3
		within = time.Duration(code&0xfff|0x1000) << (code>>12&7 + 3)
	}
	return message{kind: queried, within: within * time.Millisecond, old: len(b) == mldLength}, true
}
