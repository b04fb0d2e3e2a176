package model

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"fairlead/maps"
)

// ICMP, ARP and neighbour discovery: what is answered, and whom errors concern.

// quoted is the packet that an ICMP error is about, as far as it is quoted (RFC 792; RFC 4443, section 2.4).
type quoted struct {
	l3, l4, end         int // in the frame
	family              uint8
	protocol            uint8
	source, destination netip.AddrPort
	exotic              bool // behind extension headers
}

// isError tells the ICMP errors that are about somebody's packet and told to its sender. Source quench is no more
// (RFC 6633), redirects are for neighbours alone.
func isError(family, kind uint8) bool {
	if family == 4 {
		return kind == 3 || kind == 11 || kind == 12
	}
	return kind >= 1 && kind <= 4
}

// quotedBy reads what an ICMP error quotes; nil: too little, or a later fragment.
func quotedBy(p *packet) *quoted {
	q := &quoted{l3: p.l4 + 8, end: p.end, family: p.family}
	ip := p.frame[min(q.l3, q.end):q.end]
	var source, destination netip.Addr
	if q.family == 4 {
		if len(ip) < 20 || ip[0]>>4 != 4 || ip[0]&15 < 5 || len(ip) < int(ip[0]&15)*4 || be16(ip[6:])&0x1fff != 0 {
			return nil
		}
		source, destination = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
		q.protocol, q.l4 = ip[9], q.l3+int(ip[0]&15)*4
	} else {
		if len(ip) < 40 || ip[0]>>4 != 6 {
			return nil
		}
		source, destination = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
		q.protocol, q.l4 = ip[6], q.l3+40
		for {
			if !slices.Contains([]uint8{protoHopByHop, protoRouting, protoDestination, protoAH, protoFragment}, q.protocol) {
				break
			}
			q.exotic = true
			if q.end-q.l4 < 8 {
				return nil
			}
			header := p.frame[q.l4:]
			size := int(header[1])*8 + 8
			switch q.protocol {
			case protoAH:
				size = int(header[1])*4 + 8
			case protoFragment:
				size = 8
				if be16(header[2:])&0xfff8 != 0 {
					return nil
				}
			}
			q.protocol = header[0]
			if q.l4 += size; q.l4 > q.end {
				return nil
			}
		}
	}
	var sport, dport uint16
	if q.end-q.l4 >= 4 {
		sport, dport = be16(p.frame[q.l4:]), be16(p.frame[q.l4+2:])
	}
	q.source, q.destination = netip.AddrPortFrom(source, sport), netip.AddrPortFrom(destination, dport)
	return q
}

// swapped is the tuple of the packets that the quoted one answers.
func (q *quoted) swapped() maps.Tuple {
	return maps.Tuple{Source: q.destination, Destination: q.source, Protocol: q.protocol}
}

// tunnelled tells a quoted packet that one of our methods makes around others.
func (q *quoted) tunnelled() bool {
	return q.protocol == protoIPIP || q.protocol == protoIPv6 || q.protocol == protoUDP && q.destination.Port() == guePort
}

var icmpPass = of(passICMP, passNotOurs)

func (m *model) expectICMP(e *expectation, p *packet, ingress uint32) {
	e.verdicts, e.why = icmpPass, "ICMP of no concern"
	if p.fragment() {
		e.why = "a fragment of an ICMP message"
		e.verdicts |= of(passFragment)
		if p.later() && m.world.isOwn(p.destination) {
			e.verdicts |= of(dropLater)
		}
		return
	}
	t := p.transport()
	if len(t) < 8 {
		e.why = "the packet ends in the ICMP header"
		return
	}
	switch kind := t[0]; {
	case isError(p.family, kind):
		m.expectError(e, p, ingress)
	case p.family == 4 && kind == 8, p.family == 6 && kind == 128:
		if t[1] != 0 || !m.world.isOwn(p.destination) {
			return
		}
		e.why = "echo request to an address of XDP's own"
		if e.unanswerable == "" && p.extensions == 0 && (p.family == 6 || p.l4-p.l3 == 20) {
			e.verdicts = of(answerEcho)
		} else {
			e.verdicts |= of(answerEcho)
		}
		if m.limits.answers != 0 {
			e.verdicts |= of(dropLimited)
		}
	case p.family == 6 && kind == 135:
		m.expectSolicitation(e, p, ingress)
	}
}

