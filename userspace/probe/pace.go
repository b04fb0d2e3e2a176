package probe

import (
	"math/rand/v2"
	"time"
)

// slice is the least that a campaign sleeps: what came due meanwhile goes in one batch.
const slice = 5 * time.Millisecond

// pace says when something may be done that is to be done so many times a second: the second is divided into as many
// slots. Time that was lost (a table was locked, a queue full, no CPU free) is not made up for by more than a twentieth of a
// second's worth: no burst is larger, and no second has more than so much too many.
type pace struct {
	rate   uint32 // 0: never
	jitter bool   // anywhere in its slot, not at its beginning
	base   time.Time
	spent  float64 // slots since base
	shift  float64 // where in its slot the next one is
}

func newPace(rate uint32, jitter bool, now time.Time) *pace {
	p := &pace{rate: rate, jitter: jitter, base: now}
	p.turn()
	return p
}

// setRate changes the rate from now on.
func (p *pace) setRate(rate uint32, now time.Time) {
	p.rate, p.base, p.spent = rate, now, 0
}

func (p *pace) turn() {
	if p.jitter {
		p.shift = rand.Float64()
	}
}

// allowed is how many may be done now.
func (p *pace) allowed(now time.Time) int {
	if p.rate == 0 {
		return 0
	}
	n := now.Sub(p.base).Seconds()*float64(p.rate) - p.shift - p.spent + 1
	if burst := float64(max(p.rate/20, 1)); n > burst {
		if n >= burst+1 { // the rest of that time is lost
			p.base, p.spent = now, 1-burst-p.shift
		}
		n = burst
	}
	return int(max(n, 0))
}

// spend says that so many were done.
func (p *pace) spend(n int) {
	p.spent += float64(n)
	p.turn()
}

// next is when one more may be done; false: never.
func (p *pace) next() (time.Time, bool) {
	if p.rate == 0 {
		return time.Time{}, false
	}
	seconds := (p.spent + p.shift) / float64(p.rate)
	// Rounded up, by more than what floating point loses, so that it is allowed then.
	return p.base.Add(time.Duration(seconds*float64(time.Second)) + 2), true
}
