package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"fairlead/bpf"

	"golang.org/x/sys/unix"
)

// own is the state of a grown connection by the scene's method.
func (s *scene) own() uint32 {
	if rewrites(s.method) {
		return 0
	}
	return noReplies
}

// condemn closes the connection as the daemon does by command.
func (c *conversation) condemn() *conversation {
	c.Helper()
	before := c.entry()
	c.tendWant("condemn", tendDone, c.asSeen(tendCondemn))
	entry := c.entry()
	if entry.State != before.State|condemned || entry.Seen != before.Seen || int32(entry.Marked-before.Seen) < 0 {
		c.Errorf("condemned: %+v\nwas       %+v", entry, before)
	}
	if c.fresh(c.client, c.scene.service.address) || !c.exception(c.client, c.scene.service.address) {
		c.Error("condemned: want the exception bit, and no fresh bit")
	}
	return c
}

// stays fails where the connection's entry is another than it was.
func (c *conversation) stays(before bpf.FairleadConnection) {
	c.Helper()
	if after := c.entry(); after != before {
		c.Errorf("entry %+v\nwas   %+v", after, before)
	}
}

// A condemned connection's first packet becomes a RST to its backend, the next are answered RST: whatever they carry,
// whatever tags and other headers they have, nothing of it stays.
func TestCondemned(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		for _, p.twoArms = range []bool{false, true} {
			p.backends, p.ports, p.mtu = 2, 256, 1500
			s := newScene(t, f, w.method, p)
			for _, v := range variants(f) {
				for _, flags := range []uint8{ack, ack | psh, fin | ack} {
					c := s.newClient().open()
					s.rebuildExceptions()
					c.send(c.segment(ack, ""), c.settledVerdict())
					c.condemn()
					before := c.entry()
					for i, verdict := range []verdict{forwardReset, resetCondemned, resetCondemned} {
						data := c.segment(flags, "goes no further")
						v.make(&data)
						c.send(data, verdict)
						c.state(s.own() | condemned | backendTold | []uint32{0, clientTold, clientTold}[i])
					}
					after := c.entry()
					if after.SequenceEnd != before.SequenceEnd || after.Acknowledgement != before.Acknowledgement ||
						after.Hop != before.Hop || after.Generation != before.Generation {
						t.Errorf("%s: entry %+v\nwas   %+v", v.name, after, before)
					}
				}
			}
			s.count(int64(3*len(variants(f))), 0)
		}
	})
}

// Frames about Ethernet's least, with tags of the way in and of the way out, and with numbers at their edges.
func TestCondemnedShort(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		for _, p.tags = range [][2]uint16{{}, {9}, {tagAD | 9, 11}} {
			p.ports = 256
			s := newScene(t, f, w.method, p)
			for i, in := range taggings {
				for padding := i % 2; padding < 12; padding += 2 {
					c := s.newClient()
					c.seq, c.ack = 0xfffffffe-uint32(padding%3), 0xffffffff-uint32(padding%2)
					c.open().condemn()
					c.tagged(in)
					for _, verdict := range []verdict{forwardReset, resetCondemned} {
						data := c.segment(ack, "")
						data.options, data.padding = nil, bytes.Repeat([]byte("\xa5"), padding)
						c.send(data, verdict)
					}
				}
			}
		}
	})
}

// Frames in several buffers are cut short all the same.
func TestCondemnedBuffers(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.mtu, p.twoArms, p.tags = 9216, true, [2]uint16{9}
		s := newScene(t, f, w.method, p)
		for _, length := range append(jumbo, 9300) { // no way has to take what is cut
			c := s.newClient().open().condemn()
			c.tagged(taggings[5])
			c.send(c.segment(ack|psh, "").asLong(length), forwardReset)
			c.send(c.segment(ack|psh, "").asLong(length), resetCondemned)
		}
	})
}

// It is nobody's last hop: a RST is sent anew, and where to it goes must be known.
func TestCondemnedNoNeighbor(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open().condemn()
		last := c.segment(ack, "")
		last.ttl = 1
		c.send(last, forwardReset)

		c = s.newClient().open().condemn()
		s.backends[0].flags = bpf.FairleadBackendFlagBACKEND_UP
		s.setBackend(s.backends[0])
		c.send(c.segment(ack, ""), dropNoNeighbor)
		c.send(c.segment(ack, ""), resetCondemned)
	})
}

