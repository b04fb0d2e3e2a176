package agreement

import (
	"encoding/binary"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
	"fairlead/maps"
)

// halfOpenSize is that of the half-open table: less than the SYNs sent, so that newer connections evict older ones.
const halfOpenSize = 16384

// XDP_TX as the kernel's headers number it. A frame made by BPF_PROG_TEST_RUN comes in by the loopback device, and
// there all next hops are.
const (
	xdpTX    = 3
	loopback = 1
)

// dataplane is the real programs and maps, attached nowhere and pinned nowhere, under the real map manager.
type dataplane struct {
	*testing.T
	random  *rand.Rand
	ipv6    bool
	objects bpf.FairleadObjects
	manager *maps.Manager
	frame   frame
	out     []byte
	farm    farm
	counted []uint64 // verdicts, when they were last asked for
	// expected are all verdicts that the segments sent should have been given.
	expected [bpf.FairleadVerdictVERDICT_COUNT]uint64
	tally    tally
}

// newDataplane loads a data plane with room for so many connections and a farm of so many backends.
func newDataplane(t *testing.T, random *rand.Rand, ipv6 bool, connections uint32, backends int,
	methods ...maps.Method) *dataplane {
	t.Helper()
	spec, err := bpf.LoadFairlead()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		if m.Type == ebpf.LRUHash {
			m.MaxEntries = halfOpenSize
		}
	}
	for _, name := range []string{bpf.FairleadMapConnections4, bpf.FairleadMapConnections6,
		bpf.FairleadMapReplies4, bpf.FairleadMapReplies6} {
		spec.Maps[name].MaxEntries = connections
	}
	for _, name := range []string{bpf.FairleadVarConnectionCapacity, bpf.FairleadVarYoungBudget} {
		if err := spec.Variables[name].Set(connections); err != nil {
			t.Fatal(err)
		}
	}
	p := &dataplane{T: t, random: random, ipv6: ipv6, frame: newFrame(ipv6)}
	if err := spec.LoadAndAssign(&p.objects, nil); err != nil {
		t.Fatalf("load the data plane (root is needed): %+v", err)
	}
	t.Cleanup(func() { p.objects.Close() })
	p.manager, err = maps.NewManager(&p.objects.FairleadMaps, maps.ManagerOptions{
		Tend: p.objects.Tend, Fill: p.objects.Fill, Epoch: 10 * time.Second, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.manager.Close() })
	p.out = make([]byte, len(p.frame.bytes)+64)
	p.counted = make([]uint64, bpf.FairleadVerdictVERDICT_COUNT)
	p.farm = p.newFarm(backends, methods)
	return p
}

func (p *dataplane) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

// send gives the program one segment.
func (p *dataplane) send(source, destination netip.AddrPort, tcp numbers) outcome {
	p.frame.patch(source, destination, tcp)
	options := ebpf.RunOptions{Data: p.frame.bytes, DataOut: p.out}
	action, err := p.objects.Fairlead.Run(&options)
	p.must(err)
	return p.frame.outcome(action, options.DataOut)
}

// sendOne gives the program one segment and asks for the verdict on it.
func (p *dataplane) sendOne(source, destination netip.AddrPort, tcp numbers) (bpf.FairleadVerdict, outcome) {
	p.Helper()
	p.verdicts()
	o := p.send(source, destination, tcp)
	verdict := bpf.FairleadVerdictVERDICT_COUNT
	for i, count := range p.verdicts() {
		if count > 1 || count > 0 && verdict != bpf.FairleadVerdictVERDICT_COUNT {
			p.Fatalf("a segment from %v to %v was given more than one verdict", source, destination)
		}
		if count > 0 {
			verdict = bpf.FairleadVerdict(i)
		}
	}
	if verdict == bpf.FairleadVerdictVERDICT_COUNT {
		p.Fatalf("a segment from %v to %v was given no verdict", source, destination)
	}
	return verdict, o
}

// verdicts are how often each verdict was given since they were last asked for.
func (p *dataplane) verdicts() []uint64 {
	p.Helper()
	totals, err := p.manager.Set().Counters.Totals()
	p.must(err)
	since := make([]uint64, len(p.counted))
	for verdict, count := range totals.Verdicts {
		since[verdict] = count - p.counted[verdict]
	}
	p.counted = totals.Verdicts
	return since
}

// hopMAC is the next hop's MAC of a number: each backend address has its own.
func hopMAC(number int) [6]byte {
	mac := [6]byte{0x02, 0xbe}
	binary.BigEndian.PutUint32(mac[2:], uint32(number))
	return mac
}

// address is random, but one that a host may have, not v4-mapped, and not drawn before.
func (p *dataplane) address() netip.Addr {
	for {
		var bytes [16]byte
		binary.BigEndian.PutUint64(bytes[:], p.random.Uint64())
		binary.BigEndian.PutUint64(bytes[8:], p.random.Uint64())
		address := netip.AddrFrom16(bytes)
		if !p.ipv6 {
			address = netip.AddrFrom4([4]byte(bytes[:4]))
		}
		impossible := address.IsUnspecified() || address.IsLoopback() || address.IsMulticast() || address.Is4In6() ||
			!p.ipv6 && (bytes[0] == 0 || bytes[0] >= 224)
		if !p.farm.drawn[address] && !impossible {
			return address
		}
	}
}

func (p *dataplane) port() uint16 { return uint16(1 + p.random.IntN(65535)) }
