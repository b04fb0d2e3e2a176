package packet

import (
	"testing"

	"fairlead/bpf"
)

// How far a client's FIN or RST may be from the numbers last seen: behind, and ahead by method.
const (
	fitBehind         = 1 << 16
	fitAhead          = 1 << 21
	fitAheadStateless = 1 << 24
)

// finNear is how far behind an end's FIN its retransmissions may be.
const finNear = 1 << 16

// States of connections.
const (
	idleMark        = uint32(bpf.FairleadConnectionStateSTATE_IDLE)
	clientFIN       = uint32(bpf.FairleadConnectionStateSTATE_CLIENT_FIN)
	clientFINKnown  = uint32(bpf.FairleadConnectionStateSTATE_CLIENT_FIN_KNOWN)
	backendFIN      = uint32(bpf.FairleadConnectionStateSTATE_BACKEND_FIN)
	backendFINKnown = uint32(bpf.FairleadConnectionStateSTATE_BACKEND_FIN_KNOWN)
	clientReset     = uint32(bpf.FairleadConnectionStateSTATE_CLIENT_RESET)
	backendReset    = uint32(bpf.FairleadConnectionStateSTATE_BACKEND_RESET)
	condemned       = uint32(bpf.FairleadConnectionStateSTATE_CONDEMNED)
	backendTold     = uint32(bpf.FairleadConnectionStateSTATE_BACKEND_TOLD)
	clientTold      = uint32(bpf.FairleadConnectionStateSTATE_CLIENT_TOLD)
	young           = uint32(bpf.FairleadConnectionStateSTATE_YOUNG)
	noReplies       = uint32(bpf.FairleadConnectionStateSTATE_STATELESS)
)

func ahead(method bpf.FairleadMethod) uint32 {
	if !rewrites(method) {
		return fitAheadStateless
	}
	return fitAhead
}

// A stranger who knows addresses and ports, and not the numbers, moves nothing.
func TestSpoofed(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.newClient().open()
		s.rebuildExceptions()
		c.send(c.segment(ack, ""), c.settledVerdict())
		before := c.entry()
		s.await(before.Seen + 1)
		spoof := func(flags uint8, offset uint32) segment {
			spoofed := c.segment(flags, "")
			c.seq = before.SequenceEnd
			return spoofed.atSequence(c.seq + offset)
		}
		for _, offset := range []uint32{
			ahead(method), ahead(method) + 12345, 1 << 30, 1 << 31, 3 << 30, 1<<32 - fitBehind - 1,
		} {
			for _, flags := range []uint8{rst, rst | ack, fin | ack, fin | rst, rst | psh | ack} {
				c.send(spoof(flags, offset), forwardTable, closingUnfit)
			}
		}
		for _, offset := range []uint32{0, 1, 1 << 31, 0xffffffff} {
			c.send(spoof(syn, offset), forwardTable)
		}
		after := c.entry()
		if before != after {
			t.Errorf("entry %+v\nwas   %+v", after, before)
		}
		if s.exception(c.client, f.service) {
			t.Error("an exception was made of the connection")
		}
		s.count(1, 0)
		if rewrites(method) {
			c.reply(c.answer(ack, "data"), replyTable)
		}
		c.send(c.segment(ack, ""), forwardTable)
		c.send(c.segment(ack, ""), c.settledVerdict())
	})
}

// An ACK with numbers from nowhere does not make a RST fit that follows it. (Where replies are seen, every packet of the
// client's is, so that its numbers can't run ahead unseen.)
func TestSpoofedTwice(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		before := c.entry()
		seq := c.seq
		spoofed := c.segment(ack, "").atSequence(seq + 1<<30)
		c.send(spoofed, forwardTable)
		if after := c.entry(); after.SequenceEnd != before.SequenceEnd || after.Acknowledgement != before.Acknowledgement {
			t.Errorf("numbers that don't fit were noted: %+v", after)
		}
		spoofed = c.segment(rst, "").atSequence(seq + 1<<30)
		c.send(spoofed, forwardTable, closingUnfit)
	})
}

// Numbers that are far from the truth (an entry was restored that is a second old) heal: the backend's acknowledgement
// says where its client is.
func TestNumbersHeal(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		entry := c.entry()
		entry.SequenceEnd -= 100 << 20
		s.editEntry(c, &entry)
		c.send(c.segment(ack|psh, "much later"), forwardTable)
		c.reply(c.answer(ack, ""), replyTable)
		c.send(c.segment(ack|psh, "and on"), forwardTable)
		if entry := c.entry(); entry.SequenceEnd != c.seq || entry.Acknowledgement != c.ack {
			t.Errorf("entry %+v, want sequence end %d and acknowledgement %d", entry, c.seq, c.ack)
		}
		c.send(c.segment(rst|ack, ""), forwardTable, closingSeen)
	})
}

