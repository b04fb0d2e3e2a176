package probe

import (
	"testing"
	"time"
)

// However often and however irregularly it is asked, a pace lets as many through as its rate says, and no burst.
func TestPace(t *testing.T) {
	for _, rate := range []uint32{1, 3, 10, 50, 499, 500, 20_000, 1_000_000} {
		for _, jitter := range []bool{false, true} {
			begin := time.Unix(1_000_000, 0)
			p := newPace(rate, jitter, begin)
			const seconds = 20
			counts := make([]int, seconds)
			steps := 0
			for now := begin; now.Before(begin.Add(seconds * time.Second)); steps++ {
				n := p.allowed(now)
				if burst := max(int(rate/20), 1); n > burst {
					t.Fatalf("rate %d: a burst of %d", rate, n)
				}
				p.spend(n)
				counts[now.Sub(begin)/time.Second] += n
				next, ever := p.next()
				if !ever || !next.After(now) && !jitter { // a slot may begin with what was due in it
					t.Fatalf("rate %d: the next at %v, it is %v", rate, next, now)
				}
				if idle := next.Add(-4); idle.After(now) && p.allowed(idle) > 0 {
					t.Fatalf("rate %d: something is allowed before the next", rate)
				}
				if p.allowed(next) < 1 {
					t.Fatalf("rate %d: nothing is allowed at the next", rate)
				}
				now = now.Add(max(next.Sub(now), slice+time.Duration(random.Int64N(int64(slice)))))
			}
			for i, n := range counts {
				if d := n - int(rate); d > int(rate/100)+1 || d < -int(rate/100)-1 {
					t.Errorf("rate %d, jitter %t: %d in second %d", rate, jitter, n, i)
				}
			}
		}
	}
}

// Lost time is lost, but for a twentieth of a second.
func TestPaceAfterStall(t *testing.T) {
	begin := time.Unix(1_000_000, 0)
	for _, jitter := range []bool{false, true} {
		p := newPace(1000, jitter, begin)
		p.spend(p.allowed(begin))
		now := begin.Add(time.Minute)
		total := 0
		for end := now.Add(time.Second); now.Before(end); now = now.Add(5 * time.Millisecond) {
			n := p.allowed(now)
			if n > 50 {
				t.Fatalf("a burst of %d", n)
			}
			total += n
			p.spend(n)
		}
		if total < 990 || total > 1060 {
			t.Errorf("%d in the second behind the stall", total)
		}
	}
	p := newPace(0, false, begin)
	if _, ever := p.next(); ever || p.allowed(begin.Add(time.Hour)) != 0 {
		t.Error("a rate of 0 lets something through")
	}
	p.setRate(100, begin.Add(time.Hour))
	if n := p.allowed(begin.Add(time.Hour + time.Second)); n != 5 {
		t.Errorf("%d allowed after the change of rate", n)
	}
}
