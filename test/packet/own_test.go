package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"fairlead/bpf"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

const (
	arpAnswered  = bpf.FairleadVerdictANSWER_ARP
	ndpAnswered  = bpf.FairleadVerdictANSWER_NDP
	echoAnswered = bpf.FairleadVerdictANSWER_ECHO
)

var broadcast = mac("ff:ff:ff:ff:ff:ff")

// nobodies are source addresses that no host has on a wire (RFC 1122, section 3.2.1.3; RFC 4291, section 2).
var nobodies = map[string][]netip.Addr{
	"ipv4": {netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("224.0.0.1"),
		netip.MustParseAddr("239.1.2.3"), netip.MustParseAddr("255.255.255.255")},
	"ipv6": {netip.MustParseAddr("::"), netip.MustParseAddr("::1"), netip.MustParseAddr("ff02::1"),
		netip.MustParseAddr("ff0e::1234")},
}

// arp is ARP for IPv4 over Ethernet in its frame, by its fields (RFC 826).
type arp struct {
	ethSource, ethDestination     [6]byte
	tags                          []tag
	hardware, network             uint16
	hardwareLength, networkLength uint8
	operation                     uint16
	senderMAC, targetMAC          [6]byte
	sender, target                netip.Addr
	padding                       []byte
}

// whoHas asks for an address as Linux does.
func whoHas(target netip.Addr) arp {
	return arp{
		ethSource: routerMAC, ethDestination: broadcast, hardware: 1, network: uint16(layers.EthernetTypeIPv4),
		hardwareLength: 6, networkLength: 4, operation: 1, senderMAC: routerMAC, sender: netip.MustParseAddr("192.0.2.1"),
		target: target, padding: make([]byte, 18),
	}
}

func (a arp) bytes() []byte {
	frame := link(a.ethSource, a.ethDestination, a.tags, layers.EthernetTypeARP)
	frame = binary.BigEndian.AppendUint16(frame, a.hardware)
	frame = binary.BigEndian.AppendUint16(frame, a.network)
	frame = append(frame, a.hardwareLength, a.networkLength)
	frame = binary.BigEndian.AppendUint16(frame, a.operation)
	return slices.Concat(frame, a.senderMAC[:], a.sender.AsSlice(), a.targetMAC[:], a.target.AsSlice(), a.padding)
}

// answer is who has the address: to whom the question says it comes from, in a frame as long as its own.
func (a arp) answer(mac [6]byte) arp {
	a.ethDestination, a.ethSource, a.operation = a.senderMAC, mac, 2
	a.targetMAC, a.target, a.senderMAC, a.sender = a.senderMAC, a.sender, mac, a.target
	return a
}

// newOwn is a scene whose service's and source address are XDP's own.
func newOwn(t *testing.T, f family) *managed {
	t.Helper()
	s := newManaged(t, f, fullnat, plan{sources: 2, twoArms: true})
	s.must(s.manager.SetOwn([]netip.Addr{f.service.Addr(), f.source}))
	return s
}

// Who asks for an address of XDP's own is answered with the MAC of the device that the question came by; whoever probes
// whether it is free is told as well (RFC 5227, section 2.4).
func TestARP(t *testing.T) {
	t.Parallel()
	f := families[0]
	s := newOwn(t, f)
	edits := []struct {
		name string
		edit func(*arp)
	}{
		{"broadcast", func(*arp) {}},
		{"unicast", func(a *arp) { a.ethDestination = edgeMAC }},
		{"its target's MAC all ones", func(a *arp) { a.targetMAC = broadcast }},
		{"its target's MAC known", func(a *arp) { a.ethDestination, a.targetMAC = edgeMAC, edgeMAC }},
		{"not padded", func(a *arp) { a.padding = nil }},
		{"padded with rubbish", func(a *arp) { a.padding = []byte("\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8 and some more of it") }},
		{"probe", func(a *arp) { a.sender = netip.IPv4Unspecified() }},
		{"a tag", func(a *arp) { a.tags = []tag{{0x8100, 0xa005}} }},
		{"two tags", func(a *arp) { a.tags = []tag{{0x88a8, 100}, {0x8100, 5}} }},
		{"a priority", func(a *arp) { a.tags = []tag{{0x8100, 0xe000}} }},
		{"from another MAC than the frame's", func(a *arp) { a.senderMAC = mac("02:00:00:00:00:77") }},
	}
	for _, e := range edits {
		t.Run(e.name, func(t *testing.T) {
			s.in(t)
			for _, target := range []netip.Addr{f.service.Addr(), f.source} {
				ask := whoHas(target)
				e.edit(&ask)
				s.deliver(ask.bytes(), theKernel.front, expectation{verdict: arpAnswered, frame: ask.answer(edgeMAC).bytes()})
				s.deliver(ask.bytes(), theKernel.back, expectation{verdict: arpAnswered, frame: ask.answer(backMAC).bytes()})
			}
		})
	}
}

