package maps

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// HalfOpenLife is how long a connection may stay half-open, counted from its first SYN.
const HalfOpenLife = 75 * time.Second

// Wanted is a whole configuration as the maps are to hold it.
type Wanted struct{ Services []WantedService }

// WantedService is a service and its backends.
type WantedService struct {
	Name           string
	Keys           []netip.AddrPort // at least one; all of one family
	Protocol       uint8
	RingSize       uint32 // a prime
	AffinityClient bool
	OnBackendDown  DownPolicy
	IdleTimeout    time.Duration
	Standing       Standing
	Backends       []WantedBackend
}

// WantedBackend is a backend. A backend of another address, port or method is another backend, whatever its name.
type WantedBackend struct {
	Name    string
	Address netip.Addr
	Port    uint16 // 0: as the client's packet has it
	Method  Method
	Weight  uint32 // 0: no new connections
	// Percent is how much of its weight it has in the ring, 1 to 100; 0: all.
	Percent uint32
	Out     bool // no new connections, whatever its weight
	// Down: what was opened before is dealt with by the service's policy. Tried: newcomers are tried on it all the same;
	// else it is Out.
	Down, Tried bool
	Shown       Shown
	// Sources are fullnat's source addresses towards this backend, at most 16.
	Sources []WantedSource
	// Tunnel is what ipip and gue take outer source addresses from: the connection chooses among them.
	Tunnel netip.Prefix
}

// WantedSource is a source address and its ports, both ends included.
type WantedSource struct {
	Address     netip.Addr
	First, Last uint16
}

// ErrFixed is what Apply answers when something is to change that can't be changed on a living service. Nothing was changed.
var ErrFixed = errors.New("can't be changed while it is in use")

type serviceKey struct {
	address  netip.Addr
	port     uint16
	protocol uint8
}

// identity is what makes a backend the same backend.
type identity struct {
	service uint32
	name    string
	address netip.Addr
	port    uint16
	method  Method
}

type poolKey struct {
	address  netip.Addr
	port     uint16
	protocol uint8
	source   uint32
}

func keyOf(a netip.AddrPort, protocol uint8) serviceKey {
	return serviceKey{a.Addr(), a.Port(), protocol}
}

func identityOf(b *Backend) identity { return identity{b.Service, b.Name, b.Address, b.Port, b.Method} }

// Manager is the one writer of the maps. Its methods may be called from any goroutine.
type Manager struct {
	set        *Set
	tend, fill *ebpf.Program
	epoch      time.Duration
	log        *slog.Logger

	revision atomic.Uint64
	tendLock sync.Mutex // held while `tend` runs, and when it is changed; last of the two

	mu       sync.Mutex
	services map[uint32]*Service
	backends map[uint32]*Backend
	sources  map[uint32]*Source
	pools    map[poolKey]uint32
	rings    map[uint32]*liveRing
	pending  []pendingPool        // numbered, to be filled by this Apply
	wanted   map[netip.Addr]bool  // source addresses in the configuration
	reserved map[portKey]*portSet // ports of connections about to be restored

	own          map[netip.Addr]bool       // addresses of XDP's own
	addresses    map[netip.Addr]AddressUse // as the maps have them
	natBackends  map[serviceKey]uint32     // as the maps have them
	paths        map[bpf.FairleadPathKey]bool
	checkPorts   []uint16 // that checks through their method come from, and the addresses
	checkSources map[netip.Addr]bool
	emptyKeys    map[serviceKey]int // leaving keys of services: walks in a row that met no connection to them

	granted uint32         // tick from which idleness counts: nobody turned epochs before
	turned  uint32         // tick of the last epoch turned
	empty   map[uint32]int // leaving backends: walks in a row that met no connection of theirs
	// emptyPools is the same for port pools that no backend has any more.
	emptyPools  map[uint32]int
	poolNumbers map[uint32]bool
	nextPool    uint32    // no number below is free
	barrier     *ebpf.Map // an inner map for the entry that is updated to wait for the data plane
}

// liveRing is a service's ring in the maps.
type liveRing struct {
	m         *ebpf.Map
	words     []uint32
	members   []Member // that it was built of, and their numbers; nil: not known
	ids       []uint32
	unsettled bool
}

// ManagerOptions are what a Manager needs beside the maps.
type ManagerOptions struct {
	Tend, Fill *ebpf.Program // the data plane's programs of these names
	Epoch      time.Duration // how long an epoch is; at most 10 s
	Logger     *slog.Logger  // default: slog.Default()
}

