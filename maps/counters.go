package maps

import (
	"fmt"

	"fairlead/bpf"
)

// Counters reads what the data plane counts.
type Counters struct{ raw *bpf.FairleadMaps }

// Traffic is what went through a service or to a backend since its number was given to it.
type Traffic struct {
	Packets      uint64 `json:"packets"` // from clients
	Bytes        uint64 `json:"bytes"`
	Connections  uint64 `json:"new_connections"`
	Refused      uint64 `json:"refused"`
	ReplyPackets uint64 `json:"reply_packets"` // from backends, where replies pass
	ReplyBytes   uint64 `json:"reply_bytes"`
	Answered     uint64 `json:"answered"` // where replies pass: SYNs that the backend answered SYN-ACK,
	Rejected     uint64 `json:"rejected"` // or RST
}

// Totals are counts by name, in the order of the names of package bpf.
type Totals struct {
	Verdicts, Events []uint64
}

// Totals sums the verdicts and events of all CPUs.
func (c Counters) Totals() (Totals, error) {
	var perCPU []bpf.FairleadCounterSet
	if err := c.raw.Counters.Lookup(uint32(0), &perCPU); err != nil {
		return Totals{}, fmt.Errorf("read the counters: %w", err)
	}
	sum := Totals{
		Verdicts: make([]uint64, len(perCPU[0].Verdicts)),
		Events:   make([]uint64, len(perCPU[0].Events)),
	}
	for i := range perCPU {
		for j, n := range perCPU[i].Verdicts {
			sum.Verdicts[j] += n
		}
		for j, n := range perCPU[i].Events {
			sum.Events[j] += n
		}
	}
	return sum, nil
}

func trafficOf(perCPU []bpf.FairleadTraffic) (sum Traffic) {
	for i := range perCPU {
		t := &perCPU[i]
		sum.Packets += t.Packets
		sum.Bytes += t.Bytes
		sum.Connections += t.Connections
		sum.Refused += t.Refused
		sum.ReplyPackets += t.ReplyPackets
		sum.ReplyBytes += t.ReplyBytes
		sum.Answered += t.Answered
		sum.Rejected += t.Rejected
	}
	return sum
}

// Service is the traffic of a service by its number.
func (c Counters) Service(id uint32) (Traffic, error) {
	var perCPU []bpf.FairleadTraffic
	if err := c.raw.ServiceTraffic.Lookup(id, &perCPU); err != nil {
		return Traffic{}, fmt.Errorf("read the traffic of service %d: %w", id, err)
	}
	return trafficOf(perCPU), nil
}

// Backend is the traffic of a backend by its number.
func (c Counters) Backend(id uint32) (Traffic, error) {
	var perCPU []bpf.FairleadTraffic
	if err := c.raw.BackendTraffic.Lookup(id, &perCPU); err != nil {
		return Traffic{}, fmt.Errorf("read the traffic of backend %d: %w", id, err)
	}
	return trafficOf(perCPU), nil
}

// Verdict is what the data plane decided for a packet, numbered as there.
type Verdict uint32

// The verdicts that an operator has to hear of.
const (
	VerdictResetNoPort    = Verdict(bpf.FairleadVerdictRESET_NO_PORT)
	VerdictResetTableFull = Verdict(bpf.FairleadVerdictRESET_TABLE_FULL)
	VerdictResetNoBackend = Verdict(bpf.FairleadVerdictRESET_NO_BACKEND)
	VerdictDropNoNeighbor = Verdict(bpf.FairleadVerdictDROP_NO_NEIGHBOR)
	VerdictDropTooBig     = Verdict(bpf.FairleadVerdictDROP_TOO_BIG)
	VerdictDropNoHeadroom = Verdict(bpf.FairleadVerdictDROP_NO_HEADROOM)
)

// String is the verdict's name.
func (v Verdict) String() string { return bpf.VerdictNames()[v] }

// Event is what happened beside a verdict, numbered as in the data plane.
type Event uint32

// The events that an operator has to hear of.
const (
	EventTableFull    = Event(bpf.FairleadEventEVENT_TABLE_FULL)
	EventInsertFailed = Event(bpf.FairleadEventEVENT_INSERT_FAILED)
	EventPortStolen   = Event(bpf.FairleadEventEVENT_PORT_STOLEN)
	EventJournalLost  = Event(bpf.FairleadEventEVENT_JOURNAL_LOST)
)

// String is the event's name.
func (e Event) String() string { return bpf.EventNames()[e] }
