package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	stdmaps "maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"fairlead/bpf"
	"fairlead/loader"
	"fairlead/maps"
)

// rateInterval is how far apart the two reads are that rates are made of.
const rateInterval = time.Second

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show interfaces, services, backends and what was decided for packets",
		Description: "Counters run since a service or backend got its number. Live connections are counted by walking the\n" +
			"tables, and so only with --connections or -o wide. Rates take a second to see.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "connections", Usage: "count live connections: walks the tables"},
			&cli.BoolFlag{Name: "rates", Usage: "read twice, a second apart, and show what happened between"},
			&cli.StringSliceFlag{Name: "service", Usage: "of `SERVICE` alone: its name or address:port"},
			outputFlag(), pinPathFlag(),
		},
		Action: status,
	}
}

// statusReport is all that status shows.
type statusReport struct {
	Node       string            `json:"node,omitempty"`
	PinPath    string            `json:"pin_path"`
	Daemon     daemonStatus      `json:"daemon"`
	Interfaces []interfaceStatus `json:"interfaces"`
	Tables     tableStatus       `json:"tables"`
	Addresses  []addressStatus   `json:"addresses"`
	Services   []serviceStatus   `json:"services"`
	Verdicts   []counterStatus   `json:"verdicts"` // those that are not zero
	Events     []counterStatus   `json:"events"`
}

type daemonStatus struct {
	Running bool `json:"running"`
	PID     int  `json:"pid,omitempty"`
}

type interfaceStatus struct {
	Name    string `json:"name"`
	Index   int    `json:"index"` // 0: the interface is gone
	Mode    string `json:"mode"`  // native, generic; empty: not to be known
	Program uint32 `json:"program_id"`
	Link    uint32 `json:"link_id"`
	// Drops are the device's own: what was lost between the programs and the wire. Those that are not zero.
	Drops map[string]uint64 `json:"device_drops,omitempty"`
}

// addressStatus is one of our addresses.
type addressStatus struct {
	Address netip.Addr `json:"address"`
	Uses    []string   `json:"uses"`
	Own     bool       `json:"own"` // XDP's own: ARP, NDP and echo are answered
}

type tableStatus struct {
	Connections         int64  `json:"connections"`
	ConnectionsCapacity uint32 `json:"connections_capacity"`
	Young               int64  `json:"young"`
	HalfOpen            *int   `json:"half_open,omitempty"` // counted
	HalfOpenCapacity    uint32 `json:"half_open_capacity"`  // of each family
	Epoch               uint32 `json:"epoch"`
}

type serviceStatus struct {
	Name          string           `json:"name"`
	Address       netip.AddrPort   `json:"address"` // the first of all
	Addresses     []netip.AddrPort `json:"addresses"`
	Leaving       []netip.AddrPort `json:"leaving_addresses,omitempty"` // out of the configuration, not of use
	Protocol      string           `json:"protocol"`
	Methods       []string         `json:"methods"`
	State         string           `json:"state"` // up, leaving, panic, all down, no backend
	Reason        string           `json:"reason,omitempty"`
	Affinity      string           `json:"affinity"`
	OnBackendDown string           `json:"on_backend_down"`
	IdleTimeout   float64          `json:"idle_timeout_seconds"`
	RingSize      uint32           `json:"ring_size"`
	Unsettled     int              `json:"unsettled_slots"`
	Connections   *int             `json:"connections,omitempty"` // counted; half-open ones are not among them
	Traffic       maps.Traffic     `json:"traffic"`
	Rates         *rates           `json:"rates,omitempty"`
	Backends      []backendStatus  `json:"backends"`

	id uint32
}

type backendStatus struct {
	Name    string         `json:"name"`
	Address netip.AddrPort `json:"address"`
	Method  string         `json:"method"`
	condition
	Slots       int          `json:"slots"`
	Share       float64      `json:"share"` // of the ring, 0 to 1
	Connections *int         `json:"connections,omitempty"`
	Traffic     maps.Traffic `json:"traffic"`
	Rates       *rates       `json:"rates,omitempty"`

	id uint32
}

