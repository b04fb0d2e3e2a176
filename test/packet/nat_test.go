package packet

import (
	"net/netip"
	"testing"
)

// shared are two services by nat that share their backends: one client port to both would have one way back.
func shared(t *testing.T, f family, p plan) (first, second *scene) {
	t.Helper()
	p.ringSize = 1009
	first = newScene(t, f, nat, p)
	return first, first.beside(netip.AddrPortFrom(plus(f.service.Addr(), 1), 8443), nat, p)
}

// give gives all slots of a service to one backend, by its place, but for the own slots of these clients, which are
// another's.
func (s *scene) give(place int, other int, clients ...*conversation) {
	s.Helper()
	for slot := range s.service.ring {
		s.service.ring[slot] = s.backends[place].id
	}
	for _, c := range clients {
		s.service.ring[slotOf(s.service, c.client)] = s.backends[other].id
	}
	s.setRing(s.service.id, s.service.ring)
}

// at is the same client's connection to another service.
func (c *conversation) at(s *scene) *conversation { return s.clientAt(c.client) }

// talks shows that both ends of a connection hear each other.
func (c *conversation) talks() {
	c.Helper()
	c.send(c.segment(ack|psh, "to you"), forwardTable)
	c.reply(c.answer(ack|psh, "and to you"), replyTable)
}

// One client port to two services that share a backend would give one way back: another backend is chosen, and both
// connections live side by side.
func TestCollision(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			first, second := shared(t, f, plan{backends: 2, udp: p.udp})
			first.give(0, 0)
			a := first.newClient()
			// With one that is half-open, and with one that is established.
			for _, established := range []bool{false, true} {
				if established {
					a.open()
				} else {
					a.send(a.segment(syn, ""), forwardNew)
				}
				b := a.at(second)
				second.give(1, 0, b)
				b.backend = second.backends[1].id
				b.send(b.segment(syn, ""), forwardNew, collision)
				b.finishOpening()
				if entry := b.entry(); entry.Backend != b.backend {
					t.Errorf("the entry names backend %d, want %d", entry.Backend, b.backend)
				}
				if !second.exception(b.client, second.service.address) {
					t.Error("no exception bit of a connection on another backend than its slot's")
				}
				b.talks()
				if !established {
					a.finishOpening()
				}
				a.talks()
				b.talks()
				first.checkTables()
				second.remove(b)
				a.talks()
				first.remove(a)
			}
			first.count(0, 0)
		})
	})
}

// Where no other backend can be found the newcomer is refused: the one who has the way back keeps it. Once it is gone,
// the way is free.
func TestCollisionRefused(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			first, second := shared(t, f, plan{udp: p.udp})
			a := first.newClient().open()
			b := a.at(second)
			tries := []event{collision, collision, collision, collision}
			b.send(b.segment(syn, ""), resetNoPort, tries...)
			if _, found := second.halfOpen(b.client, second.service.address); found {
				t.Error("a refused connection is in the half-open table")
			}
			a.talks()
			first.remove(a)
			b.seq += 5
			b.send(b.segment(syn, ""), forwardNew)
			a.send(a.segment(syn, ""), resetNoPort, tries...)
			b.finishOpening()
			b.talks()
			a.send(a.segment(syn, ""), resetNoPort, tries...)
			first.count(1, 0)
		})
	})
}

// The same connection's own way back is in nobody's way: its SYN again, and a new one on the tuple of one that gave way.
func TestNoCollisionWithItself(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, nat, plan{})
		c := s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		c.seq--
		c.send(c.segment(syn, ""), forwardHalfOpen)
		table, key := s.tupleIn(s.HalfOpen4, s.HalfOpen6, c.client, f.service)
		s.must(table.Delete(key)) // forgotten: its way back is yet there
		c.seq += 100
		c.send(c.segment(syn, ""), forwardNew)
		c.finishOpening()
		c.talks()
	})
}

// A half-open connection whose life is over is in nobody's way.
func TestCollisionOver(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		const life = 30
		first, second := shared(t, f, plan{settings: []setting{constant("half_open_life", uint32(life))}})
		a := first.newClient()
		a.send(a.segment(syn, ""), forwardNew)
		half, _ := first.halfOpen(a.client, f.service)
		b := a.at(second)
		b.seq += 1 << 30
		first.await(half.First + life)
		b.send(b.segment(syn, ""), forwardNew)
		a.reply(a.answer(syn|ack, ""), passReplyUnknown) // too late, and not what b has asked for
	})
}

// A way back of another generation than its connection is nobody's.
func TestNATGenerations(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, nat, plan{})
		c := s.newClient().open()
		c.talks()
		entry := c.entry()
		entry.Generation++
		s.editEntry(c, &entry)
		c.reply(c.answer(ack, "whose?"), passReplyUnknown)
		entry.Generation--
		s.editEntry(c, &entry)
		c.talks()
	})
}

// Backends of nat see their clients' addresses and ports, as many connections a client as it has ports.
func TestNATManyClients(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, nat, plan{backends: 3, twoArms: true, udp: p.udp})
			var open []*conversation
			for port := range uint16(100) {
				c := s.clientAt(netip.AddrPortFrom(f.client, 1+port*655)).open()
				if c.source != c.client {
					t.Fatalf("backend sees %s, want %s", c.source, c.client)
				}
				open = append(open, c)
			}
			for _, c := range open {
				c.talks()
				s.remove(c)
			}
			s.count(0, 0)
		})
	})
}
