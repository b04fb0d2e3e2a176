package model

import (
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"time"
	"unsafe"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/cilium/ebpf"
	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// XDP's actions, as the kernel's headers number them.
const (
	xdpAborted uint32 = iota
	xdpDrop
	xdpPass
	xdpTX
	xdpRedirect
)

var actionNames = [...]string{"XDP_ABORTED", "XDP_DROP", "XDP_PASS", "XDP_TX", "XDP_REDIRECT"}

type (
	verdict = bpf.FairleadVerdict
	event   = bpf.FairleadEvent
)

// verdictNames and eventNames are the C's own, from the object's type information.
var verdictNames, eventNames = bpf.VerdictNames(), bpf.EventNames()

// Sizes of the maps whose every entry is read after each packet.
const (
	maxServices = 32
	maxBackends = 96
)

// counters are sums over the CPUs.
type counters struct {
	verdicts [bpf.FairleadVerdictVERDICT_COUNT]uint64
	events   [bpf.FairleadEventEVENT_COUNT]uint64
	services [maxServices]traffic
	backends [maxBackends]traffic
}

// traffic is bpf's struct, without what keeps it from being compared. How SYNs were answered is not looked at here.
type traffic struct {
	packets, bytes, connections, refused, replyPackets, replyBytes, answered, rejected uint64
}

// limits are load-time constants and sizes of tables that a round is played under. What is 0 is out of the way.
type limits struct {
	answers, adoptions, connections, young uint32
	epoch                                  time.Duration
}

// devices are those that packets come by: ends of veth pairs in a network namespace of the test's thread.
type devices []device

type device struct {
	index uint32
	mtu   uint32
	mac   mac
	told  bool // the data plane knows it
}

// newDevices moves the calling thread, for good, into a network namespace with these devices. The namespace ends with
// the thread, the thread with its goroutine.
func newDevices() (devices, error) {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("make a network namespace (root is needed): %w", err)
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return nil, fmt.Errorf("open ethtool: %w", err)
	}
	defer tool.Close()
	var all devices
	for i, d := range []device{
		{mtu: 1500, mac: mac{2, 0xed, 0, 0, 0, 0}, told: true},
		{mtu: 1500, mac: mac{2, 0xed, 0, 0, 0, 1}, told: true},
		{mtu: 1300, mac: mac{2, 0xed, 0, 0, 0, 2}, told: true},
		{mtu: 1500, mac: mac{2, 0xed, 0, 0, 0, 3}},
	} {
		attributes := netlink.NewLinkAttrs()
		attributes.Name = fmt.Sprintf("arm%d", i)
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attributes, PeerName: attributes.Name + "-wire"}); err != nil {
			return nil, fmt.Errorf("add veth %s: %w", attributes.Name, err)
		}
		link, err := netlink.LinkByName(attributes.Name)
		if err != nil {
			return nil, err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return nil, fmt.Errorf("set %s up: %w", attributes.Name, err)
		}
		// Only with GRO on has veth a receive queue that test runs can name.
		if err := tool.Change(attributes.Name, map[string]bool{"rx-gro": true}); err != nil {
			return nil, fmt.Errorf("set GRO of %s on: %w", attributes.Name, err)
		}
		d.index = uint32(link.Attrs().Index)
		all = append(all, d)
	}
	return all, nil
}

// by is the device of an index.
func (d devices) by(index uint32) device {
	for _, one := range d {
		if one.index == index {
			return one
		}
	}
	return device{}
}

// plane is the data plane with its map manager, attached nowhere. Packets come from the model.
type plane struct {
	objects bpf.FairleadObjects
	manager *maps.Manager
	epoch   time.Duration
	buffers *buffers
	cpus    int
}

// buffers are what the kernel reads and writes. They are on the heap, where Go moves nothing.
type buffers struct {
	run      testRun
	context  xdpMD
	in, out  [16384]byte
	lookup   lookup
	batch    batch
	key      uint32
	next     uint32
	keys     [maxBackends]uint32
	sets     []bpf.FairleadCounterSet
	services []traffic
	backends []traffic
}

// testRun, lookup and batch are the kernel's union bpf_attr. (The library's calls are right, and too slow for packets by
// the million.)
type testRun struct {
	program                 uint32
	action                  uint32
	inSize, outSize         uint32
	in, out                 uint64
	repeat, duration        uint32
	contextSize, contextOut uint32
	contextIn, contextTo    uint64
	flags, onCPU, batch     uint32
	_                       uint32
}

