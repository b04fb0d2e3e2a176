package maps

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// What the Manager does as time goes by: it turns epochs, settles slots, lets go of what has ended, and rebuilds the
// exception bitmap.

// youngTimeout is the idle timeout of young entries, and of those that FINs seem to have ended. They go after twice as long.
const youngTimeout = 150 * time.Second

// condemnedLife is how long a condemned connection's client may take to show itself, and be told. Then it meets what
// anyone meets in mid-connection whom no table knows.
const condemnedLife = 75 * time.Second

// Keep turns epochs and tends the tables until ctx ends. A failure is logged, and tried again an epoch later.
func (m *Manager) Keep(ctx context.Context) error {
	ticker := time.NewTicker(m.epoch)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if err := m.Turn(); err != nil {
			m.log.Error("turn the epoch", "err", err)
		}
	}
}

// Turn ends an epoch: fresh bits are forgotten, and the tables are walked once.
func (m *Manager) Turn() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := Now()
	// Nobody turned epochs for long (a stopped process, a suspended host): fresh bits hid who was talking meanwhile.
	if since(now, m.turned) > 3*Ticks(m.epoch) {
		m.granted = now
	}
	m.turned = now
	idle := (m.set.Control.Epoch() + 1) & 1
	clearWords(&m.set.Bitmaps.set.Fresh[idle])
	m.set.Control.turnEpoch()
	if err := m.wait(); err != nil {
		return err
	}
	if err := m.sweep(); err != nil {
		return err
	}
	return m.tendTables()
}

// wait returns when no CPU runs the data plane with what it read before the call: the kernel lets a map-in-map update
// wait for just that (maybe_wait_bpf_programs).
func (m *Manager) wait() error {
	if err := m.set.raw.Rings.Put(barrierSlot, m.barrier); err != nil {
		return fmt.Errorf("wait for the data plane: %w", err)
	}
	return nil
}

// sweep puts every connection that the ring would now send elsewhere into the exception bitmap, half-open ones first, and
// then settles the slots: for the others, hash alone decides again.
func (m *Manager) sweep() error {
	unsettled := make(map[uint32]*liveRing)
	for id, r := range m.rings {
		if r.unsettled {
			unsettled[id] = r
		}
	}
	if len(unsettled) == 0 {
		return nil
	}
	look := func(t Tuple, service, backend uint32) {
		r := unsettled[service]
		if r == nil {
			return
		}
		hash := t.Hash()
		if r.words[m.slotOf(m.services[service], t, hash)]&slotBackend != backend {
			m.set.Bitmaps.noteException(hash, true)
		}
	}
	if err := m.set.HalfOpen.Walk(func(h *HalfOpenConnection) error {
		look(h.Tuple, h.Service, h.Backend)
		return nil
	}); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	if err := m.set.Connections.Walk(func(c *Connection) error {
		look(c.Tuple, c.Service, c.Backend)
		return nil
	}); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	for _, r := range unsettled {
		var list []uint32
		for slot, w := range r.words {
			if w&slotUnsettled != 0 {
				r.words[slot] = w &^ slotUnsettled
				list = append(list, uint32(slot))
			}
		}
		if err := putWords(r.m, r.words, list); err != nil {
			for _, slot := range list {
				r.words[slot] |= slotUnsettled
			}
			return fmt.Errorf("settle %d slots: %w", len(list), err)
		}
		r.unsettled = false
	}
	return nil
}

func (m *Manager) slotOf(s *Service, t Tuple, hash uint64) uint32 {
	if s.AffinityClient {
		hash = HashClient(t.Source.Addr())
	}
	return SlotOf(hash, s.RingSize)
}

// exceptional tells whether a connection must have its exception bit set (or its slot be unsettled).
func (m *Manager) exceptional(t Tuple, hash uint64, service, backend uint32, state State) bool {
	s, r := m.services[service], m.rings[service]
	if state.marked() || s == nil || r == nil {
		return true
	}
	return r.words[m.slotOf(s, t, hash)]&slotBackend != backend
}

