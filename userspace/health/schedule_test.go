package health

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead/userspace/config"
)

// played is a Checker that runs on a clock of the test's own, with checks that the test answers.
type played struct {
	*Checker
	t      *testing.T
	takes  time.Duration // how long each check takes
	cancel context.CancelFunc

	mu     sync.Mutex
	answer func(Key) outcome       // what each check finds
	starts map[Key][]time.Duration // since the beginning
	begun  time.Time
	now    int // checks that run
	most   int
	told   [][]Report
	log    bytes.Buffer
}

func (p *played) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

// find has checks find something else from now on.
func (p *played) find(answer func(Key) outcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = answer
}

// heard returns what OnChange was told so far.
func (p *played) heard() [][]Report {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.told)
}

func (p *played) running() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

func (p *played) logged() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

func play(t *testing.T, parallel int) *played {
	p := &played{t: t, answer: func(Key) outcome { return outcome{verdict: good, percent: 100} },
		starts: map[Key][]time.Duration{}, begun: time.Now()}
	p.Checker = New(Options{Parallel: parallel, Logger: slog.New(slog.NewTextHandler(p, nil)), OnChange: func(all []Report) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.told = append(p.told, all)
	}})
	p.newProbe = func(target Target) probe {
		return func(ctx context.Context) outcome {
			p.mu.Lock()
			p.starts[target.Key] = append(p.starts[target.Key], time.Since(p.begun))
			p.now++
			p.most = max(p.most, p.now)
			answer := p.answer
			p.mu.Unlock()
			defer func() {
				p.mu.Lock()
				p.now--
				p.mu.Unlock()
			}()
			o := answer(target.Key)
			if o.timeout || p.takes > 0 {
				wait := p.takes
				if o.timeout {
					wait = target.Check.Timeout
				}
				select {
				case <-time.After(wait):
				case <-ctx.Done():
				}
			}
			return o
		}
	}
	return p
}

// run starts Run; it ends with the test, and must then return nil.
func (p *played) run() {
	ctx, cancel := context.WithCancel(p.t.Context())
	result := make(chan error, 1)
	go func() { result <- p.Run(ctx) }()
	p.cancel = sync.OnceFunc(func() {
		cancel()
		if err := <-result; err != nil {
			p.t.Errorf("Run: %v", err)
		}
	})
}

// pass lets time pass, and what happens in it happen.
func (p *played) pass(d time.Duration) {
	time.Sleep(d) // on the test's clock
	synctest.Wait()
}

func (p *played) count(k Key) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.starts[k])
}

func (p *played) status(k Key) Status {
	for _, r := range p.Reports() {
		if r.Key == k {
			return r.Status
		}
	}
	p.t.Fatalf("no report of %v", k)
	return Unknown
}

func key(i int) Key {
	return Key{Service: "s", Backend: fmt.Sprintf("b%04d", i),
		Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 80)}
}

func targets(n int, check config.Health) (all []Target) {
	for i := range n {
		all = append(all, Target{Key: key(i), Check: check})
	}
	return all
}

func TestScheduleSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 2000
		check := judged()
		check.Jitter = 10
		p := play(t, 256)
		p.takes = 20 * time.Millisecond
		p.Set(targets(n, check))
		p.run()
		defer p.cancel()
		p.pass(60 * time.Second)
		p.mu.Lock()
		defer p.mu.Unlock()
		slots := map[time.Duration]int{} // of 100 ms
		shortest, longest := time.Hour, time.Duration(0)
		for _, starts := range p.starts {
			if first := starts[0]; first > firstWithin {
				t.Errorf("first check after %s", first)
			}
			for i := 1; i < len(starts); i++ {
				low, high := 1800*time.Millisecond, 2200*time.Millisecond
				gap := starts[i] - starts[i-1]
				if i == 1 { // cut at random
					low, high = 0, 2*time.Second
				} else {
					shortest, longest = min(shortest, gap), max(longest, gap)
				}
				if gap < low || gap > high {
					t.Errorf("check %d came %s after the one before, want %s to %s", i, gap, low, high)
				}
			}
			if got := len(starts); got < 27 {
				t.Errorf("a backend had %d checks in a minute", got)
			}
			for _, s := range starts {
				slots[s/(100*time.Millisecond)]++
			}
		}
		if shortest > 1810*time.Millisecond || longest < 2190*time.Millisecond {
			t.Errorf("of some 50,000 intervals, the shortest is %s, the longest %s", shortest, longest)
		}
		if len(p.starts) != n {
			t.Errorf("%d backends were checked", len(p.starts))
		}
		// Evenly spread, each slot has 100, give or take a few standard deviations of 10.
		for slot, count := range slots {
			if slot > 50 && slot < 590 && (count < 50 || count > 150) {
				t.Errorf("%d checks began in the 100 ms after %s", count, slot*100*time.Millisecond)
			}
		}
		if p.most > 256 {
			t.Errorf("%d checks at once", p.most)
		}
	})
}

