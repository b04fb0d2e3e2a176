package flood

import (
	"slices"
	"testing"
	"time"

	"fairlead/maps"
)

// TestFullTable: a flood fills the connection table. Established connections go on; newcomers go by the ring alone or,
// where their method needs an entry, get RST at their SYN; each is counted. When there is room again, they are taken.
func TestFullTable(t *testing.T) {
	const epoch = 100 * time.Millisecond
	l := limits{connections: 8192, young: 1024, halfOpen: 8192, adoptions: 256}
	const kept = 8192 / 64 // for handshakes, where the method needs an entry
	p, all, sites := load(t, epoch, l), newDrivers(t), eachSite()
	p.apply(want(sites, time.Hour, 1, 2, 3))
	old := p.living(sites, 100)
	flood := attack{
		name: "SYNs, ACKs and more", connections: 20_000, first: floodStepSTEP_SYN, steps: 3,
		sites: slices.DeleteFunc(slices.Clone(sites), func(s site) bool { return !stateless(s) }),
	}
	got := p.counted(func() { all.flood(t, p.Fairlead, flood, 1) })
	if n, _ := p.connections(); n < int(l.connections) || n >= int(l.connections)+len(all) || got["table_full"] == 0 {
		t.Fatalf("%d connections in a table of %d after a flood, counted: %v", n, l.connections, got)
	}
	// Half-open connections of the flood may show themselves no more: who is in the table now stays alone there.
	p.untouched("in a full table", old)
	p.everyone("in a full table", old)

	var byRing, refused []*connection
	for _, s := range sites {
		for i := range uint32(20) {
			k := s.client(1000 + i)
			if !stateless(s) {
				p.expect(counts{"reset_table_full": 1, "table_full": 1}, func() {
					if l := k.send(p.cpu, syn, k.seq-1, 0, 0); !l.isReset(k.tuple.Source) {
						t.Errorf("%v: a SYN at a full table: %v", s, l)
					}
				})
				if p.halfOpen(k) {
					t.Errorf("%v: a connection that was refused is half-open", s)
				}
				refused = append(refused, k)
				continue
			}
			p.expect(counts{"forward_new": 1, "forward_half_open": 3, "table_full": 3}, func() {
				if !k.open(p.cpu) {
					t.Fatalf("%v: a SYN was refused, and its method needs no entry", s)
				}
				p.must(k.acknowledge(p.cpu))
				p.must(k.talk(p.cpu))
			})
			if n := p.ringBackend(k); k.backend != n {
				t.Errorf("%v: a newcomer went to backend %d, its slot has %d", s, k.backend, n)
			}
			byRing = append(byRing, k)
		}
	}
	for _, k := range slices.Concat(byRing, refused) {
		if _, found := p.entry(k); found {
			t.Fatalf("%v: a full table took another", k.site)
		}
	}
	p.untouched("after newcomers", old)

	// Room for them and for the handshakes that it keeps.
	room := len(byRing) + len(refused) + kept
	ending := old[:0:0]
	for i, k := range old {
		if i%2 == 0 {
			ending = append(ending, k)
		}
	}
	old = slices.DeleteFunc(old, func(k *connection) bool { return slices.Contains(ending, k) })
	if len(ending) < room {
		t.Fatalf("%d connections end, and there must be room for %d", len(ending), room)
	}
	for _, k := range ending {
		p.must(k.check("RST", k.send(p.cpu, rst, k.seq, 0, 0)))
	}
	p.gone(int(l.connections) - len(ending) + len(all) - 1)
	for _, k := range byRing {
		p.expect(counts{"forward_half_open": 1, "confirmed": 1}, func() { p.must(k.say(p.cpu)) })
		if _, found := p.entry(k); !found {
			t.Errorf("%v: with room again, a newcomer that has been talking is not in the table", k.site)
		}
	}
	for _, k := range refused {
		p.must(k.establish(p.cpu))
		if _, found := p.entry(k); !found {
			t.Errorf("%v: with room again, a newcomer is not in the table", k.site)
		}
	}
	p.untouched("with room again", old)
	p.apply(want(sites, time.Hour, 2, 3, 4))
	p.everyone("with room again, by another ring", slices.Concat(old, byRing, refused))
}

