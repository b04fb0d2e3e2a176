package e2e

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/maps"
	"fairlead/test/lab"
)

// twoForms are a method whose replies pass by the edge, and one whose replies do not.
var twoForms = []form{{"fullnat", 4, 4}, {"dsr", 6, 6}}

// TestDeath is what else may happen before a backend's death, around it and after it.
func TestDeath(t *testing.T) {
	turns := make(chan struct{}, 3)
	for _, c := range []struct {
		name string
		test func(*testing.T, form)
	}{
		{"forgiven", testDeathForgiven}, {"restart", testDeathRestart}, {"leaving", testDeathOfLeaving}, {"all", testDeathOfAll},
		{"talkers", testDeathOfTalkers}, {"flows", testDeathOfFlows}, {"kept", testDeathKept},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			inTurns(t, turns, twoForms, func(t *testing.T, _ int, f form) { c.test(t, f) })
		})
	}
}

// slowly has few clients told a second, so that there is time for something else to happen meanwhile.
const (
	slowRate = 50
	slowly   = "reset_rate: 50"
)

// testDeathForgiven: a backend that is back before all its clients were told keeps the rest of them.
func testDeathForgiven(t *testing.T, f form) {
	m := mustMortal(t, lab.OneArm, f, 3, lab.Options{}, checks, slowly)
	m.sit(600)
	d := m.die("ws1")
	m.until("it was away for two seconds", func() bool { return time.Since(d.cut) > 2*time.Second })
	m.plug("ws1")
	back := m.flag("ws1", true)
	// As long as it would have taken to tell everyone, and then some.
	end := d.verdict.Add(time.Second*time.Duration(d.clients)/slowRate + time.Second)
	m.until("everyone would have been told", func() bool { return time.Now().After(end) })
	var told []time.Duration
	for _, c := range m.of("ws1") {
		// What was on its way then arrives yet.
		if c.End != "" && (c.End != lab.EndReset || c.Ended.After(back.Add(100*time.Millisecond))) {
			t.Errorf("%v heard %q %v after its backend was back", c.Local, c.End, c.Ended.Sub(back))
		} else if c.End != "" {
			told = append(told, c.Ended.Sub(d.verdict))
		}
	}
	rest := m.serves("ws1")
	t.Logf("back after %v: %d of %d were told; %d live on and echo", back.Sub(d.cut).Round(time.Millisecond), len(told), d.clients, rest)
	// The pace: what was told is what the rate allows in the time, give or take a half.
	if due := int(back.Sub(d.verdict).Seconds() * slowRate); len(told) < due/2 || len(told) > due*3/2+1 {
		t.Errorf("%d were told in %v, want about %d", len(told), back.Sub(d.verdict), due)
	}
	if rest != d.clients-len(told) || rest == 0 {
		t.Errorf("%d live on of %d, of whom %d were told", rest, d.clients, len(told))
	}
	m.unhurt("ws1")
}

// testDeathRestart: the daemon is killed while it tells the clients of a dead backend. The one that is started then tells
// the rest.
func testDeathRestart(t *testing.T, f form) {
	m := mustMortal(t, lab.TwoArm, f, 3, lab.Options{DropInvalid: true}, checks, slowly)
	m.sit(600)
	d := m.die("ws1")
	m.until("some are told", func() bool { return m.living("ws1") < d.clients-20 })
	m.kill()
	killed := time.Now()
	m.whileDead("what was on its way has arrived", func() bool { return time.Since(killed) > 100*time.Millisecond })
	before := m.living("ws1")
	m.whileDead("a second has passed", func() bool { return time.Since(killed) > time.Second })
	if n := m.living("ws1"); n != before || before == 0 {
		t.Errorf("without a daemon, %d live a second after %d did", n, before)
	}
	m.start()
	ready := time.Now()
	m.until("all are told", func() bool {
		if b := m.backend("ws1"); b.Up {
			t.Fatalf("the new daemon has taken the dead backend for alive: %+v\n%s", b, m.story())
		}
		return m.living("ws1") == 0
	})
	var after []time.Duration
	for _, c := range m.of("ws1") {
		if c.End != lab.EndReset {
			t.Errorf("%v heard %q, want a reset", c.Local, c.End)
		}
		if c.Ended.After(killed.Add(time.Second)) {
			after = append(after, c.Ended.Sub(ready))
		}
	}
	t.Logf("%d of %d were told before the daemon's end; %d after the start, since READY: %s", d.clients-before, d.clients, len(after),
		quantiles(after))
	if len(after) != before {
		t.Errorf("%d were told after the start, want the %d that were left", len(after), before)
	}
	m.oblivious(d)
	m.unhurt("ws1")
}

// whileDead waits for a condition without a daemon.
func (m *mortal) whileDead(what string, ok func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("wait until %s: not within 10 s", what)
		}
	}
}

