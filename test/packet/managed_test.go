package packet

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// managed is a scene whose maps the map manager has filled, as the daemon's does: from what is wanted, from next hops, from
// the devices there are, and from the addresses of XDP's own.
type managed struct {
	*scene
	manager *maps.Manager
	wanted  maps.Wanted
	hops    map[netip.Addr]maps.NextHop
}

// otherService is a service of the manager's number 0, which nobody means to meet: what moves its counters is seen.
const otherService = "other"

// managedRing is the ring size of a managed scene: a prime.
const managedRing = 101

func newManaged(t *testing.T, f family, method bpf.FairleadMethod, p plan) *managed {
	t.Helper()
	p.backends, p.sources, p.ports = max(p.backends, 1), max(p.sources, 1), max(p.ports, 256)
	s := &managed{
		scene: &scene{dataplane: load(t, p.settings...), family: f, method: method, ports: map[portUse]*conversation{}},
		hops:  map[netip.Addr]maps.NextHop{},
	}
	if p.udp {
		s.protocol = unix.IPPROTO_UDP
	}
	manager, err := maps.NewManager(&s.FairleadMaps, maps.ManagerOptions{
		Tend: s.Tend, Fill: s.Fill, Epoch: 10 * time.Second, Logger: slog.New(slog.DiscardHandler),
	})
	s.must(err)
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	s.manager = manager
	s.must(manager.SetDevices(bothDevices()))

	s.service = service{id: 1, address: f.service, protocol: s.protocol, flags: p.flags, policy: p.policy}
	var sources []maps.WantedSource
	if method == fullnat {
		for i := range p.sources {
			from := source{uint32(i), plus(f.source, i), 20000, uint16(20000 + p.ports - 1)}
			s.sources = append(s.sources, from)
			sources = append(sources, maps.WantedSource{Address: from.address, First: from.first, Last: from.last})
		}
	}
	other := netip.AddrPortFrom(plus(f.service.Addr(), 200), f.service.Port())
	wanted := maps.WantedService{
		Name: "service", Keys: []netip.AddrPort{f.service}, Protocol: s.protocol, RingSize: managedRing, IdleTimeout: time.Hour,
		AffinityClient: p.flags&bpf.FairleadServiceFlagSERVICE_AFFINITY_CLIENT != 0, OnBackendDown: maps.DownPolicy(p.policy),
	}
	for i := range p.backends {
		b := p.backend(f, method, i)
		b.protocol = s.protocol
		s.backends = append(s.backends, b)
		want := maps.WantedBackend{
			Name: b.name(), Address: b.address.Addr(), Port: b.address.Port(), Method: maps.Method(method), Weight: 1,
			Sources: sources,
		}
		if tunnels(method) {
			// As p.backend has it: the last eight bits vary, or none.
			bits := f.tunnel.BitLen() - 8
			if p.fixed {
				bits += 8
			}
			want.Tunnel = netip.PrefixFrom(b.tunnelSource, b.tunnelSource.BitLen()-f.tunnel.BitLen()+bits)
		}
		wanted.Backends = append(wanted.Backends, want)
		s.hops[b.address.Addr()] = b.nextHop()
	}
	s.wanted.Services = []maps.WantedService{{
		Name: otherService, Keys: []netip.AddrPort{other}, Protocol: unix.IPPROTO_TCP, RingSize: managedRing,
		IdleTimeout: time.Hour, Backends: []maps.WantedBackend{{
			Name: otherService, Address: plus(f.backend, 200), Port: other.Port(), Method: maps.MethodDSR, Weight: 1,
		}},
	}, wanted}
	s.apply()
	return s
}

// bothDevices are those towards the clients and towards the backends.
func bothDevices() []maps.Device {
	return []maps.Device{
		{Index: uint32(theKernel.front.index), MTU: mtu, MAC: edgeMAC},
		{Index: uint32(theKernel.back.index), MTU: mtu, MAC: backMAC},
	}
}

func (b backend) name() string { return fmt.Sprintf("b%d", b.id) }

func (b backend) nextHop() maps.NextHop {
	return maps.NextHop{
		Known: b.flags&bpf.FairleadBackendFlagBACKEND_NEIGHBOR != 0, Interface: uint32(b.ifindex), MAC: b.mac,
		SourceMAC: b.sourceMAC(), MTU: b.mtu, VLAN: b.tags,
	}
}

// apply makes the maps hold what the scene wants, and reads the ring that came of it. The manager numbers as it likes;
// that these are the scene's own numbers is checked.
func (s *managed) apply() {
	s.Helper()
	_, err := s.manager.Apply(s.wanted, func(address netip.Addr) maps.NextHop { return s.hops[address] })
	s.must(err)
	inventory, err := s.manager.Set().Inventory()
	s.must(err)
	for _, b := range inventory.Backends {
		if b.Name == otherService {
			continue
		}
		if b.ID == 0 || b.ID > uint32(len(s.backends)) || s.backends[b.ID-1].name() != b.Name {
			s.Fatalf("the manager gave backend %s the number %d", b.Name, b.ID)
		}
	}
	if found, ok := inventory.Service(s.service.id); !ok || found.AddrPort() != s.service.address {
		s.Fatalf("the manager gave number %d to %v, want %v", s.service.id, found, s.service.address)
	}
	var ring *ebpf.Map
	s.must(s.Rings.Lookup(s.service.id, &ring))
	defer ring.Close()
	s.service.ring = make([]uint32, managedRing)
	for slot := range s.service.ring {
		s.must(ring.Lookup(uint32(slot), &s.service.ring[slot]))
	}
}

