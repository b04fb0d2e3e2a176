package packet

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

const (
	fullnat = bpf.FairleadMethodMETHOD_FULLNAT
	nat     = bpf.FairleadMethodMETHOD_NAT
	dsr     = bpf.FairleadMethodMETHOD_DSR
	ipip    = bpf.FairleadMethodMETHOD_IPIP
	gue     = bpf.FairleadMethodMETHOD_GUE
)

var methods = map[string]bpf.FairleadMethod{"fullnat": fullnat, "nat": nat, "dsr": dsr, "ipip": ipip, "gue": gue}

// rewrites tells the methods by which backends see other addresses and ports than the client's packets have. Their
// replies pass through us, and their connections need entries.
func rewrites(method bpf.FairleadMethod) bool { return method == fullnat || method == nat }

// tunnels tells the methods that encapsulate.
func tunnels(method bpf.FairleadMethod) bool { return method == ipip || method == gue }

// family is a family's addresses; those with a number go on from the first.
type family struct {
	name                    string
	service                 netip.AddrPort
	client, backend, source netip.Addr
	tunnel                  netip.Addr // the first of 256 outer source addresses
}

var families = []family{
	{"ipv4", netip.MustParseAddrPort("192.0.2.10:443"), netip.MustParseAddr("198.51.100.11"),
		netip.MustParseAddr("10.0.0.11"), netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.77.1.0")},
	{"ipv6", netip.MustParseAddrPort("[2001:db8:5::10]:443"), netip.MustParseAddr("2001:db8:c::11"),
		netip.MustParseAddr("fd00:a::11"), netip.MustParseAddr("fd00:a::1"), netip.MustParseAddr("fd00:77::100")},
}

// other is the other family.
func (f family) other() family {
	if f.name == families[0].name {
		return families[1]
	}
	return families[0]
}

// ipHeader is the length of a bare IP header.
func (f family) ipHeader() uint32 {
	if f.name == "ipv4" {
		return 20
	}
	return 40
}

// plus is the address n further on.
func plus(address netip.Addr, n int) netip.Addr {
	bytes := address.AsSlice()
	last := bytes[len(bytes)-2:]
	binary.BigEndian.PutUint16(last, binary.BigEndian.Uint16(last)+uint16(n))
	sum, _ := netip.AddrFromSlice(bytes)
	return sum
}

// plan is what a scene is made of; what is left out has a value that does.
type plan struct {
	backends int
	sources  int // fullnat
	ports    int // fullnat: of each source address towards each backend
	ringSize int
	udp      bool
	mtu      uint32    // of the ways to the backends
	tags     [2]uint16 // of frames to the backends
	twoArms  bool      // backends are behind another device than the clients
	outer    *family   // ipip, gue: of the backends; else ipip's are of the clients', gue's of the other one
	fixed    bool      // ipip, gue: one outer source address, not 256
	flags    bpf.FairleadServiceFlag
	policy   bpf.FairleadDownPolicy
	settings []setting
}

// scene is a service with its backends and what they need: the first in its data plane is number 1, and so are its
// backends numbered.
type scene struct {
	*dataplane
	family   family
	service  service
	method   bpf.FairleadMethod
	backends []backend
	sources  []source
	ports    map[portUse]*conversation // who was last given a port
	clients  int
	known    []netip.AddrPort // clients met, connected or not

	lastBackend uint32 // the number before those of its backends
}

type portUse struct {
	backend uint32
	source  netip.AddrPort
}

// mtu is that of devices and ways, where a plan says nothing else.
const mtu = 9000

func newScene(t *testing.T, f family, method bpf.FairleadMethod, p plan) *scene {
	t.Helper()
	s := &scene{dataplane: load(t, p.settings...), family: f, ports: map[portUse]*conversation{}}
	for i, d := range []device{theKernel.front, theKernel.back} {
		s.must(s.Devices.Put(uint32(d.index), bpf.FairleadDevice{Mtu: mtu, Mac: [][6]byte{edgeMAC, backMAC}[i]}))
	}
	s.build(f.service, method, p)
	s.protocol = s.service.protocol
	return s
}

// beside is another service in the same data plane: its own ring, numbers and pools, at the same backends' addresses.
func (s *scene) beside(address netip.AddrPort, method bpf.FairleadMethod, p plan) *scene {
	s.Helper()
	other := &scene{dataplane: s.dataplane, family: s.family, ports: map[portUse]*conversation{}}
	other.service.id = s.service.id
	other.lastBackend = s.backends[len(s.backends)-1].id
	return other.build(address, method, p)
}

// build makes the next service at an address, as a plan has it.
func (s *scene) build(address netip.AddrPort, method bpf.FairleadMethod, p plan) *scene {
	s.Helper()
	for _, number := range []struct {
		at    *int
		least int
	}{
		{&p.backends, 1}, {&p.sources, 1}, {&p.ports, 64}, {&p.ringSize, 13},
	} {
		if *number.at == 0 {
			*number.at = number.least
		}
	}
	s.method = method
	protocol := uint8(unix.IPPROTO_TCP)
	if p.udp {
		protocol = unix.IPPROTO_UDP
	}
	if !rewrites(method) {
		p.flags |= bpf.FairleadServiceFlagSERVICE_RING_FIRST
	}
	if method == fullnat {
		for i := range p.sources {
			s.sources = append(s.sources,
				source{uint32(i + 1), plus(s.family.source, i), 20000, uint16(20000 + p.ports - 1)})
			s.setSource(s.sources[i])
		}
	}
	s.service = service{id: s.service.id + 1, address: address, protocol: protocol, flags: p.flags, policy: p.policy}
	for i := range p.ringSize {
		s.service.ring = append(s.service.ring, s.lastBackend+uint32(i%p.backends+1))
	}
	s.setService(s.service)
	for i := range p.backends {
		b := p.backend(s.family, method, i)
		b.id, b.service, b.protocol = s.lastBackend+b.id, s.service.id, protocol
		for _, source := range s.sources {
			pool := uint32(len(s.queues))
			b.pools = append(b.pools, pool)
			s.newPool(pool, b, source)
		}
		s.setBackend(b)
		s.backends = append(s.backends, b)
	}
	if method == fullnat {
		s.setPools()
	}
	return s
}

// backend is that at a place among the plan's, but for its protocol and pools.
func (p plan) backend(f family, method bpf.FairleadMethod, place int) backend {
	b := backend{
		id: uint32(place + 1), method: method, flags: up, mtu: p.mtu, mac: [6]byte{2, 0, 0, 0, 1, byte(place)},
		ifindex: theKernel.front.index, tags: p.tags,
	}
	if b.mtu == 0 {
		b.mtu = mtu
	}
	if p.twoArms {
		b.ifindex = theKernel.back.index
	}
	if method == gue {
		f = f.other()
	}
	if p.outer != nil {
		f = *p.outer
	}
	port := f.service.Port()
	if rewrites(method) {
		port = 8765
	}
	b.address = netip.AddrPortFrom(plus(f.backend, place), port)
	if tunnels(method) {
		b.tunnelSource = f.tunnel
		if !p.fixed {
			b.tunnelMask = binary.NativeEndian.Uint32([]byte{0, 0, 0, 0xff})
		}
	}
	return b
}

// each runs a test for both families, at its leisure: much of a test's time is the kernel's waiting for its CPUs.
func each(t *testing.T, test func(*testing.T, family)) {
	t.Parallel()
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			test(t, f)
		})
	}
}

