package health

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead/userspace/config"
)

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// judged is what the tests' checks are judged by, unless they say otherwise.
func judged() config.Health {
	return config.Health{Type: config.HealthTCP, Interval: 2 * time.Second, FastInterval: 500 * time.Millisecond,
		Timeout: time.Second, Rise: 2, Fall: 3, Flaps: 3, FlapWindow: time.Minute, HoldDown: 30 * time.Second}
}

var letters = map[Status]byte{Unknown: '?', Up: 'U', Down: 'D', Held: 'H'}

// TestState plays checks to a state, two seconds apart: + good, - bad, m maint, d draining, . none could be made. What is
// wanted is the status after each, and at the end what else is told.
func TestState(t *testing.T) {
	for _, c := range []struct {
		name     string
		adopt    Status
		change   func(*config.Health)
		checks   string
		statuses string
		want     seen
	}{
		{name: "first good decides", checks: "+", statuses: "U", want: seen{status: Up, percent: 100}},
		{name: "first bad decides", checks: "-", statuses: "D", want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "rise", checks: "-+-++", statuses: "DDDDU", want: seen{status: Up, percent: 100, failure: "bad"}},
		{name: "fall", checks: "+--+---", statuses: "UUUUUUD", want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "rise and fall of one", change: func(h *config.Health) { h.Rise, h.Fall = 1, 1 }, checks: "+-+-",
			statuses: "UDUD", want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "what could not be checked changes nothing", checks: ".+--.-.", statuses: "?UUUUDD",
			want: seen{status: Down, percent: 100, failure: "moot"}},
		{name: "adopted up needs fall", adopt: Up, checks: "--+---", statuses: "UUUUUD",
			want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "adopted down needs rise", adopt: Down, checks: "+-++", statuses: "DDDU",
			want: seen{status: Up, percent: 100, failure: "bad"}},
		{name: "adopted held needs to hold", adopt: Held, checks: strings.Repeat("+", 17),
			statuses: strings.Repeat("H", 15) + "UU", want: seen{status: Up, percent: 100}},
		{name: "draining is the last good answer's", checks: "dd", statuses: "UU",
			want: seen{status: Up, percent: 50, draining: true}},
		{name: "draining stays through doubt", checks: "d--", statuses: "UUU",
			want: seen{status: Up, percent: 50, draining: true, failure: "bad"}},
		{name: "draining ends by an answer", checks: "d+", statuses: "UU", want: seen{status: Up, percent: 100}},
		{name: "draining is of the living", checks: "d---", statuses: "UUUD",
			want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "maint at once", checks: "+m", statuses: "UD", want: seen{status: Down, maint: true, percent: 100}},
		{name: "maint first", checks: "m", statuses: "D", want: seen{status: Down, maint: true, percent: 100}},
		{name: "maint ends by an answer, then rise", checks: "+m++", statuses: "UDDU", want: seen{status: Up, percent: 100}},
		{name: "maint ends by fall", checks: "+m--", statuses: "UDDD",
			want: seen{status: Down, maint: true, percent: 100, failure: "bad"}},
		{name: "maint has ended by fall", checks: "+m---", statuses: "UDDDD",
			want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "maint is no flapping", checks: "+m++m++m++m++", statuses: "UDDUDDUDDUDDU",
			want: seen{status: Up, percent: 100}},
		{name: "flapping", checks: "+---++---++---", statuses: "UUUDDUUUDDUUUH",
			want: seen{status: Held, percent: 100, failure: "bad"}},
		{name: "first down is no flap", checks: "-++---++---", statuses: "DDUUUDDUUUD",
			want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "held until good without a break", checks: "+---++---++---" + strings.Repeat("+", 15) + "-" + strings.Repeat("+", 16),
			statuses: "UUUDDUUUDDUUUH" + strings.Repeat("H", 31) + "U", want: seen{status: Up, percent: 100, failure: "bad"}},
		{name: "held again by one more down", checks: "+---++---++---" + strings.Repeat("+", 16) + "---",
			change:   func(h *config.Health) { h.FlapWindow = time.Hour },
			statuses: "UUUDDUUUDDUUUH" + strings.Repeat("H", 15) + "UUUH",
			want:     seen{status: Held, percent: 100, failure: "bad"}},
		{name: "outside of the window", change: func(h *config.Health) { h.FlapWindow = 19 * time.Second },
			checks: "+---++---++---", statuses: "UUUDDUUUDDUUUD", want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "just within the window", change: func(h *config.Health) { h.FlapWindow = 20 * time.Second },
			checks: "+---++---++---", statuses: "UUUDDUUUDDUUUH", want: seen{status: Held, percent: 100, failure: "bad"}},
		{name: "hold off", change: func(h *config.Health) { h.HoldDown = 0 }, checks: "+---++---++---++---",
			statuses: "UUUDDUUUDDUUUDDUUUD", want: seen{status: Down, percent: 100, failure: "bad"}},
		{name: "held and maint", checks: "+---++---++---m", statuses: "UUUDDUUUDDUUUHH",
			want: seen{status: Held, maint: true, percent: 100, failure: "bad"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			check, now := judged(), start
			if c.change != nil {
				c.change(&check)
			}
			s := adopt(Target{Check: check, Adopt: Report{Status: c.adopt}}, now)
			if c.adopt == Held {
				now = now.Add(-2 * time.Second) // its first check is at once
			}
			var statuses []byte
			for _, letter := range c.checks {
				now = now.Add(2 * time.Second)
				was := s.status
				why := s.apply(&check, map[rune]outcome{
					'+': {verdict: good, percent: 100}, '-': {verdict: bad, reason: "bad"}, '.': {verdict: moot, reason: "moot"},
					'm': {verdict: maint, reason: "maint"}, 'd': {verdict: good, percent: 50, draining: true},
				}[letter], now)
				if (why != "") != (was != s.status) {
					t.Errorf("from %s to %s: because %q", was, s.status, why)
				}
				if was != s.status && s.since != now {
					t.Errorf("%s since %s, want %s", s.status, s.since, now)
				}
				if (s.status == Held) == s.heldTill.IsZero() {
					t.Errorf("%s till %s", s.status, s.heldTill)
				}
				statuses = append(statuses, letters[s.status])
			}
			if string(statuses) != c.statuses {
				t.Errorf("after checks %s\nis         %s\nwant       %s", c.checks, statuses, c.statuses)
			}
			if diff := cmp.Diff(c.want, s.seen(), cmp.AllowUnexported(seen{})); diff != "" {
				t.Errorf("state (-want +got):\n%s", diff)
			}
		})
	}
}