// solicitedNode is a target's multicast group (RFC 4291, section 2.7.1).
func solicitedNode(target netip.Addr) netip.Addr {
	b := target.As16()
	group := netip.MustParseAddr("ff02::1:ff00:0").As16()
	copy(group[13:], b[13:])
	return netip.AddrFrom16(group)
}

// expectSolicitation is RFC 4861, section 7.1.1, and RFC 4862, section 5.4.3.
func (m *model) expectSolicitation(e *expectation, p *packet, ingress uint32) {
	t := p.transport()
	if p.ttl != 255 || t[1] != 0 || len(t) < 24 || p.extensions > 0 {
		return
	}
	target := netip.AddrFrom16([16]byte(t[8:]))
	if !m.world.isOwn(target) || !m.world.devices.by(ingress).told {
		return
	}
	e.solicitation = true
	e.why = fmt.Sprintf("neighbour solicitation for %v, XDP's own", target)
	if why := invalidSolicitation(p, target); why != "" {
		e.why += ", invalid: " + why
		return
	}
	e.verdicts = of(answerNDP)
	if p.destination != target && p.destination != solicitedNode(target) || p.to.group() != p.destination.IsMulticast() {
		e.verdicts |= icmpPass // lawful, and nobody sends it
	}
}

// invalidSolicitation says why a solicitation has to be discarded in silence; "": it has not.
func invalidSolicitation(p *packet, target netip.Addr) string {
	t := p.transport()
	link := false
	for rest := t[24:]; len(rest) > 0; {
		if len(rest) < 2 || rest[1] == 0 || int(rest[1])*8 > len(rest) {
			return "an option's length"
		}
		link = link || rest[0] == 1
		rest = rest[int(rest[1])*8:]
	}
	switch {
	case p.wrongness() != 0:
		return "checksum"
	case p.source.IsUnspecified() && p.destination != solicitedNode(target):
		return "from nobody, and not to the target's group"
	case p.source.IsUnspecified() && link:
		return "from nobody, with a link-layer address"
	case p.source.IsMulticast() || p.source.IsLoopback():
		return "its source is no host's"
	case p.from.group():
		return "its link-layer source is a group"
	}
	return ""
}

// expectARP is RFC 826 and RFC 5227.
func (m *model) expectARP(e *expectation, p *packet, ingress uint32) {
	e.verdicts, e.why = of(passNotOurs), "ARP of no concern"
	t := p.frame[p.l3:]
	if len(t) < 28 || be16(t) != 1 || be16(t[2:]) != etherIPv4 || t[4] != 6 || t[5] != 4 || be16(t[6:]) != 1 {
		return
	}
	sender, target := netip.AddrFrom4([4]byte(t[14:])), netip.AddrFrom4([4]byte(t[24:]))
	if !m.world.isOwn(target) || sender == target || !m.world.devices.by(ingress).told {
		return
	}
	e.why = fmt.Sprintf("ARP request for %v, XDP's own", target)
	hardware := mac(t[8:])
	if hardware.group() || p.from.group() {
		e.why += ", from a group"
		return
	}
	e.verdicts = of(answerARP)
	if !sender.IsUnspecified() && !unicast(sender) || hardware != p.from || hardware == (mac{}) || m.world.ours[sender] {
		e.verdicts |= of(passNotOurs) // lawful, and suspicious
	}
}

