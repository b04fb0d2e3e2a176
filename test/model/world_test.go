package model

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"fairlead/maps"
)

// world is a configuration: what the data plane was told, as the model knows it.
type world struct {
	plane   *plane
	devices devices

	wanted   maps.Wanted
	absent   map[string]bool // services and backends ("service/backend") that are out of the configuration
	hops     map[netip.Addr]maps.NextHop
	own      map[netip.Addr]bool
	sources  map[netip.Addr]maps.WantedSource
	tunnels  map[netip.Addr]bool // ends of tunnels
	services map[uint32]*service
	backends map[uint32]*backend
	keys     map[key]*service
	byNAT    map[key]bool // addresses, ports and protocols of backends by nat
	ours     map[netip.Addr]bool
}

// key is an address, a port and a protocol.
type key struct {
	at       netip.AddrPort
	protocol uint8
}

type service struct {
	id          uint32
	name        string
	protocol    uint8
	affinity    bool
	leaving     bool
	leavingKeys map[netip.AddrPort]bool
	ring        []maps.Slot
	members     []*backend
}

type backend struct {
	id      uint32
	service *service
	name    string
	address netip.Addr
	port    uint16
	method  maps.Method
	leaving bool
	hop     maps.NextHop
	tunnel  netip.Prefix
	sources []maps.WantedSource
}

func (b *backend) String() string {
	return fmt.Sprintf("%s/%s %v by %v", b.service.name, b.name, netip.AddrPortFrom(b.address, b.port), b.method)
}

// stateful tells a method that has to know each connection, and sees its replies.
func (b *backend) stateful() bool { return !b.method.Stateless() }

// at is where the backend gets a connection to a port of the service.
func (b *backend) at(service netip.AddrPort) netip.AddrPort {
	switch b.method {
	case maps.MethodFullNAT, maps.MethodNAT:
		if b.port != 0 {
			return netip.AddrPortFrom(b.address, b.port)
		}
		return netip.AddrPortFrom(b.address, service.Port())
	}
	return service
}

// Addresses of the world. Those of OwnHosts are XDP's own; the host holds the others.
var (
	serviceAddresses4 = []netip.Addr{addressOf("192.0.2.10"), addressOf("192.0.2.20"), addressOf("192.0.2.30"), addressOf("192.0.2.40")}
	serviceAddresses6 = []netip.Addr{addressOf("2001:db8:5::10"), addressOf("2001:db8:5::20"), addressOf("2001:db8:5::30"), addressOf("2001:db8:5::40")}
	sourceAddresses4  = []netip.Addr{addressOf("10.0.0.1"), addressOf("10.0.0.2")}
	sourceAddresses6  = []netip.Addr{addressOf("fd00::1"), addressOf("fd00::2")}
	ownAddresses      = []netip.Addr{
		serviceAddresses4[0], serviceAddresses4[2], serviceAddresses6[0], serviceAddresses6[2],
		sourceAddresses4[0], sourceAddresses6[0],
	}
)

