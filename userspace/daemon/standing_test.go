package daemon

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead/maps"
	"fairlead/userspace/config"
	"fairlead/userspace/health"
	"fairlead/userspace/orders"
)

// TestJudge: what becomes of each backend, told by letters: r in the ring, t tried, d down, - out for new ones alone.
func TestJudge(t *testing.T) {
	now := time.Now()
	is := func(status health.Status) known { return known{report: health.Report{Status: status, Percent: 100}} }
	up, down, held, unknown := is(health.Up), is(health.Down), is(health.Held), is(health.Unknown)
	drained := func(k known) known { k.order.Drain = true; return k }
	by := func(k known, change func(r *health.Report)) known { change(&k.report); return k }
	draining := by(up, func(r *health.Report) { r.Draining = true })
	maint := by(down, func(r *health.Report) { r.Maint = true })
	for name, c := range map[string]struct {
		all      []known
		change   func(s *config.Service)
		want     string
		standing maps.Standing
	}{
		"all up":                       {[]known{up, up, up}, nil, "rrr", 0},
		"one down":                     {[]known{up, down, up}, nil, "rdr", 0},
		"one held":                     {[]known{up, held, up}, nil, "rdr", 0},
		"one unknown":                  {[]known{up, unknown, up}, nil, "r-r", 0},
		"one unknown, initially up":    {[]known{up, unknown, up}, initially(config.InitialUp), "rrr", 0},
		"all down":                     {[]known{down, held, down}, nil, "ttt", maps.StandingAllDown},
		"all down, reset":              {[]known{down, held, down}, func(s *config.Service) { s.AllDown = config.AllDownReset }, "ddd", maps.StandingAllDown},
		"all unknown":                  {[]known{unknown, unknown, unknown}, nil, "rrr", maps.StandingAllDown},
		"none up, some unknown":        {[]known{down, unknown, down}, nil, "trt", maps.StandingAllDown},
		"drained by command":           {[]known{drained(up), up, up}, nil, "-rr", 0},
		"drained, then dead":           {[]known{drained(down), up, up}, nil, "drr", 0},
		"drained, all others dead":     {[]known{drained(up), down, down}, nil, "-tt", maps.StandingAllDown},
		"all drained":                  {[]known{drained(up), drained(up), drained(up)}, nil, "---", 0},
		"draining by its check":        {[]known{draining, up, up}, nil, "-rr", 0},
		"in maintenance by its check":  {[]known{maint, up, up}, nil, "-rr", 0},
		"panic":                        {[]known{up, down, down}, panicBelow(50), "rrr", maps.StandingPanic},
		"just no panic":                {[]known{up, up, down}, panicBelow(66), "rrd", 0},
		"panic leaves out the drained": {[]known{drained(down), down, down}, panicBelow(50), "-rr", maps.StandingPanic},
		"panic counts not the drained": {[]known{drained(up), up, down}, panicBelow(50), "-rd", 0},
		"all down is panic first":      {[]known{down, down, down}, panicBelow(1), "rrr", maps.StandingPanic},
		"no checks":                    {[]known{{}, {}, {}}, func(s *config.Service) { s.Health = config.Health{Type: config.HealthNone} }, "rrr", 0},
		"disabled":                     {[]known{{}, up, up}, func(s *config.Service) { s.Backends[0].Disabled = true }, "-rr", 0},
		"weight 0":                     {[]known{up, up, up}, func(s *config.Service) { s.Backends[1].Weight = 0 }, "rrr", 0}, // the ring gives it no slot
		"weight 0 and all others down": {[]known{down, up, down}, func(s *config.Service) { s.Backends[1].Weight = 0 }, "t-t", maps.StandingAllDown},
	} {
		t.Run(name, func(t *testing.T) {
			s := config.Service{
				AllDown: config.AllDownOpen, Health: config.Health{Type: config.HealthTCP, Initial: config.InitialDown},
				Backends: []config.Backend{{Name: "a", Weight: 1}, {Name: "b", Weight: 1}, {Name: "c", Weight: 1}},
			}
			if c.change != nil {
				c.change(&s)
			}
			list, standing, next := judge(&s, c.all, now)
			got := ""
			for _, j := range list {
				switch {
				case j.tried && j.down && !j.out:
					got += "t"
				case j.down && j.out:
					got += "d"
				case j.out && !j.down && !j.tried:
					got += "-"
				case !j.out && !j.down && !j.tried:
					got += "r"
				default:
					got += "?"
				}
			}
			if got != c.want || standing != c.standing {
				t.Errorf("%s, %v; want %s, %v", got, standing, c.want, c.standing)
			}
			if !next.IsZero() {
				t.Error("asks to be asked again")
			}
		})
	}
}

