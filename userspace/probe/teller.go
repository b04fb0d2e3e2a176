package probe

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"fairlead/maps"
)

// Connections is the connection table to read: maps.Connections.
type Connections interface {
	Walk(visit func(*maps.Connection) error) error
	Get(maps.Tuple) (maps.Connection, bool, error)
}

// Keeper changes entries of the connection table: *maps.Manager.
type Keeper interface {
	Condemn([]maps.Connection) (int, error)
	LetGo([]maps.Connection) (int, error)
}

// Counts are the data plane's own counts of entries: maps.Control.
type Counts interface {
	Connections() int64
	Young() int64
}

// Options are what a Teller works with.
type Options struct {
	Connections Connections
	Keeper      Keeper
	Counts      Counts
	Capacity    uint32 // of the connection table; an eighth of it may be young
	Sender      Sender
	Logger      *slog.Logger // default: slog.Default()
}

// Teller runs campaigns over the connection table: it tells the clients of a backend that died or is drained, and asks
// entries that are young whether they are alive. Each campaign has a goroutine of its own, which ends with its context.
// All methods may be called from any goroutine.
type Teller struct {
	Options
	ticks   func() uint32 // the data plane's clock
	running sync.WaitGroup
	asking  sync.Mutex // held while a campaign of Pressure runs
}

// NewTeller makes a Teller.
func NewTeller(o Options) *Teller {
	o.Logger = cmp.Or(o.Logger, slog.Default())
	return &Teller{Options: o, ticks: maps.Now}
}

// Wait returns when no campaign runs.
func (t *Teller) Wait() { t.running.Wait() }

// Progress is how far a campaign has come.
type Progress struct {
	Counted bool // the whole table was looked through: Living and Left are of all connections
	Living  int  // connections that are left: not told, and not gone by themselves
	Closing int  // of them, those being told: probed, or condemned, and to be probed again
	Closed  int  // told, or gone by themselves
	Told    int  // of Closed, those whose client was answered RST
	// Spared are those that turned out to be served after all, Silent those that have answered nothing for three minutes
	// and are not asked any more. Neither is among Living.
	Spared, Silent int
	Probes         uint64 // sent
	Unsent         uint64 // that could not be sent
	Left           time.Duration
}

// Campaign is one that was begun. It ends by itself or with its context.
type Campaign struct {
	done chan struct{}
	err  error

	mu       sync.Mutex
	progress Progress
}

// Progress is how far it has come. Left is an estimate of the time to the end, negative where none can be given.
func (c *Campaign) Progress() Progress {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.progress
}

// Done is closed when it has ended: from then on nothing is sent.
func (c *Campaign) Done() <-chan struct{} { return c.done }

// Wait waits for its end. It answers nil where there was nothing more to do, what its context ended with, or why the
// connection table could not be read.
func (c *Campaign) Wait() error {
	<-c.done
	return c.err
}

// run is the work of a campaign. It belongs to one goroutine.
type run struct {
	*Teller
	sites
	waiting
	handle *Campaign
	ctx    context.Context
	log    *slog.Logger
	began  time.Time

	// fresh is the pace of those probed for the first time, again that of the others; they may be one.
	fresh, again *pace
	// feeding: fresh ones are waiting for the same pace as the others. They share it evenly.
	feeding, turn bool
	// more tells whether one that is due is to be probed again.
	more func(*asked, *maps.Connection) bool
	// unsent is told of one whose probe could not be sent; nil: it waits like the others, and is probed again.
	unsent func(*asked)
	// extra does what else is due, wake says when it will want to again, count brings the progress up to date.
	extra   func(now time.Time)
	wake    func() (time.Time, bool)
	count   func()
	visited uint

	batch    []Probe
	sending  []asked // of each probe in the batch
	progress Progress
	said     map[string]bool // failures that were logged
}

// begin starts a campaign's goroutine.
func (t *Teller) begin(ctx context.Context, log *slog.Logger, campaign func(*run) error) *Campaign {
	handle := &Campaign{done: make(chan struct{})}
	r := &run{Teller: t, handle: handle, ctx: ctx, log: log, began: time.Now(), said: make(map[string]bool)}
	r.more, r.count = r.tellMore, r.countAsked
	r.progress.Left = -1
	handle.progress = r.progress
	t.running.Go(func() {
		defer close(handle.done)
		handle.err = campaign(r)
		r.count()
		r.publish()
	})
	return handle
}

func (r *run) publish() {
	r.handle.mu.Lock()
	r.handle.progress = r.progress
	r.handle.mu.Unlock()
}

// say logs a failure, once in a campaign.
func (r *run) say(err error) {
	if text := err.Error(); !r.said[text] && !errors.Is(err, r.ctx.Err()) {
		r.said[text] = true
		r.log.Warn("probe clients", "err", err)
	}
}

// walk looks through the table, and does meanwhile what is due.
func (r *run) walk(visit func(*maps.Connection) error) error {
	return r.Connections.Walk(func(c *maps.Connection) error {
		if r.visited++; r.visited%256 == 0 {
			if err := r.work(); err != nil {
				return err
			}
		}
		return visit(c)
	})
}

