package packet

import (
	"errors"
	"os"
	"testing"
	"time"
	"unsafe"

	"fairlead/bpf"

	"github.com/cilium/ebpf/ringbuf"
	"github.com/google/go-cmp/cmp"
)

// told reads what the data plane has told of its connection table, to the last.
func (p *dataplane) told() (all []bpf.FairleadJournalEvent) {
	p.Helper()
	reader, err := ringbuf.NewReader(p.Journal)
	p.must(err)
	defer reader.Close()
	reader.SetDeadline(time.Now().Add(-time.Second)) // what is there is there
	for {
		record, err := reader.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return all
		}
		p.must(err)
		all = append(all, *(*bpf.FairleadJournalEvent)(unsafe.Pointer(unsafe.SliceData(record.RawSample))))
	}
}

// What becomes of a connection is told as it happens: as it enters the table, as it matures, as it leaves.
func TestJournal(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{settings: []setting{constant("use_journal", uint8(1))}})
		s.told()
		want := func(what string, c *conversation, entry bpf.FairleadConnection, kinds ...bpf.FairleadJournalWhat) {
			t.Helper()
			var wanted []bpf.FairleadJournalEvent
			for _, kind := range kinds {
				e := bpf.FairleadJournalEvent{What: uint32(kind), Family: map[string]uint32{"ipv4": 4, "ipv6": 6}[f.name], Connection: entry}
				if kind == bpf.FairleadJournalWhatJOURNAL_CLOSED {
					e.Connection = bpf.FairleadConnection{Generation: entry.Generation}
				}
				wanted = append(wanted, e)
			}
			got := s.told()
			for i := range got {
				if tuple := got[i].Tuple; tuple == (bpf.FairleadTuple6{}) {
					t.Errorf("%s: no tuple is told", what)
				}
				got[i].Tuple = bpf.FairleadTuple6{}
			}
			if diff := cmp.Diff(wanted, got, cmp.AllowUnexported(bpf.FairleadJournalEvent{})); diff != "" {
				t.Errorf("%s is told (-want +got):\n%s", what, diff)
			}
		}
		c := s.newClient()
		c.send(c.segment(syn, ""), forwardNew)
		if synAck := c.answer(syn|ack, ""); rewrites(method) {
			c.reply(synAck, replyHalfOpen)
		}
		want("a half-open connection", c, bpf.FairleadConnection{})
		c.send(c.segment(ack, ""), forwardHalfOpen, confirmed)
		want("a confirmed one", c, c.entry(), bpf.FairleadJournalWhatJOURNAL_OPENED)
		if !rewrites(method) {
			c.send(c.segment(ack|psh, "hello"), forwardTable)
			want("that it sends", c, c.entry())
			c.answer(ack, "hello")
			c.send(c.segment(ack, ""), forwardTable, matured)
			entry := c.entry()
			entry.State |= young // as it was told before the mark went
			got := c.entry()
			entry.State = got.State
			want("that it matured", c, entry, bpf.FairleadJournalWhatJOURNAL_CHANGED)
		}
		entry := c.entry()
		s.remove(c)
		want("its end", c, entry, bpf.FairleadJournalWhatJOURNAL_CLOSED)
	})
}

// A ring that nobody reads is full one day: that is counted, and forwarding goes on.
func TestJournalFull(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{settings: []setting{constant("use_journal", uint8(1)), capacity("journal", 4096)}})
		s.told()
		room := 4096 / (8 + int(unsafe.Sizeof(bpf.FairleadJournalEvent{})))
		for i := range room + 3 {
			c := s.newClient()
			c.send(c.segment(syn, ""), forwardNew)
			c.answer(syn|ack, "")
			events := []event{confirmed}
			if i >= room {
				events = append(events, bpf.FairleadEventEVENT_JOURNAL_LOST)
			}
			c.send(c.segment(ack, ""), forwardHalfOpen, events...)
		}
		if got := len(s.told()); got != room {
			t.Errorf("%d are told, want %d", got, room)
		}
	})
}
