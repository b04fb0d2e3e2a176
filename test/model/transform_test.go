package model

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"fairlead/maps"
)

// What becomes of a packet's bytes, by method.

// image is what bytes should be. Checksums whose input was right are exact; of others only how wrong they are is fixed,
// so 0 and 0xffff are the same there.
type image struct {
	bytes []byte
	loose []looseSum
}

type looseSum struct {
	at      int
	notZero bool // UDP: zero would say that there is none
	orZero  bool // UDP over IPv6 without checksum: may stay without
}

// differs says where bytes are not as the image; -1: nowhere.
func (i image) differs(got []byte) int {
	loose := func(at int) (looseSum, bool) {
		for _, l := range i.loose {
			if at == l.at || at == l.at+1 {
				return l, true
			}
		}
		return looseSum{}, false
	}
	for at := range i.bytes {
		if at >= len(got) {
			return at
		}
		if got[at] == i.bytes[at] {
			continue
		}
		l, ok := loose(at)
		if !ok || l.at+2 > len(got) {
			return at
		}
		want, have := be16(i.bytes[l.at:]), be16(got[l.at:])
		if want%0xffff != have%0xffff && !(l.orZero && have == 0) || l.notZero && have == 0 {
			return at
		}
	}
	if len(got) > len(i.bytes) {
		return len(i.bytes)
	}
	return -1
}

// behind is the image with something in front of it.
func (i image) behind(front []byte) image {
	for k := range i.loose {
		i.loose[k].at += len(front)
	}
	i.bytes = slices.Concat(front, i.bytes)
	return i
}

// mend sets a checksum field of b so that it is as right or as wrong as before: exactly what RFC 1071 computes where it
// was right.
func (i *image) mend(at int, wrong uint16, exact bool, right uint16, rest uint64, udp bool) {
	field := i.bytes[at:]
	if wrong == 0 && exact {
		binary.BigEndian.PutUint16(field, right)
		return
	}
	value := (uint32(wrong) + 0xffff - uint32(residue(rest))) % 0xffff
	if value == 0 && udp {
		value = 0xffff
	}
	binary.BigEndian.PutUint16(field, uint16(value))
	i.loose = append(i.loose, looseSum{at: at, notZero: udp})
}

func putAddress(b []byte, a netip.Addr) { copy(b, a.AsSlice()) }

// addressesAt is where an IP header has its addresses, and how long they are.
func addressesAt(family uint8) (at, size int) {
	if family == 4 {
		return 12, 4
	}
	return 8, 16
}

// mendHeader sets the checksum of the IPv4 header at the start of the image.
func (i *image) mendHeader(at, size int, wrong uint16) {
	header := i.bytes[at : at+size]
	rest := sum(header) - sum(header[10:12])
	i.mend(at+10, wrong, true, headerChecksum(header), rest, false)
}

// rewritten is a network packet as a router and translator sends it on: addresses, ports, time to live, and the
// identification where it is a fragment whose addresses change (RFC 791, 768, 1624, 3022, 6864, 8200, 9293).
func rewritten(p *packet, source, destination netip.AddrPort, id uint32, newID bool) image {
	i := image{bytes: bytes.Clone(p.frame[p.l3:p.end])}
	b, l4 := i.bytes, p.l4-p.l3
	wrong, headerWrong := p.wrongness(), p.headerWrongness()
	at, size := addressesAt(p.family)
	putAddress(b[at:], source.Addr())
	putAddress(b[at+size:], destination.Addr())
	if p.family == 4 {
		b[8]--
		if newID {
			binary.BigEndian.PutUint16(b[4:], uint16(id))
		}
		i.mendHeader(0, l4, headerWrong)
	} else {
		b[7]--
		if newID {
			binary.BigEndian.PutUint32(b[p.fragmentHeader-p.l3+4:], id)
		}
	}
	if p.later() || !p.ported {
		return i
	}
	binary.BigEndian.PutUint16(b[l4:], source.Port())
	binary.BigEndian.PutUint16(b[l4+2:], destination.Port())
	field := l4 + checksumAt(p.protocol)
	if p.protocol == protoUDP && be16(b[field:]) == 0 && p.family == 4 {
		return i // RFC 768: the sender made none
	}
	if source.Addr() == p.source && destination.Addr() == p.destination && source.Port() == p.sport && destination.Port() == p.dport {
		return i // not ours to touch
	}
	segment := b[l4:]
	rest := sum(segment) - sum(segment[field-l4:field-l4+2]) + pseudo(source.Addr(), destination.Addr(), p.protocol, len(segment))
	none := p.protocol == protoUDP && be16(b[field:]) == 0
	if p.protocol == protoUDP && !p.fragment() && int(be16(segment[4:])) < len(segment) {
		// The checksum ends with the UDP length, and what is behind it (RFC 9868) has no part in it.
		length := int(be16(segment[4:]))
		inner := p.transport()[:length]
		wrong = residue(sum(inner) + pseudo(p.source, p.destination, p.protocol, length))
		segment = segment[:length]
		rest = sum(segment) - sum(segment[6:8]) + pseudo(source.Addr(), destination.Addr(), p.protocol, length)
	}
	i.mend(field, wrong, !p.fragment(), computed(source.Addr(), destination.Addr(), p.protocol, segment), rest, p.protocol == protoUDP)
	if none {
		i.loose[len(i.loose)-1].orZero, i.loose[len(i.loose)-1].notZero = true, false
	}
	return i
}