func initially(i config.Initial) func(s *config.Service) {
	return func(s *config.Service) { s.Health.Initial = i }
}

func panicBelow(percent uint32) func(s *config.Service) {
	return func(s *config.Service) { s.Panic = percent }
}

// TestSlowStart: a weight grows in steps, and says when the next is due; the check's own word is a part of it.
func TestSlowStart(t *testing.T) {
	came := time.Now()
	s := config.Service{
		SlowStart: 40 * time.Second, Health: config.Health{Type: config.HealthTCP},
		Backends: []config.Backend{{Name: "a", Weight: 10}, {Name: "b", Weight: 10}},
	}
	old := known{report: health.Report{Status: health.Up, Since: came.Add(-time.Hour), Percent: 100}}
	fresh := known{report: health.Report{Status: health.Up, Since: came, Percent: 100}}
	half := fresh
	half.report.Percent = 50
	for after, want := range map[time.Duration]struct {
		percent, half uint32
		next          time.Duration
		orders        maps.Orders
	}{
		0:                       {5, 2, 2 * time.Second, maps.OrderSlowStart},
		1900 * time.Millisecond: {5, 2, 2 * time.Second, maps.OrderSlowStart},
		2 * time.Second:         {10, 5, 4 * time.Second, maps.OrderSlowStart},
		39 * time.Second:        {100, 50, 40 * time.Second, maps.OrderSlowStart},
		40 * time.Second:        {100, 50, 0, 0},
		time.Hour:               {100, 50, 0, 0},
	} {
		list, _, next := judge(&s, []known{old, fresh}, came.Add(after))
		if list[0].percent != 100 || list[1].percent != want.percent || list[1].shown.Orders != want.orders || list[1].weight != 10 {
			t.Errorf("after %v: %+v", after, list)
		}
		if wait := next.Sub(came); want.next == 0 && !next.IsZero() || want.next != 0 && wait != want.next {
			t.Errorf("after %v: again after %v, want %v", after, wait, want.next)
		}
		list, _, _ = judge(&s, []known{old, half}, came.Add(after))
		if list[1].percent != want.half || list[1].shown.Orders != want.orders|maps.OrderCheckWeight {
			t.Errorf("after %v, at half its weight: %+v", after, list[1])
		}
	}
}

// TestOrders: what was set by command stands beside what is configured.
func TestOrders(t *testing.T) {
	weight := uint32(7)
	s := config.Service{
		Health:   config.Health{Type: config.HealthTCP},
		Backends: []config.Backend{{Name: "a", Weight: 3}, {Name: "b", Weight: 3}},
	}
	k := known{
		order:  orders.Order{Weight: &weight, Drain: true},
		report: health.Report{Status: health.Up, Percent: 100, Failure: "connect: connection refused"},
		since:  12, failedAt: 11,
	}
	list, _, _ := judge(&s, []known{k, {report: health.Report{Status: health.Up, Percent: 0}}}, time.Now())
	want := judgement{weight: 7, percent: 100, out: true, shown: maps.Shown{
		Configured: 3, Health: maps.HealthUp, Orders: maps.OrderWeight | maps.OrderDrain, Since: 12, FailedAt: 11,
		Failure: "connect: connection refused",
	}}
	if diff := cmp.Diff(want, list[0], cmp.AllowUnexported(judgement{})); diff != "" {
		t.Error(diff)
	}
	if !list[1].out || list[1].down || list[1].percent != 100 || list[1].shown.Orders != maps.OrderCheckDrain {
		t.Errorf("0 %% by its check's word: %+v", list[1])
	}
}
