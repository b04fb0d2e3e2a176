package packet

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"fairlead/bpf"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// IPv6 extension headers, by their bytes from the second on (RFC 8200, section 4).
var (
	hopByHop = extension{unix.IPPROTO_HOPOPTS, []byte{0, 1, 4, 0, 0, 0, 0}} // PadN
	// An option for experiments (RFC 4727, section 3.4), and PadN.
	destination = extension{unix.IPPROTO_DSTOPTS, []byte{1, 0x1e, 4, 1, 2, 3, 4, 1, 6, 0, 0, 0, 0, 0, 0}}
	// At its last stop, and one stop before.
	routing   = extension{unix.IPPROTO_ROUTING, []byte{0, 253, 0, 0, 0, 0, 0}}
	routingOn = extension{unix.IPPROTO_ROUTING, append([]byte{2, 4, 1}, make([]byte, 20)...)}
	// A whole packet (RFC 6946); a fragment with more to come; one at 1440, the last.
	atomic        = extension{unix.IPPROTO_FRAGMENT, []byte{0, 0, 0, 0xca, 0xfe, 0xba, 0xbe}}
	firstFragment = extension{unix.IPPROTO_FRAGMENT, []byte{0, 0, 1, 0xca, 0xfe, 0xba, 0xbe}}
	laterFragment = extension{unix.IPPROTO_FRAGMENT, []byte{0, 5, 0xa0, 0xca, 0xfe, 0xba, 0xbe}}
	authenticated = extension{unix.IPPROTO_AH, append([]byte{4}, make([]byte, 22)...)} // RFC 4302
)

const ethernetHeader = 14

// variant is a way in which headers differ that makes no difference to a connection.
type variant struct {
	name string
	make func(*segment)
}

func variants(f family) []variant {
	all := []variant{
		{"bare", func(s *segment) { s.options = nil }},
		{"padded with zeros", func(s *segment) { s.options, s.padding = nil, make([]byte, 6) }},
		{"padded with rubbish", func(s *segment) { s.options, s.padding = nil, []byte("\xff\xfe\xfd\xfc\xfb\xfa\xf9") }},
		{"odd payload", func(s *segment) { s.payload = []byte("abc") }},
		{"full frame", func(s *segment) { s.payload = []byte(strings.Repeat("Fairlead", 175)) }},
		{"big frame", func(s *segment) { s.payload = []byte(strings.Repeat("Fairlead", 400)) }},
		{"all options", func(s *segment) {
			for range 28 {
				s.options = append(s.options, layers.TCPOption{OptionType: layers.TCPOptionKindNop})
			}
		}},
		{"urgent", func(s *segment) { s.flags, s.urgent = s.flags|urg, 1 }},
		{"congestion experienced", func(s *segment) { s.tos, s.flags = 0x03, s.flags|ece|cwr }},
		{"no numbers", func(s *segment) { s.tos, s.id, s.flowLabel, s.window = 0, 0, 0, 0 }},
		{"all numbers", func(s *segment) { s.tos, s.id, s.flowLabel, s.window, s.ttl = 0xff, 0xffff, 0xfffff, 0xffff, 255 }},
		{"last hop but one", func(s *segment) { s.ttl = 2 }},
	}
	if f.name == "ipv4" {
		record := layers.IPv4Option{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}} // record route
		nop := layers.IPv4Option{OptionType: 1}
		long := layers.IPv4Option{OptionType: 0x5e, OptionLength: 40, OptionData: make([]byte, 38)}
		return append(all,
			variant{"may be fragmented", func(s *segment) { s.df = false }},
			variant{"IPv4 options", func(s *segment) { s.ipOptions = []layers.IPv4Option{nop, record} }},
			variant{"all IPv4 options", func(s *segment) { s.ipOptions = []layers.IPv4Option{long} }},
		)
	}
	for name, extensions := range map[string][]extension{
		"hop-by-hop":          {hopByHop},
		"destination options": {destination},
		"routing at its end":  {routing},
		"atomic fragment":     {atomic},
		"four headers":        {hopByHop, destination, routing, atomic},
		"six headers":         {hopByHop, destination, routing, atomic, destination, destination},
		"a very long header":  {{unix.IPPROTO_DSTOPTS, append([]byte{100, 1, 0}, make([]byte, 804)...)}},
		"two very long": {
			{unix.IPPROTO_DSTOPTS, append([]byte{150, 1, 0}, make([]byte, 1204)...)},
			{unix.IPPROTO_DSTOPTS, append([]byte{150, 1, 0}, make([]byte, 1204)...)}},
	} {
		all = append(all, variant{name, func(s *segment) { s.extensions = extensions }})
	}
	return all
}

