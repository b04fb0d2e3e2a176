package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

const protocolUDP = 17

// Rule is what decides where a connection's packets go.
type Rule string

// The rules, in the order in which a packet in mid-connection meets them.
const (
	RuleTable     Rule = "table"          // an entry of the connection table
	RuleHalfOpen  Rule = "half-open"      // an entry of the half-open table
	RuleSettled   Rule = "settled slot"   // no entry: the ring decides, hash alone
	RuleUnsettled Rule = "unsettled slot" // no entry: the ring decides, its slot has just changed hands
	RulePolicy    Rule = "policy"         // no backend, or none that forwards it: the service's policy decides
)

// Explanation is where a connection goes, and why.
type Explanation struct {
	Tuple   Tuple
	Service Service
	// Backend is where its next packet goes; for one that no table has, where a new connection goes. Zero: nowhere.
	Backend Backend
	// InMidConnection is where a packet in mid-connection that no table has goes; zero: it is answered RST.
	InMidConnection Backend
	Rule            Rule
	Slot            uint32
	SlotNow         Slot   // what the ring holds there
	Hash            uint64 // of the tuple
	Exception       bool   // its exception bit is set: the tables are asked
	Fresh           bool   // its fresh bit is set: seen in the table, agreeing with the ring, in this epoch
	FastPath        bool   // its next plain packet is forwarded by the ring alone
	Entry           *Connection
	HalfOpen        *HalfOpenConnection
}

// Explain computes where a client's connection to a service goes, by Go's own hash and the maps' ring and tables.
func (s *Set) Explain(inv *Inventory, client netip.AddrPort, service Service) (Explanation, error) {
	t := Tuple{Source: client, Destination: service.AddrPort(), Protocol: service.Protocol}
	if client.Addr().Is4() != service.Address().Is4() {
		return Explanation{}, fmt.Errorf("explain %v to service %s: the service's address is %v: the client's must be of its family",
			client, service.Name, service.Address())
	}
	e := Explanation{Tuple: t, Service: service, Hash: t.Hash()}
	hash := e.Hash
	if service.AffinityClient {
		hash = HashClient(client.Addr())
	}
	e.Slot = SlotOf(hash, service.RingSize)
	var err error
	if e.SlotNow, err = s.Slot(service.ID, e.Slot); err != nil {
		return e, err
	}
	e.Exception, e.Fresh = s.Bitmaps.Exception(e.Hash), s.Bitmaps.Fresh(e.Hash)

	conn, found, err := s.Connections.Get(t)
	if err != nil {
		return e, err
	}
	half, opening, err := s.HalfOpen.Get(t)
	if err != nil {
		return e, err
	}
	if opening && !half.Stateless {
		// Its port may have been taken from it: then the data plane does not know it either.
		if opening, err = s.paired(inv, &half); err != nil {
			return e, err
		}
	}
	switch {
	case found:
		e.Entry, e.Rule = &conn, RuleTable
		e.Backend, _ = inv.Backend(conn.Backend)
	case opening:
		e.HalfOpen, e.Rule = &half, RuleHalfOpen
		e.Backend, _ = inv.Backend(half.Backend)
	default:
		e.Rule = RuleSettled
		if !e.SlotNow.Settled {
			e.Rule = RuleUnsettled
		}
		if b, ok := inv.Backend(e.SlotNow.Backend); ok && b.Method.Stateless() &&
			(b.Up || service.OnBackendDown != DownReset) {
			e.InMidConnection = b
		}
		if e.Backend, err = s.forNew(inv, &e); err != nil {
			return e, err
		}
		if t.Protocol == protocolUDP { // has no middle: what nobody knows is new
			e.InMidConnection = e.Backend
		}
	}
	if e.Backend.Name == "" || !e.serves() || found && conn.State&StateCondemned != 0 {
		e.Rule = RulePolicy
	}
	e.FastPath = service.RingFirst && e.SlotNow.Settled && !e.Exception && e.Fresh && e.Backend.Up && e.Backend.Method.Stateless()
	return e, nil
}

// serves tells whether the backend may have the connection's packets, as the data plane's function of that name does.
func (e *Explanation) serves() bool {
	opened := Now()
	switch {
	case e.Entry != nil:
		opened = e.Entry.Opened
	case e.HalfOpen != nil:
		opened = e.HalfOpen.First
	}
	return e.Backend.Serves(opened)
}

// newTries is how many slots the data plane tries for a new connection: NEW_TRIES of choose.h.
const newTries = 4

// forNew chooses as the data plane's `opening` does: the connection's own slot, then others by the hash that chose it, hashed on.
func (s *Set) forNew(inv *Inventory, e *Explanation) (Backend, error) {
	if e.Service.Leaving {
		return Backend{}, nil
	}
	slot, hash := e.SlotNow, e.Hash
	if e.Service.AffinityClient {
		hash = HashClient(e.Tuple.Source.Addr())
	}
	for i := range uint64(newTries) {
		if i > 0 {
			hash = finish(hash + i)
			var err error
			if slot, err = s.Slot(e.Service.ID, SlotOf(hash, e.Service.RingSize)); err != nil {
				return Backend{}, err
			}
		}
		if b, ok := inv.Backend(slot.Backend); ok && (b.Up || b.Tried) && b.NextHop.Known && !b.Leaving {
			return b, nil
		}
	}
	return Backend{}, nil
}

// paired tells whether the way back of a half-open connection is its own.
func (s *Set) paired(inv *Inventory, h *HalfOpenConnection) (bool, error) {
	b, known := inv.Backend(h.Backend)
	if !known {
		return false, nil
	}
	t := Tuple{Source: netip.AddrPortFrom(b.Address, b.Port), Destination: h.Tuple.Source, Protocol: h.Tuple.Protocol}
	if b.Method == MethodFullNAT {
		i := slices.IndexFunc(inv.Sources, func(s Source) bool { return s.ID == h.Source })
		if i < 0 {
			return false, nil
		}
		t.Destination = netip.AddrPortFrom(inv.Sources[i].Address, h.SourcePort)
	}
	var err error
	var back bpf.FairleadWayBack
	if b.Address.Is4() {
		var v bpf.FairleadReply4
		key := tuple4(t)
		err = s.raw.HalfReplies4.Lookup(&key, &v)
		back = v.Back
	} else {
		var v bpf.FairleadReply6
		key := tuple6(t)
		err = s.raw.HalfReplies6.Lookup(&key, &v)
		back = v.Back
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up the way back of %v: %w", h.Tuple, err)
	}
	return back.Generation == h.Generation, nil
}
