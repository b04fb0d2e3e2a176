package packet

import (
	"net/netip"
	"testing"

	"fairlead/bpf"
)

// A connection's life under fullnat, with one device and with two.
func TestLifeFullnat(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, twoArms := range []bool{false, true} {
			s := newScene(t, f, fullnat, plan{backends: 3, twoArms: twoArms})
			c := s.newClient()

			first := c.segment(syn, "")
			c.send(first, forwardNew)
			half, found := s.halfOpen(c.client, f.service)
			if !found || half.Backend != c.backend || half.State != 0 {
				t.Fatalf("half-open entry after SYN: %+v, found %t", half, found)
			}
			c.absent()
			c.send(first, forwardHalfOpen)
			s.count(0, 0)

			// Nothing but the SYN-ACK and then its ACK confirms.
			c.ack++
			early := c.segment(ack, "")
			c.ack--
			c.send(early, forwardHalfOpen)
			synAck := c.answer(syn|ack, "")
			c.reply(synAck, replyHalfOpen)
			wrong := early
			wrong.acknowledgement = synAck.sequence
			c.send(wrong, forwardHalfOpen)
			wrong.acknowledgement = synAck.end() + 0x10000
			c.send(wrong, forwardHalfOpen)
			c.absent()
			c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
			if _, found := s.halfOpen(c.client, f.service); found {
				t.Error("the half-open entry stayed after the confirmation")
			}
			s.count(1, 0)
			if entry := c.entry(); entry.Backend != c.backend || entry.State != 0 || entry.Generation != half.Generation ||
				entry.Opened != half.First || entry.Service != 1 {
				t.Errorf("entry %+v after half-open entry %+v", entry, half)
			}

			// Data, both ways, and what is retransmitted of the handshake.
			c.reply(synAck, replyTable)
			for range 3 {
				c.send(c.segment(ack|psh, "GET /chat HTTP/1.1\r\nUpgrade: websocket\r\n\r\n"), forwardTable)
				c.reply(c.answer(ack|psh, "HTTP/1.1 101 Switching Protocols\r\n\r\n!"), replyTable)
			}
			c.send(c.segment(ack, ""), forwardTable)
			c.send(first, forwardTable)
			if entry := c.entry(); entry.SequenceEnd != c.seq || entry.Acknowledgement != c.ack || entry.State != 0 {
				t.Errorf("entry %+v, want sequence end %d and acknowledgement %d", entry, c.seq, c.ack)
			}

			// FIN of both sides; one side alone is not closing.
			c.send(c.segment(fin|ack, "bye"), forwardTable)
			c.reply(c.answer(ack, "still talking"), replyTable)
			c.send(c.segment(ack, ""), forwardTable)
			if s.exception(c.client, f.service) != true {
				t.Error("no exception bit after a FIN")
			}
			c.reply(c.answer(fin|ack, "bye"), replyTable, closingSeen)
			c.send(c.segment(ack, ""), forwardTable)
			s.count(1, 0)
			s.checkTables()
		}
	})
}

// A RST of either side starts closing at once.
func TestLifeEndsByReset(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		c.send(c.segment(rst, ""), forwardTable, closingSeen)
		c.send(c.segment(rst|ack, ""), forwardTable)
		if !s.exception(c.client, f.service) {
			t.Error("no exception bit after the client's RST")
		}
		c = s.newClient().open()
		c.reply(c.answer(rst, ""), replyTable, closingSeen)
		c.reply(c.answer(rst|ack, ""), replyTable)
		if !s.exception(c.client, f.service) {
			t.Error("no exception bit after the backend's RST")
		}

		// A half-open connection's RST goes to its other end and changes nothing here.
		c = s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		c.reply(c.answer(rst|ack, ""), replyHalfOpen)
		c.send(c.segment(rst, ""), forwardHalfOpen)
		if half, found := s.halfOpen(c.client, f.service); !found || half.State != 0 {
			t.Errorf("half-open entry after RST: %+v, found %t", half, found)
		}
	})
}

