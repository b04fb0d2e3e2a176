package packet

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

const laterDropped = bpf.FairleadVerdictDROP_LATER_FRAGMENT

// parcel is a packet in fragments, as its sender or a router makes them.
type parcel struct {
	segment             // whole; its extensions stand in front of the fragment header
	number  uint32      // the identification
	inside  []extension // IPv6: headers behind the fragment header, which are cut like all that follows
	cuts    []int       // where it is cut, in 8-byte units
}

// content is what is cut, and what it is by its first header.
func (p parcel) content() (protocol uint8, bytes []byte) {
	if p.source.Addr().Is4() {
		network := &layers.IPv4{SrcIP: p.source.Addr().AsSlice(), DstIP: p.destination.Addr().AsSlice()}
		return uint8(p.protocol()), p.transport(network)
	}
	network := &layers.IPv6{SrcIP: p.source.Addr().AsSlice(), DstIP: p.destination.Addr().AsSlice()}
	transport := p.transport(network)
	headers := chain(network, p.inside, uint8(p.protocol()))
	return uint8(network.NextHeader), slices.Concat(headers, transport)
}

// piece is the frame of a fragment; piece 0 is the first.
func (p parcel) piece(i int) []byte {
	protocol, content := p.content()
	from, to, last := 0, len(content), i == len(p.cuts)
	if i > 0 {
		from = p.cuts[i-1] * 8
	}
	if !last {
		to = p.cuts[i] * 8
	}
	packet, first := p.cut(protocol, content[from:to], from/8, !last), p.source.Addr()
	if p.outer != nil {
		packet, first = p.outer.around(packet, first), p.outer.source
	}
	return slices.Concat(link(p.ethSource, p.ethDestination, p.tags, etherTypeOf(first)), packet, p.padding)
}

// cut is the IP packet of a fragment.
func (p parcel) cut(protocol uint8, content []byte, offset int, more bool) []byte {
	if p.source.Addr().Is4() {
		ip := &layers.IPv4{
			Version: 4, TTL: p.ttl, TOS: p.tos, Id: uint16(p.number), Protocol: layers.IPProtocol(protocol),
			FragOffset: uint16(offset), SrcIP: p.source.Addr().AsSlice(), DstIP: p.destination.Addr().AsSlice(),
			Options: p.ipOptions,
		}
		if p.df {
			ip.Flags |= layers.IPv4DontFragment
		}
		if more {
			ip.Flags |= layers.IPv4MoreFragments
		}
		return serialize(ip, gopacket.Payload(content))
	}
	place := uint16(offset * 8)
	if more {
		place |= 1
	}
	header := extension{unix.IPPROTO_FRAGMENT, binary.BigEndian.AppendUint32(
		binary.BigEndian.AppendUint16([]byte{0}, place), p.number)}
	ip := &layers.IPv6{
		Version: 6, HopLimit: p.ttl, TrafficClass: p.tos, FlowLabel: p.flowLabel,
		SrcIP: p.source.Addr().AsSlice(), DstIP: p.destination.Addr().AsSlice(),
	}
	headers := chain(ip, append(slices.Clone(p.extensions), header), protocol)
	return serialize(ip, gopacket.Payload(headers), gopacket.Payload(content))
}

// whole is the segment with the headers in front of its transport as the first fragment has them.
func (p parcel) whole() segment {
	s := p.segment
	if s.source.Addr().Is6() {
		s.extensions = slices.Concat(p.extensions, []extension{firstFragment}, p.inside)
	}
	return s
}

// inFragments cuts a segment.
func inFragments(s segment, number uint32, cuts ...int) *parcel {
	s.df = false
	if s.source.Addr().Is4() {
		number &= 0xffff
	}
	return &parcel{segment: s, number: number, cuts: cuts}
}

// numbered is an identification as it stands in a packet: a running number, in the host's order.
func numbered(f family, running uint64) uint32 {
	if f.name == "ipv4" {
		return uint32(network(uint16(running)))
	}
	return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, uint32(running)))
}

