package e2e

import (
	"context"
	"flag"
	"math"
	"slices"
	"testing"
	"time"

	"fairlead/test/lab"
)

var (
	connections = flag.Int("connections", 300, "WebSockets of each form of TestWebSockets")
	flows       = flag.Int("flows", 200, "UDP flows of each form of TestFlows")
)

const (
	websocketPort = 8000
	flowPort      = 4433
)

// TestWebSockets is the promise on real WebSockets, with real packets through the kernel: a backend comes, a backend goes,
// the daemon is killed and started again while messages flow; no connection breaks, none moves.
func TestWebSockets(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			testTalk(t, f, websockets, *connections)
		})
	}
}

// TestFlows is the same promise for UDP: flows shaped as QUIC's, whose every byte is compared in both directions.
func TestFlows(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			testTalk(t, f, udpFlows, *flows)
		})
	}
}

// talkers are clients that talk through a service: lab.Clients or lab.Flows.
type talkers interface {
	Open(context.Context, lab.OpenOptions) error
	Chatter(context.Context, lab.ChatterOptions) error
	Quiet(context.Context) (lab.ClientStats, error)
	Stats(context.Context) (lab.ClientStats, error)
	Close(context.Context) (lab.ClientStats, error)
}

// kind is what talks through a service.
type kind struct {
	name  string
	of    func(service) service
	start func(*lab.Node) (talkers, error)
	// serve starts a backend's server, and returns how to look at the end whether all was well with it.
	serve func(*testing.T, *lab.Backend) func(context.Context)
}

var (
	websockets = kind{
		name: "WebSockets", of: func(s service) service { return s.at("tcp", websocketPort) },
		start: func(n *lab.Node) (talkers, error) { return n.StartClients() },
		serve: func(t *testing.T, b *lab.Backend) func(context.Context) {
			mustServe(t, b)
			return func(context.Context) {}
		},
	}
	udpFlows = kind{
		// Nothing says that a flow has ended but its silence.
		name: "flows", of: func(s service) service { return s.at("udp", flowPort, "idle_timeout: 2s") },
		start: func(n *lab.Node) (talkers, error) { return n.StartFlows() },
		serve: func(t *testing.T, b *lab.Backend) func(context.Context) {
			server := mustServeFlows(t, b)
			return func(ctx context.Context) {
				if stats, err := server.Stats(ctx); err != nil || stats.Wrong > 0 {
					t.Errorf("%s met %d datagrams that no client had sent, %s, %v", b.Name(), stats.Wrong, stats.Reason, err)
				}
			}
		},
	}
)

// talk is clients that talk through a service of an edge.
type talk struct {
	*edge
	talkers
	kind    kind
	topo    *lab.Topology
	service service
	ctx     context.Context
	opened  int
}

// stats fails the test if any connection was hurt.
func (k *talk) stats() lab.ClientStats {
	k.t.Helper()
	st, err := k.talkers.Stats(k.ctx)
	if err != nil {
		k.t.Fatal(err)
	}
	if st.Broken+st.Moved+st.Wrong+st.Failed+st.ClosedByServer > 0 || st.Lost > int(st.Sent)/100 {
		k.t.Fatalf("%d broken, %d moved, %d wrong, %d failed, %d closed by their server, %d of %d lost: %v\n%s", st.Broken,
			st.Moved, st.Wrong, st.Failed, st.ClosedByServer, st.Lost, st.Sent, st.Failures, k.story())
	}
	return st
}

// openMore opens n more, from ports of their own.
func (k *talk) openMore(n int) lab.ClientStats {
	k.t.Helper()
	err := k.talkers.Open(k.ctx, lab.OpenOptions{
		Target: k.service.addrPort(), Sources: k.topo.ClientAddresses(k.service.address), Count: n, FirstPort: uint16(20000 + k.opened),
	})
	if err != nil {
		k.t.Fatalf("open %d %s: %v\n%s", n, k.kind.name, err, k.story())
	}
	k.opened += n
	return k.stats()
}

// echoes waits until every connection there is has had time to echo.
func (k *talk) echoes(what string) {
	k.t.Helper()
	before := k.stats().Echoed
	for deadline := time.Now().Add(30 * time.Second); int(k.stats().Echoed-before) < k.opened; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			k.t.Fatalf("%s, only %d messages of %d %s were echoed within 30 s\n%s", what, k.stats().Echoed-before, k.opened,
				k.kind.name, k.story())
		}
	}
}

