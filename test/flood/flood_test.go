package flood

import (
	"encoding/binary"
	"errors"
	"flag"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
	"fairlead/maps"
)

var (
	connections = flag.Uint("flood.connections", 10_000, "idle connections by dsr that floods must not move; by fullnat and ipip a tenth each")
	packets     = flag.Uint64("flood.packets", 300_000, "SYNs, and connections of two packets, in a flood")
	seed        = flag.Uint64("flood.seed", 0, "seed of the floods (default: of the clock)")
)

// scale is how large a flood's tables are: as the defaults, where there are 100,000 connections.
type scale struct {
	limits
	idle, epoch time.Duration
	long        bool
}

func scaled(t *testing.T) scale {
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-flood.seed=%d", *seed)
	s := scale{epoch: 250 * time.Millisecond}
	for s.limits.connections = 1 << 16; uint(s.limits.connections) < 6**connections; {
		s.limits.connections *= 2
	}
	if s.long = s.limits.connections > 1<<18; s.long {
		s.epoch = 2 * time.Second
	}
	s.young, s.halfOpen, s.adoptions = s.limits.connections/8, s.limits.connections/8, 256
	s.idle = 4 * s.epoch
	if *packets < uint64(s.limits.connections) {
		t.Fatalf("-flood.packets=%d: fewer connections than the table's %d are no flood", *packets, s.limits.connections)
	}
	return s
}

func stateless(s site) bool { return s.method.Stateless() }

// TestFlood is the promise under attack: idle connections are there, and go where they went, whatever flood has passed,
// and whatever backends there are since. It tells what a packet takes.
func TestFlood(t *testing.T) {
	size := scaled(t)
	p, all := load(t, size.epoch, size.limits), newDrivers(t)
	sites := []site{
		{1, false, maps.MethodDSR}, {2, true, maps.MethodDSR}, {3, false, maps.MethodFullNAT}, {4, true, maps.MethodIPIP},
	}
	p.apply(want(sites, time.Hour, 1, 2, 3, 4, 5, 6))
	var idle []*connection
	begin := time.Now()
	for i, n := range []uint{(*connections + 1) / 2, *connections / 2, *connections / 10, *connections / 10} {
		idle = append(idle, p.established(sites[i], 0, uint32(n))...)
	}
	t.Logf("%d connections established in %v", len(idle), time.Since(begin).Round(time.Millisecond))
	// From here on epochs turn, and none of them says anything until the floods are over.
	halt := p.keep()

	// flood answers what was counted: each packet has met one verdict.
	round := uint64(0)
	flood := func(a attack) counts {
		t.Helper()
		var took time.Duration
		round++
		begin := time.Now()
		got := p.counted(func() { took = all.flood(t, p.Fairlead, a, *seed+round<<50) })
		t.Logf("%s: %d packets in %v, %v each (the driver alone %v): %v", a.name, a.packets(),
			time.Since(begin).Round(time.Millisecond), took, all.alone(t, a), got)
		if n := got.verdicts(); n != a.packets() {
			t.Errorf("%s: %d packets, and %d verdicts", a.name, a.packets(), n)
		}
		p.untouched("after "+a.name, idle)
		return got
	}
	held := func(what string, got, least, most uint64) {
		t.Helper()
		if got < least || got > most {
			t.Errorf("%s: %d, want %d to %d", what, got, least, most)
		}
	}
	slack := uint64(len(all)) // CPUs that look at a count, and then add to it

	// SYNs alone are nowhere but in the half-open table.
	a := attack{name: "SYNs", sites: sites, connections: *packets, first: floodStepSTEP_SYN, steps: 1}
	got := flood(a)
	held("new", got["forward_new"], a.packets()-a.packets()/1000, a.packets())
	held("confirmed", got["confirmed"], 0, 0)
	if n, young := p.connections(); n != len(idle) || young != 0 {
		t.Errorf("after SYNs: %d connections, %d of them young, want the %d established ones", n, young, len(idle))
	}

	// What no table knows is adopted at a limited rate.
	a = attack{name: "unknown ACKs", sites: sites, connections: *packets / 10, first: floodStepSTEP_ACK, steps: 1}
	before := maps.Now()
	got = flood(a)
	most := uint64(maps.Now()-before+2) * uint64(size.adoptions) * uint64(len(all))
	held("adopted", got["forward_adopted"], 1, most)
	held("adopted, or not", got["forward_adopted"]+got["adoption_limited"]+got["young_limited"]+got["forward_ring"],
		a.to(stateless), a.to(stateless))
	held("refused", got["reset_unknown"], a.connections-a.to(stateless), a.connections-a.to(stateless))
	adopted := got["confirmed"]

	// Connections of a SYN and an ACK: as many are noted as the young entries' budget has room for; by fullnat, where the
	// backend has its say, none. Backends come and go meanwhile.
	a = attack{name: "SYNs and ACKs", sites: sites, connections: *packets, first: floodStepSTEP_SYN, steps: 2}
	var changing sync.WaitGroup
	changing.Go(func() {
		if _, err := p.manager.Apply(want(sites, time.Hour, 2, 3, 4, 7, 8), hop); err != nil {
			t.Errorf("apply in a flood: %v", err)
		}
	})
	got = flood(a)
	changing.Wait()
	held("young", got["confirmed"]+adopted, uint64(size.young), uint64(size.young)+slack)
	held("noted, or not", got["confirmed"]+got["young_limited"], a.to(stateless)-a.to(stateless)/1000, a.to(stateless))
	if n, young := p.connections(); n != len(idle)+young || young < int(size.young) {
		t.Errorf("after SYNs and ACKs: %d connections, %d of them young; %d are established", n, young, len(idle))
	}

	// Who sends a third packet without having seen an answer can't be told, by dsr and ipip, from who has: the table fills.
	a = attack{name: "SYNs, ACKs and more", sites: sites, connections: 2 * uint64(size.limits.connections), first: floodStepSTEP_SYN, steps: 3}
	got = flood(a)
	held("table full", got["table_full"], 1, a.packets())
	n, young := p.connections()
	held("connections", uint64(n), uint64(size.limits.connections), uint64(size.limits.connections)+slack)
	held("young", uint64(young), uint64(size.young), uint64(size.young)+slack)
	last := maps.Now()

	p.apply(want(sites, time.Hour, 1, 3, 5, 8, 9))
	if n := p.unsettled(); n != 0 {
		t.Errorf("%d slots are unsettled after the change", n)
	}
	p.untouched("after all floods", idle)
	begin = time.Now()
	p.everyone("after all floods", idle)
	t.Logf("all %d connections talked in %v", len(idle), time.Since(begin).Round(time.Millisecond))
	turns, slowest := halt()
	t.Logf("%d epochs turned meanwhile, the slowest in %v", turns, slowest.Round(time.Millisecond))

	p.clears(size, sites, idle, last)
}

