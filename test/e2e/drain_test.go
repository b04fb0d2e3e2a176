package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead/test/lab"
)

var drains = flag.Int("drains", 240, "connections of the backend that TestDrain drains, in each of its forms")

const (
	// manyDrains is from where on there are fewer forms, one at a time, and the rate is measured.
	manyDrains = 2000
	// drainBulk is how many of the connections to each backend, about, carry bulk.
	drainBulk = 4
)

// drained is the backend that tests drain.
const drained = "ws1"

// TestDrain: a backend is drained at a rate, by the program as a person would start it. Half of its connections talk, some
// of them in bulk, and half say nothing. Both ends of each see its end, at the rate that was asked for; nobody else's
// connection is touched; nobody new comes to the backend until it is resumed.
func TestDrain(t *testing.T) {
	t.Parallel()
	forms, atOnce := []form{{"fullnat", 4, 4}, {"fullnat", 6, 6}, {"dsr", 4, 4}, {"nat", 6, 6}, {"ipip", 6, 6}, {"gue", 4, 4}}, 6
	if *drains >= manyDrains {
		forms, atOnce = []form{{"fullnat", 4, 4}, {"dsr", 6, 6}, {"ipip", 4, 4}}, 1
	}
	turns := make(chan struct{}, atOnce)
	for i, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			turns <- struct{}{}
			defer func() { <-turns }()
			build := arms(lab.OneArm)
			if i%2 == 1 {
				build = lab.TwoArm
			}
			testDrain(t, build, f)
		})
	}
}

func testDrain(t *testing.T, build arms, f form) {
	// Three seconds at least, so that some are whole.
	rate := min(500, *drains/3)
	fl := mustFleet(t, build, f, 4, time.Minute+time.Duration(*drains)*20*time.Millisecond)
	fl.service.backends[0].weight = 12 // the others, together, have a fourth of what it has
	fl.write(fl.service)
	fl.begin()
	r := fl.mustRegulars(*drains * 15 / 12)
	before := r.living()
	t.Logf("connections: %v", before)

	// The program is started in a process of its own, and newcomers come while it runs.
	late := fl.crowd()
	ends := watch(fl.ctx, 20*time.Millisecond, func() (uint64, error) {
		stats, err := fl.servers[drained].Stats(fl.ctx)
		return uint64(stats.Accepted - stats.Live), err
	})
	began := time.Now()
	cmd := fl.node.Command(fl.ctx, mustFairlead(t), "backends", "drain", drained, "--rate", fmt.Sprintf("%d/s", rate), "--wait")
	cmd.Env = append(os.Environ(), "FAIRLEAD_CONFIG="+fl.config)
	process, err := fl.node.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	fl.until("the backend is out of the ring", func() bool { return fl.shares()[drained] == 0 })
	for waiting := true; waiting; {
		if n := late.join(5)[drained]; n != 0 {
			t.Errorf("%d new connections reached the backend that is drained", n)
		}
		select {
		case <-process.Done():
			waiting = false
		case <-time.After(200 * time.Millisecond): // newcomers, at a pace
		}
	}
	took := time.Since(began)
	said, err := os.ReadFile(process.Log())
	if err := errors.Join(err, process.Wait()); err != nil {
		t.Fatalf("fairlead backends drain: %v\n%s\n%s", err, said, fl.story())
	}
	lines := strings.Split(strings.TrimSpace(string(said)), "\n")
	t.Logf("in %v, after %d newcomers:\n%s", took.Round(time.Millisecond), late.opened, said)
	want := []string{
		fmt.Sprintf("backend %s drains: no new connections; its connections are ended, %d a second", drained, rate),
		fmt.Sprintf("service0/%s: no connection is left, %d closed", drained, before[drained]),
	}
	if lines[0] != want[0] || lines[len(lines)-1] != want[1] {
		t.Errorf("the program said:\n%s\nwant the first and the last line\n%s", said, strings.Join(want, "\n"))
	}

	// Both ends have seen it, and nobody else has.
	fl.until("the server has seen every one of its connections end", func() bool { return fl.living(drained) == 0 })
	ends.halt(t)
	r.ended(func(c lab.IdleConnection) bool { return c.Server == drained })
	joined := late.stats().Servers
	for name, n := range before {
		if now := fl.living(name); name != drained && now != n+joined[name] {
			t.Errorf("%s has %d connections, want %d and %d newcomers", name, now, n, joined[name])
		}
	}
	r.echo()

	// The rate: ends as the server sees them come at it; those that clients see come later by as much as a silent one takes
	// to be told, and chance mixes these with those that talk.
	var seen []time.Time
	for _, c := range r.all() {
		if !c.Ended.IsZero() {
			seen = append(seen, c.Ended)
		}
	}
	slices.SortFunc(seen, time.Time.Compare)
	if *drains >= manyDrains {
		fl.steady("at the server", rate, ends, 0, 0.1, 0.1)
		fl.steady("at the clients", rate, tallyOf(seen), silentTold, 0.1, 0.1)
	} else {
		// Beside other tests nobody has a CPU when he would like to, and time that is lost is not made up for: it may be
		// slower, and not faster by more than what is late for one second and counted in the next.
		fl.steady("at the server", rate, ends, 0, 0.9, 0.5)
		fl.steady("at the clients", rate, tallyOf(seen), silentTold, 0.9, 0.5)
	}
	from, to := ends.grows()
	mean := float64(before[drained]-1) / to.Sub(from).Seconds()
	t.Logf("at the server, %d ends in %v: %.1f a second", before[drained], to.Sub(from).Round(time.Millisecond), mean)
	if mean > 1.1*float64(rate) {
		t.Errorf("%.1f connections ended a second, %d were asked for", mean, rate)
	}

	// Resumed, it has its share of newcomers again.
	if said := fl.does("backends", "resume", drained); !strings.Contains(said, drained) {
		t.Errorf("fairlead backends resume said %q", said)
	}
	fl.until("the backend takes connections", func() bool { return fl.shares()[drained] > 0 })
	if got := late.join(60); got[drained] == 0 {
		t.Errorf("resumed, the backend got none of 60 new connections: %v", got)
	}
	late.leave()
}