// ethernet is a frame's header with a hop's addresses and tags.
func ethernet(to, from mac, tags []tag, ether uint16) []byte {
	b := slices.Concat(to[:], from[:])
	for _, t := range tags {
		b = binary.BigEndian.AppendUint16(b, t.ether)
		b = binary.BigEndian.AppendUint16(b, t.control)
	}
	return binary.BigEndian.AppendUint16(b, ether)
}

// hopTags are a next hop's tags on the wire.
func hopTags(vlan [2]uint16) (tags []tag) {
	for _, v := range vlan {
		if v&0xfff == 0 {
			continue
		}
		ether := uint16(ether8021Q)
		if v&maps.Tag8021AD != 0 {
			ether = ether8021AD
		}
		tags = append(tags, tag{ether, v & 0xfff})
	}
	return tags
}

func etherOf(family uint8) uint16 {
	if family == 4 {
		return etherIPv4
	}
	return etherIPv6
}

func familyOf(a netip.Addr) uint8 {
	if a.Is4() {
		return 4
	}
	return 6
}

// overhead is what a method puts in front of a packet, in bytes.
func (b *backend) overhead() int {
	size := 0
	switch b.method {
	case maps.MethodGUE:
		size = 8
		fallthrough
	case maps.MethodIPIP:
		size += 20
		if b.address.Is6() {
			size += 20
		}
	}
	return size
}

// encapsulated is the outer packet around an inner one, which has been routed (RFC 2003, 2473, 4213, 6040; GUE, variant
// 1). The outer identification is the one that got is seen to have, where it is free. Around an IPv6 packet the outer one
// must not be fragmented, unless the way is known to be too narrow for IPv6's least (RFC 4213, section 3.2.2).
func (b *backend) encapsulated(p *packet, inner image, hash uint64, got []byte, learned []uint32) image {
	length := len(inner.bytes)
	protocol, udp := byte(protoIPIP), []byte(nil)
	if p.family == 6 {
		protocol = protoIPv6
	}
	if b.method == maps.MethodGUE {
		protocol = protoUDP
		udp = binary.BigEndian.AppendUint16(udp, 49152+uint16(hash>>16&0x3fff))
		udp = binary.BigEndian.AppendUint16(udp, guePort)
		udp = binary.BigEndian.AppendUint16(udp, uint16(8+length))
		udp = append(udp, 0, 0)
	}
	length += len(udp)
	if b.address.Is4() {
		ip := make([]byte, 20)
		ip[0], ip[1], ip[8], ip[9] = 0x45, p.tos, 64, protocol
		binary.BigEndian.PutUint16(ip[2:], uint16(20+length))
		dont := p.df
		if p.family == 6 && len(got) > 6 && got[6]&0x40 == 0 {
			for _, mtu := range learned {
				dont = dont && (mtu == 0 || mtu >= leastIPv6+uint32(b.overhead()))
			}
		}
		if p.family == 6 && dont {
			narrow := 0
			for _, mtu := range learned {
				if !within(20+length, mtu) {
					narrow++
				}
			}
			dont = narrow < len(learned)
		}
		if dont {
			ip[6] = 0x40
		} else if len(got) >= 6 {
			copy(ip[4:6], got[4:6])
		}
		putAddress(ip[12:], b.outerSource(hash))
		putAddress(ip[16:], b.address)
		binary.BigEndian.PutUint16(ip[10:], headerChecksum(ip))
		return inner.behind(slices.Concat(ip, udp))
	}
	ip := make([]byte, 40)
	ip[0], ip[1], ip[6], ip[7] = 0x60|p.tos>>4, p.tos<<4, protocol, 64
	binary.BigEndian.PutUint16(ip[4:], uint16(length))
	putAddress(ip[8:], b.outerSource(hash))
	putAddress(ip[24:], b.address)
	return inner.behind(slices.Concat(ip, udp))
}

// matches compares a frame with a header and an image behind it; what stood behind the packet that came in may stand
// behind the one that goes out. nil: as it should be.
func matches(got, header []byte, want image, trailing []byte) error {
	if len(got) < len(header) || !bytes.Equal(got[:len(header)], header) {
		return fmt.Errorf("link header: want %x, got %x", header, got[:min(len(header), len(got))])
	}
	body := got[len(header):]
	if len(body) > len(want.bytes) {
		if !bytes.Equal(body[len(want.bytes):], trailing) {
			return fmt.Errorf("behind the packet: want %x or nothing, got %x", trailing, body[len(want.bytes):])
		}
		body = body[:len(want.bytes)]
	}
	if at := want.differs(body); at >= 0 {
		return fmt.Errorf("packet differs at byte %d\nwant %x\ngot  %x", at, want.bytes, body)
	}
	return nil
}
