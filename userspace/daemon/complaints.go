package daemon

import (
	"context"
	"time"

	"fairlead/maps"
)

// complainEvery is how often the log says what the data plane had to refuse.
const complainEvery = 10 * time.Second

// complaint is a verdict or an event that an operator has to hear of, and what can be done.
type complaint struct{ what, advice string }

var verdictComplaints = map[maps.Verdict]complaint{
	maps.VerdictResetNoPort: {"connections refused: every source port towards their backend is in use",
		"give the service more source_addresses or source_ports"},
	maps.VerdictResetTableFull: {"connections refused: the connection table is full",
		"raise dataplane.connections"},
	maps.VerdictResetNoBackend: {"connections refused: their service has no backend that takes new ones",
		"see `fairlead status`"},
	maps.VerdictDropNoNeighbor: {"packets dropped: their backend's next hop is not known",
		"see `fairlead status` for the reason"},
	maps.VerdictDropTooBig: {"packets dropped: too long for their way, and their sender lets them be fragmented",
		"raise the MTU towards the backends, or lower it at the senders"},
	maps.VerdictDropNoHeadroom: {"packets dropped: the device leaves no room for outer headers or tags",
		"use another driver, or generic mode"},
}

var eventComplaints = map[maps.Event]complaint{
	maps.EventTableFull: {"connections not noted: the connection table is full",
		"raise dataplane.connections"},
	maps.EventInsertFailed: {"connections not noted: the kernel had no memory for them",
		"see that the host has memory to spare"},
	maps.EventPortStolen: {"half-open connections lost their source port to newer ones",
		"give the service more source_addresses or source_ports"},
}

// complain tells the log what was refused or given up since it last looked: once in a while, with how often.
func (d *daemon) complain(ctx context.Context) error {
	ticker := time.NewTicker(complainEvery)
	defer ticker.Stop()
	before, err := d.manager.Set().Counters.Totals()
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now, err := d.manager.Set().Counters.Totals()
		if err != nil {
			d.log.Error("read the counters", "err", err)
			continue
		}
		for i, c := range verdictComplaints {
			if n := now.Verdicts[i] - before.Verdicts[i]; n > 0 {
				d.log.Warn(c.what, "packets", n, "verdict", i, "advice", c.advice)
			}
		}
		for i, c := range eventComplaints {
			if n := now.Events[i] - before.Events[i]; n > 0 {
				d.log.Warn(c.what, "times", n, "event", i, "advice", c.advice)
			}
		}
		before = now
	}
}
