package health

import (
	"container/heap"
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// entry is a target, what is known of it, and its place in the schedule. Checker.mu guards it. It is in one of four
// places: in the queue (index >= 0), among the dead that wait for their share (waiting), being checked (running), or,
// withdrawn, in none.
type entry struct {
	Target
	probe probe
	state state

	due     time.Time
	index   int // in the queue; -1: not in it
	waiting bool
	running bool
	round   uint64             // of the schedule; a check of an earlier round has no say any more
	cancel  context.CancelFunc // of the running check
	started time.Time          // the last check
	hurried bool               // while it ran
	// stray has the next ordinary interval cut at random, so that those that began together part.
	stray bool
}

func (e *entry) report() Report {
	s := &e.state
	return Report{Key: e.Key, Status: s.status, Since: s.since, Failure: s.failure, FailedAt: s.failedAt,
		Draining: s.draining, Maint: s.maint, Percent: s.percent, HeldTill: s.heldTill, Checks: s.checks,
		Failures: s.failures, Latency: s.latency}
}

// queue is a heap of entries, the one that is due first at the top.
type queue []*entry

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *queue) Push(x any) {
	e := x.(*entry)
	e.index = len(*q)
	*q = append(*q, e)
}

func (q *queue) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	(*q)[last], *q = nil, (*q)[:last]
	e.index = -1
	return e
}

// begin puts an entry that is nowhere into the queue, at a time of its own.
func (c *Checker) begin(e *entry, now time.Time) {
	within := adoptedWithin
	if e.state.status == Unknown {
		within = firstWithin
	}
	e.due, e.stray = now.Add(between(0, min(e.Check.Interval, within))), true
	heap.Push(&c.queue, e)
}

// withdraw takes an entry out of the schedule, wherever it is.
func (c *Checker) withdraw(e *entry) {
	e.round++
	if e.index >= 0 {
		heap.Remove(&c.queue, e.index)
	}
	if e.running {
		e.cancel()
	}
	e.running, e.waiting, e.hurried = false, false, false
}

// job is one check on its way through a worker.
type job struct {
	entry  *entry
	round  uint64
	probe  probe
	limit  time.Duration // the check's timeout
	dead   bool          // counts against the share of those that are down
	ctx    context.Context
	cancel context.CancelFunc
}

type result struct {
	*job
	outcome
}

// schedule starts checks when they are due and takes in their results, until ctx ends.
func (c *Checker) schedule(ctx context.Context) {
	// A worker takes a job only when it has none, and gets one only then: neither channel makes anybody wait.
	jobs, results := make(chan *job), make(chan result, c.parallel)
	var workers sync.WaitGroup
	defer workers.Wait()
	defer close(jobs)
	// A deadline of ctx would otherwise be one of the checks, and be held against backends.
	checking, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	started, running, dead := 0, 0, 0 // workers, those at work, and those at work on backends that are down
	deadShare := max(1, c.parallel*3/4)

	start := func(e *entry, now time.Time) {
		limit := e.Check.Timeout
		j := &job{entry: e, round: e.round, probe: e.probe, limit: limit, dead: e.state.dead()}
		j.ctx, j.cancel = context.WithTimeout(checking, limit)
		if e.state.status != Unknown && now.Sub(e.due) > e.Check.Interval {
			c.lateLog.add(now, "checks are late", e.Key, now.Sub(e.due).Round(time.Millisecond).String())
		}
		if now.Sub(e.due) > e.Check.Interval/2 {
			e.stray = true // whatever held us up held up others too: they would go on side by side
		}
		e.running, e.started, e.cancel = true, now, j.cancel
		running++
		if j.dead {
			dead++
		}
		if started < running {
			started++
			workers.Go(func() { work(jobs, results) })
		}
		jobs <- j
	}
	// startDue returns when to look again; zero: not before something happens.
	startDue := func(now time.Time) time.Time {
		for len(c.dead) > 0 && dead < deadShare && running < c.parallel {
			e := c.dead[0]
			c.dead[0], c.dead = nil, c.dead[1:]
			if e.waiting { // else it was withdrawn
				e.waiting = false
				start(e, now)
			}
		}
		for len(c.queue) > 0 && running < c.parallel {
			if c.queue[0].due.After(now) {
				return c.queue[0].due
			}
			e := heap.Pop(&c.queue).(*entry)
			if e.state.dead() && dead >= deadShare {
				e.waiting = true
				c.dead = append(c.dead, e)
				continue
			}
			start(e, now)
		}
		return time.Time{}
	}
	take := func(r result) {
		running--
		if r.dead {
			dead--
		}
		r.cancel()
		if ctx.Err() == nil && r.round == r.entry.round {
			c.finish(r.entry, r.outcome, time.Now())
		}
	}

	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		c.mu.Lock()
		now := time.Now()
		next := startDue(now)
		c.complain(now)
		c.mu.Unlock()
		if next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(next))
		}
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		case <-timer.C:
		case r := <-results:
			c.mu.Lock()
			for more := true; more; {
				take(r)
				select {
				case r = <-results:
				default:
					more = false
				}
			}
			c.mu.Unlock()
		}
	}
}

