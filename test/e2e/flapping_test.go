package e2e

import (
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"fairlead/maps"
	"fairlead/test/lab"
)

var flapping = flag.Duration("flapping", 6*time.Second, "how long a backend flaps in TestFlapping")

// longFlapping is from where on a backend flaps every three seconds, and two thousand connections are on the others.
const longFlapping = time.Minute

// TestFlapping: a backend goes and comes, again and again. The connections of the others do not notice. Held down, it
// changes the ring a few times; not held, each time.
func TestFlapping(t *testing.T) {
	t.Parallel()
	for _, v := range []struct {
		name string
		held bool
	}{{"Held", true}, {"NotHeld", false}} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			testFlapping(t, v.held)
		})
	}
}

func testFlapping(t *testing.T, held bool) {
	const flaps = 3
	half, hold, connections := 300*time.Millisecond, 2*time.Second, 300
	if *flapping >= longFlapping {
		half, hold, connections = 1500*time.Millisecond, 30*time.Second, 2000
	}
	holdDown := "hold_down: 0s"
	if held {
		holdDown = fmt.Sprintf("flaps: %d, flap_window: 1m, hold_down: %v", flaps, hold)
	}
	// The others' checks are patient: nothing that this machine does beside may make them fail.
	fl := mustFleet(t, lab.TwoArm, form{"dsr", 4, 4}, 4, *flapping+hold+time.Minute,
		"health: {type: tcp, interval: 2s, timeout: 2s, fall: 5}")
	fl.amend("name: ws1,", fmt.Sprintf("name: ws1, health: {interval: 100ms, timeout: 50ms, rise: 1, fall: 1, "+
		"%s},", holdDown))
	flappy := fl.topo.Backends()[0]
	fl.begin()
	fl.healthy("ws1", "ws2", "ws3", "ws4")
	unplug := func() {
		t.Helper()
		if err := flappy.Unplug(lab.BackendInterface); err != nil {
			t.Fatal(err)
		}
	}
	unplug()
	fl.until("ws1 is out", func() bool { return fl.shares()["ws1"] == 0 })
	c := fl.crowd()
	if got := c.join(connections); got["ws1"] != 0 {
		t.Fatalf("%d connections reached a backend that is down", got["ws1"])
	}
	if err := c.clients.Chatter(fl.ctx, lab.ChatterOptions{Rate: 1000}); err != nil {
		t.Fatal(err)
	}
	c.echoes(connections)

	// Each look notes who is in the ring: a change is one between two looks, and none lasts for less than a check's interval.
	var last string
	var looks, changes int
	look := func() {
		looks++
		now := fmt.Sprint(fl.shares())
		if last != "" && now != last {
			changes++
		}
		last = now
	}
	look()
	times := int(*flapping / (2 * half))
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	plugged := 0
	for range times {
		for _, plug := range []bool{true, false} {
			if plug {
				plugged++
				if err := flappy.Plug(lab.BackendInterface); err != nil {
					t.Fatal(err)
				}
			} else {
				unplug()
			}
			for until := time.Now().Add(half); time.Now().Before(until); <-tick.C {
				look()
			}
		}
		c.stats()
	}
	b := fl.backend("ws1")
	turns := strings.Count(fl.log(), "msg=\"health changed\" service=service0 backend=ws1")
	t.Logf("plugged in %d times, for %v each: %d looks saw the ring change %d times; health changed %d times in the log, "+
		"and is %v at last", plugged, half, looks, changes, turns, b.Shown.Health)
	if held {
		// Up, and down again, until it is held: the first time it went down was before.
		if most := 2 * (flaps - 1); changes > most {
			t.Errorf("the ring changed %d times, want %d at most", changes, most)
		}
		if b.Shown.Health != maps.HealthHeld {
			t.Errorf("at last its health is %v, want held", b.Shown.Health)
		}
		if l := fl.list("ws1"); l.State != "held" {
			t.Errorf("it is listed as %+v", l)
		}
	} else if least := plugged * 3 / 2; changes < least || changes > turns {
		// On a busy machine a check may come too late for a flap, or its answer.
		t.Errorf("the ring changed %d times, want %d to %d", changes, least, turns)
	}

	// It stays, and is taken back: at once, or when it has been good for long enough.
	if err := flappy.Plug(lab.BackendInterface); err != nil {
		t.Fatal(err)
	}
	good := time.Now()
	fl.within(hold+30*time.Second, "ws1 is back", func() bool { return fl.shares()["ws1"] > 0 })
	back := time.Since(good)
	t.Logf("back after %v", back.Round(time.Millisecond))
	if held && back < hold {
		t.Errorf("it was taken back after %v, want %v at least", back, hold)
	}
	c.echoes(connections)
	if st := c.leave(); st.Servers["ws1"] != 0 {
		t.Errorf("%d connections are with ws1: the others were to have all", st.Servers["ws1"])
	}
}