// journey is a parcel on its way through the data plane, piece by piece.
type journey struct {
	of *conversation
	*parcel
	reply bool
	given uint32 // the identification that the first fragment was given
}

func (c *conversation) sends(p *parcel) *journey { return &journey{of: c, parcel: p} }
func (c *conversation) answers(p *parcel) *journey {
	return &journey{of: c, parcel: p, reply: true}
}

// arrives gives the data plane a fragment that is to go on: the first by a verdict of its own, later ones after it.
func (j *journey) arrives(piece int, v verdict, events ...event) {
	j.of.Helper()
	c, frame, running := j.of, j.piece(piece), j.of.control().Identifications
	from := c.from
	if j.reply {
		from = c.backends[c.backend-1].side()
	}
	action, out := c.run(c.Fairlead, frame, from)
	want := expectation{verdict: v, events: events, service: 1}
	expected := *j.parcel
	switch {
	case j.reply:
		expected.segment = j.routed(edgeMAC, c.router, c.vlan...).between(c.scene.service.address, c.client)
		want.to = c.from.index
	default:
		if c.backend == 0 {
			c.backend = ringAnswer(c.scene.service, c.client)
		}
		if v == forwardNew && c.method == fullnat {
			c.givenPort(j.whole(), out)
		}
		expected.segment = c.forwarded(j.segment, running)
		want.to = c.backends[c.backend-1].ifindex
	}
	if rewrites(c.method) {
		if piece == 0 {
			j.given = numbered(c.family, running)
		}
		expected.number = j.given
	}
	want.backend, want.frame = c.backend, expected.piece(piece)
	c.check(frame, from, action, out, want)
}

// follows sends all later fragments.
func (j *journey) follows() {
	j.of.Helper()
	v := forwardFragment
	if j.reply {
		v = replyFragment
	}
	for piece := range j.cuts {
		j.arrives(piece+1, v)
	}
}

// stops gives the data plane a fragment that is not to go on.
func (j *journey) stops(piece int, v verdict) {
	j.of.Helper()
	j.halts(j.piece(piece), v, 0)
}

// halts gives the data plane other bytes than a fragment's own; it may count as refused.
func (j *journey) halts(frame []byte, v verdict, service uint32) {
	j.of.Helper()
	from := j.of.from
	if j.reply {
		from = j.of.backends[j.of.backend-1].side()
	}
	want := expectation{verdict: v, service: service}
	if passes(v) {
		want.frame = frame
	}
	j.of.deliver(frame, from, want)
}

// outward is the client's next packet, to be cut; homeward is the backend's.
func (c *conversation) outward(length int) segment {
	return c.segment(ack|psh, strings.Repeat("from the client ", length/16+1)[:length])
}

func (c *conversation) homeward(length int) segment {
	return c.answer(ack|psh, strings.Repeat("from the backend ", length/17+1)[:length])
}

// ids are identifications of clients and backends.
var ids = []uint32{0, 1, 0xffff, 0xcafebabe, 0xffffffff}

// Later fragments go the way of their first, there and back, of whatever shape. Where addresses are changed all get one
// number of ours, and their transport checksum is right once they are put together.
func TestFragmentsFollow(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.backends, p.twoArms = 3, true
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c, other := s.newClient().openAs(), s.newClient().openAs()
			for i, number := range ids {
				for _, cuts := range [][]int{{5}, {5, 6}, {40, 80, 120}, {5, 6, 7, 8, 9, 10, 11, 12}} {
					j := c.sends(inFragments(c.outward(1000+i), number, cuts...))
					j.arrives(0, forwardTable)
					other.send(other.segment(ack, "in between"), forwardTable)
					j.follows()
					if !rewrites(w.method) {
						continue
					}
					j = c.answers(inFragments(c.homeward(1000+i), number, cuts...))
					j.arrives(0, replyTable)
					other.reply(other.answer(ack, "in between"), replyTable)
					j.follows()
				}
			}
			j := c.sends(inFragments(c.outward(20000), 0x2345, 1000, 2000)) // jumbo frames
			j.arrives(0, forwardTable)
			j.follows()
			// What is whole keeps its number.
			c.send(c.outward(50), forwardTable)
			if rewrites(w.method) {
				c.reply(c.homeward(50), replyTable)
			}
		})
	})
}