// barrierSlot is an entry of the map of rings that no service is given: updating it waits for the data plane.
const barrierSlot = uint32(bpf.FairleadLimitsMAX_SERVICES) - 1

// NewManager takes over what the maps hold: after a crash as well as after a stop. It settles what was left unsettled, and
// grants every connection a full timeout, as nobody knows what the fast path forwarded meanwhile.
func NewManager(raw *bpf.FairleadMaps, opts ManagerOptions) (*Manager, error) {
	set, err := newSet(raw, true)
	if err != nil {
		return nil, err
	}
	m := &Manager{
		set: set, tend: opts.Tend, fill: opts.Fill, epoch: opts.Epoch, log: cmp.Or(opts.Logger, slog.Default()),
		services: make(map[uint32]*Service), backends: make(map[uint32]*Backend), sources: make(map[uint32]*Source),
		pools: make(map[poolKey]uint32), rings: make(map[uint32]*liveRing), empty: make(map[uint32]int), emptyPools: make(map[uint32]int),
		poolNumbers: make(map[uint32]bool), own: make(map[netip.Addr]bool), natBackends: make(map[serviceKey]uint32),
		paths: make(map[bpf.FairleadPathKey]bool), emptyKeys: make(map[serviceKey]int),
		granted: Now(), turned: Now(),
	}
	if err := m.adopt(); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// SetPrograms hands over the programs of a newly loaded data plane. The old ones may be closed afterwards.
func (m *Manager) SetPrograms(tend, fill *ebpf.Program) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tendLock.Lock()
	defer m.tendLock.Unlock()
	m.tend, m.fill = tend, fill
}

// Set is the typed view of the Manager's maps.
func (m *Manager) Set() *Set { return m.set }

// Close gives up the Manager's own handles. The maps stay as they are.
func (m *Manager) Close() error {
	for _, r := range m.rings {
		r.m.Close()
	}
	if m.barrier != nil {
		m.barrier.Close()
	}
	return m.set.Close()
}

func (m *Manager) adopt() error {
	inv, err := m.set.Inventory()
	if err != nil {
		return err
	}
	for i := range inv.Services {
		s := &inv.Services[i]
		s.written = true
		m.services[s.ID] = s
		rm, err := m.set.ringMap(s.ID)
		if err != nil {
			return err
		}
		r := &liveRing{m: rm}
		m.rings[s.ID] = r
		if r.words, err = ringWords(rm); err != nil {
			return err
		}
		r.unsettled = slices.ContainsFunc(r.words, func(w uint32) bool { return w&slotUnsettled != 0 })
	}
	for i := range inv.Sources {
		m.sources[inv.Sources[i].ID] = &inv.Sources[i]
		if err := m.putSourceNumber(&inv.Sources[i]); err != nil { // a killed daemon may not have come to it
			return err
		}
	}
	for i := range inv.Backends {
		b := &inv.Backends[i]
		b.written = true
		m.backends[b.ID] = b
	}
	if err := walkTable(m.set.raw.Pools, func(id *uint32, v *bpf.FairleadPool) error {
		if v.Family != 0 {
			m.pools[poolKey{wordsAddress(v.Family, v.Address), portWire(v.Port), v.Protocol, v.Source}] = *id
			m.poolNumbers[*id] = true
		}
		return nil
	}); err != nil {
		return err
	}
	if m.barrier, err = newRingMap(1); err != nil {
		return err
	}
	if m.addresses, err = m.set.Addresses(); err != nil {
		return err
	}
	for a, use := range m.addresses {
		if use&AddressOwn != 0 {
			m.own[a] = true
		}
	}
	if err := m.adoptNear(); err != nil {
		return err
	}
	if err := walkTable(m.set.raw.Paths, func(k *bpf.FairleadPathKey, _ *bpf.FairleadPath) error {
		m.paths[*k] = true
		return nil
	}); err != nil {
		return err
	}
	// A rebuild of the exception bitmap that was cut short: the one in use is whole.
	m.set.Control.setExceptionBoth(false)
	return m.sweep()
}

