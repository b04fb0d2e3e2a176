package model

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"

	"fairlead/maps"
)

// generator makes packets: conversations of clients and backends, what random fields and small pools give, fragments,
// ICMP, ARP, neighbour discovery, and mutations of all these. It hears what came of each.
type generator struct {
	random *rand.Rand
	world  *world
	peers  []*peer
	byFlow map[maps.Tuple]*peer
	queue  []arrival // what comes next, before anything new
	ins    ring      // what came of late
	outs   ring      // and what left
}

// arrival is a frame and the device it comes by.
type arrival struct {
	frame   []byte
	ingress uint32
}

// ring holds the last ones.
type ring struct {
	list []arrival
	next int
}

const ringSize = 256

func (r *ring) add(a arrival) {
	if len(r.list) < ringSize {
		r.list = append(r.list, a)
		return
	}
	r.list[r.next] = a
	r.next = (r.next + 1) % ringSize
}

// peer is a client's end of a flow, and the backend's.
type peer struct {
	tuple     maps.Tuple
	hop       hop // by which the client's frames come
	tags      []tag
	stage     int
	seq, ack  uint32         // the client's next number, and the backend's
	backend   arrival        // the last packet that the backend got
	reachable bool           // it got one, and answers through us
	stateless bool           // it got one, and answers by itself
	seen      netip.AddrPort // whom the backend talks to
	at        netip.AddrPort // what the backend is to it
}

const mostPeers = 400

func newGenerator(w *world, random *rand.Rand) *generator {
	return &generator{random: random, world: w, byFlow: map[maps.Tuple]*peer{}}
}

func (g *generator) chance(percent int) bool { return g.random.IntN(100) < percent }

func pick[T any](g *generator, list []T) T { return list[g.random.IntN(len(list))] }

func (g *generator) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(g.random.Uint32())
	}
	return b
}

var (
	clients4 = []netip.Addr{addressOf("198.51.100.1"), addressOf("198.51.100.2"), addressOf("198.51.100.3"), addressOf("203.0.113.77")}
	clients6 = []netip.Addr{addressOf("2001:db8:c::1"), addressOf("2001:db8:c::2"), addressOf("2001:db8:c::3"), addressOf("2001:db8:d::77")}
	// Sources that nobody has, or that are somebody else's.
	odd4 = []netip.Addr{addressOf("0.0.0.0"), addressOf("255.255.255.255"), addressOf("224.0.0.5"), addressOf("127.0.0.1"),
		addressOf("240.0.0.1"), addressOf("10.1.0.1"), addressOf("10.2.0.1"), addressOf("10.0.0.1"), addressOf("192.0.2.10"), addressOf("10.9.0.3")}
	odd6 = []netip.Addr{addressOf("::"), addressOf("ff02::1"), addressOf("::1"), addressOf("fe80::1"),
		addressOf("fd00:1::1"), addressOf("fd00:2::1"), addressOf("fd00::1"), addressOf("2001:db8:5::10"), addressOf("fd00:9::3"), addressOf("::ffff:192.0.2.10")}
	clientPorts = []uint16{1024, 1025, 1026, 1027, 40000, 40001, 65535, 443, 53, 20003}
	routers     = []mac{{2, 0xc1, 0, 0, 0, 1}, {2, 0xc1, 0, 0, 0, 2}, {2, 0xc1, 0, 0, 0, 3}}
)

func (g *generator) client(v6 bool) netip.AddrPort {
	list, odd := clients4, odd4
	if v6 {
		list, odd = clients6, odd6
	}
	if g.random.IntN(200) == 0 {
		list = odd
	}
	port := pick(g, clientPorts)
	if g.chance(50) {
		port = uint16(1024 + g.random.IntN(200))
	}
	return netip.AddrPortFrom(pick(g, list), port)
}

// service is one of the configuration, and one of its addresses and ports.
func (g *generator) service() (maps.WantedService, netip.AddrPort) {
	s := pick(g, g.world.wanted.Services)
	return s, pick(g, s.Keys)
}

func (g *generator) tags() (tags []tag) {
	if g.chance(70) {
		return nil
	}
	for range 1 + g.random.IntN(2) {
		t := tag{pick(g, []uint16{ether8021Q, ether8021Q, ether8021AD}), uint16(g.random.IntN(4095))}
		if g.chance(20) {
			t.control = 0
		}
		t.control |= uint16(g.random.IntN(16)) << 12
		tags = append(tags, t)
	}
	return tags
}

