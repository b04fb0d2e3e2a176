// Package health checks whether backends are alive. It makes real checks (a TCP connection, an HTTP answer, a WebSocket
// opened, asked and closed, a command), spread evenly over time and bounded in number, and judges from their results
// whether a backend is up. What follows from the verdict is for others to decide.
package health

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"fairlead/userspace/config"
)

// Key names what is checked: a backend of a service, at an address.
type Key struct {
	Service string
	Backend string
	Address netip.AddrPort // where the check goes; an exec check's command is told of it
}

func (k Key) compare(other Key) int {
	return cmp.Or(cmp.Compare(k.Service, other.Service), cmp.Compare(k.Backend, other.Backend),
		k.Address.Compare(other.Address))
}

// Target is a backend to check, and how.
type Target struct {
	Key
	// Check is of any type but none; targets of type none are left out.
	Check config.Health
	// Via is the service's address and port, under via: service; else zero. The check then connects to Via by Dial,
	// which is to see to it that this backend answers.
	Via netip.AddrPort
	// Dial opens the check's connections; nil: an ordinary dialer. It is given an address, never a name.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Adopt is what an earlier run knew of the backend; zero: nothing. Only Status, Since, Failure and FailedAt are
	// taken, and only where the target is new to the Checker.
	Adopt Report
}

// Status is the verdict on a backend.
type Status uint8

const (
	Unknown Status = iota // no check has had a result yet
	Up
	Down
	Held // down for going down too often: up again only after its checks have been good for a while
)

func (s Status) String() string {
	switch s {
	case Unknown:
		return "unknown"
	case Up:
		return "up"
	case Down:
		return "down"
	case Held:
		return "held"
	}
	return "invalid"
}

// Report is what is known of a backend.
type Report struct {
	Key
	Status   Status
	Since    time.Time // of Status
	Failure  string    // why the last check that was not good was not; empty: none yet. One line of at most 127 bytes
	FailedAt time.Time // when that was
	Draining bool      // by the last good check's answer: alive, but wants no new connections
	Maint    bool      // by the last answer: down on purpose
	Percent  uint32    // by the last good check's answer: the share of its weight that it wants; as a rule 100
	HeldTill time.Time // while Held: it will be so at least until then
	Checks   uint64    // that had a result
	Failures uint64    // of these
	Latency  time.Duration
}

// Options are what New takes; the zero value will do.
type Options struct {
	// Logger; default: none.
	Logger *slog.Logger
	// OnChange is called with the reports whose Status, Draining, Maint or Percent changed, or whose Failure has a new
	// text, in order of Key. It is called from one goroutine, without locks held; changes that come while it runs are
	// told together by the next call. It is not called after Run has returned.
	OnChange func([]Report)
	// Parallel is how many checks, and so sockets or commands, may be open at once; default: 256. Backends that are down
	// get at most three quarters of them: the dead, whose checks take longest, can't keep the living waiting.
	Parallel int
}

const (
	defaultParallel = 256
	// A backend that nothing is known of is checked for the first time so soon.
	firstWithin = 250 * time.Millisecond
	// One whose state was adopted, or whose check was changed, so soon: sooner than a long interval.
	adoptedWithin = 2 * time.Second
	// No interval is shorter, whatever a check says.
	shortest = 10 * time.Millisecond
	// What concerns many backends at once is logged so often at most.
	complainEvery = time.Minute
)

// Checker checks targets while Run runs. Its methods may be called from any goroutine.
type Checker struct {
	log      *slog.Logger
	onChange func([]Report)
	parallel int
	newProbe func(Target) probe
	wake     chan struct{} // the schedule has changed; holds one
	tell     chan struct{} // changed or lines is not empty; holds one

	mu      sync.Mutex
	ran     bool
	entries map[Key]*entry
	queue   queue    // those that wait for their time
	dead    []*entry // due, but the share of those that are down is used up; in order
	changed map[*entry]struct{}
	lines   []line

	mootLog, lateLog complaint
}

// New returns a Checker without targets.
func New(opts Options) *Checker {
	c := &Checker{log: opts.Logger, onChange: opts.OnChange, parallel: opts.Parallel, newProbe: newProbe,
		wake: make(chan struct{}, 1), tell: make(chan struct{}, 1),
		entries: map[Key]*entry{}, changed: map[*entry]struct{}{}}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.parallel <= 0 {
		c.parallel = defaultParallel
	}
	return c
}

