package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

const (
	errorForwarded = bpf.FairleadVerdictFORWARD_ICMP
	errorReplied   = bpf.FairleadVerdictREPLY_ICMP
)

// routers are who sends the errors: on the clients' side, and behind the edge.
var routers = map[string][2]netip.Addr{
	"ipv4": {netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("10.9.9.9")},
	"ipv6": {netip.MustParseAddr("2001:db8:9::7"), netip.MustParseAddr("fd00:9::9")},
}

// errorKind is a kind of error, by its type, its code, and what stands behind the checksum.
type errorKind struct {
	kind, code uint8
	rest       uint32
}

func (k errorKind) String() string {
	return fmt.Sprintf("type %d code %d rest %#x", k.kind, k.code, k.rest)
}

// errorKinds are all kinds of errors that follow a connection, codes not yet given out included.
func errorKinds(f family) (kinds []errorKind) {
	add := func(kind, codes uint8, rest uint32) {
		for code := range codes {
			kinds = append(kinds, errorKind{kind, code, rest})
		}
	}
	if f.name == "ipv4" {
		add(unreachable4, 17, 0)
		kinds[fragmentNeeded].rest = 1400
		kinds = append(kinds, errorKind{unreachable4, fragmentNeeded, 0}) // of routers before RFC 1191
		add(timeExceeded4, 3, 0x00110000)                                 // the length of RFC 4884
		add(parameterProblem4, 3, 20<<24)
		return append(kinds, errorKind{unreachable4, 255, 0xffffffff})
	}
	add(unreachable6, 9, 0)
	kinds = append(kinds, errorKind{tooBig6, 0, 1400}, errorKind{tooBig6, 0, 0xfffefdfc})
	add(timeExceeded6, 2, 0x10000000)
	add(parameterProblem6, 5, 40)
	return append(kinds, errorKind{unreachable6, 255, 0xffffffff})
}

// tooBigKind is the kind that tells what a way takes.
func tooBigKind(f family, mtu uint32) errorKind {
	if f.name == "ipv4" {
		return errorKind{unreachable4, fragmentNeeded, mtu}
	}
	return errorKind{tooBig6, 0, mtu}
}

// wholePacket quotes as much as there is.
const wholePacket = 1 << 16

// quoted is a packet's IP header and so many bytes of what it carries.
func quoted(s segment, bytes int) []byte {
	s.tags, s.padding = nil, nil
	packet := s.packet()
	return packet[:min(len(packet), s.transportOffset()-ethernetHeader+bytes)]
}

// errorAbout is an ICMP error from a router before us about a packet of the connection's backend, and what of it that
// backend is to get. The packet is given as `answer` makes it, and quoted as it came to the router.
func (c *conversation) errorAbout(answer segment, k errorKind, quote int, edits ...func(*message)) (in, want message) {
	c.Helper()
	service := c.scene.service.address
	answer.ttl = 3
	seen := answer.between(service, c.client)
	in = message{
		ethSource: c.router, ethDestination: edgeMAC, tags: c.tags, source: routers[c.family.name][0],
		destination: service.Addr(), ttl: 58, tos: 0xc0, flowLabel: 0x54321, id: 0x4711, df: true,
		kind: k.kind, code: k.code, rest: k.rest, body: quoted(seen, quote),
	}
	for _, edit := range edits {
		edit(&in)
	}
	b := c.backends[c.backend-1]
	want = in.routed(b.sourceMAC(), b.mac, tagsOf(b.tags)...)
	if rewrites(c.method) {
		want.destination, want.body = b.address.Addr(), quoted(answer, quote)
	}
	if c.method == fullnat {
		want.source = c.source.Addr()
	}
	if tunnels(c.method) {
		hash := c.hashOf(c.client, service)
		want.outer = &outer{
			source: b.outerSource(hash), destination: b.address.Addr(), tos: in.tos, df: in.df || in.source.Is6(),
			gue: c.method == gue, port: 49152 | uint16(hash>>16)&0x3fff,
		}
	}
	return in, want
}

// toBackend gives the data plane an error that the connection's backend is to get.
func (c *conversation) toBackend(in, want message) {
	c.Helper()
	if want.outer != nil && !want.outer.df {
		want.outer.id = network(uint16(c.control().Identifications))
	}
	c.deliver(in.bytes(), c.from, expectation{
		verdict: errorForwarded, frame: want.bytes(), to: c.backends[c.backend-1].ifindex, service: 1, backend: c.backend,
	})
}

// errorAboutClient is an ICMP error from a router between us and the backend about a packet of the client, as `segment`
// makes it, and what of it the client is to get. The packet is quoted as the backend would have got it.
func (c *conversation) errorAboutClient(sent segment, k errorKind, quote int, edits ...func(*message)) (in, want message) {
	c.Helper()
	b := c.backends[c.backend-1]
	sent.ttl = 3
	in = message{
		ethSource: b.mac, ethDestination: b.sourceMAC(), tags: tagsOf(b.tags), source: routers[c.family.name][1],
		destination: c.source.Addr(), ttl: 63, tos: 0xc0, flowLabel: 0x54321, id: 0x4711, df: true,
		kind: k.kind, code: k.code, rest: k.rest, body: quoted(sent.between(c.source, b.address), quote),
	}
	for _, edit := range edits {
		edit(&in)
	}
	want = in.routed(edgeMAC, c.router, c.vlan...)
	want.source, want.destination, want.body = c.scene.service.address.Addr(), c.client.Addr(), quoted(sent, quote)
	return in, want
}