// expectError is an ICMP error: RFC 5508, section 4.2; RFC 2003, section 5; RFC 2473, section 8.
func (m *model) expectError(e *expectation, p *packet, ingress uint32) {
	q := quotedBy(p)
	if q == nil || q.source.Addr() != p.destination {
		return
	}
	if q.tunnelled() && m.world.tunnels[q.destination.Addr()] {
		e.why = fmt.Sprintf("an error about a packet of the tunnel to %v", q.destination.Addr())
		e.quoted = q
		if q.protocol == protoUDP && q.end-q.l4 < 8 {
			return
		}
		e.verdicts = of(passTunnelError)
		if !m.ourTunnel(q) || q.exotic || q.family != familyOf(q.destination.Addr()) {
			e.verdicts |= icmpPass
		}
		return
	}
	if q.protocol != protoTCP && q.protocol != protoUDP || q.end-q.l4 < 8 {
		return
	}
	t := q.swapped()
	if q.exotic {
		defer func() { e.verdicts |= icmpPass }()
	}
	if s := m.world.keys[key{t.Destination, t.Protocol}]; s != nil {
		e.quoted, e.service, e.key = q, s, t.Destination
		e.conversation, e.ghost = m.conversations[t], m.ghosts[t] != nil
		switch first := m.world.choices(s, t); {
		case e.conversation != nil:
			e.why = fmt.Sprintf("an error about a packet of %v", e.conversation.backend)
			e.choices = []*backend{e.conversation.backend}
			e.verdicts = 0
			if e.conversation.mayBeGone {
				e.verdicts = icmpPass
				e.choices = append(e.choices, first...)
			}
		case e.ghost:
			e.choices = s.members
		case len(first) > 0 && !first[0].stateful():
			e.choices = first
		default:
			return
		}
		for _, b := range e.choices {
			obstacles, free := m.errorObstacles(p, b)
			e.verdicts |= obstacles
			if free {
				e.verdicts |= of(forwardICMP)
			}
		}
		return
	}
	if !m.world.isSource(t.Destination) && !m.world.byNAT[key{t.Source, t.Protocol}] {
		return
	}
	c := m.waysBack[t]
	e.reply, e.quoted = true, q
	if c == nil {
		e.why = "an error about a packet to a backend, of no conversation"
		if len(m.ghosts) > 0 {
			e.ghost = true
			e.verdicts |= of(replyICMP) | of(dropTTL)
		}
		return
	}
	e.conversation, e.service = c, c.service
	e.why = fmt.Sprintf("an error about a packet of %v", c.tuple.Source)
	e.verdicts = of(replyICMP)
	if c.mayBeGone {
		e.verdicts |= icmpPass
	}
	m.obstructReply(e, p, ingress, c.hops)
	if e.verdicts&of(answerTooBig, dropTooBig) != 0 { // as to a backend
		e.verdicts = e.verdicts&^of(answerTooBig, dropLimited) | of(dropTooBig)
		if p.ttl > 1 {
			e.verdicts |= of(replyICMP)
		}
	}
}

// errorObstacles are as obstacles; but an error is never answered.
func (m *model) errorObstacles(p *packet, b *backend) (s set, free bool) {
	if !b.hop.Known {
		return of(dropNoNeighbor) | icmpPass, false
	}
	for _, learned := range m.learned(b) {
		switch {
		case !b.fits(p, learned) && b.overhead() == 0 && p.ttl > 1:
			s |= of(dropTooBig) // or not: who obeys RFC 1812, section 4.3.2.3, sends none that is too big
			free = true
		case !b.fits(p, learned):
			s |= of(dropTooBig, dropTTL)
		case p.ttl <= 1:
			s |= of(dropTTL)
		default:
			free = true
		}
		if b.lost(p, learned) {
			s |= of(dropTooBig)
		}
	}
	return s, free
}

// ourTunnel tells whether a quoted outer packet comes from where ours come from.
func (m *model) ourTunnel(q *quoted) bool {
	for _, b := range m.world.backends {
		if b.overhead() > 0 && b.address == q.destination.Addr() && b.tunnel.Contains(q.source.Addr()) {
			return true
		}
	}
	return false
}

// toldMTU is what an ICMP error says of the way's MTU (RFC 1191, section 4; RFC 4443, section 3.2).
func toldMTU(p *packet) (mtu uint32, told bool) {
	t := p.transport()
	switch {
	case p.family == 4 && t[0] == 3 && t[1] == 4:
		return uint32(be16(t[6:])), true
	case p.family == 6 && t[0] == 2:
		return be32(t[4:]), true
	}
	return 0, false
}

