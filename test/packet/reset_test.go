package packet

import (
	"net/netip"
	"strings"
	"testing"

	"fairlead/bpf"

	"github.com/gopacket/gopacket/layers"
)

// A packet in mid-connection that fullnat doesn't know is answered RST, whatever it looks like.
func TestResetUnknown(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		for _, v := range variants(f) {
			t.Run(v.name, func(t *testing.T) {
				s.in(t)
				for _, flags := range []uint8{ack, ack | psh, ack | fin, ack | urg} {
					c := s.newClient()
					lost := c.segment(flags, "")
					v.make(&lost)
					c.send(lost, resetUnknown)
				}
				c := s.newClient()
				lost := c.segment(rst, "")
				v.make(&lost)
				c.send(lost, dropUnknownRST)
			})
		}
		s.in(t)
		// Frames about Ethernet's least, and numbers at their edges.
		for padding := range 12 {
			c := s.newClient()
			lost := c.segment(ack, "")
			lost.options, lost.padding = nil, []byte(strings.Repeat("\xa5", padding))
			lost.acknowledgement = 0xffffffff - uint32(padding%2)
			c.send(lost, resetUnknown)
		}
		if s.count(0, 0); s.counted().Services[1].Packets != 0 {
			t.Error("something was forwarded")
		}
	})
}

// A SYN that nobody can take is answered RST with ACK, which counts the SYN and what it carried.
func TestResetSYN(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		refused := func(s *scene, v verdict) {
			t.Helper()
			for _, variant := range variants(f) {
				c := s.newClient()
				opening := c.segment(syn, "")
				variant.make(&opening)
				c.send(opening, v)
				if _, found := s.halfOpen(c.client, f.service); found {
					t.Fatal("a refused SYN is in the half-open table")
				}
			}
			c := s.newClient()
			opening := c.segment(syn|ece|cwr, "early data")
			opening.sequence = 0xfffffffb // the answer's number wraps
			c.send(opening, v)
		}

		s := newScene(t, f, method, plan{backends: 2})
		living := s.newClient().open()
		s.rebuildExceptions()
		s.service.flags |= bpf.FairleadServiceFlagSERVICE_LEAVING
		s.setService(s.service)
		refused(s, resetLeaving)
		living.send(living.segment(ack|psh, "I stay"), living.settledVerdict())
		s.service.flags &^= bpf.FairleadServiceFlagSERVICE_LEAVING
		for slot := range s.service.ring {
			s.service.ring[slot] = uint32(bpf.FairleadSlotSLOT_NONE | bpf.FairleadSlotSLOT_UNSETTLED)
		}
		s.setService(s.service)
		refused(s, resetNoBackend)
		living.send(living.segment(ack|psh, "I stay"), forwardTable)
		c := s.newClient()
		c.send(c.segment(rst, ""), dropUnknownRST)
		v := resetUnknown
		if !rewrites(method) {
			v = resetNoBackend
		}
		if !rewrites(method) {
			c.send(c.segment(ack, ""), v)
		}
	})
}

// A service whose ring is gone, or smaller than it says, drops.
func TestNoRing(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		living := s.newClient().open()
		s.must(s.Rings.Delete(uint32(1)))
		c := s.newClient()
		c.send(c.segment(syn, ""), dropNoRing)
		c.send(c.segment(ack, ""), dropNoRing)
		living.send(living.segment(ack, ""), forwardTable)
		s.setRing(1, []uint32{1}) // a ring of 1, in a service that says 13
		for range 20 {
			c = s.newClient()
			if slotOf(s.service, c.client) != 0 {
				c.send(c.segment(syn, ""), dropNoRing)
			}
		}
	})
}

// A full connection table refuses newcomers whose method needs state; the others go by the ring, and are counted.
func TestTableFull(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2, settings: []setting{constant("connection_capacity", uint32(3))}})
		living := []*conversation{s.newClient().open(), s.newClient().open()}
		early := s.newClient()
		early.send(early.segment(syn, ""), forwardNew)
		living = append(living, s.newClient().open())
		s.count(3, 0)

		late := s.newClient()
		if rewrites(method) {
			late.send(late.segment(syn, ""), resetTableFull, tableFull)
			late.send(late.segment(ack, ""), resetUnknown)
			early.reply(early.answer(syn|ack, ""), replyHalfOpen)
		} else {
			late.send(late.segment(syn, ""), forwardNew)
			late.send(late.segment(ack, ""), forwardHalfOpen, tableFull)
			late.send(late.segment(ack, "data"), forwardHalfOpen, tableFull)
			unknown := s.newClient()
			unknown.send(unknown.segment(ack, ""), forwardUnknown, tableFull)
			early.answer(syn|ack, "")
		}
		// Whose SYN there was room for is served while half-open, and noted once there is room again.
		early.send(early.segment(ack, ""), forwardHalfOpen, tableFull)
		s.rebuildExceptions()
		for _, c := range living {
			c.send(c.segment(ack, "data"), c.settledVerdict())
		}
		s.count(3, 0)
		s.remove(living[0])
		early.send(early.segment(ack, ""), forwardHalfOpen, confirmed)
		s.count(3, int64(early.entry().State&uint32(bpf.FairleadConnectionStateSTATE_YOUNG)))
		again := s.newClient()
		if rewrites(method) {
			again.send(again.segment(syn, ""), resetTableFull, tableFull)
		}
	})
}

