package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// State is what is known of a connection beside its backend: bits of bpf's connection_state.
type State uint32

// The bits of a State.
const (
	StateYoung      = State(bpf.FairleadConnectionStateSTATE_YOUNG)
	StateIdle       = State(bpf.FairleadConnectionStateSTATE_IDLE)
	StateClientFIN  = State(bpf.FairleadConnectionStateSTATE_CLIENT_FIN)
	StateBackendFIN = State(bpf.FairleadConnectionStateSTATE_BACKEND_FIN)
	StateClientRST  = State(bpf.FairleadConnectionStateSTATE_CLIENT_RESET)
	StateBackendRST = State(bpf.FairleadConnectionStateSTATE_BACKEND_RESET)
	StateStateless  = State(bpf.FairleadConnectionStateSTATE_STATELESS)
	// A condemned connection was closed by command, or its backend is down and its client told so: whoever sends on it
	// gets RST. The other two say who has got one.
	StateCondemned   = State(bpf.FairleadConnectionStateSTATE_CONDEMNED)
	StateBackendTold = State(bpf.FairleadConnectionStateSTATE_BACKEND_TOLD)
	StateClientTold  = State(bpf.FairleadConnectionStateSTATE_CLIENT_TOLD)

	stateClientFINKnown  = State(bpf.FairleadConnectionStateSTATE_CLIENT_FIN_KNOWN)
	stateBackendFINKnown = State(bpf.FairleadConnectionStateSTATE_BACKEND_FIN_KNOWN)
)

// Closing tells whether the connection's end has been seen: RST from either end, FIN from both, or from the client alone
// where replies are not seen.
func (s State) Closing() bool {
	switch {
	case s&(StateClientRST|StateBackendRST) != 0:
		return true
	case s&StateStateless != 0:
		return s&StateClientFIN != 0
	}
	return s&StateClientFIN != 0 && s&StateBackendFIN != 0
}

// ended tells whether FINs have been seen that would close the connection. A retransmission takes the closing back, as it
// may be the sign that the FIN was a stranger's; but nothing may follow it.
func (s State) ended() bool {
	return s&stateClientFINKnown != 0 && s&(stateBackendFINKnown|StateStateless) != 0
}

// marked tells whether the entry is an exception for its own sake.
func (s State) marked() bool {
	return s.Closing() || s&(StateIdle|StateYoung|StateCondemned|stateClientFINKnown|stateBackendFINKnown) != 0
}

// String is the one word for a state: half-open is the other table's.
func (s State) String() string {
	switch {
	case s&StateCondemned != 0:
		return "condemned"
	case s.Closing():
		return "closing"
	case s&(StateClientFIN|StateBackendFIN) != 0:
		return "half-closed"
	case s&StateIdle != 0:
		return "idle"
	case s&StateYoung != 0:
		return "young"
	}
	return "established"
}

// Connection is an entry of the connection table.
type Connection struct {
	Tuple      Tuple
	Service    uint32 // number of the service
	Backend    uint32 // number of the backend
	Generation uint32
	State      State
	Opened     uint32 // tick of the first SYN, or of its adoption
	Seen       uint32 // tick of the last packet; behind the truth by up to an epoch or two on the fast path
	Marked     uint32 // tick since when it is idle or closing
	Source     uint32 // fullnat: number of the source address
	SourcePort uint16 // fullnat: source port; else 0
	// SequenceEnd and Acknowledgement are of the client's last packet looked at.
	SequenceEnd, Acknowledgement uint32
	// Timestamp and TimestampEcho are of that packet's timestamp option (RFC 7323); both 0: it has none.
	Timestamp, TimestampEcho uint32
	Hop                      Hop // where the client's packets come from
}

// Hop is where a frame goes next.
type Hop struct {
	MAC, SourceMAC [6]byte
	Interface      uint32    // index of the device
	VLAN           [2]uint16 // tags as bpf's struct hop has them, outermost first; 0: none
}

// HalfOpenConnection is an entry of the half-open table.
type HalfOpenConnection struct {
	Tuple      Tuple
	Service    uint32
	Backend    uint32
	Generation uint32
	First      uint32 // tick of the first SYN
	Answered   bool   // the backend's SYN-ACK was seen
	Stateless  bool   // its method sees no replies
	Source     uint32
	SourcePort uint16
}

// Connections reads the connection table. Nothing outside this file knows what it is made of.
type Connections struct{ v4, v6 *ebpf.Map }