// Headers in all their shapes are forwarded there and back, whole and with right checksums.
func TestVariants(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		for _, v := range variants(f) {
			t.Run(v.name, func(t *testing.T) {
				s.in(t)
				c := s.newClient()
				opening := c.segment(syn, "")
				if v.name == "big frame" || v.name == "full frame" {
					opening.payload = nil
				} else {
					v.make(&opening)
				}
				c.seq = opening.end()
				c.send(opening, forwardNew)
				c.finishOpening()
				s.rebuildExceptions()
				data := c.segment(ack, "")
				v.make(&data)
				c.seq = data.end()
				c.send(data, c.settledVerdict())
				if rewrites(method) {
					data := c.answer(ack, "")
					v.make(&data)
					c.ack = data.end()
					c.reply(data, replyTable)
				}
			})
		}
	})
}

// Checksums are mended, never repaired: what was wrong stays exactly as wrong, and sums at their edges come out right.
func TestChecksums(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		random := rand.New(rand.NewPCG(1, 2))
		for range 500 {
			data := c.segment(ack, "")
			data.payload = make([]byte, random.IntN(64))
			for i := range data.payload {
				data.payload[i] = byte(random.Uint32())
			}
			data.id, data.tos, data.ttl = uint16(random.Uint32()), uint8(random.Uint32()), uint8(2+random.IntN(254))
			data.acknowledgement, data.window = random.Uint32(), uint16(random.Uint32())
			c.send(data, forwardTable)
		}
		// A payload makes the checksum zero, before or after.
		b := s.backends[0]
		for _, after := range []bool{false, true} {
			data := c.segment(ack, "\x00\x00")
			at := data.transportOffset() + 16
			shape := data
			if after {
				shape = data.between(c.source, b.address)
			}
			copy(data.payload, shape.bytes()[at:at+2])
			shape.payload = data.payload
			if sum := binary.BigEndian.Uint16(shape.bytes()[at:]); sum != 0 {
				t.Fatalf("checksum %#x, want 0", sum)
			}
			c.send(data, forwardTable)
		}
		for _, wrong := range []uint16{0x0001, 0x8000, 0x1234, 0xfffe} {
			data := c.segment(ack, "what")
			frame := data.bytes()
			at := data.transportOffset() + 16
			binary.BigEndian.PutUint16(frame[at:], binary.BigEndian.Uint16(frame[at:])^wrong)
			action, out := s.run(s.Fairlead, frame, theKernel.front)
			s.check(frame, theKernel.front, action, out,
				expectation{verdict: forwardTable, frame: out, service: 1, backend: 1, to: theKernel.front.index})
			sent := data.between(c.source, b.address)
			if before, after := data.residual(frame), sent.residual(out); before != after || before == 0 {
				t.Errorf("checksum wrong by %#x came out wrong by %#x", before, after)
			}
		}
	})
}

