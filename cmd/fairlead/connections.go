package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"fairlead/maps"
)

const stateHalfOpen = "half-open"

var states = []string{"young", "established", "half-closed", "closing", "idle", "condemned", stateHalfOpen}

func connectionsCommand() *cli.Command {
	filters := func() []cli.Flag {
		return []cli.Flag{
			&cli.StringSliceFlag{Name: "service", Usage: "of `SERVICE`: its name or address:port"},
			&cli.StringSliceFlag{Name: "backend", Usage: "on `BACKEND`: its name, or service/backend"},
			&cli.StringSliceFlag{Name: "client", Usage: "from `CLIENT`: address, prefix/length, or address:port"},
			&cli.StringSliceFlag{Name: "state", Usage: "in `STATE`: " + strings.Join(states, ", ")},
			&cli.DurationFlag{Name: "idle", Usage: "without a packet for `DURATION` or longer"},
			&cli.StringFlag{Name: "plane", Usage: "carried by `PLANE`: xdp"},
			outputFlag(), pinPathFlag(),
		}
	}
	const seen = "\n\nOn the fast path only one packet an epoch is looked at: idle times may be two epochs (20 s) too\nlong."
	return &cli.Command{
		Name:    "connections",
		Aliases: []string{"flows"},
		Usage:   "list, count, look up and close connections",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "list connections", Flags: filters(),
				Description: "A filter may be given several times, or several values with commas between: any of them, of\n" +
					"every filter." + seen,
				Action: func(c *cli.Context) error {
					if _, err := words(c, 0, 0); err != nil {
						return err
					}
					return withConnections(c, listConnections)
				},
			},
			{
				Name: "count", Usage: "count connections", Flags: filters(),
				Description: "Prints how many lines `connections list` would have; with -o wide by service, backend and state." + seen,
				Action: func(c *cli.Context) error {
					if _, err := words(c, 0, 0); err != nil {
						return err
					}
					return withConnections(c, countConnections)
				},
			},
			{
				Name: "get", Usage: "show all that is known of a connection", ArgsUsage: "CLIENT:PORT [SERVICE]",
				Description: "Without SERVICE, of all services. Also as one word: 'CLIENT:PORT->SERVICE'." + seen,
				Flags:       []cli.Flag{outputFlag(), pinPathFlag()},
				Action:      getConnections,
			},
			closeCommand(),
		},
	}
}

// connectionItem is a connection as it is printed. Half-open ones have no idle time and no numbers of the client's.
type connectionItem struct {
	Client          netip.AddrPort  `json:"client"`
	Service         string          `json:"service"`
	ServiceAddress  netip.AddrPort  `json:"service_address"`
	Protocol        string          `json:"protocol"`
	Backend         string          `json:"backend"`
	BackendAddress  *netip.AddrPort `json:"backend_address"`
	Method          string          `json:"method"`
	Plane           string          `json:"plane"`
	State           string          `json:"state"`
	Age             float64         `json:"age_seconds"`
	Idle            *float64        `json:"idle_seconds"`
	Source          *netip.AddrPort `json:"source"` // fullnat: what the backend sees as its client
	Slot            uint32          `json:"slot"`
	SlotBackend     string          `json:"slot_backend"`
	Settled         bool            `json:"settled"`
	Exception       bool            `json:"exception"`
	Fresh           bool            `json:"fresh"`
	SequenceEnd     *uint32         `json:"sequence_end"`
	Acknowledgement *uint32         `json:"acknowledgement"`
	Timestamp       *uint32         `json:"timestamp,omitempty"` // of the client's last packet (RFC 7323), where it has one
	TimestampEcho   *uint32         `json:"timestamp_echo,omitempty"`
	Told            []string        `json:"told,omitempty"` // condemned: who has got RST
	ClientMAC       string          `json:"client_mac"`
	Generation      uint32          `json:"generation"`

	age, idle time.Duration
}

// entry is an entry of either table.
type entry struct {
	maps.Connection
	halfOpen bool
	state    string
}