// eachMethod runs a test for both families and all methods.
func eachMethod(t *testing.T, test func(*testing.T, family, bpf.FairleadMethod)) {
	t.Parallel()
	for name, method := range methods {
		t.Run(name, func(t *testing.T) { each(t, func(t *testing.T, f family) { test(t, f, method) }) })
	}
}

// in changes the test that failures are told to.
func (s *scene) in(t *testing.T) { s.dataplane.T = t }

// conversation is a client's connection, as its two ends have it.
type conversation struct {
	*scene
	client    netip.AddrPort
	backend   uint32         // 0: whom the ring names
	source    netip.AddrPort // whom the backend sees
	seq, ack  uint32         // next numbers of the client, and of the backend
	from      device         // where the client's frames come from
	router    [6]byte
	tags      []tag // of the client's frames
	vlan      []tag // the same as replies carry them: VLANs alone
	confirmed bool
	answered  bool   // its SYN, by a SYN-ACK
	mayRob    bool   // its SYN may take the port of a half-open connection, or need not
	tooBigFor uint32 // what it is told when a packet is too big
	loose     bool   // its way takes less than IPv6's least: its outer packets may be fragmented
	alive     bool   // what it sends next is a keep-alive, from one before where it is
}

// anyBackend stands for the backend that a connection's first packet is seen to go to.
const anyBackend = 0xffffffff

