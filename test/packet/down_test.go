package packet

import (
	"testing"

	"fairlead/bpf"
)

// tried are the flags of a backend that is down as all are.
const tried = bpf.FairleadBackendFlagBACKEND_NEIGHBOR | bpf.FairleadBackendFlagBACKEND_TRIED

// set gives a backend flags, by its place; since is the tick it is down from.
func (s *scene) set(place int, flags bpf.FairleadBackendFlag, since uint32) {
	s.Helper()
	s.backends[place].flags, s.backends[place].downAt = flags, since
	s.setBackend(s.backends[place])
}

var policies = map[string]bpf.FairleadDownPolicy{
	"reset": bpf.FairleadDownPolicyDOWN_RESET, "keep": bpf.FairleadDownPolicyDOWN_KEEP,
	"rehash": bpf.FairleadDownPolicyDOWN_REHASH,
}

// eachPolicy runs a test for all methods and policies of backends that are down. lost tells whether such a backend's
// connections are.
func eachPolicy(t *testing.T, test func(t *testing.T, f family, method bpf.FairleadMethod, p plan, lost bool)) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		for name, policy := range policies {
			t.Run(name, func(t *testing.T) {
				test(t, f, method, plan{backends: 2, policy: policy}, policy == bpf.FairleadDownPolicyDOWN_RESET ||
					policy == bpf.FairleadDownPolicyDOWN_REHASH && rewrites(method))
			})
		}
	})
}

// Of a backend that comes back, those connections live on whose clients were not told; who was told is condemned, and its
// backend is told now.
func TestBackendUpAgain(t *testing.T) {
	eachPolicy(t, func(t *testing.T, f family, method bpf.FairleadMethod, p plan, lost bool) {
		s := newScene(t, f, method, p)
		silent, unfit, told, ended := s.clientOf(1).open(), s.clientOf(1).open(), s.clientOf(1).open(), s.clientOf(1).open()
		s.rebuildExceptions()
		for _, c := range []*conversation{silent, unfit, told, ended} {
			c.send(c.segment(ack, ""), c.settledVerdict())
		}
		s.set(0, bpf.FairleadBackendFlagBACKEND_NEIGHBOR, s.tick())
		seq := unfit.seq
		if !lost {
			told.send(told.segment(ack|psh, "are you there?"), forwardTable)
			told.state(s.own())
			s.set(0, up, 0)
			told.send(told.segment(ack|psh, "there you are"), told.settledVerdict())
			return
		}

		// A stranger's packet gets an answer that the client does not believe, and so does not tell it.
		for _, offset := range []uint32{ahead(method), 1 << 31, 1<<32 - fitBehind - 1} {
			before := unfit.entry()
			s.await(before.Seen + 1)
			for _, flags := range []uint8{ack, ack | psh, fin | ack} {
				unfit.send(unfit.segment(flags, "?").atSequence(seq+offset), resetBackendDown)
			}
			unfit.send(unfit.segment(rst, "").atSequence(seq+offset), dropUnknownRST)
			unfit.stays(before)
		}
		unfit.seq = seq
		if s.exception(unfit.client, f.service) {
			t.Error("a stranger's packet made an exception of the connection")
		}

		before := told.entry()
		s.await(before.Seen + 1)
		now := s.tick()
		told.send(told.segment(ack|psh, "are you there?"), resetBackendDown)
		told.state(s.own() | condemned | clientTold)
		after, want := told.entry(), before
		want.State, want.Seen, want.Marked = after.State, after.Seen, after.Marked
		if after != want || int32(after.Seen-now) < 0 || int32(after.Marked-now) < 0 {
			t.Errorf("told at tick %d or later: entry %+v\nwas %+v", now, after, before)
		}
		if !s.exception(told.client, f.service) || s.fresh(told.client, f.service) {
			t.Error("want the exception bit of whose client was told, and no fresh bit")
		}
		told.send(told.segment(ack|psh, "are you there?"), resetBackendDown)
		told.state(s.own() | condemned | clientTold)
		// A RST of its own ends it: it needs no answer.
		ended.send(ended.segment(rst|ack, ""), dropUnknownRST)
		ended.state(s.own() | condemned | clientTold | clientReset)

		s.set(0, up, 0)
		for _, c := range []*conversation{silent, unfit} {
			c.send(c.segment(ack|psh, "I know of nothing"), c.settledVerdict())
			if rewrites(method) {
				c.reply(c.answer(ack|psh, "neither do I"), replyTable)
			}
			c.state(s.own())
		}
		if rewrites(method) {
			told.reply(told.answer(ack, "I am back"), resetCondemned)
			told.send(told.segment(ack, "too late"), resetCondemned)
		} else {
			told.send(told.segment(ack, "are you back?"), forwardReset)
			told.send(told.segment(ack, "too late"), resetCondemned)
		}
		told.state(s.own() | condemned | clientTold | backendTold)
		ended.send(ended.segment(ack, "?"), forwardReset)
		ended.state(s.own() | condemned | clientTold | backendTold | clientReset)
		told.send(told.again(), forwardNew)
	})
}

