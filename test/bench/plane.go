package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
	"fairlead/maps"
)

const (
	loopback    = 1 // a frame made by BPF_PROG_TEST_RUN comes in by the loopback device, and there all next hops are
	ringSize    = 65537
	backends    = 12
	groups      = 3 // of backends, that are restarted one after the other
	firstPort   = 1024
	lastPort    = 32767 // of source ports: what Linux' own range leaves
	lowestPort  = 1024  // of clients
	servicePort = 443
	rewritten   = 8443    // port of backends by methods that give packets another
	capacity    = 1 << 20 // of the connection table, unless more is wanted: the default of the configuration
)

// MaxConnections is how many connections can be measured: the other half of the clients' addresses are for newcomers.
const MaxConnections = 1 << 21

// What the handshakes say, in clients' and backends' sequence numbers.
var (
	opening     = segment{flags: flagSYN, sequence: 1000}
	answer      = segment{flags: flagSYN | flagACK, sequence: 5000, ack: 1001}
	confirming  = segment{flags: flagACK, sequence: 1001, ack: 5001}
	talking     = segment{flags: flagPSH | flagACK, sequence: 1001, ack: 5101, payload: 32}
	talkingBack = segment{flags: flagPSH | flagACK, sequence: 5101, ack: 1033, payload: 32}
	datagram    = segment{protocol: unix.IPPROTO_UDP, payload: 32}
)

var (
	inward   = hop{to: mac{2, 0xed, 0, 0, 0, 1}, from: mac{2, 0xc1, 0, 0, 0, 1}} // from clients to us
	backward = hop{to: mac{2, 0xed, 0, 0, 0, 1}, from: mac{2, 0xbe, 0, 0, 0, 1}} // from backends to us
	outward  = hop{to: mac{2, 0xc1, 0, 0, 0, 1}, from: mac{2, 0xed, 0, 0, 0, 1}} // from us to clients
)

// setting is what a configuration has of one service.
type setting struct {
	method   maps.Method
	protocol uint8
	ipv6     bool // clients and service
	outer6   bool // backends; another family than the clients' in tunnels alone
}

func (s setting) family() Family { return familyOf(s.ipv6) }

func familyOf(ipv6 bool) Family {
	if ipv6 {
		return IPv6
	}
	return IPv4
}

func (s setting) tunnels() bool { return s.method == maps.MethodIPIP || s.method == maps.MethodGUE }

func (s setting) udp() bool { return s.protocol == unix.IPPROTO_UDP }

func (s setting) String() string {
	text := fmt.Sprintf("%v, %s", s.method, s.family())
	if s.tunnels() {
		text += " in " + string(familyOf(s.outer6))
	}
	if s.udp() {
		text += ", udp"
	}
	return text
}

// plane is the real programs and maps under the real map manager, attached nowhere and pinned nowhere, with one service
// of one method. The harness gives it its frames.
type plane struct {
	setting
	random  *rand.Rand
	objects bpf.FairleadObjects
	manager *maps.Manager
	harness *harness

	service     netip.AddrPort
	id          uint32 // of the service
	sources     []maps.WantedSource
	tunnel      netip.Prefix
	inventory   *maps.Inventory
	halfOpen    int // capacity of the half-open table
	established []netip.AddrPort
	exceptions  int              // of them, on another backend than their slot's
	strangers   []netip.AddrPort // clients of no connection yet
	repeated    map[int]bool     // by how many bytes frames grew of which several were looked at in a row
}