// Whose numbers don't fit is answered, and tells nobody: its RST would not be believed.
func TestCondemnedUnfit(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.newClient().open().condemn()
		seq := c.seq
		unfit := func() {
			t.Helper()
			before := c.entry()
			s.await(max(before.Seen, before.Marked) + 1)
			for _, offset := range []uint32{ahead(method), 1 << 30, 1 << 31, 1<<32 - fitBehind - 1} {
				for _, flags := range []uint8{ack, ack | psh, fin | ack} {
					c.send(c.segment(flags, "").atSequence(seq+offset), resetCondemned)
				}
				c.send(c.segment(rst, "").atSequence(seq+offset), dropUnknownRST)
				c.send(c.segment(rst|ack, "").atSequence(seq+offset), dropUnknownRST)
			}
			c.stays(before)
		}
		unfit()
		c.send(c.segment(ack, "").atSequence(seq+ahead(method)-1), forwardReset)
		unfit()
		c.send(c.segment(ack, "").atSequence(seq-fitBehind), resetCondemned)
		c.state(s.own() | condemned | backendTold | clientTold)
		unfit()
	})
}

// A keep-alive of the client's own stands one before where it is. It is no news of where that is, and its backend would
// not believe a RST from there.
func TestCondemnedKeepAlive(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		for _, payload := range []string{"", "\x00"} {
			c := s.newClient().open()
			s.rebuildExceptions()
			c.send(c.segment(ack, ""), c.settledVerdict())
			before, where := c.entry(), c.seq
			c.send(c.segment(ack, payload).atSequence(where-1), c.settledVerdict())
			if entry := c.entry(); entry.SequenceEnd != before.SequenceEnd || entry.SequenceEnd != where {
				t.Errorf("it is at %x, was at %x, and really is at %x", entry.SequenceEnd, before.SequenceEnd, where)
			}
			c.condemn()
			c.alive = true
			c.send(c.segment(ack, payload).atSequence(where-1), forwardReset)
			c.alive = false
			c.send(c.segment(ack, payload).atSequence(where-1), resetCondemned)
			c.state(s.own() | condemned | backendTold | clientTold)
		}
	})
}

// What its packets say is noted as to when they came: who was told just now is not let go of by an earlier look.
func TestCondemnedSeen(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open().condemn()
		for _, verdict := range []verdict{forwardReset, resetCondemned, resetCondemned} {
			before := c.entry()
			remove := c.asSeen(tendRemove)
			s.await(max(before.Seen, before.Marked) + 1)
			now := s.tick()
			c.send(c.segment(ack, ""), verdict)
			if entry := c.entry(); int32(entry.Marked-now) < 0 || int32(entry.Seen-now) < 0 {
				t.Errorf("seen at tick %d, marked at %d, want %d or later", entry.Seen, entry.Marked, now)
			}
			s.tendWant("a packet since", tendChanged, remove)
		}
		s.remove(c)
	})
}

// A RST of the client's own goes on to the backend, and needs no answer.
func TestCondemnedClientReset(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newScene(t, f, w.method, p)
		for _, flags := range []uint8{rst, rst | ack} {
			ended := s.own() | condemned | backendTold | clientTold | clientReset
			c := s.newClient().open().condemn()
			c.send(c.segment(flags, ""), forwardReset)
			c.state(ended)
			again := c.segment(flags, "")
			again.acknowledgement = c.ack // says nothing without its flag
			c.send(again, forwardReset)
			c.send(c.segment(ack, "?"), resetCondemned)
			c.state(ended)

			// After both were told as well.
			c = s.newClient().open().condemn()
			c.send(c.segment(ack, ""), forwardReset)
			c.send(c.segment(ack, ""), resetCondemned)
			c.send(c.segment(flags, ""), forwardReset)
			c.state(ended)
		}
	})
}

