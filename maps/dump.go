package maps

import (
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// Field is a named value of a Record: a string, a number, a bool, a time.Duration, a list of strings, or an address.
type Field struct {
	Name  string
	Value any
}

// Record is one entry of a map, decoded; all of one map have the same fields in the same order.
type Record []Field

// ErrNoMap is what Dump answers for a name that no map has.
var ErrNoMap = errors.New("no map has this name")

type dumper struct {
	*Set
	inv     *Inventory
	now     uint32
	service *Service // of rings: this one's alone
	visit   func(Record) error
}

// Dump calls visit for each entry of a map in use, decoded to names and addresses, until it answers an error, which Dump
// returns. Numbers of services, backends, source addresses and pools that nothing has are left out. With service, only
// that service's ring is read; other maps take no notice of it. Errors: ErrNoMap.
func (s *Set) Dump(inv *Inventory, name string, service *Service, visit func(Record) error) error {
	d := &dumper{Set: s, inv: inv, now: Now(), service: service, visit: visit}
	decode, known := map[string]func() error{
		bpf.FairleadMapAddresses4:     func() error { return d.addresses(true) },
		bpf.FairleadMapAddresses6:     func() error { return d.addresses(false) },
		bpf.FairleadMapBackendInfo:    d.backendInfo,
		bpf.FairleadMapBackendTraffic: d.backendTraffic,
		bpf.FairleadMapBackends:       d.backends,
		bpf.FairleadMapBitmaps:        d.bitmaps,
		bpf.FairleadMapBudgets:        d.budgets,
		bpf.FairleadMapCheckFrames:    d.checkFrames,
		bpf.FairleadMapClocks:         d.clocks,
		bpf.FairleadMapConnections4:   func() error { return dumpTable(d, s.raw.Connections4, fromTuple4, d.connection) },
		bpf.FairleadMapConnections6:   func() error { return dumpTable(d, s.raw.Connections6, fromTuple6, d.connection) },
		bpf.FairleadMapControl:        d.control,
		bpf.FairleadMapCounters:       d.counters,
		bpf.FairleadMapDevices:        d.devices,
		bpf.FairleadMapFragments:      d.fragments,
		bpf.FairleadMapGenerations:    d.generations,
		bpf.FairleadMapHalfOpen4:      func() error { return dumpTable(d, s.raw.HalfOpen4, fromTuple4, d.halfOpen) },
		bpf.FairleadMapHalfOpen6:      func() error { return dumpTable(d, s.raw.HalfOpen6, fromTuple6, d.halfOpen) },
		bpf.FairleadMapHalfReplies4:   func() error { return dumpTable(d, s.raw.HalfReplies4, fromTuple4, d.reply4) },
		bpf.FairleadMapHalfReplies6:   func() error { return dumpTable(d, s.raw.HalfReplies6, fromTuple6, d.reply6) },
		bpf.FairleadMapNatBackends4: func() error {
			return walkTable(s.raw.NatBackends4, func(k *bpf.FairleadServiceKey4, v *uint32) error {
				return d.natBackend(wordAddress4(k.Address), k.Port, k.Protocol, *v)
			})
		},
		bpf.FairleadMapNatBackends6: func() error {
			return walkTable(s.raw.NatBackends6, func(k *bpf.FairleadServiceKey6, v *uint32) error {
				return d.natBackend(wordsAddress(familyIPv6, k.Address), k.Port, k.Protocol, *v)
			})
		},
		bpf.FairleadMapJournal:   d.journal,
		bpf.FairleadMapPaths:     d.paths,
		bpf.FairleadMapPortFlags: d.portFlags,
		bpf.FairleadMapPools:     d.pools,
		bpf.FairleadMapPorts:     d.ports,
		bpf.FairleadMapReplies4:  func() error { return dumpTable(d, s.raw.Replies4, fromTuple4, d.reply4) },
		bpf.FairleadMapReplies6:  func() error { return dumpTable(d, s.raw.Replies6, fromTuple6, d.reply6) },
		bpf.FairleadMapRings:     d.rings,
		// Between packets there is nothing in it.
		bpf.FairleadMapScratch:        func() error { return nil },
		bpf.FairleadMapServiceInfo:    d.serviceInfo,
		bpf.FairleadMapServiceTraffic: d.serviceTraffic,
		bpf.FairleadMapServices4: func() error {
			return walkTable(s.raw.Services4, func(k *bpf.FairleadServiceKey4, v *bpf.FairleadService) error {
				return d.serviceEntry(wordAddress4(k.Address), k.Port, k.Protocol, v)
			})
		},
		bpf.FairleadMapServices6: func() error {
			return walkTable(s.raw.Services6, func(k *bpf.FairleadServiceKey6, v *bpf.FairleadService) error {
				return d.serviceEntry(wordsAddress(familyIPv6, k.Address), k.Port, k.Protocol, v)
			})
		},
		bpf.FairleadMapSources: d.sources,
		bpf.FairleadMapSources4: func() error {
			return walkTable(s.raw.Sources4, func(k, id *uint32) error {
				return d.visit(Record{{"address", wordAddress4(*k)}, {"source", *id}})
			})
		},
		bpf.FairleadMapSources6: func() error {
			return walkTable(s.raw.Sources6, func(k *bpf.FairleadAddress6, id *uint32) error {
				return d.visit(Record{{"address", wordsAddress(familyIPv6, k.Address)}, {"source", *id}})
			})
		},
	}[name]
	if !known {
		return fmt.Errorf("dump %q: %w", name, ErrNoMap)
	}
	return decode()
}

func dumpTable[K, V any](d *dumper, m *ebpf.Map, tuple func(*K) Tuple, record func(Tuple, *V) Record) error {
	return walkTable(m, func(k *K, v *V) error { return d.visit(record(tuple(k), v)) })
}

func (d *dumper) serviceName(id uint32) string {
	if s, ok := d.inv.Service(id); ok {
		return s.Name
	}
	return fmt.Sprintf("#%d", id)
}

func (d *dumper) backendName(id uint32) string {
	if id == NoBackend {
		return "none"
	}
	if b, ok := d.inv.Backend(id); ok {
		return b.Name
	}
	return fmt.Sprintf("#%d", id)
}

func (d *dumper) sourceAddress(id uint32) netip.Addr {
	for _, s := range d.inv.Sources {
		if s.ID == id {
			return s.Address
		}
	}
	return netip.Addr{}
}

// sourcePort is the source address and port of a fullnat connection; not valid: it has none.
func (d *dumper) sourcePort(id uint16, port uint16) netip.AddrPort {
	if port == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(d.sourceAddress(uint32(id)), portWire(port))
}

func mac(b [6]byte) string { return net.HardwareAddr(b[:]).String() }

// flagNames are the names of the bits that are set, the lowest first; names without a bit of their own are left out.
func flagNames(word uint32, names ...string) []string {
	set := []string{}
	for i, name := range names {
		if word&(1<<i) != 0 && name != "" {
			set = append(set, name)
		}
	}
	return set
}

func stateNames(state uint32) []string {
	return flagNames(state, "young", "idle", "client_fin", "client_fin_known", "backend_fin", "backend_fin_known",
		"client_reset", "backend_reset", "stateless", "condemned", "backend_told", "client_told")
}

func (d *dumper) connection(t Tuple, v *bpf.FairleadConnection) Record {
	return Record{
		{"client", t.Source}, {"destination", t.Destination}, {"protocol", ProtocolName(t.Protocol)}, {"service", d.serviceName(v.Service)},
		{"backend", d.backendName(v.Backend)}, {"generation", v.Generation}, {"tag", v.Tag},
		{"opened", Age(d.now, v.Opened)}, {"seen", Age(d.now, v.Seen)}, {"marked", marked(d.now, v.Marked)},
		{"state", stateNames(v.State)}, {"source", d.sourcePort(v.Source, v.SourcePort)},
		{"sequence_end", v.SequenceEnd}, {"acknowledgement", v.Acknowledgement},
		{"timestamp", v.Timestamp}, {"timestamp_echo", v.TimestampEcho},
		{"client_fin", v.ClientFin}, {"backend_fin", v.BackendFin},
		{"base_sequence", v.BaseSequence}, {"base_acknowledgement", v.BaseAcknowledgement},
		{"mac", mac(v.Hop.Mac)}, {"own_mac", mac(v.Hop.SourceMac)}, {"ifindex", v.Hop.Ifindex}, {"vlan", vlanNames(v.Hop.Vlan)},
	}
}

func marked(now, tick uint32) time.Duration {
	if tick == 0 {
		return 0
	}
	return Age(now, tick)
}

func (d *dumper) halfOpen(t Tuple, v *bpf.FairleadHalfOpen) Record {
	return Record{
		{"client", t.Source}, {"destination", t.Destination}, {"protocol", ProtocolName(t.Protocol)}, {"service", d.serviceName(v.Service)},
		{"backend", d.backendName(v.Backend)}, {"generation", v.Generation}, {"tag", v.Tag},
		{"first", Age(d.now, v.First)}, {"state", flagNames(v.State, "syn_ack", "ack", "stateless")},
		{"source", d.sourcePort(v.Source, v.SourcePort)},
		{"first_sequence", v.ClientSequence[0]}, {"latest_sequence", v.ClientSequence[1]},
		{"backend_sequence", v.BackendSequence}, {"base_acknowledgement", v.BaseAcknowledgement},
		{"mac", mac(v.Hop.Mac)}, {"own_mac", mac(v.Hop.SourceMac)}, {"ifindex", v.Hop.Ifindex}, {"vlan", vlanNames(v.Hop.Vlan)},
	}
}

func (d *dumper) reply4(t Tuple, v *bpf.FairleadReply4) Record {
	return d.reply(t, &v.Back, fromTuple4(&v.Client))
}
func (d *dumper) reply6(t Tuple, v *bpf.FairleadReply6) Record {
	return d.reply(t, &v.Back, fromTuple6(&v.Client))
}

func (d *dumper) reply(t Tuple, v *bpf.FairleadWayBack, client Tuple) Record {
	token := map[bpf.FairleadToken]string{
		bpf.FairleadTokenTOKEN_QUEUED: "queued", bpf.FairleadTokenTOKEN_OUT: "out", bpf.FairleadTokenTOKEN_GONE: "gone",
	}[bpf.FairleadToken(v.Token)]
	return Record{
		{"backend", t.Source}, {"source", t.Destination}, {"protocol", ProtocolName(t.Protocol)}, {"client", client.Source}, {"destination", client.Destination},
		{"generation", v.Generation}, {"token", token}, {"first", Age(d.now, v.First)}, {"pool", v.Pool},
	}
}

func (d *dumper) control() error {
	block := d.Control.block
	return d.visit(Record{
		{"epoch", d.Control.Epoch()}, {"exception_index", d.Control.exceptionIndex()},
		{"exception_both", block.ExceptionBoth != 0}, {"connections", d.Control.Connections()},
		{"young", d.Control.Young()},
	})
}

func (d *dumper) bitmaps() error {
	set, inUse := d.Bitmaps.set, func(kind string, i int) bool {
		if kind == "fresh" {
			return uint32(i) == d.Control.Epoch()&1
		}
		return uint32(i) == d.Control.exceptionIndex()
	}
	for _, b := range []struct {
		kind  string
		pairs *[2][bpf.FairleadLimitsBITMAP_WORDS]uint64
	}{{"exception", &set.Exception}, {"fresh", &set.Fresh}} {
		for i := range b.pairs {
			n := 0
			for _, word := range b.pairs[i] {
				n += bits.OnesCount64(word)
			}
			if err := d.visit(Record{
				{"bitmap", b.kind}, {"index", i}, {"in_use", inUse(b.kind, i)}, {"bits_set", n}, {"bits", BitmapBits},
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *dumper) counters() error {
	totals, err := d.Counters.Totals()
	if err != nil {
		return err
	}
	for _, part := range []struct {
		kind   string
		names  []string
		counts []uint64
	}{{"verdict", bpf.VerdictNames(), totals.Verdicts}, {"event", bpf.EventNames(), totals.Events}} {
		for i, name := range part.names {
			if err := d.visit(Record{{"kind", part.kind}, {"name", name}, {"count", part.counts[i]}}); err != nil {
				return err
			}
		}
	}
	return nil
}

// ProtocolName is tcp, udp, or a protocol's number.
func ProtocolName(p uint8) string {
	switch p {
	case 6:
		return "tcp"
	case 17:
		return "udp"
	}
	return fmt.Sprint(p)
}

func serviceFlags(word uint32) []string {
	return flagNames(word, "affinity_client", "leaving", "ring_first")
}

func (p DownPolicy) String() string {
	switch p {
	case DownReset:
		return "reset"
	case DownKeep:
		return "keep"
	case DownRehash:
		return "rehash"
	}
	return fmt.Sprintf("policy %d", uint8(p))
}

func (d *dumper) serviceEntry(a netip.Addr, port uint16, protocol uint8, v *bpf.FairleadService) error {
	return d.visit(Record{
		{"address", netip.AddrPortFrom(a, portWire(port))}, {"protocol", ProtocolName(protocol)}, {"number", v.Id},
		{"service", d.serviceName(v.Id)}, {"ring_size", v.RingSize}, {"flags", serviceFlags(uint32(v.Flags))},
		{"on_backend_down", DownPolicy(v.OnBackendDown).String()},
	})
}

func (d *dumper) serviceInfo() error {
	return walkTable(d.raw.ServiceInfo, func(id *uint32, v *bpf.FairleadServiceLabel) error {
		if v.Family == 0 {
			return nil
		}
		return d.visit(Record{
			{"number", *id}, {"name", name(v.Name[:])},
			{"address", netip.AddrPortFrom(wordsAddress(v.Family, v.Address), portWire(v.Port))},
			{"protocol", ProtocolName(v.Protocol)}, {"ring_size", v.RingSize}, {"flags", serviceFlags(v.Flags)},
			{"idle_timeout", time.Duration(v.IdleTimeout)}, {"standing", Standing(v.Standing).String()},
		})
	})
}

func (d *dumper) backendInfo() error {
	return walkTable(d.raw.BackendInfo, func(id *uint32, v *bpf.FairleadBackendLabel) error {
		if v.Used == 0 {
			return nil
		}
		return d.visit(Record{
			{"number", *id}, {"name", name(v.Name[:])}, {"weight", v.Weight}, {"configured", v.Configured},
			{"percent", v.Percent}, {"health", Health(v.Health).String()}, {"orders", Orders(v.Orders).Names()},
			{"since", marked(d.now, v.Since)}, {"failed", marked(d.now, v.Failed)}, {"failure", name(v.Failure[:])}, {"reason", name(v.Reason[:])},
		})
	})
}

func (d *dumper) backends() error {
	for i := range d.inv.Backends {
		b := &d.inv.Backends[i]
		var v bpf.FairleadBackend
		if err := d.raw.Backends.Lookup(b.ID, &v); err != nil {
			return fmt.Errorf("read backend %d: %w", b.ID, err)
		}
		hop := &v.Hop[v.HopIndex&1]
		pools := []string{}
		for _, id := range v.Pools[:min(int(v.PoolCount), len(v.Pools))] {
			pools = append(pools, fmt.Sprint(id))
		}
		if err := d.visit(Record{
			{"number", b.ID}, {"name", b.Name}, {"service", d.serviceName(v.Service)},
			{"address", netip.AddrPortFrom(b.Address, b.Port)}, {"method", Method(v.Method).String()},
			{"flags", flagNames(v.Flags, "up", "neighbor", "leaving", "tried")}, {"mac", mac(hop.Mac)},
			{"own_mac", mac(hop.SourceMac)}, {"ifindex", hop.Ifindex}, {"vlan", vlanNames(hop.Vlan)}, {"hop_index", v.HopIndex}, {"mtu", v.Mtu},
			{"pools", pools}, {"tunnel_source", b.Tunnel}, {"protocol", ProtocolName(v.Protocol)}, {"down", marked(d.now, v.DownAt)},
		}); err != nil {
			return err
		}
	}
	return nil
}

func (d *dumper) sources() error {
	for _, s := range d.inv.Sources {
		if err := d.visit(Record{
			{"number", s.ID}, {"address", s.Address}, {"first_port", s.First}, {"last_port", s.Last},
		}); err != nil {
			return err
		}
	}
	return nil
}

func (d *dumper) pools() error {
	return walkTable(d.raw.Pools, func(id *uint32, v *bpf.FairleadPool) error {
		if v.Family == 0 {
			return nil
		}
		return d.visit(Record{
			{"number", *id}, {"source", d.sourceAddress(v.Source)},
			{"backend", netip.AddrPortFrom(wordsAddress(v.Family, v.Address), portWire(v.Port))},
			{"protocol", ProtocolName(v.Protocol)},
		})
	})
}

// ports shows the head of each queue: reading more of a queue would take numbers out of it.
func (d *dumper) ports() error {
	return d.walkInside(d.raw.Ports, func(number uint32, queue *ebpf.Map) error {
		var head uint32
		if err := queue.Lookup(nil, &head); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("look at the head of queue %d: %w", number, err)
		}
		var pool bpf.FairleadPool
		if err := d.raw.Pools.Lookup(number/2, &pool); err != nil {
			return fmt.Errorf("read port pool %d: %w", number/2, err)
		}
		return d.visit(Record{
			{"pool", number / 2}, {"queue", [2]string{"unused", "handed_out"}[number&1]}, {"capacity", queue.MaxEntries()},
			{"head", head}, {"source", d.sourceAddress(pool.Source)},
			{"backend", netip.AddrPortFrom(wordsAddress(pool.Family, pool.Address), portWire(pool.Port))},
		})
	})
}

func (d *dumper) rings() error {
	for i := range d.inv.Services {
		s := &d.inv.Services[i]
		if d.service != nil && d.service.ID != s.ID {
			continue
		}
		slots, err := d.Ring(s.ID)
		if err != nil {
			return err
		}
		for slot, v := range slots {
			if err := d.visit(Record{
				{"service", s.Name}, {"slot", slot}, {"backend", d.backendName(v.Backend)}, {"settled", v.Settled},
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *dumper) budgets() error {
	for kind, name := range []string{"adoptions", "answers"} {
		var perCPU []struct{ Tick, Left uint32 }
		if err := d.raw.Budgets.Lookup(uint32(kind), &perCPU); err != nil {
			return fmt.Errorf("read the budget of %s: %w", name, err)
		}
		for cpu, v := range perCPU {
			if err := d.visit(Record{{"budget", name}, {"cpu", cpu}, {"tick", v.Tick}, {"left", v.Left}}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *dumper) clocks() error {
	var perCPU []struct {
		Jiffies   uint64
		Tick, Pad uint32
	}
	if err := d.raw.Clocks.Lookup(uint32(0), &perCPU); err != nil {
		return fmt.Errorf("read the clocks: %w", err)
	}
	for cpu, v := range perCPU {
		if err := d.visit(Record{{"cpu", cpu}, {"jiffies", v.Jiffies}, {"tick", v.Tick}}); err != nil {
			return err
		}
	}
	return nil
}

// journal shows no events: reading them would take them from the daemon.
func (d *dumper) journal() error {
	return d.visit(Record{{"capacity", d.raw.Journal.MaxEntries()}})
}

// checkFrames shows no frames: reading them would take them from the daemon.
func (d *dumper) checkFrames() error {
	return d.visit(Record{{"capacity", d.raw.CheckFrames.MaxEntries()}, {"frame", bpf.FairleadLimitsCHECK_FRAME_MAX}})
}

func (d *dumper) addresses(ipv4 bool) error {
	all, err := d.Addresses()
	if err != nil {
		return err
	}
	for _, a := range slices.SortedFunc(maps.Keys(all), netip.Addr.Compare) {
		if a.Is4() != ipv4 {
			continue
		}
		if err := d.visit(Record{
			{"address", a}, {"use", flagNames(uint32(all[a]), "service", "source", "tunnel", "own", "check")},
		}); err != nil {
			return err
		}
	}
	return nil
}

func (d *dumper) natBackend(a netip.Addr, port uint16, protocol uint8, count uint32) error {
	return d.visit(Record{
		{"address", netip.AddrPortFrom(a, portWire(port))}, {"protocol", ProtocolName(protocol)}, {"backends", count},
	})
}

func (d *dumper) devices() error {
	return walkTable(d.raw.Devices, func(index *uint32, v *bpf.FairleadDevice) error {
		return d.visit(Record{{"ifindex", *index}, {"mtu", v.Mtu}, {"mac", mac(v.Mac)}})
	})
}

func (d *dumper) paths() error {
	return walkTable(d.raw.Paths, func(k *bpf.FairleadPathKey, v *bpf.FairleadPath) error {
		return d.visit(Record{
			{"address", wordsAddress(uint8(k.Family), k.Address)}, {"mtu", v.Mtu}, {"said", marked(d.now, v.Tick)},
		})
	})
}

// portFlags shows the ports that are anything to us, neighbours of one kind as a range.
func (d *dumper) portFlags() error {
	for first := 0; first < int(bpf.FairleadLimitsPORT_NUMBERS); {
		flags, last := d.PortFlags.Flags(uint16(first)), first
		for last+1 < int(bpf.FairleadLimitsPORT_NUMBERS) && d.PortFlags.Flags(uint16(last+1)) == flags {
			last++
		}
		if flags != 0 {
			if err := d.visit(Record{
				{"first_port", first}, {"last_port", last}, {"may_be", flagNames(uint32(flags), "service", "source", "nat_backend")},
			}); err != nil {
				return err
			}
		}
		first = last + 1
	}
	return nil
}

func (d *dumper) fragments() error {
	return walkTable(d.raw.Fragments, func(k *bpf.FairleadFragmentKey, v *bpf.FairleadFragment) error {
		return d.visit(Record{
			{"from", wordsAddress(k.Family, k.Saddr)}, {"to", wordsAddress(k.Family, k.Daddr)}, {"id", k.Id},
			{"protocol", ProtocolName(k.Protocol)}, {"service", d.serviceName(v.Service)},
			{"backend", d.backendName(v.Backend)}, {"reply", v.Reply != 0}, {"first", Age(d.now, v.Tick)},
		})
	})
}

// vlanNames are the VLANs of a hop, outermost first, as `802.1ad 7` or `802.1q 7`.
func vlanNames(tags [2]uint16) []string {
	names := []string{}
	for _, word := range tags {
		if word == 0 {
			break
		}
		kind := "802.1q"
		if word&uint16(bpf.FairleadTagTAG_8021AD) != 0 {
			kind = "802.1ad"
		}
		names = append(names, fmt.Sprintf("%s %d", kind, word&uint16(bpf.FairleadTagTAG_ID)))
	}
	return names
}

func (d *dumper) generations() error {
	var perCPU []uint32
	if err := d.raw.Generations.Lookup(uint32(0), &perCPU); err != nil {
		return fmt.Errorf("read the generations: %w", err)
	}
	for cpu, v := range perCPU {
		if err := d.visit(Record{{"cpu", cpu}, {"generation", v}}); err != nil {
			return err
		}
	}
	return nil
}

func trafficFields(t Traffic) Record {
	return Record{
		{"packets", t.Packets}, {"bytes", t.Bytes}, {"new_connections", t.Connections}, {"refused", t.Refused},
		{"reply_packets", t.ReplyPackets}, {"reply_bytes", t.ReplyBytes}, {"answered", t.Answered}, {"rejected", t.Rejected},
	}
}

func (d *dumper) serviceTraffic() error {
	for _, s := range d.inv.Services {
		t, err := d.Counters.Service(s.ID)
		if err != nil {
			return err
		}
		if err := d.visit(append(Record{{"number", s.ID}, {"service", s.Name}}, trafficFields(t)...)); err != nil {
			return err
		}
	}
	return nil
}

func (d *dumper) backendTraffic() error {
	for _, b := range d.inv.Backends {
		t, err := d.Counters.Backend(b.ID)
		if err != nil {
			return err
		}
		if err := d.visit(append(Record{
			{"number", b.ID}, {"service", d.serviceName(b.Service)}, {"backend", b.Name},
		}, trafficFields(t)...)); err != nil {
			return err
		}
	}
	return nil
}

// TableNames are the names of all maps, in order.
func TableNames() []string {
	names := make([]string, 0, len(purposes))
	for name := range purposes {
		names = append(names, name)
	}
	slices.SortFunc(names, strings.Compare)
	return names
}