// toClient gives the data plane an error that the client is to get.
func (c *conversation) toClient(in, want message) {
	c.Helper()
	c.deliver(in.bytes(), c.backends[c.backend-1].side(), expectation{
		verdict: errorReplied, frame: want.bytes(), to: c.from.index, service: 1, backend: c.backend,
	})
}

// eachProtocol runs a test for TCP and for UDP.
func eachProtocol(t *testing.T, p plan, test func(*testing.T, plan)) {
	for name, udp := range map[string]bool{"tcp": false, "udp": true} {
		p.udp = udp
		t.Run(name, func(t *testing.T) { test(t, p) })
	}
}

// Errors of all kinds about a backend's packets come to that backend, about a packet that it knows to have sent.
func TestErrorsToBackend(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.backends, p.twoArms = 3, true
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			for _, k := range errorKinds(f) {
				t.Run(k.String(), func(t *testing.T) {
					s.in(t)
					c.toBackend(c.errorAbout(c.answer(ack, "some data"), k, wholePacket))
					c.toBackend(c.errorAbout(c.answer(ack, "some data"), k, icmpHeader))
				})
			}
		})
	})
}

// A quote may end anywhere behind the transport header's first eight bytes: TCP's checksum is made right if it is there.
// Bytes behind the packet's end, as Ethernet pads, are nobody's.
func TestQuotesOfAllLengths(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			k := tooBigKind(f, 1280)
			for quote := range 70 {
				// Half a checksum can't be made right.
				half := func(in, want message) (message, message) {
					if !p.udp && quote == 17 {
						want.body = slices.Concat(want.body[:len(want.body)-1], in.body[len(in.body)-1:])
					}
					return in, want
				}
				answer := c.answer(ack|psh, "0123456789abcdefghijklmnopq")
				in, want := half(c.errorAbout(answer, k, quote))
				rest := quoted(answer.between(f.service, c.client), wholePacket)[len(in.body):]
				if quote < 8 {
					s.pass(in.bytes(), passICMP)
					in.padding = rest
					s.pass(in.bytes(), passICMP)
				} else {
					c.toBackend(in, want)
					in.padding, want.padding = rest, rest
					c.toBackend(in, want)
				}
				if !rewrites(w.method) {
					continue
				}
				sent := c.segment(ack|psh, "0123456789abcdefghijklmnopq")
				in, want = half(c.errorAboutClient(sent, k, quote))
				rest = quoted(sent.between(c.source, s.backends[0].address), wholePacket)[len(in.body):]
				if quote < 8 {
					s.pass(in.bytes(), passICMP)
					in.padding = rest
					s.pass(in.bytes(), passICMP)
				} else {
					c.toClient(in, want)
					in.padding, want.padding = rest, rest
					c.toClient(in, want)
				}
			}
		})
	})
}

// shape is a way in which a quoted packet's headers differ.
type shape struct {
	name string
	make func(*segment)
}

func quotedShapes(f family, udp bool) []shape {
	shapes := []shape{
		{"no numbers", func(s *segment) { s.tos, s.id, s.flowLabel, s.window = 0, 0, 0, 0 }},
		{"all numbers", func(s *segment) { s.tos, s.id, s.flowLabel, s.window = 0xff, 0xffff, 0xfffff, 0xffff }},
		{"no payload", func(s *segment) { s.payload = nil }},
		{"odd payload", func(s *segment) { s.payload = []byte("odd") }},
		{"full packet", func(s *segment) { s.payload = []byte(strings.Repeat("Fairlead", 140)) }},
		{"SYN-ACK", func(s *segment) { s.flags = syn | ack }},
		{"RST", func(s *segment) { s.flags, s.options, s.payload = rst, nil, nil }},
	}
	if udp {
		shapes = append(shapes, shape{"no checksum", func(s *segment) { s.noChecksum = true }})
	}
	if f.name == "ipv4" {
		record := layers.IPv4Option{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}
		long := layers.IPv4Option{OptionType: 0x5e, OptionLength: 40, OptionData: []byte(strings.Repeat("!?", 19))}
		return append(shapes,
			shape{"may be fragmented", func(s *segment) { s.df = false }},
			shape{"first fragment", func(s *segment) { s.df, s.mf = false, true }},
			shape{"options", func(s *segment) { s.ipOptions = []layers.IPv4Option{{OptionType: 1}, record} }},
			shape{"all options", func(s *segment) { s.ipOptions = []layers.IPv4Option{long} }})
	}
	for name, headers := range map[string][]extension{
		"hop-by-hop":                           {hopByHop},
		"destination options":                  {destination},
		"routing at its end":                   {routing},
		"atomic fragment":                      {atomic},
		"first fragment":                       {firstFragment},
		"first fragment, behind other headers": {hopByHop, routing, firstFragment, destination},
		"six headers":                          {hopByHop, destination, routing, atomic, destination, destination},
		"a very long header":                   {{unix.IPPROTO_DSTOPTS, append([]byte{100, 1, 0}, make([]byte, 804)...)}},
	} {
		shapes = append(shapes, shape{name, func(s *segment) { s.extensions = headers }})
	}
	return shapes
}

