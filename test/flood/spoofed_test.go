package flood

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"fairlead/maps"

	"github.com/google/go-cmp/cmp"
)

// How far a RST's or FIN's number may be from the last one noted, as bpf/track.h has it.
const (
	fitBehind         = 1 << 16
	fitAhead          = 1 << 21
	fitAheadStateless = 1 << 24
)

// spoofed is a packet that a stranger sends in a client's name.
type spoofed struct {
	name  string
	flags uint8
	// sequence is its number, by the entry of the connection and by how far ahead a number may be.
	sequence func(entry maps.Connection, ahead uint32) uint32
}

func blind(c maps.Connection, ahead uint32) uint32 {
	return c.SequenceEnd + ahead + rand.Uint32N(1<<32-1-ahead-fitBehind)
}

func justBehind(c maps.Connection, _ uint32) uint32 { return c.SequenceEnd - fitBehind - 1 }

func justAhead(c maps.Connection, ahead uint32) uint32 { return c.SequenceEnd + ahead }

var closers = []spoofed{
	{"blind RST", rst, blind},
	{"RST just behind", rst, justBehind},
	{"RST just ahead", rst, justAhead},
	{"blind RST with ACK", rst | ack, blind},
	{"RST with ACK, just behind", rst | ack, justBehind},
	{"RST with ACK, just ahead", rst | ack, justAhead},
	{"blind FIN", fin | ack, blind},
	{"FIN just behind", fin | ack, justBehind},
	{"FIN just ahead", fin | ack, justAhead},
}

var openers = []spoofed{
	{"blind SYN", syn, blind},
	{"SYN just behind", syn, justBehind},
	{"SYN just ahead", syn, justAhead},
	{"the handshake's SYN again", syn, func(c maps.Connection, _ uint32) uint32 { return c.SequenceEnd - 5 }},
	{"a SYN where the client stands", syn, func(c maps.Connection, _ uint32) uint32 { return c.SequenceEnd }},
}

// spoof sends a stranger's packets on a connection. It goes where the client's go (so that a backend may judge by its own
// numbers), and moves nothing: the entry is as it was, and nothing stands beside it.
func (p *plane) spoof(when string, k *connection, list []spoofed) {
	p.Helper()
	ahead := uint32(fitAhead)
	if k.site.method.Stateless() {
		ahead = fitAheadStateless
	}
	for _, s := range list {
		before, found := p.entry(k)
		if !found {
			p.Fatalf("%s, %v: no entry", when, k.tuple)
		}
		want := counts{"forward_table": 1}
		if s.flags&syn == 0 {
			want["closing_unfit"] = 1
		}
		sequence, acknowledgement := s.sequence(before, ahead), rand.Uint32()
		p.expect(want, func() {
			p.must(k.check(when+": "+s.name, k.send(p.cpu, s.flags, sequence, acknowledgement, 0)))
		})
		after, _ := p.entry(k)
		if diff := cmp.Diff(before, after, cmp.Comparer(func(a, b maps.Tuple) bool { return a == b })); diff != "" {
			p.Errorf("%s: %s moved the entry of %v, %v (-before +after):\n%s", when, s.name, k.site, k.tuple, diff)
		}
		if p.halfOpen(k) {
			p.Errorf("%s: %s made a half-open connection beside the living one of %v, %v", when, s.name, k.site, k.tuple)
		}
	}
}

// living makes so many connections to each service.
func (p *plane) living(sites []site, n uint32) (all []*connection) {
	p.Helper()
	for _, s := range sites {
		all = append(all, p.established(s, 0, n)...)
	}
	return all
}

func generous() limits {
	return limits{connections: 1 << 16, young: 1 << 13, halfOpen: 1 << 13, adoptions: 256}
}

