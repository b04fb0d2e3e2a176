package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"

	"fairlead/maps"
	"fairlead/maps/journal"
)

// This file keeps the connection table on disk, and restores it where the kernel holds none: after a reboot.

const (
	// drainEvery is how often the data plane's events are read: with the disk's own interval, what a power cut may take.
	drainEvery = 50 * time.Millisecond
	// closeJournal is how long a stop waits for the disk.
	closeJournal = 5 * time.Second
)

// openJournal begins to keep the connection table on disk. Without, forwarding goes on all the same, and is said to. A
// command may hold it for a moment.
func (d *daemon) openJournal() {
	var j *journal.Journal
	var err error
	for deadline := time.Now().Add(closeJournal); ; time.Sleep(100 * time.Millisecond) {
		j, err = journal.Open(d.config.StateDir, journal.Options{Logger: d.log})
		if !errors.Is(err, journal.ErrLocked) || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		d.log.Error("keep connections on disk: a reboot will end them", "err", err)
		return
	}
	d.journal = j
}

// saved reads what is on disk, one connection after the other. It answers what was read, in words.
func (d *daemon) saved(visit func(*maps.Saved) error) (string, error) {
	indexes := make(map[string]uint32)
	report, err := journal.Load(d.config.StateDir, journal.LoadOptions{}, func(e *journal.Entry) error {
		method, ok := methodNames[e.Backend.Method]
		if !ok {
			return nil // of a later version, which Load would have refused
		}
		now := time.Now()
		index, known := indexes[e.Hop.Interface]
		if !known && e.Hop.Interface != "" {
			if link, err := netlink.LinkByName(e.Hop.Interface); err == nil {
				index = uint32(link.Attrs().Index)
			}
			indexes[e.Hop.Interface] = index
		}
		return visit(&maps.Saved{
			Tuple: maps.Tuple(e.Tuple),
			Backend: maps.SavedBackend{
				Name: e.Backend.Name, Address: e.Backend.Address.Addr(), Port: e.Backend.Address.Port(), Method: method,
			},
			Source: e.SourceAddr, State: maps.State(e.State), Opened: now.Sub(e.Opened), Seen: now.Sub(e.Seen),
			SequenceEnd: e.SequenceEnd, Acknowledgement: e.Acknowledgement,
			Timestamp: e.Timestamp, TimestampEcho: e.TimestampEcho,
			Hop: maps.Hop{MAC: e.Hop.MAC, SourceMAC: e.Hop.SourceMAC, Interface: index, VLAN: e.Hop.VLAN},
		})
	})
	return report.String(), err
}

var methodNames = func() map[string]maps.Method {
	names := make(map[string]maps.Method)
	for _, m := range methods {
		names[m.String()] = m
	}
	return names
}()

// reserve is the first of the two readings of what is on disk: source ports that are in use are kept from newcomers.
func (d *daemon) reserve() {
	if d.journal == nil {
		return
	}
	report, err := d.saved(func(c *maps.Saved) error {
		d.manager.Reserve(c)
		return nil
	})
	if err != nil {
		d.log.Error("read the connections kept on disk", "err", err)
	}
	d.log.Info("connections kept on disk: " + report)
}

// restoreConnections is the second: they are put into the tables, before any packet asks.
func (d *daemon) restoreConnections(ctx context.Context) error {
	if d.journal == nil {
		return nil
	}
	began := time.Now()
	restored, err := d.manager.Restore(func(yield func(*maps.Saved) error) error {
		_, err := d.saved(yield)
		return err
	}, d.nextHop)
	if err != nil {
		return fmt.Errorf("restore connections: %w", err)
	}
	for why, n := range restored.Lost {
		d.log.Warn("connections are not restored", "connections", n, "reason", why)
	}
	if restored.Connections == 0 {
		return nil
	}
	d.log.Info("connections restored", "connections", restored.Connections, "of_leaving_backends", restored.Leaving,
		"took", time.Since(began).Round(time.Millisecond))
	if restored.Leaving == 0 {
		return nil
	}
	// Backends that left the configuration while nobody ran: their connections go on.
	list := d.destinationsInUse()
	d.watcher.SetDestinations(list)
	moved := d.drain(ctx, d.resolved(ctx, list), nextHopsTime)
	hops := make(map[netip.Addr]maps.NextHop)
	for _, a := range list {
		hops[a] = d.nextHop(a)
	}
	for _, h := range moved {
		hops[h.Destination] = mapsNextHop(h)
	}
	_, err = d.manager.SetNextHops(hops)
	return err
}

