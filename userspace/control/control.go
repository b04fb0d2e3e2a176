// Package control is how commands speak to the daemon: HTTP with JSON bodies over a unix socket that root, and the
// socket's group, may open. A [Client] has the methods of the [Handler] at the other end, and gives its errors as they are
// told there.
//
// Only what changes something, or is nowhere but in the daemon, goes this way; the rest is read from the pinned maps.
package control

import (
	"context"
	"fmt"
	"net/netip"
	"time"
)

// What a request may ask for.
const (
	MaxRate   = 1_000_000 // connections a second
	MaxWeight = 1000      // as in the configuration
)

// Handler carries out what is asked. Its methods may be called by several goroutines at once; ctx ends when the asker
// goes away, or the daemon stops.
type Handler interface {
	// Reload reads the configuration again and makes it take effect, whole or not at all. It answers what changed.
	Reload(ctx context.Context) (changes []string, err error)
	// Drain gives a backend no new connections, and tells living ones to end as the request says.
	Drain(ctx context.Context, r DrainRequest) error
	// Resume takes a drain back. Backend is as in DrainRequest.
	Resume(ctx context.Context, backend string) error
	// Weight sets a backend's weight, until it is set to nil: as configured.
	Weight(ctx context.Context, backend string, weight *uint32) error
	// Drains tells how far each drain has come.
	Drains(ctx context.Context) ([]Drain, error)
	// Close ends one connection and answers, in a line, what was done.
	Close(ctx context.Context, r CloseRequest) (string, error)
}

// DrainRequest asks that a backend be drained.
type DrainRequest struct {
	Backend  string        `json:"backend"`               // its name, or service/backend where several services have one
	Rate     uint32        `json:"rate,omitempty"`        // living connections told to end a second; 0: they are left
	Deadline time.Duration `json:"deadline_ns,omitempty"` // from now, when what is left is told to end; 0: never
}

func (r DrainRequest) check() error {
	switch {
	case r.Rate > MaxRate:
		return fmt.Errorf("drain %s: a rate of %d connections a second: the most is %d", r.Backend, r.Rate, MaxRate)
	case r.Deadline < 0:
		return fmt.Errorf("drain %s: a deadline of %v is over already", r.Backend, r.Deadline)
	}
	return checkBackend("drain", r.Backend)
}

// Drain is how far a drain has come.
type Drain struct {
	Service  string        `json:"service"`
	Backend  string        `json:"backend"`
	Rate     uint32        `json:"rate"`              // a second; 0: living connections are left
	Deadline time.Time     `json:"deadline,omitzero"` // zero: none
	Since    time.Time     `json:"since,omitzero"`
	Living   int           `json:"living"`  // connections that are left
	Closing  int           `json:"closing"` // of them, told to end and not yet gone
	Closed   int           `json:"closed"`  // so far
	Left     time.Duration `json:"left_ns"` // estimate of the time to the end; negative: not known
}

// CloseRequest asks that one connection be ended.
type CloseRequest struct {
	Client  netip.AddrPort `json:"client"`
	Service string         `json:"service,omitempty"` // name or address:port; empty: whichever has a connection of this client
}

func (r CloseRequest) check() error {
	if !r.Client.IsValid() || r.Client.Port() == 0 {
		return fmt.Errorf("close a connection: the client's address and port are missing")
	}
	return nil
}

// resumeRequest and weightRequest are the arguments of Resume and Weight.
type resumeRequest struct {
	Backend string `json:"backend"`
}

func (r resumeRequest) check() error { return checkBackend("resume", r.Backend) }

type weightRequest struct {
	Backend string  `json:"backend"`
	Weight  *uint32 `json:"weight"` // null: as configured
}

func (r weightRequest) check() error {
	if r.Weight != nil && *r.Weight > MaxWeight {
		return fmt.Errorf("set the weight of %s to %d: the most is %d", r.Backend, *r.Weight, MaxWeight)
	}
	return checkBackend("set a weight", r.Backend)
}

// nothing is the request of what takes no arguments.
type nothing struct{}

func (nothing) check() error { return nil }

func checkBackend(what, name string) error {
	if name == "" {
		return fmt.Errorf("%s: which backend? Its name is missing", what)
	}
	return nil
}

// Where requests go. The first part is the protocol's version.
const (
	pathReload = "/v1/reload"
	pathDrain  = "/v1/drain"
	pathResume = "/v1/resume"
	pathWeight = "/v1/weight"
	pathDrains = "/v1/drains"
	pathClose  = "/v1/close"
)

const (
	typeJSON = "application/json"
	typeText = "text/plain; charset=utf-8"
)