// All other ARP is the host's.
func TestARPNotOurs(t *testing.T) {
	t.Parallel()
	f := families[0]
	s := newOwn(t, f)
	edits := []struct {
		name string
		edit func(*arp)
	}{
		{"for another address", func(a *arp) { a.target = plus(a.target, 1) }},
		{"for a source address that the host holds", func(a *arp) { a.target = plus(f.source, 1) }},
		{"for a backend", func(a *arp) { a.target = f.backend }},
		{"from our address", func(a *arp) { a.target, a.sender = a.sender, a.target }},
		{"announcement", func(a *arp) { a.sender = a.target }},
		{"announcement as a reply", func(a *arp) { a.sender, a.operation = a.target, 2 }},
		{"reply", func(a *arp) { a.operation = 2 }},
		{"operation 0", func(a *arp) { a.operation = 0 }},
		{"reverse request", func(a *arp) { a.operation = 3 }},
		{"operation 256", func(a *arp) { a.operation = 256 }},
		{"hardware other than Ethernet", func(a *arp) { a.hardware = 6 }},
		{"hardware 256", func(a *arp) { a.hardware = 256 }},
		{"protocol other than IPv4", func(a *arp) { a.network = uint16(layers.EthernetTypeIPv6) }},
		{"hardware addresses of 8 bytes", func(a *arp) { a.hardwareLength = 8 }},
		{"hardware addresses of 0 bytes", func(a *arp) { a.hardwareLength = 0 }},
		{"protocol addresses of 16 bytes", func(a *arp) { a.networkLength = 16 }},
		{"from a group's MAC", func(a *arp) { a.senderMAC = mac("01:00:5e:00:00:01") }},
		{"in a frame from a group's MAC", func(a *arp) { a.ethSource = broadcast }},
		{"three tags", func(a *arp) { a.tags = []tag{{0x88a8, 100}, {0x8100, 5}, {0x8100, 6}} }},
	}
	for _, e := range edits {
		t.Run(e.name, func(t *testing.T) {
			s.in(t)
			ask := whoHas(f.service.Addr())
			e.edit(&ask)
			s.pass(ask.bytes(), passNotOurs)
		})
	}
	s.in(t)
	for _, tags := range [][]tag{nil, {{0x8100, 5}}, {{0x88a8, 100}, {0x8100, 5}}} {
		ask := whoHas(f.service.Addr())
		ask.tags, ask.padding = tags, nil
		frame := ask.bytes()
		for n := ethernetHeader; n < len(frame); n++ {
			s.pass(frame[:n], passNotOurs)
		}
	}
	ask := whoHas(f.service.Addr())
	answered := func() {
		t.Helper()
		s.deliver(ask.bytes(), theKernel.front, expectation{verdict: arpAnswered, frame: ask.answer(edgeMAC).bytes()})
	}
	answered()
	s.must(s.manager.SetDevices(bothDevices()[1:])) // the one towards the clients is not known any more
	s.pass(ask.bytes(), passNotOurs)
	s.must(s.manager.SetDevices(bothDevices()))
	answered()
	s.must(s.manager.SetOwn(nil)) // the host holds the address
	s.pass(ask.bytes(), passNotOurs)
}

// solicitedNode is the group that listens to solicitations for an address (RFC 4291, section 2.7.1), and its MAC.
func solicitedNode(address netip.Addr) (group netip.Addr, mac [6]byte) {
	a := address.As16()
	bytes := [16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: a[13], 14: a[14], 15: a[15]}
	return netip.AddrFrom16(bytes), [6]byte{0x33, 0x33, 0xff, a[13], a[14], a[15]}
}