// newPlane loads a data plane for so many connections as a configuration with this one service has it, and a harness for
// runs of so many repeats.
func newPlane(of setting, connections, halfOpen, repeats int, seed uint64) (_ *plane, err error) {
	p := &plane{setting: of, random: rand.New(rand.NewPCG(seed, 0)), repeated: make(map[int]bool)}
	spec, err := bpf.LoadFairlead()
	if err != nil {
		return nil, fmt.Errorf("read the compiled programs: %w", err)
	}
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		if slices.Contains([]string{bpf.FairleadMapHalfOpen4, bpf.FairleadMapHalfOpen6, bpf.FairleadMapHalfReplies4,
			bpf.FairleadMapHalfReplies6}, name) {
			if halfOpen > 0 {
				m.MaxEntries = uint32(halfOpen)
			}
			p.halfOpen = int(m.MaxEntries)
		}
	}
	// Handshakes under way take room too.
	room := uint32(max(capacity, connections+connections/16))
	for _, name := range []string{bpf.FairleadMapConnections4, bpf.FairleadMapConnections6,
		bpf.FairleadMapReplies4, bpf.FairleadMapReplies6} {
		spec.Maps[name].MaxEntries = room
	}
	for name, value := range map[string]any{
		bpf.FairleadVarUseIpv4:            truth(!p.ipv6),
		bpf.FairleadVarUseIpv6:            truth(p.ipv6),
		bpf.FairleadVarUseFullnat:         truth(p.method == maps.MethodFullNAT),
		bpf.FairleadVarUseNat:             truth(p.method == maps.MethodNAT),
		bpf.FairleadVarUseDsr:             truth(p.method == maps.MethodDSR),
		bpf.FairleadVarUseTunnel:          truth(p.tunnels()),
		bpf.FairleadVarUseTcp:             truth(!p.udp()),
		bpf.FairleadVarUseUdp:             truth(p.udp()),
		bpf.FairleadVarUseAffinityClient:  truth(false),
		bpf.FairleadVarConnectionCapacity: room,
		bpf.FairleadVarYoungBudget:        room / 8,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set constant %s: %w", name, err)
		}
	}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if err := spec.LoadAndAssign(&p.objects, nil); err != nil {
		return nil, fmt.Errorf("load the data plane: %w: it takes root, or CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and "+
			"CAP_SYS_ADMIN", err)
	}
	p.manager, err = maps.NewManager(&p.objects.FairleadMaps, maps.ManagerOptions{
		Tend: p.objects.Tend, Fill: p.objects.Fill, Epoch: 10 * time.Second, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return nil, err
	}
	if p.harness, err = newHarness(p.ipv6, max(connections, p.newcomers(), bystander), repeats, p.objects.Fairlead,
		spec.Programs[bpf.FairleadProgFairlead]); err != nil {
		return nil, err
	}
	if err := p.serve(connections); err != nil {
		return nil, err
	}
	p.strangers = make([]netip.AddrPort, connections+p.newcomers())
	for i := range p.strangers {
		number := i
		if i >= connections {
			number = MaxConnections + i - connections
		}
		p.strangers[i] = netip.AddrPortFrom(p.client(number), uint16(lowestPort+p.random.IntN(1<<16-lowestPort)))
	}
	return p, nil
}

func (p *plane) close() {
	if p.harness != nil {
		p.harness.Close()
	}
	if p.manager != nil {
		p.manager.Close()
	}
	p.objects.Close()
}

func truth(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// newcomers is how many clients open connections in one run: more than the half-open table holds.
func (p *plane) newcomers() int { return 2 * p.halfOpen }

// address is one of the host part's bits in a network of its own: each kind of peer has one.
func address(ipv6 bool, network byte, number int) netip.Addr {
	b := [4]byte{byte(number >> 24), byte(number >> 16), byte(number >> 8), byte(number)}
	if ipv6 {
		return netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 5: network,
			12: b[0], 13: b[1], 14: b[2], 15: b[3]})
	}
	b[0] = network
	return netip.AddrFrom4(b)
}

// Networks. Clients' is 100.64.0.0/10 (RFC 6598) or 2001:db8:64::/96.
const (
	clientNetwork  = 100
	serviceNetwork = 192
	backendNetwork = 10
	sourceNetwork  = 11
)

func (p *plane) client(number int) netip.Addr { return address(p.ipv6, clientNetwork, 64<<16+number) }

// elsewhere is an address that is nothing to us, beside the service's.
func (p *plane) elsewhere() netip.Addr { return p.service.Addr().Next() }