// A connection that was closed by command is not forwarded to a backend that is down, whatever the policy: there is nobody
// to tell but the client.
func TestCondemnedBackendDown(t *testing.T) {
	eachPolicy(t, func(t *testing.T, f family, method bpf.FairleadMethod, p plan, _ bool) {
		s := newScene(t, f, method, p)
		c := s.clientOf(1).open().condemn()
		s.set(0, bpf.FairleadBackendFlagBACKEND_NEIGHBOR, s.tick())
		before := c.entry()
		seq := c.seq
		c.send(c.segment(ack, "").atSequence(seq+1<<31), resetBackendDown)
		c.stays(before)
		c.seq = seq
		c.send(c.segment(ack, "data"), resetBackendDown)
		c.state(s.own() | condemned | clientTold)
		c.send(c.segment(rst, ""), dropUnknownRST)
		c.state(s.own() | condemned | clientTold | clientReset)
		for slot := range s.service.ring {
			s.service.ring[slot] = 2
		}
		s.setRing(1, s.service.ring)
		c.send(c.segment(ack, "data"), resetBackendDown)
		c.send(c.again(), forwardNew)
		if rewrites(method) {
			c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		} else {
			c.answer(syn|ack, "")
		}
		c.send(c.segment(ack, ""), forwardHalfOpen, removed, confirmed)
		if entry := c.entry(); entry.Backend != 2 {
			t.Errorf("the new connection's entry names backend %d, want 2", entry.Backend)
		}
	})
}

// With all backends down newcomers are tried on them. What was opened before is lost, by the service's policy; what was
// opened since lives, by the tables alone. Ticks wrap.
func TestTried(t *testing.T) {
	eachPolicy(t, func(t *testing.T, f family, method bpf.FairleadMethod, p plan, lost bool) {
		s := newScene(t, f, method, p)
		now := s.tick()
		for _, at := range []struct {
			down, opened uint32
			since        bool
		}{
			{now, now, true}, {now, now - 1, false}, {now, now + 1, true},
			{0, 0, true}, {0, 0xffffffff, false}, {0xffffffff, 0, true}, {0xfffffff0, 5, true}, {5, 0xfffffff0, false},
			{now, now - 1<<31 + 1, false}, {now, now + 1<<31 - 1, true},
		} {
			s.set(0, up, 0)
			s.rebuildExceptions()
			c := s.clientOf(1).open()
			c.age(c.first() - at.opened)
			c.send(c.segment(ack, ""), forwardTable)
			before := c.entry()
			s.set(0, tried, at.down)
			s.rebuildExceptions()
			switch {
			case at.since:
				for range 3 {
					c.send(c.segment(ack, "I am new here"), forwardTable)
				}
				if !rewrites(method) && !s.fresh(c.client, f.service) {
					t.Error("no fresh bit to go by again, once the backend is up")
				}
				c.state(s.own())
				s.set(0, up, 0)
				c.send(c.segment(ack, "good"), c.settledVerdict())
				s.set(0, tried, at.down)
				c.send(c.segment(ack, "hm"), forwardTable)
			case lost:
				c.send(c.segment(ack, "are you there?"), resetBackendDown)
				c.state(s.own() | condemned | clientTold)
			default:
				c.send(c.segment(ack, "are you there?"), forwardTable)
				c.state(s.own())
			}
			if after := c.entry(); after.Opened != at.opened || after.Generation != before.Generation {
				t.Errorf("down at %d: entry %+v\nwas %+v", at.down, after, before)
			}
			if rewrites(method) {
				v := replyTable
				if lost && !at.since {
					v = resetCondemned
				}
				c.reply(c.answer(ack, "I am"), v)
			}
			// No other flag makes it serve what was opened since.
			s.set(0, bpf.FairleadBackendFlagBACKEND_NEIGHBOR, at.down)
			if lost {
				c.send(c.segment(ack, ""), resetBackendDown)
			}
		}
	})
}