// Quoted packets have headers of all shapes.
func TestQuotedShapes(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			for _, shape := range quotedShapes(f, p.udp) {
				t.Run(shape.name, func(t *testing.T) {
					s.in(t)
					for _, quote := range []int{8, 20, wholePacket} {
						answer := c.answer(ack, "some data")
						shape.make(&answer)
						c.toBackend(c.errorAbout(answer, tooBigKind(f, 1300), quote))
						if rewrites(w.method) {
							sent := c.segment(ack, "some data")
							shape.make(&sent)
							c.toClient(c.errorAboutClient(sent, tooBigKind(f, 1300), quote))
						}
					}
				})
			}
		})
	})
}

// A quoted checksum of UDP that comes out as zero is written as all ones, for zero says that there is none (RFC 768).
func TestQuotedChecksumZero(t *testing.T) {
	eachWay(t, rewrites, func(t *testing.T, f family, w way, p plan) {
		p.udp = true
		s := newManaged(t, f, w.method, p)
		c := s.newClient().openAs()
		find := func(payload []byte, frame func() []byte, at int) {
			t.Helper()
			for n := range 1 << 16 {
				binary.BigEndian.PutUint16(payload, uint16(n))
				if binary.BigEndian.Uint16(frame()[at:]) == 0xffff {
					return
				}
			}
			t.Fatal("no payload makes the checksum all ones")
		}
		answer := c.answer(0, "..")
		answer.tags = nil
		find(answer.payload, answer.bytes, answer.checksumOffset())
		c.toBackend(c.errorAbout(answer, tooBigKind(f, 1300), wholePacket))
		sent := c.segment(0, "..")
		find(sent.payload, sent.bytes, sent.checksumOffset())
		c.toClient(c.errorAboutClient(sent, tooBigKind(f, 1300), wholePacket))
		// And the other way round: from all ones to something else.
		sent = c.segment(0, "..")
		theirs := sent.between(c.source, s.backends[0].address)
		find(sent.payload, theirs.bytes, theirs.checksumOffset())
		c.toClient(c.errorAboutClient(sent, tooBigKind(f, 1300), wholePacket))
	})
}

// What was wrong stays exactly as wrong: the message's own checksum, and the quoted packet's.
func TestWrongChecksumsOfErrors(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			c := s.newClient().openAs()
			for _, wrong := range []uint16{0x0001, 0x8000, 0x1234} {
				in, want := c.errorAbout(c.answer(ack, "what"), tooBigKind(f, 1300), wholePacket)
				s.sendWrong(in, want, theKernel.front, wrong, expectation{verdict: errorForwarded, to: theKernel.front.index,
					service: 1, backend: c.backend})
				if rewrites(w.method) {
					in, want = c.errorAboutClient(c.segment(ack, "what"), tooBigKind(f, 1300), wholePacket)
					s.sendWrong(in, want, theKernel.front, wrong, expectation{verdict: errorReplied, to: theKernel.front.index,
						service: 1, backend: c.backend})
				}
				// A payload that is not what its checksum says.
				in, want = c.errorAbout(c.answer(ack, "what"), tooBigKind(f, 1300), wholePacket)
				in.body, want.body = bytes.Clone(in.body), bytes.Clone(want.body)
				in.body[len(in.body)-1] ^= byte(wrong) | 2
				want.body[len(want.body)-1] ^= byte(wrong) | 2
				c.toBackend(in, want)
			}
		})
	})
}

// sendWrong sends a message whose checksum is off.
func (p *dataplane) sendWrong(in, want message, from device, wrong uint16, expected expectation) {
	p.Helper()
	frame := in.bytes()
	at := in.checksumOffset()
	binary.BigEndian.PutUint16(frame[at:], binary.BigEndian.Uint16(frame[at:])^wrong)
	action, out := p.run(p.Fairlead, frame, from)
	expected.frame = want.bytes()
	if len(out) != len(expected.frame) {
		p.Fatalf("%d bytes came out, want %d", len(out), len(expected.frame))
	}
	inside := len(expected.frame) - (len(frame) - at) // the same byte, as nothing behind it moves
	if want.outer == nil {
		inside = want.checksumOffset()
		if before, after := in.residual(frame), want.residual(out); before != after || before == 0 {
			p.Errorf("checksum wrong by %#x came out wrong by %#x", before, after)
		}
	} else if !bytes.Equal(out[inside:inside+2], frame[at:at+2]) {
		p.Errorf("checksum %x came out as %x", frame[at:at+2], out[inside:inside+2])
	}
	copy(expected.frame[inside:inside+2], out[inside:])
	p.check(frame, from, action, out, expected)
}

