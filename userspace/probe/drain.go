package probe

import (
	"context"
	"math/rand/v2"
	"time"

	"fairlead/maps"
)

// DrainOptions say how a backend's living connections are ended.
type DrainOptions struct {
	Rate      uint32    // so many a second; 0: none, before the deadline
	Deadline  time.Time // from then on ResetRate; zero: never
	ResetRate uint32
}

const (
	walkPause = 5 * time.Second // between two looks through the table
	walkShare = 20              // and so many times as long as a look takes
)

// Drain ends the connections of a backend that lives and is given no new ones: so many a second, spread evenly over it,
// in random order. Each is condemned and its client probed at once: the answer becomes the backend's RST. The next probe,
// 600 ms later, brings the client its own; then it goes on as with Lost. UDP's are condemned at the same pace, and their
// clients told at their next packet.
//
// It goes on until the backend has no connection left, and for as long as one that was half-open when it began may yet be
// confirmed, or until ctx ends. What was condemned stays so.
func (t *Teller) Drain(ctx context.Context, b maps.Backend, o DrainOptions) *Campaign {
	return t.begin(ctx, t.Logger.With("backend", b.Name, "address", b.Address), func(r *run) error {
		d := &drain{run: r, options: o, backend: b.ID}
		r.fresh = newPace(o.Rate, true, r.began)
		r.again = newPace(max(o.ResetRate, 1), false, r.began)
		r.extra, r.wake, r.count = d.condemn, d.next, d.progressed
		err := d.drain()
		if ctx.Err() == nil {
			r.log.Info("backend drained", "ended", r.progress.Closed, "told", r.progress.Told, "silent", r.progress.Silent)
		}
		return err
	})
}

// One ends one connection, as Drain does.
func (t *Teller) One(ctx context.Context, c maps.Connection) *Campaign {
	return t.begin(ctx, t.Logger, func(r *run) error {
		d := &drain{run: r, options: DrainOptions{Rate: 1, ResetRate: 1000}, backend: c.Backend}
		r.fresh, r.again = newPace(1, false, r.began), newPace(1000, false, r.began)
		r.extra, r.wake, r.count = d.condemn, d.next, d.progressed
		a := r.asked(&c)
		a.inherited = true // whether it is condemned already or not
		d.pending = []asked{a}
		r.progress.Counted = true
		if err := r.work(); err != nil {
			return err
		}
		for len(d.pending) > 0 {
			if err := r.pause(); err != nil {
				return err
			}
		}
		return r.finish()
	})
}

// drain is a campaign that condemns.
type drain struct {
	*run
	options DrainOptions
	backend uint32
	late    bool    // the deadline is over
	pending []asked // not condemned yet, in the order of their turns
	// turned are the generation numbers, which no two living entries share, of those whose turn came while the table is
	// walked: it may have been read before. nil: it isn't walked.
	turned map[uint32]struct{}
	walkAt time.Time
	list   []maps.Connection // the batch about to be condemned
	turns  []asked
}

func (d *drain) drain() error {
	for first := true; ; first = false {
		began := time.Now()
		if err := d.survey(first); err != nil {
			return err
		}
		now := time.Now()
		d.walkAt = now.Add(max(walkPause, walkShare*now.Sub(began)))
		if err := d.work(); err != nil {
			return err
		}
		for now.Before(d.walkAt) {
			if len(d.pending)+d.waiting.count == 0 && now.Sub(d.began) > maps.HalfOpenLife {
				return nil
			}
			if err := d.pause(); err != nil {
				return err
			}
			now = time.Now()
		}
	}
}

