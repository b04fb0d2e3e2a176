package packet

import (
	"net/netip"
	"slices"
	"testing"

	"fairlead/bpf"

	"github.com/google/go-cmp/cmp"
)

// No two connections towards a backend have the same source, exhaustion is told and hurts no other backend, and what is
// freed is used again, the oldest-closed first.
func TestPortsExhausted(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, sources := range []int{1, 2} {
			s := newScene(t, f, fullnat, plan{backends: 2, sources: sources, ports: 8 / sources})
			var open []*conversation
			used := map[netip.AddrPort]bool{}
			for range 8 {
				c := s.clientOf(1).open()
				open = append(open, c)
				used[c.source] = true
			}
			if len(used) != 8 {
				t.Fatalf("8 connections have %d sources", len(used))
			}
			for range 3 {
				c := s.clientOf(1)
				c.send(c.segment(syn, ""), resetNoPort)
				if _, found := s.halfOpen(c.client, f.service); found {
					t.Error("a refused SYN is in the half-open table")
				}
			}
			other := s.clientOf(2).open()
			for _, c := range append(open, other) {
				c.send(c.segment(ack|psh, "data"), forwardTable)
				c.reply(c.answer(ack|psh, "data"), replyTable)
			}
			s.checkTables()

			// Closed in another order than opened.
			var closed []netip.AddrPort
			for _, i := range []int{5, 2, 7, 0} {
				s.remove(open[i])
				closed = append(closed, open[i].source)
			}
			s.checkTables()
			var again []netip.AddrPort
			for range closed {
				again = append(again, s.clientOf(1).open().source)
			}
			if sources == 1 {
				if diff := cmp.Diff(closed, again, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
					t.Errorf("ports used again, oldest-closed first (-want +got):\n%s", diff)
				}
			}
			c := s.clientOf(1)
			c.send(c.segment(syn, ""), resetNoPort)
		}
	})
}

// Clients spread over the source addresses, and the second serves where the first is used up.
func TestSourceAddresses(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{sources: 3, ports: 40})
		by := map[netip.Addr]int{}
		for range 60 {
			by[s.newClient().open().source.Addr()]++
		}
		for _, source := range s.sources {
			if by[source.address] < 8 {
				t.Errorf("60 connections by source address: %v", by)
			}
		}
		for range 60 {
			s.newClient().open()
		}
		c := s.newClient()
		c.send(c.segment(syn, ""), resetNoPort)
		s.count(120, 0)
	})
}

// A backend without pools has no port to give.
func TestNoPools(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		s.backends[0].pools = nil
		s.setBackend(s.backends[0])
		d := s.newClient()
		d.send(d.segment(syn, ""), resetNoPort)
		c.send(c.segment(ack, ""), forwardTable)
		c.reply(c.answer(ack, ""), replyTable)
		s.remove(c) // its port goes home all the same
		if unused := s.contents(s.queues[0].unused); !slices.Contains(unused, c.source.Port()) {
			t.Errorf("unused ports %v, want %d among them", unused, c.source.Port())
		}
	})
}

