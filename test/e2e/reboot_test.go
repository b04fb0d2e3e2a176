package e2e

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead/test/lab"
)

var reboots = flag.Int("reboots", 300, "WebSockets of each form of TestReboot")

// TestReboot is a reboot of the edge, as near as it goes with its clients and backends alive: the daemon is killed, and
// every pin, map and link is gone. Meanwhile the set of backends changes, so that the ring alone would send connections
// elsewhere, and one backend that has connections leaves. Everybody goes on sending. Started again, the daemon has the
// connections from its disk: each is where it was.
func TestReboot(t *testing.T) {
	t.Parallel()
	for _, f := range []form{
		{"fullnat", 4, 4}, {"fullnat", 6, 6}, {"nat", 4, 4}, {"nat", 6, 6}, {"dsr", 4, 4}, {"dsr", 6, 6}, {"ipip", 4, 4}, {"ipip", 6, 4},
	} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			testReboot(t, f, *reboots)
		})
	}
}

func testReboot(t *testing.T, f form, n int) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.TwoArm, f, 4, lab.Options{})
	s = websockets.of(s)
	for _, b := range topo.Backends() {
		mustServe(t, b)
	}
	if f.method == "fullnat" {
		// Of XDP's own: while nothing is attached nobody answers backends either.
		sources, err := topo.SourceAddresses(s.address, 1)
		if err != nil {
			t.Fatal(err)
		}
		s.extra = append(s.extra, fmt.Sprintf("source_addresses: [%q]", sources[0]))
	}
	all := s.backends
	s.backends = all[:3]
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	e.write(s)
	e.start()
	clients, err := websockets.start(topo.Clients)
	if err != nil {
		t.Fatal(err)
	}
	k := &talk{edge: e, talkers: clients, kind: websockets, topo: topo, service: s, ctx: ctx}
	before := k.openMore(n)
	if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: max(float64(n)/2, 300)}); err != nil {
		t.Fatal(err)
	}
	k.echoes("at first")
	time.Sleep(time.Second) // so much may be lost

	e.kill()
	e.unload()
	s.backends = append(slices.Clone(all[1:]), backend{"new", all[0].address, 3}) // another name is another backend
	s.backends[0].weight = 2
	e.write(s)
	down := time.Now()
	e.start()
	if !strings.Contains(e.log(), fmt.Sprintf("connections restored\" connections=%d", n)) {
		t.Errorf("not all %d connections were restored:\n%s", n, e.log())
	}
	t.Logf("away for %v", time.Since(down).Round(time.Millisecond))
	k.echoes("after the reboot")
	if st := k.stats(); st.Live != n {
		t.Errorf("%d connections of %d live", st.Live, n)
	}
	// Newcomers go by the new ring.
	st := k.openMore(max(n/5, 60))
	if got := st.Servers[all[3].name] - before.Servers[all[3].name]; got == 0 {
		t.Errorf("no newcomer reached the new backend: %v", st.Servers)
	}
	k.echoes("with newcomers")
	if _, err := clients.Quiet(ctx); err != nil {
		t.Fatal(err)
	}
	st = k.stats()
	t.Logf("opened %d, moved %d, broken %d, echoed %d, lost %d, slowest echo %v", k.opened, st.Moved, st.Broken, st.Echoed, st.Lost,
		st.Slowest)
	if _, err := clients.Close(ctx); err != nil {
		t.Fatal(err)
	}
	set := e.open()
	e.until("the connection table is empty", func() bool { return set.Control.Connections() == 0 })
	e.until("the backend that had left is gone", func() bool {
		inv, err := set.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		return len(inv.Backends) == 4
	})
	if young := set.Control.Young(); young != 0 {
		t.Errorf("%d young entries are counted in an empty table", young)
	}
}
