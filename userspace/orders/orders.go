// Package orders keeps what was set by command: drains and weights. They hold over reloads and restarts until a command
// takes them back, and lie in a file of the daemon's state directory, written aside and then made visible in one step.
package orders

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// What an order may ask for.
const (
	MaxRate   = 1_000_000 // connections a second
	MaxWeight = 1000      // as in the configuration
)

// Name is whom an order is about.
type Name struct{ Service, Backend string }

// String is service/backend, as commands take it.
func (n Name) String() string { return n.Service + "/" + n.Backend }

// Compare orders names by service, then by backend.
func (n Name) Compare(other Name) int {
	return cmp.Or(cmp.Compare(n.Service, other.Service), cmp.Compare(n.Backend, other.Backend))
}

// Order is what was set of one backend. The zero Order is none.
type Order struct {
	Drain    bool
	Rate     uint32    // with Drain: living connections told to end a second; 0: they are left
	Deadline time.Time // with Drain: when what is left is told to end; zero: never
	Since    time.Time // when it was given; of a drain's progress
	Weight   *uint32   // nil: as configured
}

// IsZero tells whether nothing is set.
func (o Order) IsZero() bool { return !o.Drain && o.Weight == nil }

// Equal tells whether both set the same, since the same time.
func (o Order) Equal(other Order) bool {
	if (o.Weight == nil) != (other.Weight == nil) || o.Weight != nil && *o.Weight != *other.Weight {
		return false
	}
	return o.Drain == other.Drain && o.Rate == other.Rate && o.Deadline.Equal(other.Deadline) && o.Since.Equal(other.Since)
}

// check says what is wrong with an order.
func (o Order) check() error {
	switch {
	case o.Rate > MaxRate:
		return fmt.Errorf("a rate of %d connections a second: the most is %d", o.Rate, MaxRate)
	case o.Weight != nil && *o.Weight > MaxWeight:
		return fmt.Errorf("a weight of %d: the most is %d", *o.Weight, MaxWeight)
	case !o.Drain && (o.Rate != 0 || !o.Deadline.IsZero()):
		return fmt.Errorf("a rate or a deadline without a drain")
	}
	for _, t := range []time.Time{o.Deadline, o.Since} {
		if year := t.UTC().Year(); year < 1 || year > 9999 { // RFC 3339 has no others
			return fmt.Errorf("a time in the year %d", year)
		}
	}
	return nil
}

// own is a copy that shares nothing, with times as a file gives them back.
func (o Order) own() Order {
	if o.Weight != nil {
		weight := *o.Weight
		o.Weight = &weight
	}
	o.Deadline, o.Since = plainTime(o.Deadline), plainTime(o.Since)
	return o
}

// plainTime is a time without its monotonic clock and its zone.
func plainTime(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC().Round(0)
}

// Find is the one backend that a word means: `backend`, or `service/backend` where several services have one. The error
// names what there is instead.
func Find(word string, known []Name) (Name, error) {
	var found []Name
	for _, n := range known {
		if n.Backend == word || n.String() == word {
			found = append(found, n)
		}
	}
	slices.SortFunc(found, Name.Compare)
	found = slices.Compact(found)
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		if len(known) == 0 {
			return Name{}, fmt.Errorf("there is no backend %s: there is none at all", word)
		}
		return Name{}, fmt.Errorf("there is no backend %s: there are %s", word, listed(known))
	}
	return Name{}, fmt.Errorf("backend %s: there are several: say which: %s", word, listed(found))
}

// listed names at most twenty.
func listed(names []Name) string {
	names = slices.Clone(names)
	slices.SortFunc(names, Name.Compare)
	names = slices.Compact(names)
	const show = 20
	more := ""
	if len(names) > show {
		more = fmt.Sprintf(" and %d more", len(names)-show)
		names = names[:show]
	}
	var texts []string
	for _, n := range names {
		texts = append(texts, n.String())
	}
	return strings.Join(texts, ", ") + more
}