var (
	asker    = netip.MustParseAddr("fe80::fe")
	allNodes = netip.MustParseAddr("ff02::1")
	// An option that says the sender's MAC, and one with a number that comes back to nobody (RFC 3971, section 5.3.2).
	senderMACOption = append([]byte{1, 1}, routerMAC[:]...)
	nonceOption     = []byte{14, 1, 1, 2, 3, 4, 5, 6}
)

// solicitation asks for an address's MAC (RFC 4861, section 4.3).
func solicitation(target netip.Addr) message {
	group, groupMAC := solicitedNode(target)
	return message{
		ethSource: routerMAC, ethDestination: groupMAC, source: asker, destination: group, ttl: 255,
		kind: solicitation6, body: slices.Concat(target.AsSlice(), senderMACOption),
	}
}

// probe asks whether anyone has an address (RFC 4862, section 5.4.2).
func probe(target netip.Addr) message {
	m := solicitation(target)
	m.source, m.body = netip.IPv6Unspecified(), target.AsSlice()
	return m
}

// advertisement is the answer to a solicitation (RFC 4861, sections 4.4 and 7.2.4).
func (m message) advertisement(mac [6]byte) message {
	target, _ := netip.AddrFromSlice(m.body[:16])
	answer := message{
		ethSource: mac, ethDestination: m.ethSource, tags: m.tags, source: target, destination: m.source, ttl: 255,
		kind: advertisement6, rest: 0x60000000, body: slices.Concat(target.AsSlice(), []byte{2, 1}, mac[:]),
	}
	if m.source.IsUnspecified() {
		answer.ethDestination, answer.destination, answer.rest = [6]byte{0x33, 0x33, 0, 0, 0, 1}, allNodes, 0x20000000
	}
	return answer
}

// Who solicits an address of XDP's own is answered with the MAC of the device that the question came by.
func TestNDP(t *testing.T) {
	t.Parallel()
	f := families[1]
	s := newOwn(t, f)
	option := func(options ...[]byte) func(*message) {
		return func(m *message) { m.body = slices.Concat(m.body[:16], slices.Concat(options...)) }
	}
	questions := []struct {
		name string
		ask  func(netip.Addr) message
		edit func(*message)
	}{
		{"to the group", solicitation, func(*message) {}},
		{"to the address", solicitation, func(m *message) {
			m.ethDestination = edgeMAC
			m.destination, _ = netip.AddrFromSlice(m.body[:16])
		}},
		{"from a global address", solicitation, func(m *message) { m.source = netip.MustParseAddr("2001:db8:c::1") }},
		{"no option", solicitation, option()},
		{"another option", solicitation, option(nonceOption)},
		{"two options", solicitation, option(senderMACOption, nonceOption)},
		{"many options", solicitation, option(nonceOption, senderMACOption, nonceOption, nonceOption, nonceOption)},
		{"traffic class and flow label", solicitation, func(m *message) { m.tos, m.flowLabel = 0xe0, 0xabcde }},
		{"reserved bits", solicitation, func(m *message) { m.rest = 0xffffffff }},
		{"padded", solicitation, func(m *message) { m.padding = []byte("\xff\xfe\xfd") }},
		{"no option, padded", solicitation, func(m *message) {
			m.body, m.padding = m.body[:16], []byte("\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8\xf7")
		}},
		{"a tag", solicitation, func(m *message) { m.tags = []tag{{0x8100, 0xa005}} }},
		{"two tags", solicitation, func(m *message) { m.tags = []tag{{0x88a8, 100}, {0x8100, 5}} }},
		{"two tags, no option", solicitation, func(m *message) {
			m.tags, m.body = []tag{{0x88a8, 100}, {0x8100, 5}}, m.body[:16]
		}},
		{"probe", probe, func(*message) {}},
		{"probe with a nonce", probe, option(nonceOption)}, // RFC 7527
		{"probe with a tag", probe, func(m *message) { m.tags = []tag{{0x8100, 5}} }},
	}
	for _, q := range questions {
		t.Run(q.name, func(t *testing.T) {
			s.in(t)
			for _, target := range []netip.Addr{f.service.Addr(), f.source} {
				ask := q.ask(target)
				q.edit(&ask)
				s.deliver(ask.bytes(), theKernel.front,
					expectation{verdict: ndpAnswered, frame: ask.advertisement(edgeMAC).bytes()})
				s.deliver(ask.bytes(), theKernel.back,
					expectation{verdict: ndpAnswered, frame: ask.advertisement(backMAC).bytes()})
			}
		})
	}
}