// TestScheduleStalled makes all checks overdue at once, as a process finds them that was stopped: they must not go on
// side by side.
func TestScheduleStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 1000
		check := judged()
		check.Jitter = 10
		p := play(t, n)
		p.Set(targets(n, check))
		p.run()
		defer p.cancel()
		p.pass(10 * time.Second)
		p.Checker.mu.Lock()
		for _, e := range p.entries {
			e.due = time.Now().Add(-20 * time.Second)
		}
		p.Checker.mu.Unlock()
		poke(p.wake)
		p.pass(10 * time.Second)
		p.mu.Lock()
		defer p.mu.Unlock()
		slots := map[time.Duration]int{} // of 100 ms
		for _, starts := range p.starts {
			for _, s := range starts {
				slots[s/(100*time.Millisecond)]++
			}
		}
		for slot, count := range slots {
			if slot == 100 && count < n || slot > 100 && count > 2*n/20 {
				t.Errorf("%d checks began in the 100 ms after %s", count, slot*100*time.Millisecond)
			}
		}
	})
}

// TestScheduleDead has most of a crowd die by silence: the others must not wait for them.
func TestScheduleDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, parallel = 400, 32
		check := judged()
		check.HoldDown = 0
		p := play(t, parallel)
		var dying atomic.Bool
		p.find(func(k Key) outcome {
			if dying.Load() && k.Backend >= "b0040" {
				return outcome{verdict: bad, reason: "no answer within 1s", timeout: true}
			}
			return outcome{verdict: good, percent: 100}
		})
		p.Set(targets(n, check))
		p.run()
		defer p.cancel()
		p.pass(10 * time.Second)
		dying.Store(true)
		p.pass(2 * time.Minute) // 360 seconds of waiting a round, three rounds, 32 at once: 34 s
		for i := range n {
			if want := map[bool]Status{true: Up, false: Down}[i < 40]; p.status(key(i)) != want {
				t.Errorf("%s is %s", key(i).Backend, p.status(key(i)))
			}
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		for i := range n {
			starts := p.starts[key(i)]
			most := 3 * time.Second // 32 at once, a quarter of them for the living
			if i >= 40 {
				most = 360*time.Second/24 + 5*time.Second
			}
			for j := 1; j < len(starts); j++ {
				if gap := starts[j] - starts[j-1]; starts[j] > 70*time.Second && gap > most {
					t.Errorf("%s waited %s for a check, want at most %s", key(i).Backend, gap, most)
				}
			}
		}
		if p.most > parallel {
			t.Errorf("%d checks at once", p.most)
		}
		if got := strings.Count(p.log.String(), "checks are late"); got < 1 || got > 3 {
			t.Errorf("lateness was logged %d times in two minutes", got)
		}
	})
}

func TestFastWhileInDoubt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 4)
		var failing atomic.Bool
		p.find(func(Key) outcome {
			if failing.Load() {
				return outcome{verdict: bad, reason: "x"}
			}
			return outcome{verdict: good, percent: 100}
		})
		p.Set(targets(1, judged()))
		p.run()
		defer p.cancel()
		p.pass(10 * time.Second)
		failing.Store(true)
		p.pass(2*time.Second + 2*500*time.Millisecond)
		if s := p.status(key(0)); s != Down {
			t.Errorf("after an interval and two fast ones: %s", s)
		}
		failing.Store(false)
		p.pass(2*time.Second + 500*time.Millisecond)
		if s := p.status(key(0)); s != Up {
			t.Errorf("after an interval and a fast one: %s", s)
		}
		var statuses []Status
		for _, batch := range p.heard() {
			statuses = append(statuses, batch[0].Status)
		}
		// Up at first; a first failure; down; up again.
		if diff := cmp.Diff([]Status{Up, Up, Down, Up}, statuses); diff != "" {
			t.Errorf("told (-want +got):\n%s", diff)
		}
		for _, line := range []string{`from=unknown to=up reason="the first check was good"`, "from=up to=down reason=x",
			`from=down to=up reason="good checks in a row: 2"`} {
			if got := strings.Count(p.logged(), line); got != 1 {
				t.Errorf("logged %d times: %s\n%s", got, line, p.logged())
			}
		}
	})
}

func TestHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		check := judged()
		check.Interval = time.Hour
		p := play(t, 4)
		p.Set(targets(2, check))
		p.run()
		defer p.cancel()
		p.pass(2 * time.Hour)
		before, other := p.count(key(0)), p.count(key(1))
		// A storm of hurries for 1.9 seconds: at once, then each fast interval.
		for range 190 {
			p.Hurry(key(0))
			p.pass(10 * time.Millisecond)
		}
		if got := p.count(key(0)) - before; got != 4 {
			t.Errorf("%d checks in 1.9 s of hurry, want 4", got)
		}
		if got := p.count(key(1)) - other; got != 0 {
			t.Errorf("the other backend had %d checks", got)
		}
		p.Hurry(Key{Service: "not there"})
		// A failing one counts as any, and three of them are down.
		p.pass(time.Second)
		p.find(func(Key) outcome { return outcome{verdict: bad, reason: "x"} })
		p.Hurry(key(0))
		p.pass(0)
		if r := p.Reports()[0]; r.Failures != 1 || r.Status != Up {
			t.Errorf("after a hurried failure: %+v", r)
		}
		p.pass(time.Second)
		if s := p.status(key(0)); s != Down {
			t.Errorf("two fast intervals later: %s", s)
		}
	})
}

func TestHurryWhileChecking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		check := judged()
		check.Interval = time.Hour
		p := play(t, 4)
		p.takes = 900 * time.Millisecond
		p.Set(targets(1, check))
		p.run()
		defer p.cancel()
		p.pass(2 * time.Hour)
		before := p.count(key(0))
		p.Hurry(key(0))
		p.pass(100 * time.Millisecond)
		p.Hurry(key(0)) // the running check may have seen the backend before it died
		p.pass(10 * time.Second)
		if got := p.count(key(0)) - before; got != 2 {
			t.Errorf("%d checks, want the one that ran and another", got)
		}
	})
}

func TestSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		check := judged()
		p := play(t, 4)
		all := targets(3, check)
		all[0].Adopt = Report{Status: Up, Since: start}
		all[1].Adopt = Report{Status: Down, Since: start, Failure: "before"}
		all = append(all, Target{Key: key(9), Check: config.Health{Type: config.HealthNone}})
		p.Set(all)
		var statuses []Status
		for _, r := range p.Reports() {
			statuses = append(statuses, r.Status)
		}
		if diff := cmp.Diff([]Status{Up, Down, Unknown}, statuses); diff != "" {
			t.Errorf("before Run (-want +got):\n%s", diff)
		}
		p.run()
		defer p.cancel()
		p.pass(0)
		if got := p.heard(); len(got) > 1 {
			t.Errorf("told of what was adopted: %v", got)
		}
		p.pass(30 * time.Second)
		counts := [3]int{p.count(key(0)), p.count(key(1)), p.count(key(2))}

		// The same again, often: the schedule stays.
		for range 100 {
			p.Set(targets(3, check))
			p.pass(50 * time.Millisecond)
		}
		for i := range counts {
			if got := p.count(key(i)) - counts[i]; got < 2 || got > 3 {
				t.Errorf("%d checks of %s in 5 s of setting the same", got, key(i).Backend)
			}
		}

		// Another way of checking: the state stays, the schedule begins anew.
		p.find(func(Key) outcome { return outcome{verdict: bad, reason: "x"} })
		before := p.Reports()[0]
		longer := check
		longer.Interval, longer.Fall = time.Hour, 1
		changed := targets(3, check)
		changed[0].Check = longer
		p.Set(changed[:2])
		if diff := cmp.Diff(before, p.Reports()[0], cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("by changing the check (-before +after):\n%s", diff)
		}
		if got := len(p.Reports()); got != 2 {
			t.Errorf("%d reports of 2", got)
		}
		counts = [3]int{p.count(key(0)), p.count(key(1)), p.count(key(2))}
		p.pass(adoptedWithin)
		if got := p.count(key(0)) - counts[0]; got != 1 {
			t.Errorf("%d checks soon after the change", got)
		}
		if s := p.status(key(0)); s != Down {
			t.Errorf("judged in the new way: %s", s)
		}
		p.pass(time.Minute)
		if got := p.count(key(2)) - counts[2]; got != 0 {
			t.Errorf("%d checks of what is not wanted any more", got)
		}
		if err := p.Run(t.Context()); err == nil {
			t.Error("Run ran twice")
		}
	})
}