// The first data may confirm: TCP Fast Open sends some with the SYN, and a client's ACK may come with a request, or with
// a FIN.
func TestConfirmedByData(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient()
		c.send(c.segment(syn, "early"), forwardNew)
		c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		c.reply(c.answer(ack, "an early answer"), replyHalfOpen)
		c.send(c.segment(ack|psh, "more"), forwardHalfOpen, confirmed)
		c.send(c.segment(ack, ""), forwardTable)

		c = s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		c.send(c.segment(fin|ack, "short and good"), forwardHalfOpen, confirmed)
		if state := c.entry().State; state != uint32(bpf.FairleadConnectionStateSTATE_CLIENT_FIN|
			bpf.FairleadConnectionStateSTATE_CLIENT_FIN_KNOWN) {
			t.Errorf("state %#x after a FIN that confirmed", state)
		}
		c.reply(c.answer(fin|ack, ""), replyTable, closingSeen)
	})
}

// A client whose SYN was retransmitted with other numbers (it was restarted, say) is believed the latest.
func TestSecondSYN(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		c.seq += 0x40000000
		c.send(c.segment(syn, ""), forwardHalfOpen)
		c.finishOpening()
		if c.entry().SequenceEnd != c.seq {
			t.Errorf("sequence end %d, want %d", c.entry().SequenceEnd, c.seq)
		}
	})
}

// A new connection on the tuple of one that is closing goes to the same backend, whose stack knows the old one, and
// takes the entry back.
func TestTupleUsedAgain(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.newClient().open()
		if rewrites(method) {
			c.send(c.segment(fin|ack, ""), forwardTable)
			c.reply(c.answer(fin|ack, ""), replyTable, closingSeen)
		} else {
			c.send(c.segment(fin|ack, ""), forwardTable, closingSeen)
			c.answer(fin|ack, "")
		}
		c.send(c.segment(ack, ""), forwardTable)
		c.seq += 0x01000000
		c.ack += 0x30000000
		c.send(c.segment(syn, ""), forwardTable)
		synAck := c.answer(syn|ack, "")
		if rewrites(method) {
			c.reply(synAck, replyTable, takenBack)
			c.send(c.segment(ack, ""), forwardTable)
		} else {
			c.send(c.segment(ack, ""), forwardTable, takenBack)
		}
		if rewrites(method) {
			c.reply(c.answer(ack|psh, "welcome back"), replyTable)
		}
		c.send(c.segment(ack|psh, "again"), forwardTable)
		c.send(c.segment(fin|ack, ""), forwardTable, c.closingAlone()...)
	})
}

// closingAlone is what a client's FIN alone brings about.
func (c *conversation) closingAlone() []event {
	if !rewrites(c.method) {
		return []event{closingSeen}
	}
	return nil
}

// A connection's life under dsr: young, grown, and then by the ring alone.
func TestLifeDSR(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, twoArms := range []bool{false, true} {
			s := newScene(t, f, dsr, plan{backends: 3, twoArms: twoArms})
			c := s.newClient()
			first := c.segment(syn, "")
			c.send(first, forwardNew)
			if !s.exception(c.client, f.service) {
				t.Error("no exception bit of a half-open connection")
			}
			c.send(first, forwardHalfOpen)
			c.answer(syn|ack, "")

			wrong := c.segment(ack, "")
			right := wrong
			wrong.sequence += 0x10000
			c.send(wrong, forwardHalfOpen)
			c.absent()
			c.send(right, forwardHalfOpen, confirmed)
			s.count(1, 1)
			if _, found := s.halfOpen(c.client, f.service); found {
				t.Error("the half-open entry stayed after the confirmation")
			}

			// Numbers of one side alone don't make it grown.
			c.send(c.segment(ack, ""), forwardTable)
			c.send(c.segment(ack|psh, "hello"), forwardTable)
			if s.fresh(c.client, f.service) || !s.exception(c.client, f.service) {
				t.Error("want the exception bit of a young connection, and no fresh bit")
			}
			s.count(1, 1)
			c.answer(ack, "hello yourself")
			c.send(c.segment(ack, ""), forwardTable, matured)
			s.count(1, 0)
			if !s.fresh(c.client, f.service) || !s.exception(c.client, f.service) {
				t.Error("want both bits: the exception bitmap was not rebuilt yet")
			}
			c.send(c.segment(ack, ""), forwardTable)

			// Once it is, the ring answers.
			s.rebuildExceptions()
			if !s.fresh(c.client, f.service) || s.exception(c.client, f.service) {
				t.Error("want the fresh bit, and no exception bit")
			}
			before := c.entry()
			c.send(c.segment(ack|psh, "fast"), forwardRing)
			c.send(c.segment(ack, ""), forwardRing)
			if after := c.entry(); after != before {
				t.Errorf("the fast path touched the table: %+v, was %+v", after, before)
			}

			// A SYN clears the fresh bit; the next packet sets it again.
			c.send(first, forwardTable)
			if s.fresh(c.client, f.service) {
				t.Error("a SYN did not clear the fresh bit")
			}
			c.send(c.segment(ack, ""), forwardTable)
			c.send(c.segment(ack, ""), forwardRing)

			// Fresh bits are forgotten with the epoch.
			s.editControl(func(block *bpf.FairleadControlBlock) { block.Epoch++ })
			c.send(c.segment(ack, ""), forwardTable)
			c.send(c.segment(ack, ""), forwardRing)

			// FIN: to the table, and an exception from then on.
			c.send(c.segment(fin|ack, ""), forwardTable, closingSeen)
			c.send(c.segment(ack, ""), forwardTable)
			s.count(1, 0)
			s.checkTables()
		}
	})
}

