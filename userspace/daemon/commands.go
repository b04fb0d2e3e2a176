package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"fairlead/userspace/control"
	"fairlead/userspace/orders"
)

// This file carries out commands. What changes something is done where reloads are, one at a time.

// call is something to do between two other things.
type call struct {
	do   func() error
	done chan error
}

// between does something where nothing else changes meanwhile.
func (d *daemon) between(ctx context.Context, do func() error) error {
	c := call{do, make(chan error, 1)}
	select {
	case d.calls <- c:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// listen opens the socket for commands. A daemon without it forwards all the same.
func (d *daemon) listen() net.Listener {
	l, err := control.Listen(d.config.Control.Socket)
	if err != nil {
		d.log.Error("take commands: none can be given but signals", "err", err)
		return nil
	}
	return l
}

// openOrders reads what was set by command. Without, forwarding goes on as configured.
func (d *daemon) openOrders() {
	store, warnings, err := orders.Open(d.config.StateDir)
	for _, w := range warnings {
		d.log.Warn(w)
	}
	if err != nil {
		d.log.Error("read what was set by command: drains and weights are as configured, and none can be set", "err", err)
		return
	}
	d.orders = store
}

// commands is the daemon as commands see it.
type commands struct{ *daemon }

// Reload implements [control.Handler].
func (c commands) Reload(ctx context.Context) (changes []string, err error) {
	err = c.between(ctx, func() error {
		changes, err = c.reload(ctx)
		return err
	})
	if err != nil {
		c.log.Error("reload refused: nothing is changed", "err", err)
	}
	return changes, err
}

// find is the backend that a word means: of the configuration, or leaving.
func (d *daemon) find(word string) (orders.Name, error) {
	var all []orders.Name
	for i := range d.config.Services {
		s := &d.config.Services[i]
		for _, b := range s.Backends {
			all = append(all, orders.Name{Service: s.Name, Backend: b.Name})
		}
	}
	for _, b := range d.manager.Backends() {
		all = append(all, orders.Name{Service: b.Service.Name, Backend: b.Backend.Name})
	}
	return orders.Find(word, all)
}

// order changes what is set of a backend, on disk first: what is told to have been done outlives us.
func (d *daemon) order(ctx context.Context, word string, change func(o *orders.Order) (said string)) error {
	return d.between(ctx, func() error {
		name, err := d.find(word)
		if err != nil {
			return err
		}
		if d.orders == nil {
			return fmt.Errorf("backend %s: nothing can be set by command: %s could not be read at start: see the log, mend it "+
				"and restart the daemon", name, d.config.StateDir)
		}
		before := d.orders.Get(name.Service, name.Backend)
		o := before
		said := change(&o)
		if err := d.orders.Set(name.Service, name.Backend, o); err != nil {
			return err
		}
		if err := d.refresh(); err != nil {
			back := d.orders.Set(name.Service, name.Backend, before)
			return errors.Join(err, back, d.refresh())
		}
		d.log.Info("by command: "+said, "backend", name.String())
		return nil
	})
}

// Drain implements [control.Handler].
func (c commands) Drain(ctx context.Context, r control.DrainRequest) error {
	return c.order(ctx, r.Backend, func(o *orders.Order) string {
		now := time.Now()
		since := now
		if o.Drain {
			since = o.Since
		}
		o.Drain, o.Rate, o.Deadline, o.Since = true, r.Rate, time.Time{}, since
		said := "no new connections"
		if r.Rate > 0 {
			said += fmt.Sprintf(", living ones end at %d a second", r.Rate)
		}
		if r.Deadline > 0 {
			o.Deadline = now.Add(r.Deadline)
			said += fmt.Sprintf(", all by %s", o.Deadline.Format(time.RFC3339))
		}
		return said
	})
}

// Resume implements [control.Handler].
func (c commands) Resume(ctx context.Context, backend string) error {
	return c.order(ctx, backend, func(o *orders.Order) string {
		o.Drain, o.Rate, o.Deadline = false, 0, time.Time{}
		return "its drain is over"
	})
}

// Weight implements [control.Handler].
func (c commands) Weight(ctx context.Context, backend string, weight *uint32) error {
	return c.order(ctx, backend, func(o *orders.Order) string {
		o.Weight = weight
		if !o.Drain {
			o.Since = time.Now()
		}
		if weight == nil {
			return "weight as configured"
		}
		return fmt.Sprintf("weight %d", *weight)
	})
}

// Close implements [control.Handler].
func (c commands) Close(ctx context.Context, r control.CloseRequest) (string, error) {
	inv, err := c.manager.Set().Inventory()
	if err != nil {
		return "", err
	}
	conn, err := r.Find(c.manager.Set(), inv)
	if err != nil {
		return "", err
	}
	return c.closeOne(ctx, conn)
}
