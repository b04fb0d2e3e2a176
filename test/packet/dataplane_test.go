package packet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

type (
	verdict = bpf.FairleadVerdict
	event   = bpf.FairleadEvent
)

// XDP's actions, as the kernel's headers number them.
const (
	xdpDrop uint32 = iota + 1
	xdpPass
	xdpTX
	xdpRedirect
)

const (
	services = 3 // sizes of the maps
	backends = 9
	sources  = 4
	pools    = 16
)

// dataplane is the programs and maps, attached nowhere, and what they should have counted so far.
type dataplane struct {
	*testing.T
	bpf.FairleadObjects
	spec   *ebpf.CollectionSpec
	cpu    int
	queues map[uint32]*queues // by pool
	want   counters
	// protocol is that of the first service, TCP unless its plan says otherwise.
	protocol uint8
}

// queues are a pool's two queues, and the ports it was given.
type queues struct {
	unused, handedOut *ebpf.Map
	source            source
	filled            bool
}

// counters are the sums over the CPUs.
type counters struct {
	Verdicts [bpf.FairleadVerdictVERDICT_COUNT]uint64
	Events   [bpf.FairleadEventEVENT_COUNT]uint64
	Services [services]bpf.FairleadTraffic
	Backends [backends]bpf.FairleadTraffic
}

// setting changes what is about to be loaded. Those of one name change the same.
type setting struct {
	name   string
	change func(*ebpf.CollectionSpec) error
}

func constant[T any](name string, value T) setting {
	return setting{fmt.Sprint(name, "=", value), func(spec *ebpf.CollectionSpec) error {
		return spec.Variables[name].Set(value)
	}}
}

func capacity(name string, entries uint32) setting {
	return setting{fmt.Sprint(name, ": ", entries), func(spec *ebpf.CollectionSpec) error {
		spec.Maps[name].MaxEntries = entries
		return nil
	}}
}

// idle are data planes as the kernel loaded them, by their settings, whose test has ended: the verifier takes its time.
var idle = struct {
	sync.Mutex
	all map[string][]*bpf.FairleadObjects
}{all: map[string][]*bpf.FairleadObjects{}}

// load gives a test a data plane with small maps, as good as new. When the test ends, what must always hold is checked.
func load(t *testing.T, settings ...setting) *dataplane {
	t.Helper()
	p := &dataplane{T: t, spec: smallSpec(t), queues: map[uint32]*queues{}, protocol: unix.IPPROTO_TCP}
	name := ""
	for _, set := range settings {
		p.must(set.change(p.spec))
		name += set.name + " "
	}
	idle.Lock()
	if last := len(idle.all[name]) - 1; last >= 0 {
		p.FairleadObjects, idle.all[name] = *idle.all[name][last], idle.all[name][:last]
	}
	idle.Unlock()
	if p.Fairlead == nil {
		if err := p.spec.LoadAndAssign(&p.FairleadObjects, nil); err != nil {
			t.Fatalf("load the data plane: %+v", err)
		}
	}
	t.Cleanup(func() {
		p.T = t
		if !t.Failed() {
			p.checkTables()
		}
		for _, q := range p.queues {
			q.unused.Close()
			q.handedOut.Close()
		}
		if t.Failed() {
			p.FairleadObjects.Close()
			return
		}
		p.empty()
		idle.Lock()
		defer idle.Unlock()
		idle.all[name] = append(idle.all[name], &p.FairleadObjects)
	})
	return p
}

func smallSpec(t *testing.T) *ebpf.CollectionSpec {
	t.Helper()
	spec, err := bpf.LoadFairlead()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		switch m.Type {
		case ebpf.Hash:
			m.MaxEntries = 4096
		case ebpf.LRUHash:
			m.MaxEntries = 1024
		}
		switch name {
		case "rings", "service_traffic", "service_info":
			m.MaxEntries = services
		case "backends", "backend_traffic", "backend_info":
			m.MaxEntries = backends
		case "sources":
			m.MaxEntries = sources
		case "pools":
			m.MaxEntries = pools
		case "ports":
			m.MaxEntries = pools * 2
		}
	}
	return spec
}