// On the fast path no table is asked: the entry can be gone, and the ring answers still.
func TestRingAlone(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{backends: 3})
		c := s.newClient().open()
		s.rebuildExceptions()
		c.send(c.segment(ack, ""), forwardRing)
		entry := c.entry()
		s.editEntry(c, nil)
		c.send(c.segment(ack|psh, "nobody knows me"), forwardRing)
		s.editEntry(c, &entry)
		// An unsettled slot asks the table for all.
		s.service.ring[slotOf(s.service, c.client)] |= uint32(bpf.FairleadSlotSLOT_UNSETTLED)
		s.setRing(1, s.service.ring)
		c.send(c.segment(ack, ""), forwardTable)
		c.send(c.segment(ack, ""), forwardTable)
	})
}

// A connection whose slot was given away stays with its backend: the table decides while the slot is unsettled, then
// the exception bit says so, and where that is missing the first look-up mends it.
func TestSlotGivenAway(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{backends: 2})
		c := s.newClient().open()
		s.rebuildExceptions()
		c.send(c.segment(ack, ""), forwardRing)
		slot := slotOf(s.service, c.client)
		other := 3 - c.backend
		s.service.ring[slot] = other | uint32(bpf.FairleadSlotSLOT_UNSETTLED)
		s.setRing(1, s.service.ring)
		c.send(c.segment(ack, ""), forwardTable)
		c.send(c.segment(ack|psh, "still yours"), forwardTable)
		if s.exception(c.client, f.service) {
			t.Error("an unsettled slot needs no exception bit, and the sweep gives it")
		}
		// A new epoch, and a slot settled without its sweep.
		s.editControl(func(block *bpf.FairleadControlBlock) { block.Epoch++ })
		s.service.ring[slot] = other
		s.setRing(1, s.service.ring)
		c.send(c.segment(ack, ""), forwardTable, resolvedSelf)
		if !s.exception(c.client, f.service) || s.fresh(c.client, f.service) {
			t.Error("want the exception bit, and no fresh bit")
		}
		c.send(c.segment(ack, ""), forwardTable)
		if c.entry().Backend != c.backend {
			t.Error("the connection was moved")
		}
		s.rebuildExceptions()
		c.send(c.segment(ack, ""), forwardTable)
	})
}