// What its backend sends is answered RST, with the numbers that the backend waits for; then the client's first packet is
// answered too.
func TestCondemnedReplies(t *testing.T) {
	eachWay(t, rewrites, func(t *testing.T, f family, w way, p plan) {
		p.ports = 256
		for _, p.twoArms = range []bool{false, true} {
			for _, p.tags = range [][2]uint16{{}, {tagAD | 9, 11}} {
				s := newScene(t, f, w.method, p)
				for _, v := range variants(f) {
					c := s.newClient().open()
					c.talks()
					c.condemn()
					before := c.entry()
					for _, flags := range []uint8{ack, ack | psh, fin | ack, psh} {
						data := c.answer(flags, "are you there?")
						v.make(&data)
						c.reply(data, resetCondemned)
					}
					before.State |= backendTold
					c.stays(before)
					c.send(c.segment(ack, "I am"), resetCondemned)
					c.state(condemned | backendTold | clientTold)
					c.reply(c.answer(ack, "well then"), resetCondemned)
				}
				// Its own RST is what the client is told.
				for _, flags := range []uint8{rst, rst | ack} {
					c := s.newClient().open().condemn()
					c.reply(c.answer(flags, ""), replyTable, closingSeen)
					c.state(condemned | backendReset)
					c.reply(c.answer(ack, ""), resetCondemned)
				}
			}
		}
	})
}

// again is a SYN of the same client with other numbers, as of one who has lost its connection.
func (c *conversation) again() segment {
	c.seq += 0x12345678
	c.ack += 0x23456789
	c.confirmed, c.backend = false, 0
	return c.segment(syn, "")
}

// A SYN on a condemned connection begins a new one, whoever was told: the old entry gives way as the new one is confirmed,
// and not before.
func TestCondemnedThenNew(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.backends, p.ports = 3, 256
		s := newScene(t, f, w.method, p)
		for told := range 4 {
			c := s.newClient().open()
			s.rebuildExceptions()
			c.condemn()
			for _, verdict := range []verdict{forwardReset, resetCondemned, resetCondemned}[:told] {
				c.send(c.segment(ack, "data"), verdict)
			}
			old := *c
			before := c.entry()
			opening := c.again()
			c.send(opening, forwardNew)
			c.send(opening, forwardHalfOpen)
			c.stays(before)
			if w.method == fullnat {
				// The old one's backend comes by another port.
				old.reply(old.answer(ack, "still here"), resetCondemned)
				before.State |= backendTold
			}
			if rewrites(w.method) {
				synAck := c.answer(syn|ack, "")
				c.reply(synAck, replyHalfOpen)
				c.reply(synAck, replyHalfOpen)
			} else {
				c.answer(syn|ack, "")
			}
			c.stays(before)
			c.send(c.segment(ack, ""), forwardHalfOpen, removed, confirmed)
			entry := c.entry()
			if entry.Generation == before.Generation || entry.State&^young != s.own() || entry.SequenceEnd != c.seq {
				t.Errorf("new entry %+v\nold      %+v", entry, before)
			}
			s.count(int64(told+1), int64(entry.State&young))
			if rewrites(w.method) {
				c.talks()
			} else {
				c.answer(ack, "hello")
				c.send(c.segment(ack, "hello"), forwardTable, matured)
			}
			s.rebuildExceptions()
			c.send(c.segment(ack, "once more"), c.settledVerdict())
			if w.method == fullnat {
				old.reply(old.answer(ack, "still here"), passReplyUnknown)
			}
			s.checkTables()
		}
	})
}