// newClient is the next client's connection, on an address and port not used before.
func (s *scene) newClient() *conversation {
	n := s.clients
	s.clients++
	return s.clientAt(netip.AddrPortFrom(plus(s.family.client, n/200), uint16(40000+n)))
}

func (s *scene) clientAt(client netip.AddrPort) *conversation {
	port := uint32(client.Port())
	s.known = append(s.known, client)
	return &conversation{
		scene: s, client: client, source: client, from: theKernel.front, router: routerMAC,
		seq: 0xfffffff0 + port*7919, ack: 0x7ffffff0 + port*104729, // numbers wrap in many a test
	}
}

// clientOf finds a new client whom the ring gives to a backend.
func (s *scene) clientOf(backend uint32) *conversation {
	s.Helper()
	for range 10000 {
		if c := s.newClient(); ringAnswer(s.service, c.client) == backend {
			return c
		}
	}
	s.Fatalf("no client found whose slot is backend %d's", backend)
	return nil
}

// its is the backend that the connection goes to.
func (c *conversation) its() backend { return c.backends[c.backend-1-c.lastBackend] }

// segment is the client's next, its numbers moved on.
func (c *conversation) segment(flags uint8, payload string) segment {
	s := segment{
		ethSource: c.router, ethDestination: edgeMAC, tags: c.tags, source: c.client, destination: c.scene.service.address,
		ttl: 61, tos: 0x11, flowLabel: 0xabcde, id: uint16(c.seq), df: true, payload: []byte(payload),
	}
	if s.udp = c.scene.service.protocol == unix.IPPROTO_UDP; s.udp {
		c.seq++
		return s
	}
	s.sequence, s.flags, s.window = c.seq, flags, 0xfaf0
	if flags&ack != 0 {
		s.acknowledgement = c.ack
	}
	if flags&syn != 0 {
		s.options = []layers.TCPOption{
			{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{5, 0xb4}},
			{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2},
		}
	} else {
		s.options = []layers.TCPOption{
			{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: []byte("\x12\x34\x56\x78\x9a\xbc\xde\xf0")},
		}
	}
	c.seq = s.end()
	return s
}

// answer is the backend's next, its numbers moved on: under fullnat to the source address that it sees.
func (c *conversation) answer(flags uint8, payload string) segment {
	b := c.its()
	s := segment{
		ethSource: b.mac, ethDestination: b.sourceMAC(), tags: tagsOf(b.tags), source: b.address, destination: c.source,
		ttl: 64, flowLabel: 0x12345, id: uint16(c.ack), df: true, payload: []byte(payload),
	}
	if s.udp = c.scene.service.protocol == unix.IPPROTO_UDP; s.udp {
		c.ack++
		return s
	}
	s.sequence, s.acknowledgement, s.flags, s.window = c.ack, c.seq, flags, 0x7210
	if flags&ack == 0 {
		s.acknowledgement = 0
	}
	c.ack = s.end()
	return s
}

// datagram is the client's next over UDP, response the backend's.
func (c *conversation) datagram(payload string) segment { return c.segment(0, payload) }

func (c *conversation) response(payload string) segment { return c.answer(0, payload) }

// send gives a client's segment to the data plane and checks everything: what a verdict means for the frame is here.
func (c *conversation) send(s segment, v verdict, events ...event) {
	c.Helper()
	c.sendRaw(s, s.bytes(), v, events...)
}