// serve configures the service.
func (p *plane) serve(connections int) error {
	p.service = netip.AddrPortFrom(address(p.ipv6, serviceNetwork, 2<<8+10), servicePort)
	if p.method == maps.MethodFullNAT {
		// Half-open connections keep their ports until the table has forgotten them.
		ports := (connections + 3*p.halfOpen) * 10 / 9
		for i := range ports/(backends*(lastPort-firstPort+1)) + 1 {
			p.sources = append(p.sources, maps.WantedSource{
				Address: address(p.outer6, sourceNetwork, 1+i), First: firstPort, Last: lastPort,
			})
		}
	}
	if p.tunnels() {
		from := address(p.outer6, sourceNetwork, 1<<16)
		p.tunnel = netip.PrefixFrom(from, from.BitLen()-16)
	}
	if err := p.apply(nobody); err != nil {
		return err
	}
	var err error
	if p.inventory, err = p.manager.Set().Inventory(); err != nil {
		return err
	}
	p.id = p.inventory.Services[0].ID
	return nil
}

// nobody is no group of backends.
const nobody = -1

// apply configures the service with one group of its backends at rest: they take no new connections.
func (p *plane) apply(atRest int) error {
	wanted := maps.WantedService{
		Name: "bench", Keys: []netip.AddrPort{p.service}, Protocol: p.protocol, RingSize: ringSize,
		IdleTimeout: 24 * time.Hour,
	}
	hops := make(map[netip.Addr]maps.NextHop)
	for i := range backends {
		b := maps.WantedBackend{
			Name: fmt.Sprintf("backend%d", i), Address: address(p.outer6, backendNetwork, 1+i), Port: servicePort,
			Method: p.method, Weight: 1, Sources: p.sources, Tunnel: p.tunnel,
		}
		if !p.method.Stateless() {
			b.Port = rewritten
		}
		if i%groups == atRest {
			b.Weight = 0
		}
		wanted.Backends = append(wanted.Backends, b)
		hops[b.Address] = maps.NextHop{
			Known: true, Interface: loopback, MAC: mac{2, 0xbe, 0, 0, 1, byte(i)}, SourceMAC: inward.to, MTU: 1500,
		}
	}
	_, err := p.manager.Apply(maps.Wanted{Services: []maps.WantedService{wanted}},
		func(a netip.Addr) maps.NextHop { return hops[a] })
	return err
}

// inwards are paths from clients to the service.
func (p *plane) inwards(clients []netip.AddrPort) []path {
	paths := make([]path, len(clients))
	for i, c := range clients {
		paths[i] = path{c, p.service}
	}
	return paths
}

func (p *plane) template(s segment, paths []path) frame {
	return newFrame(inward, paths[0].from, paths[0].to, s)
}

// counts are verdicts by number.
type counts [bpf.FairleadVerdictVERDICT_COUNT]uint64

func (c counts) String() (text string) {
	for verdict, n := range c {
		if n > 0 {
			text += fmt.Sprintf(", %d %s", n, bpf.VerdictNames()[verdict])
		}
	}
	if text == "" {
		return "none"
	}
	return text[2:]
}

func (c counts) times(n uint64) counts {
	for verdict := range c {
		c[verdict] *= n
	}
	return c
}

// tally is what the data plane counts.
type tally struct {
	verdicts         counts
	service, servers maps.Traffic // of the service, and of its backends together
}

// expected is what it counts of frames of one length that meet these verdicts.
func expected(verdicts counts, length int) (t tally) {
	t.verdicts = verdicts
	for verdict, n := range verdicts {
		bytes := n * uint64(length)
		switch kind, _, _ := strings.Cut(bpf.VerdictNames()[verdict], "_"); kind {
		case "forward":
			t.service.Packets += n
			t.service.Bytes += bytes
		case "reply":
			t.service.ReplyPackets += n
			t.service.ReplyBytes += bytes
		}
	}
	t.service.Connections = verdicts[bpf.FairleadVerdictFORWARD_NEW]
	t.servers = t.service
	t.service.Refused = verdicts[bpf.FairleadVerdictRESET_UNKNOWN]
	return t
}

func (t *tally) add(o tally, sign uint64) {
	for verdict := range t.verdicts {
		t.verdicts[verdict] += sign * o.verdicts[verdict]
	}
	addTraffic(&t.service, o.service, sign)
	addTraffic(&t.servers, o.servers, sign)
}