// A frame that was cut short anywhere is never forwarded: without ports it isn't known as ours, and with them it is
// counted as truncated.
func TestTruncated(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open()
		s.rebuildExceptions()
		cut := func(whole segment) func(frame []byte) verdict {
			return func(frame []byte) verdict {
				if len(frame) < whole.transportOffset()+4 {
					return passNotOurs
				}
				return dropTruncated
			}
		}
		for _, v := range variants(f) {
			if strings.Contains(v.name, "very long") || strings.Contains(v.name, "frame") {
				continue
			}
			data := c.segment(ack, "payload")
			v.make(&data)
			data.padding = nil
			c.seq = data.end()
			frame, expected := data.bytes(), cut(data)
			for n := ethernetHeader; n < len(frame); n++ {
				c.sendRaw(data, frame[:n], expected(frame[:n]))
			}
			c.send(data, c.settledVerdict())
			if !rewrites(method) {
				continue
			}
			data = c.answer(ack, "payload")
			v.make(&data)
			data.padding = nil
			c.ack = data.end()
			frame, expected = data.bytes(), cut(data)
			for n := ethernetHeader; n < len(frame); n++ {
				c.replyRaw(data, frame[:n], expected(frame[:n]))
			}
			c.reply(data, replyTable)
		}
		if !rewrites(method) {
			return
		}
		// To a port of ours that no connection has: the host's stack may tell what it thinks of it.
		unknown := s.newClient()
		unknown.backend = 1
		if method == fullnat {
			unknown.source = netip.AddrPortFrom(s.sources[0].address, s.sources[0].last)
			if unknown.source == c.source {
				unknown.source = netip.AddrPortFrom(s.sources[0].address, s.sources[0].first)
			}
		}
		data := unknown.answer(ack, "payload")
		frame, expected := data.bytes(), cut(data)
		for n := ethernetHeader; n < len(frame); n++ {
			want := expected(frame[:n])
			if want == dropTruncated {
				want = passReplyUnknown
			}
			unknown.replyRaw(data, frame[:n], want)
		}
	})
}

// Lengths that contradict each other, and headers that aren't what they seem.
func TestBadLengths(t *testing.T) {
	const ip, tcp4, tcp6 = ethernetHeader, ethernetHeader + 20, ethernetHeader + 40
	put := binary.BigEndian.PutUint16
	type edit struct {
		name    string
		family  string
		edit    func([]byte)
		verdict verdict
	}
	edits := []edit{
		{"total length 0", "ipv4", func(b []byte) { put(b[ip+2:], 0) }, dropBadHeader},
		{"total length less than the IP header", "ipv4", func(b []byte) { put(b[ip+2:], 19) }, dropBadHeader},
		{"total length that ends in the TCP header", "ipv4", func(b []byte) { put(b[ip+2:], 39) }, dropBadHeader},
		{"total length that ends in the TCP options", "ipv4", func(b []byte) { put(b[ip+2:], 51) }, dropBadHeader},
		{"total length past the frame", "ipv4", func(b []byte) { put(b[ip+2:], uint16(len(b)-ip+1)) }, dropTruncated},
		{"total length 65535", "ipv4", func(b []byte) { put(b[ip+2:], 65535) }, dropTruncated},
		{"IPv4 header of 16 bytes", "ipv4", func(b []byte) { b[ip] = 0x44 }, passNotOurs},
		{"IPv4 header of 60 bytes, past the ports", "ipv4", func(b []byte) { b[ip] = 0x4f }, passNotOurs},
		{"version 6 in IPv4's place", "ipv4", func(b []byte) { b[ip] = 0x65 }, passNotOurs},
		{"TCP header of 0 bytes", "ipv4", func(b []byte) { b[tcp4+12] = 0 }, dropBadHeader},
		{"TCP header of 16 bytes", "ipv4", func(b []byte) { b[tcp4+12] = 0x40 }, dropBadHeader},
		{"TCP header past the packet", "ipv4", func(b []byte) { b[tcp4+12] = 0xf0 }, dropBadHeader},
		{"payload length 0", "ipv6", func(b []byte) { put(b[ip+4:], 0) }, dropBadHeader},
		{"payload length that ends in the TCP header", "ipv6", func(b []byte) { put(b[ip+4:], 19) }, dropBadHeader},
		{"payload length past the frame", "ipv6", func(b []byte) { put(b[ip+4:], uint16(len(b)-tcp6+1)) }, dropTruncated},
		{"payload length 65535", "ipv6", func(b []byte) { put(b[ip+4:], 65535) }, dropTruncated},
		{"version 4 in IPv6's place", "ipv6", func(b []byte) { b[ip] = 0x45 }, passNotOurs},
		{"TCP header of 16 bytes", "ipv6", func(b []byte) { b[tcp6+12] = 0x40 }, dropBadHeader},
		{"TCP header past the packet", "ipv6", func(b []byte) { b[tcp6+12] = 0xf0 }, dropBadHeader},
	}
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open()
		for _, e := range edits {
			if e.family != f.name {
				continue
			}
			t.Run(e.name, func(t *testing.T) {
				s.in(t)
				data := c.segment(ack, "")
				frame := data.bytes()
				e.edit(frame)
				c.sendRaw(data, frame, e.verdict)
				if rewrites(method) {
					data = c.answer(ack, "")
					data.options = []layers.TCPOption{{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10,
						OptionData: make([]byte, 8)}}
					frame = data.bytes()
					e.edit(frame)
					c.replyRaw(data, frame, e.verdict)
				}
			})
		}
		if f.name == "ipv6" {
			data := c.segment(ack, "")
			data.extensions = []extension{hopByHop, destination}
			frame := data.bytes()
			put(frame[ip+4:], 24)
			c.sendRaw(data, frame, dropBadHeader)
			put(frame[ip+4:], 8)
			c.sendRaw(data, frame, dropBadHeader)
		}
	})
}