type counterStatus struct {
	Name  string   `json:"name"`
	Count uint64   `json:"count"`
	Rate  *float64 `json:"per_second,omitempty"`
}

// rates are of a second.
type rates struct {
	Packets      float64 `json:"packets"`
	Bytes        float64 `json:"bytes"`
	Connections  float64 `json:"new_connections"`
	Refused      float64 `json:"refused"`
	ReplyPackets float64 `json:"reply_packets"`
	ReplyBytes   float64 `json:"reply_bytes"`
}

func status(c *cli.Context) (err error) {
	if _, err := words(c, 0, 0); err != nil {
		return err
	}
	v, err := openView(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	chosen := v.inv.Services
	if names := c.StringSlice("service"); len(names) > 0 {
		if chosen, err = v.namedServices(names); err != nil {
			return err
		}
	}
	report, err := v.report(chosen)
	if err != nil {
		return err
	}
	if c.Bool("connections") || formatOf(c) == formatWide {
		if err := v.countInto(report); err != nil {
			return err
		}
	}
	if c.Bool("rates") {
		if err := v.ratesInto(c.Context, report); err != nil {
			return err
		}
	}
	if isJSON(c) {
		return object(c, report)
	}
	p := &statusPrinter{w: c.App.Writer, wide: formatOf(c) == formatWide, rates: c.Bool("rates")}
	p.print(report)
	return p.err
}

// report reads all but what takes a walk or time.
func (v *view) report(services []maps.Service) (*statusReport, error) {
	r := &statusReport{
		Node: v.node, PinPath: v.path, Interfaces: []interfaceStatus{}, Services: []serviceStatus{},
		Tables: tableStatus{
			Connections: v.set.Control.Connections(), Young: v.set.Control.Young(), Epoch: v.set.Control.Epoch(),
			ConnectionsCapacity: v.raw.Connections4.MaxEntries(), HalfOpenCapacity: v.raw.HalfOpen4.MaxEntries(),
		},
	}
	r.Daemon.PID = loader.Holder(v.path)
	r.Daemon.Running = r.Daemon.PID != 0
	links, err := loader.Links(v.path)
	if err != nil {
		return nil, err
	}
	for _, at := range links {
		r.Interfaces = append(r.Interfaces, interfaceOf(&at))
	}
	if r.Addresses, err = v.addresses(); err != nil {
		return nil, err
	}
	for i := range services {
		s, err := v.serviceStatus(&services[i])
		if err != nil {
			return nil, err
		}
		r.Services = append(r.Services, s)
	}
	totals, err := v.set.Counters.Totals()
	if err != nil {
		return nil, err
	}
	r.Verdicts = counters(bpf.VerdictNames(), totals.Verdicts)
	r.Events = counters(bpf.EventNames(), totals.Events)
	return r, nil
}

func interfaceOf(at *loader.Attachment) interfaceStatus {
	i := interfaceStatus{Name: at.Interface, Index: at.Index, Mode: string(at.Mode), Program: uint32(at.Program),
		Link: uint32(at.Link)}
	// Where the device is not in this network namespace, there is nothing to be read of it.
	if drops, err := loader.DeviceDrops(at.Interface); err == nil {
		stdmaps.DeleteFunc(drops, func(_ string, n uint64) bool { return n == 0 })
		i.Drops = drops
	}
	return i
}

// addresses are ours, in order.
func (v *view) addresses() ([]addressStatus, error) {
	all, err := v.set.Addresses()
	if err != nil {
		return nil, err
	}
	list := []addressStatus{}
	for _, a := range slices.SortedFunc(stdmaps.Keys(all), netip.Addr.Compare) {
		list = append(list, addressStatus{Address: a, Uses: all[a].Names(), Own: all[a]&maps.AddressOwn != 0})
	}
	return list, nil
}

func counters(names []string, counts []uint64) []counterStatus {
	list := []counterStatus{}
	for i, n := range counts {
		if n != 0 {
			list = append(list, counterStatus{Name: names[i], Count: n})
		}
	}
	return list
}

func (v *view) serviceStatus(s *maps.Service) (serviceStatus, error) {
	st := serviceStatus{
		Name: serviceName(*s), Address: s.AddrPort(), Addresses: s.Keys, Leaving: s.LeavingKeys(), Protocol: maps.ProtocolName(s.Protocol), Methods: []string{},
		Affinity: "connection", OnBackendDown: s.OnBackendDown.String(), IdleTimeout: s.IdleTimeout.Seconds(),
		RingSize: s.RingSize, Backends: []backendStatus{}, id: s.ID,
	}
	if s.AffinityClient {
		st.Affinity = "client"
	}
	slots, err := v.ring(s.ID)
	if err != nil {
		return st, err
	}
	held, now := make(map[uint32]int), maps.Now()
	for _, slot := range slots {
		held[slot.Backend]++
		if !slot.Settled {
			st.Unsettled++
		}
	}
	if st.Traffic, err = v.set.Counters.Service(s.ID); err != nil {
		return st, err
	}
	for i := range v.inv.Backends {
		b := &v.inv.Backends[i]
		if b.Service != s.ID {
			continue
		}
		bs := backendStatus{
			Name: b.Name, Address: backendAddress(b), Method: b.Method.String(), Slots: held[b.ID], id: b.ID,
			condition: conditionOf(b, now),
		}
		if len(slots) > 0 {
			bs.Share = float64(bs.Slots) / float64(len(slots))
		}
		if bs.Traffic, err = v.set.Counters.Backend(b.ID); err != nil {
			return st, err
		}
		st.Backends = append(st.Backends, bs)
		if !slices.Contains(st.Methods, bs.Method) {
			st.Methods = append(st.Methods, bs.Method)
		}
	}
	slices.SortFunc(st.Backends, func(a, b backendStatus) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.id, b.id))
	})
	slices.Sort(st.Methods)
	st.State, st.Reason = serviceState(s, st.Backends, held[maps.NoBackend] < len(slots))
	return st, nil
}

