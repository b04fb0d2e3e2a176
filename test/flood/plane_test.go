package flood

import (
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"time"
	"unsafe"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const (
	servicePort = 443
	ringSize    = 4093
)

// site is a service by one method: the addresses of it, its backends and its sources follow from its number and family.
type site struct {
	number uint8
	v6     bool
	method maps.Method
}

// eachSite is a service for every method and family.
func eachSite() (all []site) {
	for _, method := range []maps.Method{maps.MethodFullNAT, maps.MethodNAT, maps.MethodDSR, maps.MethodIPIP, maps.MethodGUE} {
		for _, v6 := range []bool{false, true} {
			all = append(all, site{uint8(len(all) + 1), v6, method})
		}
	}
	return all
}

func (s site) String() string {
	if s.v6 {
		return fmt.Sprintf("%v over IPv6", s.method)
	}
	return fmt.Sprintf("%v over IPv4", s.method)
}

const (
	kindService = iota + 1
	kindBackend
	kindSource
	kindTunnel
)

func (s site) address(kind, host uint8) netip.Addr {
	if s.v6 {
		return netip.AddrFrom16([16]byte{0: 0xfd, 3: s.number, 13: kind, 15: host})
	}
	return netip.AddrFrom4([4]byte{10, s.number, kind, host})
}

func (s site) service() netip.AddrPort {
	return netip.AddrPortFrom(s.address(kindService, 1), servicePort)
}

func (s site) backend(n uint8) netip.Addr { return s.address(kindBackend, n) }

// wanted is the configuration of a site with the backends of these numbers. The weight of each is its number.
func (s site) wanted(idle time.Duration, backends ...uint8) maps.WantedService {
	w := maps.WantedService{
		Name: fmt.Sprintf("s%d", s.number), Keys: []netip.AddrPort{s.service()}, Protocol: unix.IPPROTO_TCP,
		RingSize: ringSize, IdleTimeout: idle,
	}
	for _, n := range backends {
		b := maps.WantedBackend{
			Name: fmt.Sprintf("b%d", n), Address: s.backend(n), Port: servicePort, Method: s.method, Weight: uint32(n),
		}
		switch s.method {
		case maps.MethodFullNAT:
			for host := range uint8(2) {
				b.Sources = append(b.Sources, maps.WantedSource{Address: s.address(kindSource, host+1), First: 1024, Last: 32767})
			}
		case maps.MethodIPIP, maps.MethodGUE:
			tunnel := s.address(kindTunnel, 0)
			b.Tunnel = netip.PrefixFrom(tunnel, tunnel.BitLen()-8)
		}
		w.Backends = append(w.Backends, b)
	}
	return w
}

// want is the configuration of all sites, each with the same backends.
func want(sites []site, idle time.Duration, backends ...uint8) (w maps.Wanted) {
	for _, s := range sites {
		w.Services = append(w.Services, s.wanted(idle, backends...))
	}
	return w
}

// plane is the data plane in the kernel, attached nowhere: packets come from the tests and their driver, by
// BPF_PROG_TEST_RUN.
type plane struct {
	testing.TB
	bpf.FairleadObjects
	manager *maps.Manager
	set     *maps.Set
	epoch   time.Duration
	cpu     *cpu // the test's own
	bits    *bpf.FairleadBitmapSet
}

// limits are the sizes and budgets that a test is about.
type limits struct {
	connections, young, halfOpen, adoptions uint32
}

func load(t testing.TB, epoch time.Duration, l limits) *plane {
	t.Helper()
	spec, err := bpf.LoadFairlead()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		switch name {
		case "connections4", "connections6", "replies4", "replies6":
			m.MaxEntries = l.connections
		case "half_open4", "half_open6", "half_replies4", "half_replies6":
			m.MaxEntries = l.halfOpen
		}
	}
	for name, value := range map[string]uint32{
		"connection_capacity": l.connections, "young_budget": l.young, "adoptions_a_tick": l.adoptions,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			t.Fatal(err)
		}
	}
	p := &plane{TB: t, epoch: epoch}
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

func (p *plane) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

// start starts a Manager, as the daemon does: over whatever the maps hold.
func (p *plane) start() {
	p.Helper()
	manager, err := maps.NewManager(&p.FairleadMaps, p.options())
	p.must(err)
	p.manager = manager
}

