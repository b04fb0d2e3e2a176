package main

import (
	"cmp"
	"fmt"
	"time"

	"fairlead/maps"
)

// The words for a backend's state, and for a service's.
const (
	stateUp          = "up"
	stateDown        = "down"
	stateHeld        = "held" // down, and held there as it has flapped
	stateUnknown     = "unknown"
	stateDraining    = "draining"
	stateDisabled    = "disabled"
	stateLeaving     = "leaving"
	stateNoNeighbour = "no neighbour"

	stateNoBackend = "no backend"
	statePanic     = "panic"
	stateAllDown   = "all down"
)

// condition is how a backend stands: what its checks say, and what was ordered of it.
type condition struct {
	State      string   `json:"state"`
	Tried      bool     `json:"tried"` // down, and newcomers are tried on it, as all are
	Reason     string   `json:"reason,omitempty"`
	Weight     uint32   `json:"weight"` // as configured, or by command
	Configured uint32   `json:"configured_weight"`
	Percent    uint32   `json:"weight_percent"` // how much of its weight it has in the ring
	Orders     []string `json:"orders"`
	Health     string   `json:"health"`               // what its checks say: none where it has none
	Since      *float64 `json:"health_since_seconds"` // for so long
	Failure    string   `json:"last_failure,omitempty"`
	FailedAgo  *float64 `json:"last_failure_seconds"` // ago

	orders            maps.Orders
	since, failedSpan time.Duration
}

func conditionOf(b *maps.Backend, now uint32) condition {
	shown := &b.Shown
	c := condition{
		Tried: b.Tried, Weight: b.Weight, Configured: shown.Configured, Percent: shown.Percent,
		Orders: append([]string{}, shown.Orders.Names()...), Health: shown.Health.String(), Failure: shown.Failure, orders: shown.Orders,
	}
	c.State, c.Reason = backendState(b)
	if shown.Health != maps.HealthNone && shown.Since != 0 {
		c.since = maps.Age(now, shown.Since)
		ago := seconds(c.since)
		c.Since = &ago
	}
	if shown.FailedAt != 0 {
		c.failedSpan = maps.Age(now, shown.FailedAt)
		ago := seconds(c.failedSpan)
		c.FailedAgo = &ago
	}
	return c
}

// backendState is what hinders a backend most: without a next hop not even its old connections go on.
func backendState(b *maps.Backend) (state, reason string) {
	orders := b.Shown.Orders
	switch {
	case !b.NextHop.Known:
		return stateNoNeighbour, cmp.Or(b.NextHop.Reason, "not resolved yet")
	case b.Leaving:
		return stateLeaving, ""
	case orders&maps.OrderDisabled != 0:
		return stateDisabled, ""
	case !b.Up:
		return downState(b)
	case orders&maps.OrderDrain != 0:
		return stateDraining, "by command"
	case orders&maps.OrderCheckMaint != 0:
		return stateDraining, "maintenance, by its check's answer"
	case orders&maps.OrderCheckDrain != 0:
		return stateDraining, "by its check's answer"
	case b.Weight == 0 && orders&maps.OrderWeight != 0:
		return stateDraining, "weight 0 by command"
	case b.Weight == 0:
		return stateDraining, ""
	}
	switch b.Shown.Health {
	case maps.HealthUnknown:
		return stateUp, "not checked yet"
	case maps.HealthDown, maps.HealthHeld:
		return stateUp, "though its checks say down"
	}
	return stateUp, ""
}

func downState(b *maps.Backend) (state, reason string) {
	switch b.Shown.Health {
	case maps.HealthHeld:
		state, reason = stateHeld, "down, as it went up and down too often"
	case maps.HealthUnknown:
		state, reason = stateUnknown, "not checked yet"
	default:
		state = stateDown
	}
	switch {
	case b.Tried:
		return state, "all are down"
	case b.Shown.Orders&maps.OrderDrain != 0:
		return state, "and draining, by command"
	}
	return state, reason
}

// stateText is state and reason in one, as in "down, tried: all are down".
func (c *condition) stateText() string {
	text := c.State
	if c.Tried {
		text += ", tried"
	}
	if c.Reason != "" {
		text += ": " + c.Reason
	}
	return text
}

// weightText is the weight, and what makes it another than the configured, or less than it is.
func (c *condition) weightText() string {
	text := fmt.Sprint(c.Weight)
	if c.orders&maps.OrderWeight != 0 {
		text += fmt.Sprintf(" (configured %d)", c.Configured)
	}
	switch {
	case c.orders&maps.OrderSlowStart != 0:
		text += fmt.Sprintf(", %d %% of it yet", c.Percent)
	case c.orders&maps.OrderCheckWeight != 0:
		text += fmt.Sprintf(", %d %% of it by its check", c.Percent)
	}
	return text
}

func (c *condition) sinceText() string {
	if c.Since == nil {
		return "-"
	}
	return span(c.since)
}

func (c *condition) failureText() string {
	if c.FailedAgo == nil {
		return "-"
	}
	return fmt.Sprintf("%s, %s ago", cmp.Or(c.Failure, "no reason known"), span(c.failedSpan))
}

// serviceState is what hinders a service most. Held are its slots, by backend.
func serviceState(s *maps.Service, backends []backendStatus, hasBackend bool) (state, reason string) {
	switch {
	case s.Leaving:
		return stateLeaving, ""
	case s.Standing&maps.StandingPanic != 0:
		return statePanic, "checks' verdict is off"
	case s.Standing&maps.StandingAllDown != 0:
		for i := range backends {
			if backends[i].Tried {
				return stateAllDown, "trying all"
			}
		}
		return stateAllDown, "new connections are answered RST"
	case !hasBackend:
		return stateNoBackend, ""
	}
	return stateUp, ""
}