// countInto counts live connections by walking the tables; half-open ones are counted for the table alone.
func (v *view) countInto(r *statusReport) error {
	services, backends, half := make(map[uint32]int), make(map[uint32]int), 0
	if err := v.walk(&connectionFilter{now: maps.Now()}, func(e *entry) error {
		if e.halfOpen {
			half++
			return nil
		}
		services[e.Service]++
		backends[e.Backend]++
		return nil
	}); err != nil {
		return err
	}
	r.Tables.HalfOpen = &half
	for i := range r.Services {
		s := &r.Services[i]
		n := services[s.id]
		s.Connections = &n
		for j := range s.Backends {
			n := backends[s.Backends[j].id]
			s.Backends[j].Connections = &n
		}
	}
	return nil
}

// ratesInto reads the counters again a second later. Both reads take time: what counts is the time between them.
func (v *view) ratesInto(ctx context.Context, r *statusReport) error {
	first, err := v.trafficOf(r)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(rateInterval):
	}
	second, err := v.trafficOf(r)
	if err != nil {
		return err
	}
	between := second.at.Sub(first.at).Seconds()
	rate := func(before, after uint64) float64 {
		// A number given to another meanwhile starts at zero again.
		if after < before {
			return 0
		}
		return math.Round(float64(after-before)/between*10) / 10
	}
	of := func(a, b maps.Traffic) *rates {
		return &rates{
			Packets: rate(a.Packets, b.Packets), Bytes: rate(a.Bytes, b.Bytes),
			Connections: rate(a.Connections, b.Connections), Refused: rate(a.Refused, b.Refused),
			ReplyPackets: rate(a.ReplyPackets, b.ReplyPackets), ReplyBytes: rate(a.ReplyBytes, b.ReplyBytes),
		}
	}
	for i := range r.Services {
		s := &r.Services[i]
		s.Traffic, s.Rates = second.services[s.id], of(first.services[s.id], second.services[s.id])
		for j := range s.Backends {
			b := &s.Backends[j]
			b.Traffic, b.Rates = second.backends[b.id], of(first.backends[b.id], second.backends[b.id])
		}
	}
	r.Verdicts = counters(bpf.VerdictNames(), second.totals.Verdicts)
	r.Events = counters(bpf.EventNames(), second.totals.Events)
	for _, part := range []struct {
		list   []counterStatus
		names  []string
		before []uint64
	}{{r.Verdicts, bpf.VerdictNames(), first.totals.Verdicts}, {r.Events, bpf.EventNames(), first.totals.Events}} {
		for i := range part.list {
			perSecond := rate(part.before[slices.Index(part.names, part.list[i].Name)], part.list[i].Count)
			part.list[i].Rate = &perSecond
		}
	}
	return nil
}

