package pinning

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"
	"unsafe"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	dsr     = maps.MethodDSR
	fullnat = maps.MethodFullNAT

	clientPorts  = 1024 // the first port that clients use
	servicePort  = 443
	backendPort  = 443
	ringSize     = 4093
	defaultEpoch = 100 * time.Millisecond
)

// site is a service, its backends and its source addresses: all their addresses follow from its number and family.
type site struct {
	number uint8
	v6     bool
}

// pin is what a connection must not lose: its backend, by the numbers that its address is made of, and the method.
type pin struct {
	site, backend uint8
	method        maps.Method
}

func (p pin) String() string {
	if p == (pin{}) {
		return "no backend"
	}
	return fmt.Sprintf("%v backend %d of service %d", p.method, p.backend, p.site)
}

func (s site) address(kind, host uint8) netip.Addr {
	if s.v6 {
		return netip.AddrFrom16([16]byte{0: 0xfd, 3: s.number, 13: kind, 15: host})
	}
	return netip.AddrFrom4([4]byte{10, s.number, kind, host})
}

const (
	kindService = iota + 1
	kindBackend
	kindSource
)

func (s site) name() string { return fmt.Sprintf("s%d", s.number) }

func (s site) service() netip.AddrPort {
	return netip.AddrPortFrom(s.address(kindService, 1), servicePort)
}

func (s site) backend(n uint8) netip.Addr { return s.address(kindBackend, n) }

// numbersOf are what site.address made an address of.
func numbersOf(a netip.Addr) (site, kind, host uint8) {
	if a.Is4() {
		b := a.As4()
		return b[1], b[2], b[3]
	}
	b := a.As16()
	return b[3], b[13], b[15]
}

// member is a backend as a configuration wants it.
type member struct {
	backend uint8
	weight  uint32
	method  maps.Method
}

// wanted is the configuration of a site. Ports of the source addresses: 0 means 1024 to 32767.
func (s site) wanted(idle time.Duration, members ...member) maps.WantedService {
	return s.wantedPorts(idle, 1024, 32767, members...)
}

func (s site) wantedPorts(idle time.Duration, first, last uint16, members ...member) maps.WantedService {
	w := maps.WantedService{
		Name: s.name(), Keys: []netip.AddrPort{s.service()}, Protocol: unix.IPPROTO_TCP, RingSize: ringSize,
		IdleTimeout: idle,
	}
	for _, m := range members {
		b := maps.WantedBackend{
			Name: fmt.Sprintf("b%d", m.backend), Address: s.backend(m.backend), Port: backendPort,
			Method: m.method, Weight: m.weight,
		}
		if m.method == fullnat {
			for n := range uint8(2) {
				b.Sources = append(b.Sources, maps.WantedSource{Address: s.address(kindSource, n+1), First: first, Last: last})
			}
		}
		w.Backends = append(w.Backends, b)
	}
	return w
}

// members are backends 1 to n of one method, of equal weight.
func members(method maps.Method, n uint8) (all []member) {
	for i := range n {
		all = append(all, member{backend: i + 1, weight: 1, method: method})
	}
	return all
}

func want(services ...maps.WantedService) maps.Wanted { return maps.Wanted{Services: services} }

// plane is the data plane in the kernel, attached nowhere: packets come from the tests, by BPF_PROG_TEST_RUN.
type plane struct {
	testing.TB
	bpf.FairleadObjects
	manager *maps.Manager
	set     *maps.Set // to read by, whoever is Manager
	epoch   time.Duration
	cpu     *cpu // the test's own
	// bits are the bitmaps' memory: a test makes bits collide by setting them.
	bits *bpf.FairleadBitmapSet

	mu   sync.Mutex
	hops map[netip.Addr]uint8 // how often a backend got a new MAC
	mute map[netip.Addr]bool  // backends whose next hop is not known
}

// setting changes what is about to be loaded.
type setting func(*ebpf.CollectionSpec)

func constant(name string, value uint32) setting {
	return func(spec *ebpf.CollectionSpec) {
		if err := spec.Variables[name].Set(value); err != nil {
			panic(err)
		}
	}
}