// All other solicitations are the host's.
func TestNDPNotOurs(t *testing.T) {
	t.Parallel()
	f := families[1]
	s := newOwn(t, f)
	edits := []struct {
		name string
		edit func(*message)
		v    verdict
	}{
		{"for another address", func(m *message) { m.body[15]++ }, passICMP},
		{"for a source address that the host holds", func(m *message) { copy(m.body, plus(f.source, 1).AsSlice()) }, passICMP},
		{"hop limit 254", func(m *message) { m.ttl = 254 }, passICMP},
		{"hop limit 0", func(m *message) { m.ttl = 0 }, passICMP},
		{"code 1", func(m *message) { m.code = 1 }, passICMP},
		{"advertisement", func(m *message) { m.kind = advertisement6 }, passICMP},
		{"router solicitation", func(m *message) { m.kind = 133 }, passICMP},
		{"behind another header", func(m *message) { m.extensions = []extension{destination} }, passICMP},
		{"in a fragment called whole", func(m *message) { m.extensions = []extension{atomic} }, passICMP}, // RFC 6980
		{"first fragment", func(m *message) { m.extensions = []extension{firstFragment} }, passICMP},
		{"later fragment", func(m *message) { m.extensions = []extension{laterFragment} }, passFragment},
		{"target cut off", func(m *message) { m.body = m.body[:15] }, passICMP},
		{"no target", func(m *message) { m.body = nil }, passICMP},
		{"three tags", func(m *message) { m.tags = []tag{{0x88a8, 100}, {0x8100, 5}, {0x8100, 6}} }, passNotOurs},
	}
	for _, e := range edits {
		t.Run(e.name, func(t *testing.T) {
			s.in(t)
			ask := solicitation(f.service.Addr())
			e.edit(&ask)
			s.pass(ask.bytes(), e.v)
		})
	}
	s.in(t)
	ask := solicitation(f.service.Addr())
	answered := func() {
		t.Helper()
		s.deliver(ask.bytes(), theKernel.front, expectation{verdict: ndpAnswered, frame: ask.advertisement(edgeMAC).bytes()})
	}
	answered()
	s.must(s.manager.SetDevices(bothDevices()[1:]))
	s.pass(ask.bytes(), passICMP)
	s.must(s.manager.SetDevices(bothDevices()))
	answered()
	s.must(s.manager.SetOwn(nil))
	s.pass(ask.bytes(), passICMP)
}

// What RFC 4861, section 7.1.1, has every node discard is not answered either.
func TestNDPInvalid(t *testing.T) {
	t.Parallel()
	f := families[1]
	s := newOwn(t, f)
	wrong := func(at int) func([]byte) { return func(frame []byte) { frame[at] ^= 0x10 } }
	for _, test := range []struct {
		name string
		ask  message
		edit func(*message)
		then func([]byte)
	}{
		{"wrong checksum", solicitation(f.service.Addr()), nil, wrong(ethernetHeader + 43)},
		{"another MAC than its checksum says", solicitation(f.service.Addr()), nil, wrong(ethernetHeader + 40 + 31)},
		{"wrong checksum of a probe", probe(f.service.Addr()), nil, wrong(ethernetHeader + 43)},
		{"option of length 0", solicitation(f.service.Addr()), func(m *message) { m.body[17] = 0 }, nil},
		{"second option of length 0", solicitation(f.service.Addr()),
			func(m *message) { m.body = slices.Concat(m.body, []byte{14, 0, 0, 0, 0, 0, 0, 0}) }, nil},
		{"probe to the address itself", probe(f.service.Addr()),
			func(m *message) { m.ethDestination, m.destination = edgeMAC, f.service.Addr() }, nil},
		{"from a group", solicitation(f.service.Addr()), func(m *message) { m.source = allNodes }, nil},
		{"from a group's MAC", solicitation(f.service.Addr()), func(m *message) { m.ethSource = broadcast }, nil},
		{"an option cut off", solicitation(f.service.Addr()), func(m *message) { m.body = m.body[:20] }, nil},
		{"probe that tells a MAC", probe(f.service.Addr()),
			func(m *message) { m.body = slices.Concat(m.body, senderMACOption) }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			s.in(t)
			ask := test.ask
			ask.body = bytes.Clone(ask.body)
			if test.edit != nil {
				test.edit(&ask)
			}
			frame := ask.bytes()
			if test.then != nil {
				test.then(frame)
			}
			s.pass(frame, passICMP)
		})
	}
}