// A kernel that has no room for an entry, whatever our own count says, is survived.
func TestInsertFailed(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		suffix := f.name[len(f.name)-1:]
		s := newScene(t, f, method, plan{settings: []setting{capacity("connections"+suffix, 1)}})
		living := s.newClient().open()
		s.rebuildExceptions()
		c := s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		synAck := c.answer(syn|ack, "")
		if rewrites(method) {
			c.reply(synAck, replyHalfOpen)
		}
		c.send(c.segment(ack, ""), forwardHalfOpen, insertFailed)
		c.send(c.segment(ack, "data"), forwardHalfOpen, insertFailed)
		living.send(living.segment(ack, ""), living.settledVerdict())
		s.count(1, 0)
		if !rewrites(method) {
			return
		}
		// Room for the connection, none for its way back.
		s = newScene(t, f, method, plan{settings: []setting{capacity("replies"+suffix, 1)}})
		living = s.newClient().open()
		c = s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		c.send(c.segment(ack, ""), forwardHalfOpen, confirmed, removed, insertFailed)
		s.count(1, 0)
		s.checkTables()
		c.reply(c.answer(ack, "data"), replyHalfOpen)
		s.remove(living)
		c.send(c.segment(ack, "data"), forwardHalfOpen, confirmed)
		c.reply(c.answer(ack, "data"), replyTable)
	})
}

// A backend that is down: what becomes of its connections is the service's policy.
func TestBackendDown(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		for _, policy := range []bpf.FairleadDownPolicy{
			bpf.FairleadDownPolicyDOWN_RESET, bpf.FairleadDownPolicyDOWN_KEEP, bpf.FairleadDownPolicyDOWN_REHASH,
		} {
			s := newScene(t, f, method, plan{backends: 2, policy: policy})
			c, other := s.clientOf(1).open(), s.clientOf(2).open()
			s.rebuildExceptions()
			half := s.clientOf(1)
			half.send(half.segment(syn, ""), forwardNew)
			s.backends[0].flags &^= bpf.FairleadBackendFlagBACKEND_UP
			s.setBackend(s.backends[0])

			// Before the ring knows.
			reset := policy == bpf.FairleadDownPolicyDOWN_RESET ||
				policy == bpf.FairleadDownPolicyDOWN_REHASH && rewrites(method)
			switch {
			case reset:
				c.send(c.segment(ack|psh, "are you there?"), resetBackendDown)
				c.send(c.segment(fin|ack, ""), resetBackendDown)
				c.send(c.segment(rst, ""), dropUnknownRST)
			default: // by the tables alone, while it is down
				c.send(c.segment(ack|psh, "are you there?"), forwardTable)
			}
			other.send(other.segment(ack, ""), other.settledVerdict())
			if rewrites(method) {
				// A backend that is called down may be heard still, unless its client was told.
				v := replyTable
				if reset {
					v = resetCondemned
				}
				c.reply(c.answer(ack, "I am"), v)
			}

			// When it does.
			for slot, backend := range s.service.ring {
				if backend == 1 {
					s.service.ring[slot] = 2 | uint32(bpf.FairleadSlotSLOT_UNSETTLED)
				}
			}
			s.setRing(1, s.service.ring)
			switch {
			case reset:
				c.send(c.segment(ack|psh, "are you there?"), resetBackendDown)
			case policy == bpf.FairleadDownPolicyDOWN_REHASH:
				c.backend = 2
				c.send(c.segment(ack|psh, "are you there?"), forwardTable)
				if c.entry().Backend != 2 {
					t.Error("the rehashed connection's entry names its old backend")
				}
				c.send(c.segment(ack|psh, "good"), forwardTable)
			default:
				c.send(c.segment(ack|psh, "are you there?"), forwardTable)
			}
			other.send(other.segment(ack, ""), other.settledVerdict())

			// The half-open connection's handshake ends; its client's next SYN is for a living backend.
			half.backend = 2
			if rewrites(method) {
				half.send(half.segment(ack, ""), resetUnknown)
			}
			half.seq += 77
			half.send(half.segment(syn, ""), forwardNew)
			half.finishOpening()

			// So is the SYN of a client whose connection was there: the old entry gives way to the new.
			if policy != bpf.FairleadDownPolicyDOWN_REHASH || rewrites(method) {
				before := s.control().Connections
				c.backend = 2
				c.seq += 99
				c.send(c.segment(syn, ""), forwardNew)
				if rewrites(method) {
					c.reply(c.answer(syn|ack, ""), replyHalfOpen)
				} else {
					c.answer(syn|ack, "")
				}
				c.send(c.segment(ack, ""), forwardHalfOpen, removed, confirmed)
				if after := s.control().Connections; after != before {
					t.Errorf("%d connections, were %d", after, before)
				}
				c.send(c.segment(ack|psh, "hello"), forwardTable)
			}
			s.checkTables()
		}
	})
}