// newWorld makes a configuration with services of every method, and gives it to the data plane.
func newWorld(p *plane, d devices, random *rand.Rand) (*world, error) {
	w := &world{
		plane: p, devices: d, absent: map[string]bool{}, hops: map[netip.Addr]maps.NextHop{},
		own: map[netip.Addr]bool{}, sources: map[netip.Addr]maps.WantedSource{}, tunnels: map[netip.Addr]bool{},
	}
	numbered := func(base string, first, n int) (list []netip.Addr) {
		for i := range n {
			bytes := addressOf(base).AsSlice()
			bytes[len(bytes)-1] = byte(first + i)
			a, _ := netip.AddrFromSlice(bytes)
			list = append(list, a)
		}
		return list
	}
	poolSize := uint16(random.IntN(2)*56 + 8) // ports of a source address: few or a bit more
	for _, a := range slices.Concat(sourceAddresses4, sourceAddresses6) {
		w.sources[a] = maps.WantedSource{Address: a, First: 20000, Last: 20000 + poolSize - 1}
	}
	sourcesFor := func(v6 bool) []maps.WantedSource {
		list := sourceAddresses4
		if v6 {
			list = sourceAddresses6
		}
		var all []maps.WantedSource
		for _, a := range list {
			all = append(all, w.sources[a])
		}
		return all
	}
	prefixes4 := []string{"10.9.0.0/24", "10.9.1.7/32", "10.9.2.128/25"}
	prefixes6 := []string{"fd00:9::/64", "fd00:9:1::7/128", "fd00:9:2::/120"}
	prefix := func(a netip.Addr) netip.Prefix {
		if a.Is4() {
			return netip.MustParsePrefix(prefixes4[random.IntN(len(prefixes4))])
		}
		return netip.MustParsePrefix(prefixes6[random.IntN(len(prefixes6))])
	}
	add := func(name string, protocol uint8, method maps.Method, affinity bool, port uint16, backends []netip.Addr, keys ...netip.AddrPort) {
		s := maps.WantedService{
			Name: name, Keys: keys, Protocol: protocol, RingSize: []uint32{251, 1009}[random.IntN(2)], AffinityClient: affinity,
			IdleTimeout: 24 * time.Hour, OnBackendDown: maps.DownReset,
		}
		for i, a := range backends {
			b := maps.WantedBackend{Name: fmt.Sprintf("b%d", i), Address: a, Port: port, Method: method, Weight: 1}
			switch method {
			case maps.MethodFullNAT:
				b.Sources = sourcesFor(a.Is6())
			case maps.MethodIPIP, maps.MethodGUE:
				b.Tunnel = prefix(a)
				w.tunnels[a] = true
			}
			s.Backends = append(s.Backends, b)
		}
		w.wanted.Services = append(w.wanted.Services, s)
	}
	v4 := func(i int, port uint16) netip.AddrPort { return netip.AddrPortFrom(serviceAddresses4[i], port) }
	v6 := func(i int, port uint16) netip.AddrPort { return netip.AddrPortFrom(serviceAddresses6[i], port) }
	const tcp, udp = protoTCP, protoUDP
	full4, full6 := numbered("10.1.0.0", 1, 3), numbered("fd00:1::", 1, 3)
	nat4, nat6 := numbered("10.2.0.0", 1, 4), numbered("fd00:2::", 1, 3)
	dsr4, dsr6 := numbered("10.3.0.0", 1, 4), numbered("fd00:3::", 1, 3)
	tunnel := slices.Concat(numbered("10.4.0.0", 1, 2), numbered("fd00:4::", 1, 2))

	add("full4", tcp, maps.MethodFullNAT, false, 8080, full4, v4(0, 443), v4(0, 8443), v4(1, 443))
	add("full4u", udp, maps.MethodFullNAT, false, 5300, full4[:2], v4(0, 443), v4(1, 5353))
	add("full6", tcp, maps.MethodFullNAT, true, 8080, full6, v6(0, 443))
	add("full6u", udp, maps.MethodFullNAT, false, 5300, full6, v6(1, 443), v6(0, 443))
	add("nat4a", tcp, maps.MethodNAT, false, 8000, nat4, v4(1, 80), v4(2, 81))
	add("nat4b", tcp, maps.MethodNAT, true, 8000, nat4[:3], v4(2, 80))
	add("nat4u", udp, maps.MethodNAT, false, 53, nat4[:2], v4(1, 53), v4(2, 5353))
	add("nat6", tcp, maps.MethodNAT, false, 8000, nat6, v6(1, 80))
	add("nat6u", udp, maps.MethodNAT, false, 53, nat6, v6(0, 53), v6(2, 53))
	add("dsr4", tcp, maps.MethodDSR, false, 443, dsr4, v4(2, 443))
	add("dsr4u", udp, maps.MethodDSR, true, 0, dsr4, v4(2, 53), v4(2, 123))
	add("dsr6", tcp, maps.MethodDSR, true, 8443, dsr6, v6(0, 8443))
	add("dsr6u", udp, maps.MethodDSR, false, 0, dsr6, v6(2, 123), v6(2, 443))
	add("ipip4", tcp, maps.MethodIPIP, false, 8443, tunnel, v4(2, 8443))
	add("ipip6", tcp, maps.MethodIPIP, false, 0, tunnel, v6(2, 443), v6(2, 80))
	add("ipip4u", udp, maps.MethodIPIP, true, 53, tunnel, v4(3, 53))
	add("gue4", tcp, maps.MethodGUE, true, 443, tunnel, v4(3, 443))
	add("gue4u", udp, maps.MethodGUE, false, 123, tunnel, v4(3, 123))
	add("gue6", tcp, maps.MethodGUE, false, 443, tunnel, v6(3, 443))
	add("gue6u", udp, maps.MethodGUE, false, 53, tunnel, v6(3, 53))
	add("empty", tcp, maps.MethodDSR, false, 9000, dsr4, v4(3, 9000))
	for i := range w.wanted.Services[len(w.wanted.Services)-1].Backends {
		w.wanted.Services[len(w.wanted.Services)-1].Backends[i].Weight = 0
	}
	// One whose backends have every method, as while a method is being changed.
	add("mixed", tcp, maps.MethodDSR, false, 8080, dsr4[:1], v4(3, 8080))
	mixed := &w.wanted.Services[len(w.wanted.Services)-1]
	mixed.Backends = append(mixed.Backends,
		maps.WantedBackend{Name: "full", Address: full4[0], Port: 8080, Method: maps.MethodFullNAT, Weight: 1, Sources: sourcesFor(false)},
		maps.WantedBackend{Name: "nat", Address: nat4[0], Port: 8000, Method: maps.MethodNAT, Weight: 1},
		maps.WantedBackend{Name: "gue", Address: tunnel[2], Port: 8080, Method: maps.MethodGUE, Weight: 1, Tunnel: prefix(tunnel[2])},
	)

	for _, s := range w.wanted.Services {
		for _, b := range s.Backends {
			if _, ok := w.hops[b.Address]; !ok {
				w.hops[b.Address] = w.newHop(random, b.Address)
			}
		}
	}
	for _, a := range ownAddresses {
		w.own[a] = true
	}
	if err := p.manager.SetOwn(ownAddresses); err != nil {
		return nil, err
	}
	var told []maps.Device
	for _, one := range d {
		if one.told {
			told = append(told, maps.Device{Index: one.index, MTU: one.mtu, MAC: one.mac})
		}
	}
	if err := p.manager.SetDevices(told); err != nil {
		return nil, err
	}
	return w, w.apply()
}