// Rehashed connections go to a backend that is up, and to no other.
func TestTriedRehash(t *testing.T) {
	eachWay(t, unseen, func(t *testing.T, f family, w way, p plan) {
		p.backends, p.policy = 2, bpf.FairleadDownPolicyDOWN_REHASH
		s := newScene(t, f, w.method, p)
		c := s.clientOf(1).open()
		for slot := range s.service.ring {
			s.service.ring[slot] = 2
		}
		s.setRing(1, s.service.ring)
		s.set(0, tried, s.tick()+1000)
		s.set(1, tried, s.tick()-1000)
		c.send(c.segment(ack, ""), forwardTable)
		if entry := c.entry(); entry.Backend != 1 {
			t.Errorf("rehashed to backend %d, which is down as well", entry.Backend)
		}
		s.set(1, up, 0)
		c.backend = 2
		c.send(c.segment(ack, ""), forwardTable)
		if entry := c.entry(); entry.Backend != 2 {
			t.Error("not rehashed to the backend that is up")
		}
	})
}

// Newcomers are accepted onto backends that are tried, and are confirmed there.
func TestTriedNewcomers(t *testing.T) {
	eachPolicy(t, func(t *testing.T, f family, method bpf.FairleadMethod, p plan, _ bool) {
		s := newScene(t, f, method, p)
		s.set(0, tried, s.tick())
		s.set(1, tried, s.tick())
		for range 3 {
			c := s.newClient().open()
			c.send(c.segment(ack, "data"), forwardTable)
			c.send(c.segment(ack, "data"), forwardTable)
		}
		// A leaving backend is not tried, nor one whose next hop is not known.
		for _, flags := range []bpf.FairleadBackendFlag{
			tried | bpf.FairleadBackendFlagBACKEND_LEAVING, bpf.FairleadBackendFlagBACKEND_TRIED,
			bpf.FairleadBackendFlagBACKEND_NEIGHBOR,
		} {
			s.set(0, flags, s.tick())
			s.set(1, flags, s.tick())
			c := s.newClient()
			c.send(c.segment(syn, ""), dropNoNeighbor)
		}
	})
}

// A client that begins anew on the tuple of a lost connection, and was not told, is a newcomer too: the old entry gives way,
// by nat, where both have one way back, as well.
func TestTriedAnew(t *testing.T) {
	eachPolicy(t, func(t *testing.T, f family, method bpf.FairleadMethod, p plan, lost bool) {
		if !lost {
			return
		}
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newScene(t, f, method, p)
			c := s.clientOf(1).open()
			c.age(1000)
			s.set(0, tried, c.first()+500)
			if p.udp { // can't begin anew until it is told
				c.send(c.datagram("are you there?"), resetBackendDown)
			}
			before := c.entry()
			opening := c.again()
			c.send(opening, forwardNew)
			c.send(opening, forwardHalfOpen)
			switch {
			case p.udp && rewrites(method):
				c.reply(c.response("yes"), replyHalfOpen, removed, confirmed)
			case p.udp:
				c.age(udpProof)
				c.send(c.datagram("are you there?"), forwardHalfOpen, removed, confirmed)
			default:
				synAck := c.answer(syn|ack, "")
				if rewrites(method) {
					c.reply(synAck, replyHalfOpen)
					c.reply(synAck, replyHalfOpen)
				}
				c.stays(before)
				c.send(c.segment(ack, ""), forwardHalfOpen, removed, confirmed)
			}
			if entry := c.entry(); entry.Generation == before.Generation || entry.Opened == before.Opened {
				t.Errorf("entry %+v\nwas   %+v", entry, before)
			}
			var events []event
			if p.udp && rewrites(method) {
				events = []event{matured}
			}
			c.send(c.segment(ack, ""), forwardTable, events...)
			if rewrites(method) {
				c.reply(c.answer(ack, "data"), replyTable)
			}

			// Once the backend is up, the SYN-ACK of a SYN that went by the old entry is that one's.
			if d := s.clientOf(1); method == nat && !p.udp {
				s.set(0, up, 0)
				d.open()
				d.age(1000)
				s.set(0, tried, d.first()+500)
				d.send(d.again(), forwardNew)
				s.set(0, up, 0)
				d.reply(d.answer(syn|ack, ""), replyTable)
				d.send(d.segment(ack, ""), forwardTable)
				d.talks()
			}
		})
	})
}