// sendRaw sends other bytes than the segment's own; a forwarded frame is expected as the segment's fields say.
func (c *conversation) sendRaw(s segment, frame []byte, v verdict, events ...event) {
	c.Helper()
	identification := c.control().Identifications
	action, out := c.run(c.Fairlead, frame, c.from)
	want := expectation{verdict: v, events: events, service: c.scene.service.id}
	switch {
	case passes(v):
		want.frame, want.service = frame, 0
	case v >= bpf.FairleadVerdictDROP_TRUNCATED:
	case v >= bpf.FairleadVerdictRESET_UNKNOWN && s.udp:
		want.frame = s.unreachable()
	case v >= bpf.FairleadVerdictRESET_UNKNOWN:
		want.frame = s.reset().bytes()
	case v == answerTooBig:
		want.frame = s.tooBig(c.tooBigFor)
	case v == forwardReset:
		want.frame, want.backend, want.to = c.ended(s).bytes(), c.backend, c.its().ifindex
	default:
		switch c.backend {
		case 0:
			c.backend = ringAnswer(c.scene.service, c.client)
		case anyBackend:
			for _, b := range c.backends {
				if b.mac == [6]byte(out) {
					c.backend = b.id
				}
			}
		}
		if c.backend > c.lastBackend+uint32(len(c.backends)) {
			c.Fatalf("%s: forwarded to nobody known: action %d, frame %x", c.client, action, out)
		}
		if c.mayRob && c.counted().Events[portStolen] > c.dataplane.want.Events[portStolen] {
			want.events, c.mayRob = append(want.events, portStolen), false
		}
		c.answered = c.answered && v != bpf.FairleadVerdictFORWARD_NEW
		if v == bpf.FairleadVerdictFORWARD_NEW && c.method == fullnat && action >= xdpTX {
			c.givenPort(s, out)
		}
		want.frame, want.backend = c.forwarded(s, identification).bytes(), c.backend
		want.to = c.its().ifindex
	}
	c.check(frame, c.from, action, out, want)
	for _, e := range events {
		c.confirmed = c.confirmed || e == bpf.FairleadEventEVENT_CONFIRMED
	}
}

// passes tells the verdicts that leave a packet to the host's stack.
func passes(v verdict) bool { return v <= bpf.FairleadVerdictPASS_TUNNEL_ERROR }

// ended is the RST that a condemned connection's backend gets instead of its client's segment, with that one's numbers: by
// the backend's method, its time to live 64, its IPv4 ID zero with DF set. What Ethernet would pad a frame to that had the
// segment's own tags stands behind it, where the segment's frame was no shorter.
func (c *conversation) ended(s segment) segment {
	b := c.its()
	end := segment{
		ethSource: b.sourceMAC(), ethDestination: b.mac, tags: s.tags, source: s.source, destination: s.destination,
		ttl: 64, df: true, sequence: s.sequence, flags: rst | s.flags&ack,
	}
	if s.flags&ack != 0 {
		end.acknowledgement = s.acknowledgement
	}
	if c.alive {
		end.sequence++
	}
	if room := min(int(s.length()), 60) - int(end.length()); room > 0 {
		end.padding = make([]byte, room)
	}
	end.tags = tagsOf(b.tags)
	if rewrites(c.method) {
		return end.between(c.source, b.address)
	}
	if tunnels(c.method) {
		hash := c.hashOf(s.source, s.destination)
		end.outer = &outer{
			source: b.outerSource(hash), destination: b.address.Addr(), df: true,
			gue: c.method == gue, port: 49152 | uint16(hash>>16)&0x3fff,
		}
	}
	return end
}

// forwarded is a client's segment as its backend is to get it; outer headers that need a number get this one.
func (c *conversation) forwarded(s segment, identification uint64) segment {
	b := c.its()
	s = s.routed(b.sourceMAC(), b.mac, tagsOf(b.tags)...)
	if rewrites(c.method) {
		return s.between(c.source, b.address).identified(identification)
	}
	if !tunnels(c.method) {
		return s
	}
	hash := c.hashOf(s.source, s.destination)
	s.outer = &outer{
		source: b.outerSource(hash), destination: b.address.Addr(), tos: s.tos, df: s.df,
		gue: c.method == gue, port: 49152 | uint16(hash>>16)&0x3fff,
	}
	if !s.source.Addr().Is4() {
		s.outer.df = !c.loose || uint32(len(s.packet()))+b.overhead() <= 576
	}
	if !s.outer.df {
		s.outer.id = network(uint16(identification))
	}
	return s
}

// outerSource is the address that a connection's outer packets come from.
func (b backend) outerSource(hash uint64) netip.Addr {
	bytes := b.tunnelSource.AsSlice()
	last := bytes[len(bytes)-4:]
	binary.NativeEndian.PutUint32(last, binary.NativeEndian.Uint32(last)|uint32(hash)&b.tunnelMask)
	address, _ := netip.AddrFromSlice(bytes)
	return address
}

// tagsOf are the tags of a frame by their words in the maps.
func tagsOf(words [2]uint16) (tags []tag) {
	for _, word := range words {
		if word == 0 {
			break
		}
		t := tag{uint16(layers.EthernetTypeDot1Q), word & uint16(bpf.FairleadTagTAG_ID)}
		if word&uint16(bpf.FairleadTagTAG_8021AD) != 0 {
			t.etherType = uint16(layers.EthernetTypeQinQ)
		}
		tags = append(tags, t)
	}
	return tags
}