// A connection may begin with fragments, and have the ring alone decide about them.
func TestFragmentsOfOthersThanEstablished(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.backends = 3
		t.Run("udp, new", func(t *testing.T) {
			p.udp = true
			s := newManaged(t, f, w.method, p)
			c := s.newClient()
			j := c.sends(inFragments(c.outward(100), 7, 5))
			j.arrives(0, forwardNew)
			j.follows()
			if !rewrites(w.method) {
				return
			}
			j = c.answers(inFragments(c.homeward(100), 7, 5, 6))
			j.arrives(0, replyHalfOpen, confirmed)
			j.follows()
			j = c.sends(inFragments(c.outward(100), 8, 5))
			j.arrives(0, forwardTable, matured)
			j.follows()
		})
		if rewrites(w.method) {
			return
		}
		t.Run("tcp, by the ring", func(t *testing.T) {
			p.udp = false
			s := newManaged(t, f, w.method, p)
			c := s.newClient().open()
			s.rebuildExceptions()
			j := c.sends(inFragments(c.outward(100), 7, 5))
			j.arrives(0, forwardRing)
			j.follows()
			c = s.newClient()
			j = c.sends(inFragments(c.outward(100), 7, 5))
			j.arrives(0, bpf.FairleadVerdictFORWARD_ADOPTED, confirmed)
			j.follows()
		})
	})
}

// Clients choose their numbers without knowing of each other: towards a backend, to which all of them come from one
// address, no two packets on their way have one number.
func TestFragmentsNumberedAnew(t *testing.T) {
	eachWay(t, rewrites, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		seen := map[uint32]bool{}
		var there, back []*journey
		for i := range 20 {
			c := s.clientAt(netip.AddrPortFrom(plus(f.client, i), 40000)).open()
			there = append(there, c.sends(inFragments(c.outward(100), 7, 5, 6)))
			back = append(back, c.answers(inFragments(c.homeward(100), 7+uint32(len(there)), 5, 6)))
		}
		for piece := range 3 {
			for i := range there {
				v, answered := forwardFragment, replyFragment
				if piece == 0 {
					v, answered = forwardTable, replyTable
				}
				there[i].arrives(piece, v)
				back[i].arrives(piece, answered)
				if piece == 0 && seen[there[i].given] {
					t.Errorf("number %#x was given twice", there[i].given)
				}
				seen[there[i].given] = true
			}
		}
		// The running number wraps: what stands in the packet is what was noted.
		for _, at := range []uint64{0xffff, 0x10000, 0xffffffff, 0x100000000, 0x1234567890ab} {
			s.editControl(func(block *bpf.FairleadControlBlock) { block.Identifications = at })
			c := there[0].of
			j := c.sends(inFragments(c.outward(100), 7, 5, 6))
			j.arrives(0, forwardTable)
			j.follows()
		}
	})
}

