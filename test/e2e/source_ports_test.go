package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"fairlead/test/lab"
)

var sourcePorts = flag.Int("source-ports", 256, "source ports of TestSourcePorts; 31744 are what a host leaves by default")

// TestSourcePorts uses up the source ports of one source address towards one backend: who comes next is refused at once and
// counted, nobody else is hurt, and ports that are free again are used again without a stall, although the backend
// remembers their last connections (TIME_WAIT). On an address of the host's, and on one of XDP's own.
func TestSourcePorts(t *testing.T) {
	for _, own := range []bool{false, true} {
		t.Run(map[bool]string{false: "host", true: "own"}[own], func(t *testing.T) { testSourcePorts(t, own, *sourcePorts) })
	}
}

func testSourcePorts(t *testing.T, own bool, ports int) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.OneArm, form{"fullnat", 4, 4}, 1, lab.Options{})
	b := topo.Backends()[0]
	source := topo.EdgeAddress(s.address)
	if own {
		addresses, err := topo.SourceAddresses(s.address, 1)
		if err != nil {
			t.Fatal(err)
		}
		source = addresses[0]
	}
	// Both towards the same backend from the same source address: but each port of a backend has source ports of its own.
	const firstPort = 1024
	sources := []string{
		fmt.Sprintf("source_addresses: [%v]", source), fmt.Sprintf("source_ports: %d-%d", firstPort, firstPort+ports-1),
	}
	full, other := s.at("tcp", websocketPort, sources...), s.at("tcp", websocketPort+1, sources...)
	processes := ports/lab.MaxClients + 1
	for i := range processes {
		if _, err := b.StartServer(lab.ServerOptions{
			Name:   fmt.Sprintf("%s-%d", b.Name(), i),
			Listen: []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), websocketPort)}, ReusePort: true,
		}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.StartServer(lab.ServerOptions{
		Listen: []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), websocketPort+1)},
	}); err != nil {
		t.Fatal(err)
	}
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	e.write(full, other)
	e.start()
	set := e.open()
	start := func(s service) *talk {
		t.Helper()
		clients, err := topo.Clients.StartClients()
		if err != nil {
			t.Fatal(err)
		}
		return &talk{edge: e, talkers: clients, kind: websockets, topo: topo, service: s, ctx: ctx}
	}

	beside := start(other)
	beside.openMore(50)
	if err := beside.Chatter(ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	// All ports, by several processes, each of which holds a part.
	var crowd []*talk
	for range processes {
		crowd = append(crowd, start(full))
	}
	began := time.Now()
	for i, k := range crowd {
		mustOpenFrom(t, k, ports/processes+min(1, max(0, ports%processes-i)), 20000+3000*i, 0)
	}
	t.Logf("%d connections open in %v", ports, time.Since(began).Round(time.Millisecond))
	e.until("all ports are in use", func() bool { return int(set.Control.Connections()) == ports+beside.opened })

	refused := func(when string) {
		t.Helper()
		const attempts = 20
		before, late := e.count(set, "reset_no_port"), start(full)
		began := time.Now()
		err := late.Open(ctx, lab.OpenOptions{
			Target: full.addrPort(), Sources: topo.ClientAddresses(full.address), Count: attempts,
		})
		if !allRefused(err, attempts) {
			t.Errorf("%s, %d connections more: %v, want all refused\n%s", when, attempts, err, e.story())
		}
		if n := e.count(set, "reset_no_port") - before; n != attempts {
			t.Errorf("%s, %d refusals are counted as reset_no_port, want %d", when, n, attempts)
		}
		t.Logf("%s, %d were refused in %v", when, attempts, time.Since(began).Round(time.Millisecond))
		if _, err := late.Close(ctx); err != nil {
			t.Error(err)
		}
	}
	refused("with all ports in use")
	beside.openMore(50)
	beside.echoes("beside a service without ports")
	for _, k := range crowd {
		if err := k.Chatter(ctx, lab.ChatterOptions{Rate: 3000}); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range crowd {
		k.echoes("with all ports in use")
	}

	// What is given back serves again, at once: half of the ports, twice over, by other clients.
	k, again := crowd[0], ports/processes/2
	for round := range 2 {
		if _, err := k.talkers.(*lab.Clients).Hangup(ctx, again); err != nil {
			t.Fatal(err)
		}
		k.opened -= again
		e.until("the ports are free", func() bool { return int(set.Control.Connections()) == ports-again+beside.opened })
		remembered := mustTimeWait(t, b.Node)
		if remembered < again/2 {
			t.Errorf("round %d: the backend remembers %d of %d connections that have ended: too few to show anything", round,
				remembered, again)
		}
		began := time.Now()
		// A SYN that is lost, or answered with what the client does not take, is sent again after a second.
		mustOpenFrom(t, k, again, 40000+3000*round, time.Second)
		t.Logf("round %d: %d connections by used ports, %d of them in TIME_WAIT at the backend, in %v", round, again, remembered,
			time.Since(began).Round(time.Millisecond))
	}
	refused("with all ports in use again")
	for _, k := range append(crowd, beside) {
		k.echoes("at last")
		if _, err := k.Close(ctx); err != nil {
			t.Error(err)
		}
	}
	e.until("the connection table is empty", func() bool { return set.Control.Connections() == 0 })
}

// mustOpenFrom opens n connections from local ports of their own, each within a time; 0: as lab has it.
func mustOpenFrom(t *testing.T, k *talk, n, firstPort int, each time.Duration) {
	t.Helper()
	err := k.Open(k.ctx, lab.OpenOptions{
		Target: k.service.addrPort(), Sources: k.topo.ClientAddresses(k.service.address), Count: n, FirstPort: uint16(firstPort),
		Timeout: each,
	})
	if err != nil {
		t.Fatalf("open %d WebSockets from port %d on: %v\n%s", n, firstPort, err, k.story())
	}
	k.opened += n
	k.stats()
}

// mustTimeWait counts a node's sockets in TIME_WAIT.
func mustTimeWait(t *testing.T, n *lab.Node) (count int) {
	t.Helper()
	if err := n.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/sockstat")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if _, tail, found := strings.Cut(line, " tw "); found {
				_, err := fmt.Sscan(tail, &count)
				return err
			}
		}
		return errors.New("no line tells")
	}); err != nil {
		t.Fatalf("read the sockets of %s: %v", n.Name(), err)
	}
	return count
}
