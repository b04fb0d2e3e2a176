package packet

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/gopacket/gopacket/layers"
)

const (
	fullnat = bpf.FairleadMethodMETHOD_FULLNAT
	dsr     = bpf.FairleadMethodMETHOD_DSR
)

// family is a family's addresses; those with a number go on from the first.
type family struct {
	name                    string
	service                 netip.AddrPort
	client, backend, source netip.Addr
	headers                 int // of Ethernet, IP and TCP without options
}

var families = []family{
	{"ipv4", netip.MustParseAddrPort("192.0.2.10:443"), netip.MustParseAddr("198.51.100.11"),
		netip.MustParseAddr("10.0.0.11"), netip.MustParseAddr("10.0.0.1"), 54},
	{"ipv6", netip.MustParseAddrPort("[2001:db8:5::10]:443"), netip.MustParseAddr("2001:db8:c::11"),
		netip.MustParseAddr("fd00:a::11"), netip.MustParseAddr("fd00:a::1"), 74},
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
	twoArms  bool // backends are behind another device than the clients
	flags    bpf.FairleadServiceFlag
	policy   bpf.FairleadDownPolicy
	settings []setting
}

// scene is a service, number 1, with its backends, numbered from 1 on, and what they need.
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
}

type portUse struct {
	backend uint32
	source  netip.AddrPort
}