// A first fragment has the ports, and goes the way of its connection. A later one whose first was not seen has nothing
// to be known by; what is only called a fragment (RFC 6946) is whole.
func TestFragments(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open()
		s.rebuildExceptions()
		elsewhere := netip.AddrPortFrom(plus(f.service.Addr(), 7), f.service.Port())
		type kind struct {
			name   string
			make   func(*segment)
			first  bool
			others verdict // on one for somebody else
		}
		kinds := []kind{
			{"middle", func(s *segment) { s.df, s.mf, s.offset = false, true, 180 }, false, passFragment},
			{"last", func(s *segment) { s.df, s.offset = false, 1 }, false, passFragment},
			{"first", func(s *segment) { s.df, s.mf = false, true }, true, passNotOurs},
		}
		if f.name == "ipv6" {
			with := func(extensions ...extension) func(*segment) {
				return func(s *segment) { s.extensions = extensions }
			}
			kinds = []kind{
				{"last", with(laterFragment), false, passFragment},
				{"last, behind other headers", with(hopByHop, routing, laterFragment), false, passFragment},
				{"first", with(firstFragment), true, passNotOurs},
				{"first, behind other headers", with(hopByHop, routing, firstFragment, destination), true, passNotOurs},
			}
		}
		for _, k := range kinds {
			t.Run(k.name, func(t *testing.T) {
				s.in(t)
				forwards, replies := passFragment, passFragment
				if k.first {
					forwards, replies = c.settledVerdict(), replyTable
				}
				data := c.segment(ack, "a fragment's payload")
				k.make(&data)
				c.send(data, forwards)
				c.send(data.between(c.client, elsewhere), k.others)
				if rewrites(method) {
					data = c.answer(ack, "a fragment's payload")
					k.make(&data)
					c.reply(data, replies)
				}
			})
		}
	})
}

// TCP flags, all 256 of them, from a client in mid-connection and unknown, against what RFC 9293 lets a client send: a
// SYN alone, a RST, or something with an ACK.
func TestFlags(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{ports: 128, backends: 2, settings: []setting{
			constant("adoptions_a_tick", uint32(1000)), capacity("half_open4", 4096), capacity("half_open6", 4096),
		}})
		for flags := range 256 {
			flags := uint8(flags)
			c := s.newClient()
			packet := c.segment(flags, "x")
			switch {
			case flags&syn != 0 && flags&(ack|fin|rst) != 0, flags&(syn|ack|rst) == 0:
				c.send(packet, dropBadFlags)
			case flags&syn != 0:
				c.send(packet, forwardNew)
			case rewrites(method) && flags&rst != 0:
				c.send(packet, dropUnknownRST)
			case rewrites(method):
				c.send(packet, resetUnknown)
			case flags&(rst|fin) != 0:
				c.send(packet, forwardUnknown)
			default:
				c.send(packet, forwardAdopted, confirmed)
			}
		}
	})
}