// newHop is a random next hop. IPv6's least MTU holds for ways that IPv6 packets take.
func (w *world) newHop(random *rand.Rand, a netip.Addr) maps.NextHop {
	d := w.devices[random.IntN(3)]
	hop := maps.NextHop{
		Known: true, Interface: d.index, SourceMAC: d.mac,
		MTU: []uint32{1500, 1500, 1400, 9000, 1300, 600, 0}[random.IntN(7)],
		MAC: mac{2, 0xbe, byte(random.IntN(256)), byte(random.IntN(256)), byte(random.IntN(256)), byte(random.IntN(256))},
	}
	if hop.MTU == 600 && (a.Is6() || w.tunnels[a]) {
		hop.MTU = 1280
	}
	switch random.IntN(4) {
	case 0:
		hop.VLAN = [2]uint16{uint16(1 + random.IntN(4094)), 0}
	case 1:
		hop.VLAN = [2]uint16{uint16(1+random.IntN(4094)) | maps.Tag8021AD, uint16(1 + random.IntN(4094))}
	}
	return hop
}

func (w *world) hop(a netip.Addr) maps.NextHop { return w.hops[a] }

// present is the configuration without what is out of it.
func (w *world) present() (wanted maps.Wanted) {
	for _, s := range w.wanted.Services {
		if w.absent[s.Name] {
			continue
		}
		s.Backends = slices.Clone(s.Backends)
		s.Backends = slices.DeleteFunc(s.Backends, func(b maps.WantedBackend) bool { return w.absent[s.Name+"/"+b.Name] })
		wanted.Services = append(wanted.Services, s)
	}
	return wanted
}

// apply makes the maps hold the configuration, and reads back which numbers its parts have.
func (w *world) apply() error {
	if _, err := w.plane.manager.Apply(w.present(), w.hop); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	return w.refresh()
}

// refresh reads what the maps hold: numbers, rings, and who is leaving. What is known of a backend beside that is the
// configuration's.
func (w *world) refresh() error {
	set := w.plane.manager.Set()
	inv, err := set.Inventory()
	if err != nil {
		return err
	}
	known := w.backends
	w.services, w.backends, w.keys = map[uint32]*service{}, map[uint32]*backend{}, map[key]*service{}
	w.byNAT, w.ours = map[key]bool{}, map[netip.Addr]bool{}
	for _, have := range inv.Services {
		s := &service{
			id: have.ID, name: have.Name, protocol: have.Protocol, affinity: have.AffinityClient, leaving: have.Leaving,
			leavingKeys: map[netip.AddrPort]bool{},
		}
		for _, at := range have.LeavingKeys() {
			s.leavingKeys[at] = true
		}
		if s.ring, err = set.Ring(s.id); err != nil && !errors.Is(err, maps.ErrNoRing) {
			return err
		}
		w.services[s.id] = s
		for _, at := range have.Keys {
			w.keys[key{at, s.protocol}] = s
			w.ours[at.Addr()] = true
		}
	}
	for _, have := range inv.Backends {
		s := w.services[have.Service]
		if s == nil {
			continue
		}
		b := known[have.ID]
		if b == nil || b.name != have.Name || b.address != have.Address || b.port != have.Port || b.method != have.Method ||
			b.service.name != s.name {
			b = &backend{id: have.ID, name: have.Name, address: have.Address, port: have.Port, method: have.Method}
		}
		b.service, b.leaving, b.hop = s, have.Leaving, w.hops[have.Address]
		for _, ws := range w.wanted.Services {
			for _, wb := range ws.Backends {
				if ws.Name == s.name && wb.Name == b.name {
					b.tunnel, b.sources = wb.Tunnel, wb.Sources
				}
			}
		}
		w.backends[b.id] = b
		s.members = append(s.members, b)
		if b.method == maps.MethodNAT {
			w.byNAT[key{netip.AddrPortFrom(b.address, b.port), s.protocol}] = true
		}
	}
	for _, have := range inv.Sources {
		w.ours[have.Address] = true
	}
	return nil
}