// What has no first is left to the host's stack, which has no use for it where the address is XDP's own: there it is
// dropped by name. The same number of another packet is no first.
func TestFragmentsWithoutFirst(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			first, second := c.sends(inFragments(c.outward(100), 7, 5, 6)), c.sends(inFragments(c.outward(100), 8, 5, 6))
			var replied *journey
			if rewrites(w.method) {
				replied = c.answers(inFragments(c.homeward(100), 7, 5, 6))
			}
			without := func(v verdict) {
				t.Helper()
				for piece := 1; piece < 3; piece++ {
					first.stops(piece, v)
					if w.method == fullnat {
						replied.stops(piece, v)
					}
					if w.method == nat { // to the client's address, which is nobody's here
						replied.stops(piece, passFragment)
					}
				}
			}
			without(passFragment)
			s.must(s.manager.SetOwn([]netip.Addr{f.service.Addr(), f.source}))
			without(laterDropped)

			first.arrives(0, forwardTable)
			second.stops(1, laterDropped) // another number
			elsewhere := *first.parcel
			elsewhere.segment = elsewhere.between(netip.AddrPortFrom(plus(c.client.Addr(), 1), c.client.Port()), f.service)
			c.sends(&elsewhere).stops(1, laterDropped)
			elsewhere.segment = first.between(c.client, netip.AddrPortFrom(plus(f.service.Addr(), 1), f.service.Port()))
			c.sends(&elsewhere).stops(1, passFragment)
			elsewhere.segment = first.between(f.service, c.client)
			c.sends(&elsewhere).stops(1, passFragment)
			if f.name == "ipv4" { // another protocol's packets have numbers of their own (RFC 791, section 3.2)
				other := *first.parcel
				other.udp = !other.udp
				other.payload = []byte(strings.Repeat("other", 40))
				c.sends(&other).stops(1, laterDropped)
			}
			first.follows()
			if replied != nil {
				replied.arrives(0, replyTable)
				replied.follows()
			}
			// Of services that nobody has, first ones are not ours.
			elsewhere.segment = first.between(c.client, netip.AddrPortFrom(f.service.Addr(), 80))
			c.sends(&elsewhere).stops(0, passNotOurs)
		})
	})
}

// The next packet of a number takes the place of the one before.
func TestFragmentsNumberUsedAgain(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.backends, p.udp = 2, true
		s := newManaged(t, f, w.method, p)
		a := s.clientOf(1).openAs()
		other := s.clientOf(2).client
		for other.Addr() != a.client.Addr() {
			other = s.clientOf(2).client
		}
		b := s.clientAt(other).openAs()
		for range 3 {
			for _, c := range []*conversation{a, b} {
				j := c.sends(inFragments(c.outward(100), 7, 5))
				j.arrives(0, forwardTable)
				j.follows()
				j.follows() // sent twice, it comes twice
			}
		}
	})
}

// Fragments have headers of all shapes.
func TestFragmentShapes(t *testing.T) {
	record := layers.IPv4Option{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}
	shapes := []struct {
		name, family string
		make         func(*parcel)
	}{
		{"last hop but one", "", func(p *parcel) { p.ttl = 2 }},
		{"all numbers", "", func(p *parcel) { p.tos, p.flowLabel, p.ttl, p.number = 0xff, 0xfffff, 255, 0xffffffff }},
		{"congestion experienced", "", func(p *parcel) { p.tos = 0x03 }},
		{"padded", "", func(p *parcel) { p.padding = []byte("\xff\xfe\xfd") }},
		{"odd payload", "", func(p *parcel) { p.payload = p.payload[:len(p.payload)-1] }},
		{"a last byte", "", func(p *parcel) {
			p.payload, p.options, p.cuts = p.payload[:13], nil, []int{4}
			if p.udp {
				p.payload, p.cuts = p.payload[:9], []int{2}
			}
		}},
		{"no checksum", "", func(p *parcel) { p.noChecksum = true }},
		{"options", "ipv4", func(p *parcel) { p.ipOptions = []layers.IPv4Option{{OptionType: 1}, record} }},
		// Linux' own, while it looks for the path's MTU.
		{"not to be fragmented further", "ipv4", func(p *parcel) { p.df = true }},
		{"hop-by-hop", "ipv6", func(p *parcel) { p.extensions = []extension{hopByHop} }},
		{"routing and destination options", "ipv6", func(p *parcel) { p.extensions = []extension{destination, routing} }},
		{"five headers", "ipv6", func(p *parcel) {
			p.extensions = []extension{hopByHop, destination, routing, destination, destination}
		}},
		{"destination options inside", "ipv6", func(p *parcel) { p.inside = []extension{destination} }},
		{"headers in front and inside", "ipv6", func(p *parcel) {
			p.extensions, p.inside, p.cuts = []extension{hopByHop, routing}, []extension{destination, destination}, []int{9, 10}
		}},
	}
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			for _, shape := range shapes {
				if shape.family != "" && shape.family != f.name {
					continue
				}
				t.Run(shape.name, func(t *testing.T) {
					s.in(t)
					number := uint32(0x10000 + len(t.Name()))
					parcel := inFragments(c.outward(200), number, 6, 7)
					shape.make(parcel)
					c.seq = parcel.end()
					j := c.sends(parcel)
					j.arrives(0, forwardTable)
					j.follows()
					if !rewrites(w.method) {
						return
					}
					parcel = inFragments(c.homeward(200), number, 6, 7)
					shape.make(parcel)
					c.ack = parcel.end()
					j = c.answers(parcel)
					j.arrives(0, replyTable)
					j.follows()
				})
			}
		})
	})
}