// Cut short anywhere, or with a length that is not the frame's, a solicitation is not answered.
func TestNDPTruncated(t *testing.T) {
	t.Parallel()
	f := families[1]
	s := newOwn(t, f)
	for _, ask := range []message{solicitation(f.service.Addr()), probe(f.service.Addr())} {
		for _, tags := range [][]tag{nil, {{0x8100, 5}}, {{0x88a8, 100}, {0x8100, 5}}} {
			name := fmt.Sprintf("from %v, %d tags", ask.source, len(tags))
			t.Run(name, func(t *testing.T) {
				s.in(t)
				ask := ask
				ask.tags = tags
				frame := ask.bytes()
				for n := ethernetHeader; n < len(frame); n++ {
					if n < ethernetHeader+4*len(tags)+40 {
						s.pass(frame[:n], passNotOurs)
					} else {
						s.pass(frame[:n], passICMP)
					}
				}
			})
			t.Run(name+", lengths", func(t *testing.T) {
				s.in(t)
				ask := ask
				ask.tags = tags
				frame := ask.bytes()
				at := ethernetHeader + 4*len(tags) + 4
				whole := binary.BigEndian.Uint16(frame[at:])
				for _, length := range []uint16{0, 7, 8, 23, whole + 1, whole + 8, 65535} {
					binary.BigEndian.PutUint16(frame[at:], length)
					s.pass(frame, passICMP)
				}
			})
		}
	}
}

// ping is an echo request.
func ping(f family, target netip.Addr, body string) message {
	m := message{
		ethSource: routerMAC, ethDestination: edgeMAC, source: f.client, destination: target, ttl: 61, tos: 0x10,
		flowLabel: 0xabcde, id: 0x4711, df: true, kind: echoRequest4, rest: 0x12345678, body: []byte(body),
	}
	if f.name == "ipv6" {
		m.kind = echoRequest6
	}
	return m
}

// pong is its answer: the same in all but its ends, its time to live and its type.
func (m message) pong() message {
	m.ethSource, m.ethDestination = m.ethDestination, m.ethSource
	m.source, m.destination, m.ttl, m.kind = m.destination, m.source, 64, echoReply4
	if m.source.Is6() {
		m.kind = echoReply6
	}
	return m
}

