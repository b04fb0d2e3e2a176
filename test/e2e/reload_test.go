package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps"
	"fairlead/test/lab"
)

// chatting is a topology with a running edge and WebSockets that talk through it.
type chatting struct {
	*edge
	topo    *lab.Topology
	service service
	clients *lab.Clients
	ctx     context.Context
	opened  int
}

func mustChat(t *testing.T, method string, backends, connections int) *chatting {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	topo, s := mustTopology(t, lab.TwoArm, form{method, 4, 4}, backends, lab.Options{})
	for _, b := range topo.Backends() {
		mustServe(t, b)
	}
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	e.write(s)
	e.start()
	clients, err := topo.Clients.StartClients()
	if err != nil {
		t.Fatal(err)
	}
	c := &chatting{edge: e, topo: topo, service: s, clients: clients, ctx: ctx}
	c.open(connections)
	if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *chatting) open(n int) {
	c.t.Helper()
	if err := c.clients.Open(c.ctx, lab.OpenOptions{
		Target: c.service.addrPort(), Sources: c.topo.ClientAddresses(c.service.address), Count: n,
	}); err != nil {
		c.t.Fatalf("open %d WebSockets: %v\n%s", n, err, c.log())
	}
	c.opened += n
}

// unhurt waits until every connection there is had time to echo, and fails if any has broken or moved.
func (c *chatting) unhurt() {
	c.t.Helper()
	stats := func() lab.ClientStats {
		st, err := c.clients.Stats(c.ctx)
		if err != nil {
			c.t.Fatal(err)
		}
		if st.Broken+st.Moved+st.Wrong+st.Failed+st.ClosedByServer > 0 {
			c.t.Fatalf("connections were hurt: %+v\n%s", st, c.log())
		}
		return st
	}
	before := stats().Echoed
	c.until("messages are echoed", func() bool { return int(stats().Echoed-before) >= 2*c.opened })
}

func (c *chatting) hangUp() {
	c.t.Helper()
	c.process.Signal(unix.SIGHUP)
}

func (c *chatting) logged(text string) {
	c.t.Helper()
	c.until("the log says "+text, func() bool { return strings.Contains(c.log(), text) })
}

func (c *chatting) inventory(set *maps.Set) *maps.Inventory {
	c.t.Helper()
	inv, err := set.Inventory()
	if err != nil {
		c.t.Fatal(err)
	}
	return inv
}