// An entry that is served again, as its backend is up or down only since, does not give way to who began anew meanwhile.
func TestServedAgain(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, flags := range []bpf.FairleadBackendFlag{up, tried} {
			s := udpScene(t, f, fullnat, plan{})
			c := s.newClient().open()
			c.age(1000)
			s.set(0, tried, c.first()+500)
			c.send(c.datagram("are you there?"), resetBackendDown)
			before := c.entry()
			c.send(c.again(), forwardNew)
			s.set(0, flags, before.Opened)
			c.reply(c.response("yes"), replyHalfOpen)
			c.stays(before)
			s.count(1, 0)
		}
	})
}

// A half-open connection is lost or lives as an established one does; who is half-open on a lost backend begins anew.
func TestTriedHalfOpen(t *testing.T) {
	eachPolicy(t, func(t *testing.T, f family, method bpf.FairleadMethod, p plan, _ bool) {
		s := newScene(t, f, method, p)
		for _, since := range []bool{true, false} {
			s.set(0, up, 0)
			c := s.clientOf(1)
			c.send(c.segment(syn, ""), forwardNew)
			if since {
				s.set(0, tried, c.first())
				c.seq--
				c.send(c.segment(syn, ""), forwardHalfOpen)
				c.finishOpening()
				c.send(c.segment(ack, ""), forwardTable)
				continue
			}
			s.set(0, tried, c.first()+1)
			c.ack++
			lost := c.segment(ack, "")
			c.ack--
			switch {
			case rewrites(method):
				c.send(lost, resetUnknown)
			case p.policy == bpf.FairleadDownPolicyDOWN_RESET:
				c.send(lost, resetBackendDown)
			default:
				c.send(lost, forwardUnknown)
			}
			c.seq--
			c.age(1) // so that its next SYN is not of the same tick
			s.set(0, tried, c.first()+1)
			c.send(c.segment(syn, ""), forwardNew)
			if rewrites(method) {
				c.reply(c.answer(syn|ack, ""), replyHalfOpen)
			} else {
				c.answer(syn|ack, "")
			}
			c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
		}
	})
}

// What nobody knows, in mid-connection, is not given to a backend that isn't up, where the policy is to reset; elsewhere it
// goes by the ring, and is not adopted.
func TestDownUnknown(t *testing.T) {
	eachPolicy(t, func(t *testing.T, f family, method bpf.FairleadMethod, p plan, _ bool) {
		s := newScene(t, f, method, p)
		for _, flags := range []bpf.FairleadBackendFlag{tried, bpf.FairleadBackendFlagBACKEND_NEIGHBOR} {
			s.set(0, flags, s.tick()-1000)
			s.set(1, flags, s.tick()-1000)
			for _, tcp := range []uint8{ack, ack | psh, fin | ack, rst, rst | ack} {
				c := s.newClient()
				v := resetBackendDown
				switch {
				case rewrites(method):
					v = resetUnknown
				case p.policy != bpf.FairleadDownPolicyDOWN_RESET:
					v = forwardUnknown
				}
				if tcp&rst != 0 && v != forwardUnknown {
					v = dropUnknownRST
				}
				c.send(c.segment(tcp, "hello?"), v)
				c.absent()
			}
		}
		s.count(0, 0)
	})
}

// A grown, fresh connection of a settled slot is not answered by the ring while its backend is not up.
func TestFastPathUp(t *testing.T) {
	eachWay(t, unseen, func(t *testing.T, f family, w way, p plan) {
		p.policy = bpf.FairleadDownPolicyDOWN_KEEP
		eachProtocol(t, p, func(t *testing.T, p plan) {
			s := newScene(t, f, w.method, p)
			c := s.newClient().open()
			s.rebuildExceptions()
			c.send(c.segment(ack, ""), forwardRing)
			for _, flags := range []bpf.FairleadBackendFlag{tried, bpf.FairleadBackendFlagBACKEND_NEIGHBOR} {
				s.set(0, flags, c.first()-1)
				c.send(c.segment(ack, ""), forwardTable)
				c.send(c.segment(ack, ""), forwardTable)
				if s.exception(c.client, f.service) || !s.fresh(c.client, f.service) {
					t.Error("want no exception bit, and the fresh bit")
				}
				s.set(0, up, 0)
				c.send(c.segment(ack, ""), forwardRing)
			}
		})
	})
}