// load loads the data plane and gives it a Manager. Limits that are not a test's matter are out of its way.
func load(t testing.TB, epoch time.Duration, settings ...setting) *plane {
	t.Helper()
	spec, err := bpf.LoadFairlead()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		switch {
		case m.Type == ebpf.LRUHash:
			m.MaxEntries = 32768
		case name == "backends" || name == "backend_info" || name == "backend_traffic":
			m.MaxEntries = 1024
		}
	}
	constant("adoptions_a_tick", 1<<30)(spec)
	constant("young_budget", 1<<30)(spec)
	for _, set := range settings {
		set(spec)
	}
	p := &plane{TB: t, epoch: epoch, hops: make(map[netip.Addr]uint8), mute: make(map[netip.Addr]bool)}
	if err := spec.LoadAndAssign(&p.FairleadObjects, nil); err != nil {
		t.Fatalf("load the data plane (root is needed): %+v", err)
	}
	t.Cleanup(func() { p.FairleadObjects.Close() })
	memory, err := unix.Mmap(p.Bitmaps.FD(), 0, int(unsafe.Sizeof(bpf.FairleadBitmapSet{})),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	p.must(err)
	t.Cleanup(func() { unix.Munmap(memory) })
	p.bits = (*bpf.FairleadBitmapSet)(unsafe.Pointer(&memory[0]))
	p.set, err = maps.NewSet(&p.FairleadMaps)
	p.must(err)
	t.Cleanup(func() { p.set.Close() })
	p.cpu = newCPU(p.Fairlead)
	p.start()
	t.Cleanup(func() { p.manager.Close() })
	return p
}

// start starts a Manager, as the daemon does: over whatever the maps hold.
func (p *plane) start() {
	p.Helper()
	manager, err := maps.NewManager(&p.FairleadMaps, maps.ManagerOptions{Tend: p.Tend, Fill: p.Fill, Epoch: p.epoch})
	p.must(err)
	p.manager = manager
}

// restart ends the Manager and starts another.
func (p *plane) restart() {
	p.Helper()
	p.must(p.manager.Close())
	p.start()
}

// applyUnswept applies a configuration with a Manager that fails between the swap of the rings and their sweep (it can't
// read the half-open table), as if killed there. Nobody is the maps' Manager then, until start.
func (p *plane) applyUnswept(w maps.Wanted) {
	p.Helper()
	p.must(p.manager.Close())
	dying := p.FairleadMaps
	var err error
	dying.HalfOpen4, err = p.HalfOpen4.Clone()
	p.must(err)
	manager, err := maps.NewManager(&dying, maps.ManagerOptions{Tend: p.Tend, Fill: p.Fill, Epoch: p.epoch})
	p.must(err)
	p.must(dying.HalfOpen4.Close())
	if _, err := manager.Apply(w, p.hop); err == nil {
		p.Fatal("a Manager that can't read the half-open table has swept")
	}
	p.manager = manager
}

func (p *plane) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

// hop is the next hop of a backend. Its MAC says whose it is and, last, how often it was changed.
func (p *plane) hop(a netip.Addr) maps.NextHop {
	p.mu.Lock()
	defer p.mu.Unlock()
	site, _, host := numbersOf(a)
	next := maps.NextHop{
		Known: !p.mute[a], Interface: 2, MAC: [6]byte{2, 0xb, site, host, 0, p.hops[a]}, SourceMAC: edgeMAC, MTU: 1500,
	}
	if !next.Known {
		next.Reason = "no answer"
	}
	return next
}

func (p *plane) apply(w maps.Wanted) {
	p.Helper()
	if _, err := p.manager.Apply(w, p.hop); err != nil {
		p.Fatalf("apply: %v", err)
	}
}

// setMute says whether a backend's next hop is unknown.
func (p *plane) setMute(a netip.Addr, mute bool) {
	p.Helper()
	p.mu.Lock()
	p.mute[a] = mute
	p.mu.Unlock()
	_, err := p.manager.SetNextHops(map[netip.Addr]maps.NextHop{a: p.hop(a)})
	p.must(err)
}

func (p *plane) turn() {
	p.Helper()
	p.must(p.manager.Turn())
}

// turns turns epochs at a third of their length until the clock stands at a tick. Each look is told when it began and
// when it was over.
func (p *plane) turns(until uint32, look func(before, after uint32)) {
	p.Helper()
	for at := maps.Now(); ; at += max(maps.Ticks(p.epoch)/3, 1) {
		await(at)
		before := maps.Now()
		p.turn()
		if look != nil {
			look(before, maps.Now())
		}
		if int32(before-until) >= 0 {
			return
		}
	}
}

// await returns when the clock stands at a tick or behind it.
func await(tick uint32) {
	for int32(tick-maps.Now()) > 0 {
		time.Sleep(time.Duration(tick-maps.Now()) * maps.Tick / 2)
	}
}

func (p *plane) entry(k *connection) (maps.Connection, bool) {
	p.Helper()
	c, found, err := p.set.Connections.Get(k.tuple)
	p.must(err)
	return c, found
}

func (p *plane) halfOpen(k *connection) bool {
	p.Helper()
	_, found, err := p.set.HalfOpen.Get(k.tuple)
	p.must(err)
	return found
}

func (p *plane) exception(k *connection) bool { return p.set.Bitmaps.Exception(k.hash) }

func (p *plane) fresh(k *connection) bool { return p.set.Bitmaps.Fresh(k.hash) }

