package agreement

import (
	"cmp"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead/bpf"
	"fairlead/maps"
)

var (
	tuples = flag.Int("agreement.tuples", 100_000, "how many random tuples Go and the kernel are asked about")
	seed   = flag.Uint64("agreement.seed", 0, "seed of the random tuples and services; 0: a new one, which is logged")
)

const (
	sampled = 50 // of so many tuples one goes through a whole conversation
	unknown = 10 // for so many SYNs one segment of a connection that nobody knows
)

// tally is what was compared.
type tally struct {
	sets, syns, refused, conversations, explained, unknown, kept, fast, shared, differing int

	verdicts [bpf.FairleadVerdictVERDICT_COUNT]uint64
	// Pearson's chi-squared of the kernel's choices against the ring's slots, and its degrees of freedom.
	chi     float64
	freedom int
}

func (t *tally) add(other *tally) {
	t.sets += other.sets
	t.syns += other.syns
	t.refused += other.refused
	t.conversations += other.conversations
	t.explained += other.explained
	t.unknown += other.unknown
	t.kept += other.kept
	t.fast += other.fast
	t.shared += other.shared
	t.differing += other.differing
	t.chi += other.chi
	t.freedom += other.freedom
	for i, count := range other.verdicts {
		t.verdicts[i] += count
	}
}

func (t *tally) String() string {
	var verdicts []string
	for i, name := range bpf.VerdictNames() {
		if t.verdicts[i] > 0 {
			verdicts = append(verdicts, fmt.Sprintf("%s %d", name, t.verdicts[i]))
		}
	}
	return fmt.Sprintf(`%d tuples over %d sets of backends: the kernel chose as Go computed; %d met a set without weight
%d whole conversations, %d connections kept over a change of backends; %d segments of unknown connections
%d explanations named the kernel's choice, %d of them foretold the fast path
after a turn of the epoch %d connections shared an exception bit, %d were exceptions for their backend's sake
spread over backends against their slots: chi-squared %.3f per degree of freedom (%d)
verdicts: %s`, t.syns, t.sets, t.refused, t.conversations, t.kept, t.unknown, t.explained, t.fast,
		t.shared, t.differing, t.chi/float64(max(t.freedom, 1)), t.freedom, strings.Join(verdicts, ", "))
}