// empty makes all maps as they were when they were new. The queues of ports stay: no pool names them any more.
func (p *dataplane) empty() {
	p.Helper()
	all := reflect.ValueOf(p.FairleadMaps)
	for i := range all.NumField() {
		m := all.Field(i).Interface().(*ebpf.Map)
		zero := make([]byte, m.ValueSize())
		switch m.Type() {
		case ebpf.Hash, ebpf.LRUHash:
			for key, err := m.NextKeyBytes(nil); key != nil || err != nil; key, err = m.NextKeyBytes(nil) {
				p.must(err)
				p.must(m.Delete(key))
			}
		case ebpf.Array:
			for i := range m.MaxEntries() {
				p.must(m.Put(i, zero))
			}
		case ebpf.PerCPUArray:
			each := make([][]byte, ebpf.MustPossibleCPU())
			for cpu := range each {
				each[cpu] = zero
			}
			for i := range m.MaxEntries() {
				p.must(m.Put(i, each))
			}
		case ebpf.ArrayOfMaps:
			for id := uint32(0); m == p.Rings && id < services; id++ {
				if err := m.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
					p.must(err)
				}
			}
		case ebpf.RingBuf: // who reads it empties it
		default:
			p.Fatalf("empty %s: a map of type %s", m, m.Type())
		}
	}
}

func (p *dataplane) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

// words are an address as the maps hold it: its bytes, read as words of the host.
func words(address netip.Addr) (words [4]uint32) {
	bytes := address.AsSlice()
	for i := 0; i < len(bytes); i += 4 {
		words[i/4] = binary.NativeEndian.Uint32(bytes[i:])
	}
	return words
}

func network(port uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
}

func familyOf(address netip.Addr) uint8 {
	if address.Is4() {
		return uint8(bpf.FairleadFamilyFAMILY_IPV4)
	}
	return uint8(bpf.FairleadFamilyFAMILY_IPV6)
}

// flagPorts says what port numbers may be to us.
func (p *dataplane) flagPorts(flag bpf.FairleadPortFlag, first, last uint16) {
	p.Helper()
	set := new(bpf.FairleadPortSet)
	p.must(p.PortFlags.Lookup(uint32(0), set))
	for port := int(first); port <= int(last); port++ {
		set.Flags[network(uint16(port))] |= uint8(flag)
	}
	p.must(p.PortFlags.Put(uint32(0), set))
}

// flagAddress says what an address is to us.
func (p *dataplane) flagAddress(address netip.Addr, flags bpf.FairleadAddressFlag) {
	p.Helper()
	if address.Is4() {
		p.must(p.Addresses4.Put(words(address)[0], uint32(flags)))
	} else {
		p.must(p.Addresses6.Put(bpf.FairleadAddress6{Address: words(address)}, uint32(flags)))
	}
}

// serviceKey is the key of an address, port and protocol, and which of two maps it is for.
func serviceKey(at netip.AddrPort, protocol uint8, map4, map6 *ebpf.Map) (*ebpf.Map, any) {
	address := words(at.Addr())
	if at.Addr().Is4() {
		return map4, bpf.FairleadServiceKey4{Address: address[0], Port: network(at.Port()), Protocol: protocol}
	}
	return map6, bpf.FairleadServiceKey6{Address: address, Port: network(at.Port()), Protocol: protocol}
}

type service struct {
	id       uint32
	address  netip.AddrPort
	protocol uint8
	flags    bpf.FairleadServiceFlag
	policy   bpf.FairleadDownPolicy
	ring     []uint32
}

// setService writes the service and, where it has one, its ring.
func (p *dataplane) setService(s service) {
	p.Helper()
	value := bpf.FairleadService{
		Id: s.id, RingSize: uint32(len(s.ring)), Flags: uint16(s.flags), OnBackendDown: uint8(s.policy),
	}
	table, key := serviceKey(s.address, s.protocol, p.Services4, p.Services6)
	p.must(table.Put(key, value))
	p.flagPorts(bpf.FairleadPortFlagPORT_SERVICE, s.address.Port(), s.address.Port())
	p.flagAddress(s.address.Addr(), bpf.FairleadAddressFlagADDRESS_SERVICE)
	if len(s.ring) > 0 {
		p.setRing(s.id, s.ring)
	}
}