// An error finds the backend of a connection that is half-open, or established on a backend that the ring does not name any
// more; and, where the backend's name is all it takes, of one that no table knows.
func TestErrorsByState(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.backends = 3
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			k := tooBigKind(f, 1300)
			toClient := func(c *conversation) {
				s.Helper()
				if rewrites(w.method) {
					c.toClient(c.errorAboutClient(c.segment(ack, "x"), k, 8))
				}
			}

			stranger := s.newClient()
			stranger.backend = ringAnswer(s.service, stranger.client)
			in, want := stranger.errorAbout(stranger.answer(ack, "data"), k, 8)
			if rewrites(w.method) {
				s.pass(in.bytes(), passICMP)
				in, _ = stranger.errorAboutClient(stranger.segment(ack, "x"), k, 8)
				s.pass(in.bytes(), passICMP)
			} else {
				stranger.toBackend(in, want)
			}

			half := s.clientOf(2)
			half.send(half.segment(syn, ""), forwardNew)
			half.toBackend(half.errorAbout(half.answer(syn|ack, ""), k, 8))
			toClient(half)

			grown := s.clientOf(2).openAs()
			grown.toBackend(grown.errorAbout(grown.answer(ack, "data"), k, wholePacket))
			s.drain(2)
			for _, c := range []*conversation{half, grown} {
				if now := ringAnswer(s.service, c.client); now == 2 || c.backend != 2 {
					t.Fatalf("on backend %d, the ring names %d: want 2 and another", c.backend, now)
				}
				c.toBackend(c.errorAbout(c.answer(ack, "data"), k, wholePacket))
				toClient(c)
			}
		})
	})
}

// A half-open connection's time is up 75 s after its first packet, for errors as for all else.
func TestErrorsPastHalfOpenLife(t *testing.T) {
	eachWay(t, rewrites, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		answer, sent := c.answer(syn|ack, ""), c.segment(ack, "")
		c.toBackend(c.errorAbout(answer, tooBigKind(f, 1300), 8))
		c.toClient(c.errorAboutClient(sent, tooBigKind(f, 1300), 8))
		c.ageHalfOpen(maps.HalfOpenLife)
		in, _ := c.errorAbout(answer, tooBigKind(f, 1300), 8)
		s.pass(in.bytes(), passICMP)
		in, _ = c.errorAboutClient(sent, tooBigKind(f, 1300), 8)
		s.pass(in.bytes(), passICMP)
	})
}

// The way to a client and the way back must be of one generation: else nobody is known.
func TestErrorsByGeneration(t *testing.T) {
	eachWay(t, rewrites, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		sent := c.segment(ack, "")
		c.toClient(c.errorAboutClient(sent, tooBigKind(f, 1300), 8))
		entry := c.entry()
		entry.Generation++
		s.editEntry(c, &entry)
		in, _ := c.errorAboutClient(sent, tooBigKind(f, 1300), 8)
		s.pass(in.bytes(), passICMP)
		entry.Generation--
		s.editEntry(c, &entry)
	})
}

// The error's own packet is routed like any other: with options and extension headers, with and without tags, padded, and
// with its time to live counted.
func TestErrorsRouted(t *testing.T) {
	record := layers.IPv4Option{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}
	edits := []struct {
		name, family string
		edit         func(*message)
	}{
		{"odd length", "", func(m *message) { m.body = append(slices.Clone(m.body), 'x') }},
		{"padded", "", func(m *message) { m.padding = []byte("\xff\xfe\xfd\xfc\xfb") }},
		{"plain service class", "", func(m *message) { m.tos, m.flowLabel, m.id = 0, 0, 0 }},
		{"congestion experienced", "", func(m *message) { m.tos = 0x03 }},
		{"last hop but one", "", func(m *message) { m.ttl = 2 }},
		{"all hops", "", func(m *message) { m.ttl = 255 }},
		{"larger than a page", "", func(m *message) { m.body = append(slices.Clone(m.body), make([]byte, 8000)...) }},
		{"from the backend's own address", "", func(m *message) { m.source = plus(m.destination, 3) }},
		{"may be fragmented", "ipv4", func(m *message) { m.df = false }},
		{"options", "ipv4", func(m *message) { m.ipOptions = []layers.IPv4Option{{OptionType: 1}, record} }},
		{"hop-by-hop", "ipv6", func(m *message) { m.extensions = []extension{hopByHop} }},
		{"three headers", "ipv6", func(m *message) { m.extensions = []extension{hopByHop, destination, atomic} }},
	}
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		k := tooBigKind(f, 1400)
		for _, e := range edits {
			if e.family != "" && e.family != f.name {
				continue
			}
			t.Run(e.name, func(t *testing.T) {
				s.in(t)
				in, want := c.errorAbout(c.answer(ack, "abc"), k, wholePacket, e.edit)
				want.body = append(slices.Clone(want.body), in.body[len(want.body):]...) // what an edit put there
				c.toBackend(in, want)
				if !rewrites(w.method) {
					return
				}
				in, want = c.errorAboutClient(c.segment(ack, "abc"), k, wholePacket, e.edit)
				want.body = append(slices.Clone(want.body), in.body[len(want.body):]...)
				c.toClient(in, want)
			})
		}
		s.in(t)
		for _, ttl := range []uint8{0, 1} {
			last := func(m *message) { m.ttl = ttl }
			in, _ := c.errorAbout(c.answer(ack, "abc"), k, wholePacket, last)
			s.deliver(in.bytes(), theKernel.front, expectation{verdict: dropTTL})
			if rewrites(w.method) {
				in, _ = c.errorAboutClient(c.segment(ack, "abc"), k, wholePacket, last)
				s.deliver(in.bytes(), theKernel.front, expectation{verdict: dropTTL})
			}
		}
	})
}