// givenPort reads the source that a new connection was given, which must be nobody's whose connection stands.
func (c *conversation) givenPort(s segment, out []byte) {
	c.Helper()
	grown := 4 * (len(tagsOf(c.its().tags)) - len(s.tags)) // by VLAN tags
	ip := ethernetHeader + 4*len(s.tags) + grown
	at, length := ip+12, 4
	if !c.client.Addr().Is4() {
		at, length = ip+8, 16
	}
	address, _ := netip.AddrFromSlice(out[at : at+length])
	c.source = netip.AddrPortFrom(address, binary.BigEndian.Uint16(out[s.transportOffset()+grown:]))
	known := false
	for _, source := range c.sources {
		known = known || source.address == address && c.source.Port() >= source.first && c.source.Port() <= source.last
	}
	if !known {
		c.Fatalf("source %s is of no pool", c.source)
	}
	use := portUse{c.backend, c.source}
	if other := c.scene.ports[use]; other != nil && other != c && other.confirmed {
		c.Fatalf("source %s towards backend %d belongs to %s", c.source, c.backend, other.client)
	}
	c.scene.ports[use] = c
}

// reply gives a backend's segment to the data plane, and expects it at the client if the verdict says so.
func (c *conversation) reply(s segment, v verdict, events ...event) {
	c.Helper()
	c.replyRaw(s, s.bytes(), v, events...)
}

// replyRaw sends other bytes than the segment's own.
func (c *conversation) replyRaw(s segment, frame []byte, v verdict, events ...event) {
	c.Helper()
	from := theKernel.front
	if c.its().ifindex == theKernel.back.index {
		from = theKernel.back
	}
	identification := c.control().Identifications
	action, out := c.run(c.Fairlead, frame, from)
	want := expectation{verdict: v, events: events}
	switch {
	case passes(v):
		want.frame = frame
	case v == answerTooBig:
		want.frame = s.tooBig(c.tooBigFor)
	case v < answerTooBig:
		want.frame = c.replied(s, identification).bytes()
		if v == replyHalfOpen && !s.udp && !c.answered {
			traffic := &c.dataplane.want.Backends[c.backend]
			switch s.flags & (syn | ack | rst) {
			case syn | ack:
				traffic.Answered++
				c.answered = true
			case rst, rst | ack:
				traffic.Rejected++
			}
		}
		want.service, want.backend, want.to = c.scene.service.id, c.backend, c.from.index
	case v < bpf.FairleadVerdictDROP_TRUNCATED && s.udp:
		want.frame = s.unreachable()
	case v < bpf.FairleadVerdictDROP_TRUNCATED:
		want.frame = s.reset().bytes()
	}
	c.check(frame, from, action, out, want)
}

// replied is a backend's segment as its client is to get it; fragments get this number.
func (c *conversation) replied(s segment, identification uint64) segment {
	return s.routed(edgeMAC, c.router, c.vlan...).between(c.scene.service.address, c.client).identified(identification)
}

