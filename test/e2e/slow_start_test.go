package e2e

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"fairlead/maps"
	"fairlead/test/lab"
)

// TestSlowStart: the share of a backend that comes up grows in steps, from a twentieth of its weight to all of it. What is
// open stays where it is.
func TestSlowStart(t *testing.T) {
	t.Parallel()
	const over, steps = 4 * time.Second, 20
	fl := mustFleet(t, lab.TwoArm, form{"dsr", 4, 4}, 2, time.Minute, "slow_start: "+over.String(),
		"health: {type: tcp, interval: 500ms, fast_interval: 100ms, timeout: 500ms, rise: 1, fall: 5}")
	newcomer := fl.topo.Backends()[1]
	if err := newcomer.Unplug(lab.BackendInterface); err != nil {
		t.Fatal(err)
	}
	fl.begin()
	fl.healthy("ws1")
	slow := func(name string) bool { return fl.backend(name).Shown.Orders&maps.OrderSlowStart != 0 }
	fl.until("ws1 has all of its weight", func() bool { return !slow("ws1") })
	c := fl.crowd()
	if got := c.join(100); got["ws1"] != 100 {
		t.Fatalf("newcomers went to %v", got)
	}
	if err := c.clients.Chatter(fl.ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	if fl.shares()["ws2"] != 0 {
		t.Fatalf("shares %v before ws2 is there", fl.shares())
	}

	if err := newcomer.Plug(lab.BackendInterface); err != nil {
		t.Fatal(err)
	}
	var shares []float64 // each that was seen, of all slots
	var at []time.Time
	var listed string
	fl.until("ws2 has all of its weight", func() bool {
		// The list first: what it says may grow until the ring is looked at, not the other way.
		b := fl.backend("ws2")
		is := fl.shares()
		share := float64(is["ws2"]) / float64(is["ws1"]+is["ws2"])
		if last := len(shares) - 1; share > 0 && (last < 0 || share != shares[last]) {
			shares, at = append(shares, share), append(at, time.Now())
		}
		if listed == "" && len(shares) > 2 && slow("ws2") {
			listed = fl.does("backends", "list")
		}
		return b.Shown.Health == maps.HealthUp && b.Shown.Orders&maps.OrderSlowStart == 0 && share > 0.499
	})
	took := at[len(at)-1].Sub(at[0])
	var table []string
	for i, share := range shares {
		table = append(table, fmt.Sprintf("%.1f%%@%.1fs", 100*share, at[i].Sub(at[0]).Seconds()))
	}
	t.Logf("%d shares in %v: %s", len(shares), took.Round(time.Millisecond), strings.Join(table, " "))
	t.Logf("on the way:\n%s", listed)
	// With n of 20 steps behind it, it has n+1 of 20 parts of its weight beside the other's 20.
	step := func(n int) float64 { return float64(n) / float64(steps+n) }
	if !slices.IsSorted(shares) || len(shares) > steps || len(shares) < steps/4 {
		t.Errorf("%d shares, want each to be larger than the one before, and about %d of them: %v", len(shares), steps, shares)
	}
	for i, share := range shares {
		n := int(math.Round(steps * share / (1 - share)))
		if math.Abs(share-step(n)) > 0.002 {
			t.Errorf("share %d is %.4f, want %.4f, that of %d of %d steps", i, share, step(n), n, steps)
		}
	}
	if shares[0] > step(3) || math.Abs(shares[len(shares)-1]-0.5) > 0.001 {
		t.Errorf("it grew from %.3f to %.3f, want from %.3f to 0.5", shares[0], shares[len(shares)-1], step(1))
	}
	// From the first step on, there are 19 more.
	if least, most := over*15/steps, over*25/steps; took < least || took > most {
		t.Errorf("it took %v to grow, want about %v", took, over*(steps-1)/steps)
	}
	if !strings.Contains(listed, "% of it yet") {
		t.Errorf("on the way, backends list said\n%s", listed)
	}
	if got := c.join(100); got["ws2"] < 25 {
		t.Errorf("at last newcomers went to %v", got)
	}
	c.echoes(2 * c.opened)
	c.leave()
}

// reporter is a small HTTP server that tells how its backend is, as the backend's own program would.
type reporter struct {
	status atomic.Int32
	header atomic.Pointer[string]
}

// stateHeader is the header that a reporter speaks by.
const stateHeader = "X-Fairlead-State"

// reporterPort is where it listens.
const reporterPort = 8081

// says changes the answer: a status, and the header's value.
func (r *reporter) says(status int, header string) {
	r.header.Store(&header)
	r.status.Store(int32(status))
}

func (r *reporter) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	if header := *r.header.Load(); header != "" {
		w.Header().Set(stateHeader, header)
	}
	w.WriteHeader(int(r.status.Load()))
}