func (g *generator) device() device { return g.world.devices[g.random.IntN(len(g.world.devices))] }

func (g *generator) newHop() (hop, []tag) {
	d := g.world.devices[g.random.IntN(3)]
	if g.random.IntN(50) == 0 {
		d = g.device()
	}
	return hop{to: pick(g, routers), from: d.mac, ingress: d.index}, g.tags()
}

// newPeer is a client that is about to talk to a service.
func (g *generator) newPeer() *peer {
	s, at := g.service()
	p := &peer{
		tuple: maps.Tuple{Source: g.client(at.Addr().Is6()), Destination: at, Protocol: s.Protocol},
		seq:   g.random.Uint32(), ack: g.random.Uint32(),
	}
	if old := g.byFlow[p.tuple]; old != nil {
		return old
	}
	p.hop, p.tags = g.newHop()
	g.byFlow[p.tuple] = p
	if len(g.peers) < mostPeers {
		g.peers = append(g.peers, p)
	} else {
		i := g.random.IntN(mostPeers)
		delete(g.byFlow, g.peers[i].tuple)
		g.peers[i] = p
	}
	return p
}

// dress gives a packet what any packet may have.
func (g *generator) dress(s *spec) *spec {
	s.ttl = uint8(2 + g.random.IntN(254))
	if g.random.IntN(60) == 0 {
		s.ttl = uint8(g.random.IntN(2))
	}
	s.tos, s.flow, s.id, s.df = uint8(g.random.Uint32()), g.random.Uint32(), uint32(g.random.IntN(40)), g.chance(70)
	if s.source.Addr().Is6() {
		s.id |= uint32(g.random.IntN(2)) << 20
		if g.chance(8) {
			for range 1 + g.random.IntN(3) {
				number := pick(g, []uint8{protoHopByHop, protoDestination, protoRouting, protoDestination})
				if number == protoHopByHop && len(s.extensions) > 0 {
					number = protoDestination
				}
				size := 8 * (1 + g.random.IntN(2))
				rest := make([]byte, size-1)
				rest[0] = byte(size/8 - 1)
				if number == protoRouting {
					rest[1], rest[2] = pick(g, []byte{0, 2, 3, 4}), byte(g.random.IntN(8)/7)
				} else {
					rest[1], rest[2] = 1, byte(size-4) // PadN
				}
				s.extensions = append(s.extensions, extension{number, rest})
			}
		}
		s.atomic = g.chance(3)
	} else if g.chance(6) {
		s.options = pick(g, [][]byte{
			{1, 1, 1, 1}, {148, 4, 0, 0}, {7, 7, 4, 0, 0, 0, 0, 0}, {131, 7, 4, 10, 0, 0, 9, 0}, {68, 0, 0, 0}, {1, 200, 0, 0},
		})
	}
	if g.chance(5) {
		s.trailing = make([]byte, 1+g.random.IntN(20))
		if g.chance(30) {
			s.trailing = g.bytes(1 + g.random.IntN(20))
		}
	}
	return s
}

func (g *generator) payload() []byte {
	n := g.random.IntN(64)
	switch g.random.IntN(20) {
	case 0:
		n = 500 + g.random.IntN(1000)
	case 1:
		n = 1200 + g.random.IntN(300)
	case 2:
		if g.chance(10) {
			n = 3000 + g.random.IntN(6000)
		}
	case 3, 4, 5:
		n = 0
	}
	return g.bytes(n)
}

func (g *generator) next() arrival {
	if len(g.queue) > 0 {
		a := g.queue[0]
		g.queue = g.queue[1:]
		return a
	}
	var a arrival
	switch n := g.random.IntN(100); {
	case n < 46:
		a = g.talk()
	case n < 56:
		a = g.anything()
	case n < 64:
		g.fragments()
		return g.next()
	case n < 74:
		a = g.icmpError()
	case n < 77:
		a = g.echo()
	case n < 79:
		a = g.arp()
	case n < 81:
		a = g.solicitation()
	default:
		a = g.mutation()
	}
	return a
}

