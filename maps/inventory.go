package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// Method is a forwarding method, numbered as the data plane numbers it.
type Method uint8

// The methods.
const (
	MethodFullNAT = Method(bpf.FairleadMethodMETHOD_FULLNAT)
	MethodNAT     = Method(bpf.FairleadMethodMETHOD_NAT)
	MethodDSR     = Method(bpf.FairleadMethodMETHOD_DSR)
	MethodIPIP    = Method(bpf.FairleadMethodMETHOD_IPIP)
	MethodGUE     = Method(bpf.FairleadMethodMETHOD_GUE)
)

func (m Method) String() string {
	names := map[Method]string{MethodFullNAT: "fullnat", MethodNAT: "nat", MethodDSR: "dsr", MethodIPIP: "ipip", MethodGUE: "gue"}
	if s, ok := names[m]; ok {
		return s
	}
	return fmt.Sprintf("method %d", uint8(m))
}

// Stateless tells whether a client's packet needs nothing but its backend's name: the ring may answer alone.
func (m Method) Stateless() bool { return m == MethodDSR || m == MethodIPIP || m == MethodGUE }

// DownPolicy is what becomes of connections whose backend is down.
type DownPolicy uint8

// The policies.
const (
	DownReset  = DownPolicy(bpf.FairleadDownPolicyDOWN_RESET)
	DownKeep   = DownPolicy(bpf.FairleadDownPolicyDOWN_KEEP)
	DownRehash = DownPolicy(bpf.FairleadDownPolicyDOWN_REHASH)
)

// Service is a service as the maps hold it.
type Service struct {
	ID             uint32
	Name           string
	Keys           []netip.AddrPort // where clients come to; the first stands for all
	Protocol       uint8
	RingSize       uint32
	AffinityClient bool
	RingFirst      bool // some backend's method needs no state
	Leaving        bool
	OnBackendDown  DownPolicy
	IdleTimeout    time.Duration
	Standing       Standing
	leavingKeys    map[netip.AddrPort]bool // take no new connections
	first          netip.AddrPort          // as it was named
	written, dirty bool                    // the maps hold it; not as it is here
}

// settle puts a service that was read from the maps in order: it is leaving where all its addresses and ports are.
func (s *Service) settle() {
	slices.SortFunc(s.Keys, func(a, b netip.AddrPort) int {
		if first := (b == s.first); first != (a == s.first) {
			if first {
				return 1
			}
			return -1
		}
		return a.Compare(b)
	})
	s.Leaving = true
	for at, leaving := range s.leavingKeys {
		s.Leaving = s.Leaving && leaving
		if !leaving {
			delete(s.leavingKeys, at)
		}
	}
	if s.Leaving {
		clear(s.leavingKeys)
	}
}

// LeavingKeys are the addresses and ports that the configuration does not have any more, and which connections do.
func (s Service) LeavingKeys() (list []netip.AddrPort) {
	for _, at := range s.Keys {
		if s.leavingKeys[at] {
			list = append(list, at)
		}
	}
	return list
}

// AddrPort is the service's address and port, the first where it has several.
func (s Service) AddrPort() netip.AddrPort { return s.Keys[0] }

// Address is the service's address, the first where it has several.
func (s Service) Address() netip.Addr { return s.Keys[0].Addr() }

// Port is the service's port, the first where it has several.
func (s Service) Port() uint16 { return s.Keys[0].Port() }

// Backend is a backend as the maps hold it.
type Backend struct {
	ID       uint32
	Service  uint32
	Name     string
	Address  netip.Addr
	Port     uint16
	Method   Method
	Weight   uint32       // as configured, or by command
	Tunnel   netip.Prefix // ipip, gue: outer source addresses
	Leaving  bool
	Up       bool // its connections go on
	Tried    bool // not up, but newcomers are tried on it, as all are down
	NextHop  NextHop
	Shown    Shown
	downAt   uint32 // tick since when it is down
	pools    []uint32
	protocol uint8  // of its service
	turn     uint32 // which half of the entry holds the next hop
	written  bool   // the maps hold it
	dirty    bool   // not as it is here
}