// tallyOf counts moments, which are in order.
func tallyOf(moments []time.Time) *tally {
	w := new(tally)
	if len(moments) > 0 {
		w.at, w.count = append(w.at, moments[0].Add(-1)), append(w.count, 0)
	}
	for i, at := range moments {
		w.at, w.count = append(w.at, at), append(w.count, float64(i+1))
	}
	return w
}

// silentTold is how much later than the server a silent client is told: at its second probe.
const silentTold = 600 * time.Millisecond

// steady compares what was counted in each whole second with a rate. The first second is left out, in which silent
// clients are yet to be told, and the last begun one, with so much before it in which they alone are. It may be less than
// the rate by so large a part of it, or more.
func (f *fleet) steady(where string, rate int, w *tally, settling time.Duration, less, more float64) {
	f.t.Helper()
	first, last := w.grows()
	var table []string
	least, most := math.Inf(1), math.Inf(-1)
	for from := first.Add(time.Second); !from.Add(time.Second + settling).After(last); from = from.Add(time.Second) {
		n := w.by(from.Add(time.Second)) - w.by(from)
		off := n/float64(rate) - 1
		least, most = min(least, off), max(most, off)
		table = append(table, fmt.Sprintf("%.0f", n))
		if off < -less || off > more {
			f.t.Errorf("%s, %.0f connections ended in the second after %v, want %d - %.0f + %.0f %%", where, n,
				from.Sub(first).Round(time.Millisecond), rate, less*100, more*100)
		}
	}
	if len(table) == 0 {
		f.t.Errorf("%s, there is no whole second from %v to %v to look at", where, first, last)
		return
	}
	f.t.Logf("%s, ends in each whole second: %s: %+.1f to %+.1f %% off %d/s", where, strings.Join(table, " "), least*100, most*100, rate)
}