// Errors come with their tags and go with those of their next hop, by one device or another.
func TestErrorsTagged(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		s.eachTagging(t, func(c *conversation) {
			c.open()
			for _, quote := range []int{8, wholePacket} {
				c.toBackend(c.errorAbout(c.answer(ack, "data"), tooBigKind(f, 1300), quote))
				if rewrites(w.method) {
					c.toClient(c.errorAboutClient(c.segment(ack, "data"), tooBigKind(f, 1300), quote))
				}
			}
		})
	})
}

// An error that was cut short anywhere is never believed: the host's stack sees what there is of it.
func TestErrorsTruncated(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		record := layers.IPv4Option{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}
		for _, edit := range []func(*message){
			func(*message) {},
			func(m *message) { m.tags = []tag{{0x88a8, 100}, {0x8100, 5}} },
			func(m *message) {
				m.extensions, m.ipOptions = []extension{hopByHop, destination}, []layers.IPv4Option{record}
			},
		} {
			for toClient := range 2 {
				if toClient > 0 && !rewrites(w.method) {
					continue
				}
				in, want := c.errorAbout(c.answer(ack, "data"), tooBigKind(f, 1300), wholePacket, edit)
				if toClient > 0 {
					in, want = c.errorAboutClient(c.segment(ack, "data"), tooBigKind(f, 1300), wholePacket, edit)
				}
				// What is known as ICMP at all: IPv4's bare header says so, in IPv6 the last extension header does.
				known := ethernetHeader + 4*len(in.tags) + 20
				if f.name == "ipv6" {
					known = ethernetHeader + 4*len(in.tags) + 40
					for _, header := range in.extensions {
						known += len(header.rest) + 1
					}
					if len(in.extensions) > 0 {
						known -= len(in.extensions[len(in.extensions)-1].rest) - 3 // its first four bytes
					}
				}
				frame := in.bytes()
				for n := ethernetHeader; n < len(frame); n++ {
					v := passICMP
					if n < known {
						v = passNotOurs
					}
					s.pass(frame[:n], v)
				}
				if toClient > 0 {
					c.toClient(in, want)
				} else {
					c.toBackend(in, want)
				}
			}
		}
	})
}

// Lengths of an error's IP header that contradict what the frame holds.
func TestErrorsOfBadLengths(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		in, _ := c.errorAbout(c.answer(ack, "data"), tooBigKind(f, 1300), 8)
		frame := in.bytes()
		at, least := ethernetHeader+2, 20
		if f.name == "ipv6" {
			at, least = ethernetHeader+4, 0
		}
		whole := int(binary.BigEndian.Uint16(frame[at:]))
		for length := range whole {
			binary.BigEndian.PutUint16(frame[at:], uint16(length))
			s.pass(frame, passICMP)
		}
		for _, length := range []int{whole + 1, whole + 1000, 65535} {
			binary.BigEndian.PutUint16(frame[at:], uint16(length))
			s.pass(frame, passICMP)
		}
		if whole <= least {
			t.Fatalf("an error of %d bytes", whole)
		}
	})
}