func (p *dataplane) setRing(id uint32, slots []uint32) {
	p.Helper()
	inner := p.spec.Maps["rings"].InnerMap.Copy()
	inner.MaxEntries = uint32(len(slots))
	ring, err := ebpf.NewMap(inner)
	p.must(err)
	defer ring.Close()
	for i, slot := range slots {
		p.must(ring.Put(uint32(i), slot))
	}
	p.must(p.Rings.Put(id, ring))
}

type backend struct {
	id           uint32
	address      netip.AddrPort
	protocol     uint8
	method       bpf.FairleadMethod
	flags        bpf.FairleadBackendFlag
	service      uint32
	mtu          uint32
	mac          [6]byte
	ifindex      int
	tags         [2]uint16 // of frames to it, as the maps have them
	pools        []uint32
	tunnelSource netip.Addr
	tunnelMask   uint32 // of the last word of its bytes, read as the host's
	downAt       uint32
}

const up = bpf.FairleadBackendFlagBACKEND_UP | bpf.FairleadBackendFlagBACKEND_NEIGHBOR

func (p *dataplane) setBackend(b backend) {
	p.Helper()
	value := bpf.FairleadBackend{
		Address: words(b.address.Addr()), Port: network(b.address.Port()), Family: familyOf(b.address.Addr()),
		Method: uint8(b.method), Flags: uint32(b.flags), Service: b.service, Mtu: b.mtu, Protocol: b.protocol,
		HopIndex: 1, PoolCount: uint32(len(b.pools)), TunnelMask: b.tunnelMask, DownAt: b.downAt,
	}
	if b.tunnelSource.IsValid() {
		value.TunnelSource = words(b.tunnelSource)
		p.must(p.Paths.Put(pathKey(b.address.Addr()), bpf.FairleadPath{}))
		p.flagAddress(b.tunnelSource, bpf.FairleadAddressFlagADDRESS_TUNNEL)
	}
	if b.method == bpf.FairleadMethodMETHOD_NAT {
		table, key := serviceKey(b.address, b.protocol, p.NatBackends4, p.NatBackends6)
		p.must(table.Put(key, uint32(1)))
		p.flagPorts(bpf.FairleadPortFlagPORT_BACKEND, b.address.Port(), b.address.Port())
	}
	// The half not in use is nobody's: a frame sent by it is seen.
	value.Hop[0] = bpf.FairleadHop{Mac: mac("0e:ad:0e:ad:0e:ad"), SourceMac: mac("0e:ad:0e:ad:0e:ad"), Ifindex: 0xdead}
	value.Hop[1] = bpf.FairleadHop{Mac: b.mac, SourceMac: b.sourceMAC(), Ifindex: uint32(b.ifindex), Vlan: b.tags}
	copy(value.Pools[:], b.pools)
	p.must(p.Backends.Put(b.id, value))
}

// pathKey is that of the way to a tunnel's end.
func pathKey(end netip.Addr) bpf.FairleadPathKey {
	return bpf.FairleadPathKey{Address: words(end), Family: uint32(familyOf(end))}
}

// sourceMAC is that of the edge's device towards the backend.
func (b backend) sourceMAC() [6]byte {
	if b.ifindex == theKernel.front.index {
		return edgeMAC
	}
	return backMAC
}

type source struct {
	id          uint32
	address     netip.Addr
	first, last uint16
}

func (p *dataplane) setSource(s source) {
	p.Helper()
	address := words(s.address)
	p.must(p.Sources.Put(s.id, bpf.FairleadSource{
		Address: address, FirstPort: s.first, LastPort: s.last, Family: familyOf(s.address),
	}))
	if s.address.Is4() {
		p.must(p.Sources4.Put(address[0], s.id))
	} else {
		p.must(p.Sources6.Put(bpf.FairleadAddress6{Address: address}, s.id))
	}
	p.flagPorts(bpf.FairleadPortFlagPORT_SOURCE, s.first, s.last)
	p.flagAddress(s.address, bpf.FairleadAddressFlagADDRESS_SOURCE)
}

// newPool makes a pool's queues, which have not a number's room to spare. setPools shows them to the programs.
func (p *dataplane) newPool(id uint32, b backend, s source) {
	p.Helper()
	newQueue := func() *ebpf.Map {
		inner := p.spec.Maps["ports"].InnerMap.Copy()
		inner.MaxEntries = uint32(s.last-s.first) + 1
		queue, err := ebpf.NewMap(inner)
		p.must(err)
		return queue
	}
	p.queues[id] = &queues{unused: newQueue(), handedOut: newQueue(), source: s}
	p.must(p.Pools.Put(id, bpf.FairleadPool{
		Source: s.id, Address: words(b.address.Addr()), Port: network(b.address.Port()), Family: familyOf(b.address.Addr()),
		Protocol: b.protocol,
	}))
}