// heard tells the generator what came of a packet.
func (g *generator) heard(a arrival, j *judged) {
	g.ins.add(a)
	if j.r.action != xdpTX && j.r.action != xdpRedirect {
		return
	}
	out := arrival{slices.Clone(j.r.out), 0}
	switch {
	case j.backend != nil:
		out.ingress = j.backend.hop.Interface
	case replied(j.v):
		out.ingress = a.ingress
	default:
		return
	}
	g.outs.add(out)
	if j.backend == nil || !j.p.ported || j.v == forwardICMP {
		return
	}
	p := g.byFlow[tupleOf(j.p)]
	if p == nil {
		return
	}
	p.backend = out
	p.stateless, p.reachable = !j.backend.stateful(), j.backend.stateful()
	if p.reachable {
		o := parse(out.frame)
		p.seen, p.at = o.from4(), o.to4()
	}
}

// fromClient is a packet of the client's.
func (g *generator) fromClient(p *peer, flags uint8, payload []byte) *spec {
	return g.dress(&spec{
		to: p.hop.from, from: p.hop.to, tags: p.tags, source: p.tuple.Source, destination: p.tuple.Destination,
		protocol: p.tuple.Protocol, sequence: p.seq, acknowledgement: p.ack, flags: flags, payload: payload,
		noChecksum: p.tuple.Protocol == protoUDP && g.chance(10) && p.tuple.Source.Addr().Is4(),
	})
}

// fromBackend is a packet of the backend's: by the way that the client's last packet left.
func (g *generator) fromBackend(p *peer, flags uint8, payload []byte) *spec {
	out := parse(p.backend.frame)
	return g.dress(&spec{
		to: out.from, from: out.to, tags: out.tags, source: p.at, destination: p.seen, protocol: p.tuple.Protocol,
		sequence: p.ack, acknowledgement: p.seq, flags: flags, payload: payload,
		noChecksum: p.tuple.Protocol == protoUDP && g.chance(10) && p.tuple.Source.Addr().Is4(),
	})
}

var tcpOptions = [][]byte{nil, {2, 4, 5, 0xb4}, {1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}, {2, 4, 5, 0xb4, 4, 2, 1, 1}}

// talk is the next packet of a conversation.
func (g *generator) talk() arrival {
	var p *peer
	if len(g.peers) < 20 || g.chance(8) {
		p = g.newPeer()
	} else {
		p = pick(g, g.peers)
	}
	if g.random.IntN(100) == 0 { // the client's packets come by another way now
		p.hop, p.tags = g.newHop()
	}
	client := func(s *spec) arrival { return arrival{s.frame(), p.hop.ingress} }
	backend := func(s *spec) arrival {
		by := p.backend.ingress
		if g.random.IntN(100) == 0 {
			by = g.device().index
		}
		return arrival{s.frame(), by}
	}
	if p.tuple.Protocol == protoUDP {
		if p.reachable && g.chance(45) {
			return backend(g.fromBackend(p, 0, g.payload()))
		}
		return client(g.fromClient(p, 0, g.payload()))
	}
	number := func(s *spec, field *uint32) *spec { // now and then a number that does not fit
		if g.random.IntN(40) == 0 {
			*field += g.random.Uint32() >> g.random.IntN(32)
		}
		return s
	}
	switch p.stage {
	case 0: // nothing yet
		p.stage = 1
		s := g.fromClient(p, syn|uint8(g.random.IntN(2)*0xc0), nil)
		s.acknowledgement, s.tcpOptions = 0, pick(g, tcpOptions)
		if g.random.IntN(20) == 0 {
			s.payload = g.bytes(10) // RFC 7413
		}
		p.seq++
		return client(s)
	case 1: // SYN sent
		switch {
		case g.chance(10): // again
			p.stage, p.seq = 0, p.seq-1
			return g.talk()
		case p.reachable && g.chance(5):
			return backend(g.fromBackend(p, rst|ack, nil))
		case p.reachable:
			p.stage = 2
			s := g.fromBackend(p, syn|ack, nil)
			s.tcpOptions = pick(g, tcpOptions)
			p.ack++
			return backend(number(s, &s.acknowledgement))
		case p.stateless:
			p.stage, p.ack = 3, p.ack+1
			return client(g.fromClient(p, ack, nil))
		case g.chance(50):
			p.stage = 3
		default:
			p.stage = 0
		}
		return g.talk()
	case 2: // SYN-ACK sent
		if g.chance(95) {
			p.stage = 3
		}
		s := g.fromClient(p, ack, nil)
		if g.chance(10) {
			s.flags |= psh
			s.payload = g.payload()
			p.seq += uint32(len(s.payload))
		}
		return client(number(s, &s.acknowledgement))
	}
	fromBackend := p.reachable && g.chance(45)
	flags := uint8(ack)
	payload := g.payload()
	if len(payload) > 0 {
		flags |= psh
	}
	switch g.random.IntN(30) {
	case 0:
		flags |= fin
	case 1:
		flags, payload = rst|ack, nil
	case 2:
		flags, payload = rst, nil
	case 3:
		p.stage, p.seq, p.ack = 0, g.random.Uint32(), g.random.Uint32() // a new connection of the same ends
		return g.talk()
	}
	if fromBackend {
		s := g.fromBackend(p, flags, payload)
		p.ack += uint32(len(payload) + int(flags&fin))
		return backend(number(number(s, &s.sequence), &s.acknowledgement))
	}
	s := g.fromClient(p, flags, payload)
	p.seq += uint32(len(payload) + int(flags&fin))
	if p.stateless && g.chance(50) { // the backend talks too, unseen
		p.ack += uint32(g.random.IntN(100))
		s.acknowledgement = p.ack
	}
	return client(number(number(s, &s.sequence), &s.acknowledgement))
}