// Apply makes the maps hold what is wanted, changing only what differs, in an order in which no packet meets a half-made
// service: source addresses, backends with their port pools, rings, services. What is no longer wanted is out for new
// connections at once and stays until its last connection has ended. It answers the changes, a line each, for people.
// Errors: ErrFixed, before anything is changed.
func (m *Manager) Apply(w Wanted, hop func(netip.Addr) NextHop) (changes []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.refuse(w); err != nil {
		return nil, err
	}
	m.revision.Add(1)
	say := func(format string, args ...any) { changes = append(changes, fmt.Sprintf(format, args...)) }

	m.wanted = make(map[netip.Addr]bool)
	plans := make([]*plan, len(w.Services))
	known := make(map[identity]*Backend, len(m.backends))
	for _, b := range m.backends {
		known[identityOf(b)] = b
	}
	var write []*Backend
	for i := range w.Services {
		if plans[i], err = m.planFor(&w.Services[i]); err != nil {
			return changes, err
		}
		changed, err := m.backendsFor(plans[i], known, hop, say)
		if err != nil {
			return changes, err
		}
		write = append(write, changed...)
	}
	if err := m.putPools(); err != nil {
		return changes, err
	}
	if err := errors.Join(m.putAddresses(), m.putNear(false), m.putPaths()); err != nil {
		return changes, err
	}
	for _, b := range write {
		if err := m.writeBackend(b); err != nil {
			return changes, err
		}
	}
	swapped, err := m.putRings(plans)
	if err != nil {
		return changes, err
	}
	keep := make(map[uint32]bool) // services
	stay := make(map[uint32]bool) // backends
	for _, p := range plans {
		keep[p.service.ID] = true
		for _, id := range p.ids {
			stay[id] = true
		}
		if p.fresh {
			say("service %s added: %v, %d backends", p.want.Name, p.service.AddrPort(), len(p.ids))
		}
		if err := m.putService(p.service, p.want, say); err != nil {
			return changes, err
		}
	}
	for _, s := range m.services {
		if keep[s.ID] || s.Leaving && !s.dirty {
			continue
		}
		if !s.written { // of an Apply that failed before it came to it
			if r := m.rings[s.ID]; r != nil {
				r.m.Close()
				delete(m.rings, s.ID)
			}
			delete(m.services, s.ID)
			continue
		}
		s.Leaving, s.dirty = true, true
		say("service %s leaving: no new connections", s.Name)
		if err := m.writeService(s); err != nil {
			return changes, err
		}
	}
	for _, b := range m.backends {
		if stay[b.ID] || b.Leaving && !b.dirty {
			continue
		}
		if !b.written {
			delete(m.backends, b.ID)
			continue
		}
		b.Leaving, b.dirty = true, true
		say("backend %s leaving: no new connections", m.fullName(b))
		if err := m.writeBackend(b); err != nil {
			return changes, err
		}
	}
	if swapped {
		if err := m.sweep(); err != nil {
			return changes, err
		}
	}
	if err := errors.Join(m.putAddresses(), m.putNear(true)); err != nil {
		return changes, err
	}
	slices.Sort(changes)
	return changes, nil
}

func (m *Manager) fullName(b *Backend) string {
	if s := m.services[b.Service]; s != nil {
		return s.Name + "/" + b.Name
	}
	return b.Name
}

// Refuse says what Apply would refuse of a wanted configuration, and changes nothing. Errors: ErrFixed.
func (m *Manager) Refuse(w Wanted) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.refuse(w)
}

// refuse says what of a wanted configuration can't be had, all of it, before anything is changed.
func (m *Manager) refuse(w Wanted) error {
	var errs []error
	ranges := make(map[netip.Addr]WantedSource)
	for _, s := range m.sources {
		ranges[s.Address] = WantedSource{s.Address, s.First, s.Last}
	}
	claimed := make(map[*Service]string)
	for i := range w.Services {
		ws := &w.Services[i]
		olds := m.find(ws)
		if len(olds) > 1 {
			errs = append(errs, fmt.Errorf("service %s: its addresses and ports are yet those of services %s and %s, %w: "+
				"take one's out first, and reload when its connections have ended, or unload first", ws.Name, olds[0].Name,
				olds[1].Name, ErrFixed))
			continue
		}
		for _, old := range olds {
			if other, ok := claimed[old]; ok {
				errs = append(errs, fmt.Errorf("service %s: its addresses and ports are yet those of service %s, of which "+
					"%s takes others, %w: take them out first, and reload when their connections have ended, or unload first",
					ws.Name, old.Name, other, ErrFixed))
				continue
			}
			claimed[old] = ws.Name
			if old.RingSize != ws.RingSize {
				errs = append(errs, fmt.Errorf("service %s: ring_size %d, living with %d, %w: give the service another "+
					"address or port, or unload first", ws.Name, ws.RingSize, old.RingSize, ErrFixed))
			}
			if old.AffinityClient != ws.AffinityClient {
				errs = append(errs, fmt.Errorf("service %s: affinity %w: give the service another address or port, "+
					"or unload first", ws.Name, ErrFixed))
			}
		}
		for _, b := range ws.Backends {
			if len(b.Sources) > int(bpf.FairleadLimitsMAX_POOLS_A_BACKEND) {
				errs = append(errs, fmt.Errorf("backend %s/%s: %d source addresses: at most %d are possible",
					ws.Name, b.Name, len(b.Sources), bpf.FairleadLimitsMAX_POOLS_A_BACKEND))
			}
			for _, src := range b.Sources {
				if old, ok := ranges[src.Address]; ok && old != src {
					errs = append(errs, fmt.Errorf("service %s: source_ports %d-%d of %v, living with %d-%d, %w: use "+
						"another source address, or unload first", ws.Name, src.First, src.Last, src.Address, old.First,
						old.Last, ErrFixed))
				}
				ranges[src.Address] = src
			}
		}
	}
	return errors.Join(errs...)
}

