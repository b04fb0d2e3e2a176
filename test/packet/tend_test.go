package packet

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"fairlead/bpf"
	"fairlead/maps"

	"github.com/google/go-cmp/cmp"
)

const (
	tendMarkIdle       = bpf.FairleadTendWhatTEND_MARK_IDLE
	tendRemove         = bpf.FairleadTendWhatTEND_REMOVE
	tendRemoveHalfOpen = bpf.FairleadTendWhatTEND_REMOVE_HALF_OPEN
	tendCondemn        = bpf.FairleadTendWhatTEND_CONDEMN
	tendDone           = bpf.FairleadTendWhatTEND_DONE
	tendChanged        = bpf.FairleadTendWhatTEND_CHANGED
	tendAbsent         = bpf.FairleadTendWhatTEND_ABSENT
)

// record asks `tend` for something of a connection as it was seen.
func (s *scene) record(what bpf.FairleadTendWhat, client, service netip.AddrPort, generation, seen uint32) bpf.FairleadTendRecord {
	r := bpf.FairleadTendRecord{What: uint32(what), Generation: generation, Seen: seen}
	if !client.Addr().Is4() {
		r.Tuple = s.tuple6(client, service)
		return r
	}
	key := s.tuple4(client, service)
	r.Tuple.Saddr[0], r.Tuple.Saddr[1] = key.Saddr, key.Daddr
	ports := binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, key.Sport), key.Dport)
	r.Tuple.Saddr[2] = binary.NativeEndian.Uint32(ports)
	r.Tuple.Saddr[3] = binary.NativeEndian.Uint32([]byte{key.Protocol, 0, 0, 0})
	return r
}

// tend has the program look after records, and answers what became of them.
func (s *scene) tend(records ...bpf.FairleadTendRecord) []bpf.FairleadTendWhat {
	s.Helper()
	request := bpf.FairleadTendRequest{Family: uint32(familyOf(s.family.client)), Count: uint32(len(records))}
	copy(request.Records[:], records)
	data, err := binary.Append(nil, binary.NativeEndian, request)
	s.must(err)
	action, out := s.run(s.Tend, data, theKernel.front)
	if action != xdpPass {
		s.Fatalf("tend: action %d", action)
	}
	if _, err := binary.Decode(out, binary.NativeEndian, &request); err != nil {
		s.Fatal(err)
	}
	answers := make([]bpf.FairleadTendWhat, len(records))
	for i := range answers {
		answers[i] = bpf.FairleadTendWhat(request.Records[i].What)
		if answers[i] == tendDone && records[i].What == uint32(tendRemove) {
			s.want.Events[removed]++
		}
	}
	s.checkCounters("tend")
	return answers
}

// asSeen is the record for a connection as it is now.
func (c *conversation) asSeen(what bpf.FairleadTendWhat) bpf.FairleadTendRecord {
	c.Helper()
	entry := c.entry()
	return c.record(what, c.client, c.scene.service.address, entry.Generation, entry.Seen)
}

// remove ends a connection as the daemon does: only what is closing or idle goes.
func (s *scene) remove(c *conversation) {
	s.Helper()
	if state := maps.State(c.entry().State); !state.Closing() && state&maps.StateIdle == 0 {
		s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
	}
	if answer := s.tend(c.asSeen(tendRemove))[0]; answer != tendDone {
		s.Fatalf("remove %s: %d", c.client, answer)
	}
	c.confirmed = false
	c.absent()
}

// tendWant fails where any of the records is answered otherwise.
func (s *scene) tendWant(name string, want bpf.FairleadTendWhat, records ...bpf.FairleadTendRecord) {
	s.Helper()
	for _, answer := range s.tend(records...) {
		if answer != want {
			s.Errorf("%s: tend answers %d, want %d", name, answer, want)
		}
	}
}