func TestHeldTill(t *testing.T) {
	check := judged()
	s := adopt(Target{Check: check, Adopt: Report{Status: Held, Since: start.Add(-time.Hour), Failure: "a\nb", FailedAt: start}}, start)
	if !s.since.Equal(start.Add(-time.Hour)) || s.failure != "a b" || !s.failedAt.Equal(start) {
		t.Errorf("adopted since %s, failure %q at %s", s.since, s.failure, s.failedAt)
	}
	for _, step := range []struct {
		after   time.Duration
		verdict verdict
		till    time.Duration
	}{
		{0, moot, 30 * time.Second}, {10 * time.Second, good, 40 * time.Second}, {20 * time.Second, good, 40 * time.Second},
		{25 * time.Second, bad, 55 * time.Second}, {26 * time.Second, maint, 56 * time.Second},
		{28 * time.Second, good, 58 * time.Second}, {57 * time.Second, good, 58 * time.Second},
	} {
		s.apply(&check, outcome{verdict: step.verdict, percent: 100, reason: "x"}, start.Add(step.after))
		if till := s.heldTill.Sub(start); s.status != Held || till != step.till {
			t.Errorf("at %s: %s till %s, want held till %s", step.after, s.status, till, step.till)
		}
	}
	s.apply(&check, outcome{verdict: good, percent: 100}, start.Add(58*time.Second))
	if s.status != Up || !s.heldTill.IsZero() {
		t.Errorf("in the end: %s till %s", s.status, s.heldTill)
	}
}