// connections is the data plane's count, held against a walk through the table.
func (p *plane) connections() int {
	p.Helper()
	set, walked, young := p.set, int64(0), int64(0)
	p.must(set.Connections.Walk(func(c *maps.Connection) error {
		walked++
		if c.State&maps.StateYoung != 0 {
			young++
		}
		return nil
	}))
	if n := set.Control.Connections(); n != walked {
		p.Fatalf("the data plane counts %d connections, the table holds %d", n, walked)
	}
	if n := set.Control.Young(); n != young {
		p.Fatalf("the data plane counts %d young connections, the table holds %d", n, young)
	}
	return int(walked)
}

// entries counts a map's.
func (p *plane) entries(m *ebpf.Map) (n int) {
	p.Helper()
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	walk := m.Iterate()
	for walk.Next(&key, &value) {
		n++
	}
	p.must(walk.Err())
	return n
}

func (p *plane) serviceID(s site) uint32 {
	p.Helper()
	inv, err := p.set.Inventory()
	p.must(err)
	for _, have := range inv.Services {
		if have.AddrPort() == s.service() {
			return have.ID
		}
	}
	p.Fatalf("service %s is not in the maps", s.name())
	return 0
}

func (p *plane) ring(s site) []maps.Slot {
	p.Helper()
	ring, err := p.set.Ring(p.serviceID(s))
	p.must(err)
	return ring
}

func unsettled(ring []maps.Slot) (n int) {
	for _, slot := range ring {
		if !slot.Settled {
			n++
		}
	}
	return n
}

// checkExceptions holds every entry of both tables against the second property. It answers how many there are, and how
// many are exceptions by right.
func (p *plane) checkExceptions() (all, exceptions int) {
	p.Helper()
	set := p.set
	inv, err := set.Inventory()
	p.must(err)
	rings := make(map[uint32][]maps.Slot)
	for _, s := range inv.Services {
		rings[s.ID], err = set.Ring(s.ID)
		p.must(err)
	}
	missing := 0
	look := func(table string, t maps.Tuple, service, backend uint32, state maps.State) {
		hash := t.Hash()
		slot := rings[service][maps.SlotOf(hash, uint32(len(rings[service])))]
		all++
		if slot.Backend == backend && !state.Closing() && state&maps.StateIdle == 0 {
			return
		}
		exceptions++
		if slot.Settled && !set.Bitmaps.Exception(hash) {
			if missing++; missing <= 5 {
				p.Errorf("%s: %v stands on backend %d, %v, its settled slot on %d, and its exception bit is clear",
					table, t, backend, state, slot.Backend)
			}
		}
	}
	p.must(set.HalfOpen.Walk(func(h *maps.HalfOpenConnection) error {
		look("half-open table", h.Tuple, h.Service, h.Backend, 0)
		return nil
	}))
	p.must(set.Connections.Walk(func(c *maps.Connection) error {
		look("connection table", c.Tuple, c.Service, c.Backend, c.State)
		return nil
	}))
	if missing > 5 {
		p.Errorf("%d entries in all lack their exception bit", missing)
	}
	return all, exceptions
}

// allFresh sets every fresh bit: as if each connection shared its bit with one that is active.
func (p *plane) allFresh() { fill(&p.bits.Fresh[0], ^uint64(0)); fill(&p.bits.Fresh[1], ^uint64(0)) }

// allExceptions sets every exception bit, noExceptions clears them.
func (p *plane) allExceptions() {
	fill(&p.bits.Exception[0], ^uint64(0))
	fill(&p.bits.Exception[1], ^uint64(0))
}

func (p *plane) noExceptions() { fill(&p.bits.Exception[0], 0); fill(&p.bits.Exception[1], 0) }

func fill(words *[bpf.FairleadLimitsBITMAP_WORDS]uint64, value uint64) {
	for i := range words {
		words[i] = value
	}
}

// counted is what the data plane counted while call ran, by names: verdicts and events.
func (p *plane) counted(call func()) map[string]uint64 {
	p.Helper()
	before, err := p.set.Counters.Totals()
	p.must(err)
	call()
	after, err := p.set.Counters.Totals()
	p.must(err)
	counts := make(map[string]uint64)
	for i, name := range bpf.VerdictNames() {
		if n := after.Verdicts[i] - before.Verdicts[i]; n > 0 {
			counts[name] = n
		}
	}
	for i, name := range bpf.EventNames() {
		if n := after.Events[i] - before.Events[i]; n > 0 {
			counts[name] = n
		}
	}
	return counts
}

// ports are all numbers in a pool's two queues, which it empties.
func (p *plane) ports(pool uint32) (all []uint16) {
	p.Helper()
	for kind := range uint32(2) {
		var queue *ebpf.Map
		p.must(p.Ports.Lookup(pool*2+kind, &queue))
		for {
			var number uint32
			err := queue.LookupAndDelete(nil, &number)
			if errors.Is(err, ebpf.ErrKeyNotExist) {
				break
			}
			p.must(err)
			all = append(all, uint16(number))
		}
		queue.Close()
	}
	return all
}