func entryOf(c *maps.Connection) entry { return entry{Connection: *c, state: c.State.String()} }

func halfOpenEntry(h *maps.HalfOpenConnection) entry {
	return entry{halfOpen: true, state: stateHalfOpen, Connection: maps.Connection{
		Tuple: h.Tuple, Service: h.Service, Backend: h.Backend, Generation: h.Generation, Opened: h.First, Seen: h.First,
		Source: h.Source, SourcePort: h.SourcePort,
	}}
}

// connectionFilter chooses entries; what is nil or zero lets all pass.
type connectionFilter struct {
	services, backends map[uint32]bool
	clients            []func(netip.AddrPort) bool
	states             []string
	idle               time.Duration
	now                uint32
}

func (f *connectionFilter) passes(e *entry) bool {
	if f.services != nil && !f.services[e.Service] || f.backends != nil && !f.backends[e.Backend] {
		return false
	}
	from := func(is func(netip.AddrPort) bool) bool { return is(e.Tuple.Source) }
	if f.clients != nil && !slices.ContainsFunc(f.clients, from) {
		return false
	}
	if f.states != nil && !slices.Contains(f.states, e.state) {
		return false
	}
	return f.idle == 0 || !e.halfOpen && maps.Age(f.now, e.Seen) >= f.idle
}

// usedFilters checks what needs no maps, so that wrong usage is told before anything else.
func usedFilters(c *cli.Context) (*connectionFilter, error) {
	f := &connectionFilter{idle: c.Duration("idle"), now: maps.Now()}
	if f.idle < 0 {
		return nil, wrongUsage("--idle %v: a duration can't be negative", f.idle)
	}
	if plane := c.String("plane"); plane != "" && plane != "xdp" {
		return nil, wrongUsage("--plane %q: xdp is the one plane of this version", plane)
	}
	for _, state := range c.StringSlice("state") {
		if !slices.Contains(states, state) {
			return nil, wrongUsage("--state %q: one of %s", state, strings.Join(states, ", "))
		}
		f.states = append(f.states, state)
	}
	for _, word := range c.StringSlice("client") {
		is, err := parseClient(word)
		if err != nil {
			return nil, err
		}
		f.clients = append(f.clients, is)
	}
	return f, nil
}

func parseClient(word string) (func(netip.AddrPort) bool, error) {
	if a, err := netip.ParseAddr(strings.Trim(word, "[]")); err == nil {
		a = a.Unmap()
		return func(client netip.AddrPort) bool { return client.Addr() == a }, nil
	}
	if p, err := netip.ParsePrefix(word); err == nil {
		return func(client netip.AddrPort) bool { return p.Contains(client.Addr()) }, nil
	}
	if a, err := parseAddrPort(word); err == nil {
		return func(client netip.AddrPort) bool { return client == a }, nil
	}
	return nil, wrongUsage("--client %q: an address, a prefix as 198.51.100.0/24, or address:port", word)
}

// named adds what is named after the maps' own names.
func (f *connectionFilter) named(v *view, services, backends []string) error {
	for _, word := range services {
		found, err := v.findServices(word)
		if err != nil {
			return err
		}
		for _, s := range found {
			if f.services == nil {
				f.services = make(map[uint32]bool)
			}
			f.services[s.ID] = true
		}
	}
	for _, word := range backends {
		found, err := v.findBackends(word)
		if err != nil {
			return err
		}
		for _, b := range found {
			if f.backends == nil {
				f.backends = make(map[uint32]bool)
			}
			f.backends[b.ID] = true
		}
	}
	return nil
}