// mustReport has a reporter in a backend's namespace, that says at first that all is well.
func mustReport(t *testing.T, b *lab.Backend) *reporter {
	t.Helper()
	r := new(reporter)
	r.says(http.StatusOK, "")
	var l net.Listener
	if err := b.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(netip.IPv6Unspecified(), reporterPort).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		err := server.Shutdown(ctx)
		if served := <-done; !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, served)
		}
		if err != nil {
			t.Errorf("end the reporter of %s: %v", b.Name(), err)
		}
	})
	return r
}

// mustReporters is a fleet whose backends are asked how they are.
func mustReporters(t *testing.T, backends int, extra ...string) (*fleet, map[string]*reporter) {
	t.Helper()
	extra = append(extra, fmt.Sprintf("health: {type: http, port: %d, path: /state, drain_status: [404], state_header: %s, "+
		"interval: 500ms, fast_interval: 100ms, timeout: 500ms, rise: 1, fall: 2, hold_down: 0s}", reporterPort, stateHeader))
	fl := mustFleet(t, lab.OneArm, form{"fullnat", 4, 4}, backends, time.Minute, extra...)
	reporters := map[string]*reporter{}
	var names []string
	for _, b := range fl.topo.Backends() {
		reporters[b.Name()] = mustReport(t, b)
		names = append(names, b.Name())
	}
	fl.begin()
	fl.healthy(names...)
	fl.until("all are in the ring", func() bool { return len(fl.shares()) == backends })
	return fl, reporters
}

// TestAnswers: a backend drains, is in maintenance, takes half or nothing by its own word; its connections stay with it
// through all of that.
func TestAnswers(t *testing.T) {
	t.Parallel()
	fl, reporters := mustReporters(t, 2)
	c := fl.crowd()
	c.join(100)
	if err := c.clients.Chatter(fl.ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		status        int
		header        string
		state, health string
		orders        []string
		share         float64 // of ws1
	}{
		{404, "", "draining", "up", []string{"check_drain"}, 0},
		{200, "drain", "draining", "up", []string{"check_drain"}, 0},
		{200, "ready", "up", "up", []string{}, 0.5},
		{200, "50%", "up", "up", []string{"check_weight"}, 1.0 / 3},
		{503, "maint", "draining", "down", []string{"check_maint"}, 0},
		{200, "up, 25%", "up", "up", []string{"check_weight"}, 0.2},
		{200, "0%", "draining", "up", []string{"check_drain"}, 0},
		{200, "nonsense", "up", "up", []string{}, 0.5},
	} {
		reporters["ws1"].says(step.status, step.header)
		what := fmt.Sprintf("status %d and %q", step.status, step.header)
		fl.until(what+" is heeded", func() bool {
			shares := fl.shares()
			share := float64(shares["ws1"]) / float64(shares["ws1"]+shares["ws2"])
			return math.Abs(share-step.share) < 0.002 && slices.Equal(fl.backend("ws1").Shown.Orders.Names(), step.orders)
		})
		l := fl.list("ws1")
		if l.State != step.state || l.Health != step.health || !slices.Equal(l.Orders, step.orders) {
			t.Errorf("%s: ws1 is listed as %+v, want state %q, health %s, orders %v", what, l, step.state, step.health, step.orders)
		}
		t.Logf("%s:\n%s", what, fl.does("backends", "list"))
		if got := c.join(30); (got["ws1"] > 0) != (step.share > 0) || got["ws2"] == 0 {
			t.Errorf("%s: newcomers went to %v; ws1's share is %.2f", what, got, step.share)
		}
		c.echoes(c.opened)
	}
	if n := strings.Count(fl.log(), "nonsense"); n != 1 {
		t.Errorf("a word that means nothing is in the log %d times, want once\n%s", n, fl.log())
	}
	c.leave()
}