// TestYoungBudget: a flood has spent the young entries' budget. Who acknowledges what a backend sent is noted all the
// same; and where the table is full as well, as soon as there is room.
func TestYoungBudget(t *testing.T) {
	const epoch = 100 * time.Millisecond
	l := limits{connections: 4096, young: 512, halfOpen: 8192, adoptions: 256}
	p, all := load(t, epoch, l), newDrivers(t)
	sites := slices.DeleteFunc(eachSite(), func(s site) bool { return !stateless(s) })
	p.apply(want(sites, time.Hour, 1, 2, 3))
	flood := attack{name: "SYNs and ACKs", connections: 6000, sites: sites, first: floodStepSTEP_SYN, steps: 2}
	got := p.counted(func() { all.flood(t, p.Fairlead, flood, 1) })
	if n, young := p.connections(); n != young || young < int(l.young) || young >= int(l.young)+len(all) ||
		got["young_limited"] != flood.packets()/2-uint64(young) {
		t.Fatalf("%d connections, %d of them young, of a budget of %d; counted: %v", n, young, l.young, got)
	}
	// newcomers counts what the last packet of each of some handshakes met, which acknowledges what the backend sent; up to
	// it they met `until`.
	newcomers := func(from uint32, until, last counts) (list []*connection) {
		t.Helper()
		for _, s := range sites {
			for i := range uint32(20) {
				k := s.client(from + i)
				p.expect(counts{"forward_new": 1}, func() {
					if !k.open(p.cpu) {
						t.Fatalf("%v: SYN refused", s)
					}
				})
				p.expect(until, func() { p.must(k.acknowledge(p.cpu)) })
				p.expect(until, func() { p.must(k.say(p.cpu)) })
				if _, found := p.entry(k); found {
					t.Fatalf("%v: noted, and there is no room", s)
				}
				k.ack += 4
				p.expect(last, func() { p.must(k.acknowledge(p.cpu)) })
				list = append(list, k)
			}
		}
		return list
	}
	noted := func(when string, list []*connection) {
		t.Helper()
		for _, k := range list {
			if c, found := p.entry(k); !found || c.State&maps.StateYoung != 0 {
				t.Errorf("%v, %s: in the table %t, %v", k.site, when, found, c.State)
			}
		}
	}
	limited := counts{"forward_half_open": 1, "young_limited": 1}
	talking := newcomers(0, limited, counts{"forward_half_open": 1, "confirmed": 1})
	noted("acknowledging what it got", talking)

	flood = attack{name: "SYNs, ACKs and more", connections: 6000, sites: sites, first: floodStepSTEP_SYN, steps: 3}
	all.flood(t, p.Fairlead, flood, 1<<50)
	full := counts{"forward_half_open": 1, "table_full": 1}
	waiting := newcomers(1000, full, full)
	for _, k := range talking {
		p.must(k.check("FIN", k.send(p.cpu, fin|ack, k.seq, k.ack, 0)))
	}
	p.gone(int(l.connections) - len(talking) + len(all) - 1)
	waiting = waiting[len(all)-1:] // the table held as many too many as CPUs filled it at a time
	for _, k := range waiting {
		k.ack += 4
		p.expect(counts{"forward_half_open": 1, "confirmed": 1}, func() { p.must(k.say(p.cpu)) })
	}
	noted("acknowledging more, with room again", waiting)
}

// gone turns epochs until the table holds no more than so many.
func (p *plane) gone(most int) {
	p.Helper()
	deadline := time.Now().Add(100 * p.epoch)
	for n, _ := p.connections(); n > most; n, _ = p.connections() {
		if time.Now().After(deadline) {
			p.Fatalf("%d connections are there 100 epochs after those have ended that leave %d", n, most)
		}
		p.must(p.manager.Turn())
	}
}

// TestFullTableProof: what a newcomer has shown while there was no room is not forgotten: its next packet is enough, even if
// it acknowledges no more than before, and the young entries' budget is spent. Fails if half_opened takes the last
// acknowledgement for the handshake's.
func TestFullTableProof(t *testing.T) {
	l := limits{connections: 64, young: 0, halfOpen: 8192, adoptions: 256}
	p := load(t, 100*time.Millisecond, l)
	sites := slices.DeleteFunc(eachSite(), func(s site) bool { return !stateless(s) })
	p.apply(want(sites, time.Hour, 1, 2, 3))
	old := p.established(sites[0], 0, l.connections)
	var waiting []*connection
	for _, s := range sites {
		k := s.client(1000)
		if !k.open(p.cpu) {
			t.Fatalf("%v: SYN refused", s)
		}
		p.must(k.acknowledge(p.cpu))
		p.must(k.talk(p.cpu))
		waiting = append(waiting, k)
	}
	for _, k := range old[:len(sites)] {
		p.must(k.check("RST", k.send(p.cpu, rst, k.seq, 0, 0)))
	}
	p.gone(len(old) - len(sites))
	for _, k := range waiting {
		p.expect(counts{"forward_half_open": 1, "confirmed": 1}, func() { p.must(k.say(p.cpu)) })
	}
}

// TestAdoption: packets in mid-connection that no table knows are adopted so many a tick and CPU, and no more; the others
// go by the ring, counted.
func TestAdoption(t *testing.T) {
	l := limits{connections: 1 << 17, young: 1 << 17, halfOpen: 8192, adoptions: 16}
	p, all, sites := load(t, 100*time.Millisecond, l), newDrivers(t), eachSite()
	p.apply(want(sites, time.Hour, 1, 2, 3))
	old := p.living(sites, 50)
	flood := attack{name: "unknown ACKs", connections: 500_000, sites: sites, first: floodStepSTEP_ACK, steps: 1}
	before := maps.Now()
	got := p.counted(func() { all.flood(t, p.Fairlead, flood, 1) })
	ticks := uint64(maps.Now() - before + 1)

	adopted, cpus := got["forward_adopted"], uint64(len(all))
	if most := ticks * uint64(l.adoptions) * cpus; adopted > most || adopted < uint64(l.adoptions)*cpus {
		t.Errorf("%d connections adopted in %d ticks, want %d to %d", adopted, ticks, uint64(l.adoptions)*cpus, most)
	}
	// A few share their fresh bits with connections that are known: the ring alone has them, and they wait.
	known := flood.to(stateless) - got["forward_ring"]
	want := counts{
		"forward_adopted": adopted, "confirmed": adopted, "adoption_limited": known - adopted,
		"forward_unknown": known - adopted, "reset_unknown": flood.connections - flood.to(stateless),
	}
	if shared := got["forward_ring"]; shared > flood.connections/1000 {
		t.Errorf("%d packets of strangers took the fast path", shared)
	}
	for name, n := range want {
		if got[name] != n {
			t.Errorf("%s: %d, want %d", name, got[name], n)
		}
	}
	if n, young := p.connections(); young != int(adopted) || n != len(old)+young {
		t.Errorf("%d connections, %d of them young: want %d that were there and %d adopted", n, young, len(old), adopted)
	}
	t.Logf("%d adopted in %d ticks on %d CPUs: %v", adopted, ticks, cpus, got)
	p.untouched("beside adoptions", old)
	p.everyone("beside adoptions", old)
}