// Set says what is to be checked, instead of before. Targets that stay (the same Key, checked in the same way) keep
// their state and their place in the schedule; where the way changed, the state is kept and the schedule begins anew.
// Targets that go are forgotten, and their running checks are broken off. Of several targets with one Key the last
// counts.
func (c *Checker) Set(targets []Target) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	wanted := make(map[Key]struct{}, len(targets))
	for _, t := range targets {
		if !t.Check.NeedsChecks() {
			continue
		}
		wanted[t.Key] = struct{}{}
		e, ok := c.entries[t.Key]
		switch {
		case !ok:
			e = &entry{Target: t, probe: c.newProbe(t), state: adopt(t, now), index: -1}
			c.entries[t.Key] = e
			c.begin(e, now)
		case e.Via == t.Via && e.Check.Equal(t.Check):
			if e.Dial != nil || t.Dial != nil { // can't be compared; the new one serves from the next check on
				e.Target, e.probe = t, c.newProbe(t)
			}
		default:
			e.Target, e.probe = t, c.newProbe(t)
			e.state.restart()
			c.withdraw(e)
			c.begin(e, now)
		}
	}
	for key, e := range c.entries {
		if _, ok := wanted[key]; !ok {
			c.withdraw(e)
			delete(c.entries, key)
			delete(c.changed, e)
		}
	}
	poke(c.wake)
}

// Hurry has a target checked now, for who has reason to doubt it: a client's connection that failed, a neighbour that
// is gone. It is checked at most once in its fast interval, however often Hurry is called; the result counts as any.
func (c *Checker) Hurry(key Key) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok {
		return
	}
	if e.running {
		e.hurried = true
		return
	}
	if e.index < 0 {
		return // it is due already
	}
	if due := later(time.Now(), e.started.Add(e.Check.FastInterval)); due.Before(e.due) {
		e.due = due
		heap.Fix(&c.queue, e.index)
		poke(c.wake)
	}
}

// Reports returns what is known of all targets, in order of Key.
func (c *Checker) Reports() []Report {
	c.mu.Lock()
	all := make([]Report, 0, len(c.entries))
	for _, e := range c.entries {
		all = append(all, e.report())
	}
	c.mu.Unlock()
	sortReports(all)
	return all
}

// Run checks until ctx ends, then breaks off the checks that run and returns nil when they have ended. It can be called
// once.
func (c *Checker) Run(ctx context.Context) error {
	c.mu.Lock()
	if c.ran {
		c.mu.Unlock()
		return errors.New("check backends: already run")
	}
	c.ran = true
	now := time.Now()
	for _, e := range c.entries {
		// Time has passed since Set: all at once is what they are not to be.
		c.withdraw(e)
		c.begin(e, now)
	}
	c.mu.Unlock()

	var tasks sync.WaitGroup
	tasks.Go(func() { c.notify(ctx) })
	c.schedule(ctx)
	tasks.Wait()
	c.tellAll(nil) // what is still to be logged
	return nil
}

// line is one for the log. Lines are written where OnChange is called: a log that can't be written keeps no check waiting.
type line struct {
	level     slog.Level
	message   string
	arguments []any
}

func (c *Checker) say(level slog.Level, message string, arguments ...any) {
	c.lines = append(c.lines, line{level, message, arguments})
	poke(c.tell)
}

// notify tells of changes until ctx ends.
func (c *Checker) notify(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.tell:
			if ctx.Err() == nil {
				c.tellAll(c.onChange)
			}
		}
	}
}

func (c *Checker) tellAll(onChange func([]Report)) {
	c.mu.Lock()
	reports := make([]Report, 0, len(c.changed))
	for e := range c.changed {
		reports = append(reports, e.report())
	}
	clear(c.changed)
	lines := c.lines
	c.lines = nil
	c.mu.Unlock()
	if len(reports) > 0 && onChange != nil {
		sortReports(reports)
		onChange(reports)
	}
	for _, l := range lines {
		c.log.Log(context.Background(), l.level, l.message, l.arguments...)
	}
}

func sortReports(all []Report) {
	slices.SortFunc(all, func(a, b Report) int { return a.compare(b.Key) })
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