// regulars are connections of three kinds: silent ones, such as talk, and such as carry bulk.
type regulars struct {
	*fleet
	idle       *lab.IdleClients
	talk, bulk *lab.BulkClients
}

// mustRegulars opens n connections and more, half of them silent.
func (f *fleet) mustRegulars(n int) *regulars {
	f.t.Helper()
	idle, err := f.topo.Clients.StartIdleClients()
	if err != nil {
		f.t.Fatal(err)
	}
	talk, err := f.topo.Clients.StartBulkClients()
	if err != nil {
		f.t.Fatal(err)
	}
	bulk, err := f.topo.Clients.StartBulkClients()
	if err != nil {
		f.t.Fatal(err)
	}
	r := &regulars{fleet: f, idle: idle, talk: talk, bulk: bulk}
	const bulky = 4 * drainBulk
	for _, open := range []struct {
		clients interface {
			Open(context.Context, lab.OpenOptions) error
		}
		n int
	}{{idle, n / 2}, {talk, n/2 - bulky}, {bulk, bulky}} {
		if err := open.clients.Open(f.ctx, lab.OpenOptions{
			Target: f.service.addrPort(), Sources: f.allSources(), Count: open.n, Parallel: 16,
		}); err != nil {
			f.t.Fatalf("open %d WebSockets: %v\n%s", open.n, err, f.story())
		}
	}
	f.settled(n / 2 * 2)
	// Short messages, a thousand in a second or five of each; long ones without a pause.
	const short = 128
	if err := talk.Send(f.ctx, lab.BulkOptions{Size: short, Rate: short * min(5, 2000/float64(n))}); err != nil {
		f.t.Fatal(err)
	}
	if err := bulk.Send(f.ctx, lab.BulkOptions{Rate: 256 << 10}); err != nil {
		f.t.Fatal(err)
	}
	f.until("all bulk has come back once", func() bool {
		return !slices.ContainsFunc(r.of(bulk), func(c lab.IdleConnection) bool { return c.Echoed < 2 })
	})
	return r
}