// drain takes a backend out for new connections: its slots become the others'.
func (s *managed) drain(backend uint32) {
	s.Helper()
	s.wanted.Services[1].Backends[backend-1].Weight = 0
	s.apply()
}

// moveBackends makes the way to all backends lead by one device or the other, with these tags.
func (s *managed) moveBackends(back bool, tags [2]uint16) {
	s.Helper()
	to := theKernel.front.index
	if back {
		to = theKernel.back.index
	}
	for i := range s.backends {
		b := &s.backends[i]
		b.ifindex, b.tags = to, tags
		s.hops[b.address.Addr()] = b.nextHop()
	}
	_, err := s.manager.SetNextHops(s.hops)
	s.must(err)
}

// eachTagging runs a test for a new client whose frames are tagged in all ways, while those to the backends are in all
// ways too, and go by one device or the other.
func (s *managed) eachTagging(t *testing.T, test func(*conversation)) {
	for i, out := range hopTags {
		s.in(t)
		s.moveBackends(i%2 != 0, out)
		for _, in := range taggings {
			t.Run(fmt.Sprintf("%s/%#x", in.name, out), func(t *testing.T) {
				s.in(t)
				test(s.newClient().tagged(in))
			})
		}
	}
}

// forgetNeighbor makes a backend's next hop unknown, and findNeighbor known again.
func (s *managed) forgetNeighbor(backend uint32) {
	s.Helper()
	s.backends[backend-1].flags &^= bpf.FairleadBackendFlagBACKEND_NEIGHBOR
	s.moveNeighbor(backend)
}

func (s *managed) findNeighbor(backend uint32) {
	s.Helper()
	s.backends[backend-1].flags |= bpf.FairleadBackendFlagBACKEND_NEIGHBOR
	s.moveNeighbor(backend)
}

func (s *managed) moveNeighbor(backend uint32) {
	s.Helper()
	b := s.backends[backend-1]
	s.hops[b.address.Addr()] = b.nextHop()
	_, err := s.manager.SetNextHops(s.hops)
	s.must(err)
}

// deliver gives the data plane a frame and checks all that comes of it.
func (p *dataplane) deliver(frame []byte, from device, want expectation) {
	p.Helper()
	action, out := p.run(p.Fairlead, frame, from)
	p.check(frame, from, action, out, want)
}

// pass expects a frame to be left to the host's stack, every byte of it.
func (p *dataplane) pass(frame []byte, v verdict) {
	p.Helper()
	p.deliver(frame, theKernel.front, expectation{verdict: v, frame: frame})
}

// side is the device that a backend is behind.
func (b backend) side() device {
	if b.ifindex == theKernel.back.index {
		return theKernel.back
	}
	return theKernel.front
}

// way is a method, and for those that encapsulate the family of the outer packets.
type way struct {
	name   string
	method bpf.FairleadMethod
	outer  int // index into families; -1: none
}

var ways = []way{
	{"fullnat", fullnat, -1}, {"nat", nat, -1}, {"dsr", dsr, -1},
	{"ipip in ipv4", ipip, 0}, {"ipip in ipv6", ipip, 1}, {"gue in ipv4", gue, 0}, {"gue in ipv6", gue, 1},
}

// eachWay runs a test for both families and all ways, those alone that a filter lets through.
func eachWay(t *testing.T, takes func(bpf.FairleadMethod) bool, test func(*testing.T, family, way, plan)) {
	eachWayOf(t, families, takes, test)
}

// eachWayOf does the same for families of a test's choice.
func eachWayOf(t *testing.T, of []family, takes func(bpf.FairleadMethod) bool,
	test func(*testing.T, family, way, plan)) {
	t.Parallel()
	for _, w := range ways {
		if takes != nil && !takes(w.method) {
			continue
		}
		var p plan
		if w.outer >= 0 {
			p.outer = &families[w.outer]
		}
		for _, f := range of {
			t.Run(w.name+"/"+f.name, func(t *testing.T) {
				t.Parallel()
				test(t, f, w, p)
			})
		}
	}
}

// overhead is the length of a way's outer headers.
func (w way) overhead() uint32 {
	if w.outer < 0 {
		return 0
	}
	length := families[w.outer].ipHeader()
	if w.method == gue {
		length += 8
	}
	return length
}

// openAs opens a connection of the scene's protocol, to where both ends have been seen to talk.
func (c *conversation) openAs() *conversation {
	c.Helper()
	if c.protocol != unix.IPPROTO_UDP {
		return c.open()
	}
	c.send(c.segment(0, "question"), forwardNew)
	if rewrites(c.method) {
		c.reply(c.answer(0, "answer"), replyHalfOpen, confirmed)
		c.send(c.segment(0, "more"), forwardTable, matured)
		return c
	}
	// Where replies aren't seen, time shows that the client goes on: the entry is made to look older.
	c.ageHalfOpen(3 * time.Second)
	c.send(c.segment(0, "more"), forwardHalfOpen, confirmed)
	c.send(c.segment(0, "and more"), forwardTable, matured)
	return c
}

// ageHalfOpen makes the connection's half-open entry older.
func (c *conversation) ageHalfOpen(by time.Duration) {
	c.Helper()
	entry, found := c.halfOpen(c.client, c.scene.service.address)
	if !found {
		c.Fatalf("%s is not in the half-open table", c.client)
	}
	entry.First -= maps.Ticks(by)
	table, key := c.tupleIn(c.HalfOpen4, c.HalfOpen6, c.client, c.scene.service.address)
	c.must(table.Put(key, entry))
}