// ICMP that is not about our connections passes, every byte of it.
func TestErrorsNotOurs(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newManaged(t, f, w.method, p)
			s.must(s.manager.SetOwn([]netip.Addr{f.service.Addr(), f.source}))
			c := s.newClient().openAs()
			k := tooBigKind(f, 1300)
			pass := func(name string, v verdict, about segment, edit func(*message)) {
				t.Run(name, func(t *testing.T) {
					s.in(t)
					in, _ := c.errorAbout(about, k, wholePacket)
					in.body = quoted(about, wholePacket)
					if edit != nil {
						edit(&in)
					}
					s.pass(in.bytes(), v)
				})
				s.in(t)
			}
			seen := c.answer(ack, "data").between(f.service, c.client)
			other := seen
			other.udp = !other.udp
			later := seen
			later.df, later.offset = false, 1
			later.extensions = []extension{laterFragment}
			number := func(protocol uint8) func(*message) {
				return func(m *message) {
					m.body = bytes.Clone(m.body)
					m.body[9] = protocol
					if f.name == "ipv6" {
						m.body[9], m.body[6] = byte(9), protocol
					}
				}
			}
			first := func(value byte) func(*message) {
				return func(m *message) { m.body = bytes.Clone(m.body); m.body[0] = value }
			}
			pass("outer destination not the quoted source", passICMP, seen, func(m *message) { m.destination = plus(m.destination, 1) })
			pass("to a group's MAC", passICMP, seen, func(m *message) { m.ethDestination = broadcast })
			pass("from a group's MAC", passICMP, seen, func(m *message) { m.ethSource = broadcast })
			for _, nobody := range nobodies[f.name] {
				pass("from "+nobody.String(), passICMP, seen, func(m *message) { m.source = nobody })
			}
			pass("from another port of the service's address", passICMP,
				seen.between(netip.AddrPortFrom(f.service.Addr(), 80), c.client), nil)
			pass("from another address", passICMP, seen.between(netip.AddrPortFrom(plus(f.service.Addr(), 1), 443), c.client),
				func(m *message) { m.destination = plus(m.destination, 1) })
			pass("the other protocol", passICMP, other, nil)
			pass("later fragment quoted", passICMP, later, nil)
			pass("the client's own packet", passICMP, seen.between(c.client, f.service), nil)
			pass("other version quoted", passICMP, seen, first(0xf5))
			if f.name == "ipv4" {
				pass("IPv4 header of 16 bytes quoted", passICMP, seen, first(0x44))
				pass("IPv6 quoted", passICMP, seen, first(0x60))
				pass("first fragment", passICMP, seen, func(m *message) { m.df, m.mf = false, true })
				// At an address of XDP's own nobody would ever put it together.
				pass("later fragment", laterDropped, seen, func(m *message) { m.df, m.offset = false, 8 })
			} else {
				pass("IPv4 quoted", passICMP, seen, first(0x45))
				pass("first fragment", passICMP, seen, func(m *message) { m.extensions = []extension{firstFragment} })
				pass("later fragment", laterDropped, seen, func(m *message) { m.extensions = []extension{laterFragment} })
				seven := seen
				seven.extensions = []extension{hopByHop, destination, routing, destination, destination, destination, destination}
				pass("seven headers quoted", passICMP, seven, nil)
				sealed := seen
				sealed.extensions = []extension{authenticated}
				pass("authentication header quoted", passICMP, sealed, nil)
			}
			for _, protocol := range []uint8{unix.IPPROTO_ICMP, unix.IPPROTO_GRE, unix.IPPROTO_SCTP, unix.IPPROTO_IPIP,
				unix.IPPROTO_IPV6, 255} {
				pass(fmt.Sprintf("protocol %d quoted", protocol), passICMP, seen, number(protocol))
			}
			if w.method == fullnat {
				b := s.backends[0]
				sent := c.segment(ack, "data")
				in, _ := c.errorAboutClient(sent, k, wholePacket)
				in.destination = plus(in.destination, 1)
				s.pass(in.bytes(), passICMP)
				for _, unknown := range []segment{
					sent.between(netip.AddrPortFrom(c.source.Addr(), c.source.Port()+1), b.address),
					sent.between(c.source, netip.AddrPortFrom(b.address.Addr(), b.address.Port()+1)),
					sent.between(c.source, netip.AddrPortFrom(plus(b.address.Addr(), 1), b.address.Port())),
				} {
					in, _ := c.errorAboutClient(sent, k, wholePacket)
					in.body = quoted(unknown, wholePacket)
					s.pass(in.bytes(), passICMP)
				}
			}

			// All other types pass, whatever they quote; echo and solicitations have tests of their own.
			errors := map[uint8]bool{}
			for _, k := range errorKinds(f) {
				errors[k.kind] = true
			}
			for kind := range 256 {
				if errors[uint8(kind)] {
					continue
				}
				in, _ := c.errorAbout(c.answer(ack, "data"), errorKind{kind: uint8(kind), code: 1}, wholePacket)
				s.pass(in.bytes(), passICMP)
				in.code = 0
				if kind == echoRequest4 && f.name == "ipv4" || kind == echoRequest6 && f.name == "ipv6" {
					in.destination = plus(in.destination, 1)
				}
				s.pass(in.bytes(), passICMP)
			}
		})
	})
}

// A backend whose next hop is not known gets no errors either.
func TestErrorsWithoutNeighbor(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		in, _ := c.errorAbout(c.answer(ack, "data"), tooBigKind(f, 1300), wholePacket)
		s.forgetNeighbor(1)
		s.deliver(in.bytes(), theKernel.front, expectation{verdict: dropNoNeighbor})
	})
}

// tunnelError is an ICMP error from a router on the way to the end of a tunnel, about the outer packet of a client's
// segment, of which it quotes so many bytes.
func (c *conversation) tunnelError(of segment, k errorKind, quote int) message {
	c.Helper()
	outgoing := c.forwarded(of, 0x1234)
	from := *outgoing.outer
	packet := from.around(outgoing.packet(), outgoing.source.Addr())
	name := "ipv4"
	if from.source.Is6() {
		name = "ipv6"
	}
	b := c.backends[c.backend-1]
	return message{
		ethSource: b.mac, ethDestination: b.sourceMAC(), tags: tagsOf(b.tags), source: routers[name][1],
		destination: from.source, ttl: 62, tos: 0xc0, kind: k.kind, code: k.code, rest: k.rest,
		body: packet[:min(len(packet), quote)],
	}
}

