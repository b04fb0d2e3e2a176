package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"fairlead/maps"
	"fairlead/test/lab"
)

// fleet is a running edge whose servers can be asked, and which is given commands by the program itself.
type fleet struct {
	*edge
	ctx     context.Context
	topo    *lab.Topology
	service service
	set     *maps.Set
	servers map[string]*lab.Server
}

// mustFleet builds a lab with WebSocket servers and writes the configuration. Of the client addresses, half are behind a
// router that masquerades. The daemon is yet to be started: by begin.
func mustFleet(t *testing.T, build arms, f form, backends int, patience time.Duration, extra ...string) *fleet {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	topo, s := mustTopology(t, build, f, backends, lab.Options{Masquerade: true, Unhidden: unhidden})
	// A small ring can be looked at often.
	s.extra = append(s.extra, append(extra, fmt.Sprintf("ring_size: %d", fleetRing))...)
	fl := &fleet{ctx: ctx, topo: topo, service: s, servers: map[string]*lab.Server{}}
	for _, b := range topo.Backends() {
		server, err := b.StartServer(lab.ServerOptions{
			Listen: []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), websocketPort)},
		})
		if err != nil {
			t.Fatal(err)
		}
		fl.servers[b.Name()] = server
	}
	fl.edge = newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	fl.write(s)
	return fl
}

// fleetRing is how many slots a fleet's ring has.
const fleetRing = 1009

// unhidden is how many of the client addresses are not behind the masquerading router.
const unhidden = 4

// begin starts the daemon and opens its maps.
func (f *fleet) begin() {
	f.t.Helper()
	f.start()
	f.set = f.open()
}

