package probe

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/maps"
)

const (
	youngShare = 8 // this part of the table may be young
	// Where these percents are in use, young entries are probed until no more than those are.
	pressed, eased = 90, 85
	// youngAge is how long a young entry may be silent before it is asked, and shownAge the same for one that has shown
	// itself before, as by an answer.
	youngAge = 10 * time.Second
	shownAge = time.Minute
	// hastyAge is the same for an entry that was young but for a moment, and of which nothing was heard since: past two
	// epochs, so that the fast path hides nobody.
	hastyAge = 30 * time.Second
)

// Pressure is to be called every second or so. Where more than 90 % of the connection table are in use, or of the part of
// it that may be young, it begins a campaign over young TCP entries, if none is under way: those silent for 10 s are
// probed, so many a second. Who doesn't show itself after three probes is let go. The campaign ends once no more than
// 85 % are in use.
//
// Where replies aren't seen, three packets from nowhere make an entry that is young no more. So where the table itself is
// that full, entries are asked as well that nothing was heard of after their first 10 s. All others are safe, whatever
// comes: who was heard of later, and whose backend was seen to answer.
func (t *Teller) Pressure(ctx context.Context, rate uint32) {
	if !t.over(pressed) || !t.asking.TryLock() {
		return
	}
	log := t.Logger
	t.begin(ctx, log, func(r *run) error {
		defer t.asking.Unlock()
		p := &pressure{run: r, hasty: make([]maps.Connection, 0, 1024)}
		r.fresh = newPace(max(rate, 1), false, r.began)
		r.again = r.fresh
		r.more, r.unsent, r.extra = p.more, func(*asked) {}, p.letGo
		log.Warn("the connection table is nearly full: young entries are asked whether they are alive",
			"connections", t.Counts.Connections(), "capacity", t.Capacity, "young", t.Counts.Young(),
			"may_be_young", t.mayBeYoung())
		err := p.ask()
		log.Info("young entries are asked no more", "connections", t.Counts.Connections(), "capacity", t.Capacity,
			"young", t.Counts.Young(), "asked", p.probed, "answered", p.answered, "let_go", p.gone, "took",
			time.Since(r.began).Round(time.Millisecond))
		return err
	})
}

func (t *Teller) mayBeYoung() uint32 { return max(t.Capacity/youngShare, 1) }

// crowded tells whether more than so many percent of the table itself are in use.
func (t *Teller) crowded(percent int64) bool {
	return t.Counts.Connections()*100 > int64(t.Capacity)*percent
}

// over tells whether more than so many percent are in use.
func (t *Teller) over(percent int64) bool {
	return t.crowded(percent) || t.Counts.Young()*100 > int64(t.mayBeYoung())*percent
}

// pressure is a campaign that asks young entries.
type pressure struct {
	*run
	probed, answered, gone int
	list                   []maps.Connection // that haven't answered
	hasty                  []maps.Connection // to be marked idle, and asked the next time
}

// errEased ends a walk early.
var errEased = errors.New("no more than that are in use")

func (p *pressure) ask() error {
	for {
		walked := time.Now()
		p.feeding = true
		err := p.walk(func(c *maps.Connection) error {
			if p.visited%256 == 0 && !p.over(eased) {
				return errEased
			}
			if p.hurried(c) && c.State&maps.StateIdle == 0 {
				// First it is made an exception: from then on the table is asked for each of its packets.
				if p.hasty = append(p.hasty, *c); len(p.hasty) == cap(p.hasty) {
					p.markHasty()
				}
				return nil
			}
			if !p.silent(c) {
				return nil
			}
			return p.feed(c, func(c *maps.Connection) bool {
				if !p.silent(c) {
					return false
				}
				p.probed++
				return true
			})
		})
		p.feeding = false
		p.markHasty()
		switch {
		case p.ctx.Err() != nil:
			return p.ctx.Err()
		case err != nil && !errors.Is(err, errEased):
			p.say(err)
		}
		// Those who were asked are waited for, and for new ones to be so silent.
		at := walked.Add(max(youngAge, walkShare*time.Since(walked)))
		p.wake = func() (time.Time, bool) { return at, time.Now().Before(at) }
		for p.over(eased) && (p.waiting.count > 0 || time.Now().Before(at)) {
			if err := p.pause(); err != nil {
				return err
			}
		}
		p.wake = nil
		if !p.over(eased) {
			return nil
		}
	}
}

// hurried tells whether an entry is one that was young for a moment, and of which nothing was heard since.
func (p *pressure) hurried(c *maps.Connection) bool {
	return c.Tuple.Protocol == unix.IPPROTO_TCP && c.State&(maps.StateYoung|maps.StateStateless) == maps.StateStateless &&
		c.State&(maps.StateCondemned|maps.StateClientTold) == 0 && !c.State.Closing() && p.crowded(eased) &&
		maps.Age(c.Seen, c.Opened) < youngAge && maps.Age(p.ticks(), c.Seen) >= hastyAge
}

func (p *pressure) markHasty() {
	if len(p.hasty) == 0 {
		return
	}
	if _, err := p.Keeper.LetGo(p.hasty); err != nil {
		p.say(err)
	}
	p.hasty = p.hasty[:0]
}

// silent tells whether an entry is to be asked: one that nothing was heard of for so long.
func (p *pressure) silent(c *maps.Connection) bool {
	if p.hurried(c) {
		return c.State&maps.StateIdle != 0
	}
	if c.Tuple.Protocol != unix.IPPROTO_TCP || c.State&maps.StateYoung == 0 ||
		c.State&(maps.StateCondemned|maps.StateClientTold) != 0 || c.State.Closing() {
		return false
	}
	age := youngAge
	if maps.Age(c.Seen, c.Opened) >= youngAge {
		age = shownAge
	}
	return maps.Age(p.ticks(), c.Seen) >= age
}

func (p *pressure) more(a *asked, c *maps.Connection) bool {
	if c.State&(maps.StateYoung|maps.StateIdle) == 0 || c.Seen != a.seen {
		p.answered++
		return false
	}
	if a.probes < lastAsking {
		return true
	}
	p.list = append(p.list, *c)
	return false
}

// letGo marks the silent ones idle and then takes them out: whoever shows itself before, or between, stays.
func (p *pressure) letGo(time.Time) {
	if len(p.list) == 0 {
		return
	}
	var living []maps.Connection // not marked yet
	for i := range p.list {
		if p.list[i].State&maps.StateIdle == 0 {
			living = append(living, p.list[i])
			p.list[i].State |= maps.StateIdle
		}
	}
	_, err := p.Keeper.LetGo(living)
	if err == nil {
		var n int
		n, err = p.Keeper.LetGo(p.list)
		p.gone += n
	}
	if err != nil {
		p.say(err)
	}
	p.list = p.list[:0]
}