// find returns the living services that have any of a wanted one's addresses and ports, by number.
func (m *Manager) find(ws *WantedService) (found []*Service) {
	wanted := make(map[netip.AddrPort]bool, len(ws.Keys))
	for _, key := range ws.Keys {
		wanted[key] = true
	}
	for _, s := range m.services {
		if s.Protocol == ws.Protocol && slices.ContainsFunc(s.Keys, func(key netip.AddrPort) bool { return wanted[key] }) {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b *Service) int { return int(a.ID) - int(b.ID) })
	return found
}

func freeNumber[T any](used map[uint32]T, limit uint32, what string) (uint32, error) {
	for id := range limit {
		if _, taken := used[id]; !taken {
			return id, nil
		}
	}
	return 0, fmt.Errorf("no number left for another %s: %d are in use", what, limit)
}

// plan is what is to become of one wanted service.
type plan struct {
	want    *WantedService
	service *Service
	fresh   bool // the maps don't hold it yet
	members []Member
	ids     []uint32 // numbers of the members
}

func (m *Manager) planFor(ws *WantedService) (*plan, error) {
	if found := m.find(ws); len(found) > 0 {
		s := found[0]
		p := &plan{want: ws, service: s}
		// New ones are there for the look at addresses and ports before they lead anywhere.
		for _, key := range ws.Keys {
			if !slices.Contains(s.Keys, key) {
				s.Keys = append(s.Keys, key)
				s.dirty = true
			}
		}
		return p, nil
	}
	id, err := freeNumber(m.services, barrierSlot, "service")
	if err != nil {
		return nil, err
	}
	s := &Service{
		ID: id, Name: ws.Name, Keys: slices.Clone(ws.Keys), Protocol: ws.Protocol, RingSize: ws.RingSize,
		AffinityClient: ws.AffinityClient, leavingKeys: make(map[netip.AddrPort]bool),
	}
	if err := zeroPerCPU[bpf.FairleadTraffic](m.set.raw.ServiceTraffic, id); err != nil {
		return nil, err
	}
	m.services[id] = s
	return &plan{want: ws, service: s, fresh: true}, nil
}

// backendsFor finds or makes a service's backends and answers those whose entry has to be written.
func (m *Manager) backendsFor(p *plan, known map[identity]*Backend, hop func(netip.Addr) NextHop,
	say func(string, ...any)) (write []*Backend, err error) {
	for i := range p.want.Backends {
		wb := &p.want.Backends[i]
		key := identity{p.service.ID, wb.Name, wb.Address, wb.Port, wb.Method}
		b := known[key]
		before := Backend{}
		if b != nil {
			before = *b
			if before.Leaving {
				say("backend %s/%s is back", p.want.Name, b.Name)
			} else if before.Weight != wb.Weight {
				say("backend %s/%s: weight %d, was %d", p.want.Name, b.Name, wb.Weight, before.Weight)
			}
			if before.Up == wb.Down {
				say("backend %s/%s: %s", p.want.Name, b.Name, map[bool]string{true: "down", false: "up"}[wb.Down])
			}
		} else {
			id, err := freeNumber(m.backends, uint32(bpf.FairleadLimitsMAX_BACKENDS), "backend")
			if err != nil {
				return nil, err
			}
			b = &Backend{
				ID: id, Service: p.service.ID, Name: wb.Name, Address: wb.Address, Port: wb.Port, Method: wb.Method,
				protocol: p.service.Protocol,
			}
			if err := zeroPerCPU[bpf.FairleadTraffic](m.set.raw.BackendTraffic, id); err != nil {
				return nil, err
			}
			say("backend %s/%s added: %v by %v", p.want.Name, b.Name, netip.AddrPortFrom(b.Address, b.Port), b.Method)
			m.backends[id], known[key] = b, b
		}
		b.Weight, b.Leaving, b.Tunnel, b.Shown = wb.Weight, false, varying(wb.Tunnel), wb.Shown
		b.Shown.Percent = cmp.Or(wb.Percent, 100)
		b.setDown(wb.Down, wb.Tried)
		b.NextHop = b.NextHop.followedBy(hop(b.Address), b.Method)
		if b.pools, err = m.poolsFor(b, wb.Sources); err != nil {
			return nil, err
		}
		if !slices.Equal(before.pools, b.pools) || before.Weight != b.Weight || before.Leaving || before.Up != b.Up ||
			before.Tried != b.Tried || before.Shown != b.Shown || before.NextHop != b.NextHop ||
			before.Tunnel != b.Tunnel || b.dirty || !b.written {
			b.dirty = true
			write = append(write, b)
		}
		delete(m.empty, b.ID)
		member := Member{Name: b.Name, Weight: b.Weight * b.Shown.Percent}
		if wb.Out || wb.Down && !wb.Tried {
			member.Weight = 0
		}
		p.members = append(p.members, member)
		p.ids = append(p.ids, b.ID)
	}
	// Who can't be reached takes no new connections, as long as another can.
	reachable := func(i int) bool { return p.members[i].Weight > 0 && m.backends[p.ids[i]].NextHop.Known }
	any := false
	for i := range p.ids {
		any = any || reachable(i)
	}
	for i := range p.ids {
		if any && !reachable(i) {
			p.members[i].Weight = 0
		}
	}
	return write, nil
}