func withConnections(c *cli.Context, print func(*cli.Context, *view, *connectionFilter) error) (err error) {
	f, err := usedFilters(c)
	if err != nil {
		return err
	}
	v, err := openView(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	if err := f.named(v, c.StringSlice("service"), c.StringSlice("backend")); err != nil {
		return err
	}
	return print(c, v, f)
}

// walk visits the entries of both tables that pass, each connection once: one that is confirmed stands in both for a
// moment, and is then no longer half-open. One confirmed during the walk may be met in both states.
func (v *view) walk(f *connectionFilter, visit func(*entry) error) error {
	if f.states == nil || slices.Contains(f.states, stateHalfOpen) {
		if err := v.set.HalfOpen.Walk(func(h *maps.HalfOpenConnection) error {
			e := halfOpenEntry(h)
			if maps.Age(f.now, h.First) >= maps.HalfOpenLife || !f.passes(&e) {
				return nil
			}
			if _, confirmed, err := v.set.Connections.Get(h.Tuple); err != nil || confirmed {
				return err
			}
			return visit(&e)
		}); err != nil {
			return err
		}
	}
	return v.set.Connections.Walk(func(conn *maps.Connection) error {
		if e := entryOf(conn); f.passes(&e) {
			return visit(&e)
		}
		return nil
	})
}

// item is an entry with its names; with ring, also what the ring and the bitmaps say of it.
func (v *view) item(e *entry, now uint32, ring bool) (connectionItem, error) {
	s, _ := v.inv.Service(e.Service)
	s.ID = e.Service
	item := connectionItem{
		Client: e.Tuple.Source, Service: serviceName(s), ServiceAddress: e.Tuple.Destination, Protocol: maps.ProtocolName(e.Tuple.Protocol),
		Backend: v.backendName(e.Backend), Plane: "xdp", State: e.state, Generation: e.Generation,
		age: maps.Age(now, e.Opened), idle: maps.Age(now, e.Seen),
	}
	item.Age = seconds(item.age)
	if b, ok := v.inv.Backend(e.Backend); ok {
		address := backendAddress(&b)
		item.BackendAddress, item.Method = &address, b.Method.String()
	}
	if !e.halfOpen {
		idle := seconds(item.idle)
		item.Idle, item.SequenceEnd, item.Acknowledgement = &idle, &e.SequenceEnd, &e.Acknowledgement
		item.ClientMAC = net.HardwareAddr(e.Hop.MAC[:]).String()
		if e.Timestamp != 0 || e.TimestampEcho != 0 {
			item.Timestamp, item.TimestampEcho = &e.Timestamp, &e.TimestampEcho
		}
		item.Told = told(e.Connection.State)
	}
	if e.SourcePort != 0 {
		for _, src := range v.inv.Sources {
			if src.ID == e.Source {
				source := netip.AddrPortFrom(src.Address, e.SourcePort)
				item.Source = &source
			}
		}
	}
	if !ring {
		return item, nil
	}
	hash := e.Tuple.Hash()
	item.Exception, item.Fresh = v.set.Bitmaps.Exception(hash), v.set.Bitmaps.Fresh(hash)
	if s.AffinityClient {
		hash = maps.HashClient(e.Tuple.Source.Addr())
	}
	slots, err := v.ring(e.Service)
	if err != nil {
		return item, err
	}
	item.Slot = maps.SlotOf(hash, s.RingSize)
	item.SlotBackend = v.backendName(maps.NoBackend)
	if int(item.Slot) < len(slots) {
		item.SlotBackend, item.Settled = v.backendName(slots[item.Slot].Backend), slots[item.Slot].Settled
	}
	return item, nil
}

// told are the ends of a condemned connection that have got RST.
func told(s maps.State) (ends []string) {
	if s&maps.StateBackendTold != 0 {
		ends = append(ends, "backend")
	}
	if s&maps.StateClientTold != 0 {
		ends = append(ends, "client")
	}
	return ends
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func orDash[T any](p *T) string {
	if p == nil {
		return "-"
	}
	return fmt.Sprint(*p)
}

func (i *connectionItem) idleText() string {
	if i.Idle == nil {
		return "-"
	}
	return span(i.idle)
}

func (i *connectionItem) slotText() string {
	text := fmt.Sprintf("%d %s", i.Slot, i.SlotBackend)
	if !i.Settled {
		text += " (unsettled)"
	}
	return text
}

func listConnections(c *cli.Context, v *view, f *connectionFilter) error {
	type item = connectionItem
	l := newList(c.App.Writer, formatOf(c),
		column[item]{title: "CLIENT", text: func(i *item) string { return i.Client.String() }},
		column[item]{title: "SERVICE", text: func(i *item) string { return i.Service }},
		column[item]{title: "BACKEND", text: func(i *item) string { return i.Backend }},
		column[item]{title: "STATE", text: func(i *item) string { return i.State }},
		column[item]{title: "AGE", right: true, text: func(i *item) string { return span(i.age) }},
		column[item]{title: "IDLE", right: true, text: (*item).idleText},
		column[item]{title: "PLANE", text: func(i *item) string { return i.Plane }},
		column[item]{title: "METHOD", wide: true, text: func(i *item) string { return i.Method }},
		column[item]{title: "SOURCE", wide: true, text: func(i *item) string { return orDash(i.Source) }},
		column[item]{title: "SLOT", wide: true, text: (*item).slotText},
		column[item]{title: "EXCEPTION", wide: true, text: func(i *item) string { return yes(i.Exception) }},
		column[item]{title: "FRESH", wide: true, text: func(i *item) string { return yes(i.Fresh) }},
		column[item]{title: "SEQUENCE", wide: true, right: true, text: func(i *item) string { return orDash(i.SequenceEnd) }},
		column[item]{title: "ACK", wide: true, right: true, text: func(i *item) string { return orDash(i.Acknowledgement) }},
		column[item]{title: "CLIENT-MAC", wide: true, text: func(i *item) string { return cmp.Or(i.ClientMAC, "-") }},
	)
	if err := v.walk(f, func(e *entry) error {
		i, err := v.item(e, f.now, formatOf(c) != formatTable)
		if err != nil {
			return err
		}
		return l.add(i)
	}); err != nil {
		return err
	}
	return l.end()
}

// tally is how many connections one backend of a service has in one state.
type tally struct {
	Service     string `json:"service"`
	Backend     string `json:"backend"`
	State       string `json:"state"`
	Connections int    `json:"connections"`
}

func countConnections(c *cli.Context, v *view, f *connectionFilter) error {
	type place struct {
		service, backend uint32
		state            string
	}
	counts, total := make(map[place]int), 0
	if err := v.walk(f, func(e *entry) error {
		total++
		counts[place{e.Service, e.Backend, e.state}]++
		return nil
	}); err != nil {
		return err
	}
	if formatOf(c) == formatTable {
		_, err := fmt.Fprintln(c.App.Writer, total)
		return err
	}
	tallies := []tally{}
	for p, n := range counts {
		tallies = append(tallies, tally{v.serviceName(p.service), v.backendName(p.backend), p.state, n})
	}
	slices.SortFunc(tallies, func(a, b tally) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Backend, b.Backend), cmp.Compare(a.State, b.State))
	})
	if isJSON(c) {
		return object(c, struct {
			Connections int     `json:"connections"`
			By          []tally `json:"by"`
		}{total, tallies})
	}
	l := newList(c.App.Writer, formatWide,
		column[tally]{title: "SERVICE", text: func(t *tally) string { return t.Service }},
		column[tally]{title: "BACKEND", text: func(t *tally) string { return t.Backend }},
		column[tally]{title: "STATE", text: func(t *tally) string { return t.State }},
		column[tally]{title: "CONNECTIONS", right: true, text: func(t *tally) string { return fmt.Sprint(t.Connections) }},
	)
	for _, t := range append(tallies, tally{Service: "all", Connections: total}) {
		if err := l.add(t); err != nil {
			return err
		}
	}
	return l.end()
}