// testDeathOfLeaving: a backend that has left the configuration and lives on for its connections dies, and its clients are
// told like anyone's.
func testDeathOfLeaving(t *testing.T, f form) {
	m := mustMortal(t, lab.TwoArm, f, 3, lab.Options{}, checks)
	m.sit(300)
	rest := m.service
	rest.backends = rest.backends[1:]
	m.reload(rest)
	if b := m.backend("ws1"); !b.Leaving || !b.Up {
		t.Fatalf("a backend that left the configuration is %+v", b)
	}
	m.unhurt()
	m.epochs()
	m.told(m.die("ws1"))
	m.unhurt("ws1")
	// Nobody is left for whom to keep it.
	m.until("the backend is gone", func() bool {
		inv, err := m.set.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		return len(inv.Backends) == 2
	})
}

// testDeathOfAll: the only backend dies and its clients are told. When it is back, newcomers are served at once, long before
// its checks say that it is up: they have been tried on it all the time.
func testDeathOfAll(t *testing.T, f form) {
	// So many good checks take two seconds.
	const slowRise = "health: {type: tcp, interval: 200ms, fast_interval: 100ms, timeout: 100ms, rise: 20, fall: 2}"
	const newcomers = 30
	m := mustMortal(t, lab.OneArm, f, 1, lab.Options{}, slowRise)
	m.sit(100)
	m.told(m.die("ws1"))
	if b := m.backend("ws1"); !b.Tried {
		t.Fatalf("with all down, newcomers are not tried on %+v", b)
	}
	open := func() *lab.IdleClients {
		c, err := m.topo.Clients.StartIdleClients()
		if err != nil {
			t.Fatal(err)
		}
		m.clients = append(m.clients, c)
		return c
	}
	early, late := open(), open()
	options := lab.OpenOptions{Target: m.service.addrPort(), Sources: m.topo.ClientAddresses(m.service.address), Count: newcomers}
	// Who comes while nobody is there sends SYNs again, a second later and so on.
	tried := m.tried()
	opened := make(chan error, 1)
	go func() { opened <- early.Open(m.ctx, options) }()
	m.until("newcomers' SYNs are on their way", func() bool { return m.tried() >= tried+newcomers })
	m.plug("ws1")
	back := time.Now()
	if err := late.Open(m.ctx, options); err != nil {
		t.Fatalf("%v\n%s", err, m.story())
	}
	t.Logf("who came after the backend was back was served within %v", time.Since(back).Round(time.Millisecond))
	if b := m.backend("ws1"); b.Up {
		t.Errorf("checks said that the backend is up before a newcomer was there")
	}
	if err := <-opened; err != nil {
		t.Fatalf("%v\n%s", err, m.story())
	}
	t.Logf("who came before was served within %v; up: %v", time.Since(back).Round(time.Millisecond), m.backend("ws1").Up)
	up := m.flag("ws1", true)
	t.Logf("the checks said so after %v", up.Sub(back).Round(time.Millisecond))
	m.echo()
	for _, c := range []*lab.IdleClients{early, late} {
		list, err := c.Connections(m.ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range list {
			if c.End != "" || c.Wrong != "" || c.Echoed != c.Sent {
				t.Errorf("a newcomer: %+v", c)
			}
		}
		if len(list) != newcomers {
			t.Errorf("%d newcomers, want %d", len(list), newcomers)
		}
	}
}

// tried is how many SYNs were sent on to a backend.
func (m *mortal) tried() int {
	m.t.Helper()
	return int(m.count(m.set, "forward_new"))
}

// testDeathOfTalkers: clients that talk hear of their backend's end at the next packet that they send after the verdict,
// whatever the pace at which others are told.
func testDeathOfTalkers(t *testing.T, f form) {
	const (
		pause = 100 * time.Millisecond
		lag   = 50 * time.Millisecond // of the capture's reader
	)
	m := mustMortal(t, lab.OneArm, f, 3, lab.Options{DropInvalid: true}, checks, "reset_rate: 1")
	m.sit(90)
	for _, c := range m.clients {
		if err := c.Talk(m.ctx, lab.IdleTalk{Every: pause}); err != nil {
			t.Fatal(err)
		}
	}
	epoch := m.set.Control.Epoch()
	m.until("an epoch has passed", func() bool { return m.set.Control.Epoch() > epoch+1 })
	capture, err := m.topo.Clients.Capture(lab.ClientsInterface, func(frame []byte) bool { return segmentOf(frame).tcp })
	if err != nil {
		t.Fatal(err)
	}
	d := m.die("ws1")
	m.until("all who talk have heard", func() bool { return m.living("ws1") == 0 })
	for _, c := range m.clients {
		if err := c.Talk(m.ctx, lab.IdleTalk{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := capture.Close(); err != nil {
		t.Fatal(err)
	}
	type wire struct {
		sent  []time.Time // after the verdict, and before the reset
		reset time.Time
	}
	wires := map[netip.AddrPort]*wire{}
	for _, c := range m.of("ws1") {
		if c.End != lab.EndReset {
			t.Errorf("%v heard %q, want a reset", c.Local, c.End)
		}
		wires[c.Local] = new(wire)
	}
	for _, frame := range capture.Frames() {
		s := segmentOf(frame.Data)
		if w := wires[s.to]; w != nil && s.reset && w.reset.IsZero() {
			w.reset = frame.At
		} else if w := wires[s.from]; w != nil && w.reset.IsZero() && frame.At.After(d.flagged.Add(lag)) {
			w.sent = append(w.sent, frame.At)
		}
	}
	var after, answered []time.Duration
	for local, w := range wires {
		if w.reset.IsZero() {
			t.Errorf("no reset for %v was on the wire", local)
			continue
		}
		after = append(after, w.reset.Sub(d.verdict))
		if len(w.sent) == 0 {
			continue // it sent after the verdict, and before that was seen here
		}
		took := w.reset.Sub(w.sent[0])
		answered = append(answered, took)
		// A burst is one occasion. The next would come a pause later at least.
		if took > pause && len(w.sent) > 1 {
			t.Errorf("%v heard %v after the first packet that it sent after the verdict, and %d packets later", local, took, len(w.sent)-1)
		}
	}
	t.Logf("reset since the verdict: %s", quantiles(after))
	t.Logf("reset since the first packet after the verdict: %s", quantiles(answered))
	m.oblivious(d)
	m.unhurt("ws1")
}

// segment is what is to be known of a frame with TCP in it.
type segment struct {
	tcp, reset bool
	from, to   netip.AddrPort
}

func segmentOf(frame []byte) (s segment) {
	const ethernet, ports, flags, tcp, reset = 14, 4, 13, 20, 4
	var ip, from, to []byte
	switch ip = frame[min(ethernet, len(frame)):]; {
	case len(ip) >= 20+tcp && frame[12] == 8 && frame[13] == 0 && ip[9] == unix.IPPROTO_TCP && len(ip) >= int(ip[0]&15)*4+tcp:
		from, to, ip = ip[12:16], ip[16:20], ip[int(ip[0]&15)*4:]
	case len(ip) >= 40+tcp && frame[12] == 0x86 && frame[13] == 0xdd && ip[6] == unix.IPPROTO_TCP:
		from, to, ip = ip[8:24], ip[24:40], ip[40:]
	default:
		return s
	}
	source, _ := netip.AddrFromSlice(from)
	destination, _ := netip.AddrFromSlice(to)
	return segment{
		tcp: true, reset: ip[flags]&reset != 0, from: netip.AddrPortFrom(source, binary.BigEndian.Uint16(ip)),
		to: netip.AddrPortFrom(destination, binary.BigEndian.Uint16(ip[2:ports])),
	}
}

// testDeathOfFlows: UDP has no idle client that could be told. The first datagram after the verdict is answered by ICMP, port
// unreachable, and flows of other backends go on.
func testDeathOfFlows(t *testing.T, f form) {
	const count = 120
	// The checks are of what the backends serve beside.
	m := mustMortal(t, lab.OneArm, f, 3, lab.Options{DropInvalid: true}, strings.Replace(checks, "{", fmt.Sprintf("{port: %d, ", websocketPort), 1))
	for _, b := range m.topo.Backends() {
		mustServeFlows(t, b)
	}
	udp := m.service.at("udp", flowPort, "idle_timeout: 1m")
	m.reload(m.service, udp)
	m.until("all backends are up", m.allUp)
	clients, err := m.topo.Clients.StartFlows()
	if err != nil {
		t.Fatal(err)
	}
	k := &talk{edge: m.edge, talkers: clients, kind: udpFlows, topo: m.topo, service: udp, ctx: m.ctx}
	k.openMore(count)
	if err := clients.Chatter(m.ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	m.until("the flows are confirmed", func() bool { return int(m.set.Control.Connections()) == count })
	before, err := clients.Quiet(m.ctx)
	if err != nil {
		t.Fatal(err)
	}
	// Both services' entries of the backend turn; the flows' is the one to look at.
	cut := time.Now()
	m.unplug("ws1")
	m.until("the flows' backend is down", func() bool {
		inv, err := m.set.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(inv.Backends, func(b maps.Backend) bool { return b.Name == "ws1" && b.Port == flowPort && !b.Up })
	})
	t.Logf("%d flows of ws1: the verdict came after %v", before.Servers["ws1"], time.Since(cut).Round(time.Millisecond))
	verdict := time.Now()
	if err := clients.Chatter(m.ctx, lab.ChatterOptions{Rate: 2000}); err != nil {
		t.Fatal(err)
	}
	var now lab.ClientStats
	m.until("all flows of the dead backend have heard", func() bool {
		if now, err = clients.Stats(m.ctx); err != nil {
			t.Fatal(err)
		}
		return now.Broken >= before.Servers["ws1"]
	})
	took := time.Since(verdict)
	after := now.Echoed
	m.until("the others have talked", func() bool {
		if now, err = clients.Stats(m.ctx); err != nil {
			t.Fatal(err)
		}
		return now.Echoed >= after+2*count
	})
	if now, err = clients.Quiet(m.ctx); err != nil {
		t.Fatal(err)
	}
	// A datagram without an answer is lost and sent again: none was.
	if now.Lost != before.Lost || now.Broken != before.Servers["ws1"] || now.Broken == 0 || now.Moved+now.Wrong+now.Failed > 0 {
		t.Errorf("%d flows of the dead backend: %+v\n%s", before.Servers["ws1"], now, m.story())
	}
	for _, failure := range now.Failures {
		if !strings.Contains(failure.Reason, unix.ECONNREFUSED.Error()) {
			t.Errorf("%v, want refused", failure)
		}
	}
	t.Logf("%d were told within %v of their first datagrams; the other %d talk on", now.Broken, took.Round(time.Millisecond), now.Live)
	live := now.Servers
	delete(live, "ws1")
	for server, n := range live {
		if n != before.Servers[server] {
			t.Errorf("%s has %d flows, had %d", server, n, before.Servers[server])
		}
	}
}

// testDeathKept is what on_backend_down: keep makes of the same, for comparison: nobody is told, by nobody. Who is silent never
// hears of it, and who sends hears of it when its own kernel gives up.
func testDeathKept(t *testing.T, f form) {
	const patience = 10 * time.Second
	m := mustMortal(t, lab.OneArm, f, 3, lab.Options{}, checks, "on_backend_down: keep")
	m.sit(90)
	d := m.die("ws1")
	senders, silent := m.clients[0], m.clients[1]
	if err := senders.Talk(m.ctx, lab.IdleTalk{Every: 500 * time.Millisecond, Server: "ws1"}); err != nil {
		t.Fatal(err)
	}
	m.until("they have waited", func() bool { return time.Since(d.verdict) > patience })
	if n := m.living("ws1"); n != d.clients || n == 0 {
		t.Errorf("%d live of %d\n%s", n, d.clients, m.story())
	}
	retries := mustSysctl(t, m.topo.Clients, "net/ipv4/tcp_retries2")
	giveUp := time.Duration(0)
	for n, timeout := 0, 200*time.Millisecond; n <= retries; n++ { // RFC 6298 with Linux' bounds
		giveUp += timeout
		timeout = min(2*timeout, 2*time.Minute)
	}
	keepAlive := time.Duration(mustSysctl(t, m.topo.Clients, "net/ipv4/tcp_keepalive_time")+
		mustSysctl(t, m.topo.Clients, "net/ipv4/tcp_keepalive_probes")*mustSysctl(t, m.topo.Clients, "net/ipv4/tcp_keepalive_intvl")) * time.Second
	t.Logf("kept: %v after the verdict, nobody of %d has heard of it; who sends will after %v, who has TCP keep-alives as Linux has them after %v, "+
		"others never", patience, d.clients, giveUp, keepAlive)

	// That is what their kernel will tell them: it is made to give up now.
	if err := m.topo.Clients.Sysctl("net.ipv4.tcp_retries2", "3"); err != nil {
		t.Fatal(err)
	}
	m.until("those who send have given up", func() bool {
		list, err := senders.Connections(m.ctx)
		if err != nil {
			t.Fatal(err)
		}
		return !slices.ContainsFunc(list, func(c lab.IdleConnection) bool { return c.Server == "ws1" && c.End == "" })
	})
	for i, c := range []*lab.IdleClients{senders, silent} {
		list, err := c.Connections(m.ctx)
		if err != nil {
			t.Fatal(err)
		}
		ends := map[string]int{}
		for _, c := range list {
			if c.Server == "ws1" {
				ends[c.End]++
			}
		}
		if want := []string{lab.EndTimedOut, ""}[i]; len(ends) != 1 || ends[want] == 0 {
			t.Errorf("%s heard %v, want %q", []string{"those who send", "those who are silent"}[i], ends, want)
		}
	}
	m.plug("ws1")
	m.flag("ws1", true)
	t.Logf("with the backend back, %d who were silent echo as before", m.serves("ws1"))
	m.unhurt("ws1")
}

func mustSysctl(t *testing.T, n *lab.Node, name string) (value int) {
	t.Helper()
	if err := n.Do(func() error {
		text, err := os.ReadFile("/proc/sys/" + name)
		if err != nil {
			return err
		}
		value, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return value
}