// setDown answers whether that changes anything.
func (b *Backend) setDown(down, tried bool) bool {
	tried = down && tried
	if b.Up == !down && b.Tried == tried {
		return false
	}
	if down && (b.Up || !b.written) {
		b.downAt = Now() + 1 // what was opened in this very tick is lost as well
	}
	b.Up, b.Tried = !down, tried
	return true
}

// SetDown asks judge of each backend whether it is down, and whether newcomers are tried on it; not known: it stays as
// it is. It answers those that went down or came up. Rings stay as they are: Apply makes them fit.
func (m *Manager) SetDown(judge func(service string, b *Backend) (down, tried, known bool)) (turned []Backend, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.backends {
		s := m.services[b.Service]
		if s == nil || !b.written {
			continue
		}
		before := b.Up
		down, tried, known := judge(s.Name, b)
		if !known || !b.setDown(down, tried) {
			continue
		}
		b.dirty = true
		if err := m.writeBackend(b); err != nil {
			return turned, err
		}
		if before != b.Up {
			turned = append(turned, *b)
		}
	}
	return turned, nil
}

// Backends are those that the maps hold, by number, each with its service.
func (m *Manager) Backends() (list []ServiceBackend) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.backends {
		if s := m.services[b.Service]; s != nil && b.written {
			list = append(list, ServiceBackend{Service: *s, Backend: *b})
		}
	}
	slices.SortFunc(list, func(a, b ServiceBackend) int { return int(a.Backend.ID) - int(b.Backend.ID) })
	return list
}

// Revision grows before any number of a backend or a source address can come to mean something else than it did.
func (m *Manager) Revision() uint64 { return m.revision.Load() }

// SourceAddresses are fullnat's, by number.
func (m *Manager) SourceAddresses() map[uint32]netip.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make(map[uint32]netip.Addr, len(m.sources))
	for id, s := range m.sources {
		all[id] = s.Address
	}
	return all
}

// ServiceBackend is a backend and its service.
type ServiceBackend struct {
	Service Service
	Backend Backend
}

