package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps"
	"fairlead/test/lab"
	"fairlead/userspace/config"
)

const (
	sighup = unix.SIGHUP
	// sigmas is how far chance may take a share of connections: five standard deviations, once in two million.
	sigmas = 5
	// mostRate is how many messages a second there are at most; up to it, every connection talks once a second.
	mostRate = 5000
	// keptRate is how many messages a second a lab that is kept exchanges.
	keptRate = 100
)

// tell is the story from its beginning to its end. An error says why it could not go on; what went wrong on the way is
// its outcome.
func (d *demo) tell() error {
	family := map[bool]string{false: "IPv4", true: "IPv6"}[d.ipv6]
	d.line(fmt.Sprintf("Fairlead's demo: %s WebSockets to %s by %s over %s, through XDP", grouped(d.clients),
		counted(d.backends, "backend"), d.method, family))
	for _, chapter := range []func() error{
		d.build, d.start, d.connect, d.add, d.remove, d.crash, d.close,
	} {
		err := chapter()
		if err == nil {
			err = d.ctx.Err()
		}
		if err != nil {
			if d.ctx.Err() == nil {
				d.lastWords()
			}
			return err
		}
	}
	return d.outcome()
}

// build makes the network and the backends.
func (d *demo) build() error {
	d.headline("Building a network of namespaces")
	options := lab.Options{Backends: d.backends}
	if d.method == config.MethodDSR {
		options.DSRServices = lab.DefaultServices()
	}
	topology, err := lab.TwoArm(d.labName(), options)
	if err != nil {
		return advisedInUse(err)
	}
	d.lab, d.service, d.listed = topology, serviceOf(topology, d.ipv6), topology.Backends()
	// Now that the name is ours: an earlier run that was killed has left these.
	if err := d.clearPlaces(); err != nil {
		return fmt.Errorf("clear what an earlier demo left: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(d.dir(), "state"), 0o755); err != nil {
		return err
	}
	names := make([]string, len(d.listed))
	for i, backend := range d.listed {
		names[i] = backend.Name()
		if err := d.serve(backend); err != nil {
			return err
		}
	}
	d.say("clients ── router ── edge ── %s   (namespaces %s-…)", strings.Join(names, ", "), d.labName())
	d.say("service %s at %v: %s", demoService, d.service, map[config.Method]string{
		config.MethodFullNAT: "the edge rewrites both addresses, replies come back through it",
		config.MethodDSR:     "the edge rewrites MAC addresses only, backends answer the clients themselves",
	}[d.method])
	return nil
}

// serve starts a backend's WebSocket server.
func (d *demo) serve(b *lab.Backend) error {
	everywhere := netip.AddrPortFrom(netip.IPv6Unspecified(), d.backendPort())
	_, err := b.StartServer(lab.ServerOptions{Listen: []netip.AddrPort{everywhere}})
	return err
}

// start brings the daemon up.
func (d *demo) start() error {
	d.headline("Starting the daemon on the edge, its configuration %s", d.file())
	if err := d.configure(); err != nil {
		return err
	}
	if err := d.startDaemon(); err != nil {
		return err
	}
	began := time.Now()
	if err := d.await("the daemon", d.inForce); err != nil {
		return err
	}
	d.say("up after %s, pid %d", brief(time.Since(began)), d.daemon.PID())
	if err := d.show("status"); err != nil {
		return err
	}
	links, err := d.attached()
	if err != nil {
		return err
	}
	native := slices.DeleteFunc(slices.Clone(links), func(l loader.Attachment) bool { return l.Mode != loader.ModeNative })
	d.check(len(native) == 2, "XDP runs natively, in the driver, on %d of the edge's 2 interfaces", len(native))
	return nil
}

// connect has the clients come, and begins the chatter that goes on until the end.
func (d *demo) connect() (err error) {
	d.headline("%s clients connect", grouped(d.clients))
	if d.crowd, err = d.lab.Clients.StartClients(); err != nil {
		return err
	}
	came, err := d.come(d.clients)
	if err != nil {
		return err
	}
	d.spread(came)
	rate := min(d.clients+3*d.more(), mostRate)
	if err := d.crowd.Chatter(d.ctx, lab.ChatterOptions{Rate: float64(rate)}); err != nil {
		return err
	}
	d.say("from now on they talk: %s messages a second, each to be echoed by the backend that took the connection",
		grouped(rate))
	return d.round("")
}

// add lists one more backend.
func (d *demo) add() error {
	backend, err := d.lab.AddBackend()
	if err != nil {
		return err
	}
	d.headline("A backend is added: %s", backend.Name())
	if err := d.serve(backend); err != nil {
		return err
	}
	before, err := d.look()
	if err != nil {
		return err
	}
	d.listed = append(d.listed, backend)
	if err := d.configure(); err != nil {
		return err
	}
	d.say("+ %s", d.listing(backend))
	if err := d.reload(); err != nil {
		return err
	}
	after, err := d.look()
	if err != nil {
		return err
	}
	changed := 0
	for i := range before.ring {
		if before.ring[i] != after.ring[i] {
			changed++
		}
	}
	d.say("%.1f %% of the ring's slots changed hands", 100*float64(changed)/float64(len(after.ring)))
	came, err := d.newcomers()
	if err != nil {
		return err
	}
	d.check(came[backend.Name()] > 0, "%s of them reached %s", grouped(came[backend.Name()]), backend.Name())
	return d.round("nobody moved")
}

// remove takes the first backend out of the configuration.
func (d *demo) remove() error {
	backend := d.listed[0]
	d.headline("A backend is taken out of the configuration: %s", backend.Name())
	before, err := d.crowd.Stats(d.ctx)
	if err != nil {
		return err
	}
	d.say("- %s", d.listing(backend))
	d.listed = slices.Clone(d.listed[1:])
	if err := d.configure(); err != nil {
		return err
	}
	if err := d.reload(); err != nil {
		return err
	}
	came, err := d.newcomers()
	if err != nil {
		return err
	}
	d.check(came[backend.Name()] == 0, "%s of them reached %s", grouped(came[backend.Name()]), backend.Name())
	if err := d.round("only new connections noticed"); err != nil {
		return err
	}
	now, err := d.crowd.Stats(d.ctx)
	if err != nil {
		return err
	}
	stayed, had := now.Servers[backend.Name()], before.Servers[backend.Name()]
	d.check(stayed == had, "%s of %s's %s stay on it, and talk", grouped(stayed), backend.Name(),
		counted(had, "connection"))
	return d.explainOne(backend.Name())
}

// explainOne shows why a connection is where it is.
func (d *demo) explainOne(backend string) error {
	connections, err := d.crowd.Connections(d.ctx)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(connections, func(c lab.Connection) bool { return c.Server == backend })
	if at < 0 {
		return nil
	}
	return d.show("explain", connections[at].Local.String(), demoService)
}

// crash kills the daemon, has everybody talk without it, and starts it again.
func (d *demo) crash() error {
	d.headline("The daemon is killed, connections open")
	before, err := d.look()
	if err != nil {
		return err
	}
	links, err := d.attached()
	if err != nil {
		return err
	}
	d.say("$ kill -KILL %d", d.daemon.PID())
	if err := d.daemon.Kill(); err != nil {
		return err
	}
	d.daemon = nil
	began := time.Now()
	if err := d.round("with no daemon"); err != nil {
		return err
	}
	if _, err := d.newcomers(); err != nil {
		return err
	}
	if err := d.round("with no daemon still"); err != nil {
		return err
	}

	d.headline("The daemon is started again")
	gap := time.Since(began)
	if err := d.startDaemon(); err != nil {
		return err
	}
	if err := d.await("the daemon to take over", func() error { return d.takenOver(links) }); err != nil {
		return err
	}
	if err := d.await("the ring to settle", d.inForce); err != nil {
		return err
	}
	d.say("took over after %s: pid %d; there was none for %s", brief(time.Since(began)-gap), d.daemon.PID(), brief(gap))
	after, err := d.look()
	if err != nil {
		return err
	}
	stats, err := d.crowd.Stats(d.ctx)
	if err != nil {
		return err
	}
	d.check(after.connections >= int64(stats.Live), "%s of %s connections are in the adopted table",
		grouped(min(after.connections, int64(stats.Live))), grouped(stats.Live))
	d.check(slices.Equal(before.ring, after.ring) && slices.EqualFunc(before.backends, after.backends, sameBackend),
		"backends and ring are as they were, slot for slot")
	return d.round("everything adopted")
}

func sameBackend(a, b maps.Backend) bool {
	return a.ID == b.ID && a.Name == b.Name && a.Address == b.Address
}

// takenOver tells whether a new daemon has put its own program into the links of before.
func (d *demo) takenOver(before []loader.Attachment) error {
	now, err := d.attached()
	if err != nil {
		return err
	}
	for _, old := range before {
		at := slices.IndexFunc(now, func(l loader.Attachment) bool { return l.Link == old.Link })
		if at < 0 {
			return fmt.Errorf("the link of %s is gone", old.Interface)
		}
		if now[at].Program == old.Program {
			return fmt.Errorf("%s still has the program of before", old.Interface)
		}
	}
	return nil
}

// close ends the chatter and the connections, and sums up.
func (d *demo) close() error {
	d.headline("In the end")
	stats, err := d.crowd.Quiet(d.ctx)
	if err != nil {
		return err
	}
	quiet := stats
	if !d.keep {
		if stats, err = d.crowd.Close(d.ctx); err != nil {
			return err
		}
		d.crowd = nil
	} else if err := d.crowd.Chatter(d.ctx, lab.ChatterOptions{Rate: keptRate}); err != nil {
		return err
	}
	v, err := d.look()
	if err != nil {
		return err
	}
	broken := stats.Broken + stats.ClosedByServer + stats.Unclean
	lost := int(quiet.Sent - quiet.Echoed)
	rows := []row{
		{"connections opened", grouped(stats.Opened)},
		{"connections refused", grouped(stats.Failed)},
		{"connections moved", grouped(stats.Moved)},
		{"connections broken", grouped(broken)},
		{"connections closed by their clients", grouped(stats.Closed)},
		{"messages echoed", grouped(quiet.Echoed)},
		{"messages lost or garbled", grouped(lost + stats.Wrong)},
		{"slowest echo", brief(quiet.Slowest)},
		{"packets through XDP", grouped(v.counted("forward_", "reply_"))},
	}
	if alone := v.counted("forward_ring"); alone > 0 {
		rows = append(rows, row{"  of them by the ring alone, no table asked", grouped(alone)})
	}
	d.table(append(rows, v.said()...))
	for _, failure := range stats.Failures {
		d.say("%v", failure)
	}
	d.check(stats.Failed == 0 && stats.Moved == 0 && broken == 0 && lost == 0 && stats.Wrong == 0,
		"%s moved, %s broken, %s refused, %s lost", grouped(stats.Moved), grouped(broken), grouped(stats.Failed),
		counted(lost, "message"))
	return nil
}

// more is how many connections come later, each time: a tenth, and enough for every backend to get some.
func (d *demo) more() int { return max(d.clients/10, 20*(d.backends+1)) }

// newcomers opens some more connections and shows where they went.
func (d *demo) newcomers() (map[string]int, error) {
	d.say("%s new connections come:", grouped(d.more()))
	came, err := d.come(d.more())
	if err != nil {
		return nil, err
	}
	d.spread(came)
	return came, nil
}

// come opens connections, and returns how many each backend took.
func (d *demo) come(count int) (map[string]int, error) {
	before, err := d.crowd.Stats(d.ctx)
	if err != nil {
		return nil, err
	}
	opened := make(chan error, 1)
	began := time.Now()
	go func() {
		opened <- d.crowd.Open(d.ctx, lab.OpenOptions{
			Target: d.service, Count: count, Sources: d.lab.ClientAddresses(d.service.Addr()),
		})
	}()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for waiting := true; waiting; {
		select {
		case err = <-opened:
			waiting = false
		case <-tick.C:
			if now, err := d.crowd.Stats(d.ctx); err == nil {
				d.say("%s of %s …", grouped(now.Opened-before.Opened), grouped(count))
			}
		}
	}
	if d.ctx.Err() != nil {
		return nil, d.ctx.Err()
	}
	now, statsErr := d.crowd.Stats(d.ctx)
	if statsErr != nil {
		return nil, errors.Join(err, statsErr)
	}
	if err != nil {
		if now.Opened == before.Opened {
			return nil, err
		}
		d.check(false, "%v", err)
	}
	d.say("%s connected in %s", grouped(now.Opened-before.Opened), brief(time.Since(began)))
	came := make(map[string]int)
	for name, n := range now.Servers {
		came[name] = n - before.Servers[name]
	}
	return came, nil
}

// spread draws where connections went, and checks it against the ring.
func (d *demo) spread(came map[string]int) {
	v, err := d.look()
	if err != nil {
		d.check(false, "read the ring: %v", err)
		return
	}
	var group []bar
	total := 0
	for _, n := range came {
		total += n
	}
	fair := true
	for _, backend := range d.lab.Backends() {
		name := backend.Name()
		n, share, note := came[name], v.share(name), ""
		if !slices.Contains(d.listed, backend) {
			note = "(no longer in the configuration)"
		}
		group = append(group, bar{name, n, note})
		off := math.Abs(float64(n) - share*float64(total))
		fair = fair && off <= sigmas*math.Sqrt(float64(total)*share*(1-share))
	}
	d.bars(group)
	d.check(fair, "spread as the ring says, but for chance")
}

// round waits until as many messages have been echoed as there are connections, which talk in turn: each has spoken.
func (d *demo) round(moral string) error {
	before, err := d.crowd.Stats(d.ctx)
	if err != nil {
		return err
	}
	var now lab.ClientStats
	err = d.await("every connection to talk", func() error {
		if now, err = d.crowd.Stats(d.ctx); err != nil {
			return err
		}
		if echoed := now.Echoed - before.Echoed; echoed < uint64(before.Live) {
			return fmt.Errorf("%d messages echoed by %d connections", echoed, before.Live)
		}
		return nil
	})
	if d.ctx.Err() != nil {
		return d.ctx.Err()
	}
	if err != nil {
		d.check(false, "%v", err)
		return nil
	}
	if moral != "" {
		moral += ": "
	}
	broken := now.Broken + now.ClosedByServer
	d.check(now.Moved == 0 && broken == 0 && now.Wrong == 0,
		"%s%s connections open, %s messages echoed, %s moved, %s broken", moral, grouped(now.Live),
		grouped(now.Echoed-before.Echoed), grouped(now.Moved), grouped(broken))
	return nil
}