type trafficRead struct {
	at                 time.Time
	services, backends map[uint32]maps.Traffic
	totals             maps.Totals
}

func (v *view) trafficOf(r *statusReport) (read trafficRead, err error) {
	read = trafficRead{at: time.Now(), services: make(map[uint32]maps.Traffic), backends: make(map[uint32]maps.Traffic)}
	for i := range r.Services {
		s := &r.Services[i]
		if read.services[s.id], err = v.set.Counters.Service(s.id); err != nil {
			return read, err
		}
		for _, b := range s.Backends {
			if read.backends[b.id], err = v.set.Counters.Backend(b.id); err != nil {
				return read, err
			}
		}
	}
	read.totals, err = v.set.Counters.Totals()
	return read, err
}

// statusPrinter prints a report for people, and keeps the first error.
type statusPrinter struct {
	w           io.Writer
	wide, rates bool
	err         error
}

func (p *statusPrinter) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

func (p *statusPrinter) table(indent string, columns []string, rows [][]string) {
	t := table{out: p.w, indent: indent, rows: rows}
	for _, title := range columns {
		right := strings.HasPrefix(title, ">")
		t.columns = append(t.columns, tableColumn{title: strings.TrimPrefix(title, ">"), right: right})
	}
	if p.err == nil {
		p.err = t.flush()
	}
}

func (p *statusPrinter) print(r *statusReport) {
	daemon := "not running: forwarding goes on without it"
	if r.Daemon.Running {
		daemon = fmt.Sprintf("running, pid %d", r.Daemon.PID)
	}
	p.line("node %s, daemon %s, pins in %s", cmp.Or(r.Node, "unknown"), daemon, r.PinPath)

	p.line("\nINTERFACES")
	var rows [][]string
	for _, i := range r.Interfaces {
		mode := cmp.Or(i.Mode, "unknown")
		if i.Index == 0 {
			mode = "gone"
		}
		row := []string{i.Name, mode, fmt.Sprint(i.Program), fmt.Sprint(i.Link)}
		if p.wide {
			row = append(row, cmp.Or(drops(i.Drops), "none"))
		}
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		p.line("  none: nothing is attached, nothing is forwarded")
	} else {
		columns := []string{"NAME", "XDP", ">PROGRAM", ">LINK"}
		if p.wide {
			columns = append(columns, "DEVICE DROPS")
		}
		p.table("  ", columns, rows)
	}

	p.line("\nTABLES")
	t := &r.Tables
	p.line("  connections %s of %s (%s), %s of them young", count(t.Connections), count(t.ConnectionsCapacity),
		percent(uint64(max(t.Connections, 0)), uint64(t.ConnectionsCapacity)), count(t.Young))
	if t.HalfOpen != nil {
		p.line("  half-open %s, room for %s of each family; epoch %d", count(*t.HalfOpen), count(t.HalfOpenCapacity), t.Epoch)
	}

	p.line("\nADDRESSES")
	rows = nil
	for _, a := range r.Addresses {
		whose := "the host's, or routed here"
		if a.Own {
			whose = "answered by XDP"
		}
		rows = append(rows, []string{a.Address.String(), strings.Join(a.Uses, ", "), whose})
	}
	if len(rows) > 0 {
		p.table("  ", []string{"ADDRESS", "USE", "ARP, NDP, ECHO"}, rows)
	} else {
		p.line("  none")
	}

	p.line("\nSERVICES")
	if len(r.Services) == 0 {
		p.line("  none")
	}
	for i := range r.Services {
		p.service(&r.Services[i])
	}
	p.counters("VERDICTS", r.Verdicts)
	p.counters("EVENTS", r.Events)
}