// told gives the data plane a tunnel's error, which the host's stack is to get as well.
func (c *conversation) told(m message, events ...event) {
	c.Helper()
	frame := m.bytes()
	c.deliver(frame, c.backends[c.backend-1].side(), expectation{verdict: passTunnelError, frame: frame, events: events})
}

// path is what is known of the way to the connection's backend.
func (c *conversation) path() (path bpf.FairleadPath) {
	c.Helper()
	c.must(c.Paths.Lookup(pathKey(c.backends[c.backend-1].address.Addr()), &path))
	return path
}

// takes checks that the way of the connection's packets takes so much, and not a byte more.
func (c *conversation) takes(length int) {
	c.Helper()
	c.send(c.long(length), forwardTable)
	c.tooBigFor = uint32(length)
	c.send(c.long(length+1), answerTooBig)
	c.send(c.long(length*2), answerTooBig)
	if !c.client.Addr().Is4() {
		return
	}
	free := c.long(length)
	free.df = false
	c.send(free, forwardTable)
	free = c.long(length + 1)
	free.df = false
	c.send(free, dropTooBig)
}

// least is what a family's routers may not say less of.
func (f family) least() uint32 {
	if f.name == "ipv4" {
		return 576
	}
	return 1280
}

// An error about an outer packet of ours lowers what the way to that tunnel's end is known to take, for ten minutes;
// whose packet is longer is told so, less the outer headers.
func TestTunnelPathMTU(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		p.backends, p.twoArms = 2, true
		outer := families[w.outer]
		s := newManaged(t, f, w.method, p)
		c, elsewhere := s.clientOf(1).open(), s.clientOf(2).open()
		less := int(w.overhead())
		c.takes(mtu - less)
		say := func(size uint32, quote int) {
			t.Helper()
			before := s.tick()
			c.told(c.tunnelError(c.segment(ack, "data"), tooBigKind(outer, size), quote), pathLess)
			if path := c.path(); path.Mtu != size || int32(path.Tick-before) < 0 || int32(s.tick()-path.Tick) < 0 {
				t.Errorf("told %d in ticks %d to %d, it is known as %+v", size, before, s.tick(), path)
			}
		}
		sayNothing := func(k errorKind) {
			t.Helper()
			before := c.path()
			c.told(c.tunnelError(c.segment(ack, "data"), k, wholePacket))
			if c.path() != before {
				t.Errorf("told %v, the path is known as %+v, want %+v", k, c.path(), before)
			}
		}
		say(1480, int(outer.ipHeader())+8)
		c.takes(1480 - less)
		elsewhere.takes(mtu - less)
		say(1400, wholePacket)
		c.takes(1400 - less)
		// That it takes more again only time tells (RFC 1191, section 6.3).
		for _, size := range []uint32{1400, 1401, 1500, 65535} {
			sayNothing(tooBigKind(outer, size))
		}
		c.takes(1400 - less)

		// What says nothing of length changes nothing.
		for _, k := range errorKinds(outer) {
			if k.kind != tooBigKind(outer, 0).kind || outer.name == "ipv4" && k.code != fragmentNeeded {
				sayNothing(k)
			}
		}
		sayNothing(tooBigKind(outer, 0))

		// Ten minutes on, it may take more.
		forgotten := c.path()
		forgotten.Tick -= maps.Ticks(10*time.Minute) + 1
		s.must(s.Paths.Put(pathKey(s.backends[0].address.Addr()), forgotten))
		c.takes(mtu - less)
		say(1460, wholePacket) // more than before, and less than is known by now
		c.takes(1460 - less)
	})
}

// Nobody is believed who says that a way takes less than any must, and short packets are never asked about.
func TestTunnelLeastMTU(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		outer := families[w.outer]
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		for i, size := range []uint32{1, 67, 68, 575, 576, outer.least() - 1, outer.least()} {
			var events []event
			if i == 0 {
				events = []event{pathLess}
			}
			c.told(c.tunnelError(c.segment(ack, "data"), tooBigKind(outer, size), wholePacket), events...)
			if size > outer.least() {
				continue
			}
			if path := c.path(); path.Mtu != outer.least() {
				t.Fatalf("told %d, the path is known to take %d, want %d", size, path.Mtu, outer.least())
			}
		}
		if f.name == "ipv4" {
			c.takes(int(outer.least() - w.overhead()))
			return
		}
		// No host of IPv6 sends less than 1280 bytes for being told so (RFC 8200, section 5): it is told of 1280.
		c.tooBigFor = 1280
		c.send(c.long(1281), answerTooBig)
		c.send(c.long(1500), answerTooBig)
		fits := int(outer.least() - w.overhead())
		c.send(c.long(fits), forwardTable)
		if outer.name == "ipv6" {
			// Nobody on the way cuts these, and here it is not done: named, not lost (RFC 2473, section 7.1, has them cut).
			for _, length := range []int{fits + 1, 1280} {
				c.send(c.long(length), dropTooBig)
			}
			return
		}
		// The way's routers may cut these (RFC 4213, section 3.2.2).
		c.loose = true
		for _, length := range []int{fits, fits + 1, 576, 577, 1000, 1280} {
			c.send(c.long(length), forwardTable)
		}
	})
}