func work(jobs <-chan *job, results chan<- result) {
	for j := range jobs {
		begun := time.Now()
		o := j.probe(j.ctx)
		// A process that was stopped, or starved, finds its time run out whatever the backend did.
		if took := time.Since(begun); o.timeout && took > j.limit+max(j.limit/2, 250*time.Millisecond) {
			o = outcome{verdict: moot, reason: "not checked: this host was held up during the check"}
		}
		results <- result{job: j, outcome: o}
	}
}

// finish takes in a check's outcome and puts the entry back into the queue.
func (c *Checker) finish(e *entry, o outcome, now time.Time) {
	e.running, e.cancel = false, nil
	was := e.state.seen()
	status := e.state.status
	words := e.state.apply(&e.Check, o, now)
	if is := e.state.seen(); is != was {
		c.changed[e] = struct{}{}
		poke(c.tell)
	}
	if e.state.status != status {
		c.logChange(e, status, words)
	}
	for _, w := range e.state.newWords(o.words) {
		c.say(slog.LevelWarn, "health check's answer has a word that is not known, and is ignored", "service", e.Service,
			"backend", e.Backend, "header", e.Check.StateHeader, "word", w,
			"what to do", "use ready, up, drain, maint, down or a percentage")
	}
	if o.verdict == moot {
		c.mootLog.add(now, "backends could not be checked: their state stays as it is", e.Key, o.reason)
	}

	interval := e.Check.Interval
	switch {
	case e.state.doubtful(&e.Check):
		interval = jittered(e.Check.FastInterval, e.Check.Jitter)
	case e.stray:
		e.stray = false
		interval = between(0, interval)
	default:
		interval = jittered(interval, e.Check.Jitter)
	}
	if e.hurried {
		e.hurried = false
		interval = min(interval, e.Check.FastInterval)
	}
	// A check that took longer than its interval is followed by one, not by all that were missed.
	e.due = later(e.started.Add(max(interval, shortest)), now)
	heap.Push(&c.queue, e)
}

func (c *Checker) logChange(e *entry, from Status, why string) {
	level := slog.LevelWarn
	if e.state.status == Up || e.state.maint {
		level = slog.LevelInfo
	}
	c.say(level, "health changed", "service", e.Service, "backend", e.Backend, "address", e.Address,
		"from", from, "to", e.state.status, "reason", why)
}

// jittered returns d, give or take percent of it.
func jittered(d time.Duration, percent uint32) time.Duration {
	span := d * time.Duration(percent) / 100
	return between(d-span, d+span)
}

// between returns a random duration within first and last.
func between(first, last time.Duration) time.Duration {
	if last <= first {
		return first
	}
	return first + rand.N(last-first+1)
}

// complaint gathers what concerns many backends at once, for one line in the log.
type complaint struct {
	message string
	count   int
	key     Key
	example string
	next    time.Time // not before
}

func (p *complaint) add(now time.Time, message string, key Key, example string) {
	p.message, p.key, p.example = message, key, example
	p.count++
	if p.next.IsZero() {
		p.next = now
	}
}

// complain says what was gathered, where it is time.
func (c *Checker) complain(now time.Time) {
	for _, p := range []struct {
		*complaint
		remedy string
	}{
		{&c.mootLog, "see that this host has descriptors, ports, memory and time left, and that commands can be run"},
		{&c.lateLog, "give the checks longer intervals or shorter timeouts, or let more of them run at once"},
	} {
		if p.count > 0 && !now.Before(p.next) {
			c.say(slog.LevelWarn, p.message, "times", p.count, "service", p.key.Service, "backend", p.key.Backend,
				"last", p.example, "what to do", p.remedy)
			p.count, p.next = 0, now.Add(complainEvery)
		}
	}
}