// What fits starts closing, at the edges of what fits as well; live traffic takes the connection back.
func TestClosingTakenBack(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2, ports: 100})
		for _, offset := range []uint32{0, 1, ahead(method) - 1, 1<<32 - fitBehind, 0xffffffff} {
			c := s.newClient().open()
			seq := c.seq
			closing := c.segment(rst, "").atSequence(seq + offset)
			c.send(closing, forwardTable, closingSeen)
			if entry := c.entry(); entry.State&uint32(bpf.FairleadConnectionStateSTATE_CLIENT_RESET) == 0 ||
				entry.SequenceEnd != seq {
				t.Errorf("after a RST that fits: %+v", entry)
			}
			if !s.exception(c.client, f.service) || s.fresh(c.client, f.service) {
				t.Error("want the exception bit, and no fresh bit")
			}
			c.seq = seq
			if rewrites(method) { // the backend alone can't say that the client lives
				c.reply(c.answer(ack, "hm"), replyTable)
			}
			c.send(c.segment(ack|psh, "I live"), forwardTable, takenBack)
			if state := c.entry().State &^ uint32(bpf.FairleadConnectionStateSTATE_STATELESS); state != 0 {
				t.Errorf("state %#x after being taken back", state)
			}
			c.send(c.segment(ack|psh, "on and on"), forwardTable)
		}
		s.count(5, 0)
	})
}

// state fails where the connection's entry is in another state.
func (c *conversation) state(want uint32) {
	c.Helper()
	if state := c.entry().State; state != want {
		c.Errorf("state %#x, want %#x", state, want)
	}
}

// A FIN of each side is closing; a side that talks on takes it back, one that acknowledges does not.
func TestFINs(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		const (
			clientEnded  = clientFIN | clientFINKnown
			backendEnded = backendFIN | backendFINKnown
		)
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		c.reply(c.answer(fin|ack, ""), replyTable)
		c.state(backendEnded)
		late := c.segment(ack, "half a connection ")
		c.send(late, forwardTable)
		c.state(backendEnded)
		c.reply(c.answer(ack, ""), replyTable) // an acknowledgement that stands behind the FIN
		c.state(backendEnded)
		last := c.segment(fin|ack, "can go on for hours")
		c.send(last, forwardTable, closingSeen)
		c.state(clientEnded | backendEnded)
		c.send(c.segment(ack, ""), forwardTable)
		c.reply(c.answer(ack, ""), replyTable)
		c.send(last, forwardTable) // retransmitted
		c.state(clientEnded | backendEnded)
		// A segment from before, overtaken on its way, looks like life; the next acknowledgement tells the truth.
		c.send(late, forwardTable, takenBack)
		c.state(clientFINKnown | backendEnded)
		c.send(c.segment(ack, ""), forwardTable)
		c.state(clientEnded | backendEnded)
		c.reply(c.answer(ack, "new data behind a FIN"), replyTable, takenBack)
		c.state(clientEnded)
		c.reply(c.answer(ack, ""), replyTable)
		c.state(clientEnded)
		c.reply(c.answer(fin|ack, ""), replyTable, closingSeen)
		c.state(clientEnded | backendEnded)
	})
}

// A plain packet where its end's FIN stands keeps the FIN. One shortly before takes the closing back, and the next one
// where the FIN stands has it again: the first was a retransmission. One anywhere else has the FIN forgotten.
func TestNearFIN(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2, ports: 100})
		all := noReplies | clientFIN | clientFINKnown
		if rewrites(method) {
			all = clientFIN | clientFINKnown | backendFIN | backendFINKnown
		}
		// closed is a connection that FINs have ended.
		closed := func() *conversation {
			c := s.newClient().open()
			if rewrites(method) {
				c.reply(c.answer(fin|ack, "bye"), replyTable)
			}
			c.send(c.segment(fin|ack, "bye"), forwardTable, closingSeen)
			c.state(all)
			return c
		}
		// judge has an end say something so far behind its FIN, and then something where that stood.
		judge := func(c *conversation, behind, fin, known uint32, say func(behind uint32, events ...event), again ...event) {
			t.Helper()
			forgotten := behind >= finNear
			switch {
			case behind == 0:
				say(behind)
				c.state(all)
			case !forgotten:
				say(behind, takenBack)
				c.state(all &^ fin)
			default:
				say(behind, takenBack)
				c.state(all &^ (fin | known))
			}
			s.rebuildExceptions()
			if !rewrites(method) && s.exception(c.client, f.service) == forgotten {
				t.Errorf("%d behind the FIN: exception bit %t after the next rebuild", behind, !forgotten)
			}
			switch {
			case behind == 0:
				say(0)
				c.state(all)
			case !forgotten:
				say(0, again...)
				c.state(all)
			case rewrites(method):
				say(0)
				c.state(all &^ (fin | known))
			default: // by ring alone: a grown connection's packet was seen in the table before
				c.send(c.segment(ack, ""), forwardRing)
				c.state(all &^ (fin | known))
			}
		}
		distances := []uint32{0, 1, 1460, finNear - 1, finNear, 1<<32 - 1, 1<<32 - 12345}
		if !rewrites(method) {
			distances = append(distances, finNear+1, 1<<20, 1<<31)
		}
		for _, behind := range distances {
			c := closed()
			seq := c.seq
			judge(c, behind, clientFIN, clientFINKnown, func(behind uint32, events ...event) {
				t.Helper()
				c.send(c.segment(ack, "").atSequence(seq-behind), forwardTable, events...)
				c.seq = seq
			})
		}
		if !rewrites(method) {
			return
		}
		// Where replies are seen, numbers of a client so far behind the last ones noted are not believed at all.
		c := closed()
		c.send(c.segment(ack, "").atSequence(c.seq-fitBehind-1), forwardTable)
		c.state(all)
		for _, behind := range append(distances, finNear+1, 1<<20, 1<<31) {
			c := closed()
			seq := c.ack
			judge(c, behind, backendFIN, backendFINKnown, func(behind uint32, events ...event) {
				t.Helper()
				c.reply(c.answer(ack, "").atSequence(seq-behind), replyTable, events...)
				c.ack = seq
			}, closingSeen)
		}
	})
}