// Backends without a next hop, and leaving ones, take no new connections; those of the first are dropped by name, those
// of the others live on.
func TestNoNeighborAndLeaving(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.clientOf(1).open()
		for slot := range s.service.ring { // one slot of backend 1, so that the next try finds another
			s.service.ring[slot] = 2
		}
		s.service.ring[slotOf(s.service, c.client)] = 1
		s.setRing(1, s.service.ring)
		s.rebuildExceptions()
		for _, flags := range []bpf.FairleadBackendFlag{
			bpf.FairleadBackendFlagBACKEND_UP,
			up | bpf.FairleadBackendFlagBACKEND_LEAVING,
			bpf.FairleadBackendFlagBACKEND_NEIGHBOR,
		} {
			s.backends[0].flags = flags
			s.setBackend(s.backends[0])
			switch {
			case flags&bpf.FairleadBackendFlagBACKEND_NEIGHBOR == 0:
				c.send(c.segment(ack, ""), dropNoNeighbor)
				c.send(c.segment(rst, "").atSequence(c.seq+1<<30), dropNoNeighbor, c.unfit()...)
			case flags&bpf.FairleadBackendFlagBACKEND_UP != 0:
				c.send(c.segment(ack, ""), c.settledVerdict())
			}
			d := s.clientOf(1)
			d.backend = 2
			d.send(d.segment(syn, ""), forwardNew)
			d.finishOpening()
			if !s.exception(d.client, f.service) {
				t.Error("no exception bit of a connection on another backend than its slot's")
			}
			d.send(d.segment(ack, "data"), forwardTable)
			s.rebuildExceptions()
			d.send(d.segment(ack, "data"), forwardTable)
		}
		s.backends[1].flags = bpf.FairleadBackendFlagBACKEND_UP
		s.setBackend(s.backends[1])
		d := s.newClient()
		d.send(d.segment(syn, ""), dropNoNeighbor)
	})
}

// atSequence is the segment with another sequence number.
func (s segment) atSequence(sequence uint32) segment {
	s.sequence = sequence
	return s
}

// unfit is what a RST whose numbers don't fit brings about.
func (c *conversation) unfit() []event { return []event{closingUnfit} }

// Unknown connections under dsr go by the ring, and are adopted: as young ones, so many a tick.
func TestAdoption(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{backends: 3})
		c := s.newClient()
		c.send(c.segment(ack|psh, "we know each other"), forwardAdopted, confirmed)
		s.count(1, 1)
		c.send(c.segment(ack, ""), forwardTable)
		c.send(c.segment(ack|psh, "more"), forwardTable)
		c.answer(ack, "more")
		c.send(c.segment(ack|psh, "more"), forwardTable, matured)
		c.send(c.segment(ack|psh, "more"), forwardTable)
		s.rebuildExceptions()
		c.send(c.segment(ack|psh, "more"), forwardRing)
		s.count(1, 0)
		for _, flags := range []uint8{rst, rst | ack, fin | ack} {
			c = s.newClient()
			c.send(c.segment(flags, ""), forwardUnknown)
			c.absent()
		}

		s = newScene(t, f, dsr, plan{settings: []setting{constant("adoptions_a_tick", uint32(0))}})
		c = s.newClient()
		c.send(c.segment(ack, ""), forwardUnknown, adoptionLimited)
		c.send(c.segment(ack, "data"), forwardUnknown, adoptionLimited)
		c.absent()

		// So many a tick: in the ticks that pass, no more.
		s = newScene(t, f, dsr, plan{settings: []setting{constant("adoptions_a_tick", uint32(2))}})
		first := s.tick()
		for range 50 {
			c = s.newClient()
			_, _ = s.run(s.Fairlead, c.segment(ack, "").bytes(), c.from)
		}
		ticks := uint64(s.tick() - first + 1)
		counted := s.counted()
		adopted, unknown := counted.Verdicts[forwardAdopted], counted.Verdicts[forwardUnknown]
		if adopted < 2 || adopted > 2*ticks || adopted+unknown != 50 || counted.Events[adoptionLimited] != unknown {
			t.Errorf("%d adopted and %d not in %d ticks of 2", adopted, unknown, ticks)
		}
	})
}

