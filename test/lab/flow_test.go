package lab

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func mustFlowServer(t testing.TB, n *Node) *FlowServer {
	t.Helper()
	s, err := n.StartFlowServer(ServerOptions{Listen: []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), port)}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustFlows(t testing.TB, n *Node) *Flows {
	t.Helper()
	f, err := n.StartFlows()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func mustFlowStats(t testing.TB, f *Flows) ClientStats {
	t.Helper()
	stats, err := f.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return stats
}

func TestDatagram(t *testing.T) {
	want := datagram{kind: kindAnswer, flow: 1 << 40, sequence: 7, answer: 900, server: "ws1", number: 3}
	for _, size := range []int{minDatagram, 500, MaxWhole, MaxMessage} {
		b := want.encode(size)
		if len(b) != size {
			t.Errorf("%d bytes, want %d", len(b), size)
		}
		got, err := decodeDatagram(b)
		if err != nil || got != want {
			t.Errorf("decoded %+v, %v, want %+v", got, err, want)
		}
		for at := range b {
			b[at] ^= 0x10
			if got, err := decodeDatagram(b); err == nil && got == want {
				t.Errorf("of %d bytes, byte %d may change unnoticed", size, at)
			}
			b[at] ^= 0x10
			if size > 500 {
				break // every byte is compared: once is enough
			}
		}
		if _, err := decodeDatagram(b[:datagramHead-1]); err == nil {
			t.Error("half a head is taken")
		}
	}
}

// With no forwarder between them, flows lose nothing: whole datagrams and fragments, both families, and an address that the
// server holds on lo answers as itself.
func TestFlows(t *testing.T) {
	ctx := t.Context()
	topology := mustOpen(t, TwoArm, "flow", Options{Backends: 2, DSRServices: DefaultServices(), EdgeForwards: true})
	flows := mustFlows(t, topology.Clients)
	servers := map[string]*FlowServer{}
	for _, backend := range topology.Backends() {
		servers[backend.Name()] = mustFlowServer(t, backend.Node)
	}
	if err := flows.Chatter(ctx, ChatterOptions{Rate: 2000}); err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		target := sameFamily(topology.Services, family)[0]
		second := topology.Backends()[1].Address(family)
		if err := topology.Edge.AddRoute(netip.PrefixFrom(target, target.BitLen()), second); err != nil {
			t.Fatal(err)
		}
		for _, to := range []netip.Addr{topology.Backends()[0].Address(family), target} {
			if err := flows.Open(ctx, OpenOptions{
				Target: netip.AddrPortFrom(to, port), Sources: topology.ClientAddresses(family), Count: 50,
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	await(t, "2000 answers", func() bool { return mustFlowStats(t, flows).Echoed >= 2000 })
	fragments, err := topology.Backends()[0].Capture(BackendInterface, func(frame []byte) bool {
		const etherIPv4, moreFragments = 14, 0x20
		return frame[12] == 8 && frame[13] == 0 && frame[etherIPv4+6]&moreFragments != 0
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := flows.Chatter(ctx, ChatterOptions{Rate: 500, Size: 4000}); err != nil {
		t.Fatal(err)
	}
	before := mustFlowStats(t, flows).Echoed
	await(t, "400 large answers", func() bool { return mustFlowStats(t, flows).Echoed >= before+400 })
	if n := len(fragments.Frames()); n == 0 {
		t.Error("datagrams of 4000 bytes came and went without fragments")
	}
	connections, err := flows.Connections(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for _, c := range connections {
		ids[fmt.Sprint(c.Server, c.ID)] = true
	}
	if len(ids) != 200 {
		t.Errorf("%d different flows, want 200", len(ids))
	}
	stats, err := flows.Close(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := ClientStats{
		Opened: 200, Closed: 200, Sent: stats.Sent, Echoed: stats.Sent, Slowest: stats.Slowest,
		Servers: map[string]int{"ws1": 0, "ws2": 0},
	}
	if diff := cmp.Diff(want, stats); diff != "" {
		t.Errorf("final counts (-want +got):\n%s", diff)
	}
	for name, server := range servers {
		stats, err := server.Stats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if stats.Flows != 100 || stats.Wrong != 0 {
			t.Errorf("%s counts %+v, want 100 flows, none wrong", name, stats)
		}
		if err := server.Close(ctx); err != nil {
			t.Error(err)
		}
	}
}

func TestFlowFaultsShow(t *testing.T) {
	ctx := t.Context()
	topology := mustOpen(t, OneArm, "flowfault", Options{Backends: 2})
	flows := mustFlows(t, topology.Clients)
	var servers []*FlowServer
	for _, backend := range topology.Backends() {
		servers = append(servers, mustFlowServer(t, backend.Node))
		if err := flows.Open(ctx, OpenOptions{Target: netip.AddrPortFrom(backend.IPv6, port), Count: 20}); err != nil {
			t.Fatal(err)
		}
	}
	if err := flows.Chatter(ctx, ChatterOptions{Rate: 500, Timeout: 1500 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	// A crash: the kernel says that nobody listens.
	if err := servers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	await(t, "20 broken by an ICMP error", func() bool { return mustFlowStats(t, flows).Broken == 20 })
	// The network goes: a silent end, after some are lost.
	if err := topology.Backends()[1].Do(func() error { return setSysctl("net.ipv6.conf.eth0.disable_ipv6", "1") }); err != nil {
		t.Fatal(err)
	}
	await(t, "20 broken by silence", func() bool { return mustFlowStats(t, flows).Broken == 40 })
	stats := mustFlowStats(t, flows)
	reasons := map[bool]int{}
	for _, f := range stats.Failures {
		reasons[strings.Contains(f.Reason, "refused")]++
	}
	if len(stats.Failures) != samplesKept || reasons[true] == 0 || stats.Lost < 20 || stats.Live+stats.Moved+stats.Wrong != 0 {
		t.Errorf("counts: %+v, want 40 broken, some of them refused, and 20 lost at least", stats)
	}
	err := flows.Open(ctx, OpenOptions{Target: netip.AddrPortFrom(topology.Backends()[0].IPv4, port), Count: 3})
	if err == nil || !strings.Contains(err.Error(), "3 of 3") || !strings.Contains(err.Error(), "refused") {
		t.Errorf("open to a closed port: %v", err)
	}
}

// What a client says of answers that are not its own.
func TestFlowMovedAndWrong(t *testing.T) {
	r := &flowsRole{stats: ClientStats{Servers: map[string]int{}}}
	f := &flow{Connection: Connection{Server: "ws1", ID: 7}, name: 5, answered: 1, sequence: 1}
	say := func(change func(*datagram), size int) {
		f.question(500)
		f.sent = time.Now()
		answer := datagram{kind: kindAnswer, flow: 5, sequence: f.sequence, server: "ws1", number: 7}
		change(&answer)
		r.answered(f, answer.encode(size))
	}
	say(func(*datagram) {}, 500)
	say(func(d *datagram) { d.server = "ws2" }, 500)
	say(func(d *datagram) { d.number = 8 }, 500) // the same flow: moved is moved
	say(func(d *datagram) { d.flow = 6 }, 500)
	say(func(d *datagram) { d.sequence++ }, 500)
	say(func(*datagram) {}, 499)
	torn := datagram{kind: kindAnswer, flow: 5, sequence: f.sequence, server: "ws1", number: 7}.encode(500)
	torn[400]++
	r.answered(f, torn)
	if s := r.counts(); s.Echoed != 1 || s.Moved != 1 || s.Wrong != 4 || len(s.Failures) != 5 {
		t.Errorf("counts: %+v, want 1 echoed, 1 flow moved, 4 wrong", s)
	}

	// What a server says of questions that are none, and of another flow from a known address.
	s := newFlowServerRole().(*flowServerRole)
	from := netip.MustParseAddrPort("10.0.0.1:1000")
	question := datagram{kind: kindQuestion, flow: 5, sequence: 1, answer: 100}.encode(200)
	s.answer(question, from)
	s.answer(question, from)
	s.answer(datagram{kind: kindQuestion, flow: 6, sequence: 1, answer: 100}.encode(200), from)
	s.answer(question, netip.MustParseAddrPort("10.0.0.1:1001"))
	s.answer(torn, from)
	question[199]++
	s.answer(question, from)
	if s.stats.Flows != 3 || s.stats.Answered != 4 || s.stats.Wrong != 2 || s.stats.Reason == "" {
		t.Errorf("counts: %+v, want 3 flows, 4 answered, 2 wrong", s.stats)
	}
}