// writeBackend writes a backend's entry, then its label, which is what makes it there for readers. A changed next hop is
// first written beside the one in use.
func (m *Manager) writeBackend(b *Backend) error {
	var old bpf.FairleadBackend
	if err := m.set.raw.Backends.Lookup(b.ID, &old); err != nil {
		return fmt.Errorf("read backend %d: %w", b.ID, err)
	}
	flags := bpf.FairleadBackendFlag(0)
	if b.Up {
		flags |= bpf.FairleadBackendFlagBACKEND_UP
	}
	if b.Leaving {
		flags |= bpf.FairleadBackendFlagBACKEND_LEAVING
	}
	if b.Tried {
		flags |= bpf.FairleadBackendFlagBACKEND_TRIED
	}
	if b.NextHop.Known {
		flags |= bpf.FairleadBackendFlagBACKEND_NEIGHBOR
	}
	v := bpf.FairleadBackend{
		Address: addressWords(b.Address), Port: portWire(b.Port), Family: familyOf(b.Address), Method: uint8(b.Method),
		Flags: uint32(flags), Service: b.Service, Mtu: b.NextHop.MTU, HopIndex: b.turn, Hop: old.Hop,
		PoolCount: uint32(len(b.pools)), Protocol: b.protocol, TunnelMask: tunnelMask(b.Tunnel), DownAt: b.downAt,
	}
	if b.Tunnel.IsValid() {
		v.TunnelSource = addressWords(b.Tunnel.Masked().Addr())
	}
	copy(v.Pools[:], b.pools)
	hop := bpf.FairleadHop{
		Mac: b.NextHop.MAC, SourceMac: b.NextHop.SourceMAC, Ifindex: b.NextHop.Interface, Vlan: b.NextHop.VLAN,
	}
	if b.NextHop.Known && old.Hop[b.turn] != hop {
		aside := old
		aside.Hop[b.turn^1] = hop
		if err := m.set.raw.Backends.Put(b.ID, &aside); err != nil {
			return fmt.Errorf("write backend %d: %w", b.ID, err)
		}
		b.turn ^= 1
		v.HopIndex, v.Hop = b.turn, aside.Hop
	}
	if err := m.set.raw.Backends.Put(b.ID, &v); err != nil {
		return fmt.Errorf("write backend %d: %w", b.ID, err)
	}
	info := bpf.FairleadBackendLabel{
		Name: label(b.Name), Used: 1, Weight: b.Weight, Configured: b.Shown.Configured, Percent: b.Shown.Percent,
		Health: uint32(b.Shown.Health), Orders: uint32(b.Shown.Orders), Since: b.Shown.Since, Failed: b.Shown.FailedAt,
		Reason: label(b.NextHop.Reason),
	}
	copy(info.Failure[:len(info.Failure)-1], b.Shown.Failure)
	if err := m.set.raw.BackendInfo.Put(b.ID, &info); err != nil {
		return fmt.Errorf("write the name of backend %d: %w", b.ID, err)
	}
	b.written, b.dirty = true, false
	return nil
}

// SetNextHops gives every backend of these addresses its new next hop. It answers the backends whose next hop came or
// went: Apply then makes the rings fit.
func (m *Manager) SetNextHops(hops map[netip.Addr]NextHop) (turned []Backend, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.backends {
		hop, ok := hops[b.Address]
		hop = b.NextHop.followedBy(hop, b.Method)
		if !ok || hop == b.NextHop && !b.dirty {
			continue
		}
		b.dirty = true
		came := hop.Known != b.NextHop.Known
		b.NextHop = hop
		if err := m.writeBackend(b); err != nil {
			return turned, err
		}
		if came {
			turned = append(turned, *b)
		}
	}
	return turned, nil
}

func newRingMap(size uint32) (*ebpf.Map, error) {
	rm, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "ring", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: size, Flags: ringFlags,
	})
	if err != nil {
		return nil, fmt.Errorf("make a ring of %d slots: %w", size, err)
	}
	return rm, nil
}

// ringFlags let rings of all sizes stand in one map of maps (BPF_F_INNER_MAP, Linux 5.10).
const ringFlags = 1 << 12

// putRings builds the rings that change aside and swaps them in whole, all in one batch, with every slot that changes
// hands unsettled.
func (m *Manager) putRings(plans []*plan) (swapped bool, err error) {
	rings := make(map[uint32]*liveRing)
	defer func() {
		if err != nil {
			for _, r := range rings {
				r.m.Close()
			}
		}
	}()
	var ids, descriptors []uint32
	for _, p := range plans {
		words, changed, err := m.ringFor(p)
		if err != nil {
			return false, err
		}
		old := m.rings[p.service.ID]
		if old != nil && !changed {
			old.members, old.ids = p.members, p.ids
			continue
		}
		rm, err := newRingMap(p.want.RingSize)
		if err != nil {
			return false, err
		}
		rings[p.service.ID] = &liveRing{m: rm, words: words, members: p.members, ids: p.ids, unsettled: changed}
		if err := putWords(rm, words, nil); err != nil {
			return false, err
		}
		ids, descriptors = append(ids, p.service.ID), append(descriptors, uint32(rm.FD()))
		swapped = swapped || changed
	}
	if len(ids) == 0 {
		return false, nil
	}
	// The update returns only when no CPU uses an old ring any more: map-in-map updates wait for an RCU grace period.
	if _, err := m.set.raw.Rings.BatchUpdate(ids, descriptors, nil); err != nil {
		return false, fmt.Errorf("swap %d rings: %w", len(ids), err)
	}
	for id, r := range rings {
		if old := m.rings[id]; old != nil {
			old.m.Close()
		}
		m.rings[id] = r
	}
	return swapped, nil
}

