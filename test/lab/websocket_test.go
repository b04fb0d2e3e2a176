package lab

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const port = 8765

func mustServer(t testing.TB, n *Node) *Server {
	t.Helper()
	s, err := n.StartServer(ServerOptions{Listen: []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), port)}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustClients(t testing.TB, n *Node) *Clients {
	t.Helper()
	c, err := n.StartClients()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func mustStats(t testing.TB, c *Clients) ClientStats {
	t.Helper()
	stats, err := c.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return stats
}

// With no forwarder between them, clients and servers tell of a network that breaks nothing.
func TestWebSockets(t *testing.T) {
	for _, masquerade := range []bool{false, true} {
		t.Run(fmt.Sprintf("masquerade %v", masquerade), func(t *testing.T) {
			ctx := t.Context()
			topology := mustOpen(t, OneArm, "ws", Options{Backends: 2, Masquerade: masquerade})
			clients := mustClients(t, topology.Clients)
			servers := map[string]*Server{}
			for _, backend := range topology.Backends() {
				servers[backend.Name()] = mustServer(t, backend.Node)
			}
			if err := clients.Chatter(ctx, ChatterOptions{Rate: 5000}); err != nil {
				t.Fatal(err)
			}
			// 500 in all, over both families, opened while the earlier ones chatter.
			first := uint16(20000)
			for _, backend := range topology.Backends() {
				for _, family := range families {
					err := clients.Open(ctx, OpenOptions{
						Target:    netip.AddrPortFrom(backend.Address(family), port),
						Sources:   topology.ClientAddresses(family),
						Count:     125,
						FirstPort: first,
					})
					if err != nil {
						t.Fatal(err)
					}
					first += 1000
				}
			}
			await(t, "2000 echoes", func() bool { return mustStats(t, clients).Echoed >= 2000 })

			connections, err := clients.Connections(ctx)
			if err != nil {
				t.Fatal(err)
			}
			ids, locals := map[string]bool{}, map[netip.AddrPort]bool{}
			for _, c := range connections {
				locals[c.Local] = true
				if masquerade && c.Seen.Addr() != topology.RouterAddress(c.Local.Addr()) {
					t.Errorf("%v is seen as %v, want the router's address", c.Local, c.Seen)
				} else if !masquerade && c.Seen != c.Local {
					t.Errorf("%v is seen as %v", c.Local, c.Seen)
				}
				ids[fmt.Sprint(c.Server, c.ID)] = true
			}
			if len(ids) != 500 {
				t.Errorf("%d different connections, want 500", len(ids))
			}
			for i := range 125 { // of the first server's over IPv4, by OpenOptions.FirstPort
				want := netip.AddrPortFrom(topology.ClientAddresses(families[0])[i%16], 20000+uint16(i/16))
				if !locals[want] {
					t.Errorf("no connection comes from %v", want)
				}
			}

			stats, err := clients.Quiet(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if stats.Sent != stats.Echoed || stats.Awaiting != 0 {
				t.Errorf("when quiet, %d sent, %d echoed, %d awaited", stats.Sent, stats.Echoed, stats.Awaiting)
			}
			wantSpread := map[string]int{"ws1": 250, "ws2": 250}
			if diff := cmp.Diff(wantSpread, stats.Servers); diff != "" {
				t.Errorf("spread (-want +got):\n%s", diff)
			}
			if stats, err = clients.Hangup(ctx, 100); err != nil || stats.Live != 400 || stats.Closed != 100 {
				t.Errorf("after hanging up 100: %d live, %d closed, %v", stats.Live, stats.Closed, err)
			}
			if stats, err = clients.Close(ctx); err != nil {
				t.Fatal(err)
			}
			want := ClientStats{
				Opened: 500, Closed: 500, Sent: stats.Sent, Echoed: stats.Sent, Slowest: stats.Slowest,
				Servers: map[string]int{"ws1": 0, "ws2": 0},
			}
			if diff := cmp.Diff(want, stats); diff != "" {
				t.Errorf("final counts (-want +got):\n%s", diff)
			}
			for name, server := range servers {
				await(t, name+" to be empty", func() bool {
					stats, err := server.Stats(ctx)
					return err == nil && stats.Live == 0 && stats.Accepted == 250
				})
				if err := server.Close(ctx); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestFaultsShow(t *testing.T) {
	ctx := t.Context()
	topology := mustOpen(t, OneArm, "fault", Options{Backends: 3})
	clients := mustClients(t, topology.Clients)
	var servers []*Server
	for _, backend := range topology.Backends() {
		servers = append(servers, mustServer(t, backend.Node))
		err := clients.Open(ctx, OpenOptions{
			Target: netip.AddrPortFrom(backend.IPv4, port), Sources: topology.ClientAddresses(backend.IPv4), Count: 20,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := clients.Chatter(ctx, ChatterOptions{Rate: 500, Timeout: time.Second}); err != nil {
		t.Fatal(err)
	}

	// A crash.
	if err := servers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := servers[0].Stats(ctx); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a killed server's stats: %v", err)
	}
	await(t, "20 broken", func() bool { return mustStats(t, clients).Broken == 20 })
	// An orderly end.
	if err := servers[1].Close(ctx); err != nil {
		t.Fatal(err)
	}
	await(t, "20 closed by the server", func() bool { return mustStats(t, clients).ClosedByServer == 20 })
	// A server that hangs, with its connections open.
	if err := servers[2].Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	await(t, "20 more broken", func() bool { return mustStats(t, clients).Broken == 40 })

	stats := mustStats(t, clients)
	kinds := map[string]int{}
	for _, f := range stats.Failures {
		kinds[f.Kind]++
	}
	if diff := cmp.Diff(map[string]int{"broken": 10, "closed by server": 10}, kinds); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	if stats.Live != 0 || stats.Moved != 0 || stats.Wrong != 0 || stats.Failed != 0 {
		t.Errorf("other counts: %+v", stats)
	}
	// Nobody listens there.
	err := clients.Open(ctx, OpenOptions{Target: netip.AddrPortFrom(topology.Backends()[0].IPv4, port), Count: 3})
	if err == nil || !strings.Contains(err.Error(), "3 of 3") || !strings.Contains(err.Error(), "refused") {
		t.Errorf("open to a closed port: %v", err)
	}
	// A caller that gives up is heard.
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	nobody := netip.MustParseAddrPort("10.0.0.199:1")
	err = clients.Open(short, OpenOptions{Target: nobody, Count: 100, Parallel: 1, Timeout: time.Minute})
	if err == nil {
		t.Error("open to nobody is done")
	}
	await(t, "the dial under way to end", func() bool { return mustStats(t, clients).Failed == 4 })
	if err := clients.Open(ctx, OpenOptions{Target: nobody, Count: MaxClients + 1}); err == nil {
		t.Error("more clients than a process holds")
	}
}

// What a client says of echoes that are not its own.
func TestMovedAndWrong(t *testing.T) {
	r := &clientsRole{stats: ClientStats{Servers: map[string]int{}}}
	c := &client{Connection: Connection{Server: "ws1", ID: 7}, prefix: "ws1 7 "}
	say := func(message, echo string) {
		c.message, c.sent = message, time.Now()
		r.echoed(c, echo)
	}
	say("1 ~", "ws1 7 1 ~")
	say("2 ~", "ws2 7 2 ~")
	say("3 ~", "ws1 8 3 ~")
	say("4 ~", "ws1 7 3 ~")
	r.echoed(c, "ws1 7 4 ~") // one that nobody waits for
	if s := r.counts(); s.Echoed != 1 || s.Moved != 1 || s.Wrong != 2 || len(s.Failures) != 3 {
		t.Errorf("counts: %+v, want 1 echoed, 1 connection moved, 2 wrong", s)
	}
}

// Two servers share an address and port, and connections are spread over both.
func TestReusePort(t *testing.T) {
	topology := mustOpen(t, OneArm, "reuse", Options{Backends: 1})
	backend := topology.Backends()[0]
	for _, name := range []string{"one", "two"} {
		if _, err := backend.StartServer(ServerOptions{
			Name: name, Listen: []netip.AddrPort{netip.AddrPortFrom(backend.IPv4, port)}, ReusePort: true,
		}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := backend.StartServer(ServerOptions{Listen: []netip.AddrPort{netip.AddrPortFrom(backend.IPv4, port)}}); err == nil {
		t.Error("a server that shares with nobody listens beside two others")
	}
	clients := mustClients(t, topology.Clients)
	if err := clients.Open(t.Context(), OpenOptions{Target: netip.AddrPortFrom(backend.IPv4, port), Count: 100}); err != nil {
		t.Fatal(err)
	}
	if stats := mustStats(t, clients); stats.Servers["one"] == 0 || stats.Servers["two"] == 0 || stats.Live != 100 {
		t.Errorf("100 connections went to %v", stats.Servers)
	}
}

func TestHealthPath(t *testing.T) {
	topology := mustOpen(t, OneArm, "health", Options{Backends: 1})
	backend := topology.Backends()[0]
	server := mustServer(t, backend.Node)
	target := netip.AddrPortFrom(backend.IPv6, port)
	clients := mustClients(t, topology.Edge)
	if err := clients.Open(t.Context(), OpenOptions{Target: target, Path: HealthPath, Count: 1}); err != nil {
		t.Fatal(err)
	}
	url := "http://" + target.String() + HealthPath
	output, err := topology.Edge.Command(t.Context(), "curl", "-sS", "-m5", "-w%{http_code}", url).CombinedOutput()
	if err != nil || string(output) != fmt.Sprintf("ws1 is well\n%d", http.StatusOK) {
		t.Errorf("GET %s: %q, %v", HealthPath, output, err)
	}
	if stats, err := server.Stats(t.Context()); err != nil || stats != (ServerStats{}) {
		t.Errorf("health checks count: %+v, %v", stats, err)
	}
}

func TestKeep(t *testing.T) {
	prefix := prefixOf(t, "keep")
	topology, err := OneArm(prefix, Options{Backends: 1})
	if err != nil {
		t.Fatal(err)
	}
	server := mustServer(t, topology.Backends()[0].Node)
	clients := mustClients(t, topology.Clients)
	err = clients.Open(t.Context(), OpenOptions{Target: netip.AddrPortFrom(topology.Backends()[0].IPv4, port), Count: 10})
	if err != nil {
		t.Fatal(err)
	}
	if err := clients.Chatter(t.Context(), ChatterOptions{Rate: 100}); err != nil {
		t.Fatal(err)
	}
	if err := topology.Keep(); err != nil {
		t.Fatal(err)
	}
	// As if the one who kept it had ended.
	clients.input.Close()
	before, err := server.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the chatter to go on", func() bool {
		now, err := server.Stats(t.Context())
		return err == nil && now.Live == 10 && now.Echoed > before.Echoed+20
	})
	if err := Sweep(prefix); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*Process{server.Process, clients.Process} {
		<-p.Done()
	}
}