// anything is a packet of random fields, out of small pools.
func (g *generator) anything() arrival {
	v6 := g.chance(50)
	d := g.device()
	_, at := g.service()
	for at.Addr().Is6() != v6 {
		_, at = g.service()
	}
	s := &spec{
		to: d.mac, from: pick(g, routers), tags: g.tags(), source: g.client(v6), destination: at,
		protocol: pick(g, []uint8{protoTCP, protoTCP, protoTCP, protoUDP, protoUDP, 47, 132, protoIPIP, protoNoNext}),
		sequence: g.random.Uint32(), acknowledgement: g.random.Uint32(), flags: uint8(g.random.Uint32()), payload: g.payload(),
	}
	if g.chance(60) {
		s.flags = pick(g, []uint8{syn, ack, rst, fin | ack, syn | ack, psh | ack, rst | ack})
	}
	addresses, others := serviceAddresses4, sourceAddresses4
	if v6 {
		addresses, others = serviceAddresses6, sourceAddresses6
	}
	switch g.random.IntN(6) {
	case 0: // to any port of an address of ours
		s.destination = netip.AddrPortFrom(pick(g, addresses), uint16(g.random.Uint32()))
	case 1: // to a source address, as if a reply
		s.destination = netip.AddrPortFrom(pick(g, others), uint16(19998+g.random.IntN(70)))
		if b := pick(g, pick(g, g.world.wanted.Services).Backends); b.Address.Is6() == v6 {
			s.source = netip.AddrPortFrom(b.Address, b.Port)
		}
	case 2: // from a backend to somebody
		if b := pick(g, pick(g, g.world.wanted.Services).Backends); b.Address.Is6() == v6 {
			s.source, s.destination = netip.AddrPortFrom(b.Address, b.Port), g.client(v6)
		}
	case 3: // nothing to do with us
		s.destination = g.client(v6)
	}
	g.dress(s)
	if g.random.IntN(30) == 0 {
		s.to = pick(g, []mac{broadcast, {1, 0, 0x5e, 0, 0, 1}, {2, 9, 9, 9, 9, 9}})
	}
	if g.random.IntN(60) == 0 {
		s.from = pick(g, []mac{broadcast, {3, 0xc1, 0, 0, 0, 1}})
	}
	a := arrival{s.frame(), d.index}
	if g.random.IntN(30) == 0 { // something else altogether
		binary.BigEndian.PutUint16(a.frame[12:], pick(g, []uint16{0x88cc, 0x8847, 0x0800, 0x86dd, etherARP, 0x9100}))
	}
	return a
}

// fragments queues the fragments of a packet of a conversation, in and out of order, and with others' in between.
func (g *generator) fragments() {
	for range 1 + g.random.IntN(2) {
		whole := g.talk()
		if g.chance(30) {
			whole = g.anything()
		}
		if len(g.queue) > 0 {
			return
		}
		most := 8 * (1 + g.random.IntN(20))
		if g.chance(70) {
			most = max(most, 40)
		}
		list := fragmented(whole.frame, most, uint32(g.random.IntN(60)))
		if len(list) > 12 {
			list = list[:12]
		}
		switch g.random.IntN(6) {
		case 0:
			slices.Reverse(list)
		case 1:
			g.random.Shuffle(len(list), func(i, k int) { list[i], list[k] = list[k], list[i] })
		case 2:
			list = append(list, list[g.random.IntN(len(list))]) // twice
		}
		for _, frame := range list {
			at := len(g.queue)
			if g.chance(30) {
				at = g.random.IntN(at + 1)
			}
			g.queue = slices.Insert(g.queue, at, arrival{frame, whole.ingress})
		}
	}
}