// Only the first fragment's Next Header counts (RFC 8200, section 4.5): a later one's may be any.
func TestFragmentsNextHeader(t *testing.T) {
	eachWayOf(t, families[1:], nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		j := c.sends(inFragments(c.outward(200), 0x1234, 6))
		j.arrives(0, forwardTable)
		at := ethernetHeader + 40
		frame := j.piece(1)
		frame[at] = unix.IPPROTO_NONE
		expected := *j.parcel
		expected.segment = c.forwarded(j.segment, c.control().Identifications)
		if rewrites(w.method) {
			expected.number = j.given
		}
		want := expected.piece(1)
		want[len(want)-(len(frame)-at)] = unix.IPPROTO_NONE
		c.deliver(frame, c.from, expectation{verdict: forwardFragment, frame: want, to: c.backends[0].ifindex, service: 1, backend: 1})
	})
}

// A fragment that is all of its packet (RFC 6946) is a packet, its number and its all; nothing follows it.
func TestFragmentsAtomic(t *testing.T) {
	eachWayOf(t, families[1:], nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			number := binary.BigEndian.Uint32(atomic.rest[3:])
			for _, headers := range [][]extension{{atomic}, {hopByHop, atomic, destination}} {
				data := c.outward(100)
				data.extensions = headers
				c.send(data, forwardTable)
				c.sends(inFragments(data, number, 5)).stops(1, passFragment)
				if rewrites(w.method) {
					data = c.homeward(100)
					data.extensions = headers
					c.reply(data, replyTable)
					c.answers(inFragments(data, number, 5)).stops(1, passFragment)
				}
			}
			var key bpf.FairleadFragmentKey
			var value bpf.FairleadFragment
			if s.Fragments.Iterate().Next(&key, &value) {
				t.Errorf("a fragment was noted: %+v", key)
			}
		})
	})
}

// Fragments come with their tags and go with those of their next hop.
func TestFragmentsTagged(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		s.eachTagging(t, func(c *conversation) {
			c.open()
			j := c.sends(inFragments(c.outward(100), uint32(c.client.Port()), 5, 6))
			j.arrives(0, forwardTable)
			j.follows()
			if rewrites(w.method) {
				j = c.answers(inFragments(c.homeward(100), uint32(c.client.Port()), 5, 6))
				j.arrives(0, replyTable)
				j.follows()
			}
		})
	})
}