// of lists all connections of a process.
func (r *regulars) of(clients interface {
	Connections(context.Context) ([]lab.IdleConnection, error)
}) []lab.IdleConnection {
	r.t.Helper()
	list, err := clients.Connections(r.ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

// all lists those of all kinds, living and ended ones.
func (r *regulars) all() []lab.IdleConnection {
	r.t.Helper()
	return slices.Concat(r.of(r.idle), r.of(r.talk), r.of(r.bulk))
}

// living counts those that live, by the name of their server.
func (r *regulars) living() map[string]int {
	r.t.Helper()
	count := map[string]int{}
	for _, c := range r.all() {
		if c.End == "" {
			count[c.Server]++
		}
	}
	return count
}

// ended fails the test unless those chosen were reset, and no other has ended.
func (r *regulars) ended(chosen func(lab.IdleConnection) bool) {
	r.t.Helper()
	r.until("clients were told", func() bool {
		return !slices.ContainsFunc(r.all(), func(c lab.IdleConnection) bool { return chosen(c) && c.End == "" })
	})
	var wrong []string
	for _, c := range r.all() {
		want := ""
		if chosen(c) {
			want = lab.EndReset
		}
		if c.End != want || c.Wrong != "" {
			wrong = append(wrong, fmt.Sprintf("%v to %s: ended %q, want %q; %s", c.Local, c.Server, c.End, want, c.Wrong))
		}
	}
	if len(wrong) > 0 {
		r.t.Errorf("%d connections, such as %s\n%s", len(wrong), strings.Join(wrong[:min(len(wrong), 5)], "\n"), r.story())
	}
}

// echo has every living connection echo once more.
func (r *regulars) echo() {
	r.t.Helper()
	if err := r.idle.Echo(r.ctx); err != nil {
		r.t.Fatalf("%v\n%s", err, r.story())
	}
	before := map[string]uint64{}
	others := func() []lab.IdleConnection { return slices.Concat(r.of(r.talk), r.of(r.bulk)) }
	for _, c := range others() {
		before[c.Local.String()] = c.Echoed
	}
	r.until("those who talk go on", func() bool {
		return !slices.ContainsFunc(others(), func(c lab.IdleConnection) bool {
			return c.End == "" && c.Echoed == before[c.Local.String()]
		})
	})
}

// listed is a backend as `fairlead backends list -o json` has it.
type listed struct {
	Name        string   `json:"name"`
	State       string   `json:"state"`
	Weight      uint32   `json:"weight"`
	Configured  uint32   `json:"configured_weight"`
	Percent     uint32   `json:"weight_percent"`
	Orders      []string `json:"orders"`
	Health      string   `json:"health"`
	Tried       bool     `json:"tried"`
	Connections int      `json:"connections"`
}

// list is a backend as the program lists it.
func (f *fleet) list(name string) listed {
	f.t.Helper()
	text := f.does("backends", "list", "-o", "json")
	var all []listed
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		f.t.Fatalf("fairlead backends list -o json: %v: %s", err, text)
	}
	for _, b := range all {
		if b.Name == name {
			return b
		}
	}
	f.t.Fatalf("fairlead backends list does not know %s: %s", name, text)
	return listed{}
}

// TestOrders: what is set by command outlives the daemon; a deadline ends what is left then, and nothing before; one
// connection is closed, and no other.
func TestOrders(t *testing.T) {
	t.Parallel()
	for _, f := range []form{{"fullnat", 4, 4}, {"dsr", 6, 6}} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			testOrders(t, f)
		})
	}
}

