package e2e

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"fairlead/maps"
	"fairlead/test/lab"
)

var deaths = flag.Int("deaths", 300, "idle WebSockets of each form of TestBackendDeath, spread over three backends")

const (
	// manyDeaths is from where on forms have the machine to themselves.
	manyDeaths = 2000
	// promise is within what time of the check's verdict a dead backend's clients are told.
	promise = time.Second
	// checks are as quick as the tests of deaths would have them.
	checks = "health: {type: tcp, interval: 200ms, fast_interval: 100ms, timeout: 100ms, rise: 2, fall: 2}"
)

// deadly are the forms that a backend dies in.
var deadly = []form{{"fullnat", 4, 4}, {"fullnat", 6, 6}, {"dsr", 4, 4}, {"dsr", 6, 6}, {"ipip", 4, 4}, {"ipip", 6, 6}}

// TestBackendDeath is the promise to idle clients: a backend falls silent, with no FIN and no RST. As soon as its checks say
// so, its clients are reset, who have not said a word since their first echo, and half of whom are behind a router
// that masquerades. Nobody else notices.
func TestBackendDeath(t *testing.T) {
	atOnce := 2
	if *deaths >= manyDeaths {
		atOnce = 1
	}
	inTurns(t, make(chan struct{}, atOnce), deadly, func(t *testing.T, i int, f form) {
		build := arms(lab.OneArm)
		if i%2 == 1 {
			build = lab.TwoArm
		}
		// Of each method once with a router that drops what fits no connection it knows of: now IPv4's, now IPv6's.
		testBackendDeath(t, build, f, lab.Options{DropInvalid: i%4 == 0 || i%4 == 3})
	})
}

// inTurns runs a test in each form, as many at once as turns has room for: checks that want an answer in a tenth of a second
// take a machine that is not busy with all else.
func inTurns(t *testing.T, turns chan struct{}, forms []form, test func(t *testing.T, i int, f form)) {
	for i, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			turns <- struct{}{}
			defer func() { <-turns }()
			test(t, i, f)
		})
	}
}

func testBackendDeath(t *testing.T, build arms, f form, options lab.Options) {
	m := mustMortal(t, build, f, 3, options, checks)
	opening := time.Now()
	m.sit(*deaths)
	t.Logf("%d clients opened, and silent for two epochs, in %v; drop invalid: %v", *deaths, time.Since(opening).Round(time.Millisecond), options.DropInvalid)
	d := m.die("ws1")
	m.told(d)
	m.unhurt("ws1")
}

// mortal is a service whose backends can die, and clients that sit idle on it.
type mortal struct {
	*edge
	ctx     context.Context
	topo    *lab.Topology
	service service
	set     *maps.Set
	servers map[string]*lab.Server
	clients []*lab.IdleClients // those behind the masquerading router, and those that are not
	hidden  int                // client addresses behind it
}

// mustMortal starts a service whose backends all are up.
func mustMortal(t *testing.T, build arms, f form, backends int, options lab.Options, extra ...string) *mortal {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	const unhidden = 4
	options.Masquerade, options.Unhidden = true, unhidden
	topo, s := mustTopology(t, build, f, backends, options)
	s.extra = append(s.extra, extra...)
	m := &mortal{ctx: ctx, topo: topo, service: s, servers: map[string]*lab.Server{}}
	m.hidden = len(topo.ClientAddresses(s.address)) - unhidden
	for _, b := range topo.Backends() {
		server, err := b.StartServer(lab.ServerOptions{Listen: []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), websocketPort)}})
		if err != nil {
			t.Fatal(err)
		}
		m.servers[b.Name()] = server
	}
	for range 2 {
		clients, err := topo.Clients.StartIdleClients()
		if err != nil {
			t.Fatal(err)
		}
		m.clients = append(m.clients, clients)
	}
	m.edge = newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	m.write(s)
	m.start()
	m.set = m.open()
	m.until("all backends are up", m.allUp)
	return m
}

