package daemon

import (
	"context"
	"fmt"
	"time"

	"fairlead/maps"
	"fairlead/userspace/config"
	"fairlead/userspace/control"
	"fairlead/userspace/probe"
)

// This file has clients told: those of backends that are down, and those of backends that are drained at a rate.

// defaultResetRate is that of services which have left the configuration.
const defaultResetRate = 20000

// campaign is one of the Teller's, over the connections of one backend. It stays here when it has ended, so that it isn't
// begun again, until there is no more reason for it.
type campaign struct {
	reason reason
	end    context.CancelFunc
	*probe.Campaign
}

// reason is why a backend's clients are told.
type reason struct {
	lost      bool   // it is down
	downAt    uint32 // since this tick
	tried     bool   // newcomers are not lost
	rate      uint32 // a second, of those lost, and of those drained behind the deadline
	drainRate uint32
	deadline  time.Time
}

func (d *daemon) startTeller() error {
	sender, err := probe.OpenSocket()
	if err != nil {
		return fmt.Errorf("open a socket to tell clients by: %w", err)
	}
	d.socket = sender
	set := d.manager.Set()
	d.teller = probe.NewTeller(probe.Options{
		Connections: set.Connections, Keeper: d.manager, Counts: set.Control, Capacity: d.loader.Settings().Connections,
		Sender: sender, Logger: d.log,
	})
	return nil
}

// campaign begins and ends campaigns, as the state of backends asks for. They live as long as there is a reason for them,
// not as long as the command that gave it.
func (d *daemon) campaign() {
	now := make(map[uint32]bool)
	for _, b := range d.manager.Backends() {
		why, ok := d.reasonFor(&b)
		if !ok {
			continue
		}
		id := b.Backend.ID
		now[id] = true
		if c := d.campaigns[id]; c != nil {
			if c.reason == why {
				continue
			}
			c.end()
		}
		within, end := context.WithCancel(d.running)
		c := &campaign{reason: why, end: end}
		if why.lost {
			c.Campaign = d.teller.Lost(within, b.Backend, why.rate)
		} else {
			c.Campaign = d.teller.Drain(within, b.Backend, probe.DrainOptions{
				Rate: why.drainRate, Deadline: why.deadline, ResetRate: why.rate,
			})
		}
		d.campaigns[id] = c
	}
	for id, c := range d.campaigns {
		if !now[id] {
			c.end()
			delete(d.campaigns, id)
		}
	}
}

// reasonFor says whether a backend's clients are to be told, and why.
func (d *daemon) reasonFor(b *maps.ServiceBackend) (why reason, ok bool) {
	why.rate = defaultResetRate
	for i := range d.config.Services {
		if d.config.Services[i].Name == b.Service.Name {
			why.rate = d.config.Services[i].ResetRate
		}
	}
	if !b.Backend.Up {
		why.lost, why.downAt, why.tried = true, b.Backend.DownAt(), b.Backend.Tried
		policy := b.Service.OnBackendDown
		return why, policy == maps.DownReset || policy == maps.DownRehash && !b.Backend.Method.Stateless()
	}
	if d.orders == nil {
		return why, false
	}
	o := d.orders.Get(b.Service.Name, b.Backend.Name)
	why.drainRate, why.deadline = o.Rate, o.Deadline
	return why, o.Drain && (o.Rate > 0 || !o.Deadline.IsZero())
}

// pressureEvery is how often the connection table is asked how full it is, pressureRate how many young entries are asked
// a second whether they are alive.
const (
	pressureEvery = time.Second
	pressureRate  = 20000
)

func (d *daemon) followPressure(ctx context.Context) error {
	ticker := time.NewTicker(pressureEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			d.teller.Wait()
			return nil
		case <-ticker.C:
			d.teller.Pressure(ctx, pressureRate)
		}
	}
}

// Drains implements [control.Handler].
func (c commands) Drains(ctx context.Context) (list []control.Drain, err error) {
	err = c.between(ctx, func() error {
		if c.orders == nil {
			return nil
		}
		living := make(map[uint32]int)
		counted := false
		for _, b := range c.manager.Backends() {
			o := c.orders.Get(b.Service.Name, b.Backend.Name)
			if !o.Drain {
				continue
			}
			one := control.Drain{
				Service: b.Service.Name, Backend: b.Backend.Name, Rate: o.Rate, Deadline: o.Deadline, Since: o.Since, Left: -1,
			}
			if running := c.campaigns[b.Backend.ID]; running != nil {
				p := running.Progress()
				one.Living, one.Closing, one.Closed, one.Left = p.Living, p.Closing, p.Closed, p.Left
			}
			if running := c.campaigns[b.Backend.ID]; running == nil || !running.Progress().Counted {
				if !counted {
					if err := c.manager.Set().Connections.Walk(func(conn *maps.Connection) error {
						living[conn.Backend]++
						return nil
					}); err != nil {
						return err
					}
					counted = true
				}
				one.Living = living[b.Backend.ID]
			}
			list = append(list, one)
		}
		return nil
	})
	return list, err
}

// closeTime is how long a command waits for the ends of a connection to be told.
const closeTime = 3 * time.Second

// closeOne ends a connection. It goes on when the command has ended.
func (d *daemon) closeOne(ctx context.Context, conn maps.Connection) (string, error) {
	var c *probe.Campaign
	if err := d.between(ctx, func() error {
		c = d.teller.One(d.running, conn)
		return nil
	}); err != nil {
		return "", err
	}
	d.log.Info("by command: connection closed", "client", conn.Tuple.Source, "service", conn.Tuple.Destination)
	client := conn.Tuple.Source
	if conn.Tuple.Protocol != config.ProtocolTCP.Number() {
		return fmt.Sprintf("%v: closed: its client is told when it next sends", client), nil
	}
	select {
	case <-c.Done():
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(closeTime):
		return fmt.Sprintf("%v: closed: its client has not answered yet, and is asked on for some minutes", client), nil
	}
	if p := c.Progress(); p.Told > 0 {
		return fmt.Sprintf("%v: closed, both ends told", client), nil
	}
	return fmt.Sprintf("%v: had ended by itself", client), nil
}

var _ control.Handler = commands{}