// A ping to an address of XDP's own is answered.
func TestEcho(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newOwn(t, f)
		record := layers.IPv4Option{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}
		edits := []struct {
			name, family string
			edit         func(*message)
		}{
			{"as it is", "", func(*message) {}},
			{"empty", "", func(m *message) { m.body = nil }},
			{"a byte", "", func(m *message) { m.body = []byte{0xff} }},
			{"odd", "", func(m *message) { m.body = []byte("odd") }},
			{"all zeros", "", func(m *message) { m.rest, m.body = 0, make([]byte, 8) }},
			{"all ones", "", func(m *message) { m.rest, m.body = 0xffffffff, bytes.Repeat([]byte{0xff}, 9) }},
			{"large", "", func(m *message) { m.body = bytes.Repeat([]byte("Fairlead"), 180) }},
			{"larger than a page", "", func(m *message) { m.body = bytes.Repeat([]byte("Fairlead"), 1000) }},
			{"a last hop", "", func(m *message) { m.ttl = 1 }},
			{"all hops", "", func(m *message) { m.ttl = 255 }},
			{"as many hops as the answer", "", func(m *message) { m.ttl = 64 }},
			{"no numbers", "", func(m *message) { m.tos, m.flowLabel, m.id = 0, 0, 0 }},
			{"padded", "", func(m *message) { m.padding = []byte("\xff\xfe\xfd") }},
			{"a tag", "", func(m *message) { m.tags = []tag{{0x8100, 0xa005}} }},
			{"two tags", "", func(m *message) { m.tags = []tag{{0x88a8, 100}, {0x8100, 5}} }},
			{"may be fragmented", "ipv4", func(m *message) { m.df = false }},
			{"options", "ipv4", func(m *message) { m.ipOptions = []layers.IPv4Option{{OptionType: 1}, record} }},
			{"hop-by-hop", "ipv6", func(m *message) { m.extensions = []extension{hopByHop} }},
			{"three headers", "ipv6", func(m *message) { m.extensions = []extension{hopByHop, destination, atomic} }},
		}
		for _, e := range edits {
			if e.family != "" && e.family != f.name {
				continue
			}
			t.Run(e.name, func(t *testing.T) {
				s.in(t)
				for _, target := range []netip.Addr{f.service.Addr(), f.source} {
					ask := ping(f, target, "are you there?")
					e.edit(&ask)
					for _, from := range []device{theKernel.front, theKernel.back} {
						s.deliver(ask.bytes(), from, expectation{verdict: echoAnswered, frame: ask.pong().bytes()})
					}
				}
			})
		}
		// What was damaged on its way comes back as damaged: whoever asked will see it.
		s.in(t)
		for _, wrong := range []uint16{0x0001, 0x8000, 0x1234} {
			ask := ping(f, f.service.Addr(), "are you there?")
			s.sendWrong(ask, ask.pong(), theKernel.front, wrong, expectation{verdict: echoAnswered})
		}
	})
}

// All other echoes are the host's.
func TestEchoNotOurs(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newOwn(t, f)
		edits := []struct {
			name, family string
			edit         func(*message)
			v            verdict
		}{
			{"to another address", "", func(m *message) { m.destination = plus(m.destination, 1) }, passICMP},
			{"to a source address that the host holds", "", func(m *message) { m.destination = plus(f.source, 1) }, passICMP},
			{"code 1", "", func(m *message) { m.code = 1 }, passICMP},
			{"code 255", "", func(m *message) { m.code = 255 }, passICMP},
			{"answer", "", func(m *message) { m.kind = m.pong().kind }, passICMP},
			{"first fragment", "", func(m *message) {
				m.df, m.mf, m.extensions = false, true, []extension{firstFragment}
			}, passICMP},
			{"later fragment", "", func(m *message) {
				m.df, m.offset, m.extensions = false, 185, []extension{laterFragment}
			}, laterDropped},
			{"three tags", "", func(m *message) { m.tags = []tag{{0x88a8, 100}, {0x8100, 5}, {0x8100, 6}} }, passNotOurs},
			{"the other family's type", "", func(m *message) { m.kind = m.kind ^ echoRequest4 ^ echoRequest6 }, passICMP},
			{"sealed", "ipv6", func(m *message) { m.extensions = []extension{authenticated} }, passNotOurs},
			{"not at its last stop", "ipv6", func(m *message) { m.extensions = []extension{routingOn} }, passNotOurs},
		}
		for _, e := range edits {
			if e.family != "" && e.family != f.name {
				continue
			}
			t.Run(e.name, func(t *testing.T) {
				s.in(t)
				ask := ping(f, f.service.Addr(), "are you there?")
				e.edit(&ask)
				s.pass(ask.bytes(), e.v)
			})
		}
		s.in(t)
		ask := ping(f, f.service.Addr(), "are you there?")
		s.deliver(ask.bytes(), theKernel.front, expectation{verdict: echoAnswered, frame: ask.pong().bytes()})
		s.must(s.manager.SetOwn([]netip.Addr{f.source}))
		s.pass(ask.bytes(), passICMP)
	})
}

