package probe

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"fairlead/maps"
)

// pass lets so much of a bubble's time pass, and waits until nobody has anything to do.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func within10(t *testing.T, what string, counts []int, rate int) {
	t.Helper()
	for second, n := range counts {
		if n < rate*9/10 && second < len(counts)-1 || n > rate*11/10 {
			t.Errorf("%s: %d in second %d, %d are right: %v", what, n, second, rate, counts)
			return
		}
	}
}

func TestLost(t *testing.T) {
	w := newWorld(newRig(t))
	const rate = 500
	v4, v6, natted, strangers := w.crowd(four, 3000), w.crowd(six, 700), w.crowd(full, 700), w.crowd(others, 500)
	for i := range 20 {
		w.open(newClient(datagrams, i))
	}
	closed := v4[:10] // by RSTs of their own
	for _, k := range closed {
		w.run(k.segment(rst|ack, 0), clientMAC)
	}
	late, mute, gone := v4[10:60], v4[60:80], v4[80:100]
	for _, k := range late {
		k.mute = 1 + random.IntN(4)
	}
	for _, k := range mute {
		k.mute = 1000
	}
	for _, k := range gone {
		k.gone = true
	}
	for _, service := range []int{four, six, full} {
		w.change(service, goDown)
	}
	spoke := v4[100:110] // and are told before anyone probes
	for _, k := range spoke {
		if out, _ := w.run(k.segment(ack|psh, 4), clientMAC); out.flags&rst == 0 {
			t.Fatalf("not answered RST: %+v", out)
		}
	}

	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		teller := w.newTeller(w)
		campaign := teller.Lost(t.Context(), w.backend(four), rate)
		pass(time.Second)
		if p := campaign.Progress(); p.Counted || p.Probes < rate*9/10 || p.Told < rate/3 || p.Left >= 0 {
			t.Errorf("after a second: %+v", p)
		}
		if err := campaign.Wait(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < 3*time.Minute || took > 3*time.Minute+20*time.Second {
			t.Errorf("it took %v", took)
		}
		if got, want := campaign.Progress(), (Progress{Counted: true, Closed: 2970 - 10, Told: 2970 - 10, Silent: 20,
			Probes: campaign.Progress().Probes}); got != want {
			t.Errorf("at the end: %+v, not %+v", got, want)
		}
		counts := perSecond(began, w.sent)
		within10(t, "probes", counts[:5], rate)
		if most := largestBurst(w.sent); most > rate/50 {
			t.Errorf("a burst of %d", most)
		}
		for _, k := range slices.Concat(closed, spoke) {
			if len(k.probes) > 0 {
				t.Fatalf("%v was probed, though its end was known", k.tuple)
			}
		}
		for _, k := range v4[110:] {
			if len(k.probes) != 1 || k.told.IsZero() {
				t.Fatalf("%v: probed %d times, told %v", k.tuple, len(k.probes), k.told)
			}
		}
		for _, k := range late {
			if len(k.probes) != k.mute+1 || k.told.IsZero() {
				t.Errorf("%v answers %d probes late: probed %d times, told %v", k.tuple, k.mute, len(k.probes), k.told)
			}
		}
		for _, k := range mute {
			if len(k.probes) != lastProbe {
				t.Errorf("%v answers nothing: probed %d times", k.tuple, len(k.probes))
			}
			for i := range len(k.probes) - 1 {
				gap, want := k.probes[i+1].Sub(k.probes[i]), patience(uint8(i+1))
				if gap < want || gap > want+want/10+50*time.Millisecond {
					t.Errorf("probe %d came %v after the one before, %v is right", i+2, gap, want)
				}
			}
		}
		for _, k := range gone {
			if c, found := w.entry(k); found && c.State&maps.StateClientTold == 0 {
				t.Errorf("%v: its host's RST did not end it: %v", k.tuple, c.State)
			}
		}
		for _, k := range slices.Concat(v6, natted, strangers) {
			if len(k.probes) > 0 {
				t.Fatalf("%v of another backend was probed", k.tuple)
			}
		}

		// Two at once, each at its own pace.
		w.sent, began = nil, time.Now()
		a, b := teller.Lost(t.Context(), w.backend(six), rate), teller.Lost(t.Context(), w.backend(full), rate)
		for _, c := range []*Campaign{a, b} {
			if err := c.Wait(); err != nil || c.Progress().Told != 700 || c.Progress().Probes != 700 || c.Progress().Left != 0 {
				t.Errorf("%v, %+v", err, c.Progress())
			}
		}
		within10(t, "probes of two", perSecond(began, w.sent), 2*rate)
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("it took %v", took)
		}
		// There is nobody left to tell, and UDP has no probes.
		w.change(datagrams, goDown)
		w.sent = nil
		for _, service := range []int{six, datagrams} {
			if err := teller.Lost(t.Context(), w.backend(service), rate).Wait(); err != nil || w.count() > 0 {
				t.Errorf("%v, %d probes", err, w.count())
			}
		}
	})
	if w.largest > batchSize {
		t.Errorf("a batch of %d", w.largest)
	}
}