// drops are a device's own counts, in one line.
func drops(counts map[string]uint64) string {
	var list []string
	for _, name := range slices.Sorted(stdmaps.Keys(counts)) {
		list = append(list, fmt.Sprintf("%s %d", name, counts[name]))
	}
	return strings.Join(list, ", ")
}

// addressText is a backend's address, without a port where it takes packets for any.
func addressText(a netip.AddrPort) string {
	if a.Port() == 0 {
		return a.Addr().String()
	}
	return a.String()
}

func (p *statusPrinter) service(s *serviceStatus) {
	state := s.State
	if s.Reason != "" {
		state += ": " + s.Reason
	}
	facts := []string{cmp.Or(strings.Join(s.Methods, "+"), "no method"), plural(len(s.Backends), "backend"), state}
	if s.Unsettled > 0 {
		facts = append(facts, fmt.Sprintf("%d of %d slots unsettled", s.Unsettled, s.RingSize))
	}
	if s.Connections != nil {
		facts = append(facts, plural(*s.Connections, "connection"))
	}
	if s.Rates != nil {
		facts = append(facts, fmt.Sprintf("%s packets/s, %s/s, %s new/s", perSecond(s.Rates.Packets),
			size(uint64(s.Rates.Bytes)), perSecond(s.Rates.Connections)))
	}
	more := ""
	if n := len(s.Addresses) - 1; n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	p.line("  %s  %v/%s%s  %s", s.Name, s.Address, s.Protocol, more, strings.Join(facts, ", "))
	if p.wide {
		p.line("    affinity %s, on_backend_down %s, idle_timeout %s, ring of %d", s.Affinity, s.OnBackendDown,
			span(time.Duration(s.IdleTimeout*float64(time.Second))), s.RingSize)
		if more != "" {
			p.line("    at %s", strings.Trim(fmt.Sprint(s.Addresses), "[]"))
		}
	}
	columns := []string{"BACKEND", "ADDRESS", ">WEIGHT", "STATE", ">SHARE", ">PACKETS", ">BYTES", ">NEW"}
	if p.wide {
		columns = append(columns, "METHOD", ">REFUSED", ">REPLIES", ">REPLY-BYTES")
	}
	if s.Connections != nil {
		columns = append(columns, ">CONNECTIONS")
	}
	if p.rates {
		columns = append(columns, ">PACKETS/S", ">BYTES/S", ">NEW/S")
	}
	// Checks that never failed need no room.
	failed := slices.ContainsFunc(s.Backends, func(b backendStatus) bool { return b.FailedAgo != nil })
	if failed {
		columns = append(columns, "LAST FAILURE")
	}
	var rows [][]string
	for _, b := range s.Backends {
		row := []string{b.Name, addressText(b.Address), b.weightText(), b.stateText(), percent(uint64(b.Slots), uint64(s.RingSize)),
			count(b.Traffic.Packets), size(b.Traffic.Bytes), count(b.Traffic.Connections)}
		if p.wide {
			row = append(row, b.Method, count(b.Traffic.Refused), count(b.Traffic.ReplyPackets), size(b.Traffic.ReplyBytes))
		}
		if b.Connections != nil {
			row = append(row, count(*b.Connections))
		}
		if b.Rates != nil {
			row = append(row, perSecond(b.Rates.Packets), size(uint64(b.Rates.Bytes)), perSecond(b.Rates.Connections))
		}
		if failed {
			row = append(row, b.failureText())
		}
		rows = append(rows, row)
	}
	if len(rows) > 0 {
		p.table("    ", columns, rows)
	}
}

func perSecond(f float64) string {
	if f < 10 {
		return fmt.Sprintf("%.3g", f)
	}
	return count(uint64(f))
}

func (p *statusPrinter) counters(title string, list []counterStatus) {
	p.line("\n%s", title)
	if len(list) == 0 {
		p.line("  none")
		return
	}
	columns := []string{"NAME", ">COUNT"}
	if p.rates {
		columns = append(columns, ">PER SECOND")
	}
	var rows [][]string
	for _, n := range list {
		row := []string{n.Name, count(n.Count)}
		if n.Rate != nil {
			row = append(row, perSecond(*n.Rate))
		}
		rows = append(rows, row)
	}
	p.table("  ", columns, rows)
}