// UDP: a client is told once of each death, however long it was idle, and is new then.
func TestUDPTold(t *testing.T) {
	eachPolicy(t, func(t *testing.T, f family, method bpf.FairleadMethod, p plan, lost bool) {
		if !lost {
			return
		}
		p.udp, p.ports = true, 256
		s := newScene(t, f, method, p)
		for _, idle := range []bool{false, true} {
			s.set(0, up, 0)
			c := s.clientOf(1).open()
			for i := range 4 { // comes back, and dies again
				if idle {
					s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
				}
				s.set(0, bpf.FairleadBackendFlagBACKEND_NEIGHBOR, s.tick())
				before := c.entry()
				s.await(before.Seen + 1)
				remove := c.asSeen(tendRemove)
				now := s.tick()
				c.send(c.datagram("are you there?"), resetBackendDown)
				c.state(s.own() | idleMark | clientTold)
				if entry := c.entry(); int32(entry.Marked-now) < 0 {
					t.Errorf("told at tick %d, marked at %d", now, entry.Marked)
				}
				s.tendWant("a packet since", tendChanged, remove)
				if !s.exception(c.client, f.service) {
					t.Error("no exception bit of whose client was told")
				}
				s.set(0, up, 0)
				if i%2 == 1 && rewrites(method) {
					c.reply(c.response("back I am"), replyTable, takenBack)
				} else {
					c.send(c.datagram("there you are"), forwardTable, takenBack)
				}
				c.state(s.own())
				s.rebuildExceptions()
				c.send(c.datagram("good"), c.settledVerdict())
			}
			s.set(0, bpf.FairleadBackendFlagBACKEND_NEIGHBOR, s.tick())
			c.send(c.datagram("are you there?"), resetBackendDown)
			for slot := range s.service.ring {
				s.service.ring[slot] = 2
			}
			s.setRing(1, s.service.ring)
			c.backend, c.confirmed = 2, false
			c.send(c.datagram("anybody?"), forwardNew)
			for slot := range s.service.ring {
				s.service.ring[slot] = uint32(slot%2 + 1)
			}
			s.setRing(1, s.service.ring)
		}
	})
}

// Backends' answers to SYNs are counted where they are seen: a SYN-ACK once a connection, a RST for each SYN that gets one.
func TestAnswersCounted(t *testing.T) {
	eachWay(t, rewrites, func(t *testing.T, f family, w way, p plan) {
		p.backends = 2
		s := newScene(t, f, w.method, p)
		counted := func(place int, answered, rejected uint64) {
			t.Helper()
			if b := s.counted().Backends[place+1]; b.Answered != answered || b.Rejected != rejected {
				t.Errorf("backend %d: %d answered, %d rejected; want %d, %d", place+1, b.Answered, b.Rejected, answered, rejected)
			}
		}
		c := s.clientOf(1)
		c.send(c.segment(syn, ""), forwardNew)
		counted(0, 0, 0)
		synAck := c.answer(syn|ack, "")
		// Not to this SYN.
		c.reply(synAckFor(synAck, c.seq+0x10000), passReplyUnknown)
		counted(0, 0, 0)
		c.reply(synAck, replyHalfOpen)
		c.reply(synAck, replyHalfOpen)
		counted(0, 1, 0)
		c.seq--
		c.send(c.segment(syn, ""), forwardHalfOpen)
		c.reply(synAck, replyHalfOpen)
		c.reply(c.answer(rst, ""), replyHalfOpen) // has changed its mind: it had answered
		counted(0, 1, 0)
		c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
		c.reply(synAck, replyTable)
		c.reply(c.answer(ack, "data"), replyTable)
		c.reply(c.answer(rst, ""), replyTable, closingSeen)
		counted(0, 1, 0)
		counted(1, 0, 0)

		c = s.clientOf(2)
		c.send(c.segment(syn, ""), forwardNew)
		c.reply(c.answer(rst|ack, ""), replyHalfOpen)
		counted(1, 0, 1)
		c.seq--
		c.send(c.segment(syn, ""), forwardHalfOpen)
		c.reply(c.answer(rst, ""), replyHalfOpen)
		counted(1, 0, 2)
		c.reply(c.answer(ack, "?"), replyHalfOpen)
		c.reply(c.answer(syn, ""), replyHalfOpen)
		counted(1, 0, 2)
		c.seq--
		c.send(c.segment(syn, ""), forwardHalfOpen)
		c.finishOpening()
		counted(1, 1, 2)
		counted(0, 1, 0)

		// UDP has no such answers.
		under := udpScene(t, f, w.method, plan{})
		d := under.newClient().open()
		d.reply(d.response("data"), replyTable)
		if b := under.counted().Backends[1]; b.Answered != 0 || b.Rejected != 0 {
			t.Errorf("UDP: %d answered, %d rejected", b.Answered, b.Rejected)
		}
	})
}

// synAckFor is a SYN-ACK of another SYN's.
func synAckFor(s segment, acknowledgement uint32) segment {
	s.acknowledgement = acknowledgement + 1
	return s
}