func testOrders(t *testing.T, f form) {
	const count, rate = 400, 40
	fl := mustFleet(t, lab.TwoArm, f, 4, 2*time.Minute, "health: {type: websocket, path: "+lab.HealthPath+", interval: 1s, fast_interval: 100ms}")
	fl.begin()
	fl.healthy("ws1", "ws2", "ws3", "ws4")
	r := fl.mustRegulars(count)
	newcomers := func(who string, want bool) {
		t.Helper()
		late := fl.crowd()
		if got := late.join(60); (got[who] > 0) != want {
			t.Errorf("of 60 newcomers %s got %d; any wanted: %v", who, got[who], want)
		}
		late.leave()
	}

	// One connection, of a client that nobody hides: it is known by its own address.
	unhidden := fl.sources(false)
	var closed lab.IdleConnection
	for _, c := range r.of(r.idle) {
		if slices.Contains(unhidden, c.Local.Addr()) {
			closed = c
		}
	}
	before := fl.living(closed.Server)
	said := fl.does("connections", "close", closed.Local.String())
	t.Logf("close: %s", said)
	if want := fmt.Sprintf("%v: closed, both ends told\n", closed.Local); said != want {
		t.Errorf("fairlead connections close said %q, want %q", said, want)
	}
	gone := map[string]bool{closed.Local.String(): true}
	dead := func(c lab.IdleConnection) bool { return gone[c.Local.String()] }
	r.ended(dead)
	if n := fl.living(closed.Server); n != before-1 {
		t.Errorf("%s has %d connections after one of %d was closed", closed.Server, n, before)
	}
	fl.until("it is in no table any more", func() bool {
		again := fl.run("connections", "close", closed.Local.String())
		return again.code == 1 && strings.Contains(again.stderr, closed.Local.String())
	})

	// A deadline alone: nothing ends before it.
	const deadline = 3 * time.Second
	ordered := time.Now()
	t.Log(fl.does("backends", "drain", "service0/ws4", "--deadline", deadline.String()))
	for _, c := range r.all() {
		if c.Server == "ws4" {
			gone[c.Local.String()] = true
		}
	}
	newcomers("ws4", false)
	r.ended(dead)
	fl.until("the server has seen them end", func() bool { return fl.living("ws4") == 0 })
	first, last := time.Time{}, time.Time{}
	for _, c := range r.all() {
		if c.Server == "ws4" && c.Local != closed.Local {
			if first.IsZero() || c.Ended.Before(first) {
				first = c.Ended
			}
			if c.Ended.After(last) {
				last = c.Ended
			}
		}
	}
	t.Logf("drained by a deadline of %v: clients were told from %v to %v after it was ordered", deadline,
		first.Sub(ordered).Round(time.Millisecond), last.Sub(ordered).Round(time.Millisecond))
	if first.Before(ordered.Add(deadline)) {
		t.Errorf("a client was told %v before the deadline", ordered.Add(deadline).Sub(first))
	}
	// The command takes its time, and silent ones are told at their second probe.
	if most := deadline + silentTold + time.Second; last.Sub(ordered) > most {
		t.Errorf("a client was told only %v after the order, want %v at most", last.Sub(ordered), most)
	}

	// The daemon is killed while one is drained and another has a weight by command.
	fl.does("backends", "weight", "ws3", "7")
	fl.does("backends", "drain", drained, "--rate", fmt.Sprintf("%d/s", rate))
	for _, c := range r.all() {
		if c.Server == drained {
			gone[c.Local.String()] = true
		}
	}
	all := fl.living(drained)
	fl.until("some connections have ended", func() bool { return fl.living(drained) < all-rate/4 })
	fl.kill()
	check := func(when string) {
		t.Helper()
		if b := fl.list(drained); b.State != "draining" || !slices.Contains(b.Orders, "drain") {
			t.Errorf("%s, the backend that drains is listed as %+v", when, b)
		}
		if b := fl.list("ws3"); b.Weight != 7 || b.Configured != 1 || !slices.Contains(b.Orders, "weight") {
			t.Errorf("%s, the backend of weight 7 is listed as %+v", when, b)
		}
	}
	check("with the daemon killed")
	newcomers(drained, false)
	left := fl.living(drained)
	// Without a daemon nobody is condemned; those that were are told by the data plane when they next speak.
	if left == 0 {
		t.Fatalf("nothing is left to be drained by the next daemon: of %d", all)
	}
	ends := watch(fl.ctx, 20*time.Millisecond, func() (uint64, error) {
		stats, err := fl.servers[drained].Stats(fl.ctx)
		return uint64(stats.Accepted - stats.Live), err
	})
	fl.start()
	check("after a restart")
	newcomers(drained, false)
	fl.until("the drain has gone on to its end", func() bool { return fl.living(drained) == 0 })
	ends.halt(t)
	r.ended(dead)
	from, to := ends.grows()
	t.Logf("%d of %d were left to the next daemon, which ended them in %v", left, all, to.Sub(from).Round(time.Millisecond))
	if seen := float64(left-1) / to.Sub(from).Seconds(); math.Abs(seen/rate-1) > 0.2 {
		t.Errorf("after the restart %.1f a second were ended, want %d", seen, rate)
	}
	if d := fl.does("backends", "list"); !strings.Contains(d, "draining") {
		t.Errorf("backends list:\n%s", d)
	} else {
		t.Logf("backends list:\n%s", d)
	}

	fl.does("backends", "weight", "ws3", "default")
	fl.does("backends", "resume", drained)
	fl.does("backends", "resume", "ws4")
	if b := fl.list("ws3"); b.Weight != 1 || len(b.Orders) != 0 {
		t.Errorf("with its weight as configured, ws3 is listed as %+v", b)
	}
	newcomers(drained, true)
	newcomers("ws4", true)
	r.echo()
	r.ended(dead)
}