// By nat, the new connection's way back is the old one's. A backend that was not told has the old connection still, and
// says so to its SYN: the client's RST ends that, its next SYN gets through. A backend may also refuse, and may send data
// before its SYN-ACK is acknowledged.
func TestCondemnedThenNewNAT(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, nat, plan{ports: 256})
		c := s.newClient().open().condemn()
		old := *c
		opening := c.again()
		c.send(opening, forwardNew)
		old.reply(old.answer(ack, ""), replyHalfOpen)
		c.send(old.segment(rst, ""), forwardHalfOpen)
		c.send(opening, forwardHalfOpen)
		c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		c.reply(c.answer(ack, "an early answer"), replyHalfOpen)
		c.send(c.segment(ack, ""), forwardHalfOpen, removed, confirmed)
		c.talks()

		c.condemn()
		c.send(c.again(), forwardNew)
		c.reply(c.answer(rst|ack, ""), replyHalfOpen)
		c.state(condemned)

		// Without a SYN, a backend's SYN-ACK is nobody's.
		c = s.newClient().open().condemn()
		c.reply(c.answer(syn|ack, ""), resetCondemned)
		s.count(2, 0)

		// A new connection by another backend has a way back of its own.
		s = newScene(t, f, nat, plan{backends: 2})
		c = s.clientOf(1).open().condemn()
		old = *c
		for slot := range s.service.ring {
			s.service.ring[slot] = 2
		}
		s.setRing(1, s.service.ring)
		c.send(c.again(), forwardNew)
		old.reply(old.answer(ack, "still here"), resetCondemned)
		c.reply(c.answer(syn|ack, ""), replyHalfOpen)
		c.send(c.segment(ack, ""), forwardHalfOpen, removed, confirmed)
		c.talks()
	})
}

// A half-open connection whose life is over is in nobody's way: the way back is the condemned one's again.
func TestCondemnedHalfOpenOver(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		const life = 30
		s := newScene(t, f, nat, plan{settings: []setting{constant("half_open_life", uint32(life))}})
		c := s.newClient().open().condemn()
		c.send(c.again(), forwardNew)
		c.age(life)
		c.reply(c.answer(ack, "still here"), resetCondemned)
		c.state(condemned | backendTold)
	})
}

// UDP knows no RST and no SYN: either end is told that nobody is at the port, the client once, and then it is new.
func TestCondemnedUDP(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		p.backends, p.ports, p.policy = 3, 256, bpf.FairleadDownPolicyDOWN_KEEP
		p.settings = []setting{constant("answers_a_tick", uint32(1000))}
		s := udpScene(t, f, w.method, p)
		for i, v := range variants(f) {
			c := s.newClient().open()
			s.rebuildExceptions()
			c.send(c.datagram("still here"), c.settledVerdict())
			want := s.own() | condemned
			if i%2 == 1 { // for whom nothing was done yet, though it was idle
				s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
				want |= idleMark
			}
			c.condemn()
			c.state(want)
			if rewrites(w.method) {
				data := c.response("are you there?")
				v.make(&data)
				c.reply(data, resetCondemned)
				want |= backendTold
				c.state(want)
			}
			data := c.datagram("yes")
			v.make(&data)
			c.send(data, resetCondemned)
			want |= clientTold | idleMark
			c.state(want)
			before := c.entry()
			old := *c
			if rewrites(w.method) {
				c.reply(c.response("are you?"), resetCondemned)
			}
			c.confirmed, c.backend = false, 0
			c.send(c.datagram("anybody?"), forwardNew)
			c.send(c.datagram("anybody?"), forwardHalfOpen)
			c.stays(before)
			if w.method == fullnat { // by the old port
				old.reply(old.response("are you?"), resetCondemned)
			}
			if rewrites(w.method) {
				c.reply(c.response("yes"), replyHalfOpen, removed, confirmed)
				c.reply(c.response("yes"), replyTable)
			} else {
				c.age(udpProof)
				c.send(c.datagram("are you there?"), forwardHalfOpen, removed, confirmed)
			}
			entry := c.entry()
			if entry.Generation == before.Generation || entry.State != s.own()|young {
				t.Errorf("%s: new entry %+v\nold      %+v", v.name, entry, before)
			}
			if !rewrites(w.method) {
				c.age(udpProof)
			}
			c.send(c.datagram("good"), forwardTable, matured)
			s.checkTables()
		}
		s.count(int64(len(variants(f))), 0)
	})
}

// Port unreachable has the answers' limit, whoever it is for.
func TestCondemnedUDPLimited(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := udpScene(t, f, fullnat, plan{settings: []setting{constant("answers_a_tick", uint32(0))}})
		c := s.newClient().open().condemn()
		c.reply(c.response("are you there?"), dropLimited)
		c.send(c.datagram("yes"), dropLimited)
	})
}