// survey walks the table for connections that are to be condemned, and goes on condemning meanwhile. Those told by an
// earlier run of the same drain, and not gone, are told again at their turn.
func (d *drain) survey(first bool) error {
	var found []asked
	d.turned = make(map[uint32]struct{})
	err := d.walk(func(c *maps.Connection) error {
		if c.Backend != d.backend || c.State.Closing() || c.State&maps.StateClientTold != 0 {
			return nil
		}
		a := d.asked(c)
		a.inherited = c.State&maps.StateCondemned != 0
		found = append(found, a)
		return nil
	})
	turned := d.turned
	d.turned = nil
	if err != nil {
		if d.ctx.Err() != nil {
			return d.ctx.Err()
		}
		d.say(err) // and once more, in a while
		return nil
	}
	// Those whose turn has not come and who are not found any more have gone by themselves.
	before := make(map[uint32]struct{}, len(d.pending))
	for i := range d.pending {
		before[d.pending[i].generation] = struct{}{}
	}
	kept := found[:0]
	for _, a := range found {
		_, has := turned[a.generation]
		_, had := before[a.generation]
		delete(before, a.generation)
		if !has && (had || first || !a.inherited) { // else it is waited for
			kept = append(kept, a)
		}
	}
	d.progress.Closed += len(before)
	rand.Shuffle(len(kept), func(i, j int) { kept[i], kept[j] = kept[j], kept[i] })
	d.pending = kept
	d.progress.Counted = true
	return nil
}

// condemn condemns as many as the pace allows, and probes them.
func (d *drain) condemn(now time.Time) {
	if !d.late && !d.options.Deadline.IsZero() && !now.Before(d.options.Deadline) {
		d.late = true
		d.fresh.setRate(max(d.options.ResetRate, 1), now)
	}
	d.list, d.turns = d.list[:0], d.turns[:0]
	for n := d.fresh.allowed(now); n > 0 && len(d.pending) > 0; {
		a := d.pending[len(d.pending)-1]
		d.pending = d.pending[:len(d.pending)-1]
		if d.turned != nil {
			d.turned[a.generation] = struct{}{}
		}
		c, living := d.look(&a)
		if !living || c.State&maps.StateCondemned != 0 && !a.inherited {
			continue // ended, or condemned by another campaign just now
		}
		d.list, d.turns = append(d.list, c), append(d.turns, a)
		n--
	}
	if len(d.list) == 0 {
		return
	}
	d.fresh.spend(len(d.list))
	if _, err := d.Keeper.Condemn(d.list); err != nil {
		d.say(err)
		d.pending = append(d.pending, d.turns...)
		return
	}
	for i := range d.list {
		d.probe(d.turns[i], &d.list[i])
	}
}

// next is when the next turn comes, the deadline, or the next look through the table.
func (d *drain) next() (at time.Time, is bool) {
	at, is = d.walkAt, !d.walkAt.IsZero()
	sooner := func(t time.Time) {
		if !is || t.Before(at) {
			at, is = t, true
		}
	}
	if len(d.pending) > 0 {
		if t, ever := d.fresh.next(); ever {
			sooner(t)
		}
		if !d.late && !d.options.Deadline.IsZero() {
			sooner(d.options.Deadline)
		}
	}
	return at, is
}

func (d *drain) progressed() {
	p := &d.progress
	p.Closing = d.waiting.count
	p.Living = p.Closing + len(d.pending)
	p.Left = -1
	if p.Counted {
		p.Left = d.left(time.Now())
	}
}

// left estimates the time to the end.
func (d *drain) left(now time.Time) time.Duration {
	seconds := func(n int, rate uint32) time.Duration {
		return time.Duration(float64(n) / float64(max(rate, 1)) * float64(time.Second))
	}
	n := len(d.pending)
	switch {
	case n == 0:
		return d.settling()
	case d.late:
		return seconds(n, d.options.ResetRate) + retry
	case d.options.Rate > 0 && (d.options.Deadline.IsZero() || seconds(n, d.options.Rate) <= d.options.Deadline.Sub(now)):
		return seconds(n, d.options.Rate) + retry
	case d.options.Deadline.IsZero():
		return -1
	}
	rest := max(d.options.Deadline.Sub(now), 0)
	n -= int(rest.Seconds() * float64(d.options.Rate))
	return rest + seconds(n, d.options.ResetRate) + retry
}
