package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"fairlead/userspace/control"
	"fairlead/userspace/orders"
)

var errNoDrain = errors.New("it does not drain any more: it was resumed, or has left the configuration")

// drainWatch shows how far a drain has come, until no connection is left.
type drainWatch struct {
	daemon   control.Handler
	name     string // as it was given to the daemon
	out      io.Writer
	terminal bool          // one line, rewritten; else a line now and then
	ask, say time.Duration // how often

	began, said time.Time
	most        int // connections that there were at the beginning
}

// run answers nil when no connection is left, and an error that says what becomes of the drain when ctx ends first.
func (w *drainWatch) run(ctx context.Context) error {
	ticker := time.NewTicker(w.ask)
	defer ticker.Stop()
	if w.terminal {
		defer func() { fmt.Fprintln(w.out) }()
	}
	for {
		d, err := w.progress(ctx)
		switch {
		case ctx.Err() != nil:
			return w.interrupted()
		case errors.Is(err, errNoDrain):
			return err
		case err != nil:
			return fmt.Errorf("watch the drain, which stays ordered: %w", err)
		}
		w.show(d, time.Now())
		if d.Living == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return w.interrupted()
		case <-ticker.C:
		}
	}
}

func (w *drainWatch) interrupted() error {
	return fmt.Errorf("interrupted: the drain of %s goes on: `fairlead backends resume %[1]s` takes it back", w.name)
}

// progress is that of the drain which is watched.
func (w *drainWatch) progress(ctx context.Context) (control.Drain, error) {
	drains, err := w.daemon.Drains(ctx)
	if err != nil {
		return control.Drain{}, err
	}
	var names []orders.Name
	for _, d := range drains {
		names = append(names, orders.Name{Service: d.Service, Backend: d.Backend})
	}
	name, err := orders.Find(w.name, names)
	if err != nil {
		return control.Drain{}, fmt.Errorf("%s: %w", w.name, errNoDrain)
	}
	for i, n := range names {
		if n == name {
			w.name = name.String()
			return drains[i], nil
		}
	}
	panic("a name that was found is among those it was looked for in")
}

// show prints a line, or rewrites it. The last is always printed.
func (w *drainWatch) show(d control.Drain, now time.Time) {
	if w.began.IsZero() {
		w.began, w.most = now, d.Living
	}
	w.most = max(w.most, d.Living)
	text := w.text(d, now)
	switch {
	case w.terminal:
		fmt.Fprintf(w.out, "\r%s\x1b[K", text)
	case w.said.IsZero(), d.Living == 0, now.Sub(w.said) >= w.say:
		w.said = now
		fmt.Fprintln(w.out, text)
	}
}

func (w *drainWatch) text(d control.Drain, now time.Time) string {
	if d.Living == 0 {
		return fmt.Sprintf("%s: no connection is left, %s", w.name, closedText(d))
	}
	facts := []string{fmt.Sprintf("%s left", plural(d.Living, "connection"))}
	if d.Closing > 0 {
		facts = append(facts, fmt.Sprintf("%d of them told to end", d.Closing))
	}
	facts = append(facts, closedText(d))
	rate := ""
	if d.Rate != 0 {
		rate = fmt.Sprintf("%d/s ordered", d.Rate)
	}
	if ended, watched := w.most-d.Living, now.Sub(w.began).Seconds(); ended > 0 && watched > 0 {
		rate = strings.TrimSuffix(fmt.Sprintf("%s/s seen, %s", perSecond(float64(ended)/watched), rate), ", ")
	}
	if rate != "" {
		facts = append(facts, rate)
	}
	if d.Left >= 0 {
		facts = append(facts, "about "+span(d.Left)+" to go")
	} else {
		facts = append(facts, "time to go not known")
	}
	if !d.Deadline.IsZero() {
		facts = append(facts, "deadline in "+span(d.Deadline.Sub(now)))
	}
	return w.name + ": " + strings.Join(facts, ", ")
}

func closedText(d control.Drain) string { return fmt.Sprintf("%d closed", d.Closed) }
