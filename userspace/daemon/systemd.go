package daemon

import (
	"context"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
)

// This file tells systemd how the daemon does, where it was started by it (sd_notify(3)); elsewhere nothing is told.

func (d *daemon) tell(state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		d.log.Warn("tell systemd", "state", state, "err", err)
	}
}

// feedWatchdog tells systemd that the daemon is alive: that what carries out changes, one at a time, comes round.
func (d *daemon) feedWatchdog(ctx context.Context) error {
	every, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		d.log.Warn("read how often systemd wants to hear of us", "err", err)
		return nil
	}
	if every == 0 {
		return nil
	}
	ticker := time.NewTicker(every / 3)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if err := d.between(ctx, func() error { return nil }); err == nil {
			d.tell(sd.SdNotifyWatchdog)
		}
	}
}
