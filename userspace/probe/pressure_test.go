package probe

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"fairlead/maps"
)

func TestPressure(t *testing.T) {
	w := newWorld(newRig(t))
	const young, rate = tableSize / youngShare, 1000
	grown := w.crowd(four, 300)
	var mute, alive, gone []*client
	var speaker *client
	for i := range young*9/10 + 1 {
		k := newClient(four, 1000+i)
		k.mute = 1000
		switch {
		case i < 100:
			k.mute = i % 3 // answers the first, second or third
			alive = append(alive, k)
		case i < 150:
			k.mute, k.gone = 0, true
			gone = append(gone, k)
		case i == 150:
			speaker = k // speaks after its last probe
		default:
			mute = append(mute, k)
		}
		if i == young*9/10 {
			break // one more and it is pressed
		}
		w.begin(k)
		w.clients[k.tuple.Source] = k
	}
	last := mute[len(mute)-1]
	mute = mute[:len(mute)-1]

	synctest.Test(t, func(t *testing.T) {
		teller := w.newTeller(w)
		began, base := time.Now(), maps.Now()
		teller.ticks = func() uint32 { return base + maps.Ticks(time.Since(began)) }
		pass(time.Minute)
		teller.Pressure(t.Context(), rate)
		synctest.Wait()
		if n := w.logged.count("nearly full"); n != 0 || w.count() > 0 {
			t.Fatalf("%d young of %d are no pressure: %d probes", w.set.Control.Young(), young, w.count())
		}
		w.begin(last)
		w.clients[last.tuple.Source] = last
		for range 2 {
			w.begin(newClient(four, 20000+len(w.clients)))
		}

		asked := time.Now()
		for range 3 {
			teller.Pressure(t.Context(), rate)
		}
		pass(2 * time.Second)
		w.run(speaker.segment(ack, 0), clientMAC)
		teller.Wait()
		if n := w.logged.count("nearly full"); n != 1 {
			t.Errorf("its beginning was said %d times", n)
		}
		if n := w.logged.count("asked no more"); n != 1 {
			t.Errorf("its end was said %d times", n)
		}
		if took := time.Since(asked); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		within10(t, "probes", perSecond(asked, w.sent), rate)
		if w.set.Control.Young()*100 > young*eased {
			t.Errorf("%d young ones are left of %d", w.set.Control.Young(), young)
		}
		for _, k := range grown {
			if _, found := w.entry(k); !found || len(k.probes) > 0 {
				t.Fatalf("%v is grown: there %t, probes %d", k.tuple, found, len(k.probes))
			}
		}
		removed := 0
		for _, k := range mute {
			if _, found := w.entry(k); found {
				continue
			}
			if removed++; len(k.probes) != lastAsking {
				t.Fatalf("%v was let go after %d probes", k.tuple, len(k.probes))
			}
		}
		if removed < young/20 {
			t.Errorf("%d were let go", removed)
		}
		if n := w.logged.count(fmt.Sprintf("let_go=%d ", removed)); n != 1 {
			t.Errorf("%d were let go, and not said", removed)
		}
		probed := 0
		for _, k := range w.clients {
			if len(k.probes) > 0 {
				probed++
			}
		}
		if n := w.logged.count(fmt.Sprintf("asked=%d ", probed)); n != 1 {
			t.Errorf("%d were asked, and not said", probed)
		}
		t.Logf("%d of %d were let go, %d probes", removed, len(mute), w.count())
		for _, k := range append(alive, speaker) {
			if c, found := w.entry(k); !found || c.State&(maps.StateIdle|maps.StateCondemned) != 0 {
				t.Errorf("%v shows itself, and is there %t, %v", k.tuple, found, c.State)
			}
		}
		for _, k := range gone {
			if c, found := w.entry(k); found && !c.State.Closing() && len(k.probes) > 0 {
				t.Errorf("%v: its host answered RST, and it is %v", k.tuple, c.State)
			}
		}
	})
}

// Nobody is let go for lack of an answer to what could not be asked.
func TestPressureUnsent(t *testing.T) {
	w := newWorld(newRig(t))
	var all []*client
	for i := range tableSize/youngShare*9/10 + 2 {
		k := newClient(six, i)
		w.begin(k)
		w.clients[k.tuple.Source] = k
		all = append(all, k)
	}
	w.fail = errors.New("the network is down")
	synctest.Test(t, func(t *testing.T) {
		teller := w.newTeller(w)
		began, base := time.Now(), maps.Now()
		teller.ticks = func() uint32 { return base + maps.Ticks(time.Since(began)) }
		pass(time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		teller.Pressure(ctx, 10_000)
		pass(time.Minute)
		cancel()
		teller.Wait()
		for _, k := range all {
			if _, found := w.entry(k); !found {
				t.Fatal("one was let go")
			}
		}
	})
}

// shifted makes some entries look as if they had been heard of long after they were opened.
type shifted struct {
	Connections
	late map[maps.Tuple]bool
}

func (s shifted) shift(c *maps.Connection) {
	if s.late[c.Tuple] {
		c.Opened -= maps.Ticks(20 * time.Second)
	}
}

func (s shifted) Walk(visit func(*maps.Connection) error) error {
	return s.Connections.Walk(func(c *maps.Connection) error {
		s.shift(c)
		return visit(c)
	})
}

func (s shifted) Get(t maps.Tuple) (maps.Connection, bool, error) {
	c, found, err := s.Connections.Get(t)
	s.shift(&c)
	return c, found, err
}

// Three packets from nowhere make an entry that isn't young: where the table is full of those, they are asked too.
func TestPressureHasty(t *testing.T) {
	w := newWorld(newRig(t))
	all := w.crowd(four, tableSize*91/100)
	var alive, mute []*client
	late := make(map[maps.Tuple]bool)
	for i, k := range all {
		switch {
		case i < 1000: // idle ever since, and there: the first, second or third probe is answered
			k.mute = i % 3
			alive = append(alive, k)
		case i < 2000: // as silent as the dead, but heard of long after its beginning
			k.mute = 1000
			late[k.tuple] = true
			alive = append(alive, k)
		default:
			k.mute = 1000
			mute = append(mute, k)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		teller := w.newTeller(w)
		teller.Connections = shifted{teller.Connections, late}
		began, base := time.Now(), maps.Now()
		teller.ticks = func() uint32 { return base + maps.Ticks(time.Since(began)) }
		pass(20 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		teller.Pressure(ctx, 10_000)
		pass(5 * time.Second)
		if w.count() > 0 {
			t.Fatalf("%d probes within two epochs of their beginning", w.count())
		}
		pass(50 * time.Second)
		cancel()
		teller.Wait()
		if teller.crowded(eased) {
			t.Errorf("%d connections are left of %d", w.set.Control.Connections(), tableSize)
		}
		removed := 0
		for _, k := range mute {
			if _, found := w.entry(k); !found {
				removed++
			}
		}
		if removed < tableSize/20 {
			t.Errorf("%d of %d were let go", removed, len(mute))
		}
		for _, k := range alive {
			c, found := w.entry(k)
			if !found || len(k.probes) > k.mute%1000+1 || late[k.tuple] && (len(k.probes) > 0 || c.State&maps.StateIdle != 0) {
				t.Fatalf("%v is alive: there %t, %v, %d probes", k.tuple, found, c.State, len(k.probes))
			}
		}
	})
}