// What the daemon asks for is done to the connection that it has seen, and to no other.
func TestTendCondemn(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.newClient().open()
		s.rebuildExceptions()
		c.send(c.segment(ack, ""), c.settledVerdict())
		before := c.entry()
		fresh := s.fresh(c.client, f.service)
		other := c.asSeen(tendCondemn)
		other.Generation++
		s.tendWant("another generation", tendAbsent, other)
		stranger := s.newClient()
		s.tendWant("a stranger", tendAbsent, s.record(tendCondemn, stranger.client, f.service, before.Generation, before.Seen))
		c.stays(before)
		if s.exception(c.client, f.service) || s.fresh(c.client, f.service) != fresh {
			t.Error("a bit was changed all the same")
		}
		s.tendWant("neither closing, idle nor condemned", tendChanged, c.asSeen(tendRemove))

		// A connection that talks is closed by command too: it need not be as it was seen.
		late := c.asSeen(tendCondemn)
		late.Seen -= 5
		s.tendWant("seen since", tendDone, late)
		c.state(s.own() | condemned)
		c.send(c.segment(ack, ""), forwardReset)

		for _, change := range []uint32{1, 1<<32 - 1} {
			remove := c.asSeen(tendRemove)
			remove.Seen += change
			s.tendWant("another time", tendChanged, remove)
		}
		remove := c.asSeen(tendRemove)
		remove.Generation++
		s.tendWant("another generation", tendAbsent, remove)
		s.count(1, 0)
		s.tendWant("as it was seen", tendDone, c.asSeen(tendRemove))
		c.absent()
		s.count(0, 0)
		s.tendWant("gone", tendAbsent, remove, late)

		// Closing and young ones.
		c = s.newClient().open()
		c.send(c.segment(rst, ""), forwardTable, closingSeen)
		c.condemn()
		c.state(s.own() | condemned | clientReset)
		s.tendWant("as it was seen", tendDone, c.asSeen(tendRemove))
		if !rewrites(method) {
			c = s.newClient()
			c.send(c.segment(ack, ""), forwardAdopted, confirmed)
			c.condemn()
			c.state(noReplies | young | condemned)
			c.send(c.segment(ack, ""), forwardReset)
			s.count(1, 1)
			s.tendWant("as it was seen", tendDone, c.asSeen(tendRemove))
			s.count(0, 0)
		}

		// One request for as many as it takes, each for itself.
		var records []bpf.FairleadTendRecord
		var open []*conversation
		for range bpf.FairleadLimitsTEND_RECORDS / 2 {
			c := s.newClient().open()
			open = append(open, c)
			other := c.asSeen(tendCondemn)
			other.Generation--
			records = append(records, c.asSeen(tendCondemn), other)
		}
		for i, answer := range s.tend(records...) {
			if want := []bpf.FairleadTendWhat{tendDone, tendAbsent}[i%2]; answer != want {
				t.Errorf("record %d: tend answers %d, want %d", i, answer, want)
			}
		}
		for _, c := range open {
			c.state(s.own() | condemned)
		}
	})
}

// The first fragment of a condemned connection's packet is a packet of its; the others have nothing to follow.
func TestCondemnedFragment(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		for i, verdict := range []verdict{forwardReset, resetCondemned} {
			c := s.newClient().open().condemn()
			if i > 0 {
				c.send(c.segment(ack, ""), forwardReset)
			}
			first := c.segment(ack, "sixteen bytes...")
			if f.name == "ipv4" {
				first.df, first.mf = false, true
			} else {
				rest := binary.BigEndian.AppendUint32([]byte{0, 0, 1}, 77)
				first.extensions = []extension{{unix.IPPROTO_FRAGMENT, rest}}
			}
			c.send(first, verdict)
			var none bpf.FairleadFragment
			var key bpf.FairleadFragmentKey
			if s.Fragments.Iterate().Next(&key, &none) {
				t.Errorf("noted where the fragments of a RST go: %s", fmt.Sprint(key))
			}
		}
	})
}