// TestReload: a bad file changes nothing and says where and what; a good one takes effect whole.
func TestReload(t *testing.T) {
	c := mustChat(t, "dsr", 2, 100)
	set := c.edge.open()

	if err := os.WriteFile(c.config, []byte("services:\n- name: x\n  adress: 192.0.2.10\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c.hangUp()
	c.logged("adress")
	c.unhurt()

	// What can't be changed on a living service is refused; the rest of that file is not applied either.
	odd := c.service
	odd.extra = []string{"ring_size: 1009"}
	odd.backends = append(odd.backends[:len(odd.backends):len(odd.backends)], backend{"ws9", c.topo.Backends()[0].Address(odd.address).Next().Next().Next(), 1})
	c.write(odd)
	c.hangUp()
	c.logged("ring_size 1009")
	if n := len(c.inventory(set).Backends); n != 2 {
		t.Errorf("a refused reload left %d backends, want 2", n)
	}
	c.unhurt()

	// Another service of another method and family asks for a program with other constants: it is replaced in place.
	before := c.attachments()
	other := c.service
	other.method, other.address, other.port = "fullnat", netip.MustParseAddr("2001:db8::99"), 9000
	other.backends = nil
	for _, b := range c.topo.Backends() {
		other.backends = append(other.backends, backend{b.Name(), b.Address(other.address), 1})
	}
	c.edge.reload(c.service, other)
	c.unhurt()
	after := c.attachments()
	if len(before) != 2 || len(after) != 2 || before[0].Link != after[0].Link || before[0].Program == after[0].Program {
		t.Errorf("want the same links with another program; before %+v, after %+v", before, after)
	}
	if n := len(c.inventory(set).Services); n != 2 {
		t.Errorf("%d services, want 2", n)
	}
	// It leaves again at once: nobody is connected to it.
	c.edge.reload(c.service)
	c.until("the other service is gone", func() bool { return len(c.inventory(set).Services) == 1 })
	c.unhurt()

	// Weight 0 drains.
	drained := c.service
	drained.backends = []backend{drained.backends[0], {drained.backends[1].name, drained.backends[1].address, 0}}
	c.edge.reload(drained)
	st, err := c.clients.Stats(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	c.open(100)
	now, err := c.clients.Stats(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if name := drained.backends[1].name; now.Servers[name] != st.Servers[name] {
		t.Errorf("a backend of weight 0 got %d new connections", now.Servers[name]-st.Servers[name])
	}
	c.unhurt()
}

func (c *chatting) attachments() (list []loader.Attachment) {
	c.t.Helper()
	if err := c.node.Do(func() (err error) { list, err = loader.Links(c.pinPath); return err }); err != nil {
		c.t.Fatal(err)
	}
	return list
}

// TestLeaving: a service that leaves the configuration keeps its connections. Who comes new is refused at once: by RST, and
// by ICMP where there is none.
func TestLeaving(t *testing.T) {
	t.Parallel()
	for _, what := range []kind{websockets, udpFlows} {
		for _, f := range []form{{"nat", 4, 4}, {"fullnat", 6, 6}, {"ipip", 6, 4}} {
			t.Run(what.name+"/"+f.String(), func(t *testing.T) {
				t.Parallel()
				testLeaving(t, what, f)
			})
		}
	}
}

func testLeaving(t *testing.T, what kind, f form) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.OneArm, f, 2, lab.Options{Masquerade: true})
	s = what.of(s)
	for _, b := range topo.Backends() {
		what.serve(t, b)
	}
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	// The other is of the other protocol, at the same address and port.
	other := s
	other.protocol, other.extra = map[string]string{"tcp": "udp", "udp": "tcp"}[s.protocol], slices.DeleteFunc(slices.Clone(s.extra),
		func(line string) bool { return strings.HasPrefix(line, "idle_timeout") })
	e.write(s, other)
	e.start()
	start := func() *talk {
		t.Helper()
		clients, err := what.start(topo.Clients)
		if err != nil {
			t.Fatal(err)
		}
		return &talk{edge: e, talkers: clients, kind: what, topo: topo, service: s, ctx: ctx}
	}
	old, late := start(), start()
	old.openMore(60)
	if err := old.Chatter(ctx, lab.ChatterOptions{Rate: 1000}); err != nil {
		t.Fatal(err)
	}
	set := e.open()
	e.until("the connections are confirmed", func() bool { return int(set.Control.Connections()) == old.opened })
	e.reload(other)
	old.echoes("after the service left")
	const attempts = 20
	before, began := e.count(set, "reset_leaving"), time.Now()
	err := late.Open(ctx, lab.OpenOptions{
		Target: s.addrPort(), Sources: topo.ClientAddresses(s.address), Count: attempts, Parallel: 1,
	})
	if !allRefused(err, attempts) {
		t.Errorf("open %d %s of a service that left: %v, want all refused\n%s", attempts, what.name, err, e.story())
	}
	if n := e.count(set, "reset_leaving") - before; n != attempts {
		t.Errorf("%d refusals are counted as reset_leaving, want %d", n, attempts)
	}
	t.Logf("%d were refused in %v", attempts, time.Since(began).Round(time.Millisecond))
	old.echoes("at last")
}

// allRefused tells whether an error of lab's Open says that each of n connections was refused.
func allRefused(err error, n int) bool {
	return err != nil && strings.Contains(err.Error(), fmt.Sprintf("%d of %[1]d", n)) && strings.Contains(err.Error(), "refused")
}

// TestNeighbors: a backend whose Ethernet address changes is followed; one without a neighbour is said so, gets no new
// connections, and gets them again when it is there.
func TestNeighbors(t *testing.T) {
	c := mustChat(t, "dsr", 2, 60)
	set := c.edge.open()
	b := c.topo.Backends()[0]
	if err := b.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetHardwareAddr(link, net.HardwareAddr{2, 0, 0, 0, 0, 0x77})
	}); err != nil {
		t.Fatal(err)
	}
	// It asks for the edge anew, and the edge learns from the question.
	c.until("the new Ethernet address is known", func() bool {
		if err := b.Do(func() error {
			conn, err := net.Dial("udp", netip.AddrPortFrom(c.topo.EdgeAddress(c.service.address), 9).String())
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = conn.Write([]byte("hello"))
			return err
		}); err != nil {
			t.Log(err) // it may have been refused for the last one
		}
		for _, have := range c.inventory(set).Backends {
			if have.NextHop.MAC == [6]byte{2, 0, 0, 0, 0, 0x77} {
				return true
			}
		}
		return false
	})
	c.unhurt()

	ghost := c.service
	ghost.backends = append(ghost.backends[:2:2], backend{"ghost", netip.MustParseAddr("10.0.0.200"), 1})
	c.edge.reload(ghost)
	c.until("the ghost is said to be without a neighbour", func() bool {
		for _, have := range c.inventory(set).Backends {
			if have.Name == "ghost" && !have.NextHop.Known && strings.Contains(have.NextHop.Reason, "10.0.0.200") {
				return true
			}
		}
		return false
	})
	c.open(60) // every SYN finds another backend
	c.unhurt()
}

// TestDefaultInterfaces: nobody names an interface. Those towards backends and those of default routes are found, and they
// stay as long as living connections may need them.
func TestDefaultInterfaces(t *testing.T) {
	topo, s := mustTopology(t, lab.TwoArm, form{"fullnat", 4, 4}, 2, lab.Options{})
	for _, b := range topo.Backends() {
		mustServe(t, b)
	}
	e := newEdge(t, topo, "xdp: native", "epoch: 500ms")
	e.write(s)
	e.start()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	clients, err := topo.Clients.StartClients()
	if err != nil {
		t.Fatal(err)
	}
	c := &chatting{edge: e, topo: topo, service: s, clients: clients, ctx: ctx}
	c.open(50)
	if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	c.unhurt()
	// The only backend now is one on the other interface: the old ones' interface is kept for their connections.
	elsewhere := s
	elsewhere.backends = []backend{{"elsewhere", topo.RouterAddress(s.address), 1}}
	if err := topo.Edge.AddRoute(netip.PrefixFrom(elsewhere.backends[0].address, 32), frontGateway(t, topo)); err != nil {
		t.Fatal(err)
	}
	c.edge.reload(elsewhere)
	c.unhurt()
	c.kill()
	c.start()
	c.unhurt()
	if n := len(c.attachments()); n != 2 {
		t.Errorf("%d interfaces are attached, want 2", n)
	}
}

// frontGateway is the router's address on the front segment.
func frontGateway(t *testing.T, topo *lab.Topology) netip.Addr {
	t.Helper()
	addresses, err := topo.Router.Addresses("front")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if a.Is4() {
			return a
		}
	}
	t.Fatal("the router has no IPv4 address on the front segment")
	return netip.Addr{}
}
