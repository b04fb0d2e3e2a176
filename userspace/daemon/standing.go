package daemon

import (
	"cmp"
	"time"

	"fairlead/maps"
	"fairlead/userspace/config"
	"fairlead/userspace/health"
	"fairlead/userspace/orders"
)

// This file decides what the data plane is to make of a service's backends: from the configuration, from what checks
// say, and from what was set by command. It touches nothing.

// known is what there is to go by for one backend beside its configuration.
type known struct {
	order  orders.Order
	report health.Report // zero: no check has ended yet
	// Ticks of the report's times: the maps', taken once, so that they don't differ each time they are asked for.
	since, failedAt uint32
}

// judgement is what becomes of one backend.
type judgement struct {
	weight  uint32 // as configured, or by command
	percent uint32 // of it in the ring, 1 to 100
	out     bool   // no new connections
	down    bool   // what is open is lost
	tried   bool   // down, as all are: newcomers are tried on it
	shown   maps.Shown
}

// slowSteps is in how many steps the weight of a backend grows that comes up.
const slowSteps = 20

// judge decides about a service's backends, each in the place of its own. Next is when it has to be asked again though
// nothing has happened; zero: never.
func judge(s *config.Service, all []known, now time.Time) (list []judgement, standing maps.Standing, next time.Time) {
	list = make([]judgement, len(s.Backends))
	asked, up := 0, 0 // backends whose checks are asked, and how many of them say up
	for i, b := range s.Backends {
		j, k := &list[i], &all[i]
		*j = judgement{weight: b.Weight, percent: 100, shown: maps.Shown{Configured: b.Weight, Health: maps.HealthNone}}
		if k.order.Weight != nil {
			j.weight = *k.order.Weight
			j.shown.Orders |= maps.OrderWeight
		}
		if k.order.Drain {
			j.out = true
			j.shown.Orders |= maps.OrderDrain
		}
		if b.Disabled {
			j.out = true
			j.shown.Orders |= maps.OrderDisabled
			continue
		}
		check := s.HealthOf(b)
		good := true
		if check.NeedsChecks() {
			good = j.heed(&check, k)
		}
		if grown := growth(s.SlowStart, &k.report, now); grown < slowSteps && good && check.NeedsChecks() {
			j.percent = max(j.percent*uint32(grown+1)/slowSteps, 1)
			j.shown.Orders |= maps.OrderSlowStart
			next = earlier(next, k.report.Since.Add(s.SlowStart*time.Duration(grown+1)/slowSteps))
		}
		if j.out || j.weight == 0 {
			continue
		}
		asked++
		if good {
			up++
		} else {
			j.out = true
		}
	}

	verdictOff := asked > 0 && uint32(up)*100 < s.Panic*uint32(asked)
	switch {
	case verdictOff:
		standing = maps.StandingPanic
	case asked > 0 && up == 0:
		standing = maps.StandingAllDown
	}
	for i, b := range s.Backends {
		j := &list[i]
		excused := b.Disabled || j.shown.Orders&(maps.OrderDrain|maps.OrderCheckDrain|maps.OrderCheckMaint) != 0 || j.weight == 0
		switch {
		case standing == maps.StandingPanic:
			j.down = false
			j.out = excused
		case standing == maps.StandingAllDown && s.AllDown == config.AllDownOpen:
			j.tried = j.down && !excused
			j.out = excused
		}
	}
	return list, standing, next
}

// heed takes what checks say of a backend, and answers whether it may have new connections for all they say.
func (j *judgement) heed(check *config.Health, k *known) (good bool) {
	r := &k.report
	j.shown.Since, j.shown.FailedAt, j.shown.Failure = k.since, k.failedAt, r.Failure
	switch r.Status {
	case health.Up:
		j.shown.Health, good = maps.HealthUp, true
	case health.Down:
		j.shown.Health, j.down = maps.HealthDown, true
	case health.Held:
		j.shown.Health, j.down = maps.HealthHeld, true
	default:
		// Nobody knows that its connections are lost.
		j.shown.Health, good = maps.HealthUnknown, check.Initial == config.InitialUp
	}
	if r.Draining {
		j.out = true
		j.shown.Orders |= maps.OrderCheckDrain
	}
	if r.Maint {
		// On purpose: no new connections, but it serves those that it has.
		j.out, j.down = true, false
		j.shown.Orders |= maps.OrderCheckMaint
	}
	switch {
	case r.Status != health.Up || r.Percent == 100:
	case r.Percent == 0:
		// Nothing of its weight is no new connections, in a panic too.
		j.out = true
		j.shown.Orders |= maps.OrderCheckDrain
	default:
		j.percent = min(r.Percent, 100)
		j.shown.Orders |= maps.OrderCheckWeight
	}
	return good
}

// growth is how many steps of its slow start a backend has behind it; slowSteps: it is over, or there is none.
func growth(over time.Duration, r *health.Report, now time.Time) int {
	if over <= 0 || r.Status != health.Up {
		return slowSteps
	}
	return int(min(slowSteps*max(now.Sub(r.Since), 0)/over, slowSteps))
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// tick is a time as the maps have it; 0: none.
func tick(t time.Time) uint32 {
	if t.IsZero() {
		return 0
	}
	return cmp.Or(maps.Now()-maps.Ticks(time.Since(t)), 1)
}

// timeOf is a tick of the maps as a time.
func timeOf(tick uint32) time.Time {
	if tick == 0 {
		return time.Time{}
	}
	return time.Now().Add(-maps.Age(maps.Now(), tick))
}