// amend changes the text of the configuration, for what has no field of its own. Each old text must be there.
func (f *fleet) amend(oldnew ...string) {
	f.t.Helper()
	text, err := os.ReadFile(f.config)
	if err != nil {
		f.t.Fatal(err)
	}
	for i := 0; i < len(oldnew); i += 2 {
		if !bytes.Contains(text, []byte(oldnew[i])) {
			f.t.Fatalf("the configuration does not hold %q:\n%s", oldnew[i], text)
		}
		text = bytes.ReplaceAll(text, []byte(oldnew[i]), []byte(oldnew[i+1]))
	}
	if err := os.WriteFile(f.config, text, 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// sources are client addresses of the service's family: those behind the masquerading router, or the others.
func (f *fleet) sources(hidden bool) []netip.Addr {
	all := f.topo.ClientAddresses(f.service.address)
	if hidden {
		return all[:len(all)-unhidden]
	}
	return all[len(all)-unhidden:]
}

// allSources are all of them in turn.
func (f *fleet) allSources() []netip.Addr { return f.topo.ClientAddresses(f.service.address) }

// wait is until for something that may fail.
func (f *fleet) wait(what string, ok func() (bool, error)) {
	f.t.Helper()
	f.until(what, func() bool {
		f.t.Helper()
		done, err := ok()
		if err != nil {
			f.t.Fatalf("wait until %s: %v\n%s", what, err, f.story())
		}
		return done
	})
}

// settled waits until the connection table holds so many connections, all of them proven.
func (f *fleet) settled(connections int) {
	f.t.Helper()
	f.until(fmt.Sprintf("the connection table holds %d", connections), func() bool {
		return int(f.set.Control.Connections()) == connections && f.set.Control.Young() == 0
	})
}

func (f *fleet) inventory() *maps.Inventory {
	f.t.Helper()
	inv, err := f.set.Inventory()
	if err != nil {
		f.t.Fatal(err)
	}
	return inv
}

// backend is a backend of the first service, as the maps hold it; one that is leaving only where no other has its name.
func (f *fleet) backend(name string) (found maps.Backend) {
	f.t.Helper()
	for _, b := range f.inventory().Backends {
		if b.Name == name && (found.Name == "" || found.Leaving) {
			found = b
		}
	}
	if found.Name == "" {
		f.t.Fatalf("the maps hold no backend %s\n%s", name, f.story())
	}
	return found
}

// shares are the slots of the first service's ring, by backend.
func (f *fleet) shares() map[string]int {
	f.t.Helper()
	inv := f.inventory()
	names := map[uint32]string{}
	for _, b := range inv.Backends {
		names[b.ID] = b.Name
	}
	shares := map[string]int{}
	for _, s := range inv.Services {
		if s.Name != "service0" {
			continue
		}
		ring, err := f.set.Ring(s.ID)
		if err != nil {
			f.t.Fatal(err)
		}
		for _, slot := range ring {
			if slot.Backend != maps.NoBackend {
				shares[names[slot.Backend]]++
			}
		}
	}
	return shares
}

// standing is that of the first service.
func (f *fleet) standing() maps.Standing {
	f.t.Helper()
	for _, s := range f.inventory().Services {
		if s.Name == "service0" {
			return s.Standing
		}
	}
	f.t.Fatalf("the maps hold no service0\n%s", f.story())
	return 0
}

// healthy waits until checks say that these backends are up.
func (f *fleet) healthy(names ...string) {
	f.t.Helper()
	for _, name := range names {
		f.until(name+" is up", func() bool { return f.backend(name).Shown.Health == maps.HealthUp })
	}
}

// living is how many connections a backend's server has.
func (f *fleet) living(name string) int {
	f.t.Helper()
	stats, err := f.servers[name].Stats(f.ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	return int(stats.Live)
}

// ran is what a command has left.
type ran struct {
	stdout, stderr string
	code           int
}

// run has the program do something, as a person would at a terminal, and waits for its end.
func (f *fleet) run(words ...string) (r ran) {
	f.t.Helper()
	cmd := f.node.Command(f.ctx, append([]string{mustFairlead(f.t)}, words...)...)
	cmd.Env = append(os.Environ(), "FAIRLEAD_CONFIG="+f.config)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.t.Fatalf("fairlead %s: %v", strings.Join(words, " "), err)
	}
	return ran{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// does is run for what must not fail; it returns what was printed.
func (f *fleet) does(words ...string) string {
	f.t.Helper()
	r := f.run(words...)
	if r.code != 0 || r.stderr != "" {
		f.t.Fatalf("fairlead %s: exit code %d\n%s%s\n%s", strings.Join(words, " "), r.code, r.stdout, r.stderr, f.story())
	}
	return r.stdout
}

// crowd is clients that talk through a fleet, where every kind of harm is an error of the test.
type crowd struct {
	*fleet
	clients *lab.Clients
	opened  int
}

func (f *fleet) crowd() *crowd {
	f.t.Helper()
	clients, err := f.topo.Clients.StartClients()
	if err != nil {
		f.t.Fatal(err)
	}
	return &crowd{fleet: f, clients: clients}
}

// stats are the counts; connections that were hurt fail the test.
func (c *crowd) stats() lab.ClientStats {
	c.t.Helper()
	st, err := c.clients.Stats(c.ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	if st.Broken+st.Moved+st.Wrong+st.Failed+st.ClosedByServer+st.Unclean > 0 {
		c.t.Fatalf("connections were hurt: %+v\n%s", st, c.story())
	}
	return st
}

// join opens n more, and returns how many of them each backend has got.
func (c *crowd) join(n int) map[string]int {
	c.t.Helper()
	before := c.stats()
	if err := c.clients.Open(c.ctx, lab.OpenOptions{Target: c.service.addrPort(), Sources: c.allSources(), Count: n}); err != nil {
		c.t.Fatalf("open %d WebSockets: %v\n%s", n, err, c.story())
	}
	c.opened += n
	got := c.stats().Servers
	for name, was := range before.Servers {
		got[name] -= was
	}
	return got
}

// echoes waits until n more messages are echoed.
func (c *crowd) echoes(n int) {
	c.t.Helper()
	before := c.stats().Echoed
	c.until(fmt.Sprintf("%d messages are echoed", n), func() bool { return int(c.stats().Echoed-before) >= n })
}

// leave ends the crowd, and fails the test if anyone was hurt, moved or lost meanwhile.
func (c *crowd) leave() lab.ClientStats {
	c.t.Helper()
	if _, err := c.clients.Quiet(c.ctx); err != nil {
		c.t.Fatal(err)
	}
	st := c.stats()
	if st.Live != c.opened || st.Sent != st.Echoed {
		c.t.Errorf("%d opened, %d live; %d messages sent, %d echoed\n%s", c.opened, st.Live, st.Sent, st.Echoed, c.story())
	}
	if _, err := c.clients.Close(c.ctx); err != nil {
		c.t.Fatal(err)
	}
	return st
}

// tally is a count that grows, and when.
type tally struct {
	at    []time.Time
	count []float64
	stop  context.CancelFunc
	done  chan struct{}
	err   error
}

// watch follows a count until halt.
func watch(ctx context.Context, every time.Duration, count func() (uint64, error)) *tally {
	ctx, stop := context.WithCancel(ctx)
	w := &tally{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		for w.err == nil {
			var n uint64
			before := time.Now()
			n, w.err = count()
			// It was so at some moment in between.
			w.at, w.count = append(w.at, before.Add(time.Since(before)/2)), append(w.count, float64(n))
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return w
}

func (w *tally) halt(t *testing.T) {
	t.Helper()
	w.stop()
	if <-w.done; w.err != nil {
		t.Fatal(w.err)
	}
}

// by is the count at a moment, between two looks in proportion.
func (w *tally) by(moment time.Time) float64 {
	for i := 1; i < len(w.at); i++ {
		if w.at[i].After(moment) {
			share := moment.Sub(w.at[i-1]).Seconds() / w.at[i].Sub(w.at[i-1]).Seconds()
			return w.count[i-1] + min(max(share, 0), 1)*(w.count[i]-w.count[i-1])
		}
	}
	return w.count[len(w.count)-1]
}

// grows tells when the count began to grow, and when it had grown to the end.
func (w *tally) grows() (first, last time.Time) {
	for i := range w.count {
		if w.count[i] > w.count[0] && first.IsZero() {
			first = w.at[i]
		}
		if w.count[i] == w.count[len(w.count)-1] {
			return first, w.at[i]
		}
	}
	return first, last
}