// While the exception bitmap is rebuilt both are told of new exceptions, and the one in use has its old ones still.
func TestExceptionsRebuilt(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{backends: 3})
		exceptional := func(c *conversation, want bool) {
			t.Helper()
			if s.exception(c.client, f.service) != want {
				t.Errorf("%s: exception bit %t, want %t", c.client, !want, want)
			}
		}
		plain, closing, idle := s.newClient().open(), s.newClient().open(), s.newClient().open()
		halfOpen, adopted := s.newClient(), s.newClient()
		all := []*conversation{plain, closing, idle, halfOpen, adopted}
		s.rebuildExceptions(func() {
			for _, c := range all[:3] { // their SYNs set it
				exceptional(c, true)
			}
		})
		for _, c := range all {
			exceptional(c, false)
		}
		s.rebuildExceptions(func() {
			plain.send(plain.segment(ack, ""), forwardRing)
			closing.send(closing.segment(fin|ack, ""), forwardTable, closingSeen)
			s.tendWant("mark idle", tendDone, idle.asSeen(tendMarkIdle))
			halfOpen.send(halfOpen.segment(syn, ""), forwardNew)
			adopted.send(adopted.segment(ack, ""), forwardAdopted, confirmed)
			for _, c := range all {
				exceptional(c, c != plain)
			}
		})
		for range 2 {
			for _, c := range all {
				exceptional(c, c != plain)
			}
			s.rebuildExceptions()
		}
		plain.send(plain.segment(ack, ""), forwardRing)
	})
}

// A new connection on another backend than its slot's is an exception from its SYN on: its fresh bit is shared with
// others, who may set it at any time, and must not send its packets to the slot's backend.
func TestFreshBitShared(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{backends: 2})
		a, b := s.sharingFresh()
		for slot := range s.service.ring {
			s.service.ring[slot] = 1
		}
		s.service.ring[slotOf(s.service, b.client)] = 2
		s.setRing(1, s.service.ring)
		a.open()
		s.rebuildExceptions()
		a.send(a.segment(ack, ""), forwardRing)
		s.backends[1].flags = bpf.FairleadBackendFlagBACKEND_UP // no next hop: new connections go elsewhere
		s.setBackend(s.backends[1])
		b.backend = 1
		b.send(b.segment(syn, ""), forwardNew)
		b.answer(syn|ack, "")
		a.send(a.segment(ack, ""), forwardTable)
		a.send(a.segment(ack, ""), forwardRing)
		b.send(b.segment(ack, ""), forwardHalfOpen, confirmed)
		b.answer(ack, "hello")
		b.send(b.segment(ack, "hello"), forwardTable, matured)
		b.send(b.segment(ack, "hello"), forwardTable)
		s.rebuildExceptions()
		a.send(a.segment(ack, ""), forwardTable) // the confirmation cleared the bit they share
		a.send(a.segment(ack, ""), forwardRing)
		b.send(b.segment(ack, "hello"), forwardTable)
	})
}

// Two on their slots' backends that share a fresh bit cost each other a look-up, no more: who is half-open or young is
// asked about in the tables, though the other has set the bit, until it is grown and the exception bitmap rebuilt.
func TestFreshBitSharedInSlots(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{backends: 3})
		a, b := s.sharingFresh()
		// byRing shows that a is forwarded by the ring alone, and that b would be, were it not for its exception bit.
		byRing := func() {
			t.Helper()
			a.send(a.segment(ack, ""), forwardRing)
			if !s.fresh(b.client, f.service) || !s.exception(b.client, f.service) {
				t.Error("want the fresh bit that is shared, and the exception bit")
			}
		}
		a.open()
		s.rebuildExceptions()
		a.send(a.segment(ack, ""), forwardRing)

		b.send(b.segment(syn, ""), forwardNew)
		b.answer(syn|ack, "")
		a.send(a.segment(ack, ""), forwardTable) // a SYN clears the fresh bit, whosever it is
		byRing()
		s.rebuildExceptions()
		byRing()
		b.send(b.segment(ack, ""), forwardHalfOpen, confirmed)
		s.count(2, 1)

		a.send(a.segment(ack, ""), forwardTable) // so does who is confirmed as young
		byRing()
		b.send(b.segment(ack, ""), forwardTable)
		s.rebuildExceptions()
		byRing()
		b.send(b.segment(ack, ""), forwardTable)
		b.answer(ack, "hello")
		b.send(b.segment(ack|psh, "hello"), forwardTable, matured)
		s.count(2, 0)

		byRing()
		b.send(b.segment(ack, ""), forwardTable)
		s.rebuildExceptions()
		before := b.entry()
		b.send(b.segment(ack|psh, "fast"), forwardRing)
		a.send(a.segment(ack, ""), forwardRing)
		if after := b.entry(); after != before {
			t.Errorf("the fast path touched the table: %+v, was %+v", after, before)
		}
	})
}