func addTraffic(t *maps.Traffic, o maps.Traffic, sign uint64) {
	t.Packets += sign * o.Packets
	t.Bytes += sign * o.Bytes
	t.Connections += sign * o.Connections
	t.Refused += sign * o.Refused
	t.ReplyPackets += sign * o.ReplyPackets
	t.ReplyBytes += sign * o.ReplyBytes
}

// tally is all that the data plane has counted so far.
func (p *plane) tally() (t tally, err error) {
	counters := p.manager.Set().Counters
	totals, err := counters.Totals()
	if err != nil {
		return t, err
	}
	copy(t.verdicts[:], totals.Verdicts)
	if t.service, err = counters.Service(p.id); err != nil {
		return t, err
	}
	for _, b := range p.inventory.Backends {
		traffic, err := counters.Backend(b.ID)
		if err != nil {
			return t, err
		}
		addTraffic(&t.servers, traffic, 1)
	}
	return t, nil
}

// counted does something and compares what the data plane counted meanwhile with what it should: frames of one length
// that meet these verdicts.
func (p *plane) counted(verdicts counts, length int, do func() error) error {
	before, err := p.tally()
	if err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	given, err := p.tally()
	if err != nil {
		return err
	}
	given.add(before, ^uint64(0))
	want := expected(verdicts, length)
	if given.verdicts != want.verdicts {
		return fmt.Errorf("verdicts given: %v; expected: %v", given.verdicts, want.verdicts)
	}
	if given != want {
		return fmt.Errorf("counted for the service: %+v, for its backends: %+v; expected: %+v, %+v", given.service,
			given.servers, want.service, want.servers)
	}
	return nil
}

// all is one verdict for all of n frames.
func all(verdict bpf.FairleadVerdict, n int) (c counts) {
	c[verdict] = uint64(n)
	return c
}

// once gives the program each frame of a template once.
func (p *plane) once(s segment, at hop, paths []path, verdict bpf.FairleadVerdict) error {
	template := newFrame(at, paths[0].from, paths[0].to, s)
	if err := p.harness.load(template, paths); err != nil {
		return err
	}
	return p.counted(all(verdict, len(paths)), len(template.bytes), func() error { return p.harness.give(1) })
}

// establish opens connections until there are so many, by the handshakes of real ones: what the tables then hold is what
// the program wrote, whatever it looks like. Restarting: meanwhile one group of backends after the other is restarted.
func (p *plane) establish(connections int, restarting bool) error {
	missing := connections - len(p.established)
	if !restarting {
		if err := p.open(missing); err != nil {
			return err
		}
	}
	for group := 0; restarting && group < groups; group++ {
		if err := errors.Join(p.apply(group), p.open((missing+group)/groups)); err != nil {
			return err
		}
	}
	if err := p.apply(nobody); err != nil {
		return err
	}
	if have := p.manager.Set().Control.Connections(); have != int64(connections) {
		return fmt.Errorf("the connection table holds %d connections: it should %d", have, connections)
	}
	// With the epoch, the exception bits of handshakes and of what was restarted end.
	if err := p.manager.Turn(); err != nil {
		return err
	}
	var err error
	p.exceptions, err = p.elsewhereThanRing()
	return err
}

// open opens so many connections.
func (p *plane) open(connections int) error {
	for connections > 0 {
		// A quarter of the half-open table at a time: it forgets nobody.
		n := min(connections, p.halfOpen/4)
		clients := p.strangers[:n]
		handshakes := p.handshakes
		if p.udp() {
			handshakes = p.exchanges
		}
		if err := handshakes(clients); err != nil {
			return fmt.Errorf("establish connections %d to %d: %w", len(p.established)+1, len(p.established)+n, err)
		}
		p.strangers = p.strangers[n:]
		p.established = append(p.established, clients...)
		connections -= n
	}
	return nil
}

