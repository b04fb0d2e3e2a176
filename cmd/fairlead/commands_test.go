package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
	"fairlead/loader"
	"fairlead/maps"
)

const testPins = "/sys/fs/bpf/fairlead-test-cli"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustDuration(t testing.TB, text string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(text)
	must(t, err)
	return d
}

// edge is an edge host with pinned maps of a known content: a namespace of the test's own, that of its thread.
type edge struct {
	t       *testing.T
	loader  *loader.Loader
	manager *maps.Manager
	stop    func() error // closes manager
	inv     *maps.Inventory
}

func sweepPins(t *testing.T) {
	t.Helper()
	dirs, err := filepath.Glob(testPins + "/*")
	must(t, err)
	for _, dir := range dirs {
		if _, err := loader.Unload(dir); err != nil && !errors.Is(err, loader.ErrNothing) {
			t.Fatalf("remove what an earlier run left: %v", err)
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if err := os.Remove(testPins); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

func newEdge(t *testing.T) *edge {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a namespace (this test needs root): %v", err)
	}
	sweepPins(t)
	t.Cleanup(func() { sweepPins(t) })
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "flcli"}, PeerName: "flclip"}))

	e := &edge{t: t}
	var err error
	e.loader, err = loader.Open(loader.Options{
		PinPath: testPins + "/check", Interfaces: []string{"flcli"}, Logger: slog.New(slog.DiscardHandler),
		Settings: loader.Settings{IPv4: true, IPv6: true, FullNAT: true, DSR: true, AffinityClient: true, Connections: 4096,
			HalfOpen: 1024},
	})
	must(t, err)
	t.Cleanup(func() { e.loader.Close() })
	must(t, e.loader.Attach())
	programs := e.loader.Programs()
	e.manager, err = maps.NewManager(e.loader.Maps(), maps.ManagerOptions{
		Tend: programs.Tend, Fill: programs.Fill, Epoch: time.Second, Logger: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	e.stop = sync.OnceValue(e.manager.Close) // memory is given back once
	t.Cleanup(func() { e.stop() })
	e.apply(edgeServices())
	return e
}

func edgeServices() []maps.WantedService {
	source := []maps.WantedSource{{Address: netip.MustParseAddr("10.0.0.1"), First: 20000, Last: 20999}}
	backend := func(name, address string, method maps.Method, weight uint32, sources []maps.WantedSource) maps.WantedBackend {
		a := netip.MustParseAddrPort(address)
		return maps.WantedBackend{Name: name, Address: a.Addr(), Port: a.Port(), Method: method, Weight: weight, Sources: sources}
	}
	return []maps.WantedService{{
		Name: "chat", Keys: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.10:443")}, Protocol: 6, RingSize: 1009,
		IdleTimeout: 24 * time.Hour,
		Backends: []maps.WantedBackend{
			backend("ws1", "10.0.0.11:8765", maps.MethodFullNAT, 1, source),
			backend("ws2", "10.0.0.12:8765", maps.MethodFullNAT, 1, source),
		},
	}, {
		Name: "web", Protocol: 6, RingSize: 503, AffinityClient: true,
		Keys: []netip.AddrPort{
			netip.MustParseAddrPort("[2001:db8::10]:80"), netip.MustParseAddrPort("[2001:db8::10]:81"),
		},
		OnBackendDown: maps.DownKeep, IdleTimeout: time.Hour,
		Backends: []maps.WantedBackend{
			backend("ws1", "[2001:db8::a]:80", maps.MethodDSR, 3, nil),
			backend("ws9", "[2001:db8::9]:80", maps.MethodDSR, 1, nil),
		},
	}}
}

// apply makes the maps hold these services. 2001:db8::9 has no neighbour.
func (e *edge) apply(services []maps.WantedService) {
	e.t.Helper()
	_, err := e.manager.Apply(maps.Wanted{Services: services}, func(a netip.Addr) maps.NextHop {
		if a == netip.MustParseAddr("2001:db8::9") {
			return maps.NextHop{Reason: "no route"}
		}
		return maps.NextHop{Known: true, Interface: 2, MAC: [6]byte{2, 0, 0, 0, 0, 1}, SourceMAC: [6]byte{2, 0, 0, 0, 0, 2}, MTU: 1500}
	})
	must(e.t, err)
	e.inv, err = e.manager.Set().Inventory()
	must(e.t, err)
}

func (e *edge) backend(service, name string) maps.Backend {
	e.t.Helper()
	for _, b := range e.inv.Backends {
		if s, _ := e.inv.Service(b.Service); s.Name == service && b.Name == name {
			return b
		}
	}
	e.t.Fatalf("no backend %s/%s", service, name)
	return maps.Backend{}
}

// other is the name of the backend of chat that the ring does not name for a client, and named the one that it does.
func (e *edge) chosen(client string) (named, other string) {
	e.t.Helper()
	chat := e.inv.Services[0]
	x, err := e.manager.Set().Explain(e.inv, netip.MustParseAddrPort(client), chat)
	must(e.t, err)
	if x.Backend.Name == "ws1" {
		return "ws1", "ws2"
	}
	return "ws2", "ws1"
}

func ago(d time.Duration) uint32 { return maps.Now() - maps.Ticks(d) }

func wire(port uint16) uint16 { return port<<8 | port>>8 }

func words4(address string) uint32 {
	b := netip.MustParseAddr(address).As4()
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

func (e *edge) tuple4(client string) bpf.FairleadTuple4 {
	a := netip.MustParseAddrPort(client)
	return bpf.FairleadTuple4{Saddr: words4(a.Addr().String()), Daddr: words4("192.0.2.10"), Sport: wire(a.Port()), Dport: wire(443), Protocol: 6}
}

// connect puts an entry into the connection table behind everyone's back.
func (e *edge) connect(client, backend string, state bpf.FairleadConnectionState, sourcePort uint16) {
	e.t.Helper()
	b := e.backend("chat", backend)
	key := e.tuple4(client)
	must(e.t, e.loader.Maps().Connections4.Put(&key, &bpf.FairleadConnection{
		Backend: b.ID, Service: b.Service, Generation: 7, State: uint32(state), SourcePort: wire(sourcePort),
		Opened: ago(5*time.Hour + 12*time.Minute + 30*time.Second), Seen: ago(2*time.Hour + 10*time.Minute + 30*time.Second),
		SequenceEnd: 1000, Acknowledgement: 2000, Hop: bpf.FairleadHop{Mac: [6]uint8{2, 0, 0, 0, 0, 7}},
	}))
}

func (e *edge) halfConnect(client, backend string, age time.Duration) {
	e.t.Helper()
	b := e.backend("chat", backend)
	key := e.tuple4(client)
	must(e.t, e.loader.Maps().HalfOpen4.Put(&key, &bpf.FairleadHalfOpen{
		Backend: b.ID, Service: b.Service, Generation: 8, First: ago(age), SourcePort: wire(20001),
	}))
	// Its way back, without which its port would be another's.
	back := e.tuple4(netip.AddrPortFrom(b.Address, b.Port).String())
	back.Daddr, back.Dport = words4(e.inv.Sources[0].Address.String()), wire(20001)
	must(e.t, e.loader.Maps().HalfReplies4.Put(&back, &bpf.FairleadReply4{
		Back: bpf.FairleadWayBack{Generation: 8, First: ago(age)}, Client: key,
	}))
}

// want runs a command that is to succeed.
func (e *edge) want(line string) string {
	e.t.Helper()
	code, stdout, stderr := fairlead(e.t, strings.Fields(line)...)
	if code != exitDone || stderr != "" {
		e.t.Errorf("%s: exit code %d, %s", line, code, stderr)
	}
	return stdout
}

func (e *edge) refused(line string, code int, part string) {
	e.t.Helper()
	got, _, stderr := fairlead(e.t, strings.Fields(line)...)
	if got != code || !strings.Contains(stderr, part) {
		e.t.Errorf("%s: exit code %d, want %d; %q, want %q", line, got, code, stderr, part)
	}
}

func (e *edge) golden(line, want string, hide ...string) {
	e.t.Helper()
	got := e.want(line)
	for i := 0; i < len(hide); i += 2 {
		got = regexp.MustCompile(hide[i]).ReplaceAllString(got, hide[i+1])
	}
	if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), got); diff != "" {
		e.t.Errorf("%s (-want +got):\n%s", line, diff)
	}
}