// A backend that comes back is forgiven at once: not one probe is sent after the campaign's end.
func TestLostForgiven(t *testing.T) {
	w := newWorld(newRig(t))
	w.crowd(four, 1000)
	w.change(four, goDown)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		campaign := w.newTeller(w).Lost(ctx, w.backend(four), 100)
		pass(3 * time.Second)
		cancel()
		if err := campaign.Wait(); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		sent := w.count()
		if sent < 290 || sent > 310 {
			t.Errorf("%d probes in three seconds", sent)
		}
		pass(time.Minute)
		if w.count() != sent {
			t.Errorf("%d probes after the end", w.count()-sent)
		}
		if p := campaign.Progress(); p.Unsent != 0 || int(p.Probes) != sent {
			t.Errorf("%+v", p)
		}
	})
}

// Where newcomers are tried on a dead backend, they are left alone; and who turns out to be served is not asked for long.
func TestLostSpared(t *testing.T) {
	w := newWorld(newRig(t))
	old := w.crowd(four, 50)
	w.change(four, func(b *maps.WantedBackend) { b.Down, b.Tried = true, true })
	down := maps.Now()
	eventually(t, "another tick", func() bool { return maps.Now() > down+1 })
	var newcomers []*client
	for i := range 50 {
		k := newClient(four, 1000+i)
		w.open(k)
		w.clients[k.tuple.Source] = k
		newcomers = append(newcomers, k)
	}
	mute := old[:10]
	for _, k := range mute {
		k.mute = 2
	}
	synctest.Test(t, func(t *testing.T) {
		campaign := w.newTeller(w).Lost(t.Context(), w.backend(four), 100)
		pass(time.Second)
		// It is back, and nobody has said so.
		w.change(four, func(b *maps.WantedBackend) { b.Down, b.Tried = false, false })
		if err := campaign.Wait(); err != nil {
			t.Error(err)
		}
		if got := campaign.Progress(); got.Told != 40 || got.Spared != 10 || got.Living != 0 || got.Silent != 0 {
			t.Errorf("%+v", got)
		}
		for _, k := range newcomers {
			if len(k.probes) > 0 {
				t.Fatalf("%v is served, and was probed", k.tuple)
			}
		}
		for _, k := range mute {
			if k.forwarded == 0 || !k.told.IsZero() || len(k.probes) != lastAsking {
				t.Errorf("%v: %d answers forwarded, %d probes", k.tuple, k.forwarded, len(k.probes))
			}
		}
	})
}