// ringFor builds the words of a service's ring. Changed: it differs from the living one.
func (m *Manager) ringFor(p *plan) (words []uint32, changed bool, err error) {
	if old := m.rings[p.service.ID]; old != nil && slices.Equal(old.members, p.members) && slices.Equal(old.ids, p.ids) {
		return nil, false, nil
	}
	slots, err := BuildRing(p.want.RingSize, p.members)
	if err != nil {
		return nil, false, fmt.Errorf("service %s: build the ring: %w", p.want.Name, err)
	}
	words = make([]uint32, len(slots))
	for i, member := range slots {
		words[i] = NoBackend
		if member >= 0 {
			words[i] = p.ids[member]
		}
	}
	if old := m.rings[p.service.ID]; old != nil {
		for i, w := range old.words {
			if w&slotBackend != words[i] {
				changed = true
				words[i] |= slotUnsettled
			}
			words[i] |= w & slotUnsettled
		}
	}
	return words, changed, nil
}

// putWords writes slots of a ring: those of the list, or all.
func putWords(rm *ebpf.Map, words []uint32, list []uint32) error {
	values := words
	if list == nil {
		list = make([]uint32, len(words))
		for i := range list {
			list[i] = uint32(i)
		}
	} else {
		values = make([]uint32, len(list))
		for i, slot := range list {
			values[i] = words[slot]
		}
	}
	if len(list) == 0 {
		return nil
	}
	if _, err := rm.BatchUpdate(list, values, nil); err != nil {
		return fmt.Errorf("write %d slots of a ring: %w", len(list), err)
	}
	return nil
}

// putService makes a service's entry say what is wanted.
func (m *Manager) putService(s *Service, ws *WantedService, say func(string, ...any)) error {
	before := *s
	s.Name, s.OnBackendDown, s.IdleTimeout, s.Leaving = ws.Name, ws.OnBackendDown, ws.IdleTimeout, false
	s.Standing = ws.Standing
	if before.written && before.Standing != s.Standing {
		say("service %s: %s", s.Name, s.Standing.sentence())
	}
	s.RingFirst = slices.ContainsFunc(ws.Backends, func(b WantedBackend) bool { return b.Method.Stateless() })
	for _, key := range s.Keys {
		leaving := !slices.Contains(ws.Keys, key)
		if leaving == s.leavingKeys[key] {
			continue
		}
		s.dirty = true
		if leaving {
			s.leavingKeys[key] = true
			say("service %s: %v leaving: no new connections there", s.Name, key)
		} else {
			delete(s.leavingKeys, key)
			delete(m.emptyKeys, keyOf(key, s.Protocol))
		}
	}
	if before.Name == s.Name && before.OnBackendDown == s.OnBackendDown && before.IdleTimeout == s.IdleTimeout &&
		before.Leaving == s.Leaving && before.RingFirst == s.RingFirst && before.Standing == s.Standing && s.written &&
		!s.dirty {
		return nil
	}
	s.dirty = true
	return m.writeService(s)
}

func (m *Manager) writeService(s *Service) error {
	flags := bpf.FairleadServiceFlag(0)
	if s.AffinityClient {
		flags |= bpf.FairleadServiceFlagSERVICE_AFFINITY_CLIENT
	}
	if s.RingFirst {
		flags |= bpf.FairleadServiceFlagSERVICE_RING_FIRST
	}
	if s.Leaving {
		flags |= bpf.FairleadServiceFlagSERVICE_LEAVING
	}
	info := bpf.FairleadServiceLabel{
		Name: label(s.Name), Address: addressWords(s.Address()), Port: portWire(s.Port()), Family: familyOf(s.Address()),
		Protocol: s.Protocol, RingSize: s.RingSize, Flags: uint32(flags), IdleTimeout: uint64(s.IdleTimeout),
		Standing: uint32(s.Standing),
	}
	if err := m.set.raw.ServiceInfo.Put(s.ID, &info); err != nil {
		return fmt.Errorf("write the name of service %s: %w", s.Name, err)
	}
	for _, at := range s.Keys {
		v := bpf.FairleadService{Id: s.ID, RingSize: s.RingSize, Flags: uint16(flags), OnBackendDown: uint8(s.OnBackendDown)}
		if s.leavingKeys[at] {
			v.Flags |= uint16(bpf.FairleadServiceFlagSERVICE_LEAVING)
		}
		table, key := m.serviceEntry(keyOf(at, s.Protocol))
		if err := table.Put(key, &v); err != nil {
			return fmt.Errorf("write service %s: %w", s.Name, err)
		}
	}
	s.written, s.dirty = true, false
	return nil
}

