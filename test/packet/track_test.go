package packet

import (
	"testing"

	"fairlead/bpf"
)

// How far a client's FIN or RST may be from the numbers last seen: behind, and ahead by method.
const (
	fitBehind         = 1 << 16
	fitAhead          = 1 << 21
	fitAheadStateless = 1 << 28
)

func ahead(method bpf.FairleadMethod) uint32 {
	if method == dsr {
		return fitAheadStateless
	}
	return fitAhead
}

// A stranger who knows addresses and ports, and not the numbers, moves nothing.
func TestSpoofed(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.newClient().open()
		c.send(c.segment(ack, ""), c.settledVerdict())
		before := c.entry()
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
		if method == fullnat {
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
			if method == fullnat { // the backend alone can't say that the client lives
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

// A FIN of each side is closing; a side that talks on beyond its FIN takes it back, one that acknowledges does not.
func TestFINs(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		const (
			clientFIN  = uint32(bpf.FairleadConnectionStateSTATE_CLIENT_FIN)
			backendFIN = uint32(bpf.FairleadConnectionStateSTATE_BACKEND_FIN)
		)
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		ended := func(want uint32) {
			t.Helper()
			if state := c.entry().State; state&(clientFIN|backendFIN) != want {
				t.Errorf("state %#x, want ends %#x", state, want)
			}
		}
		c.reply(c.answer(fin|ack, ""), replyTable)
		ended(backendFIN)
		late := c.segment(ack, "half a connection ")
		c.send(late, forwardTable)
		ended(backendFIN)
		c.reply(c.answer(ack, ""), replyTable) // an acknowledgement that stands behind the FIN
		ended(backendFIN)
		last := c.segment(fin|ack, "can go on for hours")
		c.send(last, forwardTable, closingSeen)
		ended(clientFIN | backendFIN)
		c.send(c.segment(ack, ""), forwardTable)
		c.reply(c.answer(ack, ""), replyTable)
		c.send(last, forwardTable) // retransmitted
		ended(clientFIN | backendFIN)
		// A segment from before, overtaken on its way, looks like life; the next acknowledgement tells the truth.
		c.send(late, forwardTable, takenBack)
		ended(backendFIN)
		c.send(c.segment(ack, ""), forwardTable)
		ended(clientFIN | backendFIN)
		c.reply(c.answer(ack, "new data behind a FIN"), replyTable, takenBack)
		ended(clientFIN)
	})
}

// What doesn't fit does not take an idle connection back either.
func TestIdleAndSpoofed(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient().open()
		s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
		before := c.entry()
		seq := c.seq
		c.send(c.segment(rst, "").atSequence(seq+1<<31), forwardTable, closingUnfit)
		c.send(c.segment(fin|ack, "").atSequence(seq+1<<31), forwardTable, closingUnfit)
		c.send(c.segment(syn, "").atSequence(seq+1<<31), forwardTable)
		if after := c.entry(); after != before {
			t.Errorf("entry %+v\nwas   %+v", after, before)
		}
		c.seq = seq
		c.send(c.segment(ack, ""), forwardTable, takenBack)
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