// keepJournal brings what becomes of connections to disk, until ctx ends.
func (d *daemon) keepJournal(ctx context.Context) (err error) {
	if d.journal == nil {
		return nil
	}
	events, err := d.manager.Set().Events()
	if err != nil {
		return err
	}
	defer events.Close()
	k := &keeper{daemon: d}
	ticker := time.NewTicker(drainEvery)
	defer ticker.Stop()
	lost, err := d.journalLost()
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return errors.Join(k.drain(events), d.closeJournal())
		case <-ticker.C:
		}
		if err := k.drain(events); err != nil {
			d.log.Error("keep connections on disk", "err", err)
		}
		if now, err := d.journalLost(); err == nil && now != lost {
			d.log.Warn("events of connections were lost: they are read from the table instead", "events", now-lost)
			d.journal.Missed(now - lost)
			lost = now
		}
	}
}

func (d *daemon) journalLost() (uint64, error) {
	totals, err := d.manager.Set().Counters.Totals()
	if err != nil {
		return 0, err
	}
	return totals.Events[maps.EventJournalLost], nil
}

func (d *daemon) closeJournal() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeJournal)
	defer cancel()
	if err := d.journal.Close(ctx); err != nil {
		return fmt.Errorf("keep connections on disk: the last of them: %w", err)
	}
	return nil
}

// takeSnapshots writes the whole table whenever the journal wants it: the first at once, for what came while nobody ran.
func (d *daemon) takeSnapshots(ctx context.Context) error {
	if d.journal == nil {
		return nil
	}
	k := &keeper{daemon: d}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.journal.Wanted():
		}
		k.learn()
		err := d.journal.Snapshot(ctx, func(yield func(*journal.Entry) error) error {
			_, err := k.names.walk(d.manager.Set(), yield)
			return err
		})
		if err != nil && ctx.Err() == nil {
			d.log.Error("write a snapshot of the connections: it is tried again", "err", err)
		}
	}
}

// keeper turns connections of the maps into those on disk: numbers become names.
type keeper struct {
	*daemon
	names    names
	learned  bool
	revision uint64 // of the map manager: when they were learned
	devices  time.Time
	events   []maps.ConnectionEvent
	batch    []journal.Event
}

// learn reads what the numbers mean now.
func (k *keeper) learn() {
	k.revision = k.manager.Revision()
	k.names, k.learned, k.devices = namesOf(k.manager.Backends(), k.manager.SourceAddresses()), true, time.Now()
}

// drain brings what has happened since to the journal. What numbers mean is looked up behind the reading: whoever gave one
// out for an event that was read had said so before. A number is given out anew long after its last event.
func (k *keeper) drain(events *maps.Events) error {
	for {
		k.events = k.events[:0]
		n, err := events.Drain(journalBatch, func(event *maps.ConnectionEvent) { k.events = append(k.events, *event) })
		k.take()
		if err != nil || n < journalBatch {
			return err
		}
	}
}

func (k *keeper) take() {
	now, at := maps.Now(), time.Now()
	if !k.learned || k.revision != k.manager.Revision() || at.Sub(k.devices) > time.Minute {
		k.learn()
	}
	k.batch = k.batch[:0]
	for i := range k.events {
		var e journal.Event
		c := &k.events[i].Connection
		switch k.events[i].Kind {
		case maps.ConnectionClosed:
			e.Kind = journal.Closed
			e.Entry.Tuple, e.Entry.Generation = journal.Tuple(c.Tuple), c.Generation
		case maps.ConnectionOpened, maps.ConnectionChanged:
			e.Kind = journal.Opened
			if k.events[i].Kind == maps.ConnectionChanged {
				e.Kind = journal.Updated
			}
			if !k.names.entry(&e.Entry, c, now, at) {
				continue // of a backend that is gone
			}
		}
		k.batch = append(k.batch, e)
	}
	k.journal.Add(k.batch)
}

const journalBatch = 16384
