package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead/bpf"
	"fairlead/maps"
)

// shownEdge are services whose backends stand in every way that there is.
func shownEdge() []maps.WantedService {
	long, lately := ago(5*time.Hour+12*time.Minute+30*time.Second), ago(3*time.Hour+20*time.Minute+30*time.Second)
	number := 0
	backend := func(name string, set func(*maps.WantedBackend)) maps.WantedBackend {
		number++
		b := maps.WantedBackend{
			Name: name, Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(10 + number)}), Port: 443, Method: maps.MethodDSR, Weight: 1,
			Shown: maps.Shown{Configured: 1, Health: maps.HealthUp, Since: long},
		}
		set(&b)
		return b
	}
	failed := func(b *maps.WantedBackend, health maps.Health) {
		b.Shown.Health, b.Shown.Since, b.Shown.FailedAt, b.Shown.Failure = health, lately, lately, "connection refused"
	}
	down := func(b *maps.WantedBackend) { failed(b, maps.HealthDown); b.Down = true }
	tried := func(b *maps.WantedBackend) { down(b); b.Tried = true }
	service := func(name string, last byte, standing maps.Standing, backends ...maps.WantedBackend) maps.WantedService {
		return maps.WantedService{
			Name: name, Keys: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, last}), 443)}, Protocol: 6,
			RingSize: 1009, IdleTimeout: time.Hour, Standing: standing, Backends: backends,
		}
	}
	return []maps.WantedService{
		service("chat", 10, 0,
			backend("a-up", func(b *maps.WantedBackend) { b.Shown.FailedAt, b.Shown.Failure = lately, "timeout after 1s" }),
			backend("b-unchecked", func(b *maps.WantedBackend) { b.Shown = maps.Shown{Configured: 1} }),
			backend("c-weight", func(b *maps.WantedBackend) { b.Weight, b.Shown.Orders = 5, maps.OrderWeight }),
			backend("d-slow", func(b *maps.WantedBackend) {
				b.Weight, b.Percent, b.Shown.Configured, b.Shown.Orders = 10, 30, 10, maps.OrderSlowStart
			}),
			backend("e-percent", func(b *maps.WantedBackend) {
				b.Weight, b.Percent, b.Shown.Configured, b.Shown.Orders = 10, 50, 10, maps.OrderCheckWeight
			}),
			backend("f-drain", func(b *maps.WantedBackend) { b.Weight, b.Shown.Orders = 0, maps.OrderDrain }),
			backend("g-check-drain", func(b *maps.WantedBackend) { b.Weight, b.Shown.Orders = 0, maps.OrderCheckDrain }),
			backend("h-ordered-0", func(b *maps.WantedBackend) { b.Weight, b.Shown.Orders = 0, maps.OrderWeight }),
			backend("i-configured-0", func(b *maps.WantedBackend) { b.Weight, b.Shown.Configured = 0, 0 }),
			backend("j-disabled", func(b *maps.WantedBackend) {
				b.Weight, b.Shown = 0, maps.Shown{Configured: 1, Orders: maps.OrderDisabled}
			}),
			backend("k-down", down),
			backend("l-held", func(b *maps.WantedBackend) { down(b); b.Shown.Health = maps.HealthHeld }),
			backend("m-unknown", func(b *maps.WantedBackend) { b.Down, b.Shown.Health, b.Shown.Since = true, maps.HealthUnknown, lately }),
			backend("n-supposed-up", func(b *maps.WantedBackend) { b.Shown.Health, b.Shown.Since = maps.HealthUnknown, lately }),
			backend("o-maintenance", func(b *maps.WantedBackend) {
				failed(b, maps.HealthDown)
				b.Shown.Orders, b.Shown.Failure = maps.OrderCheckMaint, ""
			}),
			backend("p-down-drain", func(b *maps.WantedBackend) { down(b); b.Weight, b.Shown.Orders = 0, maps.OrderDrain }),
			backend("q-no-hop", down),
		),
		service("open", 11, maps.StandingAllDown, backend("ws1", tried), backend("ws2", tried)),
		service("reset", 12, maps.StandingAllDown, backend("ws1", down)),
		service("panic", 13, maps.StandingPanic, backend("ws1", func(*maps.WantedBackend) {}),
			backend("ws2", func(b *maps.WantedBackend) { failed(b, maps.HealthDown) })),
	}
}