// setPools puts all new pools in place at once (the kernel waits for its CPUs each time) and fills them: all ports of a
// pool's source address are unused.
func (p *dataplane) setPools() {
	p.Helper()
	fresh := map[uint32]*queues{}
	var places, descriptors []uint32
	for id, q := range p.queues {
		if !q.filled {
			fresh[id], q.filled = q, true
			places = append(places, id*2, id*2+1)
			descriptors = append(descriptors, uint32(q.unused.FD()), uint32(q.handedOut.FD()))
		}
	}
	if _, err := p.Ports.BatchUpdate(places, descriptors, nil); err != nil {
		p.Fatal(err)
	}
	for id, q := range fresh {
		count := uint32(q.source.last-q.source.first) + 1
		for first := uint32(0); first < count; first += uint32(bpf.FairleadLimitsFILL_PORTS) {
			request := bpf.FairleadFillRequest{
				Pool: id, FirstPort: uint32(q.source.first) + first, Count: min(count-first, uint32(bpf.FairleadLimitsFILL_PORTS)),
			}
			data, err := binary.Append(nil, binary.NativeEndian, request)
			p.must(err)
			if action, _ := p.run(p.Fill, data, theKernel.front); action != xdpPass {
				p.Fatalf("fill pool %d: action %d", id, action)
			}
		}
	}
}

// contents are the numbers in a queue, from its head on.
func (p *dataplane) contents(queue *ebpf.Map) []uint16 {
	p.Helper()
	var all []uint32
	for {
		var number uint32
		err := queue.LookupAndDelete(nil, &number)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		}
		p.must(err)
		all = append(all, number)
	}
	ports := make([]uint16, len(all))
	for i, number := range all {
		p.must(queue.Put(nil, number))
		ports[i] = uint16(number)
	}
	return ports
}

// xdpMD is the kernel's struct xdp_md.
type xdpMD struct {
	Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32
}

// run gives a program a frame that came in by a device; it answers the action and the frame as the program left it.
func (p *dataplane) run(program *ebpf.Program, frame []byte, from device) (action uint32, out []byte) {
	p.Helper()
	options := &ebpf.RunOptions{
		Data: frame, DataOut: make([]byte, len(frame)+256),
		Context: xdpMD{DataEnd: uint32(len(frame)), IngressIfindex: uint32(from.index)},
	}
	p.must(theKernel.do(p.cpu, func() (err error) {
		action, err = program.Run(options)
		return err
	}))
	return action, options.DataOut
}

// expectation is all that a packet should lead to.
type expectation struct {
	verdict verdict
	events  []event
	frame   []byte // as it leaves; nil: it was dropped
	to      int    // device it leaves by
	service uint32 // whose counters move; 0: none
	backend uint32
}

// check holds what came of a frame against what should have: the action, every byte, every counter.
func (p *dataplane) check(in []byte, from device, action uint32, out []byte, want expectation) {
	p.Helper()
	action2, name := p.actionFor(want, from), verdictNames[want.verdict]
	if action != action2 {
		p.Errorf("%s: action %d, want %d", name, action, action2)
	}
	if want.frame != nil {
		if !bytes.Equal(want.frame, out) {
			at := 0
			for at < min(len(out), len(want.frame)) && out[at] == want.frame[at] {
				at++
			}
			p.Errorf("%s: frame differs at byte %d\nin   %x\nwant %x\ngot  %x", name, at, in, want.frame, out)
		}
	}
	p.want.Verdicts[want.verdict]++
	for _, e := range want.events {
		p.want.Events[e]++
	}
	traffic := func(t *bpf.FairleadTraffic) {
		switch {
		case want.verdict >= bpf.FairleadVerdictANSWER_ARP:
			t.Refused++
		case want.verdict >= bpf.FairleadVerdictREPLY_TABLE:
			t.ReplyPackets++
			t.ReplyBytes += uint64(len(in))
		default:
			t.Packets++
			t.Bytes += uint64(len(in))
			if want.verdict == bpf.FairleadVerdictFORWARD_NEW {
				t.Connections++
			}
		}
	}
	if want.service != 0 {
		traffic(&p.want.Services[want.service])
	}
	if want.backend != 0 {
		traffic(&p.want.Backends[want.backend])
	}
	p.checkCounters(name)
	if p.Failed() {
		p.want = p.counted() // so that the next test's failures are its own
		p.FailNow()
	}
	provoked.Lock()
	defer provoked.Unlock()
	provoked.verdicts[want.verdict] = true
	for _, e := range want.events {
		provoked.events[e] = true
	}
}