func TestDrain(t *testing.T) {
	w := newWorld(newRig(t))
	const rate, n = 500, 5000
	crowd := w.crowd(four, n)
	strangers := w.crowd(others, 100)
	mute := crowd[:10]
	for _, k := range mute {
		k.mute = 1000
	}
	// Half-open when it begins, confirmed long afterwards.
	straggler := newClient(four, 29000)
	w.clients[straggler.tuple.Source] = straggler
	opening := straggler.segment(syn, 0)
	opening.sequence--
	w.run(opening, clientMAC)
	w.change(four, drained)

	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		campaign := w.newTeller(w).Drain(t.Context(), w.backend(four), DrainOptions{Rate: rate, ResetRate: 20_000})
		synctest.Wait()
		if p := campaign.Progress(); !p.Counted || p.Living != n || p.Left < 9*time.Second || p.Left > 11*time.Second {
			t.Errorf("at the beginning: %+v", p)
		}
		pass(5 * time.Second)
		if p := campaign.Progress(); p.Living+p.Closed != n || p.Closing < 500 || p.Closing > 650 ||
			p.Left < 5*time.Second || p.Left > 6*time.Second {
			t.Errorf("halfway: %+v", p)
		}
		left := crowd[10:][slices.IndexFunc(crowd[10:], func(k *client) bool { return len(k.probes) == 0 })]
		left.gone = true // it ends by itself before its turn
		w.run(left.segment(rst|ack, 0), clientMAC)
		pass(7 * time.Second)
		if p := campaign.Progress(); p.Living != len(mute) || p.Closing != len(mute) || p.Closed != n-len(mute) {
			t.Errorf("after twelve seconds: %+v", p)
		}
		for _, k := range []*client{straggler} {
			w.run(k.segment(ack, 0), clientMAC)
		}
		pass(7 * time.Second)
		if straggler.told.IsZero() {
			t.Error("one that was confirmed late was not found")
		}

		var firsts, tells []time.Time
		var order []int
		for i, k := range crowd {
			if k == left {
				if len(k.probes) != 0 {
					t.Error("one that had ended was probed")
				}
				continue
			}
			firsts = append(firsts, k.probes[0])
			if i < len(mute) {
				continue
			}
			order = append(order, i)
			tells = append(tells, k.told)
			if len(k.probes) != 2 || k.backendTold != k.probes[0] || k.told != k.probes[1] {
				t.Fatalf("%v: probed at %v, its backend told at %v, itself at %v", k.tuple, k.probes, k.backendTold, k.told)
			}
			if gap := k.probes[1].Sub(k.probes[0]); gap < retry || gap > retry+20*time.Millisecond {
				t.Fatalf("%v: the second probe came after %v", k.tuple, gap)
			}
		}
		within10(t, "condemned", perSecond(began, firsts), rate)
		within10(t, "told, from the first on", perSecond(slices.MinFunc(tells, time.Time.Compare), tells), rate)
		slices.SortFunc(firsts, time.Time.Compare)
		if most := largestBurst(firsts); most > rate/50 {
			t.Errorf("a burst of %d", most)
		}
		// Each second's window that begins anywhere holds what is right.
		for i, at := range firsts[:n-2*rate] {
			in := 0
			for _, other := range firsts[i:] {
				if other.Sub(at) >= time.Second {
					break
				}
				in++
			}
			if in < rate*9/10 || in > rate*11/10 {
				t.Fatalf("%d within a second", in)
			}
		}
		// Neither as they were opened, nor with a beat.
		slices.SortFunc(order, func(a, b int) int { return crowd[a].probes[0].Compare(crowd[b].probes[0]) })
		rising := 0
		for i := range len(order) - 1 {
			if order[i] < order[i+1] {
				rising++
			}
		}
		if rising < n*4/10 || rising > n*6/10 {
			t.Errorf("of %d steps %d go up: that is no random order", len(order), rising)
		}
		for _, k := range strangers {
			if len(k.probes) > 0 {
				t.Fatal("another backend's connection was probed")
			}
		}
		if err := campaign.Wait(); err != nil {
			t.Error(err)
		}
		if p := campaign.Progress(); p.Living != 0 || p.Closed != n+1-len(mute) || p.Silent != len(mute) || p.Left != 0 {
			t.Errorf("at the end: %+v", p)
		}
	})
}