// Serves tells whether the backend may have the packets of a connection opened at a tick: while it is down, none but
// those opened since, where newcomers are tried on it. The data plane's function of that name says the same.
func (b *Backend) Serves(opened uint32) bool {
	return b.Up || b.Tried && int32(opened-b.downAt) >= 0
}

// DownAt is the tick since when the backend is down, if it is.
func (b *Backend) DownAt() uint32 { return b.downAt }

// Shown is what the maps tell of a backend to people, beside what the data plane goes by.
type Shown struct {
	Configured uint32 // weight in the configuration
	Percent    uint32 // how much of its weight it has in the ring: 100, but for a slow start or its check's word
	Health     Health
	Orders     Orders
	Since      uint32 // tick of Health
	FailedAt   uint32 // tick of the last failed check; 0: none
	Failure    string // its reason, at most 127 bytes
}

// NextHop is where frames to a backend go. Not Known: Reason says why.
type NextHop struct {
	Known          bool
	Interface      uint32 // index of the device
	MAC, SourceMAC [6]byte
	MTU            uint32
	VLAN           [2]uint16 // tags as bpf's struct hop has them, outermost first; 0: none
	Reason         string    // at most 63 bytes
	Pending        bool      // being asked for: one known before holds until there is an answer
	Gateway        bool      // the way goes by a router
}

// Tag8021AD marks a VLAN tag whose EtherType is that of IEEE 802.1ad, 0x88a8.
const Tag8021AD = uint16(bpf.FairleadTagTAG_8021AD)

// followedBy is the next hop after news of it. A router would send a dsr frame, addressed to the service, back here.
func (h NextHop) followedBy(news NextHop, method Method) NextHop {
	if news.Pending && !news.Known && h.Known {
		return h
	}
	news.Pending = false
	if news.Known && news.Gateway && method == MethodDSR {
		return NextHop{Gateway: true, Reason: "behind a router: dsr takes a backend that is on-link"}
	}
	return news
}

// Source is a source address of fullnat and its ports, both ends included.
type Source struct {
	ID          uint32
	Address     netip.Addr
	First, Last uint16
}

// Inventory is what the maps hold beside connections.
type Inventory struct {
	Services []Service
	Backends []Backend
	Sources  []Source
}

// Service is the service of a number.
func (i *Inventory) Service(id uint32) (Service, bool) {
	n := slices.IndexFunc(i.Services, func(s Service) bool { return s.ID == id })
	if n < 0 {
		return Service{}, false
	}
	return i.Services[n], true
}

// Backend is the backend of a number.
func (i *Inventory) Backend(id uint32) (Backend, bool) {
	n, ok := slices.BinarySearchFunc(i.Backends, id, func(b Backend, id uint32) int { return int(b.ID) - int(id) })
	if !ok {
		return Backend{}, false
	}
	return i.Backends[n], true
}