// icmpError is an error about a packet that left of late, or that a backend sent past us.
func (g *generator) icmpError() arrival {
	var about []byte // from the network header on
	var family uint8
	hop, tags := g.newHop()
	s := &spec{to: hop.from, from: hop.to, tags: tags}
	ingress := hop.ingress
	source := func(list4, list6 []netip.Addr) {
		list := list4
		if family == 6 {
			list = list6
		}
		s.source = netip.AddrPortFrom(pick(g, list), 0)
	}
	switch n := g.random.IntN(10); {
	case n < 5 && len(g.outs.list) > 0: // to whoever sent what left
		out := pick(g, g.outs.list)
		p := parse(out.frame)
		if p.family == 0 || p.malformed != "" {
			return g.talk()
		}
		family, about = p.family, slices.Clone(out.frame[p.l3:p.end])
		s.to, s.from, s.tags, ingress = p.from, p.to, p.tags, out.ingress
		source([]netip.Addr{p.destination, addressOf("10.0.0.254")}, []netip.Addr{p.destination, addressOf("fd00::fe")})
		s.destination = netip.AddrPortFrom(p.source, 0)
	case n < 8 && len(g.peers) > 0: // about what a backend sends to its client, past us or through us
		p := pick(g, g.peers)
		packet := (&spec{
			source: p.tuple.Destination, destination: p.tuple.Source, protocol: p.tuple.Protocol, ttl: 60, df: true,
			sequence: p.ack, acknowledgement: p.seq, flags: ack, payload: g.payload(),
		}).frame()
		family, about = familyOf(p.tuple.Source.Addr()), packet[14:]
		s.to, s.from, s.tags, ingress = p.hop.from, p.hop.to, p.tags, p.hop.ingress
		source([]netip.Addr{p.tuple.Source.Addr(), addressOf("203.0.113.1")}, []netip.Addr{p.tuple.Source.Addr(), addressOf("2001:db8:d::1")})
		s.destination = netip.AddrPortFrom(p.tuple.Destination.Addr(), 0)
	default: // about anything that came
		if len(g.ins.list) == 0 {
			return g.talk()
		}
		p := parse(pick(g, g.ins.list).frame)
		if p.family == 0 || p.malformed != "" {
			return g.talk()
		}
		family, about = p.family, slices.Clone(p.frame[p.l3:p.end])
		source([]netip.Addr{p.destination}, []netip.Addr{p.destination})
		s.destination = netip.AddrPortFrom(p.source, 0)
	}
	if family == 4 && len(about) >= 20 && g.chance(50) { // as a router further on has it
		about[8] -= byte(g.random.IntN(3))
		if g.chance(70) {
			header := about[:min(len(about), int(about[0]&15)*4)]
			binary.BigEndian.PutUint16(header[10:], headerChecksum(header))
		}
	}
	headers := 20
	if family == 6 {
		headers = 40
	}
	switch g.random.IntN(5) {
	case 0:
		about = about[:min(len(about), headers+8)]
	case 1:
		about = about[:min(len(about), headers+g.random.IntN(40))]
	case 2:
		about = about[:g.random.IntN(len(about)+1)]
	case 3:
		about = about[:min(len(about), 512)]
	}
	mtu := pick(g, []uint32{0, 68, 500, 576, 577, 600, 1279, 1280, 1281, 1300, 1400, 1500, 65535})
	s.message = make([]byte, 8)
	if family == 4 {
		s.protocol = protoICMP
		kinds := [][2]byte{{3, 4}, {3, 4}, {3, 3}, {3, 1}, {3, 13}, {11, 0}, {11, 1}, {12, 0}, {4, 0}, {5, 1}, {0, 0}, {3, 200}}
		kind := pick(g, kinds)
		s.message[0], s.message[1] = kind[0], kind[1]
		if kind == [2]byte{3, 4} {
			binary.BigEndian.PutUint16(s.message[6:], uint16(mtu))
		}
	} else {
		s.protocol = protoICMPv6
		kind := pick(g, [][2]byte{{2, 0}, {2, 0}, {1, 4}, {1, 0}, {3, 0}, {3, 1}, {4, 1}, {100, 0}, {129, 0}, {137, 0}, {1, 200}})
		s.message[0], s.message[1] = kind[0], kind[1]
		if kind[0] == 2 {
			binary.BigEndian.PutUint32(s.message[4:], mtu)
		}
	}
	s.payload = about
	g.dress(s)
	return arrival{s.frame(), ingress}
}

