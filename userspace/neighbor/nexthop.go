package neighbor

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// State says what is known of the way to a destination.
type State uint8

const (
	// Resolving: asked, no answer yet.
	Resolving State = iota
	// Resolved: MAC answers for the destination or its gateway. Kept through a lost cache entry until everyone
	// was asked and nobody answers.
	Resolved
	// Failed: asked everyone on the link, nobody answers. MAC is the last one known, if there was one; asking goes on.
	Failed
	// Unreachable: no route, or the route's device is down.
	Unreachable
	// Unsuitable: there is a route, but no Ethernet frame can be sent along it by XDP.
	Unsuitable
)

func (s State) String() string {
	switch s {
	case Resolving:
		return "resolving"
	case Resolved:
		return "resolved"
	case Failed:
		return "failed"
	case Unreachable:
		return "unreachable"
	case Unsuitable:
		return "unsuitable"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// MarshalText writes the state's name, as String does.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// NextHop is how a frame for Destination leaves this host. Its slices are shared and must not be changed.
type NextHop struct {
	Destination netip.Addr

	// Interface and Index name the device that XDP sends through: where the route is over VLAN devices, the device
	// below them. A bond is named itself, not its active member: the kernel's bond driver chooses the member for every
	// frame sent by XDP (Linux 5.15 and newer), so balancing and failover stay with it.
	Interface string
	Index     int
	// RouteInterface is the device the route names: Interface, or the VLAN device above it.
	RouteInterface string
	// VLAN holds the tags (VLAN IDs, 1 to 4094) to write, outer first; VLANProtocols their EtherTypes (0x8100, 0x88a8).
	VLAN          []uint16
	VLANProtocols []uint16

	// MAC is the next hop's Ethernet address (6 bytes). Set when Resolved; when Failed, the last one known, or nil.
	MAC net.HardwareAddr
	// SourceMAC is the Ethernet address of RouteInterface (6 bytes).
	SourceMAC net.HardwareAddr

	// Source is the address the host itself would use towards Destination; zero where it has none.
	Source netip.Addr
	// Gateway is the router on the way, zero when on-link. An IPv4 destination may have an IPv6 gateway (RFC 5549).
	Gateway netip.Addr
	OnLink  bool
	// MTU is the largest IP packet for the destination, in bytes: of RouteInterface, or less where the route says so.
	MTU int

	State State
	// Reason tells a person why State isn't Resolved.
	Reason string
}

func (h NextHop) equal(o NextHop) bool {
	return h.Destination == o.Destination && h.Interface == o.Interface && h.Index == o.Index &&
		h.RouteInterface == o.RouteInterface && h.Source == o.Source && h.Gateway == o.Gateway && h.OnLink == o.OnLink &&
		h.MTU == o.MTU && h.State == o.State && h.Reason == o.Reason && slices.Equal(h.MAC, o.MAC) &&
		slices.Equal(h.SourceMAC, o.SourceMAC) && slices.Equal(h.VLAN, o.VLAN) &&
		slices.Equal(h.VLANProtocols, o.VLANProtocols)
}
