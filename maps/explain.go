package maps

import (
	"fmt"
	"net/netip"
)

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
	Tuple     Tuple
	Service   Service
	Backend   Backend // zero: none
	Rule      Rule
	Slot      uint32
	SlotNow   Slot   // what the ring holds there
	Hash      uint64 // of the tuple
	Exception bool   // its exception bit is set: the tables are asked
	Fresh     bool   // its fresh bit is set: seen in the table, agreeing with the ring, in this epoch
	FastPath  bool   // its next plain packet is forwarded by the ring alone
	Entry     *Connection
	HalfOpen  *HalfOpenConnection
}

// Explain computes where a client's connection to a service goes, by Go's own hash and the maps' ring and tables.
func (s *Set) Explain(inv *Inventory, client netip.AddrPort, service Service) (Explanation, error) {
	t := Tuple{Source: client, Destination: service.AddrPort(), Protocol: service.Protocol}
	if client.Addr().Is4() != service.Address.Is4() {
		return Explanation{}, fmt.Errorf("explain %v to service %s: the service's address is %v: the client's must be of its family",
			client, service.Name, service.Address)
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
	var id uint32
	switch {
	case found:
		e.Entry, e.Rule, id = &conn, RuleTable, conn.Backend
	case opening:
		e.HalfOpen, e.Rule, id = &half, RuleHalfOpen, half.Backend
	default:
		e.Rule, id = RuleSettled, e.SlotNow.Backend
		if !e.SlotNow.Settled {
			e.Rule = RuleUnsettled
		}
	}
	b, known := inv.Backend(id)
	if !known {
		e.Rule = RulePolicy
		return e, nil
	}
	e.Backend = b
	if !b.Up {
		e.Rule = RulePolicy
	}
	e.FastPath = service.RingFirst && e.SlotNow.Settled && !e.Exception && e.Fresh && b.Method.Stateless()
	return e, nil
}
