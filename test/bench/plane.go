package bench

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
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
	resting     = 4 // backends that go and come back: a third of them
	firstPort   = 1024
	lastPort    = 32767 // of source ports: what Linux' own range leaves
	lowestPort  = 1024  // of clients
	servicePort = 443
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
	datagram    = segment{udp: true, payload: 32}
)

var (
	inward   = hop{to: mac{2, 0xed, 0, 0, 0, 1}, from: mac{2, 0xc1, 0, 0, 0, 1}} // from clients to us
	backward = hop{to: mac{2, 0xed, 0, 0, 0, 1}, from: mac{2, 0xbe, 0, 0, 0, 1}} // from backends to us
	outward  = hop{to: mac{2, 0xc1, 0, 0, 0, 1}, from: mac{2, 0xed, 0, 0, 0, 1}} // from us to clients
)

// plane is the real programs and maps under the real map manager, attached nowhere and pinned nowhere, with one service
// of one method. The harness gives it its frames.
type plane struct {
	method  maps.Method
	ipv6    bool
	random  *rand.Rand
	objects bpf.FairleadObjects
	manager *maps.Manager
	harness *harness

	service     netip.AddrPort
	id          uint32 // of the service
	sources     []maps.WantedSource
	inventory   *maps.Inventory
	halfOpen    int // capacity of the half-open table
	established []netip.AddrPort
	strangers   []netip.AddrPort // clients of no connection yet
	floors      []float64        // of all runs so far, net of the harness
}