// look reads a connection's entry as it is now; false: it is told or gone, and was counted.
func (r *run) look(a *asked) (maps.Connection, bool) {
	c, found, err := r.Connections.Get(r.tuple(a))
	switch {
	case err != nil:
		r.say(err)
		r.progress.Silent++
	case !found || c.Generation != a.generation:
		r.progress.Closed++
	case c.State&maps.StateClientTold != 0:
		r.progress.Closed++
		r.progress.Told++
	case c.State.Closing():
		r.progress.Closed++
	default:
		return c, true
	}
	return c, false
}

// probe puts a connection's probe into the batch.
func (r *run) probe(a asked, c *maps.Connection) {
	a.seen = c.Seen
	a.probes++
	if n := len(r.batch); n < cap(r.batch) {
		r.batch = r.batch[:n+1] // with an older frame's room
	} else {
		r.batch = append(r.batch, Probe{})
	}
	p := &r.batch[len(r.batch)-1]
	p.Interface, p.Frame = c.Hop.Interface, AppendFrame(p.Frame[:0], c)
	r.sending = append(r.sending, a)
	if len(p.Frame) == 0 { // UDP: its client is told at its next packet, and only waited for
		r.batch = r.batch[:len(r.batch)-1]
		r.sending = r.sending[:len(r.sending)-1]
		r.await(a)
	}
	if len(r.batch) == batchSize {
		r.flush()
	}
}

func (r *run) await(a asked) {
	a.due = time.Since(r.began) + patience(a.probes)
	r.waiting.add(a)
}

// flush sends the batch.
func (r *run) flush() {
	if len(r.batch) == 0 {
		return
	}
	r.Sender.Send(r.ctx, r.batch)
	for i := range r.batch {
		if err := r.batch[i].Err; err != nil {
			if r.ctx.Err() == nil {
				r.progress.Unsent++
			}
			r.say(err)
			if r.unsent != nil {
				r.unsent(&r.sending[i])
				continue
			}
		} else {
			r.progress.Probes++
		}
		r.await(r.sending[i])
	}
	r.batch, r.sending = r.batch[:0], r.sending[:0]
}

// work does what is due.
func (r *run) work() error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	r.flush()
	now := time.Now()
	for n := r.quota(now); n > 0; {
		a, due := r.take(now.Sub(r.began))
		if !due {
			break
		}
		c, living := r.look(&a)
		if living && r.more(&a, &c) {
			r.probe(a, &c)
			r.again.spend(1)
			n--
		}
	}
	if r.extra != nil {
		r.extra(now)
	}
	r.flush()
	r.count()
	r.publish()
	return r.ctx.Err()
}

// quota is how many may be probed again now.
func (r *run) quota(now time.Time) int {
	n := r.again.allowed(now)
	if !r.feeding || n == 0 {
		return n
	}
	if due, any := r.waiting.next(); !any || due > now.Sub(r.began) {
		return 0
	}
	if r.turn {
		n++
	}
	r.turn = n%2 == 1
	return n / 2
}

// pause sleeps until something is due, and does it.
func (r *run) pause() error {
	r.flush()
	now := time.Now()
	var at time.Time
	sooner := func(t time.Time, is bool) {
		if is && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	if due, any := r.waiting.next(); any {
		t, ever := r.again.next()
		if t.Before(r.began.Add(due)) {
			t = r.began.Add(due)
		}
		sooner(t, ever)
	}
	if r.feeding {
		sooner(r.fresh.next())
	}
	if r.wake != nil {
		sooner(r.wake())
	}
	if at.IsZero() {
		<-r.ctx.Done()
		return r.ctx.Err()
	}
	if err := wait(r.ctx, max(at.Sub(now), slice)); err != nil {
		return err
	}
	return r.work()
}

// finish goes on until nobody waits.
func (r *run) finish() error {
	r.flush()
	for r.waiting.count > 0 {
		if err := r.pause(); err != nil {
			return err
		}
	}
	return r.ctx.Err()
}

func (r *run) countAsked() {
	r.progress.Closing = r.waiting.count
	r.progress.Living = r.progress.Closing
	r.progress.Left = -1
	if r.progress.Counted {
		r.progress.Left = r.settling()
	}
}

// settling is how long those that are being told may yet take, if they answer: a probe more.
func (r *run) settling() time.Duration {
	if r.waiting.count == 0 {
		return 0
	}
	return retry
}

// tellMore says whether a client that was probed and isn't told is probed again.
func (r *run) tellMore(a *asked, c *maps.Connection) bool {
	switch {
	case a.probes >= lastAsking && c.State&maps.StateCondemned == 0 && c.Seen != a.seen:
		// Its answers have been forwarded: its backend has it, again or as a newcomer.
		r.progress.Spared++
		return false
	case a.probes >= lastProbe:
		r.progress.Silent++
		return false
	}
	return true
}