// When all ports are in use, the oldest half-open connection gives way: however many there are, and whatever else stands
// in the queue. The robbed one is unknown from then on, never another's.
func TestPortStolen(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, halfOpen := range []int{1, 2, 3, 5, 7, 8} {
			s := newScene(t, f, fullnat, plan{ports: 8})
			var living, robbed []*conversation
			for range 8 - halfOpen {
				living = append(living, s.newClient().open())
			}
			for range halfOpen {
				c := s.newClient()
				c.send(c.segment(syn, ""), forwardNew)
				c.reply(c.answer(syn|ack, ""), replyHalfOpen)
				robbed = append(robbed, c)
			}
			thief := s.newClient()
			thief.send(thief.segment(syn, ""), forwardNew, portStolen)
			if thief.source != robbed[0].source {
				t.Errorf("of %d half-open connections one on %s lost its port, the oldest has %s",
					halfOpen, thief.source, robbed[0].source)
			}
			s.checkTables()
			victim := robbed[slices.IndexFunc(robbed, func(c *conversation) bool { return c.source == thief.source })]
			victim.send(victim.segment(ack, ""), resetUnknown)
			victim.send(victim.segment(ack|psh, "my secret"), resetUnknown)
			victim.absent()

			// The thief's handshake is its own, and so are its replies.
			thief.finishOpening()
			thief.send(thief.segment(ack|psh, "data"), forwardTable)
			thief.reply(thief.answer(ack|psh, "data"), replyTable)
			victim.send(victim.segment(ack, ""), resetUnknown)

			// The robbed client's SYN starts anew, if any port is left for it.
			victim.seq += 1000
			if halfOpen > 1 {
				victim.send(victim.segment(syn, ""), forwardNew, portStolen)
				victim.finishOpening()
			} else {
				victim.send(victim.segment(syn, ""), resetNoPort)
			}
			for _, c := range living {
				c.send(c.segment(ack|psh, "data"), forwardTable)
				c.reply(c.answer(ack|psh, "data"), replyTable)
			}
		}
	})
}

// Half-open connections that are three seconds old give way before younger ones, in whichever pool they are.
func TestOldGiveWayFirst(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		const handshake = 179 // ticks
		s := newScene(t, f, fullnat, plan{sources: 2, ports: 4})
		var old, young []*conversation
		for range 3 {
			c := s.newClient()
			c.send(c.segment(syn, ""), forwardNew)
			old = append(old, c)
		}
		half, _ := s.halfOpen(old[2].client, f.service)
		s.await(half.First + handshake)
		for range 5 {
			c := s.newClient()
			c.send(c.segment(syn, ""), forwardNew)
			c.reply(c.answer(syn|ack, ""), replyHalfOpen)
			young = append(young, c)
		}
		for range 3 {
			thief := s.newClient()
			thief.send(thief.segment(syn, ""), forwardNew, portStolen)
			if !slices.ContainsFunc(old, func(c *conversation) bool { return c.source == thief.source }) {
				t.Errorf("a young half-open connection lost its port %s, old ones had theirs", thief.source)
			}
		}
		for _, c := range young {
			c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
		}
	})
}

// A flood of SYNs, ten times the ports, hurts its own kind only: what is confirmed lives, and a handshake done at once
// succeeds in the midst of it.
func TestSYNFlood(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, sources := range []int{1, 2} {
			s := newScene(t, f, fullnat, plan{backends: 2, sources: sources, ports: 32 / sources})
			var living []*conversation
			for range 10 {
				living = append(living, s.clientOf(1).open())
			}
			half := 22 // ports left for half-open ones
			for i := range 320 {
				c := s.clientOf(1)
				if i < half {
					c.send(c.segment(syn, ""), forwardNew)
				} else {
					c.send(c.segment(syn, ""), forwardNew, portStolen)
				}
				if i%40 == 39 {
					c.finishOpening() // this one was no flood
					living = append(living, c)
				}
				if i%16 == 0 {
					for _, c := range living {
						c.send(c.segment(ack|psh, "data"), forwardTable)
						c.reply(c.answer(ack|psh, "data"), replyTable)
					}
					s.checkTables()
				}
			}
			s.count(18, 0)
			other := s.clientOf(2).open()
			other.reply(other.answer(ack, "untouched"), replyTable)
		}
	})
}