// At the deadline the rest goes at the reset rate; without a rate nobody goes before it.
func TestDrainDeadline(t *testing.T) {
	for _, rate := range []uint32{0, 20} {
		t.Run(fmt.Sprint("rate", rate), func(t *testing.T) {
			w := newWorld(newRig(t))
			w.crowd(four, 1000)
			w.change(four, drained)
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				deadline := began.Add(30 * time.Second)
				ctx, cancel := context.WithCancel(t.Context())
				campaign := w.newTeller(w).Drain(ctx, w.backend(four), DrainOptions{Rate: rate, Deadline: deadline, ResetRate: 200})
				synctest.Wait()
				rest := 1000 - 30*int(rate)
				want := 30*time.Second + time.Duration(rest)*time.Second/200
				if left := campaign.Progress().Left; left < want-time.Second || left > want+2*time.Second {
					t.Errorf("%v left, %v is right", left, want)
				}
				pass(30*time.Second - 10*time.Millisecond)
				if p := campaign.Progress(); p.Living+p.Closed != 1000 || w.count() > 2*30*int(rate) ||
					p.Closed+p.Closing < 30*int(rate)-1 || p.Closed+p.Closing > 30*int(rate)+1 {
					t.Errorf("before the deadline: %+v, %d probes", p, w.count())
				}
				pass(time.Until(began.Add(want + 2*time.Second)))
				if p := campaign.Progress(); p.Living != 0 || p.Closed != 1000 || p.Told != 1000 {
					t.Errorf("after it: %+v", p)
				}
				cancel()
				if err := campaign.Wait(); !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		})
	}
	w := newWorld(newRig(t))
	w.crowd(four, 10)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		campaign := w.newTeller(w).Drain(ctx, w.backend(four), DrainOptions{ResetRate: 200})
		pass(time.Hour)
		if p := campaign.Progress(); p.Living != 10 || p.Left >= 0 || w.count() > 0 {
			t.Errorf("neither rate nor deadline: %+v", p)
		}
		cancel()
		<-campaign.Done()
	})
}

// A drain that was interrupted goes on with those who were condemned and not told, and UDP's are condemned unprobed.
func TestDrainAgain(t *testing.T) {
	w := newWorld(newRig(t))
	crowd := w.crowd(full, 100)
	for _, k := range crowd[:50] {
		c, _ := w.entry(k)
		if _, err := w.manager.Condemn([]maps.Connection{c}); err != nil {
			t.Fatal(err)
		}
	}
	k := newClient(datagrams, 1)
	w.open(k)
	// Under dsr UDP is confirmed by what comes a second later.
	eventually(t, "the entry of UDP", func() bool {
		w.open(k)
		_, found := w.entry(k)
		return found
	})
	w.change(full, drained)
	synctest.Test(t, func(t *testing.T) {
		teller := w.newTeller(w)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		campaign := teller.Drain(ctx, w.backend(full), DrainOptions{Rate: 10, ResetRate: 1000})
		pass(7 * time.Second) // with a look through the table in between
		if p := campaign.Progress(); p.Living+p.Closed != 100 || p.Living < 29 {
			t.Errorf("after seven seconds: %+v", p)
		}
		pass(5 * time.Second)
		if p := campaign.Progress(); p.Told != 100 || p.Living != 0 {
			t.Errorf("after twelve: %+v", p)
		}
		sent := w.count()
		udp := teller.Drain(ctx, w.backend(datagrams), DrainOptions{Rate: 10, ResetRate: 1000})
		pass(time.Second)
		if p := udp.Progress(); p.Living != 1 || p.Closing != 1 || w.count() != sent {
			t.Errorf("UDP: %+v, %d probes", p, w.count()-sent)
		}
		w.run(k.segment(0, 4), clientMAC)
		pass(3 * time.Second)
		if p := udp.Progress(); p.Living != 0 || p.Told != 1 {
			t.Errorf("UDP: %+v", p)
		}
		cancel()
		teller.Wait()
	})
}

func TestOne(t *testing.T) {
	w := newWorld(newRig(t))
	crowd := w.crowd(six, 10)
	synctest.Test(t, func(t *testing.T) {
		teller := w.newTeller(w)
		c, _ := w.entry(crowd[0])
		began := time.Now()
		campaign := teller.One(t.Context(), c)
		if err := campaign.Wait(); err != nil {
			t.Error(err)
		}
		if p := campaign.Progress(); p.Told != 1 || p.Probes != 2 || p.Living != 0 || time.Since(began) > 2*time.Second {
			t.Errorf("%+v after %v", p, time.Since(began))
		}
		if crowd[0].backendTold.IsZero() || crowd[0].told.IsZero() {
			t.Error("not both ends were told")
		}
		for _, k := range crowd[1:] {
			if len(k.probes) > 0 {
				t.Error("another one was probed")
			}
		}
		// What is gone already needs nothing.
		again := teller.One(t.Context(), c)
		if err := again.Wait(); err != nil || again.Progress().Probes != 0 || again.Progress().Closed != 1 {
			t.Errorf("%v, %+v", err, again.Progress())
		}
	})
}