// allUp tells whether every backend of the configuration is up and has its place in the ring.
func (m *mortal) allUp() bool {
	m.t.Helper()
	inv, err := m.set.Inventory()
	if err != nil {
		m.t.Fatal(err)
	}
	wanted := 0
	for _, s := range m.services {
		wanted += len(s.backends)
	}
	if len(inv.Backends) != wanted ||
		slices.ContainsFunc(inv.Backends, func(b maps.Backend) bool { return b.Shown.Health != maps.HealthUp }) {
		return false
	}
	placed := map[uint32]bool{}
	for _, s := range inv.Services {
		ring, err := m.set.Ring(s.ID)
		if err != nil {
			m.t.Fatal(err)
		}
		for _, slot := range ring {
			if slot.Backend != maps.NoBackend {
				placed[slot.Backend] = true
			}
		}
	}
	return len(placed) == wanted
}

// sources are the addresses of the clients of a process.
func (m *mortal) sources(process int) []netip.Addr {
	addresses := m.topo.ClientAddresses(m.service.address)
	if process == 0 {
		return addresses[:m.hidden]
	}
	return addresses[m.hidden:]
}

// sit opens n more connections, half of them from behind the masquerading router, and waits until they are idle. Half of
// them have chatted before: by the ring alone, as a rule, so that the table knows older numbers of them than their last.
func (m *mortal) sit(n int) {
	m.t.Helper()
	want := int(m.set.Control.Connections()) + n
	m.openMore(n - n/2)
	m.until("the connections are confirmed", func() bool {
		return int(m.set.Control.Connections()) == want-n/2 && m.set.Control.Young() == 0
	})
	m.epochs()
	m.chat(n - n/2)
	m.openMore(n / 2)
	m.until("the connection table holds what is open", func() bool {
		return int(m.set.Control.Connections()) == want && m.set.Control.Young() == 0
	})
	m.epochs()
}

// epochs waits until whoever was heard is forgotten, and who was young is not any more.
func (m *mortal) epochs() {
	m.t.Helper()
	epoch := m.set.Control.Epoch()
	m.until("two epochs have passed", func() bool { return m.set.Control.Epoch() >= epoch+2 })
}

func (m *mortal) openMore(n int) {
	m.t.Helper()
	var group errgroup.Group
	for i, c := range m.clients {
		group.Go(func() error {
			return c.Open(m.ctx, lab.OpenOptions{
				Target: m.service.addrPort(), Sources: m.sources(i), Count: (n + i) / len(m.clients),
			})
		})
	}
	if err := group.Wait(); err != nil {
		m.t.Fatalf("open %d WebSockets: %v\n%s", n, err, m.story())
	}
}

// echo has every living connection exchange a message.
func (m *mortal) echo() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.ctx, 30*time.Second)
	defer cancel()
	var group errgroup.Group
	for _, c := range m.clients {
		group.Go(func() error { return c.Echo(ctx) })
	}
	if err := group.Wait(); err != nil {
		m.t.Fatalf("%v\n%s", err, m.story())
	}
}

// chat has all connections, n of them, exchange some messages with pauses in between.
func (m *mortal) chat(n int) {
	m.t.Helper()
	const messages, pause, most = 5, 20 * time.Millisecond, 10_000 // messages a second
	every := max(pause, time.Second*time.Duration(n)/most)
	talk := func(every time.Duration) {
		for _, c := range m.clients {
			if err := c.Talk(m.ctx, lab.IdleTalk{Every: every}); err != nil {
				m.t.Fatal(err)
			}
		}
	}
	talk(every)
	m.until("all have chatted", func() bool {
		chatted := true
		for _, list := range m.connections() {
			for _, c := range list {
				if c.End != "" {
					m.t.Fatalf("%v of %s has heard %q before anything happened; a machine so busy that checks time out is no place "+
						"for this test\n%s", c.Local, c.Server, c.End, m.story())
				}
				chatted = chatted && c.Echoed >= messages
			}
		}
		return chatted
	})
	talk(0)
	m.echo()
}