// The half-open table forgets whom it likes, and tells nobody: the port of a forgotten connection comes home.
func TestHalfOpenForgotten(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{ports: 2})
		clients, replies := s.HalfOpen4, s.HalfReplies4
		key := func(a, b netip.AddrPort) any { return s.tuple4(a, b) }
		if !f.client.Is4() {
			clients, replies = s.HalfOpen6, s.HalfReplies6
			key = func(a, b netip.AddrPort) any { return s.tuple6(a, b) }
		}
		backend := s.backends[0].address

		// The way back is forgotten: the connection's packets are unknown, its port is free.
		a := s.newClient()
		a.send(a.segment(syn, ""), forwardNew)
		a.reply(a.answer(syn|ack, ""), replyHalfOpen)
		s.must(replies.Delete(key(backend, a.source)))
		a.reply(a.answer(ack, ""), passReplyUnknown)
		a.send(a.segment(ack, ""), resetUnknown)
		b, c := s.newClient(), s.newClient()
		b.open()
		c.open() // on the port that came home
		s.checkTables()
		s.remove(b)
		s.remove(c)

		// The client's entry is forgotten: replies are unknown, a SYN begins anew.
		a = s.newClient()
		first := a.segment(syn, "")
		a.send(first, forwardNew)
		s.must(clients.Delete(key(a.client, f.service)))
		old := a.source
		a.reply(a.answer(syn|ack, ""), passReplyUnknown)
		a.ack--
		a.send(first, forwardNew)
		if a.source == old {
			t.Error("the same port was given twice")
		}
		a.finishOpening()
		s.checkTables()
	})
}

// Ports of connections that were closed while their numbers still stood in the queue of those handed out are used again,
// for ever: behind a half-open connection that never ends its handshake, which may lose its own port once.
func TestClosedWhileHandedOut(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{ports: 4})
		slow := s.newClient()
		slow.send(slow.segment(syn, ""), forwardNew)
		for range 20 {
			var open []*conversation
			for range 3 {
				c := s.newClient()
				c.mayRob = true
				open = append(open, c.open())
			}
			s.checkTables()
			for _, c := range open {
				s.remove(c)
			}
			s.checkTables()
		}
		robbed := s.counted().Events[portStolen]
		switch owner := s.ports[portUse{1, slow.source}]; {
		case robbed == 0 && owner == slow:
			slow.finishOpening()
			slow.send(slow.segment(ack, "at last"), forwardTable)
		case robbed == 1 && owner != slow:
			slow.send(slow.segment(ack, "too late"), resetUnknown)
		default:
			t.Errorf("%d were robbed of a port; %s has %s", robbed, owner.client, slow.source)
		}
	})
}

// Every port of a full range is given once, and all come home.
func TestEveryPort(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{ports: 1100})
		all := map[uint16]bool{}
		for _, port := range s.contents(s.queues[0].unused) {
			all[port] = true
		}
		if len(all) != 1100 || !all[20000] || !all[21099] {
			t.Fatalf("filled with %d ports", len(all))
		}
		var open []*conversation
		for range 1100 {
			c := s.newClient()
			delete(all, c.open().source.Port())
			open = append(open, c)
		}
		if len(all) != 0 {
			t.Errorf("ports never given: %v", all)
		}
		for _, c := range open {
			s.remove(c)
		}
		if unused := s.contents(s.queues[0].unused); len(unused) != 1100 {
			t.Errorf("%d ports came home, want 1100", len(unused))
		}
		s.count(0, 0)
	})
}

// A connection that a newer one replaces gives its port back to its own pool.
func TestPortOfReplaced(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{backends: 2, ports: 1})
		c := s.clientOf(1).open()
		s.backends[0].flags &^= bpf.FairleadBackendFlagBACKEND_UP
		s.setBackend(s.backends[0])
		for slot := range s.service.ring {
			s.service.ring[slot] = 2
		}
		s.setRing(1, s.service.ring)
		c.backend = 2
		c.send(c.segment(syn, ""), forwardNew)
		c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		c.send(c.segment(ack, ""), forwardHalfOpen, removed, confirmed)
		if unused := s.contents(s.queues[0].unused); !slices.Equal(unused, []uint16{20000}) {
			t.Errorf("unused ports towards the old backend %v, want its one", unused)
		}
		s.count(1, 0)
	})
}