// An echo request behind more than the program can reach is the host's, whatever stands in front of it.
func TestEchoFarAway(t *testing.T) {
	t.Parallel()
	f := families[1]
	s := newOwn(t, f)
	for _, length := range []int{55, 56, 57, 74, 100, 150} {
		t.Run(fmt.Sprintf("%d bytes", 8+8*length), func(t *testing.T) {
			s.in(t)
			header := extension{unix.IPPROTO_DSTOPTS, append([]byte{byte(length), 1, 0}, make([]byte, 8*length+4)...)}
			for i := 3; i+1 < len(header.rest); i += 2 {
				header.rest[i] = echoRequest6 // and code 0
			}
			for shift := range 2 {
				ask := ping(f, f.service.Addr(), "are you there?")
				ask.extensions = []extension{{header.number, slices.Concat(header.rest[:3], make([]byte, shift),
					header.rest[3:len(header.rest)-shift])}}
				frame := ask.bytes()
				action, out := s.run(s.Fairlead, frame, theKernel.front)
				want := expectation{verdict: passICMP, frame: frame}
				if action == xdpTX { // within its reach
					want = expectation{verdict: echoAnswered, frame: ask.pong().bytes()}
				}
				s.check(frame, theKernel.front, action, out, want)
			}
		})
	}
}

// Cut short anywhere, or with a length that is not the frame's, a ping is not answered.
func TestEchoTruncated(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newOwn(t, f)
		record := layers.IPv4Option{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}
		for name, edit := range map[string]func(*message){
			"bare":     func(*message) {},
			"two tags": func(m *message) { m.tags = []tag{{0x88a8, 100}, {0x8100, 5}} },
			"more headers": func(m *message) {
				m.ipOptions, m.extensions = []layers.IPv4Option{record}, []extension{hopByHop}
			},
		} {
			ask := ping(f, f.service.Addr(), "are you there?")
			edit(&ask)
			known := ask.icmpOffset()
			if f.name == "ipv4" {
				known = ethernetHeader + 4*len(ask.tags) + 20
			} else if len(ask.extensions) > 0 {
				known -= len(hopByHop.rest) + 1 - 4
			}
			t.Run(name, func(t *testing.T) {
				s.in(t)
				frame := ask.bytes()
				for n := ethernetHeader; n < len(frame); n++ {
					if n < known {
						s.pass(frame[:n], passNotOurs)
					} else {
						s.pass(frame[:n], passICMP)
					}
				}
			})
			t.Run(name+", lengths", func(t *testing.T) {
				s.in(t)
				frame := ask.bytes()
				at := ethernetHeader + 4*len(ask.tags) + 2
				if f.name == "ipv6" {
					at += 2
				}
				whole := int(binary.BigEndian.Uint16(frame[at:]))
				// Up to the end of its eight bytes, and past the frame.
				for length := range whole - len(ask.body) {
					binary.BigEndian.PutUint16(frame[at:], uint16(length))
					s.pass(frame, passICMP)
				}
				for _, length := range []int{whole + 1, whole + 1000, 65535} {
					binary.BigEndian.PutUint16(frame[at:], uint16(length))
					s.pass(frame, passICMP)
				}
			})
		}
	})
}

// Nobody is answered who can't have asked: no host's address is none, a group's or all of them (RFC 1122, section 3.2.1.3;
// RFC 4443, section 4.2). Nor is what came to a group's MAC: an answer would come from there (RFC 1122, section 3.3.6).
func TestEchoFromNobody(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newOwn(t, f)
		groups := []string{"ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"}
		if f.name == "ipv6" {
			groups = []string{"ff:ff:ff:ff:ff:ff", "33:33:ff:00:00:10"}
		}
		for _, source := range nobodies[f.name] {
			t.Run("from "+source.String(), func(t *testing.T) {
				s.in(t)
				ask := ping(f, f.service.Addr(), "are you there?")
				ask.source = source
				s.pass(ask.bytes(), passICMP)
			})
		}
		for _, group := range groups {
			t.Run("to and from "+group, func(t *testing.T) {
				s.in(t)
				ask := ping(f, f.service.Addr(), "are you there?")
				ask.ethDestination = mac(group)
				s.pass(ask.bytes(), passICMP)
				ask.ethSource, ask.ethDestination = ask.ethDestination, edgeMAC
				s.pass(ask.bytes(), passICMP)
			})
		}
	})
}