// TestPanic: when too few backends are up, the checks' verdict is off, and nobody is reset by it.
func TestPanic(t *testing.T) {
	t.Parallel()
	fl, reporters := mustReporters(t, 3, "panic: 50%")
	c := fl.crowd()
	c.join(90)
	if err := c.clients.Chatter(fl.ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	c.echoes(c.opened)
	said := func(want maps.Health, names ...string) {
		t.Helper()
		for _, name := range names {
			fl.until(fmt.Sprintf("checks say that %s is %v", name, want), func() bool {
				return fl.backend(name).Shown.Health == want
			})
		}
	}
	// Of three, two are up: that is enough to believe that the third is down, and its connections are lost.
	reporters["ws1"].says(http.StatusInternalServerError, "")
	said(maps.HealthDown, "ws1")
	lost := 0
	fl.wait("its clients are told", func() (bool, error) {
		st, err := c.clients.Stats(fl.ctx)
		lost = st.Broken
		return st.Servers["ws1"] == 0, err
	})
	others := fl.crowd()
	if got := others.join(60); got["ws1"] != 0 {
		t.Errorf("newcomers went to %v", got)
	}
	if err := others.clients.Chatter(fl.ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	// One of three is not: nobody is believed to be down any more.
	for _, names := range [][]string{{"ws2"}, {"ws3"}} {
		reporters[names[0]].says(http.StatusInternalServerError, "")
		said(maps.HealthDown, names...)
		fl.until("the checks' verdict is off", func() bool {
			return fl.standing() == maps.StandingPanic && len(fl.shares()) == 3
		})
		others.echoes(2 * others.opened)
	}
	status := fl.does("status")
	t.Logf("status:\n%s\nbackends list:\n%s", status, fl.does("backends", "list"))
	if !strings.Contains(status, "panic: checks' verdict is off") {
		t.Errorf("fairlead status does not tell of a panic:\n%s", status)
	}
	if l := fl.list("ws2"); l.State != "up" || l.Health != "down" {
		t.Errorf("in a panic ws2 is listed as %+v", l)
	}
	if got := others.join(60); got["ws1"] == 0 || got["ws2"] == 0 || got["ws3"] == 0 {
		t.Errorf("in a panic, newcomers went to %v", got)
	}
	others.echoes(2 * others.opened)
	// As soon as two are up again, the third is believed to be down: those who came to it in the panic are told.
	reporters["ws2"].says(http.StatusOK, "")
	said(maps.HealthUp, "ws2")
	others.echoes(others.opened)
	if is := fl.standing(); is != maps.StandingPanic {
		t.Errorf("with one of three up the standing is %q", is)
	}
	before := others.stats().Servers
	reporters["ws3"].says(http.StatusOK, "")
	said(maps.HealthUp, "ws3")
	fl.wait("those who came to ws1 are told", func() (bool, error) {
		st, err := others.clients.Stats(fl.ctx)
		return st.Servers["ws1"] == 0, err
	})
	fl.until("the panic is over", func() bool { return fl.standing() == 0 })
	reporters["ws1"].says(http.StatusOK, "")
	said(maps.HealthUp, "ws1")
	st, err := others.clients.Quiet(fl.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.Broken != before["ws1"] || st.Servers["ws2"] != before["ws2"] || st.Servers["ws3"] != before["ws3"] ||
		st.Moved+st.Wrong+st.ClosedByServer > 0 {
		t.Errorf("of %v those with ws1 were to end, and nobody else: %+v\n%s", before, st, fl.story())
	}
	if st, err := c.clients.Stats(fl.ctx); err != nil || st.Broken != lost || st.Moved+st.Wrong > 0 {
		t.Errorf("%d connections have ended, want the %d of the one that was down while two were up: %+v, %v", st.Broken, lost, st, err)
	}
}

// TestAllDown: where all backends are down and all_down is reset, who comes new is refused at once.
func TestAllDown(t *testing.T) {
	t.Parallel()
	fl, reporters := mustReporters(t, 2, "all_down: reset")
	c := fl.crowd()
	c.join(40)
	for _, r := range reporters {
		r.says(http.StatusServiceUnavailable, "")
	}
	fl.until("all are down", func() bool { return fl.standing() == maps.StandingAllDown && len(fl.shares()) == 0 })
	fl.wait("those who were there are told", func() (bool, error) {
		st, err := c.clients.Stats(fl.ctx)
		return st.Live == 0 && st.Broken == c.opened, err
	})
	status := fl.does("status")
	t.Logf("status:\n%s\nbackends list:\n%s", status, fl.does("backends", "list"))
	if !strings.Contains(status, "all down: new connections are answered RST") {
		t.Errorf("fairlead status does not tell what becomes of newcomers:\n%s", status)
	}
	const attempts = 20
	err := fl.crowd().clients.Open(fl.ctx, lab.OpenOptions{Target: fl.service.addrPort(), Sources: fl.allSources(), Count: attempts})
	if !allRefused(err, attempts) {
		t.Errorf("open %d WebSockets while all are down: %v, want all refused\n%s", attempts, err, fl.story())
	}
	if n := fl.count(fl.set, "reset_no_backend"); n < attempts {
		t.Errorf("%d refusals are counted as reset_no_backend, want %d", n, attempts)
	}
	for _, r := range reporters {
		r.says(http.StatusOK, "")
	}
	fl.until("all are back", func() bool { return fl.standing() == 0 && len(fl.shares()) == 2 })
	again := fl.crowd()
	if got := again.join(40); got["ws1"] == 0 || got["ws2"] == 0 {
		t.Errorf("newcomers went to %v", got)
	}
	again.leave()
}
