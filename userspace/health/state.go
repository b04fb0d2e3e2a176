package health

import (
	"fmt"
	"slices"
	"time"

	"fairlead/userspace/config"
)

// verdict is what one check says of a backend.
type verdict uint8

const (
	bad   verdict = iota
	good          // it serves
	maint         // it says that it is down on purpose
	moot          // the check could not be made: nothing
)

// outcome is the result of one check.
type outcome struct {
	verdict  verdict
	reason   string // of what is not good
	timeout  bool   // bad for not answering in time
	draining bool   // good, but no new connections
	percent  uint32 // good: of its weight
	words    []string
	latency  time.Duration // good
}

// state is what is known of a backend, and the counting that leads there.
type state struct {
	status   Status
	since    time.Time
	failure  string
	failedAt time.Time
	draining bool
	maint    bool
	percent  uint32
	heldTill time.Time
	checks   uint64
	failures uint64
	latency  time.Duration

	goods, bads uint32      // in a row
	goodSince   time.Time   // the first of goods
	downs       []time.Time // when it went down from up, within the flap window
	words       []string    // unknown ones that have been told
}

// adopt returns the state that a new target begins with.
func adopt(t Target, now time.Time) state {
	s := state{status: Unknown, since: now, percent: 100}
	a := t.Adopt
	if a.Status == Unknown {
		return s
	}
	s.status, s.failure, s.failedAt = a.Status, oneLine(a.Failure), a.FailedAt
	if !a.Since.IsZero() {
		s.since = a.Since
	}
	if s.status == Held {
		s.heldTill = now.Add(t.Check.HoldDown)
	}
	return s
}

// restart forgets what was counted by another way of checking.
func (s *state) restart() {
	s.goods, s.bads, s.goodSince = 0, 0, time.Time{}
}

// apply takes in one outcome, and returns why the status changed where it did.
func (s *state) apply(check *config.Health, o outcome, now time.Time) (why string) {
	if o.verdict == moot {
		s.failure, s.failedAt = oneLine(o.reason), now
		return ""
	}
	s.checks++
	if o.verdict == good {
		return s.applyGood(check, o, now)
	}
	s.goods, s.goodSince = 0, time.Time{}
	if s.status == Held {
		s.heldTill = now.Add(check.HoldDown)
	}
	if o.verdict == maint {
		// Its own word needs no second one. It went on purpose: that is not flapping.
		s.bads, s.maint = 0, true
		if s.status == Down || s.status == Held {
			return ""
		}
		s.become(Down, now)
		return o.reason
	}
	s.failures++
	s.failure, s.failedAt = oneLine(o.reason), now
	s.bads = min(s.bads+1, check.Fall)
	switch {
	case s.status == Unknown:
		s.become(Down, now)
		return s.failure
	case s.bads < check.Fall:
		return ""
	}
	s.maint = false // it does not even say so any more
	if s.status != Up {
		return ""
	}
	if s.flapped(check, now) {
		s.become(Held, now)
		s.heldTill = now.Add(check.HoldDown)
		return fmt.Sprintf("went down %d times within %s: %s", check.Flaps, check.FlapWindow, s.failure)
	}
	s.become(Down, now)
	return s.failure
}

func (s *state) applyGood(check *config.Health, o outcome, now time.Time) (why string) {
	s.bads, s.maint, s.latency = 0, false, o.latency
	if s.goods == 0 {
		s.goodSince = now
		if s.status == Held {
			s.heldTill = now.Add(check.HoldDown)
		}
	}
	s.goods = min(s.goods+1, check.Rise)
	switch s.status {
	case Unknown:
		why = "the first check was good"
		s.become(Up, now)
	case Down:
		if s.goods < check.Rise {
			return ""
		}
		why = fmt.Sprintf("good checks in a row: %d", check.Rise)
		s.become(Up, now)
	case Held:
		if s.goods < check.Rise || now.Sub(s.goodSince) < check.HoldDown {
			return ""
		}
		why = fmt.Sprintf("its checks were good for %s", check.HoldDown)
		s.become(Up, now)
	}
	s.draining, s.percent = o.draining, o.percent
	return why
}

// flapped notes that the backend goes down now, and reports whether that is too often.
func (s *state) flapped(check *config.Health, now time.Time) bool {
	if check.Flaps == 0 || check.HoldDown == 0 {
		s.downs = nil
		return false
	}
	s.downs = slices.DeleteFunc(append(s.downs, now), func(t time.Time) bool { return now.Sub(t) > check.FlapWindow })
	if over := len(s.downs) - int(check.Flaps); over > 0 {
		s.downs = slices.Delete(s.downs, 0, over)
	}
	return len(s.downs) >= int(check.Flaps)
}

func (s *state) become(to Status, now time.Time) {
	s.status, s.since, s.heldTill = to, now, time.Time{}
	s.goods, s.bads = 0, 0
	if to != Up {
		s.draining, s.percent = false, 100 // what only the living say
	}
}

// doubtful reports whether the next check may change the status: then it comes sooner.
func (s *state) doubtful(check *config.Health) bool {
	switch s.status {
	case Unknown:
		return true
	case Up:
		return s.bads > 0
	case Down:
		return s.goods > 0
	}
	return false
}

// dead reports whether the backend is down and gives no sign of coming back.
func (s *state) dead() bool { return (s.status == Down || s.status == Held) && s.goods == 0 }

// seen is the part of a state whose change is told.
type seen struct {
	status          Status
	draining, maint bool
	percent         uint32
	failure         string
}

func (s *state) seen() seen { return seen{s.status, s.draining, s.maint, s.percent, s.failure} }

// maxWords bounds what a backend can have logged by ever new words.
const maxWords = 8

// newWords returns those of the words that have not been told yet.
func (s *state) newWords(words []string) (fresh []string) {
	for _, w := range words {
		if len(s.words) < maxWords && !slices.Contains(s.words, w) {
			s.words = append(s.words, w)
			fresh = append(fresh, w)
		}
	}
	return fresh
}