// actionFor is the action that carries out a verdict.
func (p *dataplane) actionFor(want expectation, from device) uint32 {
	switch v := want.verdict; {
	case passes(v):
		return xdpPass
	case v >= bpf.FairleadVerdictDROP_TRUNCATED, v == passCheck:
		return xdpDrop
	case v >= bpf.FairleadVerdictANSWER_ARP || want.to == from.index:
		return xdpTX
	}
	return xdpRedirect
}

// checkCounters holds all counters against what they should be; what they shouldn't have moved is as it was.
func (p *dataplane) checkCounters(after string) {
	p.Helper()
	if diff := cmp.Diff(p.want.named(), p.counted().named()); diff != "" {
		p.Errorf("after %s: counters (-want +got):\n%s", after, diff)
	}
}

// named are the counters that aren't zero.
func (c counters) named() map[string]uint64 {
	named := map[string]uint64{}
	note := func(name string, value uint64) {
		if value != 0 {
			named[name] = value
		}
	}
	for i, value := range c.Verdicts {
		note(verdictNames[i], value)
	}
	for i, value := range c.Events {
		note(eventNames[i], value)
	}
	for kind, all := range map[string][]bpf.FairleadTraffic{"service": c.Services[:], "backend": c.Backends[:]} {
		for i, t := range all {
			name := fmt.Sprintf("%s %d ", kind, i)
			note(name+"packets", t.Packets)
			note(name+"bytes", t.Bytes)
			note(name+"connections", t.Connections)
			note(name+"refused", t.Refused)
			note(name+"reply packets", t.ReplyPackets)
			note(name+"reply bytes", t.ReplyBytes)
			note(name+"answered", t.Answered)
			note(name+"rejected", t.Rejected)
		}
	}
	return named
}

// counted is the sum of the counters over the CPUs.
func (p *dataplane) counted() (sum counters) {
	p.Helper()
	var sets []bpf.FairleadCounterSet
	p.must(p.Counters.Lookup(uint32(0), &sets))
	for _, set := range sets {
		for i, n := range set.Verdicts {
			sum.Verdicts[i] += n
		}
		for i, n := range set.Events {
			sum.Events[i] += n
		}
	}
	traffic := func(m *ebpf.Map, all []bpf.FairleadTraffic) {
		for id := range all {
			var each []bpf.FairleadTraffic
			p.must(m.Lookup(uint32(id), &each))
			for _, t := range each {
				all[id].Packets += t.Packets
				all[id].Bytes += t.Bytes
				all[id].Connections += t.Connections
				all[id].Refused += t.Refused
				all[id].ReplyPackets += t.ReplyPackets
				all[id].ReplyBytes += t.ReplyBytes
				all[id].Answered += t.Answered
				all[id].Rejected += t.Rejected
			}
		}
	}
	traffic(p.ServiceTraffic, sum.Services[:])
	traffic(p.BackendTraffic, sum.Backends[:])
	return sum
}

// tuple4 and tuple6 are a map's keys for packets from source to destination.
func (s *scene) tuple4(source, destination netip.AddrPort) bpf.FairleadTuple4 {
	return bpf.FairleadTuple4{
		Saddr: words(source.Addr())[0], Daddr: words(destination.Addr())[0],
		Sport: network(source.Port()), Dport: network(destination.Port()), Protocol: s.service.protocol,
	}
}

func (s *scene) tuple6(source, destination netip.AddrPort) bpf.FairleadTuple6 {
	return bpf.FairleadTuple6{
		Saddr: words(source.Addr()), Daddr: words(destination.Addr()),
		Sport: network(source.Port()), Dport: network(destination.Port()), Protocol: s.service.protocol,
	}
}