// TestNewDial wants the Dial of the last Set used, though the schedule stays.
func TestNewDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 4)
		p.newProbe = newProbe
		var calls [3]atomic.Int32
		set := func(i int) {
			all := targets(1, judged())
			all[0].Dial = func(context.Context, string, string) (net.Conn, error) {
				calls[i].Add(1)
				here, there := net.Pipe()
				there.Close()
				return here, nil
			}
			p.Set(all)
		}
		set(0)
		p.run()
		defer p.cancel()
		for i := range calls {
			set(i)
			p.pass(21 * time.Second)
			for j := range calls {
				if n := calls[j].Swap(0); (n > 0) != (i == j) || n > 13 {
					t.Errorf("after Set %d, Dial %d was called %d times", i, j, n)
				}
			}
		}
	})
}

// TestBrokenOff has a target go, and another change, while they are being checked.
func TestBrokenOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		check := judged()
		check.Timeout = 2 * time.Second
		p := play(t, 4)
		p.find(func(Key) outcome { return outcome{verdict: bad, reason: "old", timeout: true} })
		p.Set(targets(2, check))
		p.run()
		defer p.cancel()
		p.pass(firstWithin)
		if n := p.running(); n != 2 {
			t.Fatalf("%d checks run", n)
		}
		p.find(func(Key) outcome { return outcome{verdict: good, percent: 100} })
		check.Rise = 3
		p.Set(targets(1, check))
		p.pass(0)
		if n := p.running(); n != 0 {
			t.Errorf("%d checks still run", n)
		}
		p.pass(10 * time.Second)
		if r := p.Reports()[0]; r.Status != Up || r.Failures != 0 || r.Failure != "" {
			t.Errorf("the old check had a say: %+v", r)
		}
		for _, batch := range p.heard() {
			if len(batch) != 1 || batch[0].Key != key(0) {
				t.Errorf("told of %v", batch)
			}
		}
	})
}

// TestSlowListener has OnChange take long: checks go on, and what changes meanwhile comes in one batch.
func TestSlowListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 64)
		inside, batches := 0, []int{}
		p.onChange = func(all []Report) {
			if inside++; inside > 1 {
				t.Error("called twice at once")
			}
			for i := 1; i < len(all); i++ {
				if all[i-1].compare(all[i].Key) >= 0 {
					t.Error("reports are not in order")
				}
			}
			batches = append(batches, len(all))
			time.Sleep(5 * time.Second)
			inside--
		}
		p.Set(targets(100, judged()))
		p.run()
		defer p.cancel()
		p.pass(4 * time.Second)
		if got := p.count(key(0)); got < 2 {
			t.Errorf("%d checks while the listener was busy", got)
		}
		p.Set(targets(60, judged())[10:]) // of what goes, nothing more is told
		p.pass(7 * time.Second)
		if len(batches) != 2 || batches[0] > 9 || batches[1] < 41 || batches[1] > 50 {
			t.Errorf("told of first results in batches of %v", batches)
		}
	})
}

// TestHeldUp has a check overrun its time by far, as in a process that was stopped: not the backend's fault.
func TestHeldUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 4)
		p.newProbe = func(target Target) probe {
			return func(ctx context.Context) outcome {
				time.Sleep(5 * time.Second)
				return (&peer{limit: target.Check.Timeout}).failed(context.DeadlineExceeded)
			}
		}
		p.Set(targets(50, judged()))
		p.run()
		defer p.cancel()
		p.pass(90 * time.Second)
		for _, r := range p.Reports() {
			if r.Status != Unknown || r.Checks != 0 || r.Failure != "not checked: this host was held up during the check" {
				t.Fatalf("%+v", r)
			}
		}
		if got := strings.Count(p.logged(), "could not be checked"); got < 1 || got > 2 {
			t.Errorf("logged %d times in 90 s", got)
		}
	})
}

