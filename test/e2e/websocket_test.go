package e2e

import (
	"context"
	"flag"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead/test/lab"
)

var connections = flag.Int("connections", 1500, "WebSockets of each form of TestWebSockets")

const websocketPort = 8000

// TestWebSockets is the promise on real WebSockets, with real packets through the kernel: a backend comes, a backend goes,
// the daemon is killed and started again while messages flow; no connection breaks, none moves.
func TestWebSockets(t *testing.T) {
	for _, form := range []struct{ prefix, method, family string }{
		{"e2enat4", "fullnat", "IPv4"}, {"e2enat6", "fullnat", "IPv6"}, {"e2edsr4", "dsr", "IPv4"}, {"e2edsr6", "dsr", "IPv6"},
	} {
		t.Run(form.method+"/"+form.family, func(t *testing.T) {
			testWebSockets(t, form.prefix, form.method, form.family == "IPv6")
		})
	}
}

// arms is lab.OneArm or lab.TwoArm.
type arms func(prefix string, options lab.Options) (*lab.Topology, error)

// mustTopology builds a lab, and the service that its backends are to serve.
func mustTopology(t *testing.T, build arms, prefix, method string, v6 bool, backends int, options lab.Options) (*lab.Topology, service) {
	t.Helper()
	options.Backends, options.ClientAddresses = backends, 8
	if method == "dsr" {
		options.DSRServices = lab.DefaultServices()
	}
	topo, err := build(prefix, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := topo.Close(); err != nil {
			t.Error(err)
		}
	})
	addresses := topo.Services
	if method == "dsr" {
		addresses = lab.DefaultServices()
	}
	s := service{method: method, port: websocketPort}
	for _, a := range addresses {
		if a.Is6() == v6 {
			s.address = a
		}
	}
	for _, b := range topo.Backends() {
		s.backends = append(s.backends, backend{b.Name(), b.Address(s.address), 1})
	}
	return topo, s
}

// interfacesOf is the configuration's line that names the edge's interfaces.
func interfacesOf(topo *lab.Topology) string {
	if topo.EdgeFront == topo.EdgeBack {
		return fmt.Sprintf("interfaces: [%s]", topo.EdgeFront)
	}
	return fmt.Sprintf("interfaces: [%s, %s]", topo.EdgeFront, topo.EdgeBack)
}

func mustServe(t *testing.T, b *lab.Backend) {
	t.Helper()
	listen := []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), websocketPort)}
	if _, err := b.StartServer(lab.ServerOptions{Listen: listen}); err != nil {
		t.Fatal(err)
	}
}

func testWebSockets(t *testing.T, prefix, method string, v6 bool) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.TwoArm, prefix, method, v6, 4, lab.Options{})
	for _, b := range topo.Backends() {
		mustServe(t, b)
	}
	all := s.backends
	s.backends = all[:3]
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 1s")
	e.write(s)
	e.start()
	set := e.open()

	clients, err := topo.Clients.StartClients()
	if err != nil {
		t.Fatal(err)
	}
	stats := func() lab.ClientStats {
		t.Helper()
		st, err := clients.Stats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if st.Broken+st.Moved+st.Wrong+st.Failed+st.ClosedByServer > 0 {
			t.Fatalf("%d broken, %d moved, %d wrong, %d failed, %d closed by their server: %v\n%s", st.Broken, st.Moved,
				st.Wrong, st.Failed, st.ClosedByServer, st.Failures, e.log())
		}
		return st
	}
	opened := 0
	open := func(n int) lab.ClientStats {
		t.Helper()
		err := clients.Open(ctx, lab.OpenOptions{
			Target: s.addrPort(), Sources: topo.ClientAddresses(s.address), Count: n, FirstPort: uint16(20000 + opened),
		})
		if err != nil {
			t.Fatalf("open %d WebSockets: %v\n%s", n, err, e.log())
		}
		opened += n
		return stats()
	}
	// echoes waits until every connection there is has had time to echo.
	echoes := func(what string) {
		t.Helper()
		before := stats().Echoed
		e.until("messages are echoed "+what, func() bool { return int(stats().Echoed-before) >= opened })
	}

	n := *connections
	began := time.Now()
	st := open(n)
	t.Logf("%d WebSockets open in %v: %v", n, time.Since(began).Round(time.Millisecond), st.Servers)
	for _, b := range s.backends {
		share := float64(n) / 3
		off := float64(st.Servers[b.name])/share - 1
		t.Logf("%s: %d, %+.2f %% off its share", b.name, st.Servers[b.name], off*100)
		// A hash spreads as chance does: four standard deviations of a binomial share.
		if limit := 4 * math.Sqrt(share*2/3) / share; math.Abs(off) > limit {
			t.Errorf("%s has %d of %d connections, %.1f %% off its share; chance allows %.1f %%", b.name, st.Servers[b.name],
				n, off*100, limit*100)
		}
	}
	if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: max(float64(n)/2, 1000)}); err != nil {
		t.Fatal(err)
	}
	echoes("at first")

	s.backends = all
	e.reload(s)
	echoes("after a backend was added")
	if st = open(n / 10); st.Servers[all[3].name] == 0 {
		t.Errorf("no new connection reached the new backend: %v", st.Servers)
	}
	s.backends = slices.Clone(all[1:])
	old := st.Servers[all[0].name]
	e.reload(s)
	echoes("after a backend was taken out")
	if st = open(n / 10); st.Servers[all[0].name] != old {
		t.Errorf("%d new connections reached the backend that was taken out", st.Servers[all[0].name]-old)
	}
	if entries := set.Control.Connections(); int(entries) != opened {
		t.Errorf("%d connections are open, the connection table holds %d", opened, entries)
	}

	e.kill()
	before := stats().Echoed
	for deadline := time.Now().Add(20 * time.Second); int(stats().Echoed-before) < opened; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("with the daemon killed, only %d messages were echoed within 20 s", stats().Echoed-before)
		}
	}
	if st = open(n / 10); st.Servers[all[0].name] != old {
		t.Errorf("with the daemon killed, new connections reached the backend that was taken out")
	}
	e.start()
	echoes("after the daemon was killed and started again")
	if entries := set.Control.Connections(); int(entries) != opened {
		t.Errorf("%d connections are open, the connection table holds %d", opened, entries)
	}

	if _, err := clients.Quiet(ctx); err != nil {
		t.Fatal(err)
	}
	st = stats()
	if st.Sent != st.Echoed || st.Live != opened {
		t.Errorf("%d messages sent, %d echoed; %d opened, %d live", st.Sent, st.Echoed, opened, st.Live)
	}
	t.Logf("opened %d, moved %d, broken %d, messages echoed %d, slowest echo %v", opened, st.Moved, st.Broken, st.Echoed, st.Slowest)
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