// backend is what the maps hold of a backend.
func (m *mortal) backend(name string) maps.Backend {
	m.t.Helper()
	inv, err := m.set.Inventory()
	if err != nil {
		m.t.Fatal(err)
	}
	i := slices.IndexFunc(inv.Backends, func(b maps.Backend) bool { return b.Name == name })
	if i < 0 {
		m.t.Fatalf("the maps hold no backend %s\n%s", name, m.story())
	}
	return inv.Backends[i]
}

// connections are all that were ever open, by whether they are hidden.
func (m *mortal) connections() (all [2][]lab.IdleConnection) {
	m.t.Helper()
	for i, c := range m.clients {
		list, err := c.Connections(m.ctx)
		if err != nil {
			m.t.Fatal(err)
		}
		all[i] = list
	}
	return all
}

// of are the connections of a server.
func (m *mortal) of(server string) []lab.IdleConnection {
	m.t.Helper()
	all := m.connections()
	return slices.DeleteFunc(slices.Concat(all[0], all[1]), func(c lab.IdleConnection) bool { return c.Server != server })
}

// living counts the connections of a server that have not ended.
func (m *mortal) living(server string) (n int) {
	m.t.Helper()
	for _, c := range m.of(server) {
		if c.End == "" {
			n++
		}
	}
	return n
}

// death is when a backend fell silent, and when that was said.
type death struct {
	name string
	cut  time.Time
	// verdict is its earliest sign: the log's line, or the flag in the maps, which was seen at flagged.
	verdict, flagged time.Time
	clients          int // that it had
}

// die cuts a backend off and waits for the verdict.
func (m *mortal) die(name string) death {
	m.t.Helper()
	d := death{name: name, clients: m.living(name)}
	d.cut = time.Now()
	m.unplug(name)
	d.flagged = m.flag(name, false)
	d.verdict = d.flagged
	if logged := m.logged(name, "down", d.cut); !logged.IsZero() && logged.Before(d.verdict) {
		d.verdict = logged
	}
	m.t.Logf("%s, cut off with %d clients: the verdict came after %v", name, d.clients, d.verdict.Sub(d.cut).Round(time.Millisecond))
	return d
}

func (m *mortal) machine(name string) *lab.Backend {
	m.t.Helper()
	for _, b := range m.topo.Backends() {
		if b.Name() == name {
			return b
		}
	}
	m.t.Fatalf("the lab has no backend %s", name)
	return nil
}

func (m *mortal) unplug(name string) {
	m.t.Helper()
	if err := m.machine(name).Unplug(lab.BackendInterface); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mortal) plug(name string) {
	m.t.Helper()
	if err := m.machine(name).Plug(lab.BackendInterface); err != nil {
		m.t.Fatal(err)
	}
}

// flag waits until the maps say that a backend is up, or is not, and returns when that was seen.
func (m *mortal) flag(name string, up bool) time.Time {
	m.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); m.backend(name).Up != up; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("wait until the maps have %s up: %v: not within 30 s\n%s", name, up, m.story())
		}
	}
	return time.Now()
}

// logged is when the daemon first said that a backend's health has changed to this, not before a time.
func (m *mortal) logged(name, to string, notBefore time.Time) time.Time {
	m.t.Helper()
	for line := range strings.Lines(m.log()) {
		if !strings.Contains(line, `msg="health changed"`) || !strings.Contains(line, " backend="+name+" ") || !strings.Contains(line, " to="+to+" ") {
			continue
		}
		text, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
		at, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			m.t.Fatalf("a line of the log has no time: %s", line)
		}
		// The log's times are cut to milliseconds.
		if !at.Before(notBefore.Truncate(time.Millisecond)) {
			return at
		}
	}
	return time.Time{}
}

