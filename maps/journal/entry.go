package journal

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Tuple is what tells connections apart: client, service address, protocol.
type Tuple struct {
	Source, Destination netip.AddrPort
	Protocol            uint8
}

// String is the tuple as commands take it.
func (t Tuple) String() string {
	protocol := fmt.Sprint(t.Protocol)
	switch t.Protocol {
	case 6:
		protocol = "tcp"
	case 17:
		protocol = "udp"
	}
	return fmt.Sprintf("%s %v -> %v", protocol, t.Source, t.Destination)
}

// Backend is whom a connection is pinned to, by what outlives numbers of maps: its name, its address, its method.
type Backend struct {
	Name    string
	Address netip.AddrPort
	Method  string
}

// Hop is where the client's packets come from. The device goes by name: its number may be another after a reboot.
type Hop struct {
	Interface      string
	MAC, SourceMAC [6]byte
	VLAN           [2]uint16
}

// Entry is one connection.
type Entry struct {
	Tuple      Tuple
	Service    string
	Backend    Backend
	Generation uint32         // tells it from an earlier connection of the same tuple
	State      uint32         // bits that mean nothing here
	SourceAddr netip.AddrPort // fullnat: the source towards the backend; else zero
	// Opened and Seen are by the wall clock, kept to the millisecond. What Load gives is by the clock of its reader and
	// never ahead of it, so that an age is the difference to now, whatever the clock did in between: see Load.
	Opened, Seen time.Time

	SequenceEnd, Acknowledgement uint32
	Timestamp, TimestampEcho     uint32
	Hop                          Hop
}

// Kind is what happened to a connection.
type Kind uint8

// The kinds of events.
const (
	Opened  Kind = iota + 1 // it is there from now on; an earlier one of the same tuple is not
	Updated                 // its state, time of last packet, numbers or hop are others; all else stays as Opened told it
	Closed                  // it is gone; of the entry, only tuple and generation count
)

// String is the word for a kind.
func (k Kind) String() string {
	switch k {
	case Opened:
		return "opened"
	case Updated:
		return "updated"
	case Closed:
		return "closed"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Event is something that happened to a connection.
type Event struct {
	Kind  Kind
	Entry Entry
}

// maxName is the most bytes that a name of a service, backend, method or device may have.
const maxName = 255

var (
	errAddress = errors.New("an address that is missing or has a zone")
	errName    = fmt.Errorf("a name that is missing or longer than %d bytes", maxName)
	errKind    = errors.New("an unknown kind of event")
)

func plain(a netip.AddrPort) bool { return a.Addr().IsValid() && a.Addr().Zone() == "" }

// check says why an entry can't be kept.
func (e *Entry) check() error {
	if err := e.Tuple.check(); err != nil {
		return err
	}
	if !plain(e.Backend.Address) || e.SourceAddr != (netip.AddrPort{}) && !plain(e.SourceAddr) {
		return errAddress
	}
	if e.Service == "" || e.Backend.Name == "" {
		return errName
	}
	if max(len(e.Service), len(e.Backend.Name), len(e.Backend.Method), len(e.Hop.Interface)) > maxName {
		return errName
	}
	return nil
}

func (t *Tuple) check() error {
	if !plain(t.Source) || !plain(t.Destination) {
		return errAddress
	}
	return nil
}