// alone is how long a packet of a flood takes that meets a program which does nothing.
func (all drivers) alone(t *testing.T, a attack) time.Duration {
	t.Helper()
	a.connections = min(a.connections, 200_000)
	return all.flood(t, all[0].Nothing, a, 0)
}

// clears shows that what the floods left goes when it is time, while the established connections talk on.
func (p *plane) clears(size scale, sites []site, idle []*connection, last uint32) {
	p.Helper()
	begin := time.Now()
	// An idle timeout that can be waited for.
	p.apply(want(sites, size.idle, 1, 3, 5, 8, 9))
	n, _ := p.connections()
	for deadline := time.Now().Add(20 * size.idle); n > len(idle); n, _ = p.connections() {
		if time.Now().After(deadline) {
			p.Fatalf("%d connections beside the %d established ones are there 20 idle timeouts after the floods", n-len(idle),
				len(idle))
		}
		if maps.Age(maps.Now(), last) < size.idle && n < int(size.limits.connections) {
			p.Fatalf("%d connections are there before an idle timeout is over, of %d", n, size.limits.connections)
		}
		p.everyone("beside the remains of the floods", idle)
		p.must(p.manager.Turn())
	}
	p.untouched("when the floods' remains have gone", idle)
	p.Logf("the floods' connections were gone after %v, idle timeout %v", time.Since(begin).Round(time.Millisecond), size.idle)

	halfOpen := p.entries(p.HalfOpen4) + p.entries(p.HalfOpen6)
	if halfOpen < int(size.halfOpen) {
		p.Errorf("%d half-open connections are left, the tables hold %d each", halfOpen, size.halfOpen)
	}
	if size.long {
		for over := last + maps.Ticks(maps.HalfOpenLife) + 1; int32(over-maps.Now()) > 0; {
			p.everyone("until half-open connections have had their time", idle)
			p.must(p.manager.Turn())
		}
	} else {
		p.ageHalfOpen(maps.HalfOpenLife - 30*time.Second)
		aged := p.entries(p.HalfOpen4) + p.entries(p.HalfOpen6) // an LRU makes room for what is written, even in its own place
		p.must(p.manager.Turn())
		if n := p.entries(p.HalfOpen4) + p.entries(p.HalfOpen6); n != aged {
			p.Errorf("%d half-open connections of %d are left before their time is over", n, aged)
		}
		p.ageHalfOpen(30 * time.Second)
	}
	p.must(p.manager.Turn())
	fullnat := 0
	for _, k := range idle {
		if k.site.method == maps.MethodFullNAT {
			fullnat++
		}
	}
	for _, table := range []struct {
		name    string
		m       *ebpf.Map
		entries int
	}{
		{"half_open4", p.HalfOpen4, 0}, {"half_open6", p.HalfOpen6, 0}, {"replies4", p.Replies4, fullnat}, {"replies6", p.Replies6, 0},
	} {
		if n := p.entries(table.m); n != table.entries {
			p.Errorf("%s holds %d entries, want %d", table.name, n, table.entries)
		}
	}
	if n, young := p.connections(); n != len(idle) || young != 0 {
		p.Errorf("%d connections, %d of them young, want the %d established ones", n, young, len(idle))
	}
	p.everyone("at the end", idle)
	p.untouched("at the end", idle)
	// And there is room for others: ports as well.
	for _, s := range sites {
		p.established(s, 1_000_000, 100)
	}
}

