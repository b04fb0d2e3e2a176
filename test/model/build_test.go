package model

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// spec is a packet by its fields. Its lengths and checksums are right when its frame is made.
type spec struct {
	to, from            mac
	tags                []tag
	source, destination netip.AddrPort
	protocol            uint8

	ttl, tos   uint8
	flow       uint32
	id         uint32
	df         bool
	options    []byte      // IPv4; a multiple of 4 bytes
	extensions []extension // IPv6
	atomic     bool        // IPv6: in an atomic fragment

	sequence, acknowledgement uint32
	flags                     uint8
	tcpOptions                []byte // a multiple of 4 bytes
	noChecksum                bool   // UDP
	message                   []byte // ICMP: type, code, checksum (made), rest

	payload  []byte
	trailing []byte // behind the packet
}

// extension is an IPv6 extension header: its number, and its bytes from the second on.
type extension struct {
	number uint8
	rest   []byte
}

func (s *spec) segment() []byte {
	var b []byte
	switch s.protocol {
	case protoTCP:
		b = make([]byte, 20, 20+len(s.tcpOptions)+len(s.payload))
		binary.BigEndian.PutUint32(b[4:], s.sequence)
		binary.BigEndian.PutUint32(b[8:], s.acknowledgement)
		b[12], b[13] = byte(5+len(s.tcpOptions)/4)<<4, s.flags
		binary.BigEndian.PutUint16(b[14:], 0xfaf0)
		b = append(b, s.tcpOptions...)
	case protoUDP:
		b = make([]byte, 8, 8+len(s.payload))
		binary.BigEndian.PutUint16(b[4:], uint16(8+len(s.payload)))
	case protoICMP, protoICMPv6:
		b = slices.Clone(s.message)
	default:
		return s.payload
	}
	if s.protocol == protoTCP || s.protocol == protoUDP {
		binary.BigEndian.PutUint16(b, s.source.Port())
		binary.BigEndian.PutUint16(b[2:], s.destination.Port())
	}
	b = append(b, s.payload...)
	if at := checksumAt(s.protocol); !s.noChecksum && at+2 <= len(b) {
		binary.BigEndian.PutUint16(b[at:], computed(s.source.Addr(), s.destination.Addr(), s.protocol, b))
	}
	return b
}

// frame makes the frame.
func (s *spec) frame() []byte {
	segment := s.segment()
	family := familyOf(s.source.Addr())
	b := ethernet(s.to, s.from, s.tags, etherOf(family))
	if family == 4 {
		ip := make([]byte, 20, 20+len(s.options))
		ip[0], ip[1], ip[8], ip[9] = byte(0x45+len(s.options)/4), s.tos, s.ttl, s.protocol
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(s.options)+len(segment)))
		binary.BigEndian.PutUint16(ip[4:], uint16(s.id))
		if s.df {
			ip[6] = 0x40
		}
		putAddress(ip[12:], s.source.Addr())
		putAddress(ip[16:], s.destination.Addr())
		ip = append(ip, s.options...)
		binary.BigEndian.PutUint16(ip[10:], headerChecksum(ip))
		return slices.Concat(b, ip, segment, s.trailing)
	}
	extensions := s.extensions
	if s.atomic {
		extensions = append(slices.Clone(extensions), extension{protoFragment,
			binary.BigEndian.AppendUint32([]byte{0, 0, 0}, s.id)})
	}
	var chain []byte
	next := s.protocol
	for _, e := range slices.Backward(extensions) {
		chain = slices.Concat([]byte{next}, e.rest, chain)
		next = e.number
	}
	ip := make([]byte, 40)
	binary.BigEndian.PutUint32(ip, 6<<28|uint32(s.tos)<<20|s.flow&0xfffff)
	binary.BigEndian.PutUint16(ip[4:], uint16(len(chain)+len(segment)))
	ip[6], ip[7] = next, s.ttl
	putAddress(ip[8:], s.source.Addr())
	putAddress(ip[24:], s.destination.Addr())
	return slices.Concat(b, ip, chain, segment, s.trailing)
}

// fragmented cuts a whole packet's frame into fragments whose data are so many bytes at most, a multiple of 8 (RFC 791,
// section 3.2; RFC 8200, section 4.5).
func fragmented(frame []byte, most int, id uint32) (all [][]byte) {
	p := parse(frame)
	if p.malformed != "" || p.family == 0 || p.fragment() || p.fragmentHeader != 0 || p.end-p.l4 <= most {
		return [][]byte{frame}
	}
	most = max(most&^7, 8)
	data := p.transport()
	for offset := 0; offset < len(data); offset += most {
		part := data[offset:min(offset+most, len(data))]
		more := offset+len(part) < len(data)
		head := slices.Clone(frame[:p.l4])
		ip := head[p.l3:]
		if p.family == 4 {
			binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(part)))
			binary.BigEndian.PutUint16(ip[4:], uint16(id))
			flags := uint16(offset / 8)
			if more {
				flags |= 0x2000
			}
			binary.BigEndian.PutUint16(ip[6:], flags)
			binary.BigEndian.PutUint16(ip[10:], headerChecksum(ip))
			all = append(all, slices.Concat(head, part))
			continue
		}
		header := make([]byte, 8)
		header[0] = p.protocol
		binary.BigEndian.PutUint16(header[2:], uint16(offset))
		if more {
			header[3] |= 1
		}
		binary.BigEndian.PutUint32(header[4:], id)
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-40+8+len(part)))
		at := 6 // the field that names the last header so far
		for number, l := ip[6], 40; number != p.protocol; number = ip[at] {
			at, l = l, l+int(ip[l+1])*8+8
		}
		ip[at] = protoFragment
		all = append(all, slices.Concat(head, header, part))
	}
	return all
}

// repaired sets all checksums that can be found right, so that a mutation gets past who looks at them.
func repaired(frame []byte) {
	p := parse(frame)
	if p.family == 4 && p.malformed == "" {
		header := frame[p.l3:p.l4]
		binary.BigEndian.PutUint16(header[10:], headerChecksum(header))
	}
	if p.family == 0 || p.malformed != "" || p.fragment() {
		return
	}
	segment := p.transport()
	if at := checksumAt(p.protocol); at >= 0 && at+2 <= len(segment) {
		if p.protocol == protoUDP && (be16(segment[at:]) == 0 || len(segment) < 8 || int(be16(segment[4:])) != len(segment)) {
			return
		}
		binary.BigEndian.PutUint16(segment[at:], computed(p.source, p.destination, p.protocol, segment))
	}
}