// even compares how many connections each of n backends has with what chance allows.
func (k *talk) even(st lab.ClientStats, backends []backend) {
	k.t.Helper()
	for _, b := range backends {
		share := float64(k.opened) / float64(len(backends))
		off := float64(st.Servers[b.name])/share - 1
		k.t.Logf("%s: %d, %+.2f %% off its share", b.name, st.Servers[b.name], off*100)
		// A hash spreads as chance does: four standard deviations of a binomial share.
		if limit := 4 * math.Sqrt(share*(1-1/float64(len(backends)))) / share; math.Abs(off) > limit {
			k.t.Errorf("%s has %d of %d %s, %.1f %% off its share; chance allows %.1f %%", b.name, st.Servers[b.name],
				k.opened, k.kind.name, off*100, limit*100)
		}
	}
}

func testTalk(t *testing.T, f form, what kind, n int) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.TwoArm, f, 4, lab.Options{})
	s = what.of(s)
	var well []func(context.Context)
	for _, b := range topo.Backends() {
		well = append(well, what.serve(t, b))
	}
	all := s.backends
	s.backends = all[:3]
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	e.write(s)
	e.start()
	set := e.open()
	clients, err := what.start(topo.Clients)
	if err != nil {
		t.Fatal(err)
	}
	k := &talk{edge: e, talkers: clients, kind: what, topo: topo, service: s, ctx: ctx}
	// inTable waits until the table holds what is open: a flow is in it when it has lasted a second.
	inTable := func() {
		t.Helper()
		e.until("the connection table holds what is open", func() bool { return int(set.Control.Connections()) == k.opened })
	}

	began := time.Now()
	st := k.openMore(n)
	t.Logf("%d %s open in %v: %v", n, what.name, time.Since(began).Round(time.Millisecond), st.Servers)
	k.even(st, s.backends)
	if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: max(float64(n)/2, 1000)}); err != nil {
		t.Fatal(err)
	}
	k.echoes("at first")

	s.backends = all
	e.reload(s)
	k.echoes("after a backend was added")
	if st = k.openMore(max(n/10, 30)); st.Servers[all[3].name] == 0 {
		t.Errorf("no new connection reached the new backend: %v", st.Servers)
	}
	s.backends = slices.Clone(all[1:])
	old := st.Servers[all[0].name]
	e.reload(s)
	k.echoes("after a backend was taken out")
	if st = k.openMore(max(n/10, 30)); st.Servers[all[0].name] != old {
		t.Errorf("%d new connections reached the backend that was taken out", st.Servers[all[0].name]-old)
	}
	inTable()

	e.kill()
	k.echoes("with the daemon killed")
	if st = k.openMore(max(n/10, 30)); st.Servers[all[0].name] != old {
		t.Errorf("with the daemon killed, new connections reached the backend that was taken out")
	}
	e.start()
	k.echoes("after the daemon was killed and started again")
	inTable()

	if _, err := clients.Quiet(ctx); err != nil {
		t.Fatal(err)
	}
	st = k.stats()
	if st.Sent > st.Echoed+uint64(st.Lost) || st.Live != k.opened {
		t.Errorf("%d messages sent, %d echoed, %d lost; %d opened, %d live", st.Sent, st.Echoed, st.Lost, k.opened, st.Live)
	}
	t.Logf("opened %d, moved %d, broken %d, messages echoed %d, lost %d, slowest echo %v", k.opened, st.Moved, st.Broken, st.Echoed,
		st.Lost, st.Slowest)
	for _, look := range well {
		look(ctx)
	}
	if _, err := clients.Close(ctx); err != nil {
		t.Fatal(err)
	}
	// What has ended leaves: the entries, and then the backend.
	e.until("the connection table is empty", func() bool { return set.Control.Connections() == 0 })
	e.until("the backend that was taken out is gone", func() bool {
		inv, err := set.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		return len(inv.Backends) == 3
	})
	if young := set.Control.Young(); young != 0 {
		t.Errorf("%d young entries are counted in an empty table", young)
	}
}