// translatedError is an ICMP error as a translator sends it on (RFC 5508, section 4.2): outer addresses, the quoted
// packet's, and every checksum that they have part in.
func translatedError(p *packet, q *quoted, source, destination netip.Addr, quotedSource, quotedDestination netip.AddrPort) image {
	i := image{bytes: bytes.Clone(p.frame[p.l3:p.end])}
	b := i.bytes
	icmp, l3, l4 := p.l4-p.l3, q.l3-p.l3, q.l4-p.l3
	at, size := addressesAt(p.family)
	wrong, headerWrong := p.wrongness(), p.headerWrongness()

	var quotedHeaderWrong uint16
	if q.family == 4 {
		quotedHeaderWrong = residue(sum(b[l3:l4]))
	}
	pseudoBefore := sum(q.source.Addr().AsSlice()) + sum(q.destination.Addr().AsSlice())
	quotedWrong := residue(pseudoBefore + sum(b[l4:]))
	putAddress(b[at:], source)
	putAddress(b[at+size:], destination)
	putAddress(b[l3+at:], quotedSource.Addr())
	putAddress(b[l3+at+size:], quotedDestination.Addr())
	binary.BigEndian.PutUint16(b[l4:], quotedSource.Port())
	binary.BigEndian.PutUint16(b[l4+2:], quotedDestination.Port())
	if q.family == 4 {
		i.mendHeader(l3, l4-l3, quotedHeaderWrong)
	}
	field := l4 + checksumAt(q.protocol)
	udp := q.protocol == protoUDP
	if field+2 <= len(b) && !(udp && be16(b[field:]) == 0) {
		rest := sum(quotedSource.Addr().AsSlice()) + sum(quotedDestination.Addr().AsSlice()) +
			sum(b[l4:]) + 0xffff - uint64(be16(b[field:]))
		i.mend(field, quotedWrong, false, 0, rest, udp)
	}
	if p.family == 4 {
		b[8]--
		i.mendHeader(0, icmp, headerWrong)
	} else {
		b[7]--
	}
	message := b[icmp:]
	rest := sum(message) + 0xffff - uint64(be16(message[2:]))
	if p.protocol == protoICMPv6 {
		rest += pseudo(source, destination, protoICMPv6, len(message))
	}
	i.mend(icmp+2, wrong, true, computed(source, destination, p.protocol, message), rest, false)
	return i
}

// echoed is the answer to an echo request (RFC 792; RFC 4443, section 4.2).
func echoed(p *packet) image {
	i := image{bytes: bytes.Clone(p.frame[p.l3:p.end])}
	b, icmp := i.bytes, p.l4-p.l3
	wrong, headerWrong := p.wrongness(), p.headerWrongness()
	at, size := addressesAt(p.family)
	putAddress(b[at:], p.destination)
	putAddress(b[at+size:], p.source)
	if p.family == 4 {
		b[8] = 64
		b[icmp] = 0
		i.mendHeader(0, icmp, headerWrong)
	} else {
		b[7] = 64
		b[icmp] = 129
	}
	message := b[icmp:]
	rest := sum(message) + 0xffff - uint64(be16(message[2:]))
	if p.protocol == protoICMPv6 {
		rest += pseudo(p.destination, p.source, protoICMPv6, len(message))
	}
	i.mend(icmp+2, wrong, true, computed(p.destination, p.source, p.protocol, message), rest, false)
	return i
}

// arpReply answers an ARP request (RFC 826), with the padding that the request has.
func arpReply(p *packet, d device) []byte {
	b := bytes.Clone(p.frame)
	asker := mac(b[p.l3+8:])
	copy(b, asker[:])
	copy(b[6:], d.mac[:])
	t := b[p.l3:]
	target, sender := netip.AddrFrom4([4]byte(t[24:])), netip.AddrFrom4([4]byte(t[14:]))
	t[7] = 2
	copy(t[8:], d.mac[:])
	putAddress(t[14:], target)
	copy(t[18:], asker[:])
	putAddress(t[24:], sender)
	return b
}