// TestSpoofedEnds: RSTs and FINs of strangers end nothing, by any method, over either family. Two epochs of silence
// follow, after which what is closing goes; then the real client goes on.
func TestSpoofedEnds(t *testing.T) {
	const epoch = 100 * time.Millisecond
	p, sites := load(t, epoch, generous()), eachSite()
	p.apply(want(sites, time.Hour, 1, 2, 3))
	all := p.living(sites, 20)
	for _, k := range all {
		p.spoof("on a living connection", k, closers)
	}
	for until := maps.Now() + 3*maps.Ticks(epoch); int32(until-maps.Now()) > 0; {
		p.must(p.manager.Turn())
	}
	p.untouched("two epochs after strangers' RSTs and FINs", all)
	p.everyone("after strangers' RSTs and FINs", all)
	p.apply(want(sites, time.Hour, 2, 3, 4))
	for _, k := range all {
		p.spoof("after another ring", k, closers)
	}
	p.everyone("after another ring", all)
}

// TestSpoofedEdge: one number further in, a RST is believed: closing begins, and the real client takes it back. Fails
// where the numbers of TestSpoofedEnds are not just outside.
func TestSpoofedEdge(t *testing.T) {
	p, sites := load(t, 100*time.Millisecond, generous()), eachSite()
	p.apply(want(sites, time.Hour, 1, 2, 3))
	for _, k := range p.living(sites, 2) {
		ahead := uint32(fitAhead)
		if k.site.method.Stateless() {
			ahead = fitAheadStateless
		}
		for _, offset := range []uint32{^uint32(fitBehind - 1), ahead - 1} {
			before, _ := p.entry(k)
			p.expect(counts{"forward_table": 1, "closing": 1}, func() {
				p.must(k.check("RST that fits", k.send(p.cpu, rst, before.SequenceEnd+offset, 0, 0)))
			})
			if c, _ := p.entry(k); !c.State.Closing() {
				t.Errorf("%v: a RST %d from the last number did not begin closing", k.site, int32(offset))
			}
			p.must(k.talk(p.cpu))
			if c, found := p.entry(k); !found || c.State.Closing() || c.Generation != before.Generation {
				t.Errorf("%v: the client went on behind a RST, and its entry is there %t, %v", k.site, found, c.State)
			}
		}
	}
}

// TestSpoofedSYN: a SYN with a living connection's tuple goes where that is, and never makes another of it: while its slot
// is unsettled, after a sweep with another ring, where all of its bits are shared, and where its backend is leaving.
func TestSpoofedSYN(t *testing.T) {
	p, sites := load(t, 100*time.Millisecond, generous()), eachSite()
	p.apply(want(sites, time.Hour, 1, 2, 3))
	all := p.living(sites, 6)
	stage := func(when string) {
		t.Helper()
		for _, k := range all {
			p.spoof(when, k, openers)
		}
		p.untouched(when, all)
		p.allFresh()
		for _, k := range all {
			p.spoof(when+", fresh bits shared", k, openers)
		}
		p.everyone(when, all)
	}
	stage("on settled slots")
	p.applyUnswept(want(sites, time.Hour, 3, 4, 5))
	if p.unsettled() == 0 {
		t.Error("no slot was left unsettled")
	}
	elsewhere := 0
	for _, k := range all {
		if p.ringBackend(k) != k.backend {
			elsewhere++
		}
	}
	if elsewhere < len(all)/4 {
		t.Errorf("the ring would send only %d of %d connections elsewhere", elsewhere, len(all))
	}
	stage("on unsettled slots")
	p.restart()
	if n := p.unsettled(); n != 0 {
		t.Errorf("%d slots are unsettled after the start", n)
	}
	stage("after the sweep")
	for range 3 {
		p.must(p.manager.Turn())
	}
	stage("after a rebuild of the exception bitmap")
}

// ringBackend is the number of the backend that the ring has for a connection's slot.
func (p *plane) ringBackend(k *connection) uint8 {
	p.Helper()
	inv, err := p.set.Inventory()
	p.must(err)
	at := slices.IndexFunc(inv.Services, func(s maps.Service) bool { return s.AddrPort() == k.site.service() })
	if at < 0 {
		p.Fatalf("%v: its service is not in the maps", k.site)
	}
	ring, err := p.set.Ring(inv.Services[at].ID)
	p.must(err)
	b, found := inv.Backend(ring[maps.SlotOf(k.hash, ringSize)].Backend)
	if !found {
		p.Fatalf("%v: its slot has no backend", k.site)
	}
	address := b.Address.AsSlice()
	return address[len(address)-1]
}
