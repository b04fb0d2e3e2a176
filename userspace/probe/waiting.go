package probe

import (
	"net/netip"
	"time"

	"fairlead/maps"
)

// asked is a connection that a campaign has in hand. A backend may have a million of them, so it is small.
type asked struct {
	source     [16]byte
	due        time.Duration // since the campaign began: when it is looked at again
	site       uint32        // place of its destination and protocol in the campaign's list
	generation uint32
	seen       uint32 // as it was before the last probe
	port       uint16
	probes     uint8
	inherited  bool // condemned before the campaign began
}

type site struct {
	destination netip.AddrPort
	protocol    uint8
}

// sites are the addresses, ports and protocols that a campaign's connections go to.
type sites struct {
	list  []site
	place map[site]uint32
}

func (s *sites) asked(c *maps.Connection) asked {
	at := site{c.Tuple.Destination, c.Tuple.Protocol}
	place, known := s.place[at]
	if !known {
		if s.place == nil {
			s.place = make(map[site]uint32)
		}
		place = uint32(len(s.list))
		s.list = append(s.list, at)
		s.place[at] = place
	}
	return asked{source: c.Tuple.Source.Addr().As16(), port: c.Tuple.Source.Port(), site: place,
		generation: c.Generation, seen: c.Seen}
}

func (s *sites) tuple(a *asked) maps.Tuple {
	at := s.list[a.site]
	source := netip.AddrFrom16(a.source)
	if at.destination.Addr().Is4() {
		source = source.Unmap()
	}
	return maps.Tuple{Source: netip.AddrPortFrom(source, a.port), Destination: at.destination, Protocol: at.protocol}
}

const (
	// retry is how long a probe's answer is waited for. A host may answer no more than two segments outside of the window
	// a second and socket (Linux: tcp_invalid_ratelimit): one sent earlier may be lost to that.
	retry      = 600 * time.Millisecond
	retryMost  = 30 * time.Second
	lastProbe  = 12 // after 2 min 38 s; its answer is waited for until 3 min 8 s
	lastAsking = 3  // whether anyone is there at all
)

// patience is how long the answer to the n-th probe is waited for: 600 ms twice, then twice as long each time.
func patience(n uint8) time.Duration {
	if n < 2 {
		return retry
	}
	return min(retry<<(n-2), retryMost)
}

// waiting are connections that were probed, in the order in which they are due: those probed equally often wait equally
// long.
type waiting struct {
	queues [lastProbe + 1][]asked
	count  int
}

func (w *waiting) add(a asked) {
	w.queues[a.probes] = append(w.queues[a.probes], a)
	w.count++
}

func (w *waiting) first() *[]asked {
	var first *[]asked
	for i := range w.queues {
		if q := &w.queues[i]; len(*q) > 0 && (first == nil || (*q)[0].due < (*first)[0].due) {
			first = q
		}
	}
	return first
}

// generations are the generation numbers of those waiting: no two living entries share one.
func (w *waiting) generations() map[uint32]struct{} {
	all := make(map[uint32]struct{}, w.count)
	for _, q := range w.queues {
		for i := range q {
			all[q[i].generation] = struct{}{}
		}
	}
	return all
}

// next is when the first is due; false: none waits.
func (w *waiting) next() (time.Duration, bool) {
	q := w.first()
	if q == nil {
		return 0, false
	}
	return (*q)[0].due, true
}

// take takes out one that is due.
func (w *waiting) take(now time.Duration) (asked, bool) {
	q := w.first()
	if q == nil || (*q)[0].due > now {
		return asked{}, false
	}
	a := (*q)[0]
	if *q = (*q)[1:]; len(*q) == 0 {
		*q = nil // its room is given back
	}
	w.count--
	return a, true
}