type lookup struct {
	table      uint32
	_          uint32
	key, value uint64
	flags      uint64
}

type batch struct {
	in, out      uint64
	keys, values uint64
	count, table uint32
	flags, more  uint64
}

// xdpMD is the kernel's struct xdp_md.
type xdpMD struct {
	_       uint32 // where data begin
	dataEnd uint32
	_       uint32 // where metadata begin
	ingress uint32
	_, _    uint32 // queue, and egress device
}

const (
	cmdLookup      = 1
	cmdTestRun     = 10
	cmdLookupBatch = 24
)

func address[T any](p *T) uint64 { return uint64(uintptr(unsafe.Pointer(p))) }

func newBuffers(program *ebpf.Program, cpus int) *buffers {
	b := new(buffers)
	b.sets = make([]bpf.FairleadCounterSet, cpus)
	b.services, b.backends = make([]traffic, maxServices*cpus), make([]traffic, maxBackends*cpus)
	b.run.program = uint32(program.FD())
	b.run.in, b.run.out = address(&b.in), address(&b.out)
	b.run.contextIn, b.run.contextSize = address(&b.context), uint32(unsafe.Sizeof(b.context))
	return b
}

// newPlane loads the data plane.
func newPlane(l limits) (_ *plane, err error) {
	spec, err := bpf.LoadFairlead()
	if err != nil {
		return nil, err
	}
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		switch name {
		case bpf.FairleadMapServiceTraffic, bpf.FairleadMapServiceInfo:
			m.MaxEntries = maxServices
		case bpf.FairleadMapBackends, bpf.FairleadMapBackendTraffic, bpf.FairleadMapBackendInfo:
			m.MaxEntries = maxBackends
		case bpf.FairleadMapPools:
			m.MaxEntries = 1024
		case bpf.FairleadMapPorts:
			m.MaxEntries = 2048
		case bpf.FairleadMapFragments:
			m.MaxEntries = 1 << 17 // nobody is forgotten
		}
	}
	set := func(name string, value uint32) {
		if value != 0 && err == nil {
			err = spec.Variables[name].Set(value)
		}
	}
	const outOfTheWay = 1 << 30
	orNone := func(value uint32) uint32 {
		if value == 0 {
			return outOfTheWay
		}
		return value
	}
	set(bpf.FairleadVarAnswersA_tick, orNone(l.answers))
	set(bpf.FairleadVarAdoptionsA_tick, orNone(l.adoptions))
	set(bpf.FairleadVarYoungBudget, orNone(l.young))
	set(bpf.FairleadVarConnectionCapacity, l.connections)
	if err != nil {
		return nil, err
	}
	p := &plane{epoch: l.epoch, cpus: ebpf.MustPossibleCPU()}
	if err := spec.LoadAndAssign(&p.objects, nil); err != nil {
		return nil, fmt.Errorf("load the data plane (root is needed): %w", err)
	}
	p.buffers = newBuffers(p.objects.Fairlead, p.cpus)
	if p.manager, err = maps.NewManager(&p.objects.FairleadMaps, maps.ManagerOptions{
		Tend: p.objects.Tend, Fill: p.objects.Fill, Epoch: p.epoch, Logger: slog.New(slog.DiscardHandler),
	}); err != nil {
		p.objects.Close()
		return nil, err
	}
	return p, nil
}

func (p *plane) close() {
	p.manager.Close()
	p.objects.Close()
}

func call(command int, attribute unsafe.Pointer, size uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attribute), size); errno != 0 {
		return errno
	}
	return nil
}

// run gives the program a frame that came by a device. The frame that it answers is the plane's, until the next run.
func (p *plane) run(frame []byte, ingress uint32) (action uint32, out []byte, err error) {
	b := p.buffers
	copy(b.in[:], frame)
	b.context = xdpMD{dataEnd: uint32(len(frame)), ingress: ingress}
	b.run.inSize, b.run.outSize = uint32(len(frame)), uint32(len(b.out))
	if err := call(cmdTestRun, unsafe.Pointer(&b.run), unsafe.Sizeof(b.run)); err != nil {
		return 0, nil, fmt.Errorf("run the program on %d bytes that came by device %d: %w", len(frame), ingress, err)
	}
	return b.run.action, b.out[:b.run.outSize], nil
}