// handshakes are of TCP.
func (p *plane) handshakes(clients []netip.AddrPort) error {
	paths := p.inwards(clients)
	if err := p.once(opening, inward, paths, bpf.FairleadVerdictFORWARD_NEW); err != nil {
		return fmt.Errorf("SYN: %w", err)
	}
	if err := p.answered(answer); err != nil {
		return fmt.Errorf("SYN-ACK: %w", err)
	}
	if err := p.once(confirming, inward, paths, bpf.FairleadVerdictFORWARD_HALF_OPEN); err != nil {
		return fmt.Errorf("ACK: %w", err)
	}
	if err := p.once(talking, inward, paths, bpf.FairleadVerdictFORWARD_TABLE); err != nil {
		return fmt.Errorf("first segment: %w", err)
	}
	return nil
}

// udpProof is how long a client of UDP whose replies aren't seen has to go on sending: once to be confirmed, and as long
// again to be taken for more than young.
const udpProof = time.Second

// exchanges are what UDP has for handshakes.
func (p *plane) exchanges(clients []netip.AddrPort) error {
	paths := p.inwards(clients)
	if err := p.once(datagram, inward, paths, bpf.FairleadVerdictFORWARD_NEW); err != nil {
		return fmt.Errorf("first datagram: %w", err)
	}
	if err := p.answered(datagram); err != nil {
		return fmt.Errorf("reply: %w", err)
	}
	if p.method.Stateless() {
		begun := maps.Now()
		passed(begun, maps.Ticks(udpProof)+1)
		if err := p.once(datagram, inward, paths, bpf.FairleadVerdictFORWARD_HALF_OPEN); err != nil {
			return fmt.Errorf("datagram after a while: %w", err)
		}
		passed(begun, 2*maps.Ticks(udpProof)+1)
	}
	if err := p.once(datagram, inward, paths, bpf.FairleadVerdictFORWARD_TABLE); err != nil {
		return fmt.Errorf("last datagram: %w", err)
	}
	return nil
}

// passed returns when the data plane's clock stands so many ticks behind a moment.
func passed(since, ticks uint32) {
	for maps.Now()-since < ticks {
		time.Sleep(time.Duration(ticks-(maps.Now()-since)) * maps.Tick)
	}
}

// answered lets the backends answer all who are half-open, where replies pass here.
func (p *plane) answered(s segment) error {
	if p.method.Stateless() {
		return nil
	}
	var replies []path
	if err := p.manager.Set().HalfOpen.Walk(func(h *maps.HalfOpenConnection) error {
		r, err := p.replyPath(h.Backend, h.Source, h.SourcePort, h.Tuple.Source)
		replies = append(replies, r)
		return err
	}); err != nil {
		return err
	}
	return p.once(s, backward, replies, bpf.FairleadVerdictREPLY_HALF_OPEN)
}

// replyPath is the way of a backend's packets: to one of our source addresses and ports, or by nat to the client.
func (p *plane) replyPath(backend, source uint32, port uint16, client netip.AddrPort) (path, error) {
	b, ok := p.inventory.Backend(backend)
	if !ok {
		return path{}, fmt.Errorf("backend %d is not in the maps", backend)
	}
	from := netip.AddrPortFrom(b.Address, b.Port)
	if p.method == maps.MethodNAT {
		return path{from, client}, nil
	}
	i := slices.IndexFunc(p.inventory.Sources, func(s maps.Source) bool { return s.ID == source })
	if i < 0 {
		return path{}, fmt.Errorf("source address %d is not in the maps", source)
	}
	return path{from, netip.AddrPortFrom(p.inventory.Sources[i].Address, port)}, nil
}

// replies are the ways back of all connections, and the clients to whom they lead.
func (p *plane) replies() (paths []path, clients []netip.AddrPort, err error) {
	err = p.manager.Set().Connections.Walk(func(c *maps.Connection) error {
		r, err := p.replyPath(c.Backend, c.Source, c.SourcePort, c.Tuple.Source)
		paths, clients = append(paths, r), append(clients, c.Tuple.Source)
		return err
	})
	return paths, clients, err
}

func (p *plane) tuple(client netip.AddrPort) maps.Tuple {
	return maps.Tuple{Source: client, Destination: p.service, Protocol: p.protocol}
}