// tupleIn is the key of packets from source to destination in that of two maps which is their family's.
func (s *scene) tupleIn(map4, map6 *ebpf.Map, source, destination netip.AddrPort) (table *ebpf.Map, key any) {
	if source.Addr().Is4() {
		return map4, s.tuple4(source, destination)
	}
	return map6, s.tuple6(source, destination)
}

// lookUp reads the entry of a pair of maps, one for each family.
func lookUp[V any](s *scene, map4, map6 *ebpf.Map, source, destination netip.AddrPort) (value V, found bool) {
	s.Helper()
	table, key := s.tupleIn(map4, map6, source, destination)
	err := table.Lookup(key, &value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return value, false
	}
	s.must(err)
	return value, true
}

func (s *scene) connection(client, service netip.AddrPort) (bpf.FairleadConnection, bool) {
	s.Helper()
	return lookUp[bpf.FairleadConnection](s, s.Connections4, s.Connections6, client, service)
}

func (s *scene) halfOpen(client, service netip.AddrPort) (bpf.FairleadHalfOpen, bool) {
	s.Helper()
	return lookUp[bpf.FairleadHalfOpen](s, s.HalfOpen4, s.HalfOpen6, client, service)
}

func (p *dataplane) control() (block bpf.FairleadControlBlock) {
	p.Helper()
	p.must(p.Control.Lookup(uint32(0), &block))
	return block
}

// editControl changes what the daemon writes of the control block.
func (p *dataplane) editControl(edit func(*bpf.FairleadControlBlock)) {
	p.Helper()
	block := p.control()
	edit(&block)
	p.must(p.Control.Put(uint32(0), block))
}

func (p *dataplane) bitmaps() *bpf.FairleadBitmapSet {
	p.Helper()
	set := new(bpf.FairleadBitmapSet)
	p.must(p.Bitmaps.Lookup(uint32(0), set))
	return set
}

func bit(words *[bpf.FairleadLimitsBITMAP_WORDS]uint64, place uint32) bool {
	return words[place/64]>>(place%64)&1 != 0
}

func (s *scene) hashOf(client, service netip.AddrPort) uint64 {
	return maps.Tuple{Source: client, Destination: service, Protocol: s.service.protocol}.Hash()
}

// fresh and exception tell a connection's bits.
func (s *scene) fresh(client, service netip.AddrPort) bool {
	s.Helper()
	epoch := s.control().Epoch
	return bit(&s.bitmaps().Fresh[epoch&1], maps.FreshBit(s.hashOf(client, service), epoch))
}

func (s *scene) exception(client, service netip.AddrPort) bool {
	s.Helper()
	return bit(&s.bitmaps().Exception[s.control().ExceptionIndex&1], maps.ExceptionBit(s.hashOf(client, service)))
}