// TestDoubt asks when checks are to come fast, and who counts as dead.
func TestDoubt(t *testing.T) {
	check := judged()
	for _, c := range []struct {
		checks         string
		doubtful, dead bool
	}{
		{"", true, false}, {"+", false, false}, {"+-", true, false}, {"+-+", false, false}, {"+---", false, true},
		{"+---+", true, false}, {"+---+-", false, true}, {"-", false, true}, {"+---++---++---", false, true},
		{"+---++---++---+", false, false},
	} {
		s := adopt(Target{Check: check}, start)
		for i, letter := range c.checks {
			v := good
			if letter == '-' {
				v = bad
			}
			s.apply(&check, outcome{verdict: v, percent: 100}, start.Add(time.Duration(i)*time.Second))
		}
		if s.doubtful(&check) != c.doubtful || s.dead() != c.dead {
			t.Errorf("after %q: doubtful %t, dead %t", c.checks, s.doubtful(&check), s.dead())
		}
	}
}

func TestStateWords(t *testing.T) {
	for _, c := range []struct {
		values []string
		want   said
	}{
		{nil, said{percent: 100}},
		{[]string{"ready"}, said{percent: 100}},
		{[]string{"UP, 75%"}, said{percent: 75}},
		{[]string{"drain 30%", "\tReady"}, said{drain: true, percent: 30}},
		{[]string{"0%"}, said{percent: 0}},
		{[]string{"10% 100%"}, said{percent: 100}},
		{[]string{"maint,down,drain"}, said{maint: true, down: true, drain: true, percent: 100}},
		{[]string{"101% -5% 5 % 1e1% 99999999999%"}, said{percent: 100, unknown: []string{"101%", "-5%", "5", "%", "1e1%", "99999999999%"}}},
		{[]string{"stopped", "agent#1"}, said{percent: 100, unknown: []string{"stopped", "agent#1"}}},
		{[]string{"a b c d e f g h i j"}, said{percent: 100, unknown: strings.Fields("a b c d e f g h")}},
	} {
		if diff := cmp.Diff(c.want, parseState(c.values), cmp.AllowUnexported(said{})); diff != "" {
			t.Errorf("%q (-want +got):\n%s", c.values, diff)
		}
	}
}

func FuzzState(f *testing.F) {
	for _, seed := range []string{"", "ready", "drain, 50%", "maint", "x\x00y, 00000000000000000000000001%", "DOWN\tup", "%"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		s := parseState([]string{value})
		if s.percent > 100 || len(s.unknown) > maxWords {
			t.Errorf("%q: %+v", value, s)
		}
		for _, w := range s.unknown {
			if w != oneLine(w) || len(w) > maxReason {
				t.Errorf("%q: word %q", value, w)
			}
		}
		// A known word more changes only what it names.
		more := parseState([]string{value, "drain 7%"})
		if !more.drain || more.percent != 7 || more.maint != s.maint || more.down != s.down {
			t.Errorf("%q and drain 7%%: %+v", value, more)
		}
	})
}

func TestOneLine(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "",
		" a\tb\r\n\x00c\x1b[1m ":           "a b c [1m",
		"\xff\xfe":                         "?",
		strings.Repeat("x", 127):           strings.Repeat("x", 127),
		strings.Repeat("x", 128):           strings.Repeat("x", 124) + "…",
		strings.Repeat("x", 123) + "ééééé": strings.Repeat("x", 123) + "…",
	} {
		if got := oneLine(text); got != want || len(got) > maxReason {
			t.Errorf("oneLine(%q) = %q, want %q", text, got, want)
		}
	}
}

func TestStatusString(t *testing.T) {
	if got, want := fmt.Sprint(Unknown, Up, Down, Held), "unknown up down held"; got != want {
		t.Errorf("statuses print as %q, want %q", got, want)
	}
}
