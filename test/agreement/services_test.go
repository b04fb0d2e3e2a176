package agreement

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/maps"
)

const (
	farmSize    = 300  // what a service may have at most
	sourcePorts = 2048 // of one source address
)

// ringSizes are primes with room for the whole farm.
var ringSizes = []uint32{307, 1009, 4099, 10007, 16381, 32749, 65537}

// farm is the addresses that the services of one data plane take their backends from: a host may serve several. The
// port pools of fullnat belong to these addresses and are shared.
type farm struct {
	places []maps.WantedBackend // without name and weight
	hops   map[netip.Addr]maps.NextHop
	drawn  map[netip.Addr]bool // addresses that are something else already
}

func (p *dataplane) newFarm(size int, methods []maps.Method) farm {
	p.farm = farm{hops: make(map[netip.Addr]maps.NextHop), drawn: make(map[netip.Addr]bool)}
	draw := func() netip.Addr {
		address := p.address()
		p.farm.drawn[address] = true
		return address
	}
	var sources []maps.WantedSource
	for range 3 {
		first := uint16(1024 + p.random.IntN(30000))
		sources = append(sources, maps.WantedSource{Address: draw(), First: first, Last: first + sourcePorts - 1})
	}
	for i := range size {
		place := maps.WantedBackend{Address: draw(), Port: p.port(), Method: methods[i%len(methods)]}
		if place.Method == maps.MethodIPIP || place.Method == maps.MethodGUE {
			from := draw()
			place.Tunnel = netip.PrefixFrom(from, from.BitLen()-p.random.IntN(9)).Masked()
		}
		if place.Method == maps.MethodFullNAT {
			place.Sources = sources[i%len(sources):][:1]
			if i%16 == 0 {
				place.Sources = sources
			}
		}
		p.farm.places = append(p.farm.places, place)
		p.farm.hops[place.Address] = maps.NextHop{
			Known: true, Interface: loopback, MAC: hopMAC(i), SourceMAC: [6]byte{0x02, 0xed}, MTU: 1500,
		}
	}
	return p.farm
}

func (p *dataplane) hop(address netip.Addr) maps.NextHop { return p.farm.hops[address] }

// service is one service, with the ring that Go builds for it.
type service struct {
	maps.WantedService
	places    []int   // of each backend, in the farm
	ring      []int32 // by maps.BuildRing alone
	slots     []int   // of each backend
	inventory *maps.Inventory
	entry     maps.Service
	named     int // names given so far
}

func (s *service) address() netip.AddrPort { return s.Keys[0] }

func (s *service) String() string {
	affinity := "connection"
	if s.AffinityClient {
		affinity = "client"
	}
	return fmt.Sprintf("service %s at %v (%d backends, %d slots, affinity by %s)",
		s.Name, s.address(), len(s.Backends), s.RingSize, affinity)
}

// predict is Go's answer: the place in s.Backends of where a client's new connection goes, -1 for nobody.
func (s *service) predict(client netip.AddrPort) int {
	hash := maps.Tuple{Source: client, Destination: s.address(), Protocol: unix.IPPROTO_TCP}.Hash()
	if s.AffinityClient {
		hash = maps.HashClient(client.Addr())
	}
	return int(s.ring[maps.SlotOf(hash, s.RingSize)])
}

// newService is a service of random address, ring size, affinity and backends.
func (p *dataplane) newService(number int) *service {
	p.Helper()
	s := &service{WantedService: maps.WantedService{
		Name: fmt.Sprintf("service%d", number), Keys: []netip.AddrPort{netip.AddrPortFrom(p.address(), p.port())},
		Protocol: unix.IPPROTO_TCP, RingSize: ringSizes[p.random.IntN(len(ringSizes))],
		AffinityClient: p.random.IntN(3) == 0,
		IdleTimeout:    time.Hour,
	}}
	// Few backends are as usual as many.
	count := 1 + p.random.IntN(len(p.farm.places))
	if p.random.IntN(2) == 0 {
		count = 1 + p.random.IntN(10)
	}
	for _, place := range p.random.Perm(len(p.farm.places))[:count] {
		p.addBackend(s, place)
	}
	p.weigh(s, func() bool { return true })
	p.apply(s)
	return s
}

// change gives a service another set of backends and weights: some go, some come, some weigh more or less.
func (p *dataplane) change(s *service) {
	p.Helper()
	p.random.Shuffle(len(s.Backends), func(i, j int) {
		s.Backends[i], s.Backends[j] = s.Backends[j], s.Backends[i]
		s.places[i], s.places[j] = s.places[j], s.places[i]
	})
	leave := p.random.IntN(len(s.Backends)/4 + 1)
	s.Backends, s.places = s.Backends[leave:], s.places[leave:]
	for range p.random.IntN(4) {
		if place := p.random.IntN(len(p.farm.places)); !slices.Contains(s.places, place) {
			p.addBackend(s, place)
		}
	}
	p.weigh(s, func() bool { return p.random.IntN(2) == 0 })
	p.apply(s)
}

func (p *dataplane) addBackend(s *service, place int) {
	b := p.farm.places[place]
	s.named++
	b.Name = fmt.Sprintf("ws%d", s.named)
	s.Backends = append(s.Backends, b)
	s.places = append(s.places, place)
}

// weigh gives new weights, up to 100, to some backends; now and then none has any.
func (p *dataplane) weigh(s *service, some func() bool) {
	most := 1 + p.random.Uint32N(100)
	if p.random.IntN(15) == 0 {
		most, some = 0, func() bool { return true }
	}
	for i := range s.Backends {
		if some() {
			s.Backends[i].Weight = p.random.Uint32N(most + 1)
		}
	}
}

// apply lets the map manager write the service, as the only one wanted, and Go build its ring beside it.
func (p *dataplane) apply(s *service) {
	p.Helper()
	_, err := p.manager.Apply(maps.Wanted{Services: []maps.WantedService{s.WantedService}}, p.hop)
	p.must(err)
	members := make([]maps.Member, len(s.Backends))
	for i, b := range s.Backends {
		members[i] = maps.Member{Name: b.Name, Weight: b.Weight}
	}
	s.ring, err = maps.BuildRing(s.RingSize, members)
	p.must(err)
	s.slots = make([]int, len(members))
	for _, member := range s.ring {
		if member >= 0 {
			s.slots[member]++
		}
	}
	s.inventory, err = p.manager.Set().Inventory()
	p.must(err)
	i := slices.IndexFunc(s.inventory.Services, func(have maps.Service) bool { return have.AddrPort() == s.address() })
	if i < 0 {
		p.Fatalf("%v is not in the maps", s)
	}
	s.entry = s.inventory.Services[i]
	p.tally.sets++
}