// Marks and removals are obeyed where the entry is still as it was seen, and not otherwise.
func TestTend(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.newClient().open()
		s.rebuildExceptions()
		c.send(c.segment(ack, ""), c.settledVerdict())

		stranger := s.newClient()
		for _, what := range []bpf.FairleadTendWhat{tendMarkIdle, tendRemove} {
			seen := c.asSeen(what)
			other := seen
			other.Seen--
			s.tendWant("another time", tendChanged, other)
			other.Seen += 2
			s.tendWant("another time", tendChanged, other)
			other = seen
			other.Generation++
			s.tendWant("another generation", tendAbsent, other)
			s.tendWant("a stranger", tendAbsent, s.record(what, stranger.client, f.service, seen.Generation, seen.Seen))
		}
		s.tendWant("a connection is not half-open", tendAbsent, c.asSeen(tendRemoveHalfOpen))
		if c.entry().State&uint32(bpf.FairleadConnectionStateSTATE_IDLE) != 0 || s.exception(c.client, f.service) {
			t.Fatalf("marked all the same: %+v", c.entry())
		}

		// Marked idle: an exception, which the next packet takes back.
		for range 2 {
			s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
			if entry := c.entry(); entry.State&uint32(bpf.FairleadConnectionStateSTATE_IDLE) == 0 || entry.Marked < entry.Seen {
				t.Fatalf("not marked: %+v", entry)
			}
			if !s.exception(c.client, f.service) || s.fresh(c.client, f.service) {
				t.Error("want the exception bit, and no fresh bit")
			}
			c.send(c.segment(ack, ""), forwardTable, takenBack)
			if entry := c.entry(); entry.State&uint32(bpf.FairleadConnectionStateSTATE_IDLE) != 0 {
				t.Fatalf("not taken back: %+v", entry)
			}
		}
		if rewrites(method) { // by the backend's packet as well
			s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
			c.reply(c.answer(ack, "ping"), replyTable, takenBack)
		}

		// What came since the look is not overlooked: the clock has moved, and so has the entry.
		before := c.asSeen(tendRemove)
		s.await(before.Seen + 1)
		c.send(c.segment(ack, ""), forwardTable)
		s.tendWant("a packet since", tendChanged, before)
		s.tendWant("neither closing nor idle", tendChanged, c.asSeen(tendRemove))
		s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
		s.tendWant("a packet since, and idle", tendChanged, before)
		s.count(1, 0)

		s.remove(c)
		s.count(0, 0)
		s.tendWant("removed", tendAbsent, before)
		if rewrites(method) {
			c.send(c.segment(ack, ""), resetUnknown)
			c.reply(c.answer(ack, "?"), passReplyUnknown)
		} else {
			c.send(c.segment(ack, ""), forwardAdopted, confirmed)
			s.count(1, 1)
			s.remove(c)
			s.count(0, 0)
		}
		s.checkTables()
	})
}

// As many records as a request has, and requests cut short.
func TestTendMany(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		var records []bpf.FairleadTendRecord
		var open []*conversation
		for range 40 {
			c := s.newClient()
			open = append(open, c.open())
			s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
			records = append(records, c.asSeen(tendRemove), s.record(tendRemove, s.newClient().client, f.service, 0, 0))
		}
		s.count(40, 0)
		var want []bpf.FairleadTendWhat
		for range bpf.FairleadLimitsTEND_RECORDS / 2 {
			want = append(want, tendDone, tendAbsent)
		}
		if diff := cmp.Diff(want, s.tend(records[:bpf.FairleadLimitsTEND_RECORDS]...)); diff != "" {
			t.Errorf("answers (-want +got):\n%s", diff)
		}
		s.count(8, 0)

		request := bpf.FairleadTendRequest{Family: uint32(familyOf(f.client)), Count: 2}
		request.Records[0], request.Records[1] = open[32].asSeen(tendRemove), open[33].asSeen(tendRemove)
		data, err := binary.Append(nil, binary.NativeEndian, request)
		s.must(err)
		size := (len(data) - 16) / int(bpf.FairleadLimitsTEND_RECORDS)
		for _, length := range []int{14, 16, 16 + size - 1} {
			s.run(s.Tend, data[:length], theKernel.front)
			s.count(8, 0)
		}
		s.run(s.Tend, data[:min(16+2*size-1, len(data))], theKernel.front)
		s.want = s.counted()
	})
}

// A half-open entry is removed once its life is over, not before.
func TestTendHalfOpen(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		const life = 60
		s := newScene(t, f, method, plan{settings: []setting{constant("half_open_life", uint32(life))}})
		c := s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		half, _ := s.halfOpen(c.client, f.service)
		ask := s.record(tendRemoveHalfOpen, c.client, f.service, half.Generation, 0)
		other := ask
		other.Generation++
		if answers := s.tend(ask, other); s.tick()-half.First < life &&
			cmp.Diff(answers, []bpf.FairleadTendWhat{tendChanged, tendAbsent}) != "" {
			t.Errorf("a living half-open entry: %v", answers)
		}
		s.await(half.First + life)
		s.tendWant("its life is over", tendDone, ask)
		if _, found := s.halfOpen(c.client, f.service); found {
			t.Error("it is there still")
		}
		s.tendWant("it is gone", tendAbsent, ask)
	})
}

// A half-open connection whose life is over is nobody's: its packets are unknown, its backend's too.
func TestHalfOpenLife(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		const life = 120
		s := newScene(t, f, method, plan{ports: 2, settings: []setting{constant("half_open_life", uint32(life))}})
		c, d := s.newClient(), s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		d.send(d.segment(syn, ""), forwardNew)
		answer := c.answer(syn|ack, "")
		first, _ := s.halfOpen(c.client, f.service)
		s.await(first.First + life/2)
		c.seq-- // retransmissions don't prolong its life
		c.send(c.segment(syn, ""), forwardHalfOpen)
		if half, _ := s.halfOpen(c.client, f.service); half.First != first.First {
			t.Error("a retransmitted SYN prolonged a half-open connection's life")
		}
		last, _ := s.halfOpen(d.client, f.service)
		s.await(last.First + life)
		if rewrites(method) {
			c.reply(answer, passReplyUnknown)
			c.send(c.segment(ack, ""), resetUnknown)
			// The ports come home, and nobody was robbed of them.
			for range 2 {
				e := s.newClient()
				e.send(e.segment(syn, ""), forwardNew)
			}
		} else {
			c.send(c.segment(ack, ""), forwardAdopted, confirmed)
			d.seq-- // the same SYN again: a new life
			d.send(d.segment(syn, ""), forwardNew)
		}
	})
}
