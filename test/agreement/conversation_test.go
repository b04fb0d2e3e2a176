package agreement

import (
	"net/netip"

	"fairlead/bpf"
	"fairlead/maps"
)

// conversation is a connection that has been confirmed, and shown to be talking.
type conversation struct {
	client  netip.AddrPort
	backend maps.WantedBackend
	place   int // of the backend, in the farm
	next    numbers
}

// converse leads a new connection from its SYN to where it is grown. Between the steps, `explain` has to name the
// backend and the rule. nil: nobody takes it.
func (p *dataplane) converse(s *service, client netip.AddrPort, at int) *conversation {
	p.Helper()
	c := &conversation{client: client, next: numbers{flags: syn, sequence: p.random.Uint32()}}
	p.tally.conversations++
	if at < 0 {
		p.explain(s, client, "", maps.RulePolicy)
		p.step(s, c, -1, opened(at))
		return nil
	}
	c.backend, c.place = s.Backends[at], s.places[at]
	backend := c.backend.Name
	p.explain(s, client, backend, maps.RuleSettled)
	first := p.step(s, c, c.place, opened(at))
	p.explain(s, client, backend, maps.RuleHalfOpen)
	if again := p.step(s, c, c.place, bpf.FairleadVerdictFORWARD_HALF_OPEN); again != first {
		p.Fatalf("%v, client %v: a SYN went out as %v, sent again as %v", s, client, first, again)
	}
	p.explain(s, client, backend, maps.RuleHalfOpen)

	answer := p.random.Uint32()
	if !c.backend.Method.Stateless() {
		verdict, o := p.sendOne(first.destination, first.source,
			numbers{flags: syn | ack, sequence: answer, acknowledgement: c.next.sequence + 1})
		p.expect(bpf.FairleadVerdictREPLY_HALF_OPEN)
		want := outcome{action: xdpTX, mac: clientMAC, source: s.address(), destination: client, flags: syn | ack}
		if verdict != bpf.FairleadVerdictREPLY_HALF_OPEN || o != want {
			p.Fatalf("%v, client %v: the backend's answer went out as %v (%s), want %v",
				s, client, o, bpf.VerdictNames()[verdict], want)
		}
	}
	c.next = numbers{flags: ack, sequence: c.next.sequence + 1, acknowledgement: answer + 1}
	p.step(s, c, c.place, bpf.FairleadVerdictFORWARD_HALF_OPEN)
	p.explain(s, client, backend, maps.RuleTable)

	// Both ends have talked: no longer young.
	c.next.sequence += 100
	c.next.acknowledgement += 100
	p.step(s, c, c.place, bpf.FairleadVerdictFORWARD_TABLE)
	// The tables are asked until the exception bitmap is rebuilt.
	if e := p.explain(s, client, backend, maps.RuleTable); e.FastPath || c.backend.Method.Stateless() && !e.Exception {
		p.Fatalf("%v, client %v: by ring alone, before the exception bitmap was rebuilt: %+v", s, client, e)
	}
	p.step(s, c, c.place, bpf.FairleadVerdictFORWARD_TABLE)
	return c
}

// turn lets the map manager end the epoch, in which it settles slots and rebuilds the exception bitmap, and sends plain
// segments of grown connections: now Go knows who is an exception. One look-up, and the ring answers for all others
// whose method lets it, unless they share an exception bit.
func (p *dataplane) turn(s *service, talking []*conversation) {
	p.Helper()
	p.must(p.manager.Turn())
	for _, c := range talking {
		p.continues(s, c)
		e := p.explain(s, c.client, c.backend.Name, maps.RuleTable)
		at := s.predict(c.client)
		agrees := at >= 0 && s.Backends[at].Name == c.backend.Name
		if !e.SlotNow.Settled || !agrees && !e.Exception ||
			e.FastPath != (s.entry.RingFirst && c.backend.Method.Stateless() && !e.Exception) {
			p.Fatalf("%v, client %v: agrees with its slot: %v; explained as %+v", s, c.client, agrees, e)
		}
		switch {
		case !agrees:
			p.tally.differing++
		case e.Exception:
			p.tally.shared++
		}
		p.continues(s, c)
	}
}

// goesOn sends a plain segment of a connection whose service has other backends since: it stays where it is.
func (p *dataplane) goesOn(s *service, c *conversation) {
	p.Helper()
	p.continues(s, c)
	p.tally.kept++
}

// continues sends a plain segment, by the way that `explain` foretells.
func (p *dataplane) continues(s *service, c *conversation) {
	p.Helper()
	want := bpf.FairleadVerdictFORWARD_TABLE
	if p.explain(s, c.client, c.backend.Name, maps.RuleTable).FastPath {
		want = bpf.FairleadVerdictFORWARD_RING
		p.tally.fast++
	}
	p.step(s, c, c.place, want)
}

// step sends the next segment of a conversation and checks its verdict and where it goes.
func (p *dataplane) step(s *service, c *conversation, place int, want bpf.FairleadVerdict) outcome {
	p.Helper()
	verdict, o := p.sendOne(c.client, s.address(), c.next)
	p.expect(want)
	p.arrives(s, c.client, place, o)
	if verdict != want {
		names := bpf.VerdictNames()
		p.Fatalf("%v, client %v: verdict %s, want %s", s, c.client, names[verdict], names[want])
	}
	return o
}

// explain checks what Set.Explain says of a client's connection: its backend, "" for nobody, and the rule.
func (p *dataplane) explain(s *service, client netip.AddrPort, backend string, rule maps.Rule) maps.Explanation {
	p.Helper()
	e, err := p.manager.Set().Explain(s.inventory, client, s.entry)
	p.must(err)
	p.tally.explained++
	if e.Backend.Name != backend || e.Rule != rule || backend != "" && e.Backend.Service != s.entry.ID {
		p.Fatalf("%v, client %v: explained by %q as backend %q of service %d, want %q and %q of service %d",
			s, client, e.Rule, e.Backend.Name, e.Backend.Service, rule, backend, s.entry.ID)
	}
	return e
}
