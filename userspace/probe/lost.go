package probe

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/maps"
)

const (
	walkTries = 5 // of a table that can't be read
	walkAgain = time.Second
)

// Lost tells the clients of a backend that is down, and whose connections are answered RST, so many a second. Every TCP
// connection of its is probed whose client isn't told yet, in the order in which the table is read; who isn't told by the
// answer is probed again, 600 ms later and then ever more rarely, for three minutes. UDP's clients are told at their next
// packet.
//
// The backend is as the maps hold it now. Where newcomers are tried on it though it is down, they are left alone. The
// caller ends ctx when the backend is back: from the Campaign's end on nobody is probed, and whoever isn't told yet is
// forgiven.
func (t *Teller) Lost(ctx context.Context, b maps.Backend, rate uint32) *Campaign {
	return t.begin(ctx, t.Logger.With("backend", b.Name, "address", b.Address), func(r *run) error {
		r.fresh = newPace(max(rate, 1), false, r.began)
		r.again = r.fresh
		err := r.lost(&b)
		if r.progress.Closed+r.progress.Silent+r.waiting.count > 0 {
			r.log.Info("clients of a dead backend told", "told", r.progress.Told, "gone", r.progress.Closed-r.progress.Told,
				"silent", r.progress.Silent, "left", r.waiting.count, "probes", r.progress.Probes, "unsent", r.progress.Unsent)
		}
		return err
	})
}

func (r *run) lost(b *maps.Backend) error {
	for tries := 1; ; tries++ {
		// Those in hand, where an earlier look through the table came to an untimely end.
		known := r.waiting.generations()
		r.feeding = true
		err := r.walk(func(c *maps.Connection) error {
			if c.Backend != b.ID || c.Tuple.Protocol != unix.IPPROTO_TCP || c.State&maps.StateClientTold != 0 ||
				c.State.Closing() || c.State&maps.StateCondemned == 0 && b.Serves(c.Opened) {
				return nil
			}
			if _, in := known[c.Generation]; in {
				return nil
			}
			return r.feed(c, nil)
		})
		r.feeding = false
		switch {
		case r.ctx.Err() != nil:
			return r.ctx.Err()
		case err == nil:
			r.progress.Counted = true
			return r.finish()
		}
		r.say(err)
		if tries == walkTries {
			return errors.Join(err, r.finish())
		}
		again := time.Now().Add(walkAgain)
		r.wake = func() (time.Time, bool) { return again, true }
		for time.Now().Before(again) {
			if err := r.pause(); err != nil {
				return err
			}
		}
		r.wake = nil
	}
}

// feed probes a connection that a walk has found, once the pace allows. The walk may have read it long before: it is read
// again then, and probed if it still is as it should be.
func (r *run) feed(found *maps.Connection, still func(*maps.Connection) bool) error {
	for r.fresh.allowed(time.Now()) == 0 {
		if err := r.pause(); err != nil {
			return err
		}
	}
	a := r.asked(found)
	if c, living := r.look(&a); living && (still == nil || still(&c)) {
		r.fresh.spend(1)
		r.probe(a, &c)
	}
	return nil
}