// TestBackends: every state of a backend, and of a service, has its words, in list and status alike.
func TestBackends(t *testing.T) {
	e := newEdge(t)
	e.apply(shownEdge()) // chat and web of before are leaving: they have other backends
	e.noHop(netip.MustParseAddr("10.0.0.27"))
	for _, s := range []struct{ name, want string }{
		{"chat", `
SERVICE  BACKEND         ADDRESS        STATE                                         WEIGHT                  SINCE  LAST FAILURE
chat     a-up            10.0.0.11:443  up                                            1                       5h12m  timeout after 1s, 3h20m ago
chat     b-unchecked     10.0.0.12:443  up                                            1                           -  -
chat     c-weight        10.0.0.13:443  up                                            5 (configured 1)        5h12m  -
chat     d-slow          10.0.0.14:443  up                                            10, 30 % of it yet      5h12m  -
chat     e-percent       10.0.0.15:443  up                                            10, 50 % of it by its check  5h12m  -
chat     f-drain         10.0.0.16:443  draining: by command                          0                       5h12m  -
chat     g-check-drain   10.0.0.17:443  draining: by its check's answer               0                       5h12m  -
chat     h-ordered-0     10.0.0.18:443  draining: weight 0 by command                 0 (configured 1)        5h12m  -
chat     i-configured-0  10.0.0.19:443  draining                                      0                       5h12m  -
chat     j-disabled      10.0.0.20:443  disabled                                      0                           -  -
chat     k-down          10.0.0.21:443  down                                          1                       3h20m  connection refused, 3h20m ago
chat     l-held          10.0.0.22:443  held: down, as it went up and down too often  1                       3h20m  connection refused, 3h20m ago
chat     m-unknown       10.0.0.23:443  unknown: not checked yet                      1                       3h20m  -
chat     n-supposed-up   10.0.0.24:443  up: not checked yet                           1                       3h20m  -
chat     o-maintenance   10.0.0.25:443  draining: maintenance, by its check's answer  1                       3h20m  no reason known, 3h20m ago
chat     p-down-drain    10.0.0.26:443  down: and draining, by command                0                       3h20m  connection refused, 3h20m ago
chat     q-no-hop        10.0.0.27:443  no neighbour: it moved                        1                       3h20m  connection refused, 3h20m ago
chat     ws1             10.0.0.11:8765  leaving  1  -  -
chat     ws2             10.0.0.12:8765  leaving  1  -  -
`},
		{"open", `
SERVICE  BACKEND  ADDRESS        STATE                       WEIGHT  SINCE  LAST FAILURE
open     ws1      10.0.0.28:443  down, tried: all are down  1       3h20m  connection refused, 3h20m ago
open     ws2      10.0.0.29:443  down, tried: all are down  1       3h20m  connection refused, 3h20m ago
`},
		{"panic", `
SERVICE  BACKEND  ADDRESS        STATE                         WEIGHT  SINCE  LAST FAILURE
panic    ws1      10.0.0.31:443  up                            1       5h12m  -
panic    ws2      10.0.0.32:443  up: though its checks say down  1       3h20m  connection refused, 3h20m ago
`},
	} {
		got := e.want("backends list --service " + s.name)
		if diff := cmp.Diff(cells(s.want), cells(got)); diff != "" {
			t.Errorf("backends list --service %s (-want +got):\n%s\n%s", s.name, diff, got)
		}
		// Status says the same.
		status := e.want("status --service " + s.name)
		for _, line := range strings.Split(strings.TrimSpace(s.want), "\n")[1:] {
			words := strings.Fields(line)
			if i := strings.Index(status, "    "+words[1]+" "); i < 0 || !strings.Contains(status[i:], stateOf(e, s.name, words[1])) {
				t.Errorf("status of %s/%s differs:\n%s", s.name, words[1], status)
			}
		}
	}
	for name, want := range map[string]string{
		"open":  "dsr, 2 backends, all down: trying all\n",
		"reset": "dsr, 1 backend, all down: new connections are answered RST\n",
		"panic": "dsr, 2 backends, panic: checks' verdict is off\n",
		"web":   "dsr, 2 backends, leaving\n",
	} {
		if got := e.want("status --service " + name); !strings.Contains(got, want) {
			t.Errorf("status of %s lacks %s:\n%s", name, want, got)
		}
	}
	status := e.want("status --service panic")
	if !strings.Contains(status, "LAST FAILURE\n") || !strings.Contains(status, "connection refused, 3h20m ago\n") {
		t.Errorf("status lacks the last failure:\n%s", status)
	}
	if got := e.want("status --service web"); strings.Contains(got, "LAST FAILURE") {
		t.Errorf("status has room for failures that were not:\n%s", got)
	}

	e.dsrConnect("198.51.100.7:40000", "chat", "k-down")
	e.dsrConnect("198.51.100.7:40001", "chat", "k-down")
	if got := e.want("backends list -o wide --service chat"); !strings.Contains(cells(got),
		"chat|k-down|10.0.0.21:443|dsr|down|1|2|down|3h20m|connection refused, 3h20m ago\n") {
		t.Errorf("wide:\n%s", got)
	}
	for _, line := range strings.Split(strings.TrimSpace(e.want("backends list -o jsonl --service chat")), "\n") {
		item := decoded[map[string]any](t, line)
		if item["name"] != "k-down" {
			continue
		}
		since, failed := item["health_since_seconds"].(float64), item["last_failure_seconds"].(float64)
		if since < 12000 || since > 12060 || failed != since {
			t.Errorf("since %v, failed %v", since, failed)
		}
		delete(item, "health_since_seconds")
		delete(item, "last_failure_seconds")
		if diff := cmp.Diff(map[string]any{
			"service": "chat", "service_address": "192.0.2.10:443", "name": "k-down", "address": "10.0.0.21:443", "method": "dsr",
			"state": "down", "tried": false, "weight": 1.0, "configured_weight": 1.0, "weight_percent": 100.0, "orders": []any{},
			"health": "down", "last_failure": "connection refused", "connections": 2.0,
		}, item); diff != "" {
			t.Errorf("jsonl (-want +got):\n%s", diff)
		}
	}
	items := decoded[[]backendItem](t, e.want("backends list -o json"))
	if n := len(items); n != 19+2+1+2+2 {
		t.Errorf("%d backends", n)
	}
	for _, i := range items {
		if i.Name == "c-weight" && (i.Weight != 5 || i.Configured != 1 || fmt.Sprint(i.Orders) != "[weight]" || i.FailedAgo != nil) {
			t.Errorf("%+v", i)
		}
	}
	if got := decoded[statusReport](t, e.want("status -o json --service open")).Services[0]; got.State != "all down" ||
		got.Reason != "trying all" || !got.Backends[0].Tried || got.Backends[0].Health != "down" {
		t.Errorf("json of status: %+v", got)
	}
	e.refused("backends list --service mail", exitFailed, "there is no service mail: there are chat, open, panic, reset, web")

	text := e.want("explain 203.0.113.9:1 open")
	if !strings.Contains(text, "new connections are tried on them all the same") {
		t.Errorf("explain where all are down:\n%s", text)
	}
	if text = e.want("explain 203.0.113.9:1 panic"); !strings.Contains(text, "their checks' verdict is off") {
		t.Errorf("explain in panic:\n%s", text)
	}
}