// Fairlead routes fragments too: each ends where it has no hop left.
func TestFragmentsTimeToLive(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		for _, ttl := range []uint8{0, 1} {
			journeys := []*journey{c.sends(inFragments(c.outward(100), 7, 5, 6))}
			if rewrites(w.method) {
				journeys = append(journeys, c.answers(inFragments(c.homeward(100), 7, 5, 6)))
			}
			for _, j := range journeys {
				first, service := forwardTable, uint32(1)
				if j.reply {
					first, service = replyTable, 0
				}
				j.number += uint32(ttl)
				usual := j.ttl
				j.ttl = ttl
				j.halts(j.piece(0), dropTTL, service)
				j.ttl = usual
				j.stops(1, passFragment) // the first went nowhere
				j.arrives(0, first)
				j.ttl = ttl
				j.stops(1, dropTTL)
				j.ttl = usual
				j.follows()
			}
		}
	})
}

// A fragment that was cut short anywhere is never forwarded.
func TestFragmentsTruncated(t *testing.T) {
	record := layers.IPv4Option{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			for round := range uint32(3) {
				journeys := []*journey{c.sends(inFragments(c.outward(100), 7+round, 5, 6))}
				if rewrites(w.method) {
					journeys = append(journeys, c.answers(inFragments(c.homeward(100), 7+round, 5, 6)))
				}
				for _, j := range journeys {
					switch {
					case round == 1:
						j.tags = []tag{{0x88a8, 100}, {0x8100, 5}}
					case round == 2:
						j.ipOptions, j.extensions = []layers.IPv4Option{record}, []extension{hopByHop, routing}
					}
					first, service := forwardTable, uint32(1)
					if j.reply {
						first, service = replyTable, 0
					}
					frame := j.piece(0)
					for n := ethernetHeader; n < len(frame); n++ {
						if n < j.whole().transportOffset()+4 {
							j.halts(frame[:n], passNotOurs, 0)
						} else {
							j.halts(frame[:n], dropTruncated, service)
						}
					}
					j.stops(1, passFragment)
					tags, vlan := c.tags, c.vlan
					if !j.reply {
						c.tags, c.vlan = j.tags, j.tags
					}
					j.arrives(0, first)
					header := ethernetHeader + 4*len(j.tags) + 20
					number := header
					if f.name == "ipv6" {
						number = j.whole().transportOffset() // behind the fragment header
						header = number - 4                  // what says that it is one
					}
					frame = j.piece(1)
					for n := ethernetHeader; n < len(frame); n++ {
						switch {
						case n < header:
							j.halts(frame[:n], passNotOurs, 0)
						case n < number:
							j.halts(frame[:n], passFragment, 0)
						default:
							j.halts(frame[:n], dropTruncated, 0)
						}
					}
					j.follows()
					if !j.reply && rewrites(w.method) { // replies follow the way of the client's last packet
						c.tags, c.vlan = tags, vlan
						c.send(c.segment(ack, ""), forwardTable)
					}
					c.tags, c.vlan = tags, vlan
				}
			}
		})
	})
}

// Lengths of first fragments that contradict their headers: TCP's is there whole, UDP's counts all fragments.
func TestFragmentsOfBadLengths(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			bad := func(frame []byte, j *journey) {
				t.Helper()
				j.halts(frame, dropBadHeader, 1)
				j.stops(1, passFragment)
			}
			j := c.sends(inFragments(c.outward(100), 7, 1, 6))
			if !p.udp {
				// A first that is too short for the flags is made to get past those who look at flags (RFC 1858).
				frame := j.piece(0)
				bad(append(frame, make([]byte, 20)...), j)
				j = c.sends(inFragments(c.outward(100), 8, 3, 6))
				bad(j.piece(0), j) // its options are behind the cut
				return
			}
			j.arrives(0, forwardTable) // a bare header, and the data behind the cut
			j.follows()
			j = c.sends(inFragments(c.outward(100), 8, 5, 6))
			frame := j.piece(0)
			length := j.whole().transportOffset() + 4
			for _, n := range []uint16{0, 7} {
				binary.BigEndian.PutUint16(frame[length:], n)
				bad(frame, j)
			}
		})
	})
}

