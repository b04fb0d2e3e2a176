package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/urfave/cli/v2"

	"fairlead/maps"
)

func explainCommand() *cli.Command {
	return &cli.Command{
		Name:      "explain",
		Usage:     "say which backend a connection goes to, and by which rule",
		ArgsUsage: "CLIENT:PORT SERVICE",
		Description: "Computed from the maps as they are now: for a connection that exists, and for one that would begin.\n" +
			"SERVICE is a name or address:port. Also as one word: 'CLIENT:PORT->SERVICE'.",
		Flags:  []cli.Flag{outputFlag(), pinPathFlag()},
		Action: explain,
	}
}

// explanation is what explain prints.
type explanation struct {
	Client         netip.AddrPort  `json:"client"`
	Service        string          `json:"service"`
	ServiceAddress netip.AddrPort  `json:"service_address"`
	Protocol       string          `json:"protocol"`
	Backend        *string         `json:"backend"` // null: none
	BackendAddress *netip.AddrPort `json:"backend_address"`
	Method         string          `json:"method"`
	Rule           maps.Rule       `json:"rule"`
	Affinity       string          `json:"affinity"`
	Hash           string          `json:"hash"` // of the 4-tuple
	SlotHash       string          `json:"slot_hash"`
	Slot           uint32          `json:"slot"`
	RingSize       uint32          `json:"ring_size"`
	SlotBackend    string          `json:"slot_backend"`
	Settled        bool            `json:"settled"`
	Exception      bool            `json:"exception"`
	Fresh          bool            `json:"fresh"`
	FastPath       bool            `json:"fast_path"`
	Connection     *connectionItem `json:"connection"` // null: in no table
	Reasons        []string        `json:"reasons"`
}

