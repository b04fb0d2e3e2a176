package maps

import (
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"

	"fairlead/bpf"
)

// EventKind is what became of an entry of the connection table.
type EventKind uint32

// The kinds.
const (
	ConnectionOpened  = EventKind(bpf.FairleadJournalWhatJOURNAL_OPENED)
	ConnectionChanged = EventKind(bpf.FairleadJournalWhatJOURNAL_CHANGED) // it has matured
	ConnectionClosed  = EventKind(bpf.FairleadJournalWhatJOURNAL_CLOSED)  // tuple and generation alone are told
)

// ConnectionEvent is something that became of an entry of the connection table.
type ConnectionEvent struct {
	Kind       EventKind
	Connection Connection
}

// Events reads what the data plane tells of its connection table. There is one reader at a time.
type Events struct {
	reader *ringbuf.Reader
	record ringbuf.Record
}

// Events opens the ring of events for reading.
func (s *Set) Events() (*Events, error) {
	reader, err := ringbuf.NewReader(s.raw.Journal)
	if err != nil {
		return nil, fmt.Errorf("read the events of connections: %w", err)
	}
	return &Events{reader: reader}, nil
}

// Close ends reading. What was not read stays in the ring.
func (e *Events) Close() error { return e.reader.Close() }

// Drain visits what is in the ring, so many events at most, and returns when there is no more for now. The event is valid
// within the visit alone.
func (e *Events) Drain(most int, visit func(*ConnectionEvent)) (n int, err error) {
	e.reader.SetDeadline(time.Unix(1, 0)) // no waiting
	for n < most {
		if err := e.reader.ReadInto(&e.record); errors.Is(err, os.ErrDeadlineExceeded) {
			return n, nil
		} else if err != nil {
			return n, fmt.Errorf("read the events of connections: %w", err)
		}
		event, err := decodeEvent(e.record.RawSample)
		if err != nil {
			return n, err
		}
		visit(&event)
		n++
	}
	return n, nil
}

func decodeEvent(b []byte) (ConnectionEvent, error) {
	var raw bpf.FairleadJournalEvent
	if len(b) < int(unsafe.Sizeof(raw)) {
		return ConnectionEvent{}, fmt.Errorf("an event of %d bytes, where %d were expected", len(b), unsafe.Sizeof(raw))
	}
	raw = *(*bpf.FairleadJournalEvent)(unsafe.Pointer(unsafe.SliceData(b)))
	var tuple Tuple
	if uint8(raw.Family) == familyIPv4 {
		tuple = fromTuple4((*bpf.FairleadTuple4)(unsafe.Pointer(&raw.Tuple)))
	} else {
		tuple = fromTuple6(&raw.Tuple)
	}
	return ConnectionEvent{Kind: EventKind(raw.What), Connection: connection(tuple, &raw.Connection)}, nil
}