// newPlane loads a data plane for so many connections as a configuration with this one service has it.
func newPlane(method maps.Method, ipv6 bool, connections, halfOpen int, seed uint64) (_ *plane, err error) {
	p := &plane{method: method, ipv6: ipv6, random: rand.New(rand.NewPCG(seed, 0))}
	spec, err := bpf.LoadFairlead()
	if err != nil {
		return nil, fmt.Errorf("read the compiled programs: %w", err)
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		if m.Type == ebpf.LRUHash {
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
		bpf.FairleadVarUseIpv4:            truth(!ipv6),
		bpf.FairleadVarUseIpv6:            truth(ipv6),
		bpf.FairleadVarUseFullnat:         truth(method == maps.MethodFullNAT),
		bpf.FairleadVarUseDsr:             truth(method == maps.MethodDSR),
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
	if p.harness, err = newHarness(ipv6, max(connections, p.newcomers(), bystander), p.objects.Fairlead,
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
func (p *plane) address(network byte, number int) netip.Addr {
	b := [4]byte{byte(number >> 24), byte(number >> 16), byte(number >> 8), byte(number)}
	if p.ipv6 {
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

func (p *plane) client(number int) netip.Addr { return p.address(clientNetwork, 64<<16+number) }

// serve configures the service.
func (p *plane) serve(connections int) error {
	p.service = netip.AddrPortFrom(p.address(serviceNetwork, 2<<8+10), servicePort)
	if p.method == maps.MethodFullNAT {
		// Half-open connections keep their ports until the table has forgotten them.
		ports := (connections + 3*p.halfOpen) * 10 / 9
		for i := range ports/(backends*(lastPort-firstPort+1)) + 1 {
			p.sources = append(p.sources, maps.WantedSource{
				Address: p.address(sourceNetwork, 1+i), First: firstPort, Last: lastPort,
			})
		}
	}
	if err := p.apply(0); err != nil {
		return err
	}
	var err error
	if p.inventory, err = p.manager.Set().Inventory(); err != nil {
		return err
	}
	p.id = p.inventory.Services[0].ID
	return nil
}

// apply configures the service with so many of its backends at rest: they take no new connections.
func (p *plane) apply(atRest int) error {
	wanted := maps.WantedService{
		Name: "bench", Address: p.service.Addr(), Port: p.service.Port(), Protocol: unix.IPPROTO_TCP, RingSize: ringSize,
		IdleTimeout: 24 * time.Hour,
	}
	hops := make(map[netip.Addr]maps.NextHop)
	for i := range backends {
		b := maps.WantedBackend{
			Name: fmt.Sprintf("backend%d", i), Address: p.address(backendNetwork, 1+i), Port: servicePort, Method: p.method,
			Weight: 1, Sources: p.sources,
		}
		if i < atRest {
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

// verdicts are all verdicts given so far.
func (p *plane) verdicts() (c counts, err error) {
	totals, err := p.manager.Set().Counters.Totals()
	copy(c[:], totals.Verdicts)
	return c, err
}

// counted does something and compares the verdicts given meanwhile with those expected.
func (p *plane) counted(expected counts, do func() error) error {
	before, err := p.verdicts()
	if err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	given, err := p.verdicts()
	if err != nil {
		return err
	}
	for verdict := range given {
		given[verdict] -= before[verdict]
	}
	if given != expected {
		return fmt.Errorf("verdicts given: %v; expected: %v", given, expected)
	}
	return nil
}

// all is one verdict for all of n frames.
func all(verdict bpf.FairleadVerdict, n int) (c counts) {
	c[verdict] = uint64(n)
	return c
}

// once gives the program each frame of a template once.
func (p *plane) once(template frame, paths []path, expected counts) error {
	if err := p.harness.load(template, paths); err != nil {
		return err
	}
	return p.counted(expected, func() error {
		_, err := p.harness.time(p.harness.GivePlane, 1)
		return err
	})
}

// establish opens connections until there are so many, by the handshakes of real ones: what the tables then hold is what
// the program wrote, whatever it looks like.
func (p *plane) establish(connections int) error {
	for len(p.established) < connections {
		// A quarter of the half-open table at a time: it forgets nobody.
		n := min(connections-len(p.established), p.halfOpen/4)
		clients := p.strangers[:n]
		if err := p.handshakes(clients); err != nil {
			return fmt.Errorf("establish connections %d to %d: %w", len(p.established)+1, len(p.established)+n, err)
		}
		p.strangers = p.strangers[n:]
		p.established = append(p.established, clients...)
	}
	if have := p.manager.Set().Control.Connections(); have != int64(connections) {
		return fmt.Errorf("the connection table holds %d connections: it should %d", have, connections)
	}
	// With the epoch, the exception bits of handshakes end.
	return p.manager.Turn()
}

func (p *plane) handshakes(clients []netip.AddrPort) error {
	paths, n := p.inwards(clients), len(clients)
	if err := p.once(p.template(opening, paths), paths, all(bpf.FairleadVerdictFORWARD_NEW, n)); err != nil {
		return fmt.Errorf("SYN: %w", err)
	}
	if p.method == maps.MethodFullNAT {
		var replies []path
		if err := p.manager.Set().HalfOpen.Walk(func(h *maps.HalfOpenConnection) error {
			r, err := p.replyPath(h.Backend, h.Source, h.SourcePort)
			replies = append(replies, r)
			return err
		}); err != nil {
			return err
		}
		if err := p.once(newFrame(backward, replies[0].from, replies[0].to, answer), replies,
			all(bpf.FairleadVerdictREPLY_HALF_OPEN, n)); err != nil {
			return fmt.Errorf("SYN-ACK: %w", err)
		}
	}
	if err := p.once(p.template(confirming, paths), paths, all(bpf.FairleadVerdictFORWARD_HALF_OPEN, n)); err != nil {
		return fmt.Errorf("ACK: %w", err)
	}
	if err := p.once(p.template(talking, paths), paths, all(bpf.FairleadVerdictFORWARD_TABLE, n)); err != nil {
		return fmt.Errorf("first segment: %w", err)
	}
	return nil
}

// replyPath is the way of a backend's packets to one of our source addresses and ports.
func (p *plane) replyPath(backend, source uint32, port uint16) (path, error) {
	b, ok := p.inventory.Backend(backend)
	i := slices.IndexFunc(p.inventory.Sources, func(s maps.Source) bool { return s.ID == source })
	if !ok || i < 0 {
		return path{}, fmt.Errorf("backend %d or source address %d is not in the maps", backend, source)
	}
	return path{netip.AddrPortFrom(b.Address, b.Port), netip.AddrPortFrom(p.inventory.Sources[i].Address, port)}, nil
}

// replies are the ways back of all connections, and the clients to whom they lead.
func (p *plane) replies() (paths []path, clients []netip.AddrPort, err error) {
	err = p.manager.Set().Connections.Walk(func(c *maps.Connection) error {
		r, err := p.replyPath(c.Backend, c.Source, c.SourcePort)
		paths, clients = append(paths, r), append(clients, c.Tuple.Source)
		return err
	})
	return paths, clients, err
}

func (p *plane) tuple(client netip.AddrPort) maps.Tuple {
	return maps.Tuple{Source: client, Destination: p.service, Protocol: unix.IPPROTO_TCP}
}

// exceptions is how many connections are not where the ring would send them.
func (p *plane) exceptions() (n int, err error) {
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
	out := in.clone()
	out.setHop(hop{b.NextHop.MAC, b.NextHop.SourceMAC})
	out.decrementTTL()
	if p.method == maps.MethodFullNAT {
		back, err := p.replyPath(backend, source, port)
		if err != nil {
			return frame{}, err
		}
		out.setEnds(back.to, back.from)
	} else {
		out.setEnds(client, p.service)
	}
	return out, nil
}