func (p *plane) options() maps.ManagerOptions {
	return maps.ManagerOptions{Tend: p.Tend, Fill: p.Fill, Epoch: p.epoch, Logger: slog.New(slog.DiscardHandler)}
}

// restart ends the Manager and starts another.
func (p *plane) restart() {
	p.Helper()
	p.must(p.manager.Close())
	p.start()
}

// hop is the next hop of a backend. Its MAC says whose it is.
func hop(a netip.Addr) maps.NextHop {
	b := a.AsSlice()
	number, host := b[1], b[3]
	if a.Is6() {
		number, host = b[3], b[15]
	}
	return maps.NextHop{
		Known: true, Interface: 2, MAC: [6]byte{2, 0xb, number, host, 0, 0}, SourceMAC: edgeMAC, MTU: 1500,
	}
}

func (p *plane) apply(w maps.Wanted) {
	p.Helper()
	_, err := p.manager.Apply(w, hop)
	p.must(err)
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
	manager, err := maps.NewManager(&dying, p.options())
	p.must(err)
	p.must(dying.HalfOpen4.Close())
	if _, err := manager.Apply(w, hop); err == nil {
		p.Fatal("a Manager that can't read the half-open table has swept")
	}
	p.manager = manager
}

// unsettled counts the slots of all rings that are yet to be swept.
func (p *plane) unsettled() (n int) {
	p.Helper()
	inv, err := p.set.Inventory()
	p.must(err)
	for _, s := range inv.Services {
		ring, err := p.set.Ring(s.ID)
		p.must(err)
		for _, slot := range ring {
			if !slot.Settled {
				n++
			}
		}
	}
	return n
}

// keep turns epochs beside what the test does, until the answered function is called. That one says how many were turned
// and how long the slowest took.
func (p *plane) keep() (halt func() (turns int, slowest time.Duration)) {
	stop := make(chan struct{})
	var turning sync.WaitGroup
	var turns int
	var slowest time.Duration
	turning.Go(func() {
		ticker := time.NewTicker(p.epoch)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
			}
			begin := time.Now()
			if err := p.manager.Turn(); err != nil {
				p.Errorf("turn the epoch: %v", err)
				return
			}
			turns++
			slowest = max(slowest, time.Since(begin))
		}
	})
	halted := sync.OnceFunc(func() {
		close(stop)
		turning.Wait()
	})
	p.Cleanup(halted)
	return func() (int, time.Duration) {
		halted()
		return turns, slowest
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

// connections is the data plane's count, and that of the young ones, both held against a walk through the table.
func (p *plane) connections() (all, young int) {
	p.Helper()
	p.must(p.set.Connections.Walk(func(c *maps.Connection) error {
		all++
		if c.State&maps.StateYoung != 0 {
			young++
		}
		return nil
	}))
	if a, y := p.set.Control.Connections(), p.set.Control.Young(); a != int64(all) || y != int64(young) {
		p.Fatalf("the data plane counts %d connections, %d of them young; the table holds %d and %d", a, y, all, young)
	}
	return all, young
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

type counts map[string]uint64

// counted is what the data plane counted while call ran, by names: verdicts and events.
func (p *plane) counted(call func()) counts {
	p.Helper()
	before, err := p.set.Counters.Totals()
	p.must(err)
	call()
	after, err := p.set.Counters.Totals()
	p.must(err)
	counts := make(counts)
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

// expect holds what the data plane counts while call runs against what it should.
func (p *plane) expect(want counts, call func()) {
	p.Helper()
	if diff := cmp.Diff(want, p.counted(call)); diff != "" {
		p.Errorf("counters (-want +got):\n%s", diff)
	}
}

// verdicts is how many packets met a verdict.
func (c counts) verdicts() (n uint64) {
	for _, name := range bpf.VerdictNames() {
		n += c[name]
	}
	return n
}

// allFresh sets every fresh bit: as if each connection shared its bit with one that is active.
func (p *plane) allFresh() {
	for i := range p.bits.Fresh {
		for j := range p.bits.Fresh[i] {
			p.bits.Fresh[i][j] = ^uint64(0)
		}
	}
}