// Inventory reads services, backends and source addresses from the maps, each in the order of its numbers.
func (s *Set) Inventory() (*Inventory, error) {
	inv := new(Inventory)
	numbers := make(map[uint32]int) // by number: the place in the list
	add := func(a netip.Addr, port uint16, protocol uint8, v *bpf.FairleadService) error {
		at := netip.AddrPortFrom(a, port)
		leaving := bpf.FairleadServiceFlag(v.Flags)&bpf.FairleadServiceFlagSERVICE_LEAVING != 0
		if i, known := numbers[v.Id]; known {
			s := &inv.Services[i]
			s.Keys = append(s.Keys, at)
			s.leavingKeys[at] = leaving
			return nil
		}
		numbers[v.Id] = len(inv.Services)
		var info bpf.FairleadServiceLabel
		if err := s.raw.ServiceInfo.Lookup(v.Id, &info); err != nil {
			return fmt.Errorf("read the name of service %d: %w", v.Id, err)
		}
		flags := bpf.FairleadServiceFlag(v.Flags)
		inv.Services = append(inv.Services, Service{
			ID: v.Id, Name: name(info.Name[:]), Keys: []netip.AddrPort{at}, Protocol: protocol, RingSize: v.RingSize,
			AffinityClient: flags&bpf.FairleadServiceFlagSERVICE_AFFINITY_CLIENT != 0,
			RingFirst:      flags&bpf.FairleadServiceFlagSERVICE_RING_FIRST != 0,
			leavingKeys:    map[netip.AddrPort]bool{at: leaving}, first: netip.AddrPortFrom(wordsAddress(info.Family, info.Address), portWire(info.Port)),
			OnBackendDown: DownPolicy(v.OnBackendDown), IdleTimeout: time.Duration(info.IdleTimeout),
			Standing: Standing(info.Standing),
		})
		return nil
	}
	if err := walkTable(s.raw.Services4, func(k *bpf.FairleadServiceKey4, v *bpf.FairleadService) error {
		return add(wordAddress4(k.Address), portWire(k.Port), k.Protocol, v)
	}); err != nil {
		return nil, err
	}
	if err := walkTable(s.raw.Services6, func(k *bpf.FairleadServiceKey6, v *bpf.FairleadService) error {
		return add(wordsAddress(familyIPv6, k.Address), portWire(k.Port), k.Protocol, v)
	}); err != nil {
		return nil, err
	}
	slices.SortFunc(inv.Services, func(a, b Service) int { return int(a.ID) - int(b.ID) })
	for i := range inv.Services {
		inv.Services[i].settle()
	}

	if err := walkTable(s.raw.BackendInfo, func(id *uint32, info *bpf.FairleadBackendLabel) error {
		if info.Used == 0 {
			return nil
		}
		var v bpf.FairleadBackend
		if err := s.raw.Backends.Lookup(*id, &v); err != nil {
			return fmt.Errorf("read backend %d: %w", *id, err)
		}
		inv.Backends = append(inv.Backends, backendOf(*id, info, &v))
		return nil
	}); err != nil {
		return nil, err
	}
	slices.SortFunc(inv.Backends, func(a, b Backend) int { return int(a.ID) - int(b.ID) })

	if err := walkTable(s.raw.Sources, func(id *uint32, v *bpf.FairleadSource) error {
		if v.Family != 0 {
			inv.Sources = append(inv.Sources, Source{
				ID: *id, Address: wordsAddress(v.Family, v.Address), First: v.FirstPort, Last: v.LastPort,
			})
		}
		return nil
	}); err != nil {
		return nil, err
	}
	slices.SortFunc(inv.Sources, func(a, b Source) int { return int(a.ID) - int(b.ID) })
	return inv, nil
}

func backendOf(id uint32, info *bpf.FairleadBackendLabel, v *bpf.FairleadBackend) Backend {
	flags := bpf.FairleadBackendFlag(v.Flags)
	hop := &v.Hop[v.HopIndex&1]
	return Backend{
		ID: id, Service: v.Service, Name: name(info.Name[:]), Address: wordsAddress(v.Family, v.Address),
		Port: portWire(v.Port), Method: Method(v.Method), Weight: info.Weight,
		Leaving: flags&bpf.FairleadBackendFlagBACKEND_LEAVING != 0, Up: flags&bpf.FairleadBackendFlagBACKEND_UP != 0,
		Tried: flags&bpf.FairleadBackendFlagBACKEND_TRIED != 0, downAt: v.DownAt,
		Shown: Shown{
			Configured: info.Configured, Percent: info.Percent, Health: Health(info.Health), Orders: Orders(info.Orders),
			Since: info.Since, FailedAt: info.Failed, Failure: name(info.Failure[:]),
		},
		NextHop: NextHop{
			Known:     flags&bpf.FairleadBackendFlagBACKEND_NEIGHBOR != 0,
			Interface: hop.Ifindex, MAC: hop.Mac, SourceMAC: hop.SourceMac, VLAN: hop.Vlan, MTU: v.Mtu, Reason: name(info.Reason[:]),
		},
		pools:  slices.Clone(v.Pools[:min(int(v.PoolCount), len(v.Pools))]),
		turn:   v.HopIndex & 1,
		Tunnel: tunnelOf(v), protocol: v.Protocol,
	}
}