func (g *generator) echo() arrival {
	d := g.device()
	list, kind, protocol := slices.Concat(serviceAddresses4, sourceAddresses4), byte(8), uint8(protoICMP)
	v6 := g.chance(50)
	if v6 {
		list, kind, protocol = slices.Concat(serviceAddresses6, sourceAddresses6), 128, protoICMPv6
	}
	s := g.dress(&spec{
		to: d.mac, from: pick(g, routers), tags: g.tags(), source: g.client(v6),
		destination: netip.AddrPortFrom(pick(g, list), 0), protocol: protocol,
		message: []byte{kind, byte(g.random.IntN(10) / 9), 0, 0, 1, 2, 3, 4}, payload: g.payload(),
	})
	if g.random.IntN(20) == 0 {
		s.to = broadcast
	}
	return arrival{s.frame(), d.index}
}

func (g *generator) arp() arrival {
	d := g.device()
	from := pick(g, routers)
	to := broadcast
	if g.chance(30) {
		to = d.mac
	}
	b := ethernet(to, from, g.tags(), etherARP)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, byte(1+g.random.IntN(20)/19))
	b = append(b, from[:]...)
	sender := pick(g, slices.Concat(clients4, clients4, odd4))
	b = append(b, sender.AsSlice()...)
	b = append(b, 0, 0, 0, 0, 0, 0)
	b = append(b, pick(g, slices.Concat(serviceAddresses4, sourceAddresses4, clients4[:1])).AsSlice()...)
	if g.chance(50) {
		b = append(b, make([]byte, 18)...)
	}
	return arrival{b, d.index}
}

func (g *generator) solicitation() arrival {
	d := g.device()
	target := pick(g, slices.Concat(serviceAddresses6, sourceAddresses6, clients6[:1]))
	from := pick(g, routers)
	source := pick(g, slices.Concat(clients6, clients6, odd6))
	destination := solicitedNode(target)
	if g.chance(30) {
		destination = target
	}
	to := d.mac
	if destination.IsMulticast() {
		b := destination.As16()
		to = mac{0x33, 0x33, b[12], b[13], b[14], b[15]}
	}
	option := slices.Concat([]byte{1, 1}, from[:])
	if source.IsUnspecified() && g.chance(80) {
		option = nil
	} else if g.chance(15) {
		option = slices.Concat([]byte{14, 1}, from[:]) // nonce, RFC 7527
	} else if g.random.IntN(30) == 0 {
		option = []byte{1, 0, 1, 2, 3, 4, 5, 6}
	}
	s := &spec{
		to: to, from: from, tags: g.tags(), source: netip.AddrPortFrom(source, 0),
		destination: netip.AddrPortFrom(destination, 0), protocol: protoICMPv6, ttl: 255,
		message: []byte{135, 0, 0, 0, 0, 0, 0, 0}, payload: slices.Concat(target.AsSlice(), option),
	}
	if g.random.IntN(15) == 0 {
		s.ttl = 254
	}
	if g.random.IntN(15) == 0 {
		s.message[1] = 1
	}
	return arrival{s.frame(), d.index}
}

// mutation is a packet that was changed on its way.
func (g *generator) mutation() arrival {
	var a arrival
	if len(g.ins.list) > 0 && g.chance(40) {
		a = pick(g, g.ins.list)
	} else {
		switch g.random.IntN(6) {
		case 0:
			a = g.anything()
		case 1:
			a = g.icmpError()
		case 2:
			a = pick(g, []func() arrival{g.echo, g.arp, g.solicitation})()
		default:
			a = g.talk()
		}
	}
	b := slices.Clone(a.frame)
	for range 1 + g.random.IntN(3) {
		b = g.mutate(b)
	}
	if g.chance(50) {
		repaired(b)
	}
	if len(b) < 14 {
		b = append(b, make([]byte, 14-len(b))...)
	}
	return arrival{b, a.ingress}
}