func connection(t Tuple, v *bpf.FairleadConnection) Connection {
	return Connection{
		Tuple: t, Service: v.Service, Backend: v.Backend, Generation: v.Generation, State: State(v.State),
		Opened: v.Opened, Seen: v.Seen, Marked: v.Marked, Source: uint32(v.Source), SourcePort: portWire(v.SourcePort),
		SequenceEnd: v.SequenceEnd, Acknowledgement: v.Acknowledgement,
		Timestamp: v.Timestamp, TimestampEcho: v.TimestampEcho,
		Hop: Hop{MAC: v.Hop.Mac, SourceMAC: v.Hop.SourceMac, Interface: v.Hop.Ifindex, VLAN: v.Hop.Vlan},
	}
}

// Walk calls visit for each entry until it answers an error, which Walk returns. An entry that is there from beginning to
// end is visited; one that comes or goes meanwhile may be.
func (c Connections) Walk(visit func(*Connection) error) error {
	if err := walkTable(c.v4, func(k *bpf.FairleadTuple4, v *bpf.FairleadConnection) error {
		conn := connection(fromTuple4(k), v)
		return visit(&conn)
	}); err != nil {
		return err
	}
	return walkTable(c.v6, func(k *bpf.FairleadTuple6, v *bpf.FairleadConnection) error {
		conn := connection(fromTuple6(k), v)
		return visit(&conn)
	})
}

// Get is one connection; false: it is not in the table.
func (c Connections) Get(t Tuple) (Connection, bool, error) {
	var v bpf.FairleadConnection
	ok, err := lookupTuple(c.v4, c.v6, t, &v)
	if err != nil {
		return Connection{}, false, fmt.Errorf("look up %v in the connection table: %w", t, err)
	}
	return connection(t, &v), ok, nil
}

// HalfOpen reads the half-open table.
type HalfOpen struct{ v4, v6 *ebpf.Map }

func halfOpen(t Tuple, v *bpf.FairleadHalfOpen) HalfOpenConnection {
	return HalfOpenConnection{
		Tuple: t, Service: v.Service, Backend: v.Backend, Generation: v.Generation, First: v.First,
		Answered:  v.State&uint32(bpf.FairleadHalfStateHALF_SYN_ACK) != 0,
		Stateless: v.State&uint32(bpf.FairleadHalfStateHALF_STATELESS) != 0,
		Source:    uint32(v.Source), SourcePort: portWire(v.SourcePort),
	}
}

// Walk is as Connections.Walk. It does not count as use: who is evicted next stays as it was.
func (h HalfOpen) Walk(visit func(*HalfOpenConnection) error) error {
	if err := walkTable(h.v4, func(k *bpf.FairleadTuple4, v *bpf.FairleadHalfOpen) error {
		half := halfOpen(fromTuple4(k), v)
		return visit(&half)
	}); err != nil {
		return err
	}
	return walkTable(h.v6, func(k *bpf.FairleadTuple6, v *bpf.FairleadHalfOpen) error {
		half := halfOpen(fromTuple6(k), v)
		return visit(&half)
	})
}

// Get is one half-open connection; false: it is not in the table, or its life of HalfOpenLife is over.
func (h HalfOpen) Get(t Tuple) (HalfOpenConnection, bool, error) {
	var v bpf.FairleadHalfOpen
	ok, err := lookupTuple(h.v4, h.v6, t, &v)
	if err != nil {
		return HalfOpenConnection{}, false, fmt.Errorf("look up %v in the half-open table: %w", t, err)
	}
	half := halfOpen(t, &v)
	return half, ok && Age(Now(), half.First) < HalfOpenLife, nil
}

func lookupTuple(v4, v6 *ebpf.Map, t Tuple, value any) (bool, error) {
	var err error
	if t.Source.Addr().Is4() {
		key := tuple4(t)
		err = v4.Lookup(&key, value)
	} else {
		key := tuple6(t)
		err = v6.Lookup(&key, value)
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	return err == nil, err
}

// walkBatch is how many entries one system call brings. A bucket of more than that many is met by a larger batch.
const walkBatch = 4096

func walkTable[K, V any](m *ebpf.Map, visit func(*K, *V) error) error {
	for size := walkBatch; ; size *= 2 {
		again, err := walkTableBy(m, size, visit)
		if !again {
			return err
		}
	}
}

func walkTableBy[K, V any](m *ebpf.Map, size int, visit func(*K, *V) error) (again bool, err error) {
	var cursor ebpf.MapBatchCursor
	keys, values := make([]K, size), make([]V, size)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		last := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			if errors.Is(err, unix.ENOSPC) {
				return true, nil
			}
			return false, fmt.Errorf("read %s: %w", m, err)
		}
		for i := range n {
			if err := visit(&keys[i], &values[i]); err != nil {
				return false, err
			}
		}
		if last {
			return false, nil
		}
	}
}
