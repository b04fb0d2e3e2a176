package announce

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Status is how it stands with an address on an interface.
type Status uint8

const (
	// Waiting: not asked now. The interface is down or missing, or another host has the address on another interface.
	Waiting Status = iota
	// Probing: the segment is being asked.
	Probing
	// Owned: ours, answered for and announced.
	Owned
	// Conflict: another host has it. Asked again later.
	Conflict
	// Host: the host's own stack has it; it is not for XDP to own.
	Host
)

func (s Status) String() string {
	switch s {
	case Waiting:
		return "waiting"
	case Probing:
		return "probing"
	case Owned:
		return "owned"
	case Conflict:
		return "conflict"
	case Host:
		return "host"
	}
	return fmt.Sprintf("status %d", uint8(s))
}

// MarshalText writes the status's name, as String does.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// State is how it stands with a wanted address on one interface. An address is owned on all interfaces or on none; one
// that comes up when the address is owned already may be in Conflict all the same.
type State struct {
	Address   netip.Addr
	Interface string // when Host: the one that has it
	Status    Status
	// Other is the Ethernet address of a host that has the address: when Conflict, or when Owned and contested.
	Other net.HardwareAddr
	// Reason tells a person why it is so, unless that goes without saying.
	Reason string
	Since  time.Time // of Status and Other
}

// publish makes states visible.
func (a *Announcer) publish(t *table) {
	states := t.states()
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	type key struct {
		address netip.Addr
		name    string
	}
	before := make(map[key]State, len(a.states))
	for _, s := range a.states {
		before[key{s.Address, s.Interface}] = s
	}
	for i := range states {
		s := &states[i]
		s.Since = now
		if was, ok := before[key{s.Address, s.Interface}]; ok && was.Status == s.Status && slices.Equal(was.Other, s.Other) {
			s.Since = was.Since
		}
	}
	a.states = states
}

// states tells of every claim on every interface, in order.
func (t *table) states() (states []State) {
	for _, c := range t.claims {
		if c.holder != "" {
			states = append(states, State{Address: c.address, Interface: c.holder, Status: Host,
				Reason: c.holder + " of this host has the address"})
			continue
		}
		if len(c.ports) == 0 {
			s := State{Address: c.address, Interface: c.address.Zone(), Status: Waiting,
				Reason: "there is no interface to own it on"}
			if c.owned {
				s.Status, s.Reason = Owned, ""
			}
			states = append(states, s)
		}
		for _, p := range c.ports {
			states = append(states, p.state())
		}
	}
	slices.SortFunc(states, func(a, b State) int {
		if order := a.Address.Compare(b.Address); order != 0 {
			return order
		}
		return strings.Compare(a.Interface, b.Interface)
	})
	return states
}

func (p *port) state() State {
	c := p.claim
	s := State{Address: c.address, Interface: p.name}
	if p.hasOther {
		s.Other = p.other.hardware()
	}
	down := ""
	switch {
	case !p.there:
		down = "there is no interface " + p.name
	case p.link.silent:
	case p.link.flags&unix.IFF_UP == 0:
		down = p.name + " is down"
	case !p.link.usable():
		down = p.name + " has no carrier"
	}
	switch {
	case c.owned && (p.clear || p.there && p.link.silent):
		s.Status = Owned
		switch {
		case p.hasOther:
			s.Reason = p.other.String() + " uses it as well: it is defended"
		case down != "":
			s.Reason = down + ": announced when it comes back"
		}
	case down != "":
		s.Status, s.Reason = Waiting, down
	case p.hasOther && c.collided:
		s.Status, s.Reason = Probing, p.other.String()+" asks for it at the same time: asked again in a moment"
	case p.hasOther:
		s.Status, s.Reason = Conflict, p.other.String()+" has it"
	case p.probing, c.collided, !p.retry.IsZero():
		s.Status = Probing
	default:
		s.Status, s.Reason = Waiting, "it waits for the other interfaces"
		for _, o := range c.ports {
			if o.hasOther {
				s.Reason = fmt.Sprintf("%s on %s has it", o.other, o.name)
			}
		}
	}
	if p.failed != "" && s.Reason == "" {
		s.Reason = "can't send by " + p.name + ": " + p.failed
	}
	return s
}