// count reads all counters.
func (p *plane) count(c *counters) error {
	*c = counters{}
	b := p.buffers
	b.lookup = lookup{table: uint32(p.objects.Counters.FD()), key: address(&b.key), value: address(&b.sets[0])}
	if err := call(cmdLookup, unsafe.Pointer(&b.lookup), unsafe.Sizeof(b.lookup)); err != nil {
		return fmt.Errorf("read the counters: %w", err)
	}
	for i := range b.sets {
		for j, n := range b.sets[i].Verdicts {
			c.verdicts[j] += n
		}
		for j, n := range b.sets[i].Events {
			c.events[j] += n
		}
	}
	if err := p.countTraffic(p.objects.ServiceTraffic, b.services, c.services[:]); err != nil {
		return err
	}
	return p.countTraffic(p.objects.BackendTraffic, b.backends, c.backends[:])
}

func (p *plane) countTraffic(m *ebpf.Map, each, all []traffic) error {
	b := p.buffers
	b.batch = batch{
		out: address(&b.next), keys: address(&b.keys), values: address(&each[0]),
		count: uint32(len(all)), table: uint32(m.FD()),
	}
	err := call(cmdLookupBatch, unsafe.Pointer(&b.batch), unsafe.Sizeof(b.batch))
	if err != nil && err != unix.ENOENT || int(b.batch.count) != len(all) {
		return fmt.Errorf("read %d of %d entries of %s: %w", b.batch.count, len(all), m, err)
	}
	for i := range all {
		for cpu := range p.cpus {
			one := &each[i*p.cpus+cpu]
			all[i].packets += one.packets
			all[i].bytes += one.bytes
			all[i].connections += one.connections
			all[i].refused += one.refused
			all[i].replyPackets += one.replyPackets
			all[i].replyBytes += one.replyBytes
		}
	}
	return nil
}

// result is what came of a packet.
type result struct {
	action   uint32
	out      []byte
	verdicts [bpf.FairleadVerdictVERDICT_COUNT]int64 // moved by
	events   [bpf.FairleadEventEVENT_COUNT]int64
	traffic  []moved
}

// moved is a traffic counter that moved.
type moved struct {
	backend bool // else a service's
	id      uint32
	by      traffic // as numbers of two's complement
}

// verdict is the one verdict that was counted; false: none, or several.
func (r *result) verdict() (verdict, bool) {
	found, ok := verdict(0), false
	for v, n := range r.verdicts {
		if n == 0 {
			continue
		}
		if n != 1 || ok {
			return 0, false
		}
		found, ok = verdict(v), true
	}
	return found, ok
}

func (r *result) event(e event) bool { return r.events[e] != 0 }

// difference fills in what moved between two counts.
func (r *result) difference(before, after *counters) {
	for i := range after.verdicts {
		r.verdicts[i] = int64(after.verdicts[i] - before.verdicts[i])
	}
	for i := range after.events {
		r.events[i] = int64(after.events[i] - before.events[i])
	}
	r.traffic = r.traffic[:0]
	minus := func(backend bool, id int, a, b *traffic) {
		if *a == *b {
			return
		}
		r.traffic = append(r.traffic, moved{backend, uint32(id), traffic{
			a.packets - b.packets, a.bytes - b.bytes, a.connections - b.connections, a.refused - b.refused,
			a.replyPackets - b.replyPackets, a.replyBytes - b.replyBytes, 0, 0,
		}})
	}
	for i := range after.services {
		minus(false, i, &after.services[i], &before.services[i])
	}
	for i := range after.backends {
		minus(true, i, &after.backends[i], &before.backends[i])
	}
}

// names of the moved counters, for people.
func (r *result) String() string {
	text := fmt.Sprintf("action %d", r.action)
	if int(r.action) < len(actionNames) {
		text = actionNames[r.action]
	}
	for i, n := range r.verdicts {
		if n != 0 {
			text += fmt.Sprintf(" %s%+d", verdictNames[i], n)
		}
	}
	for i, n := range r.events {
		if n != 0 {
			text += fmt.Sprintf(" event:%s%+d", eventNames[i], n)
		}
	}
	for _, m := range r.traffic {
		kind := "service"
		if m.backend {
			kind = "backend"
		}
		text += fmt.Sprintf(" %s %d: %+v", kind, m.id, m.by)
	}
	return text
}

func addressOf(a string) netip.Addr { return netip.MustParseAddr(a) }