func explain(c *cli.Context) (err error) {
	args, err := words(c, 1, 2)
	if err != nil {
		return err
	}
	client, word, err := parseTuple(args)
	if err != nil {
		return err
	}
	if word == "" {
		return wrongUsage("explain: to which SERVICE?")
	}
	v, err := openView(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	service, err := v.oneService(word)
	if err != nil {
		return err
	}
	found, err := v.set.Explain(v.inv, client, service)
	if err != nil {
		return err
	}
	e, err := v.explanation(&found)
	if err != nil {
		return err
	}
	if isJSON(c) {
		return object(c, e)
	}
	return e.print(c.App.Writer)
}

func (v *view) explanation(x *maps.Explanation) (*explanation, error) {
	e := &explanation{
		Client: x.Tuple.Source, Service: serviceName(x.Service), ServiceAddress: x.Tuple.Destination, Protocol: maps.ProtocolName(x.Tuple.Protocol),
		Rule: x.Rule, Affinity: "connection", Hash: fmt.Sprintf("%#016x", x.Hash), Slot: x.Slot,
		RingSize: x.Service.RingSize, SlotBackend: v.backendName(x.SlotNow.Backend), Settled: x.SlotNow.Settled,
		Exception: x.Exception, Fresh: x.Fresh, FastPath: x.FastPath,
	}
	e.SlotHash = e.Hash
	if x.Service.AffinityClient {
		e.Affinity, e.SlotHash = "client", fmt.Sprintf("%#016x", maps.HashClient(x.Tuple.Source.Addr()))
	}
	if x.Backend.Name != "" {
		address := backendAddress(&x.Backend)
		e.Backend, e.BackendAddress, e.Method = &x.Backend.Name, &address, x.Backend.Method.String()
	}
	var in *entry
	if x.Entry != nil {
		found := entryOf(x.Entry)
		in = &found
	} else if x.HalfOpen != nil {
		found := halfOpenEntry(x.HalfOpen)
		in = &found
	}
	if in != nil {
		item, err := v.item(in, maps.Now(), true)
		if err != nil {
			return nil, err
		}
		e.Connection = &item
	}
	e.reason(x)
	return e, nil
}

func (e *explanation) say(format string, args ...any) {
	e.Reasons = append(e.Reasons, fmt.Sprintf(format, args...))
}

// reason puts the rule and what follows from it into sentences. They say what the data plane does (bpf/choose.h).
func (e *explanation) reason(x *maps.Explanation) {
	inTable := e.Connection != nil
	switch {
	case x.Entry != nil:
		e.say("The connection table has it: %s, %s old, last seen %s ago%s.", e.Connection.State, span(e.Connection.age),
			span(e.Connection.idle), from(e.Connection))
	case x.HalfOpen != nil:
		e.say("The half-open table has it, since %s%s: it is not confirmed yet.", span(e.Connection.age), from(e.Connection))
	default:
		e.say("No table has it, so the ring decides.")
	}
	slot := e.SlotBackend
	if x.SlotNow.Backend == maps.NoBackend {
		slot = "no backend"
	}
	if inTable && e.SlotBackend != e.Connection.Backend {
		e.say("The ring would send a new connection from there to %s: this one is an exception, and stays.", slot)
	} else if inTable {
		e.say("The ring names the same backend.")
	}
	if !e.Settled {
		e.say("Its slot has just changed hands and is not swept yet: until then the tables are asked for all of it.")
	}
	b := &x.Backend
	switch {
	case x.SlotNow.Backend == maps.NoBackend && !inTable:
		e.say("The service has no backend that takes new connections: whatever comes is answered RST.")
		return
	case x.Entry != nil && x.Entry.State&maps.StateCondemned != 0:
		e.say("It was closed by command, or its client was told that its backend is down: whoever sends on it is answered RST.")
	case x.Rule == maps.RulePolicy && inTable && b.Tried:
		e.say("Its backend was down after it began. New connections are tried on it, as all are down; this one is dealt with "+
			"by on_backend_down: %s.", x.Service.OnBackendDown)
	case x.Rule == maps.RulePolicy && inTable:
		e.say("Its backend is down: by on_backend_down: %s, %s.", x.Service.OnBackendDown, map[maps.DownPolicy]string{
			maps.DownReset:  "packets in mid-connection are answered RST",
			maps.DownKeep:   "it keeps its backend",
			maps.DownRehash: "it goes where the ring says, if its method can do without state there, and is answered RST otherwise",
		}[x.Service.OnBackendDown])
	case b.Leaving && inTable:
		e.say("The backend is leaving: it takes no new connections and stays for those it has.")
	}
	if !inTable {
		e.reasonUnknown(x)
		if b.Name != "" && !b.Up && b.Tried {
			e.say("All backends of the service are down by their checks: new connections are tried on them all the same.")
		}
	}
	if standing := x.Service.Standing; standing&maps.StandingPanic != 0 {
		e.say("Too few backends of the service are up: their checks' verdict is off.")
	}
	if b.Name != "" && !b.NextHop.Known {
		e.say("The backend has no next hop (%s): packets to it are dropped until it has one.",
			cmp.Or(b.NextHop.Reason, "not resolved yet"))
	}
}

func (e *explanation) reasonUnknown(x *maps.Explanation) {
	switch {
	case x.Service.Leaving:
		e.say("The service is leaving: a new connection is answered RST.")
	case x.Backend.Name == "":
		e.say("No backend in reach: its slot's has no next hop, nor have those of the three more slots that a new " +
			"connection tries. Its SYN is dropped.")
	case x.Backend.ID != x.SlotNow.Backend:
		e.say("Its slot's backend takes no new connections just now: a new one tries other slots, and goes to %s.", x.Backend.Name)
	default:
		e.say("A new connection goes to %s.", x.Backend.Name)
	}
	if name := x.InMidConnection.Name; name != "" && !x.InMidConnection.NextHop.Known {
		e.say("A packet in mid-connection is dropped: %s has no next hop (%s).", name,
			cmp.Or(x.InMidConnection.NextHop.Reason, "not resolved yet"))
	} else if name != "" {
		e.say("A packet in mid-connection goes to %s, and is noted in the connection table.", name)
	} else if x.Backend.Name != "" {
		e.say("A packet in mid-connection is answered RST: %s can't forward it without an entry.", x.Backend.Method)
	}
}

func from(i *connectionItem) string {
	if i.Source == nil {
		return ""
	}
	return fmt.Sprintf(", seen by its backend as %v", *i.Source)
}

func (e *explanation) fastPath() string {
	switch {
	case e.FastPath:
		return "yes: its next plain packet is forwarded by the ring alone"
	case e.Backend == nil:
		return "no: there is no backend"
	case e.Method == maps.MethodFullNAT.String() || e.Method == maps.MethodNAT.String():
		return "no: " + e.Method + " needs its entry"
	case !e.Settled:
		return "no: its slot is unsettled"
	case e.Exception:
		return "no: its exception bit is set"
	case !e.Fresh:
		return "no: not seen in this epoch yet"
	}
	return "no"
}

func (e *explanation) print(w io.Writer) error {
	to := "goes to no backend"
	if e.Backend != nil {
		to = fmt.Sprintf("goes to %s (%v, by %s)", *e.Backend, *e.BackendAddress, e.Method)
	}
	if _, err := fmt.Fprintf(w, "%v to %s (%v) %s, by rule: %s.\n%s\n\n", e.Client, e.Service, e.ServiceAddress, to, e.Rule,
		strings.Join(e.Reasons, "\n")); err != nil {
		return err
	}
	hash, slot := e.Hash+", of the 4-tuple", fmt.Sprintf("%d of %d: %s, settled", e.Slot, e.RingSize, e.SlotBackend)
	if e.Affinity == "client" {
		hash = fmt.Sprintf("%s of the 4-tuple; %s of the client's address chooses the slot", e.Hash, e.SlotHash)
	}
	if !e.Settled {
		slot = strings.TrimSuffix(slot, "settled") + "unsettled"
	}
	bit := map[bool]string{true: "set", false: "clear"}
	exception := bit[e.Exception]
	if e.Exception && e.Connection != nil && e.Settled && e.SlotBackend == e.Connection.Backend {
		exception += " (by its own mark, or shared with another connection: costs a look-up)"
	}
	t := table{out: w, indent: "  ", headed: true, columns: make([]tableColumn, 2), rows: [][]string{
		{"hash", hash}, {"slot", slot}, {"exception bit", exception}, {"fresh bit", bit[e.Fresh]}, {"fast path", e.fastPath()},
	}}
	return t.flush()
}