// Errors about others' tunnels pass and teach nothing; nor do those that quote too little.
func TestTunnelErrorsNotOurs(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		p.backends = 2
		outer := families[w.outer]
		s := newManaged(t, f, w.method, p)
		c := s.clientOf(1).open()
		k := tooBigKind(outer, 1300)
		header := int(outer.ipHeader())
		whole := c.tunnelError(c.segment(ack, "data"), k, wholePacket)
		pass := func(name string, v verdict, edit func(*message)) {
			t.Run(name, func(t *testing.T) {
				s.in(t)
				m := whole
				m.body = bytes.Clone(m.body)
				edit(&m)
				s.pass(m.bytes(), v)
				if path := c.path(); path != (bpf.FairleadPath{}) {
					t.Errorf("the path is known as %+v, want nothing", path)
				}
			})
			s.in(t)
			s.must(s.Paths.Put(pathKey(s.backends[0].address.Addr()), bpf.FairleadPath{}))
		}
		protocol, destinationEnd := 9, 19
		if outer.name == "ipv6" {
			protocol, destinationEnd = 6, 39
		}
		pass("to another end", passICMP, func(m *message) { m.body[destinationEnd] ^= 0x40 })
		pass("outer destination not the quoted source", passICMP, func(m *message) { m.destination = plus(m.destination, 1) })
		pass("another protocol", passICMP, func(m *message) { m.body[protocol] = unix.IPPROTO_GRE })
		pass("TCP", passICMP, func(m *message) { m.body[protocol] = unix.IPPROTO_TCP })
		if w.method == gue {
			pass("to another port", passICMP, func(m *message) { m.body[header+3]++ })
		} else {
			pass("UDP to another port", passICMP, func(m *message) { m.body[protocol] = unix.IPPROTO_UDP })
		}
		pass("a truncated frame", passICMP, func(m *message) { m.body = m.body[:header-1] })
		for kind := range 256 {
			if slices.ContainsFunc(errorKinds(outer), func(k errorKind) bool { return k.kind == uint8(kind) }) {
				continue
			}
			m := whole
			m.kind, m.code = uint8(kind), 1
			s.pass(m.bytes(), passICMP)
		}
	})
}

// A tunnel's error has to quote the outer header whole, and of gue what tells it from other UDP: what Ethernet pads behind
// the packet is no part of it. A frame cut short is not believed at all.
func TestTunnelErrorsOfAllLengths(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		outer := families[w.outer]
		s := newManaged(t, f, w.method, p)
		c := s.newClient().open()
		whole := c.tunnelError(c.segment(ack, "data"), tooBigKind(outer, 1300), wholePacket)
		enough := int(outer.ipHeader())
		if w.method == gue {
			enough += 8
		}
		for quote := range len(whole.body) {
			m := whole
			m.body, m.padding = whole.body[:quote], whole.body[quote:]
			if quote < enough {
				s.pass(m.bytes(), passICMP)
				if path := c.path(); path != (bpf.FairleadPath{}) {
					t.Fatalf("by a quote of %d bytes the path is known as %+v, want nothing", quote, path)
				}
				continue
			}
			c.told(m, pathLess)
			s.must(s.Paths.Put(pathKey(s.backends[0].address.Addr()), bpf.FairleadPath{}))
		}
		frame := whole.bytes()
		for n := ethernetHeader; n < len(frame); n++ {
			v := passICMP
			if n < ethernetHeader+int(outer.ipHeader()) {
				v = passNotOurs
			}
			s.pass(frame[:n], v)
		}
	})
}

// An error that its way does not take is dropped by name, never answered with another (RFC 1122, section 3.2.2), and
// counted as nothing that went anywhere.
func TestErrorsTooBig(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.mtu, p.twoArms = 1400, true
		s := newManaged(t, f, w.method, p)
		devices := bothDevices()
		devices[0].MTU = 1400
		s.must(s.manager.SetDevices(devices))
		c := s.newClient().open()
		much := strings.Repeat("Fairlead", 200)
		for _, df := range []bool{true, false} {
			resize := func(in, want message, length uint32) (message, message) {
				in.df, want.df = df, df
				if want.outer != nil {
					want.outer.df = df || f.name == "ipv6"
				}
				quoted := int(length) - (in.icmpOffset() - ethernetHeader) - icmpHeader
				in.body, want.body = in.body[:quoted], want.body[:quoted]
				return in, want
			}
			for longer := range uint32(2) {
				in, want := c.errorAbout(c.answer(ack, much), tooBigKind(f, 1300), wholePacket)
				in, want = resize(in, want, p.mtu-w.overhead()+longer)
				if longer > 0 {
					s.deliver(in.bytes(), theKernel.front, expectation{verdict: dropTooBig})
				} else {
					c.toBackend(in, want)
				}
				if !rewrites(w.method) {
					continue
				}
				in, want = c.errorAboutClient(c.segment(ack, much), tooBigKind(f, 1300), wholePacket)
				in, want = resize(in, want, 1400+longer)
				if longer > 0 {
					s.deliver(in.bytes(), theKernel.back, expectation{verdict: dropTooBig})
				} else {
					c.toClient(in, want)
				}
			}
		}
	})
}