// The same of a client whose connection is established, and of its backend, whose flags are its own affair.
func TestFlagsEstablished(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{ports: 600})
		var open [256]*conversation
		for flags := range open {
			open[flags] = s.newClient().open()
		}
		s.rebuildExceptions()
		for flags, c := range open {
			flags := uint8(flags)
			packet := c.segment(flags, "x")
			switch {
			case flags&syn != 0 && flags&(ack|fin|rst) != 0, flags&(syn|ack|rst) == 0:
				c.send(packet, dropBadFlags)
			case flags&syn != 0:
				c.send(packet, forwardTable)
			case flags&rst != 0, flags&fin != 0 && !rewrites(method):
				c.send(packet, forwardTable, closingSeen)
			case flags&fin != 0:
				c.send(packet, forwardTable)
			default:
				c.send(packet, c.settledVerdict())
			}
			if !rewrites(method) {
				continue
			}
			c = s.newClient().open()
			packet = c.answer(flags, "x")
			if flags&rst != 0 && flags&syn == 0 {
				c.reply(packet, replyTable, closingSeen)
			} else {
				c.reply(packet, replyTable)
			}
		}
	})
}

// Fairlead routes, and so ends what has no hop left.
func TestTimeToLive(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open()
		for _, ttl := range []uint8{0, 1} {
			data := c.segment(ack, "far from home")
			data.ttl = ttl
			c.send(data, dropTTL)
			if rewrites(method) {
				data = c.answer(ack, "far from home")
				data.ttl = ttl
				c.reply(data, dropTTL)
				unknown := s.newClient()
				data = unknown.segment(ack, "")
				data.ttl = ttl // it was for us, and had arrived
				unknown.send(data, resetUnknown)
			}
			opening := s.newClient()
			data = opening.segment(syn, "")
			data.ttl = ttl
			opening.send(data, dropTTL)
		}
		s.count(1, 0)
	})
}