// What can't be sent is said, counted and tried again.
func TestUnsent(t *testing.T) {
	w := newWorld(newRig(t))
	w.crowd(four, 20)
	w.change(four, goDown)
	synctest.Test(t, func(t *testing.T) {
		w.fail = errors.New("the network is down")
		campaign := w.newTeller(w).Lost(t.Context(), w.backend(four), 1000)
		pass(time.Second)
		w.mu.Lock()
		w.fail = nil
		w.mu.Unlock()
		if err := campaign.Wait(); err != nil {
			t.Error(err)
		}
		if p := campaign.Progress(); p.Unsent != 40 || p.Probes != 20 || p.Told != 20 {
			t.Errorf("%+v", p)
		}
	})
	if n := w.logged.count("the network is down"); n != 1 {
		t.Errorf("said %d times", n)
	}
}

// failing is a table whose reads and changes fail, so often each.
type failing struct {
	Connections
	Keeper
	walks, condemns int
}

var errTable = errors.New("out of memory")

func (f *failing) Walk(visit func(*maps.Connection) error) error {
	if f.walks--; f.walks < 0 {
		return f.Connections.Walk(visit)
	}
	n := 0
	return f.Connections.Walk(func(c *maps.Connection) error {
		if n++; n > 100 {
			return errTable
		}
		return visit(c)
	})
}

func (f *failing) Condemn(list []maps.Connection) (int, error) {
	if f.condemns--; f.condemns >= 0 {
		return 0, errTable
	}
	return f.Keeper.Condemn(list)
}

// A table that can't be read, or changed, for a while is said, and what can be done is.
func TestTableFails(t *testing.T) {
	w := newWorld(newRig(t))
	w.crowd(four, 200)
	w.crowd(six, 200)
	w.change(four, goDown)
	w.change(six, drained)
	table := &failing{w.set.Connections, w.manager, 2, 5}
	synctest.Test(t, func(t *testing.T) {
		teller := w.newTeller(w)
		teller.Connections, teller.Keeper = table, table
		for _, k := range w.clients {
			if k.service == four && k.tuple.Source.Port()%10 == 0 {
				k.mute = 3 // is in hand when the table is read again
			}
		}
		lost := teller.Lost(t.Context(), w.backend(four), 1000)
		if err := lost.Wait(); err != nil {
			t.Error(err)
		}
		if p := lost.Progress(); !p.Counted || p.Told != 200 || p.Living != 0 {
			t.Errorf("the table could be read at the third try: %+v", p)
		}
		table.walks = walkTries
		for _, k := range w.clients {
			if n := len(k.probes); k.service == four && n != k.mute+1 {
				t.Errorf("%v was probed %d times, and answers the probe behind %d", k.tuple, n, k.mute)
			}
		}
		w.change(datagrams, goDown)
		if err := teller.Lost(t.Context(), w.backend(datagrams), 1000).Wait(); !errors.Is(err, errTable) {
			t.Errorf("the table can't be read: %v", err)
		}
		table.walks = 1
		ctx, cancel := context.WithCancel(t.Context())
		drain := teller.Drain(ctx, w.backend(six), DrainOptions{Rate: 100, ResetRate: 1000})
		pass(time.Second)
		if p := drain.Progress(); p.Counted || p.Living != 0 || p.Left >= 0 {
			t.Errorf("the table could not be read: %+v", p)
		}
		pass(10 * time.Second)
		if p := drain.Progress(); p.Told != 200 || p.Living != 0 {
			t.Errorf("it can: %+v", p)
		}
		cancel()
		teller.Wait()
	})
	if n := w.logged.count("out of memory"); n != 3 { // once a campaign
		t.Errorf("said %d times", n)
	}
}