func (g *generator) mutate(b []byte) []byte {
	p := parse(b)
	l3 := min(p.l3, len(b))
	ip := b[l3:]
	put16 := func(at int, value uint16) {
		if at+2 <= len(b) {
			binary.BigEndian.PutUint16(b[at:], value)
		}
	}
	put := func(at int, value byte) {
		if at < len(b) {
			b[at] = value
		}
	}
	near := func(value int) uint16 { return uint16(value + g.random.IntN(41) - 20) }
	l4 := min(p.l4, len(b))
	if p.family == 0 || p.malformed != "" {
		l4 = min(l3+20, len(b))
	}
	switch g.random.IntN(20) {
	case 0, 1: // a bit of the headers
		at := g.random.IntN(min(len(b), 100))
		b[at] ^= 1 << g.random.IntN(8)
	case 2: // a bit of anything
		at := g.random.IntN(len(b))
		b[at] ^= 1 << g.random.IntN(8)
	case 3: // a byte behind Ethernet's
		if len(ip) > 0 {
			ip[g.random.IntN(min(len(ip), 64))] = pick(g, []byte{0, 1, 0x7f, 0x80, 0xff, byte(g.random.Uint32())})
		}
	case 4: // cut
		b = b[:g.random.IntN(len(b)+1)]
		if len(b) < 14 {
			b = append(b, make([]byte, 14-len(b))...)
		}
	case 5: // cut a little
		b = b[:max(14, len(b)-1-g.random.IntN(8))]
	case 6: // something behind
		b = append(b, g.bytes(1+g.random.IntN(40))...)
	case 7: // length of the network packet
		at, value := l3+2, near(len(ip))
		if p.family == 6 {
			at, value = l3+4, near(len(ip)-40)
		}
		put16(at, pick(g, []uint16{value, value, 0, 19, 20, 0xffff}))
	case 8: // IPv4's header length, or IPv6's version
		if len(ip) > 0 {
			ip[0] = ip[0]&0xf0 | byte(g.random.IntN(16))
		}
	case 9: // TCP's header length
		put(l4+12, byte(g.random.IntN(16)<<4))
	case 10: // UDP's length
		put16(l4+4, pick(g, []uint16{0, 7, 8, 9, near(len(b) - l4), 0xffff}))
	case 11: // addresses changed places
		if at, size := addressesAt(p.family); p.family != 0 && len(ip) >= at+2*size {
			for i := range size {
				ip[at+i], ip[at+size+i] = ip[at+size+i], ip[at+i]
			}
		}
	case 12: // ports
		if l4+4 <= len(b) {
			b[l4], b[l4+1], b[l4+2], b[l4+3] = b[l4+2], b[l4+3], b[l4], b[l4+1]
		}
	case 13: // protocol
		at := l3 + 9
		if p.family == 6 {
			at = l3 + 6
		}
		put(at, pick(g, []byte{protoHopByHop, protoICMP, protoIPIP, protoTCP, protoUDP, protoIPv6, protoRouting, protoFragment, protoAH, protoICMPv6, protoNoNext, protoDestination, 255}))
	case 14: // EtherType
		put16(l3-2, pick(g, []uint16{etherIPv4, etherIPv6, etherARP, ether8021Q, ether8021AD, 0x1234}))
	case 15: // a tag more, or one less
		if g.chance(60) {
			b = slices.Insert(b, 12, 0x81, 0, byte(g.random.Uint32()), byte(g.random.Uint32()))
		} else if len(p.tags) > 0 {
			b = slices.Delete(b, 12, 16)
		}
	case 16: // time to live
		at := l3 + 8
		if p.family == 6 {
			at = l3 + 7
		}
		put(at, pick(g, []byte{0, 1, 2, 255}))
	case 17: // IPv4's fragment fields
		if p.family == 4 {
			put16(l3+6, pick(g, []uint16{0x2000, 0x4000, 0x8000, 1, 0x2001, 0x1fff, 0x6000, uint16(g.random.Uint32())}))
		}
	case 18: // Ethernet addresses
		at := g.random.IntN(2) * 6
		m := pick(g, []mac{broadcast, {1, 0, 0x5e, 0, 0, 1}, {}, {2, 9, 9, 9, 9, 9}})
		copy(b[at:], m[:])
	case 19: // TCP's flags
		put(l4+13, byte(g.random.Uint32()))
	}
	return b
}