// What is not ours passes by, every byte of it.
func TestNotOurs(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open()
		s.rebuildExceptions()
		passAs := func(name string, frame []byte, v verdict) {
			t.Run(name, func(t *testing.T) {
				s.in(t)
				action, out := s.run(s.Fairlead, frame, theKernel.front)
				s.check(frame, theKernel.front, action, out, expectation{verdict: v, frame: frame})
			})
			s.in(t)
		}
		pass := func(name string, frame []byte) { passAs(name, frame, passNotOurs) }
		plain := c.segment(ack, "plain")
		c.send(plain, c.settledVerdict())
		pass("another port", plain.between(c.client, netip.AddrPortFrom(f.service.Addr(), 80)).bytes())
		pass("another address", plain.between(c.client, netip.AddrPortFrom(plus(f.service.Addr(), 1), 443)).bytes())
		pass("from the service", plain.between(f.service, c.client).bytes())
		frame := plain.bytes()
		pass("three tags", plain.tagged(tag{0x88a8, 7}, tag{0x8100, 5}, tag{0x8100, 6}).bytes())
		pass("a tag, and nothing behind", plain.tagged(tag{0x8100, 5}).bytes()[:16])
		for _, etherType := range []uint16{0, 46, uint16(layers.EthernetTypeARP), uint16(layers.EthernetTypeMPLSUnicast), 0xffff} {
			other := append([]byte(nil), frame...)
			binary.BigEndian.PutUint16(other[12:], etherType)
			pass(fmt.Sprintf("Ethernet type %#x", etherType), other)
		}
		pass("nothing behind Ethernet", frame[:14])

		arp := gopacket.NewSerializeBuffer()
		s.must(gopacket.SerializeLayers(arp, gopacket.SerializeOptions{},
			&layers.Ethernet{SrcMAC: routerMAC[:], DstMAC: edgeMAC[:], EthernetType: layers.EthernetTypeARP},
			&layers.ARP{AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6,
				ProtAddressSize: 4, Operation: layers.ARPRequest, SourceHwAddress: routerMAC[:], DstHwAddress: edgeMAC[:],
				SourceProtAddress: []byte{198, 51, 100, 11}, DstProtAddress: []byte{192, 0, 2, 10}}))
		pass("ARP for the service", arp.Bytes())

		protocol := ethernetHeader + 9 // IPv4's field
		numbers := []uint8{unix.IPPROTO_ICMP, unix.IPPROTO_UDP, unix.IPPROTO_IPIP, unix.IPPROTO_GRE, unix.IPPROTO_ESP, 0, 255}
		if f.name == "ipv6" {
			protocol = ethernetHeader + 6
			numbers = []uint8{unix.IPPROTO_ICMPV6, unix.IPPROTO_UDP, unix.IPPROTO_IPIP, unix.IPPROTO_GRE, unix.IPPROTO_ESP,
				unix.IPPROTO_NONE, 255}
		}
		for _, number := range numbers {
			other := append([]byte(nil), frame...)
			other[protocol] = number
			v := passNotOurs
			if number == unix.IPPROTO_ICMP || number == unix.IPPROTO_ICMPV6 {
				v = passICMP
			}
			passAs(fmt.Sprintf("protocol %d", number), other, v)
		}
		if f.name == "ipv6" {
			for name, extensions := range map[string][]extension{
				"authenticated":           {authenticated},
				"seven headers":           {hopByHop, destination, routing, atomic, destination, destination, destination},
				"no final destination":    {routingOn}, // RFC 8200, section 4.4: the service is but a stop on its way
				"no final destination, 2": {hopByHop, routingOn, destination},
			} {
				other := plain
				other.extensions = extensions
				pass(name, other.bytes())
			}
		}
		if method == nat {
			b := s.backends[0]
			answer := c.answer(ack, "not me")
			pass("from a backend, another port", answer.between(netip.AddrPortFrom(b.address.Addr(), 22), c.client).bytes())
			pass("from another address, a backend's port",
				answer.between(netip.AddrPortFrom(plus(b.address.Addr(), 1), b.address.Port()), c.client).bytes())
			// From a backend and its port, of no connection: what it has with others is its own affair.
			stranger := answer.between(b.address, netip.AddrPortFrom(plus(f.client, 99), 7))
			c.reply(stranger, passReplyUnknown)
			stranger.ttl = 1
			c.reply(stranger, passReplyUnknown)
		}
		if method != fullnat {
			return
		}
		b, source := s.backends[0], s.sources[0]
		for name, port := range map[string]uint16{"below": source.first - 1, "above": source.last + 1} {
			to := netip.AddrPortFrom(source.address, port)
			pass("to a source address, "+name+" its ports", plain.between(b.address, to).bytes())
		}

		// To a source address and port of ours, but of no connection: the host's stack answers.
		reply := c.answer(ack, "who?")
		unused := netip.AddrPortFrom(source.address, source.last)
		other := netip.AddrPortFrom(plus(b.address.Addr(), 1), b.address.Port())
		opening, last := reply.between(b.address, unused), reply.between(b.address, unused)
		opening.flags, last.ttl = syn, 1
		for name, unknown := range map[string]segment{
			"to a port unused":       reply.between(b.address, unused),
			"from another port":      reply.between(netip.AddrPortFrom(b.address.Addr(), 1), c.source),
			"from another address":   reply.between(other, c.source),
			"SYN to a port unused":   opening,
			"its last hop, nobody's": last,
		} {
			t.Run(name, func(t *testing.T) { s.in(t); c.reply(unknown, passReplyUnknown) })
		}
	})
}

// What a configuration doesn't use is compiled out, and the rest works.
func TestSettings(t *testing.T) {
	t.Parallel()
	own := map[bpf.FairleadMethod]string{
		fullnat: "use_fullnat", nat: "use_nat", dsr: "use_dsr", ipip: "use_tunnel", gue: "use_tunnel",
	}
	offs := []string{"use_ipv4", "use_ipv6", "use_affinity_client", "use_fullnat", "use_nat", "use_dsr", "use_tunnel"}
	for _, off := range offs {
		for _, f := range families {
			for name, method := range methods {
				t.Run(fmt.Sprintf("%s/%s/%s", off, name, f.name), func(t *testing.T) {
					s := newScene(t, f, method, plan{backends: 2, settings: []setting{constant(off, uint8(0))}})
					c := s.newClient()
					switch off {
					case "use_" + f.name:
						c.send(c.segment(syn, ""), passNotOurs)
					case own[method]:
						c.send(c.segment(syn, ""), dropNoRing)
					default:
						c.open()
						s.rebuildExceptions()
						c.send(c.segment(ack, "data"), c.settledVerdict())
						if rewrites(method) {
							c.reply(c.answer(ack, "data"), replyTable)
						}
					}
				})
			}
		}
	}
}