// sorted is a table with its rows in order: tables are walked in no order.
func sorted(text string) string {
	lines := strings.SplitAfter(text, "\n")
	if len(lines) > 1 {
		slices.Sort(lines[1:])
	}
	return strings.Join(lines, "")
}

func decoded[T any](t *testing.T, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

const (
	clientA = "198.51.100.7:40000"
	clientB = "198.51.100.7:40001"
	clientC = "203.0.113.9:50000"
	clientD = "203.0.113.9:50001" // half-open
	clientE = "203.0.113.9:50002" // its half-open life is over
)

// TestPinned asks everything of pinned maps that a daemon left behind.
func TestPinned(t *testing.T) {
	e := newEdge(t)
	namedA, otherA := e.chosen(clientA)
	namedB, _ := e.chosen(clientB)
	e.connect(clientA, namedA, 0, 20500)
	e.connect(clientB, namedB, bpf.FairleadConnectionStateSTATE_IDLE, 20501)
	e.connect(clientC, "ws1", bpf.FairleadConnectionStateSTATE_CLIENT_FIN, 20502)
	e.halfConnect(clientD, "ws2", 30*time.Second)
	e.halfConnect(clientE, "ws2", 80*time.Second)
	e.halfConnect(clientA, "ws2", 30*time.Second) // confirmed, not taken out of the half-open table yet

	// Not subtests: those run on other threads, outside of the namespace.
	part := func(name string, test func()) {
		t.Log(name)
		test()
	}

	part("connections list", func() {
		want := `CLIENT              SERVICE  BACKEND  STATE          AGE   IDLE  PLANE
198.51.100.7:40000  chat     ` + namedA + `      established  5h12m  2h10m  xdp
198.51.100.7:40001  chat     ` + namedB + `      idle         5h12m  2h10m  xdp
203.0.113.9:50000   chat     ws1      half-closed  5h12m  2h10m  xdp
203.0.113.9:50001   chat     ws2      half-open      30s      -  xdp
`
		got := regexp.MustCompile(`3\ds `).ReplaceAllString(sorted(e.want("connections list")), "30s ")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		for filter, want := range map[string][]string{
			"":                                    {clientA, clientB, clientC, clientD},
			"--service chat":                      {clientA, clientB, clientC, clientD},
			"--service 192.0.2.10:443":            {clientA, clientB, clientC, clientD},
			"--service web":                       nil,
			"--backend chat/ws1 --state idle":     onlyIf(namedB == "ws1", clientB),
			"--backend web/ws1":                   nil,
			"--client 203.0.113.9":                {clientC, clientD},
			"--client 198.51.100.0/24":            {clientA, clientB},
			"--client " + clientC:                 {clientC},
			"--state half-open":                   {clientD},
			"--state idle,established":            {clientA, clientB},
			"--state idle --state half-closed":    {clientB, clientC},
			"--idle 2h":                           {clientA, clientB, clientC},
			"--idle 3h":                           nil,
			"--plane xdp --client 203.0.113.0/30": nil,
		} {
			var got []string
			for _, line := range strings.Split(e.want("connections list -o jsonl "+filter), "\n") {
				if line != "" {
					got = append(got, decoded[connectionItem](t, line).Client.String())
				}
			}
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", filter, diff)
			}
		}
		items := decoded[[]map[string]any](t, e.want("connections list -o json --client "+clientA))
		delete(items[0], "age_seconds")
		delete(items[0], "idle_seconds")
		delete(items[0], "slot")
		if diff := cmp.Diff(map[string]any{
			"client": clientA, "service": "chat", "service_address": "192.0.2.10:443", "protocol": "tcp", "backend": namedA,
			"backend_address": "10.0.0.1" + namedA[2:] + ":8765", "method": "fullnat", "plane": "xdp", "state": "established",
			"source": "10.0.0.1:20500", "slot_backend": namedA, "settled": true, "exception": false, "fresh": false,
			"sequence_end": 1000.0, "acknowledgement": 2000.0, "client_mac": "02:00:00:00:00:07", "generation": 7.0,
		}, items[0]); diff != "" {
			t.Errorf("json (-want +got):\n%s", diff)
		}
		if got := e.want("connections list -o json --service web"); got != "[]\n" {
			t.Errorf("an empty array is %q", got)
		}
		if got := e.want("flows list -o wide"); !strings.Contains(got, "10.0.0.1:20502") || !strings.Contains(got, "02:00:00:00:00:07") {
			t.Errorf("wide:\n%s", got)
		}
		e.refused("connections list --service mail", exitFailed, "there is no service mail: there are chat, web")
		e.refused("connections list --backend ws3", exitFailed, "there is no backend ws3: there are chat/ws1, chat/ws2, web/ws1, web/ws9")
	})

	part("connections count", func() {
		e.golden("connections count", "4\n")
		e.golden("connections count --client 198.51.100.7 --state idle", "1\n")
		if got := decoded[map[string]any](t, e.want("connections count -o json")); got["connections"] != 4.0 {
			t.Errorf("json: %v", got)
		}
		if got := e.want("connections count -o wide"); !strings.Contains(got, "half-closed") || !strings.Contains(got, "all ") {
			t.Errorf("wide:\n%s", got)
		}
	})

	part("connections get", func() {
		hide := []string{`slot        \d+ `, "slot        N "}
		want := `
client      198.51.100.7:40000
service     chat (192.0.2.10:443)
backend     ` + namedA + ` (10.0.0.1` + namedA[2:] + `:8765, by fullnat)
state       established
age         5h12m
idle        2h10m
plane       xdp
source      10.0.0.1:20500
slot        N ` + namedA + `
exception   no
fresh       no
sequence    1000
ack         2000
client-mac  02:00:00:00:00:07
generation  7
`
		e.golden("connections get "+clientA+" chat", want, hide...)
		e.golden("connections get "+clientA, want, hide...)
		e.golden("connections get "+clientA+"->192.0.2.10:443", want, hide...)
		if got := e.want("connections get -o json " + clientD); !strings.Contains(got, `"state":"half-open"`) ||
			!strings.Contains(got, `"idle_seconds":null`) {
			t.Errorf("half-open: %s", got)
		}
		e.refused("connections get 198.51.100.7:1 chat", exitFailed, "fairlead explain 198.51.100.7:1 chat")
		e.refused("connections get "+clientE, exitFailed, "no connection from")
		e.refused("connections get 198.51.100.7:1 mail", exitFailed, "there are chat, web")
	})

	part("explain", func() {
		hide := []string{`0x[0-9a-f]{16}`, "HASH", `slot           \d+`, "slot           N"}
		e.golden("explain "+clientA+" chat", `
198.51.100.7:40000 to chat (192.0.2.10:443) goes to `+namedA+` (10.0.0.1`+namedA[2:]+`:8765, by fullnat), by rule: table.
The connection table has it: established, 5h12m old, last seen 2h10m ago, seen by its backend as 10.0.0.1:20500.
The ring names the same backend.

  hash           HASH, of the 4-tuple
  slot           N of 1009: `+namedA+`, settled
  exception bit  clear
  fresh bit      clear
  fast path      no: fullnat needs its entry
`, hide...)
		named, _ := e.chosen("198.51.100.200:1")
		e.golden("explain 198.51.100.200:1 192.0.2.10:443", `
198.51.100.200:1 to chat (192.0.2.10:443) goes to `+named+` (10.0.0.1`+named[2:]+`:8765, by fullnat), by rule: settled slot.
No table has it, so the ring decides.
A new connection goes to `+named+`.
A packet in mid-connection is answered RST: fullnat can't forward it without an entry.

  hash           HASH, of the 4-tuple
  slot           N of 1009: `+named+`, settled
  exception bit  clear
  fresh bit      clear
  fast path      no: fullnat needs its entry
`, hide...)
		// An entry that the ring would send elsewhere.
		e.connect(clientA, otherA, 0, 20500)
		defer e.connect(clientA, namedA, 0, 20500)
		got := decoded[map[string]any](t, e.want("explain "+clientA+" chat -o json"))
		if got["rule"] != "table" || got["backend"] != otherA || got["slot_backend"] != namedA {
			t.Errorf("an exception: %v", got)
		}
		if text := e.want("explain " + clientA + " chat"); !strings.Contains(text,
			"The ring would send a new connection from there to "+namedA+": this one is an exception, and stays.") {
			t.Errorf("an exception:\n%s", text)
		}
		if text := e.want("explain [2001:db8::7]:9 web"); !strings.Contains(text, "of the client's address chooses the slot") {
			t.Errorf("affinity by client:\n%s", text)
		}
		e.refused("explain 198.51.100.7:1 web", exitFailed, "must be of its family")
		e.refused("explain 198.51.100.7:1 mail", exitFailed, "there is no service mail: there are chat, web")
	})

	part("status", func() {
		got := decoded[statusReport](t, e.want("status -o json --connections"))
		if got.Node != "edge-1" || !got.Daemon.Running || got.Daemon.PID != os.Getpid() {
			t.Errorf("node %q, daemon %+v", got.Node, got.Daemon)
		}
		if len(got.Interfaces) != 1 || got.Interfaces[0].Name != "flcli" || got.Interfaces[0].Mode != "native" {
			t.Errorf("interfaces %+v", got.Interfaces)
		}
		if got.Tables.HalfOpen == nil || *got.Tables.HalfOpen != 1 || got.Tables.ConnectionsCapacity != 4096 {
			t.Errorf("tables %+v", got.Tables)
		}
		if n := got.Services[0].Connections; n == nil || *n != 3 {
			t.Errorf("connections of chat: %v", n)
		}
		share := 0.0
		for _, b := range got.Services[0].Backends {
			share += b.Share
		}
		if share < 0.999 || share > 1.001 {
			t.Errorf("shares sum up to %v", share)
		}
		e.golden("status", `
node edge-1, daemon running, pid N, pins in /sys/fs/bpf/fairlead-test-cli/check

INTERFACES
  NAME   XDP     PROGRAM  LINK
  flcli  native  N N

TABLES
  connections 0 of 4096 (0.0 %), 0 of them young

ADDRESSES
  ADDRESS       USE      ARP, NDP, ECHO
  10.0.0.1      source   the host's, or routed here
  192.0.2.10    service  the host's, or routed here
  2001:db8::10  service  the host's, or routed here

SERVICES
  chat  192.0.2.10:443/tcp  fullnat, 2 backends, up
    BACKEND  ADDRESS         WEIGHT  STATE   SHARE  PACKETS  BYTES  NEW
    ws1      10.0.0.11:8765       1  up     50.0 %        0    0 B    0
    ws2      10.0.0.12:8765       1  up     50.0 %        0    0 B    0
  web  [2001:db8::10]:80/tcp and 1 more  dsr, 2 backends, up
    BACKEND  ADDRESS           WEIGHT  STATE                     SHARE  PACKETS  BYTES  NEW
    ws1      [2001:db8::a]:80       3  up                      100.0 %        0    0 B    0
    ws9      [2001:db8::9]:80       1  no neighbour: no route    0.0 %        0    0 B    0

VERDICTS
  none

EVENTS
  none
`, `pid \d+`, "pid N", `PROGRAM +LINK`, "PROGRAM  LINK", `native +\d+ +\d+`, "native  N N", `(50\.|49\.)\d %`, "50.0 %")
		if text := e.want("status --service chat -o wide"); strings.Contains(text, "web") ||
			!strings.Contains(text, "half-open 1, room for 1024 of each family") || !strings.Contains(text, "3 connections") {
			t.Errorf("wide, of one service:\n%s", text)
		}
		if text := e.want("status --rates --service chat"); !strings.Contains(text, "NEW/S") {
			t.Errorf("rates:\n%s", text)
		}
		e.refused("status --service mail", exitFailed, "there are chat, web")
	})

	part("maps", func() {
		items := decoded[[]mapItem](t, e.want("maps list -o json"))
		var names []string
		for _, m := range items {
			names = append(names, m.Name)
			if m.Purpose == "" || m.Memory == 0 || m.MaxEntries == 0 {
				t.Errorf("map %+v", m)
			}
			rows := e.want("maps dump " + m.Name + " -o json")
			list := decoded[[]map[string]any](t, rows)
			if text := e.want("maps dump " + m.Name); len(list) > 0 && strings.Count(text, "\n") != len(list)+1 {
				t.Errorf("%s has %d entries, and its table:\n%s", m.Name, len(list), text)
			}
		}
		if diff := cmp.Diff(maps.TableNames(), names); diff != "" {
			t.Errorf("names (-want +got):\n%s", diff)
		}
		ring := decoded[[]map[string]any](t, e.want("maps dump rings --service web -o json"))
		if len(ring) != 503 || ring[0]["service"] != "web" || ring[0]["settled"] != true {
			t.Errorf("ring of web: %d slots, first %v", len(ring), ring[0])
		}
		e.golden("maps dump sources", `
NUMBER  ADDRESS   FIRST-PORT  LAST-PORT
     0  10.0.0.1       20000      20999
`)
		e.golden("maps dump services4", `
ADDRESS         PROTOCOL  NUMBER  SERVICE  RING-SIZE  FLAGS  ON-BACKEND-DOWN
192.0.2.10:443  tcp            0  chat          1009  -      reset
`)
		if text := e.want("maps dump services6"); strings.Count(text, "  1  web            503  affinity_client,ring_first  keep\n") != 2 {
			t.Errorf("both ports of web:\n%s", text)
		}
		e.golden("maps dump port_flags", `
FIRST-PORT  LAST-PORT  MAY-BE
        80         81  service
       443        443  service
     20000      20999  source
`)
		e.golden("maps dump ports -o jsonl", `
{"pool":0,"queue":"unused","capacity":1000,"head":20000,"source":"10.0.0.1","backend":"10.0.0.11:8765"}
{"pool":0,"queue":"handed_out","capacity":1000,"head":0,"source":"10.0.0.1","backend":"10.0.0.11:8765"}
{"pool":1,"queue":"unused","capacity":1000,"head":20000,"source":"10.0.0.1","backend":"10.0.0.12:8765"}
{"pool":1,"queue":"handed_out","capacity":1000,"head":0,"source":"10.0.0.1","backend":"10.0.0.12:8765"}
`)
		if text := e.want("maps dump half_open4"); strings.Count(text, "\n") != 4 || !strings.Contains(text, clientE) {
			t.Errorf("half_open4:\n%s", text)
		}
		e.refused("maps dump ring", exitFailed, "there is no map ring: there are addresses4")
		e.refused("maps dump rings --service mail", exitFailed, "there are chat, web")
	})

	// A reload that takes ws2 and web out: they stay for their connections.
	part("leaving", func() {
		services := edgeServices()[:1]
		services[0].Backends = services[0].Backends[:1]
		e.apply(services)
		got := decoded[statusReport](t, e.want("status -o json"))
		if b := got.Services[0].Backends[1]; b.Name != "ws2" || b.State != "leaving" || b.Share != 0 {
			t.Errorf("backend %+v", b)
		}
		if got.Services[1].State != "leaving" {
			t.Errorf("service %+v", got.Services[1])
		}
		if text := e.want("explain " + clientD + " chat"); !strings.Contains(text, "by rule: half-open") ||
			!strings.Contains(text, "The backend is leaving") {
			t.Errorf("explain:\n%s", text)
		}
		if text := e.want("explain [2001:db8::7]:9 web"); !strings.Contains(text, "a new connection is answered RST") {
			t.Errorf("explain:\n%s", text)
		}
	})

	part("no neighbour", func() {
		services := edgeServices()
		services[1].Backends = services[1].Backends[1:]
		e.apply(services)
		text := e.want("explain [2001:db8::7]:9 web")
		if !strings.Contains(text, "No backend in reach") || !strings.Contains(text, "ws9 has no next hop (no route)") {
			t.Errorf("explain:\n%s", text)
		}
	})

	part("unload", func() {
		e.refused("unload", exitFailed, "another fairlead (pid")
		must(t, e.stop())
		must(t, e.loader.Close())
		if text := e.want("status"); !strings.Contains(text, "daemon not running: forwarding goes on without it") {
			t.Errorf("without a daemon:\n%s", text)
		}
		if text := e.want("unload"); !strings.Contains(text, "removed "+testPins+"/check/v3/link_flcli\n") {
			t.Errorf("unload:\n%s", text)
		}
		e.refused("unload", exitNothing, "nothing is attached")
		e.refused("status", exitNothing, "nothing is attached")
	})
}

func onlyIf(is bool, client string) []string {
	if is {
		return []string{client}
	}
	return nil
}