// Later fragments whose IP header says that the packet ends before its headers do, or behind the frame.
func TestLaterFragmentsOfBadLengths(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		j := c.sends(inFragments(c.outward(100), 7, 5, 6))
		frame := j.piece(1)
		at, least := ethernetHeader+2, uint16(20)
		if f.name == "ipv6" {
			at, least = ethernetHeader+4, 8 // the fragment header
		}
		whole := binary.BigEndian.Uint16(frame[at:])
		for length := range least {
			binary.BigEndian.PutUint16(frame[at:], length)
			j.halts(frame, passFragment, 0)
		}
		j.arrives(0, forwardTable)
		for length := range least {
			binary.BigEndian.PutUint16(frame[at:], length)
			j.halts(frame, dropBadHeader, 0)
		}
		for _, length := range []uint16{whole + 1, whole + 1000, 65535} {
			binary.BigEndian.PutUint16(frame[at:], length)
			j.halts(frame, dropTruncated, 0)
		}
		j.follows()
	})
}

// A frame to or from a group's MAC is no router's to pass on (RFC 1812, section 5.3.4).
func TestFragmentsOfGroups(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		j := c.sends(inFragments(c.outward(100), 7, 5, 6))
		j.arrives(0, forwardTable)
		source, destination := j.ethSource, j.ethDestination
		for _, group := range [][2][6]byte{{broadcast, destination}, {source, broadcast}, {source, mac("33:33:00:00:00:01")}} {
			j.ethSource, j.ethDestination = group[0], group[1]
			j.stops(0, passNotOurs)
			j.stops(1, passFragment)
		}
		j.ethSource, j.ethDestination = source, destination
		j.follows()
	})
}

// A packet too long for its way is dropped by name where it may be fragmented: it would have to be cut once more. IPv6's
// first fragment, which no router cuts, has its sender told.
func TestFragmentsTooBig(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.mtu, p.twoArms = 1400, true
		s := newManaged(t, f, w.method, p)
		devices := bothDevices()
		devices[0].MTU = 1400
		s.must(s.manager.SetDevices(devices))
		c := s.newClient().open()
		fits := (1400 - int(w.overhead()) - int(f.ipHeader())) / 8
		if f.name == "ipv6" {
			fits-- // the fragment header
		}
		j := c.sends(inFragments(c.outward(3600), 7, fits, 2*fits))
		j.arrives(0, forwardTable)
		j.follows()
		j = c.sends(inFragments(c.outward(3600), 8, fits+1))
		c.tooBig(j, 1400-w.overhead(), 1)
		j.stops(1, passFragment)
		j = c.sends(inFragments(c.outward(3600), 9, fits, 2*fits+1))
		j.arrives(0, forwardTable)
		j.stops(1, dropTooBig)
		j.arrives(2, forwardFragment)
		if !rewrites(w.method) {
			return
		}
		j = c.answers(inFragments(c.homeward(3600), 7, fits, 2*fits))
		j.arrives(0, replyTable)
		j.follows()
		j = c.answers(inFragments(c.homeward(3600), 8, fits+1))
		c.tooBig(j, 1400, 0)
		j.stops(1, passFragment)
		j = c.answers(inFragments(c.homeward(3600), 9, fits, 2*fits+1))
		j.arrives(0, replyTable)
		j.stops(1, dropTooBig)
		j.arrives(2, replyFragment)
	})
}

// tooBig sends a first fragment that is too long.
func (c *conversation) tooBig(j *journey, mtu uint32, service uint32) {
	c.Helper()
	frame := j.piece(0)
	if c.client.Addr().Is4() {
		j.halts(frame, dropTooBig, service)
		return
	}
	from := c.from
	if j.reply {
		from = c.backends[c.backend-1].side()
	}
	answer := message{
		ethSource: j.ethDestination, ethDestination: j.ethSource, tags: j.tags,
		source: j.destination.Addr(), destination: j.source.Addr(), ttl: 64,
		kind: tooBig6, rest: mtu, body: frame[ethernetHeader+4*len(j.tags):][:quoteMost],
	}
	c.deliver(frame, from, expectation{verdict: answerTooBig, frame: answer.bytes(), service: service})
}