// advertisement answers a neighbour solicitation (RFC 4861, sections 4.4 and 7.2.4).
func advertisement(p *packet, d device) []byte {
	target := netip.AddrFrom16([16]byte(p.transport()[8:]))
	to, destination, flags := p.from, p.source, byte(0x60)
	if p.source.IsUnspecified() {
		to, destination, flags = mac{0x33, 0x33, 0, 0, 0, 1}, netip.MustParseAddr("ff02::1"), 0x20
	}
	message := slices.Concat([]byte{136, 0, 0, 0, flags, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, d.mac[:])
	binary.BigEndian.PutUint16(message[2:], computed(target, destination, protoICMPv6, message))
	ip := make([]byte, 40)
	ip[0], ip[5], ip[6], ip[7] = 0x60, byte(len(message)), protoICMPv6, 255
	putAddress(ip[8:], target)
	putAddress(ip[24:], destination)
	return slices.Concat(ethernet(to, d.mac, p.tags, etherIPv6), ip, message)
}

// quoteMost is how much of a packet our answers quote.
const quoteMost = 512

// errorAbout checks an ICMP error that answers a packet: from whom it was for, quoting it as it came (RFC 1122, section
// 3.2.2; RFC 1191, section 4; RFC 4443, sections 2.4 and 3).
func errorAbout(p *packet, out []byte, kind, code uint8, word uint32) error {
	quote := p.frame[p.l3:min(p.end, p.l3+quoteMost)]
	protocol := uint8(protoICMP)
	if p.family == 6 {
		protocol = protoICMPv6
	}
	message := slices.Concat([]byte{kind, code, 0, 0}, binary.BigEndian.AppendUint32(nil, word), quote)
	binary.BigEndian.PutUint16(message[2:], computed(p.destination, p.source, protocol, message))
	return bareAnswer(p, out, protocol, message)
}

// bareAnswer checks an answer whose network header is new: time to live 64, IPv4 ID 0 with DF (RFC 6864, section 4.1).
// What is short of Ethernet's least may be padded with zeros.
func bareAnswer(p *packet, out []byte, protocol uint8, body []byte) error {
	var ip []byte
	if p.family == 4 {
		ip = make([]byte, 20)
		ip[0], ip[6], ip[8], ip[9] = 0x45, 0x40, 64, protocol
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(body)))
		putAddress(ip[12:], p.destination)
		putAddress(ip[16:], p.source)
		binary.BigEndian.PutUint16(ip[10:], headerChecksum(ip))
	} else {
		ip = make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, protocol, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(len(body)))
		putAddress(ip[8:], p.destination)
		putAddress(ip[24:], p.source)
	}
	want := slices.Concat(ethernet(p.from, p.to, p.tags, p.ether), ip, body)
	if len(out) > len(want) && len(out) <= 60+4*len(p.tags) && !bytes.ContainsFunc(out[len(want):], func(r rune) bool { return r != 0 }) {
		out = out[:len(want)]
	}
	if !bytes.Equal(out, want) {
		return fmt.Errorf("want %x\ngot  %x", want, out)
	}
	return nil
}

// resetFor checks the RST that answers a segment (RFC 9293, section 3.10.7.1).
func resetFor(p *packet, out []byte) error {
	t := p.transport()
	flags := t[13]
	if flags&rst != 0 {
		return errors.New("a RST is answered")
	}
	body := make([]byte, 20)
	binary.BigEndian.PutUint16(body, p.dport)
	binary.BigEndian.PutUint16(body[2:], p.sport)
	body[12] = 5 << 4
	if flags&ack != 0 {
		copy(body[4:8], t[8:12])
		body[13] = rst
	} else {
		length := uint32(len(t) - int(t[12]>>4)*4)
		if flags&syn != 0 {
			length++
		}
		if flags&fin != 0 {
			length++
		}
		binary.BigEndian.PutUint32(body[8:], be32(t[4:])+length)
		body[13] = rst | ack
	}
	binary.BigEndian.PutUint16(body[16:], computed(p.destination, p.source, protoTCP, body))
	return bareAnswer(p, out, protoTCP, body)
}