// The verdicts' and events' names, short.
const (
	passNotOurs       = bpf.FairleadVerdictPASS_NOT_OURS
	passFragment      = bpf.FairleadVerdictPASS_FRAGMENT
	passReplyUnknown  = bpf.FairleadVerdictPASS_REPLY_UNKNOWN
	passICMP          = bpf.FairleadVerdictPASS_ICMP
	passTunnelError   = bpf.FairleadVerdictPASS_TUNNEL_ERROR
	passCheck         = bpf.FairleadVerdictPASS_CHECK
	forwardRing       = bpf.FairleadVerdictFORWARD_RING
	forwardTable      = bpf.FairleadVerdictFORWARD_TABLE
	forwardHalfOpen   = bpf.FairleadVerdictFORWARD_HALF_OPEN
	forwardNew        = bpf.FairleadVerdictFORWARD_NEW
	forwardAdopted    = bpf.FairleadVerdictFORWARD_ADOPTED
	forwardUnknown    = bpf.FairleadVerdictFORWARD_UNKNOWN
	forwardReset      = bpf.FairleadVerdictFORWARD_RESET
	replyTable        = bpf.FairleadVerdictREPLY_TABLE
	replyHalfOpen     = bpf.FairleadVerdictREPLY_HALF_OPEN
	answerTooBig      = bpf.FairleadVerdictANSWER_TOO_BIG
	resetUnknown      = bpf.FairleadVerdictRESET_UNKNOWN
	resetNoBackend    = bpf.FairleadVerdictRESET_NO_BACKEND
	resetTableFull    = bpf.FairleadVerdictRESET_TABLE_FULL
	resetNoPort       = bpf.FairleadVerdictRESET_NO_PORT
	resetBackendDown  = bpf.FairleadVerdictRESET_BACKEND_DOWN
	resetLeaving      = bpf.FairleadVerdictRESET_LEAVING
	resetCondemned    = bpf.FairleadVerdictRESET_CONDEMNED
	resetReplyUnknown = bpf.FairleadVerdictRESET_REPLY_UNKNOWN
	dropTruncated     = bpf.FairleadVerdictDROP_TRUNCATED
	dropBadHeader     = bpf.FairleadVerdictDROP_BAD_HEADER
	dropBadFlags      = bpf.FairleadVerdictDROP_BAD_FLAGS
	forwardFragment   = bpf.FairleadVerdictFORWARD_FRAGMENT
	replyFragment     = bpf.FairleadVerdictREPLY_FRAGMENT
	dropUnknownRST    = bpf.FairleadVerdictDROP_UNKNOWN_RST
	dropNoNeighbor    = bpf.FairleadVerdictDROP_NO_NEIGHBOR
	dropTTL           = bpf.FairleadVerdictDROP_TTL
	dropTooBig        = bpf.FairleadVerdictDROP_TOO_BIG
	dropLimited       = bpf.FairleadVerdictDROP_ANSWER_LIMITED
	dropNoHeadroom    = bpf.FairleadVerdictDROP_NO_HEADROOM
	dropNoRing        = bpf.FairleadVerdictDROP_NO_RING

	confirmed       = bpf.FairleadEventEVENT_CONFIRMED
	matured         = bpf.FairleadEventEVENT_MATURED
	adoptionLimited = bpf.FairleadEventEVENT_ADOPTION_LIMITED
	youngLimited    = bpf.FairleadEventEVENT_YOUNG_LIMITED
	tableFull       = bpf.FairleadEventEVENT_TABLE_FULL
	insertFailed    = bpf.FairleadEventEVENT_INSERT_FAILED
	closingSeen     = bpf.FairleadEventEVENT_CLOSING
	closingUnfit    = bpf.FairleadEventEVENT_CLOSING_UNFIT
	takenBack       = bpf.FairleadEventEVENT_TAKEN_BACK
	portStolen      = bpf.FairleadEventEVENT_PORT_STOLEN
	resolvedSelf    = bpf.FairleadEventEVENT_RESOLVED_SELF
	removed         = bpf.FairleadEventEVENT_REMOVED
	collision       = bpf.FairleadEventEVENT_COLLISION
	pathLess        = bpf.FairleadEventEVENT_PATH_MTU
)

// open takes a connection through its handshake: where replies go past us, through what makes it a grown one too.
func (c *conversation) open() *conversation {
	c.Helper()
	c.send(c.segment(syn, ""), forwardNew)
	c.finishOpening()
	return c
}

// finishOpening does what follows the client's SYN, or its first datagram.
func (c *conversation) finishOpening() {
	c.Helper()
	switch {
	case c.scene.service.protocol == unix.IPPROTO_UDP && rewrites(c.method):
		c.reply(c.response("yes"), replyHalfOpen, confirmed)
		c.send(c.datagram("good"), forwardTable, matured)
		return
	case c.scene.service.protocol == unix.IPPROTO_UDP:
		c.age(udpProof)
		c.send(c.datagram("are you there?"), forwardHalfOpen, confirmed)
		c.age(udpProof)
		c.send(c.datagram("good"), forwardTable, matured)
		return
	}
	if rewrites(c.method) {
		c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
		return
	}
	c.answer(syn|ack, "")
	c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
	c.answer(ack, "hello")
	c.send(c.segment(ack|psh, "hello"), forwardTable, matured)
}

// udpProof is how long a client has to go on sending over UDP, twice, where replies go past us: a second, in ticks.
const udpProof = 60

// first is the tick of the connection's first packet.
func (c *conversation) first() uint32 {
	c.Helper()
	if half, found := c.halfOpen(c.client, c.scene.service.address); found {
		return half.First
	}
	return c.entry().Opened
}