// tendTables walks both tables once. An entry idle for its timeout becomes an exception; it goes after a second timeout
// without a packet; one that is closing goes after two whole epochs of silence; a half-open one when its life is over.
// What has no connection left and is leaving goes too.
func (m *Manager) tendTables() error {
	now := Now()
	// The exception bitmap is rebuilt aside on the way, so that ended exceptions vanish. New ones are noted in both.
	next := m.set.Control.exceptionIndex() ^ 1
	clearWords(&m.set.Bitmaps.set.Exception[next])
	m.set.Control.setExceptionBoth(true)
	defer m.set.Control.setExceptionBoth(false)
	if err := m.wait(); err != nil {
		return err
	}
	conns, pools := make(map[uint32]int), make(map[poolUser]int)
	keys := make(map[serviceKey]int)
	count := func(t Tuple, service, backend, source uint32, port uint16) {
		conns[backend]++
		if s := m.services[service]; s != nil && s.leavingKeys[t.Destination] {
			keys[keyOf(t.Destination, t.Protocol)]++
		}
		if port != 0 {
			pools[poolUser{backend, source}]++
		}
	}
	tending := tending{Manager: m}
	silence := 2*Ticks(m.epoch) + 1
	if err := m.set.HalfOpen.Walk(func(h *HalfOpenConnection) error {
		if since(now, h.First) >= Ticks(HalfOpenLife) {
			return tending.add(h.Tuple, bpf.FairleadTendWhatTEND_REMOVE_HALF_OPEN, h.Generation, 0)
		}
		count(h.Tuple, h.Service, h.Backend, h.Source, h.SourcePort)
		m.set.Bitmaps.setException(h.Tuple.Hash(), next) // until it is confirmed, the tables are asked
		return nil
	}); err != nil {
		return err
	}
	if err := m.set.Connections.Walk(func(c *Connection) error {
		count(c.Tuple, c.Service, c.Backend, c.Source, c.SourcePort)
		if hash := c.Tuple.Hash(); m.exceptional(c.Tuple, hash, c.Service, c.Backend, c.State) {
			m.set.Bitmaps.setException(hash, next)
		}
		timeout := Ticks(youngTimeout)
		if s := m.services[c.Service]; s != nil && (c.State&StateYoung == 0 && !c.State.ended() || Ticks(s.IdleTimeout) < timeout) {
			timeout = Ticks(s.IdleTimeout)
		}
		switch {
		case c.State&StateCondemned != 0 && !c.State.Closing() && c.State&StateClientTold == 0:
			if since(now, later(c.Marked, m.granted)) >= Ticks(condemnedLife) {
				return tending.add(c.Tuple, bpf.FairleadTendWhatTEND_REMOVE, c.Generation, c.Seen)
			}
		case c.State.Closing() || c.State&StateCondemned != 0:
			if since(now, later(c.Seen, c.Marked)) >= silence {
				return tending.add(c.Tuple, bpf.FairleadTendWhatTEND_REMOVE, c.Generation, c.Seen)
			}
		case c.State&StateIdle != 0:
			if since(now, later(c.Marked, m.granted)) >= timeout {
				return tending.add(c.Tuple, bpf.FairleadTendWhatTEND_REMOVE, c.Generation, c.Seen)
			}
		case since(now, later(c.Seen, m.granted)) >= timeout:
			return tending.add(c.Tuple, bpf.FairleadTendWhatTEND_MARK_IDLE, c.Generation, c.Seen)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := tending.flush(); err != nil {
		return err
	}
	m.set.Control.setExceptionIndex(next)
	if err := m.wait(); err != nil {
		return err
	}
	return m.removeLeft(conns, pools, keys)
}

// Condemn ends connections, as they were read: whoever yet sends on them gets RST. It answers how many there were still.
func (m *Manager) Condemn(list []Connection) (int, error) {
	tending := tending{Manager: m}
	for i := range list {
		c := &list[i]
		if err := tending.add(c.Tuple, bpf.FairleadTendWhatTEND_CONDEMN, c.Generation, c.Seen); err != nil {
			return tending.done, err
		}
	}
	err := tending.flush()
	return tending.done, err
}

// LetGo marks entries idle that have not been seen since they were read, or, once they are marked, takes them out. It
// answers how many. An entry that shows itself in between stays.
func (m *Manager) LetGo(list []Connection) (int, error) {
	tending := tending{Manager: m}
	for i := range list {
		c := &list[i]
		what := bpf.FairleadTendWhatTEND_MARK_IDLE
		if c.State&StateIdle != 0 {
			what = bpf.FairleadTendWhatTEND_REMOVE
		}
		if err := tending.add(c.Tuple, what, c.Generation, c.Seen); err != nil {
			return tending.done, err
		}
	}
	err := tending.flush()
	return tending.done, err
}

// tending hands requests to the data plane's program `tend`, which looks at each entry again before it obeys.
type tending struct {
	*Manager
	batch map[uint8][]bpf.FairleadTendRecord
	done  int // records obeyed
}

func (t *tending) add(tuple Tuple, what bpf.FairleadTendWhat, generation, seen uint32) error {
	if t.batch == nil {
		t.batch = make(map[uint8][]bpf.FairleadTendRecord)
	}
	record := bpf.FairleadTendRecord{What: uint32(what), Generation: generation, Seen: seen}
	family := familyOf(tuple.Source.Addr())
	if family == familyIPv4 {
		k := tuple4(tuple)
		record.Tuple.Saddr[0], record.Tuple.Saddr[1] = k.Saddr, k.Daddr
		record.Tuple.Saddr[2] = binary.NativeEndian.Uint32(binary.NativeEndian.AppendUint16(
			binary.NativeEndian.AppendUint16(nil, k.Sport), k.Dport))
		record.Tuple.Saddr[3] = binary.NativeEndian.Uint32([]byte{k.Protocol, 0, 0, 0})
	} else {
		record.Tuple = tuple6(tuple)
	}
	t.batch[family] = append(t.batch[family], record)
	if len(t.batch[family]) == int(bpf.FairleadLimitsTEND_RECORDS) {
		return t.send(family)
	}
	return nil
}

func (t *tending) flush() error {
	for family := range t.batch {
		if err := t.send(family); err != nil {
			return err
		}
	}
	return nil
}

func (t *tending) send(family uint8) error {
	records := t.batch[family]
	if len(records) == 0 {
		return nil
	}
	request := bpf.FairleadTendRequest{Family: uint32(family), Count: uint32(len(records))}
	copy(request.Records[:], records)
	packet, err := binary.Append(nil, binary.NativeEndian, &request)
	if err != nil {
		return err
	}
	answer := make([]byte, len(packet))
	if err := t.run(packet, answer); err != nil {
		return fmt.Errorf("tend %d entries: %w", len(records), err)
	}
	if _, err := binary.Decode(answer, binary.NativeEndian, &request); err != nil {
		return fmt.Errorf("read what became of %d entries: %w", len(records), err)
	}
	for i := range records {
		if request.Records[i].What == uint32(bpf.FairleadTendWhatTEND_DONE) {
			t.done++
		}
	}
	t.batch[family] = records[:0]
	return nil
}

// run has a lock of its own: while the tables are walked, which takes its time, others may have entries tended.
func (t *tending) run(packet, answer []byte) error {
	t.tendLock.Lock()
	defer t.tendLock.Unlock()
	_, err := t.tend.Run(&ebpf.RunOptions{Data: packet, DataOut: answer})
	return err
}