// elsewhereThanRing is how many connections are not where the ring would send them.
func (p *plane) elsewhereThanRing() (n int, err error) {
	ring, err := p.manager.Set().Ring(p.id)
	if err != nil {
		return 0, err
	}
	err = p.manager.Set().Connections.Walk(func(c *maps.Connection) error {
		if ring[maps.SlotOf(c.Tuple.Hash(), ringSize)].Backend != c.Backend {
			n++
		}
		return nil
	})
	return n, err
}

// decided are the verdicts on one segment of each established connection, of which some share an exception's bit.
func (p *plane) decided(unsettled bool) (c counts) {
	for _, client := range p.established {
		if !p.method.Stateless() || unsettled || p.manager.Set().Bitmaps.Exception(p.tuple(client).Hash()) {
			c[bpf.FairleadVerdictFORWARD_TABLE]++
		} else {
			c[bpf.FairleadVerdictFORWARD_RING]++
		}
	}
	return c
}

// unsettle makes every slot of the ring unsettled, or settled again.
func (p *plane) unsettle(unsettled bool) error {
	var ring *ebpf.Map
	if err := p.objects.Rings.Lookup(p.id, &ring); err != nil {
		return fmt.Errorf("open the ring: %w", err)
	}
	defer ring.Close()
	slots, words := make([]uint32, ringSize), make([]uint32, ringSize)
	n, err := ring.BatchLookup(new(ebpf.MapBatchCursor), slots, words, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) || n != ringSize {
		return fmt.Errorf("read %d of %d slots: %w", n, ringSize, err)
	}
	for i := range words {
		words[i] &^= uint32(bpf.FairleadSlotSLOT_UNSETTLED)
		if unsettled {
			words[i] |= uint32(bpf.FairleadSlotSLOT_UNSETTLED)
		}
	}
	if _, err := ring.BatchUpdate(slots, words, nil); err != nil {
		return fmt.Errorf("write the ring: %w", err)
	}
	return nil
}

// forwarded is what a client's frame should be when it leaves, by the tables' word on the client.
func (p *plane) forwarded(in frame, client netip.AddrPort) (frame, error) {
	set, tuple := p.manager.Set(), p.tuple(client)
	conn, ok, err := set.Connections.Get(tuple)
	backend, source, port := conn.Backend, conn.Source, conn.SourcePort
	if err == nil && !ok {
		var half maps.HalfOpenConnection
		half, ok, err = set.HalfOpen.Get(tuple)
		backend, source, port = half.Backend, half.Source, half.SourcePort
	}
	if err != nil || !ok {
		return frame{}, errors.Join(err, fmt.Errorf("the tables do not know the client %v", client))
	}
	b, ok := p.inventory.Backend(backend)
	if !ok {
		return frame{}, fmt.Errorf("backend %d is not in the maps", backend)
	}
	out, at := in.clone(), hop{b.NextHop.MAC, b.NextHop.SourceMAC}
	out.setHop(at)
	out.decrementTTL()
	switch {
	case p.tunnels():
		hash := tuple.Hash()
		return out.inside(at, p.outerSource(hash), b.Address, p.method == maps.MethodGUE, hash), nil
	case !p.method.Stateless():
		back, err := p.replyPath(backend, source, port, client)
		if err != nil {
			return frame{}, err
		}
		out.setEnds(back.to, back.from)
	}
	return out, nil
}

// outerSource is the source address that a tunnel's packets of one connection have: the low bits of the hash, as they lie
// in memory, fill what the prefix leaves.
func (p *plane) outerSource(hash uint64) netip.Addr {
	b := p.tunnel.Masked().Addr().AsSlice()
	last := b[len(b)-4:]
	mask := uint32(1)<<(p.tunnel.Addr().BitLen()-p.tunnel.Bits()) - 1
	var varies [4]byte
	binary.NativeEndian.PutUint32(varies[:], uint32(hash))
	binary.BigEndian.PutUint32(last, binary.BigEndian.Uint32(last)|binary.BigEndian.Uint32(varies[:])&mask)
	source, _ := netip.AddrFromSlice(b)
	return source
}