// The same of a connection that is adopted. One that nobody knows has no exception bit: a fresh bit that it shares
// delays its adoption by an epoch.
func TestFreshBitSharedWithAdopted(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{backends: 3})
		a, b := s.sharingFresh()
		b.send(b.segment(ack|psh, "we know each other"), forwardAdopted, confirmed)
		a.open()
		for range 2 {
			s.rebuildExceptions()
			a.send(a.segment(ack, ""), forwardRing)
			if !s.fresh(b.client, f.service) || !s.exception(b.client, f.service) {
				t.Error("want the fresh bit that is shared, and the exception bit")
			}
			b.send(b.segment(ack, ""), forwardTable)
			s.count(2, 1)
		}
		b.answer(ack, "more")
		b.send(b.segment(ack|psh, "more"), forwardTable, matured)
		b.send(b.segment(ack, ""), forwardTable)
		s.rebuildExceptions()
		b.send(b.segment(ack, ""), forwardRing)
		a.send(a.segment(ack, ""), forwardRing)

		s = newScene(t, f, dsr, plan{backends: 3})
		a, b = s.sharingFresh()
		a.open()
		b.send(b.segment(ack, ""), forwardRing)
		b.absent()
		s.editControl(func(block *bpf.FairleadControlBlock) { block.Epoch++ })
		b.send(b.segment(ack, ""), forwardAdopted, confirmed)
	})
}

// Where a service's clients keep their backend by address, so do those whose slot's backend takes nobody.
func TestAffinityByClient(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, down := range []bool{false, true} {
			s := newScene(t, f, dsr, plan{backends: 8, ringSize: 61, flags: bpf.FairleadServiceFlagSERVICE_AFFINITY_CLIENT})
			want := ringAnswer(s.service, netip.AddrPortFrom(f.client, 1))
			if down {
				s.backends[want-1].flags = 0
				s.setBackend(s.backends[want-1])
				want = anyBackend
			}
			for port := range uint16(20) {
				c := s.clientAt(netip.AddrPortFrom(f.client, 50000+port))
				c.backend = want
				c.send(c.segment(syn, ""), forwardNew)
				want = c.backend
			}
		}
	})
}

// Replies go back by the hop that the client's last packet came from, if its numbers are the client's.
func TestHopFollowsClient(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		c.reply(c.answer(ack, "one"), replyTable)
		c.router = mac("02:00:00:00:00:fd") // another router, on the same device
		c.send(c.segment(ack, ""), forwardTable)
		c.reply(c.answer(ack, "two"), replyTable)
		c.from = theKernel.back // the same, on another device
		c.send(c.segment(ack, ""), forwardTable)
		c.reply(c.answer(ack, "three"), replyTable)
		client := *c
		c.from, c.router = theKernel.front, mac("02:00:00:00:00:fc") // a stranger
		c.send(c.segment(ack, "").atSequence(c.seq+1<<30), forwardTable)
		for _, flags := range []uint8{rst, fin | ack} {
			c.send(c.segment(flags, "").atSequence(client.seq+1<<30), forwardTable, closingUnfit)
		}
		c.from, c.router, c.seq = client.from, client.router, client.seq
		c.reply(c.answer(ack, "four"), replyTable)
	})
}

// Packets of one connection may be seen by any CPU.
func TestManyCPUs(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		for range 8 {
			c := s.newClient()
			s.cpu = 0
			c.send(c.segment(syn, ""), forwardNew)
			s.cpu = 1
			c.finishOpening()
			s.cpu = 0
			s.rebuildExceptions()
			c.send(c.segment(ack|psh, "data"), c.settledVerdict())
		}
		s.count(8, 0)
	})
}

// settledVerdict is that of a grown connection's plain packet, once the exception bitmap was rebuilt.
func (c *conversation) settledVerdict() verdict {
	if !rewrites(c.method) {
		return forwardRing
	}
	return forwardTable
}