// ageHalfOpen makes all half-open connections older.
func (p *plane) ageHalfOpen(by time.Duration) {
	p.Helper()
	p.must(errors.Join(age[bpf.FairleadTuple4](p.HalfOpen4, maps.Ticks(by)), age[bpf.FairleadTuple6](p.HalfOpen6, maps.Ticks(by))))
}

func age[K comparable](table *ebpf.Map, by uint32) error {
	var key K
	var value bpf.FairleadHalfOpen
	var keys []K
	var values []bpf.FairleadHalfOpen
	walk := table.Iterate()
	for walk.Next(&key, &value) {
		value.First -= by
		keys, values = append(keys, key), append(values, value)
	}
	if err := walk.Err(); err != nil || len(keys) == 0 {
		return err
	}
	_, err := table.BatchUpdate(keys, values, nil)
	return err
}

// TestLRU is for the record, and why there is a young entries' budget: a balancer whose connections stand in an LRU table
// alone keeps idle ones through SYNs, and loses them to connections of two packets.
func TestLRU(t *testing.T) {
	size := scaled(t)
	all := newDrivers(t)
	sites := []site{{1, false, maps.MethodDSR}, {2, true, maps.MethodDSR}}
	for _, kind := range []struct {
		name  string
		flags uint32
	}{{"common LRU", 0}, {"per-CPU LRU", 2}} { // BPF_F_NO_COMMON_LRU
		var balancer floodObjects
		loadDriver(t, &balancer, func(spec *ebpf.CollectionSpec) {
			spec.Maps["table"].MaxEntries, spec.Maps["table"].Flags = size.limits.connections, kind.flags
		})
		var idle []*connection
		for i := range uint32(*connections) {
			idle = append(idle, sites[i%2].client(i))
		}
		// A table that has been in use. In an empty one the kernel would think the idle connections too many for its list of
		// active entries, and SYNs alone would cost half of them.
		all.flood(t, balancer.TableFirst, attack{
			name: "before", connections: uint64(size.limits.connections), sites: sites, first: floodStepSTEP_SYN, steps: 1,
		}, *seed)
		// Each CPU has its part of them: SYN, ACK and data.
		var opening sync.WaitGroup
		for i, d := range all {
			opening.Go(func() {
				if err := onCPU(d.number); err != nil {
					t.Error(err)
					return
				}
				c := newCPU(balancer.TableFirst)
				for at := i; at < len(idle); at += len(all) {
					k := idle[at]
					k.send(c, syn, k.seq-1, 0, 0)
					k.send(c, ack, k.seq, k.ack, 0)
					k.send(c, ack|psh, k.seq, k.ack, 4)
				}
			})
		}
		opening.Wait()
		left := func() (n int) {
			for _, k := range idle {
				key, backend := k.ends(), uint32(0)
				if err := balancer.Table.Lookup(&key, &backend); err == nil {
					n++
				}
			}
			return n
		}
		if n := left(); n != len(idle) {
			t.Fatalf("%s: %d of %d connections before any flood", kind.name, n, len(idle))
		}
		var survivors []int
		for _, steps := range []uint32{1, 2} {
			a := attack{connections: *packets, sites: sites, first: floodStepSTEP_SYN, steps: steps}
			took := all.flood(t, balancer.TableFirst, a, *seed+uint64(steps)<<50)
			survivors = append(survivors, left())
			t.Logf("%s of %d: %d of %d idle connections are left after %d packets of %d connections (%v a packet)", kind.name,
				size.limits.connections, survivors[len(survivors)-1], len(idle), a.packets(), a.connections, took)
		}
		if survivors[1] > len(idle)/20 {
			t.Errorf("%s: %d of %d connections are left after a flood of two packets each: it has become something else",
				kind.name, survivors[1], len(idle))
		}
	}
}

// ends is the connection's key in the table of table_first, as on the wire.
func (k *connection) ends() (key [36]byte) {
	copy(key[:16], k.tuple.Source.Addr().AsSlice())
	copy(key[16:32], k.tuple.Destination.Addr().AsSlice())
	binary.BigEndian.PutUint16(key[32:], k.tuple.Source.Port())
	binary.BigEndian.PutUint16(key[34:], k.tuple.Destination.Port())
	return key
}