// A first fragment stands for its packet for 30 s; Linux keeps it as long.
func TestFragmentsLife(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		journeys := []*journey{c.sends(inFragments(c.outward(100), 7, 5, 6))}
		if rewrites(w.method) {
			journeys = append(journeys, c.answers(inFragments(c.homeward(100), 8, 5, 6)))
		}
		for _, j := range journeys {
			if j.reply {
				j.arrives(0, replyTable)
			} else {
				j.arrives(0, forwardTable)
			}
			// A second short of it, and a tick past it.
			s.ageFragments(29 * time.Second)
			j.follows()
			s.ageFragments(time.Second + 2*maps.Tick)
			j.stops(1, passFragment)
			j.stops(2, passFragment)
		}
	})
}

// ageFragments makes all that is known of fragments older.
func (p *dataplane) ageFragments(by time.Duration) {
	p.Helper()
	var key bpf.FairleadFragmentKey
	var value bpf.FairleadFragment
	all := map[bpf.FairleadFragmentKey]bpf.FairleadFragment{}
	entries := p.Fragments.Iterate()
	for entries.Next(&key, &value) {
		value.Tick -= maps.Ticks(by)
		all[key] = value
	}
	p.must(entries.Err())
	if len(all) == 0 {
		p.Fatal("no fragment is known")
	}
	for key, value := range all {
		p.must(p.Fragments.Update(key, value, ebpf.UpdateExist))
	}
}

// Fragments of a connection whose backend's next hop is not known go nowhere.
func TestFragmentsWithoutNeighbor(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		j := c.sends(inFragments(c.outward(100), 7, 5, 6))
		j.arrives(0, forwardTable)
		s.forgetNeighbor(1)
		j.stops(1, dropNoNeighbor)
		s.findNeighbor(1)
		j.follows()
	})
}

// Fragments put together again are the packet that was sent, as its receiver is to see it: this holds the parcels of these
// tests against gopacket, which is no part of them.
func TestParcels(t *testing.T) {
	for _, f := range families {
		for _, udp := range []bool{false, true} {
			c := &conversation{scene: &scene{dataplane: &dataplane{protocol: unix.IPPROTO_TCP}, family: f,
				service: service{address: f.service}}, client: netip.AddrPortFrom(f.client, 40000)}
			if udp {
				c.protocol = unix.IPPROTO_UDP
			}
			p := inFragments(c.outward(500), 0xcafe, 5, 20)
			var content []byte
			for piece := range 3 {
				packet := gopacket.NewPacket(p.piece(piece), layers.LayerTypeEthernet, gopacket.Default)
				number, offset, more, data := uint32(0), uint16(0), false, []byte(nil)
				if ip, ok := packet.NetworkLayer().(*layers.IPv4); ok {
					number, offset, more, data = uint32(ip.Id), ip.FragOffset, ip.Flags&layers.IPv4MoreFragments != 0, ip.Payload
				} else {
					header, _ := packet.Layer(layers.LayerTypeIPv6Fragment).(*layers.IPv6Fragment)
					number, offset, more, data = header.Identification, header.FragmentOffset, header.MoreFragments, header.Payload
				}
				if number != 0xcafe || int(offset)*8 != len(content) || more == (piece == 2) {
					t.Errorf("%s: piece %d has number %#x, offset %d, more to come: %t", f.name, piece, number, offset, more)
				}
				content = append(content, data...)
			}
			if whole := p.packet()[f.ipHeader():]; !bytes.Equal(content, whole) {
				t.Errorf("%s: the pieces are\n%x, want\n%x", f.name, content, whole)
			}
		}
	}
}