// A RST or FIN that doesn't fit does not take an idle connection back either.
func TestIdleAndSpoofed(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open()
		s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
		before := c.entry()
		s.await(before.Seen + 1)
		seq := c.seq
		c.send(c.segment(rst, "").atSequence(seq+1<<31), forwardTable, closingUnfit)
		c.send(c.segment(fin|ack, "").atSequence(seq+1<<31), forwardTable, closingUnfit)
		if after := c.entry(); after != before {
			t.Errorf("entry %+v\nwas   %+v", after, before)
		}
		c.seq = seq
		c.send(c.segment(ack, ""), forwardTable, takenBack)
	})
}

// A SYN, whatever its numbers, may be of a client that uses its tuple again: an entry that was about to go waits for what
// becomes of it, and is no longer idle. Its other marks it keeps, and no other entry is touched.
func TestSYNTouchesMarked(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		grown := s.newClient().open()
		idle, reset, ended := s.newClient().open(), s.newClient().open(), s.newClient().open()
		idleToo := s.newClient().open()
		s.rebuildExceptions()
		s.tendWant("mark idle", tendDone, idle.asSeen(tendMarkIdle))
		reset.send(reset.segment(rst, ""), forwardTable, closingSeen)
		ended.send(ended.segment(fin|ack, ""), forwardTable, ended.closingAlone()...)
		idleToo.send(idleToo.segment(fin|ack, ""), forwardTable, idleToo.closingAlone()...)
		s.tendWant("mark idle", tendDone, idleToo.asSeen(tendMarkIdle))
		own := uint32(0)
		if !rewrites(method) {
			own = noReplies
		}
		marked := map[*conversation]uint32{
			grown: own, idle: own | idleMark, reset: own | clientReset, ended: own | clientFIN | clientFINKnown,
			idleToo: own | clientFIN | clientFINKnown | idleMark,
		}
		if rewrites(method) {
			other := s.newClient().open()
			other.reply(other.answer(fin|ack, ""), replyTable)
			marked[other] = backendFIN | backendFINKnown
		} else {
			c := s.newClient()
			c.send(c.segment(ack, ""), forwardAdopted, confirmed)
			marked[c] = own | young
		}
		for c, state := range marked {
			c.state(state)
			before := c.entry()
			s.await(before.Seen + 1)
			now := s.tick()
			c.send(c.segment(syn, "").atSequence(c.seq+1<<31), forwardTable)
			after, want := c.entry(), before
			if state&^(noReplies|young) != 0 {
				want.State, want.Seen = state&^idleMark, after.Seen
				if int32(after.Seen-now) < 0 {
					t.Errorf("%s: state %#x: seen at tick %d, want %d or later", c.client, state, after.Seen, now)
				}
			}
			if after != want {
				t.Errorf("entry %+v\nwant  %+v", after, want)
			}
			if !rewrites(method) && (s.fresh(c.client, f.service) || s.exception(c.client, f.service) != (c != grown)) {
				t.Errorf("%s: state %#x: fresh bit %t, exception bit %t", c.client, state,
					s.fresh(c.client, f.service), s.exception(c.client, f.service))
			}
		}
	})
}

// A stranger's RST, SYN or ACK on a half-open connection changes nothing of what confirms it.
func TestSpoofedHalfOpen(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		seq := c.seq
		for _, flags := range []uint8{rst, rst | ack, syn, ack, fin | ack} {
			c.send(c.segment(flags, "").atSequence(seq+1<<30), forwardHalfOpen)
		}
		c.seq = seq
		c.absent()
		c.finishOpening()
		s.count(1, 0)
	})
}