func newScene(t *testing.T, f family, method bpf.FairleadMethod, p plan) *scene {
	t.Helper()
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
	s := &scene{dataplane: load(t, p.settings...), family: f, method: method, ports: map[portUse]*conversation{}}
	if method == dsr {
		p.flags |= bpf.FairleadServiceFlagSERVICE_RING_FIRST
	}
	if method == fullnat {
		for i := range p.sources {
			s.sources = append(s.sources, source{uint32(i + 1), plus(f.source, i), 20000, uint16(20000 + p.ports - 1)})
			s.setSource(s.sources[i])
		}
	}
	s.service = service{id: 1, address: f.service, flags: p.flags, policy: p.policy}
	for i := range p.ringSize {
		s.service.ring = append(s.service.ring, uint32(i%p.backends+1))
	}
	s.setService(s.service)
	pool := uint32(0)
	for i := range p.backends {
		b := backend{
			id: uint32(i + 1), address: netip.AddrPortFrom(plus(f.backend, i), f.service.Port()), method: method,
			flags: up, service: 1, mac: [6]byte{2, 0, 0, 0, 1, byte(i)}, ifindex: theKernel.front.index,
		}
		if p.twoArms {
			b.ifindex = theKernel.back.index
		}
		if method == fullnat {
			b.address = netip.AddrPortFrom(b.address.Addr(), 8765)
			for _, source := range s.sources {
				b.pools = append(b.pools, pool)
				s.newPool(pool, b, source)
				pool++
			}
		}
		s.setBackend(b)
		s.backends = append(s.backends, b)
	}
	if method == fullnat {
		s.setPools()
	}
	return s
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

// eachMethod runs a test for both families and both methods.
func eachMethod(t *testing.T, test func(*testing.T, family, bpf.FairleadMethod)) {
	t.Parallel()
	for name, method := range map[string]bpf.FairleadMethod{"fullnat": fullnat, "dsr": dsr} {
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
	confirmed bool
	mayRob    bool // its SYN may take the port of a half-open connection, or need not
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

// segment is the client's next, its numbers moved on.
func (c *conversation) segment(flags uint8, payload string) segment {
	s := segment{
		ethSource: c.router, ethDestination: edgeMAC, source: c.client, destination: c.scene.service.address,
		ttl: 61, tos: 0x10, flowLabel: 0xabcde, id: uint16(c.seq), df: true,
		sequence: c.seq, flags: flags, window: 0xfaf0, payload: []byte(payload),
	}
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
	b := c.backends[c.backend-1]
	s := segment{
		ethSource: b.mac, ethDestination: b.sourceMAC(), source: b.address, destination: c.source,
		ttl: 64, flowLabel: 0x12345, id: uint16(c.ack), df: true,
		sequence: c.ack, acknowledgement: c.seq, flags: flags, window: 0x7210, payload: []byte(payload),
	}
	if flags&ack == 0 {
		s.acknowledgement = 0
	}
	c.ack = s.end()
	return s
}

// send gives a client's segment to the data plane and checks everything: what a verdict means for the frame is here.
func (c *conversation) send(s segment, v verdict, events ...event) {
	c.Helper()
	c.sendRaw(s, s.bytes(), v, events...)
}

// sendRaw sends other bytes than the segment's own; a forwarded frame is expected as the segment's fields say.
func (c *conversation) sendRaw(s segment, frame []byte, v verdict, events ...event) {
	c.Helper()
	action, out := c.run(c.Fairlead, frame, c.from)
	want := expectation{verdict: v, events: events, service: 1}
	switch {
	case v <= bpf.FairleadVerdictPASS_REPLY_UNKNOWN:
		want.frame, want.service = frame, 0
	case v >= bpf.FairleadVerdictDROP_TRUNCATED:
	case v >= bpf.FairleadVerdictRESET_UNKNOWN:
		want.frame = s.reset().bytes()
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
		if c.backend > uint32(len(c.backends)) {
			c.Fatalf("%s: forwarded to nobody known: action %d, frame %x", c.client, action, out)
		}
		if c.mayRob && c.counted().Events[portStolen] > c.dataplane.want.Events[portStolen] {
			want.events, c.mayRob = append(want.events, portStolen), false
		}
		if v == bpf.FairleadVerdictFORWARD_NEW && c.method == fullnat && action >= xdpTX {
			c.givenPort(s, out)
		}
		b := c.backends[c.backend-1]
		forwarded := s.routed(b.sourceMAC(), b.mac)
		if c.method == fullnat {
			forwarded = forwarded.between(c.source, b.address)
		}
		want.frame, want.backend, want.to = forwarded.bytes(), c.backend, b.ifindex
	}
	c.check(frame, c.from, action, out, want)
	for _, e := range events {
		c.confirmed = c.confirmed || e == bpf.FairleadEventEVENT_CONFIRMED
	}
}

// givenPort reads the source that a new connection was given, which must be nobody's whose connection stands.
func (c *conversation) givenPort(s segment, out []byte) {
	c.Helper()
	at, length := 26, 4
	if !c.client.Addr().Is4() {
		at, length = 22, 16
	}
	address, _ := netip.AddrFromSlice(out[at : at+length])
	c.source = netip.AddrPortFrom(address, binary.BigEndian.Uint16(out[s.tcpOffset():]))
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
	if c.backends[c.backend-1].ifindex == theKernel.back.index {
		from = theKernel.back
	}
	action, out := c.run(c.Fairlead, frame, from)
	want := expectation{verdict: v, events: events}
	switch {
	case v <= bpf.FairleadVerdictPASS_REPLY_UNKNOWN:
		want.frame = frame
	case v < bpf.FairleadVerdictRESET_UNKNOWN:
		want.frame = s.routed(edgeMAC, c.router).between(c.scene.service.address, c.client).bytes()
		want.service, want.backend, want.to = 1, c.backend, c.from.index
	}
	c.check(frame, from, action, out, want)
}

// The verdicts' and events' names, short.
const (
	passNotOurs      = bpf.FairleadVerdictPASS_NOT_OURS
	passFragment     = bpf.FairleadVerdictPASS_FRAGMENT
	passReplyUnknown = bpf.FairleadVerdictPASS_REPLY_UNKNOWN
	forwardRing      = bpf.FairleadVerdictFORWARD_RING
	forwardTable     = bpf.FairleadVerdictFORWARD_TABLE
	forwardHalfOpen  = bpf.FairleadVerdictFORWARD_HALF_OPEN
	forwardNew       = bpf.FairleadVerdictFORWARD_NEW
	forwardAdopted   = bpf.FairleadVerdictFORWARD_ADOPTED
	forwardUnknown   = bpf.FairleadVerdictFORWARD_UNKNOWN
	replyTable       = bpf.FairleadVerdictREPLY_TABLE
	replyHalfOpen    = bpf.FairleadVerdictREPLY_HALF_OPEN
	resetUnknown     = bpf.FairleadVerdictRESET_UNKNOWN
	resetNoBackend   = bpf.FairleadVerdictRESET_NO_BACKEND
	resetTableFull   = bpf.FairleadVerdictRESET_TABLE_FULL
	resetNoPort      = bpf.FairleadVerdictRESET_NO_PORT
	resetBackendDown = bpf.FairleadVerdictRESET_BACKEND_DOWN
	resetLeaving     = bpf.FairleadVerdictRESET_LEAVING
	dropTruncated    = bpf.FairleadVerdictDROP_TRUNCATED
	dropBadHeader    = bpf.FairleadVerdictDROP_BAD_HEADER
	dropBadFlags     = bpf.FairleadVerdictDROP_BAD_FLAGS
	dropFragment     = bpf.FairleadVerdictDROP_FRAGMENT
	dropUnknownRST   = bpf.FairleadVerdictDROP_UNKNOWN_RST
	dropNoNeighbor   = bpf.FairleadVerdictDROP_NO_NEIGHBOR
	dropTTL          = bpf.FairleadVerdictDROP_TTL
	dropNoRing       = bpf.FairleadVerdictDROP_NO_RING

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
)

// open takes a connection through its handshake: under dsr, through what makes it a grown one too.
func (c *conversation) open() *conversation {
	c.Helper()
	c.send(c.segment(syn, ""), forwardNew)
	c.finishOpening()
	return c
}

// finishOpening does what follows the client's SYN.
func (c *conversation) finishOpening() {
	c.Helper()
	if c.method == fullnat {
		c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
		return
	}
	c.answer(syn|ack, "")
	c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
	c.answer(ack, "hello")
	c.send(c.segment(ack|psh, "hello"), forwardTable, matured)
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
	table, key := s.Connections4, any(nil)
	if c.client.Addr().Is4() {
		key = tuple4(c.client, s.service.address)
	} else {
		table, key = s.Connections6, tuple6(c.client, s.service.address)
	}
	if entry == nil {
		s.must(table.Delete(key))
	} else {
		s.must(table.Put(key, entry))
	}
}

// rebuildExceptions does what the daemon does in each epoch: it makes the exception bitmap anew beside the one in use,
// with the bits of those who are half-open, young, closing or not far from it, idle, or not on their slot's backend, and
// then shows it to the programs. What happens meanwhile comes after the walk over the tables, where only the programs can
// note it.
func (s *scene) rebuildExceptions(meanwhile ...func()) {
	s.Helper()
	set, next := s.bitmaps(), s.control().ExceptionIndex&1^1
	clear(set.Exception[next][:])
	for _, client := range s.known {
		_, exceptional := s.halfOpen(client, s.service.address)
		if entry, found := s.connection(client, s.service.address); found {
			exceptional = exceptional || maps.State(entry.State).Closing() ||
				entry.State&(young|idleMark|clientFINKnown|backendFINKnown) != 0 ||
				entry.Backend != ringAnswer(s.service, client)
		}
		if exceptional {
			place := maps.ExceptionBit(hashOf(client, s.service.address))
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
	return maps.SlotOf(hashOf(client, s.address), uint32(len(s.ring)))
}

// sharingFresh finds two clients that share a fresh bit in the first epoch, and neither slot nor exception bit.
func (s *scene) sharingFresh() (a, b *conversation) {
	s.Helper()
	seen := map[uint32]netip.AddrPort{}
	for port := 10000; port < 60000; port++ {
		client := netip.AddrPortFrom(s.family.client, uint16(port))
		hash := hashOf(client, s.service.address)
		other, found := seen[maps.FreshBit(hash, 0)]
		if found && slotOf(s.service, client) != slotOf(s.service, other) &&
			maps.ExceptionBit(hash) != maps.ExceptionBit(hashOf(other, s.service.address)) {
			return s.clientAt(other), s.clientAt(client)
		}
		seen[maps.FreshBit(hash, 0)] = client
	}
	s.Fatal("no two clients share a fresh bit")
	return nil, nil
}