// Young entries have a budget; whoever finds it spent goes on as half-open or by the ring, until it is grown.
func TestYoungBudget(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{settings: []setting{constant("young_budget", uint32(1))}})
		first, second := s.newClient(), s.newClient()
		for _, c := range []*conversation{first, second} {
			c.send(c.segment(syn, ""), forwardNew)
			c.answer(syn|ack, "")
		}
		first.send(first.segment(ack, ""), forwardHalfOpen, confirmed)
		second.send(second.segment(ack, ""), forwardHalfOpen, youngLimited)
		second.send(second.segment(ack|psh, "hello"), forwardHalfOpen, youngLimited)
		unknown := s.newClient()
		unknown.send(unknown.segment(ack, ""), forwardUnknown, youngLimited)
		s.count(1, 1)
		second.answer(ack, "hello")
		second.send(second.segment(ack|psh, "grown"), forwardHalfOpen, confirmed)
		s.count(2, 1)
		second.send(second.segment(ack, ""), forwardTable)
		second.send(second.segment(ack, ""), forwardTable)
		s.rebuildExceptions()
		second.send(second.segment(ack, ""), forwardRing)
		first.send(first.segment(ack, ""), forwardTable)
		s.remove(first)
		s.count(1, 0)
		unknown.send(unknown.segment(ack, ""), forwardAdopted, confirmed)
		s.count(2, 1)
	})
}

// A RST answers from what the frame says alone: options and extension headers go, and so does what stood behind.
func TestResetOfStrangeFrames(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient()
		lost := c.segment(ack|ece|cwr|urg|psh, strings.Repeat("x", 3000))
		lost.urgent, lost.window, lost.tos, lost.ttl = 77, 1, 0xff, 1
		if f.name == "ipv4" {
			lost.ipOptions = []layers.IPv4Option{{OptionType: 0x5e, OptionLength: 40, OptionData: make([]byte, 38)}}
		} else {
			lost.extensions = []extension{hopByHop, destination}
		}
		lost.ethSource = mac("06:05:04:03:02:01")
		c.send(lost, resetUnknown)
	})
}

// At an address of XDP's own nobody else would answer a backend whose connection is unknown: it is told here.
func TestResetReply(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, fullnat, plan{twoArms: true, udp: p.udp,
				settings: []setting{constant("answers_a_tick", uint32(1000))}})
			s.flagAddress(f.source, bpf.FairleadAddressFlagADDRESS_SOURCE|bpf.FairleadAddressFlagADDRESS_OWN)
			c := s.newClient().open()
			c.talks()
			unknown := s.newClient()
			unknown.backend, unknown.source = 1, netip.AddrPortFrom(f.source, c.source.Port()^1)
			for _, v := range variants(f) {
				for _, flags := range []uint8{ack, syn | ack, syn, fin | ack, psh | ack} {
					late := unknown.answer(flags, "late")
					v.make(&late)
					unknown.reply(late, resetReplyUnknown)
				}
			}
			late := unknown.answer(ack, "late")
			late.ttl = 1 // it was for us, and had arrived
			unknown.reply(late, resetReplyUnknown)
			if !p.udp {
				// RST is never answered.
				unknown.reply(unknown.answer(rst, ""), dropUnknownRST)
				unknown.reply(unknown.answer(rst|ack, ""), dropUnknownRST)
			}
			// What can't be read whole can't be answered: whatever was seen before it.
			frame := late.bytes()
			for n := late.transportOffset() + 4; n < len(frame); n++ {
				unknown.replyRaw(late, frame[:n], dropTruncated)
			}
			c.talks()
			s.remove(c)
			c.reply(c.answer(ack, "are you there?"), resetReplyUnknown)

			// At an address that the host holds, the host's stack answers.
			s.flagAddress(f.source, bpf.FairleadAddressFlagADDRESS_SOURCE)
			c.reply(c.answer(ack, "are you there?"), passReplyUnknown)
		})
		s := newScene(t, f, fullnat, plan{udp: true, settings: []setting{constant("answers_a_tick", uint32(0))}})
		s.flagAddress(f.source, bpf.FairleadAddressFlagADDRESS_OWN)
		c := s.newClient()
		c.backend, c.source = 1, netip.AddrPortFrom(f.source, s.sources[0].last)
		c.reply(c.response("late"), dropLimited)
	})
}