func (m *Manager) serviceEntry(key serviceKey) (table *ebpf.Map, k any) {
	if key.address.Is4() {
		k := entryKey4(key)
		return m.set.raw.Services4, &k
	}
	k6 := entryKey6(key)
	return m.set.raw.Services6, &k6
}

// varying is a tunnel's prefix, of which the data plane varies the last 32 bits at most.
func varying(p netip.Prefix) netip.Prefix {
	if !p.IsValid() {
		return p
	}
	return netip.PrefixFrom(p.Masked().Addr(), max(p.Bits(), p.Addr().BitLen()-32))
}

func zeroPerCPU[T any](table *ebpf.Map, id uint32) error {
	n, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count the host's CPUs: %w", err)
	}
	if err := table.Put(id, make([]T, n)); err != nil {
		return fmt.Errorf("clear the counters of number %d in %s: %w", id, table, err)
	}
	return nil
}

// removeLeft takes out what was leaving and has no connection any more, by two walks in a row: a connection begun just
// before the ring was swapped may have been missed by one. A leaving service keeps its ring, and the ring its backends,
// until all of them can go.
func (m *Manager) removeLeft(conns map[uint32]int, pools map[poolUser]int, keys map[serviceKey]int) error {
	if err := m.removeLeftKeys(keys); err != nil {
		return err
	}
	done := func(b *Backend) bool { return b.Leaving && m.empty[b.ID] >= 2 }
	inUse := make(map[uint32]bool) // services
	for id, b := range m.backends {
		if b.Leaving && conns[id] == 0 {
			m.empty[id]++
		} else {
			delete(m.empty, id)
		}
		if !done(b) {
			inUse[b.Service] = true
		}
	}
	for id, s := range m.services {
		if s.Leaving && !inUse[id] {
			if err := m.removeService(s); err != nil {
				return err
			}
		}
	}
	for id, b := range m.backends {
		if s := m.services[b.Service]; !done(b) || s != nil && s.Leaving {
			continue
		}
		if err := m.set.raw.BackendInfo.Put(id, &bpf.FairleadBackendLabel{}); err != nil {
			return fmt.Errorf("clear the name of backend %d: %w", id, err)
		}
		if err := m.set.raw.Backends.Put(id, &bpf.FairleadBackend{}); err != nil {
			return fmt.Errorf("clear backend %d: %w", id, err)
		}
		delete(m.backends, id)
		delete(m.empty, id)
		m.log.Info("backend removed: its last connection has ended", "backend", b.Name, "address", b.Address)
	}
	if err := m.removeUnusedSources(pools); err != nil {
		return err
	}
	return errors.Join(m.putAddresses(), m.putNear(true), m.putPaths())
}

// removeLeftKeys takes out addresses and ports that a service does not have any more, by two walks in a row as well.
func (m *Manager) removeLeftKeys(keys map[serviceKey]int) error {
	for _, s := range m.services {
		for at := range s.leavingKeys {
			key := keyOf(at, s.Protocol)
			if keys[key] != 0 {
				delete(m.emptyKeys, key)
				continue
			}
			if m.emptyKeys[key]++; m.emptyKeys[key] < 2 {
				continue
			}
			table, k := m.serviceEntry(key)
			if err := table.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("remove %v of service %s: %w", at, s.Name, err)
			}
			s.Keys = slices.DeleteFunc(s.Keys, func(k netip.AddrPort) bool { return k == at })
			delete(s.leavingKeys, at)
			delete(m.emptyKeys, key)
			m.log.Info("address and port removed: the last connection there has ended", "service", s.Name, "address", at)
		}
	}
	return nil
}

func (m *Manager) removeService(s *Service) error {
	for _, at := range s.Keys {
		table, key := m.serviceEntry(keyOf(at, s.Protocol))
		if err := table.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove service %s: %w", s.Name, err)
		}
	}
	if err := m.set.raw.Rings.Delete(s.ID); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove the ring of service %s: %w", s.Name, err)
	}
	if err := m.set.raw.ServiceInfo.Put(s.ID, &bpf.FairleadServiceLabel{}); err != nil {
		return fmt.Errorf("clear the name of service %s: %w", s.Name, err)
	}
	if r := m.rings[s.ID]; r != nil {
		r.m.Close()
	}
	delete(m.rings, s.ID)
	delete(m.services, s.ID)
	m.log.Info("service removed: its last connection has ended", "service", s.Name)
	return nil
}