// TestFlapping goes the whole way on the schedule: three times down, held, and let go.
func TestFlapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 4)
		var failing atomic.Bool
		p.find(func(Key) outcome {
			if failing.Load() {
				return outcome{verdict: bad, reason: "x"}
			}
			return outcome{verdict: good, percent: 100}
		})
		p.Set(targets(1, judged()))
		p.run()
		defer p.cancel()
		p.pass(5 * time.Second)
		for range 3 {
			failing.Store(true)
			p.pass(5 * time.Second)
			if s := p.status(key(0)); s != Down && s != Held {
				t.Fatalf("failing: %s", s)
			}
			failing.Store(false)
			p.pass(5 * time.Second)
		}
		r := p.Reports()[0]
		if left := time.Until(r.HeldTill); r.Status != Held || left <= 20*time.Second || left > 30*time.Second {
			t.Fatalf("after three times: %s for %s", r.Status, left)
		}
		p.pass(time.Until(r.HeldTill) - time.Second)
		if s := p.status(key(0)); s != Held {
			t.Errorf("a second before its time: %s", s)
		}
		p.pass(4 * time.Second)
		if s := p.status(key(0)); s != Up {
			t.Errorf("after its time: %s", s)
		}
		if want := `from=up to=held reason="went down 3 times within 1m0s: x"`; strings.Count(p.logged(), want) != 1 {
			t.Errorf("not logged once: %s\n%s", want, p.logged())
		}
	})
}

// TestUnknownWords wants each word that is not known logged once.
func TestUnknownWords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 4)
		p.find(func(Key) outcome { return outcome{verdict: good, percent: 100, words: []string{"sleepy", "dopey"}} })
		p.Set(targets(1, judged()))
		p.run()
		defer p.cancel()
		p.pass(time.Minute)
		for _, w := range []string{"sleepy", "dopey"} {
			if got := strings.Count(p.logged(), "word="+w); got != 1 {
				t.Errorf("%s was logged %d times", w, got)
			}
		}
	})
}

// TestFailureTexts wants a text told when it is new, not each time.
func TestFailureTexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 4)
		n := 0
		p.find(func(Key) outcome {
			n++
			return outcome{verdict: bad, reason: fmt.Sprint("reason ", min(n/10, 2))}
		})
		p.Set(targets(1, judged()))
		p.run()
		defer p.cancel()
		p.pass(2 * time.Minute)
		var texts []string
		for _, batch := range p.heard() {
			texts = append(texts, batch[0].Failure)
		}
		if diff := cmp.Diff([]string{"reason 0", "reason 1", "reason 2"}, texts); diff != "" {
			t.Errorf("told (-want +got):\n%s", diff)
		}
	})
}

func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 8)
		p.takes = time.Second
		p.Set(targets(20, judged()))
		ctx, cancel := context.WithCancelCause(t.Context())
		result := make(chan error, 1)
		go func() { result <- p.Run(ctx) }()
		p.pass(firstWithin)
		begun := time.Now()
		cancel(errors.New("stop"))
		if err := <-result; err != nil || time.Since(begun) != 0 {
			t.Errorf("Run returned %v after %s", err, time.Since(begun))
		}
		p.pass(time.Hour)
		if n, told := p.running(), p.heard(); n != 0 || len(told) != 0 {
			t.Errorf("%d checks run, told %v", n, told)
		}
		for _, r := range p.Reports() {
			if r.Status != Unknown {
				t.Errorf("a check that was broken off decided: %+v", r)
			}
		}
	})
}

// TestStopByDeadline ends Run by its context's deadline, which is not one of the checks.
func TestStopByDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := play(t, 8)
		p.newProbe = func(target Target) probe {
			return func(ctx context.Context) outcome {
				if d, _ := ctx.Deadline(); time.Until(d) != target.Check.Timeout {
					t.Errorf("a check has %s", time.Until(d))
				}
				<-ctx.Done()
				return (&peer{limit: target.Check.Timeout}).failed(ctx.Err())
			}
		}
		p.Set(targets(20, judged()))
		ctx, cancel := context.WithTimeout(t.Context(), firstWithin)
		defer cancel()
		begun := time.Now()
		if err := p.Run(ctx); err != nil || time.Since(begun) != firstWithin {
			t.Errorf("Run returned %v after %s", err, time.Since(begun))
		}
		for _, r := range p.Reports() {
			if r.Status != Unknown || r.Failure != "" {
				t.Errorf("a check that was broken off counted: %+v", r)
			}
		}
	})
}