// Go's own hash and ring, computed from names and weights alone, name the backend that the kernel chooses.
func TestAgreement(t *testing.T) {
	chosen := cmp.Or(*seed, uint64(time.Now().UnixNano()))
	t.Logf("to repeat: -agreement.seed=%d -agreement.tuples=%d", chosen, *tuples)
	mixed := []maps.Method{maps.MethodDSR, maps.MethodFullNAT, maps.MethodNAT, maps.MethodIPIP, maps.MethodGUE}
	kinds := []struct {
		name    string
		ipv6    bool
		methods []maps.Method
	}{
		{"dsr-ipv4", false, []maps.Method{maps.MethodDSR}},
		{"dsr-ipv6", true, []maps.Method{maps.MethodDSR}},
		{"fullnat-ipv4", false, []maps.Method{maps.MethodFullNAT}},
		{"fullnat-ipv6", true, []maps.Method{maps.MethodFullNAT}},
		{"nat-ipv4", false, []maps.Method{maps.MethodNAT}},
		{"nat-ipv6", true, []maps.Method{maps.MethodNAT}},
		{"tunnels-ipv4", false, []maps.Method{maps.MethodIPIP, maps.MethodGUE}},
		{"tunnels-ipv6", true, []maps.Method{maps.MethodGUE, maps.MethodIPIP}},
		{"mixed-ipv4", false, mixed},
		{"mixed-ipv6", true, mixed},
	}
	var all tally
	var lock sync.Mutex
	// Side by side, because the making of port pools waits for the kernel most of the time.
	var group sync.WaitGroup
	for i, kind := range kinds {
		share := (*tuples + len(kinds) - 1 - i) / len(kinds)
		backends := farmSize
		if *tuples < 500_000 && len(kind.methods) == 1 && kind.methods[0] == maps.MethodFullNAT {
			backends /= 3 // port pools are slow to make
		}
		group.Go(func() {
			t.Run(kind.name, func(t *testing.T) {
				random := rand.New(rand.NewPCG(chosen, uint64(i)))
				// Room for all that are sampled and all that may be adopted.
				room := uint32(share/sampled + share/unknown + 4096)
				p := newDataplane(t, random, kind.ipv6, room, backends, kind.methods...)
				p.agree(share)
				lock.Lock()
				defer lock.Unlock()
				all.add(&p.tally)
			})
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	t.Logf("\n%v", &all)
	if all.syns != *tuples {
		t.Errorf("%d tuples were sent, want %d", all.syns, *tuples)
	}
	// Wide bounds, some eight standard deviations: what lies outside isn't chance.
	if spread := all.chi / float64(max(all.freedom, 1)); all.freedom > 2000 && math.Abs(spread-1) > 0.2 {
		t.Errorf("chi-squared of the spread over backends is %.3f per degree of freedom, want about 1", spread)
	}
	if *tuples >= 50_000 && (all.fast == 0 || all.kept == 0 || all.refused == 0 || all.differing == 0 ||
		all.verdicts[bpf.FairleadVerdictFORWARD_ADOPTED] == 0) {
		t.Error("one of the ways of a packet was not met")
	}
	// The half-open and the young have their bits: at most some 3 % of the bitmap.
	if all.shared*10 > all.fast+100 {
		t.Errorf("%d connections had another's exception bit, where %d went by the fast path", all.shared, all.fast)
	}
}

// agree sends so many tuples to random services, to each before and after a change of its backends.
func (p *dataplane) agree(tuples int) {
	p.Helper()
	part := max(500, tuples/80) // for one set of backends
	for number := 1; tuples > 0; number++ {
		s := p.newService(number)
		now := min(part, tuples)
		talking := p.ask(s, now)
		p.turn(s, talking)
		if tuples -= now; tuples > 0 {
			p.change(s)
			for _, c := range talking {
				p.goesOn(s, c)
			}
			p.turn(s, talking)
			now = min(part, tuples)
			p.ask(s, now)
			tuples -= now
		}
	}
	p.checkVerdicts()
}

// ask sends the SYNs of so many new connections. It answers the conversations that some of them became.
func (p *dataplane) ask(s *service, tuples int) (talking []*conversation) {
	p.Helper()
	chosen := make([]int, len(s.Backends))
	var client netip.AddrPort
	for i := range tuples {
		client = p.client(client)
		at := s.predict(client)
		p.tally.syns++
		if at < 0 {
			p.tally.refused++
		} else {
			chosen[at]++
		}
		if i%sampled == 0 {
			if c := p.converse(s, client, at); c != nil {
				talking = append(talking, c)
			}
		} else {
			o := p.send(client, s.address(), numbers{flags: syn, sequence: p.random.Uint32()})
			p.goes(s, client, at, o)
			p.expect(opened(at))
		}
		if i%unknown == 0 {
			p.askUnknown(s, i%sampled == 0)
		}
	}
	if !s.AffinityClient {
		p.tally.spread(s, chosen)
	}
	return talking
}

// opened is the verdict on the SYN of a new connection.
func opened(at int) bpf.FairleadVerdict {
	if at < 0 {
		return bpf.FairleadVerdictRESET_NO_BACKEND
	}
	return bpf.FairleadVerdictFORWARD_NEW
}

// client is a random address and port; now and then the next port of the client before it.
func (p *dataplane) client(before netip.AddrPort) netip.AddrPort {
	if before.IsValid() && before.Port() < math.MaxUint16 && p.random.IntN(4) == 0 {
		return netip.AddrPortFrom(before.Addr(), before.Port()+1)
	}
	return netip.AddrPortFrom(p.address(), p.port())
}

// askUnknown sends a segment of a connection whose SYN nobody has seen: the ring decides where its method can do
// without more, else it is refused.
func (p *dataplane) askUnknown(s *service, explain bool) {
	p.Helper()
	client := p.client(netip.AddrPort{})
	tcp := numbers{flags: ack, sequence: p.random.Uint32(), acknowledgement: p.random.Uint32()}
	at := s.predict(client)
	p.tally.unknown++
	if at < 0 || !s.Backends[at].Method.Stateless() {
		p.goes(s, client, -1, p.send(client, s.address(), tcp))
		if at < 0 {
			p.expect(bpf.FairleadVerdictRESET_NO_BACKEND)
		} else {
			p.expect(bpf.FairleadVerdictRESET_UNKNOWN)
		}
		return
	}
	// Whether it is adopted depends on how many were in this tick; that it shares a fresh bit is rare, and harmless.
	p.expect(bpf.FairleadVerdictFORWARD_UNKNOWN)
	if !explain {
		p.goes(s, client, at, p.send(client, s.address(), tcp))
		return
	}
	before := p.explain(s, client, s.Backends[at].Name, maps.RuleSettled)
	verdict, o := p.sendOne(client, s.address(), tcp)
	p.goes(s, client, at, o)
	if fast := verdict == bpf.FairleadVerdictFORWARD_RING; fast != before.FastPath {
		p.Fatalf("%v, client %v: verdict %s, fast path foretold: %v",
			s, client, bpf.VerdictNames()[verdict], before.FastPath)
	}
	rule := maps.RuleSettled
	if verdict == bpf.FairleadVerdictFORWARD_ADOPTED {
		rule = maps.RuleTable
	}
	p.explain(s, client, s.Backends[at].Name, rule)
}

// goes checks that a client's segment went to the backend at this place in s.Backends; -1: that it was refused.
func (p *dataplane) goes(s *service, client netip.AddrPort, at int, got outcome) {
	p.Helper()
	place := -1
	if at >= 0 {
		place = s.places[at]
	}
	p.arrives(s, client, place, got)
}

// arrives is goes, by the backend's place in the farm.
func (p *dataplane) arrives(s *service, client netip.AddrPort, place int, got outcome) {
	p.Helper()
	want := outcome{action: xdpTX, mac: clientMAC, source: s.address(), destination: client, flags: got.flags}
	fits := got.flags&rst != 0
	if place >= 0 {
		want.mac, want.source, want.destination = hopMAC(place), client, s.address()
		fits = got.flags&rst == 0
		b := p.farm.places[place]
		if b.Method == maps.MethodIPIP || b.Method == maps.MethodGUE {
			want.outer = b.Address
		}
		if b.Method == maps.MethodNAT {
			want.destination = netip.AddrPortFrom(b.Address, b.Port)
		}
		if b.Method == maps.MethodFullNAT {
			want.source, want.destination = got.source, netip.AddrPortFrom(b.Address, b.Port)
			fits = fits && slices.ContainsFunc(b.Sources, func(source maps.WantedSource) bool {
				port := got.source.Port()
				return source.Address == got.source.Addr() && source.First <= port && port <= source.Last
			})
		}
	}
	if !fits || got != want {
		p.Fatalf("%v, client %v: Go says %v, the kernel %v", s, client, want, got)
	}
}

// spread notes how the kernel's choices lie beside the backends' shares of the slots.
func (t *tally) spread(s *service, chosen []int) {
	total, backends := 0, 0
	for _, count := range chosen {
		total += count
	}
	for i, slots := range s.slots {
		if slots == 0 || total == 0 {
			continue
		}
		share := float64(total) * float64(slots) / float64(s.RingSize)
		t.chi += (float64(chosen[i]) - share) * (float64(chosen[i]) - share) / share
		backends++
	}
	t.freedom += max(backends-1, 0)
}

// expect notes a verdict that a segment should have been given.
func (p *dataplane) expect(verdict bpf.FairleadVerdict) { p.expected[verdict]++ }

// checkVerdicts compares all verdicts given with those expected.
func (p *dataplane) checkVerdicts() {
	p.Helper()
	p.verdicts()
	p.tally.verdicts = [bpf.FairleadVerdictVERDICT_COUNT]uint64(p.counted)
	// By ring alone, noted or not: a segment of an unknown connection may be given any of the three.
	byRing := func(counts [bpf.FairleadVerdictVERDICT_COUNT]uint64) [bpf.FairleadVerdictVERDICT_COUNT]uint64 {
		sum := &counts[bpf.FairleadVerdictFORWARD_UNKNOWN]
		for _, verdict := range []bpf.FairleadVerdict{
			bpf.FairleadVerdictFORWARD_RING, bpf.FairleadVerdictFORWARD_ADOPTED,
		} {
			*sum += counts[verdict]
			counts[verdict] = 0
		}
		return counts
	}
	got, want := byRing(p.tally.verdicts), byRing(p.expected)
	for verdict, name := range bpf.VerdictNames() {
		if got[verdict] != want[verdict] {
			p.Errorf("verdict %s was given %d times, want %d", name, got[verdict], want[verdict])
		}
	}
}