// checkTables checks what holds at all times: the counts are exact, connections and their ways back are pairs, and each
// source port is in one place.
func (p *dataplane) checkTables() {
	p.Helper()
	var count, young int64
	type pair struct {
		generation uint32
		sourcePort uint16 // 0: by nat
	}
	pairs := map[string]pair{} // ways back that confirmed connections must have
	note := func(c bpf.FairleadConnection, reply any, name string) {
		count++
		young += int64(c.State) & int64(bpf.FairleadConnectionStateSTATE_YOUNG)
		if c.State&uint32(bpf.FairleadConnectionStateSTATE_STATELESS) == 0 {
			pairs[fmt.Sprint(reply, name)] = pair{c.Generation, c.SourcePort}
		}
	}
	var backend bpf.FairleadBackend
	// to is whom the backend sees: a source address of ours, or, by nat, the client.
	to := func(c bpf.FairleadConnection, client [4]uint32, port uint16) ([4]uint32, uint16) {
		var source bpf.FairleadSource
		p.must(p.Backends.Lookup(c.Backend, &backend))
		if backend.Method == uint8(bpf.FairleadMethodMETHOD_NAT) {
			return client, port
		}
		p.must(p.Sources.Lookup(uint32(c.Source), &source))
		return source.Address, c.SourcePort
	}
	var connection bpf.FairleadConnection
	var key4 bpf.FairleadTuple4
	for entries := p.Connections4.Iterate(); entries.Next(&key4, &connection); {
		address, port := to(connection, [4]uint32{key4.Saddr}, key4.Sport)
		reply := bpf.FairleadTuple4{
			Saddr: backend.Address[0], Sport: backend.Port, Daddr: address[0], Dport: port, Protocol: key4.Protocol,
		}
		note(connection, reply, fmt.Sprint(key4))
	}
	var key6 bpf.FairleadTuple6
	for entries := p.Connections6.Iterate(); entries.Next(&key6, &connection); {
		address, port := to(connection, key6.Saddr, key6.Sport)
		reply := bpf.FairleadTuple6{
			Saddr: backend.Address, Sport: backend.Port, Daddr: address, Dport: port, Protocol: key6.Protocol,
		}
		note(connection, reply, fmt.Sprint(key6))
	}
	if block := p.control(); block.Connections != count || block.Young != young {
		p.Errorf("control says %d connections, %d young; the table has %d, %d young",
			block.Connections, block.Young, count, young)
	}

	out := map[uint32]map[uint16]bool{} // ports of confirmed connections that are in no queue, by pool
	queued := map[uint32]map[uint16]bool{}
	reply := func(name string, back bpf.FairleadWayBack, port uint16) {
		client, ok := pairs[name]
		if !ok || client.generation != back.Generation {
			p.Errorf("way back %s of generation %d: the connection has %d (found %t)",
				name, back.Generation, client.generation, ok)
		}
		delete(pairs, name)
		if client.sourcePort == 0 {
			return
		}
		place := out
		if back.Token == uint32(bpf.FairleadTokenTOKEN_QUEUED) {
			place = queued
		}
		if place[back.Pool] == nil {
			place[back.Pool] = map[uint16]bool{}
		}
		place[back.Pool][port] = true
	}
	var reply4 bpf.FairleadReply4
	for entries := p.Replies4.Iterate(); entries.Next(&key4, &reply4); {
		reply(fmt.Sprint(key4, fmt.Sprint(reply4.Client)), reply4.Back, network(key4.Dport))
	}
	var reply6 bpf.FairleadReply6
	for entries := p.Replies6.Iterate(); entries.Next(&key6, &reply6); {
		reply(fmt.Sprint(key6, fmt.Sprint(reply6.Client)), reply6.Back, network(key6.Dport))
	}
	for name := range pairs {
		p.Errorf("connection without its way back %s", name)
	}

	for id, q := range p.queues {
		places := map[uint16][]string{}
		for _, port := range p.contents(q.unused) {
			places[port] = append(places[port], "unused")
		}
		for _, port := range p.contents(q.handedOut) {
			places[port] = append(places[port], "handed out")
		}
		for port := range out[id] {
			places[port] = append(places[port], "of a connection")
		}
		for port := range queued[id] {
			if !slices.Contains(places[port], "handed out") {
				places[port] = append(places[port], "of a connection, marked as queued and not there")
			}
		}
		for port := int(q.source.first); port <= int(q.source.last); port++ {
			if len(places[uint16(port)]) != 1 {
				p.Errorf("pool %d: port %d is in %q, want one place", id, port, places[uint16(port)])
			}
			delete(places, uint16(port))
		}
		for port, where := range places {
			p.Errorf("pool %d: port %d, not one of its own, is %q", id, port, where)
		}
	}
}

// tick is the programs' coarse clock.
func (p *dataplane) tick() uint32 {
	p.Helper()
	var now unix.Timespec
	p.must(unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now))
	return uint32(now.Nano() >> bpf.FairleadLimitsTICK_SHIFT)
}

// await waits until the clock has moved on to a tick.
func (p *dataplane) await(tick uint32) {
	p.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for int32(p.tick()-tick) < 0 {
		if time.Now().After(deadline) {
			p.Fatalf("the clock did not reach tick %d", tick)
		}
		time.Sleep(time.Millisecond)
	}
}

// ringAnswer is the backend that the ring of a service names for a client, by Go's hash.
func ringAnswer(s service, client netip.AddrPort) uint32 {
	hash := maps.Tuple{Source: client, Destination: s.address, Protocol: s.protocol}.Hash()
	if s.flags&bpf.FairleadServiceFlagSERVICE_AFFINITY_CLIENT != 0 {
		hash = maps.HashClient(client.Addr())
	}
	return s.ring[maps.SlotOf(hash, uint32(len(s.ring)))] & uint32(bpf.FairleadSlotSLOT_BACKEND)
}