// isOwn tells an address of XDP's own: announced, and a service's or a source address.
func (w *world) isOwn(a netip.Addr) bool { return w.own[a] && w.ours[a] }

// isSource tells a source address and port of ours.
func (w *world) isSource(at netip.AddrPort) bool {
	s, ok := w.sources[at.Addr()]
	return ok && w.ours[at.Addr()] && at.Port() >= s.First && at.Port() <= s.Last
}

// usable tells a backend that takes new connections.
func (b *backend) usable() bool { return b.hop.Known && !b.leaving }

// choices are the backends that the ring may give a new connection to, in their order: its own slot's, then those of the
// slots that its hash leads on to.
func (w *world) choices(s *service, t maps.Tuple) (list []*backend) {
	if len(s.ring) == 0 {
		return nil
	}
	hash := t.Hash()
	if s.affinity {
		hash = maps.HashClient(t.Source.Addr())
	}
	slot := s.ring[maps.SlotOf(hash, uint32(len(s.ring)))]
	if b := w.backends[slot.Backend]; b != nil {
		list = append(list, b)
	}
	return list
}

// outerSource is where an encapsulated packet of a hash comes from.
func (b *backend) outerSource(hash uint64) netip.Addr {
	bytes := b.tunnel.Masked().Addr().AsSlice()
	bits := min(b.tunnel.Addr().BitLen()-b.tunnel.Bits(), 32)
	var mask, varying [4]byte
	binary.BigEndian.PutUint32(mask[:], uint32(uint64(1)<<bits-1))
	binary.LittleEndian.PutUint32(varying[:], uint32(hash))
	last := bytes[len(bytes)-4:]
	for i := range last {
		last[i] |= varying[i] & mask[i]
	}
	a, _ := netip.AddrFromSlice(bytes)
	return a
}

// change is a random change of the configuration, or the turn of an epoch. It answers what it was.
func (w *world) change(random *rand.Rand) (what string, err error) {
	s := &w.wanted.Services[random.IntN(len(w.wanted.Services))]
	b := &s.Backends[random.IntN(len(s.Backends))]
	switch random.IntN(6) {
	case 0:
		if err := w.plane.manager.Turn(); err != nil {
			return "", err
		}
		return "turn", w.refresh()
	case 1:
		if s.Name != "empty" {
			b.Weight = uint32(random.IntN(4))
		}
		return fmt.Sprintf("weight %s/%s %d", s.Name, b.Name, b.Weight), w.apply()
	case 2:
		hop := w.newHop(random, b.Address)
		hop.Known = random.IntN(3) > 0
		if !hop.Known {
			hop = maps.NextHop{Reason: "no answer"}
		}
		w.hops[b.Address] = hop
		if _, err := w.plane.manager.SetNextHops(map[netip.Addr]maps.NextHop{b.Address: hop}); err != nil {
			return "", err
		}
		if random.IntN(2) == 0 { // a moment passes before the rings are made to fit
			return fmt.Sprintf("hop %v %+v", b.Address, hop), w.refresh()
		}
		return fmt.Sprintf("hop %v %+v, applied", b.Address, hop), w.apply()
	case 3:
		at := s.Name + "/" + b.Name
		w.absent[at] = !w.absent[at]
		return fmt.Sprintf("absent %s %t", at, w.absent[at]), w.apply()
	case 4:
		if random.IntN(4) > 0 {
			return "nothing", nil
		}
		w.absent[s.Name] = !w.absent[s.Name]
		return fmt.Sprintf("absent %s %t", s.Name, w.absent[s.Name]), w.apply()
	}
	news := map[netip.Addr]maps.NextHop{}
	for _, s := range w.wanted.Services { // all are reachable again
		for _, b := range s.Backends {
			if !w.hops[b.Address].Known {
				w.hops[b.Address] = w.newHop(random, b.Address)
				news[b.Address] = w.hops[b.Address]
			}
		}
	}
	if _, err := w.plane.manager.SetNextHops(news); err != nil {
		return "", err
	}
	return "reachable", w.apply()
}