// told waits until a dead backend's clients know, and compares with the promise.
func (m *mortal) told(d death) {
	m.t.Helper()
	// Who is told late is waited for, so that it is known how late.
	for deadline := d.verdict.Add(15 * time.Second); m.living(d.name) > 0 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
	}
	var all []time.Duration
	untold := 0
	for i, list := range m.connections() {
		var some []time.Duration
		for _, c := range list {
			switch {
			case c.Server != d.name:
			case c.End == "":
				if untold++; untold <= 3 {
					m.t.Logf("%v of %s was not told: %s", c.Local, d.name, m.entry(c))
				}
			case c.End != lab.EndReset:
				m.t.Errorf("%v of %s heard %q, want a reset", c.Local, d.name, c.End)
			case c.Ended.Before(d.cut):
				m.t.Errorf("%v of %s was reset %v before the backend's end", c.Local, d.name, d.cut.Sub(c.Ended))
			default:
				some = append(some, c.Ended.Sub(d.verdict))
			}
		}
		m.t.Logf("told %s: %s", []string{"behind a masquerading router", "behind a plain router"}[i], quantiles(some))
		all = append(all, some...)
	}
	m.t.Logf("told in all: %s; %d not told", quantiles(all), untold)
	if n := within(all, promise); n < d.clients-d.clients/1000 || d.clients == 0 {
		m.t.Errorf("%d of %d clients of %s were told within %v of the verdict, want 99.9 %%\n%s", n, d.clients, d.name, promise, m.story())
	}
	m.oblivious(d)
}

// serves has those clients of a backend echo who have not heard of its end, and returns how many they are.
func (m *mortal) serves(name string) (n int) {
	m.t.Helper()
	m.echo()
	for _, c := range m.of(name) {
		if c.End != "" {
			continue
		}
		if n++; c.Wrong != "" || c.Echoed != c.Sent {
			m.t.Fatalf("%v of %s: %d of %d messages were echoed; %s\n%s", c.Local, name, c.Echoed, c.Sent, c.Wrong, m.story())
		}
	}
	return n
}

// entry is what the connection table holds of a connection, under methods that leave its client's address as it is.
func (m *mortal) entry(c lab.IdleConnection) string {
	conn, found, err := m.set.Connections.Get(maps.Tuple{Source: c.Seen, Destination: c.Target, Protocol: unix.IPPROTO_TCP})
	switch {
	case err != nil:
		return err.Error()
	case !found:
		return "the table doesn't have it"
	}
	return fmt.Sprintf("%+v, seen %v ago", conn, maps.Age(maps.Now(), conn.Seen))
}

// oblivious checks that nothing of all this has reached the dead: its server still has every connection.
func (m *mortal) oblivious(d death) {
	m.t.Helper()
	stats, err := m.servers[d.name].Stats(m.ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	if int(stats.Live) != d.clients {
		m.t.Errorf("the dead server has %d connections, want the %d it died with: it was not cut off", stats.Live, d.clients)
	}
}

// unhurt checks that the connections of all servers but these live, and that each echoes from the server it has always had.
func (m *mortal) unhurt(but ...string) {
	m.t.Helper()
	look := func(what string) (count int) {
		m.t.Helper()
		for _, list := range m.connections() {
			for _, c := range list {
				if slices.Contains(but, c.Server) {
					continue
				}
				if c.End != "" || c.Wrong != "" || what != "" && c.Echoed != c.Sent {
					m.t.Fatalf("%s%v of %s, which lives, has heard %q; %d of %d messages were echoed; %s\n%s", what, c.Local, c.Server,
						c.End, c.Echoed, c.Sent, c.Wrong, m.story())
				}
				count++
			}
		}
		return count
	}
	look("")
	m.echo()
	m.t.Logf("%d others echo as before", look("after an echo, "))
}

// quantiles tells how times are spread.
func quantiles(times []time.Duration) string {
	if len(times) == 0 {
		return "none"
	}
	sorted := slices.Sorted(slices.Values(times))
	at := func(share float64) time.Duration {
		return sorted[min(int(share*float64(len(sorted))), len(sorted)-1)].Round(100 * time.Microsecond)
	}
	return fmt.Sprintf("%d of %d within %v; first %v, p50 %v, p99 %v, p99.9 %v, last %v", within(times, promise), len(times), promise,
		at(0), at(0.5), at(0.99), at(0.999), at(1))
}

func within(times []time.Duration, limit time.Duration) (n int) {
	for _, d := range times {
		if d <= limit {
			n++
		}
	}
	return n
}
