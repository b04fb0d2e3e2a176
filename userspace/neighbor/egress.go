package neighbor

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// link is what matters of a network device.
type link struct {
	index    int
	name     string
	hardware uint16 // ARPHRD_*
	flags    uint32 // IFF_*
	mac      [6]byte
	hasMAC   bool
	mtu      int
	kind     string // of virtual devices: "vlan", "bond", "veth", …
	lower    int    // IFLA_LINK: the device below (for veth the peer)
	foreign  bool   // lower is an index in another network namespace
	vlanID   uint16
	vlanType uint16 // EtherType of the tag, host byte order
	bondMode uint8
}

// What IFLA_BOND_MODE means (include/uapi/linux/if_bonding.h).
var bondModes = map[uint8]string{3: "broadcast", 5: "balance-tlb", 6: "balance-alb"}

const maxVLANs = 2 // as many as the data plane parses

// egress is the device that frames for a route's device leave by.
type egress struct {
	device    link // XDP sends here
	route     link // what the route names
	vlan      []uint16
	vlanTypes []uint16
}

// errDown is a device that can't send now but could: the destination is unreachable, not unsuitable.
type errDown struct{ text string }

func (e errDown) Error() string { return e.text }

// resolveEgress follows VLAN devices down to the device that XDP can send through. An errDown means down or without
// carrier, any other error unsuitable for XDP; what was found is returned in either case.
func resolveEgress(links map[int]link, index int) (egress, error) {
	l, ok := links[index]
	if !ok {
		return egress{}, errDown{fmt.Sprintf("the route's device (index %d) has just gone", index)}
	}
	e := egress{device: l, route: l}
	for {
		d := e.device
		if err := sendable(d); err != nil {
			return e, err
		}
		if d.kind != "vlan" {
			return e, nil
		}
		// A lower VLAN device puts its tag on later: outside.
		e.vlan = append([]uint16{d.vlanID}, e.vlan...)
		e.vlanTypes = append([]uint16{d.vlanType}, e.vlanTypes...)
		if len(e.vlan) > maxVLANs {
			return e, fmt.Errorf("route is over %s: more than %d VLAN tags", e.route.name, maxVLANs)
		}
		if d.foreign {
			return e, fmt.Errorf("route is over VLAN device %s whose lower device is in another network namespace", d.name)
		}
		below, ok := links[d.lower]
		if !ok {
			return e, errDown{fmt.Sprintf("the device below VLAN device %s has gone", d.name)}
		}
		e.device = below
	}
}

func sendable(l link) error {
	switch {
	case l.flags&unix.IFF_LOOPBACK != 0 || l.hardware == unix.ARPHRD_LOOPBACK:
		return fmt.Errorf("route is over loopback device %s", l.name)
	case l.hardware != unix.ARPHRD_ETHER || !l.hasMAC:
		what := "a device"
		if l.kind != "" {
			what = "a " + l.kind + " device"
		}
		return fmt.Errorf("route is over %s, %s without Ethernet (a tunnel?)", l.name, what)
	}
	switch l.kind {
	case "", "veth", "vlan", "tun", "netdevsim":
		// Cards have no kind. tun with Ethernet is tap.
	case "bond":
		// bond_xdp_get_xmit_slave knows round-robin, active-backup, xor and 802.3ad only.
		if mode, bad := bondModes[l.bondMode]; bad {
			return fmt.Errorf("route is over %s: XDP can't send through a bond in mode %s, "+
				"use active-backup, balance-rr, balance-xor or 802.3ad", l.name, mode)
		}
	default:
		return fmt.Errorf("route is over %s: XDP can't send through a %s device, route over a card, bond, VLAN or veth",
			l.name, l.kind)
	}
	switch {
	case l.flags&unix.IFF_UP == 0:
		return errDown{fmt.Sprintf("%s is down", l.name)}
	case l.flags&unix.IFF_LOWER_UP == 0:
		return errDown{fmt.Sprintf("%s has no carrier (cable, switch port or peer down)", l.name)}
	}
	return nil
}

func hardwareAddr(mac [6]byte) net.HardwareAddr { return append(net.HardwareAddr(nil), mac[:]...) }
