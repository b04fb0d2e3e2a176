package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/test/lab"
)

var (
	kills     = flag.Int("kills", 8, "how often TestKilled kills the daemon")
	upgrades  = flag.Int("upgrades", 6, "how often TestUpgrades replaces it")
	witnesses = flag.Int("witnesses", 300, "WebSockets of TestKilled and TestUpgrades")
)

// launch starts the daemon, and does not wait.
func (e *edge) launch() {
	e.t.Helper()
	cmd := e.node.Command(context.Background(), os.Args[0])
	cmd.Env = append(os.Environ(), daemonVariable+"="+e.config)
	process, err := e.node.Start(cmd)
	if err != nil {
		e.t.Fatal(err)
	}
	e.process, e.reloads = process, 0
}

// mustCrowd opens WebSockets that talk, for tests that do things to the daemon. A process of clients has so many at most.
func mustCrowd(t *testing.T, ctx context.Context, e *edge, topo *lab.Topology, s service, n int) []*talk {
	t.Helper()
	var crowd []*talk
	for first := 0; first < n; first += lab.MaxClients {
		clients, err := websockets.start(topo.Clients)
		if err != nil {
			t.Fatal(err)
		}
		k := &talk{edge: e, talkers: clients, kind: websockets, topo: topo, service: s, ctx: ctx}
		crowd = append(crowd, k)
		k.opened = first // ports of their own
		k.openMore(min(n-first, lab.MaxClients))
		k.opened -= first
		if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: max(float64(k.opened)/5, 500)}); err != nil {
			t.Fatal(err)
		}
		k.echoes("at first")
	}
	return crowd
}

// TestKilled: the daemon is killed at random moments: at work, in the middle of a change of backends, in the middle of its
// start. It is started again, and no connection ever notices.
func TestKilled(t *testing.T) {
	t.Parallel()
	for _, f := range []form{{"fullnat", 4, 4}, {"dsr", 6, 6}} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			testKilled(t, f)
		})
	}
}

func testKilled(t *testing.T, f form) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.TwoArm, f, 5, lab.Options{})
	s = websockets.of(s)
	for _, b := range topo.Backends() {
		mustServe(t, b)
	}
	all := s.backends
	s.backends = all[:3]
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	e.write(s)
	e.start()
	crowd := mustCrowd(t, ctx, e, topo, s, *witnesses)
	random := rand.New(rand.NewPCG(uint64(*kills), uint64(f.clients)))
	starting, changing := 0, 0
	for range *kills {
		switch random.IntN(3) {
		case 0: // at work
			time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond)
		case 1: // in a change
			s.backends = slices.Clone(all[random.IntN(2) : 3+random.IntN(3)])
			s.backends[0].weight = 1 + random.IntN(3)
			e.write(s)
			if err := e.process.Signal(unix.SIGHUP); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
			changing++
		case 2: // in its start
			e.kill()
			e.launch()
			time.Sleep(time.Duration(random.IntN(1200)) * time.Millisecond)
			starting++
		}
		e.kill()
		e.start()
		for _, k := range crowd {
			k.stats()
		}
	}
	quietly(t, ctx, e, crowd, fmt.Sprintf("%d kills, %d of them in a change, and %d more in a start", *kills, changing, starting))
}

// quietly ends the talk and looks whether anything was lost.
func quietly(t *testing.T, ctx context.Context, e *edge, crowd []*talk, what string) {
	t.Helper()
	set := e.open()
	sum, live := lab.ClientStats{}, 0
	for _, k := range crowd {
		k.echoes(what)
		if _, err := k.Quiet(ctx); err != nil {
			t.Fatal(err)
		}
		st := k.stats()
		if st.Live != k.opened {
			t.Errorf("%d connections of %d live", st.Live, k.opened)
		}
		live += st.Live
		sum.Echoed += st.Echoed
		sum.Lost += st.Lost
		sum.Slowest = max(sum.Slowest, st.Slowest)
	}
	e.until("the connection table holds what is open", func() bool { return int(set.Control.Connections()) == live })
	t.Logf("%s: %d connections live, %d messages echoed, %d lost, slowest echo %v", what, live, sum.Echoed, sum.Lost, sum.Slowest)
	for _, k := range crowd {
		if _, err := k.Close(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// TestUpgrades: the daemon is stopped, and started with another program and another wish for the size of the table: the
// program is replaced in place, the table stays whole, and why it keeps its size is said.
func TestUpgrades(t *testing.T) {
	t.Parallel()
	for _, f := range []form{{"fullnat", 4, 4}, {"dsr", 4, 4}} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			testUpgrades(t, f)
		})
	}
}

func testUpgrades(t *testing.T, f form) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.TwoArm, f, 3, lab.Options{})
	s = websockets.of(s)
	for _, b := range topo.Backends() {
		mustServe(t, b)
	}
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms", "connections: 100000")
	e.write(s)
	e.start()
	crowd := mustCrowd(t, ctx, e, topo, s, *witnesses)
	said := 0
	for i := range *upgrades {
		if err := e.process.Stop(); err != nil {
			t.Fatal(err)
		}
		services := []service{s}
		if i%2 == 0 { // a service by UDP, and affinity by client: more of the program is there
			e.global[3] = "connections: 200000"
			services = append(services, s.at("udp", flowPort, "affinity: client"))
		} else {
			e.global[3] = "connections: 100000"
		}
		e.write(services...)
		e.start()
		if strings.Contains(e.log(), "keep their size") {
			said++
		}
		for _, k := range crowd {
			k.stats()
		}
	}
	if said < (*upgrades+1)/2 {
		t.Errorf("the size of the table was said to stay %d times in %d", said, *upgrades)
	}
	quietly(t, ctx, e, crowd, fmt.Sprintf("%d upgrades", *upgrades))
}