// parseTuple reads CLIENT:PORT [SERVICE], or CLIENT:PORT->SERVICE in one word.
func parseTuple(args []string) (client netip.AddrPort, service string, err error) {
	if len(args) == 1 {
		if from, to, ok := strings.Cut(args[0], "->"); ok {
			args = []string{strings.TrimSpace(from), strings.TrimSpace(to)}
		}
	}
	if client, err = parseAddrPort(args[0]); err != nil {
		return client, "", wrongUsage("client %s", err)
	}
	if len(args) > 1 {
		service = args[1]
	}
	return client, service, nil
}

func getConnections(c *cli.Context) (err error) {
	args, err := words(c, 1, 2)
	if err != nil {
		return err
	}
	client, word, err := parseTuple(args)
	if err != nil {
		return err
	}
	v, err := openView(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	services := v.inv.Services
	if word != "" {
		if services, err = v.findServices(word); err != nil {
			return err
		}
	}
	now := maps.Now()
	var found []connectionItem
	for _, s := range services {
		if s.Address().Is4() != client.Addr().Is4() {
			continue
		}
		for _, at := range s.Keys {
			e, ok, err := v.get(maps.Tuple{Source: client, Destination: at, Protocol: s.Protocol})
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			item, err := v.item(&e, now, true)
			if err != nil {
				return err
			}
			found = append(found, item)
		}
	}
	if isJSON(c) {
		l := newList[connectionItem](c.App.Writer, formatOf(c))
		for _, item := range found {
			if err := l.add(item); err != nil {
				return err
			}
		}
		if err := l.end(); err != nil {
			return err
		}
	} else {
		for n := range found {
			if n > 0 {
				fmt.Fprintln(c.App.Writer)
			}
			if err := found[n].print(c); err != nil {
				return err
			}
		}
	}
	if len(found) == 0 {
		if word == "" {
			return fmt.Errorf("no connection from %v to any service: `fairlead explain %v SERVICE` says where one would go",
				client, client)
		}
		return fmt.Errorf("no connection from %v to %s: `fairlead explain %v %s` says where one would go", client, word,
			client, word)
	}
	return nil
}

// get is the entry of a tuple, whichever table has it.
func (v *view) get(t maps.Tuple) (entry, bool, error) {
	conn, ok, err := v.set.Connections.Get(t)
	if err != nil || ok {
		return entryOf(&conn), ok, err
	}
	half, ok, err := v.set.HalfOpen.Get(t)
	return halfOpenEntry(&half), ok, err
}

func (i *connectionItem) print(c *cli.Context) error {
	t := table{out: c.App.Writer, headed: true, columns: make([]tableColumn, 2)}
	backend := i.Backend
	if i.BackendAddress != nil {
		backend += fmt.Sprintf(" (%v, by %s)", *i.BackendAddress, i.Method)
	}
	state := i.State
	if len(i.Told) > 0 {
		state += " (told: " + strings.Join(i.Told, ", ") + ")"
	}
	t.rows = [][]string{
		{"client", i.Client.String()}, {"service", fmt.Sprintf("%s (%v)", i.Service, i.ServiceAddress)},
		{"backend", backend}, {"state", state}, {"age", span(i.age)}, {"idle", i.idleText()}, {"plane", i.Plane},
	}
	if i.Source != nil {
		t.rows = append(t.rows, []string{"source", i.Source.String()})
	}
	t.rows = append(t.rows, []string{"slot", i.slotText()},
		[]string{"exception", yes(i.Exception)}, []string{"fresh", yes(i.Fresh)})
	if i.SequenceEnd != nil {
		t.rows = append(t.rows, []string{"sequence", orDash(i.SequenceEnd)}, []string{"ack", orDash(i.Acknowledgement)},
			[]string{"client-mac", i.ClientMAC})
	}
	if i.Timestamp != nil {
		t.rows = append(t.rows, []string{"timestamp", orDash(i.Timestamp)}, []string{"echo", orDash(i.TimestampEcho)})
	}
	t.rows = append(t.rows, []string{"generation", fmt.Sprint(i.Generation)})
	return t.flush()
}