// tunnelOf is the outer source prefix of a backend's entry.
func tunnelOf(v *bpf.FairleadBackend) netip.Prefix {
	if m := Method(v.Method); m != MethodIPIP && m != MethodGUE {
		return netip.Prefix{}
	}
	a := wordsAddress(v.Family, v.TunnelSource)
	mask := [4]byte{}
	binary.NativeEndian.PutUint32(mask[:], v.TunnelMask)
	return netip.PrefixFrom(a, a.BitLen()-bits.OnesCount32(binary.BigEndian.Uint32(mask[:])))
}

// tunnelMask are the bits of an outer source address' last word that vary: those behind the prefix, but 32 at most.
func tunnelMask(p netip.Prefix) uint32 {
	if !p.IsValid() {
		return 0
	}
	vary := min(p.Addr().BitLen()-p.Bits(), 32)
	var mask [4]byte
	binary.BigEndian.PutUint32(mask[:], uint32(1<<vary-1))
	return binary.NativeEndian.Uint32(mask[:])
}

// Slot is a slot of a ring.
type Slot struct {
	Backend uint32 // number of the backend, NoBackend: none
	Settled bool
}

// NoBackend is the number in a slot that leads nowhere.
const NoBackend = uint32(bpf.FairleadSlotSLOT_NONE)

const (
	slotUnsettled = uint32(bpf.FairleadSlotSLOT_UNSETTLED)
	slotBackend   = uint32(bpf.FairleadSlotSLOT_BACKEND)
)

// ErrNoRing is what reading a ring answers where a service has none.
var ErrNoRing = errors.New("the service has no ring")

func (s *Set) ringMap(service uint32) (*ebpf.Map, error) {
	var ring *ebpf.Map
	if err := s.raw.Rings.Lookup(service, &ring); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			err = ErrNoRing
		}
		return nil, fmt.Errorf("open the ring of service %d: %w", service, err)
	}
	return ring, nil
}

// ringWords are the slots of a ring as the data plane reads them.
func ringWords(ring *ebpf.Map) ([]uint32, error) {
	words := make([]uint32, ring.MaxEntries())
	if err := walkTable(ring, func(k, v *uint32) error { words[*k] = *v; return nil }); err != nil {
		return nil, fmt.Errorf("read a ring: %w", err)
	}
	return words, nil
}

// Slot reads one slot of a service's ring. Errors: ErrNoRing.
func (s *Set) Slot(service, slot uint32) (Slot, error) {
	ring, err := s.ringMap(service)
	if err != nil {
		return Slot{}, err
	}
	defer ring.Close()
	var word uint32
	if err := ring.Lookup(slot, &word); err != nil {
		return Slot{}, fmt.Errorf("read slot %d of service %d: %w", slot, service, err)
	}
	return Slot{Backend: word & slotBackend, Settled: word&slotUnsettled == 0}, nil
}

// Ring reads a service's whole ring. Errors: ErrNoRing.
func (s *Set) Ring(service uint32) ([]Slot, error) {
	ring, err := s.ringMap(service)
	if err != nil {
		return nil, err
	}
	defer ring.Close()
	words, err := ringWords(ring)
	if err != nil {
		return nil, err
	}
	slots := make([]Slot, len(words))
	for i, w := range words {
		slots[i] = Slot{Backend: w & slotBackend, Settled: w&slotUnsettled == 0}
	}
	return slots, nil
}