// cells are a table's, without what aligns them.
func cells(text string) string {
	var lines []string
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		var row []string
		for cell := range strings.SplitSeq(line, "  ") {
			if cell = strings.TrimSpace(cell); cell != "" {
				row = append(row, cell)
			}
		}
		lines = append(lines, strings.Join(row, "|"))
	}
	return strings.Join(lines, "\n") + "\n"
}

// stateOf is what backends list says of a backend.
func stateOf(e *edge, service, name string) string {
	for _, i := range decoded[[]backendItem](e.t, e.want("backends list -o json --service "+service)) {
		if i.Name == name {
			return i.stateText()
		}
	}
	e.t.Errorf("no backend %s/%s is listed", service, name)
	return ""
}

// noHop takes an address's next hop away.
func (e *edge) noHop(a netip.Addr) {
	e.t.Helper()
	_, err := e.manager.SetNextHops(map[netip.Addr]maps.NextHop{a: {Reason: "it moved"}})
	must(e.t, err)
	e.inv, err = e.manager.Set().Inventory()
	must(e.t, err)
}

// dsrConnect puts a connection into the table that needs no more than its name.
func (e *edge) dsrConnect(client, service, backend string) {
	e.t.Helper()
	b, key := e.backend(service, backend), e.tuple4(client)
	must(e.t, e.loader.Maps().Connections4.Put(&key, &bpf.FairleadConnection{
		Backend: b.ID, Service: b.Service, Opened: maps.Now(), Seen: maps.Now(), State: uint32(maps.StateStateless),
	}))
}

// connectionOf is a condemned connection to a backend, which has been told.
func connectionOf(b maps.Backend) bpf.FairleadConnection {
	return bpf.FairleadConnection{
		Backend: b.ID, Service: b.Service, Opened: maps.Now(), Seen: maps.Now(), Timestamp: 77, TimestampEcho: 88,
		State: uint32(maps.StateStateless | maps.StateCondemned | maps.StateBackendTold),
	}
}