// age makes the connection older by so many ticks.
func (c *conversation) age(ticks uint32) {
	c.Helper()
	if half, found := c.halfOpen(c.client, c.scene.service.address); found {
		half.First -= ticks
		table, key := c.tupleIn(c.HalfOpen4, c.HalfOpen6, c.client, c.scene.service.address)
		c.must(table.Put(key, half))
		return
	}
	entry := c.entry()
	entry.Opened -= ticks
	c.editEntry(c, &entry)
}

// entry is the connection's in the table, where it must be.
func (c *conversation) entry() bpf.FairleadConnection {
	c.Helper()
	entry, found := c.connection(c.client, c.scene.service.address)
	if !found {
		c.Fatalf("%s is not in the connection table", c.client)
	}
	return entry
}

// absent fails where the connection is in the table.
func (c *conversation) absent() {
	c.Helper()
	if entry, found := c.connection(c.client, c.scene.service.address); found {
		c.Fatalf("%s is in the connection table: %+v", c.client, entry)
	}
}

// count checks the counts of the connection table.
func (s *scene) count(connections, young int64) {
	s.Helper()
	if block := s.control(); block.Connections != connections || block.Young != young {
		s.Errorf("%d connections, %d young; want %d, %d", block.Connections, block.Young, connections, young)
	}
}

// editEntry writes the connection's entry in the table as if behind the programs' backs; nil deletes it.
func (s *scene) editEntry(c *conversation, entry *bpf.FairleadConnection) {
	s.Helper()
	table, key := s.tupleIn(s.Connections4, s.Connections6, c.client, s.service.address)
	if entry == nil {
		s.must(table.Delete(key))
	} else {
		s.must(table.Put(key, entry))
	}
}

// rebuildExceptions does what the daemon does in each epoch: it makes the exception bitmap anew beside the one in use,
// with the bits of those who are half-open, young, closing or not far from it, idle, condemned, or not on their slot's
// backend, and then shows it to the programs. What happens meanwhile comes after the walk over the tables, where only the
// programs can note it.
func (s *scene) rebuildExceptions(meanwhile ...func()) {
	s.Helper()
	set, next := s.bitmaps(), s.control().ExceptionIndex&1^1
	clear(set.Exception[next][:])
	for _, client := range s.known {
		_, exceptional := s.halfOpen(client, s.service.address)
		if entry, found := s.connection(client, s.service.address); found {
			exceptional = exceptional || maps.State(entry.State).Closing() ||
				entry.State&(young|idleMark|condemned|clientFINKnown|backendFINKnown) != 0 ||
				entry.Backend != ringAnswer(s.service, client)
		}
		if exceptional {
			place := maps.ExceptionBit(s.hashOf(client, s.service.address))
			set.Exception[next][place/64] |= 1 << (place % 64)
		}
	}
	s.must(s.Bitmaps.Put(uint32(0), set))
	s.editControl(func(block *bpf.FairleadControlBlock) { block.ExceptionBoth = 1 })
	for _, happens := range meanwhile {
		happens()
	}
	s.editControl(func(block *bpf.FairleadControlBlock) { block.ExceptionIndex, block.ExceptionBoth = next, 0 })
}

// slotOf is the slot of a client's connection in a ring chosen by the 4-tuple.
func slotOf(s service, client netip.AddrPort) uint32 {
	hash := maps.Tuple{Source: client, Destination: s.address, Protocol: s.protocol}.Hash()
	return maps.SlotOf(hash, uint32(len(s.ring)))
}

// sharingFresh finds two clients that share a fresh bit in the first epoch, and neither slot nor exception bit.
func (s *scene) sharingFresh() (a, b *conversation) {
	s.Helper()
	seen := map[uint32]netip.AddrPort{}
	for port := 10000; port < 60000; port++ {
		client := netip.AddrPortFrom(s.family.client, uint16(port))
		hash := s.hashOf(client, s.service.address)
		other, found := seen[maps.FreshBit(hash, 0)]
		if found && slotOf(s.service, client) != slotOf(s.service, other) &&
			maps.ExceptionBit(hash) != maps.ExceptionBit(s.hashOf(other, s.service.address)) {
			return s.clientAt(other), s.clientAt(client)
		}
		seen[maps.FreshBit(hash, 0)] = client
	}
	s.Fatal("no two clients share a fresh bit")
	return nil, nil
}
