package through

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// unusableAddress are the flags of addresses that are not, or no longer, to be the source of a new connection.
const unusableAddress = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED

// source chooses the address that a connection comes from: of the service's family, as the host's own towards the backend,
// else one of the device that leads there, else any of the host's.
func (s *Stack) source(d *Destination) (netip.Addr, error) {
	service := d.Service.Addr()
	fits := func(a netip.Addr) bool {
		return a.IsValid() && a.Is4() == service.Is4() && !a.IsLoopback() && !a.IsMulticast() && !a.IsUnspecified() &&
			a.IsLinkLocalUnicast() == service.IsLinkLocalUnicast() && a != service.WithZone("") && !s.avoid(a)
	}
	if a := d.Source.Unmap().WithZone(""); fits(a) {
		return a, nil
	}
	family, name := netlink.FAMILY_V6, "IPv6"
	if service.Is4() {
		family, name = netlink.FAMILY_V4, "IPv4"
	}
	list, err := s.routes.AddrList(nil, family)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list the host's addresses: %w", err)
	}
	var elsewhere netip.Addr
	for _, entry := range list {
		a, ok := netip.AddrFromSlice(entry.IP)
		if a = a.Unmap(); !ok || !fits(a) || entry.Flags&unusableAddress != 0 {
			continue
		}
		if s.leadsBy(entry.LinkIndex, d) {
			return a, nil
		}
		if !elsewhere.IsValid() {
			elsewhere = a
		}
	}
	if elsewhere.IsValid() {
		return elsewhere, nil
	}
	return netip.Addr{}, fmt.Errorf("the host has no %s address that %v could answer: a check through %v needs one",
		name, d.Backend, d.Method)
}

// leadsBy says whether a device is the one that frames to the backend leave by, or a VLAN device above it.
func (s *Stack) leadsBy(index int, d *Destination) bool {
	for range len(d.Hop.VLAN) {
		if index == int(d.Hop.Interface) || d.Hop.VLAN == [2]uint16{} {
			break
		}
		device, err := s.routes.LinkByIndex(index)
		if err != nil {
			return false
		}
		index = device.Attrs().ParentIndex
	}
	return index == int(d.Hop.Interface)
}

// once makes a function that hands each address on until that has succeeded.
func once(source func(netip.Addr) error) func(netip.Addr) error {
	if source == nil {
		return func(netip.Addr) error { return nil }
	}
	var mu sync.Mutex
	told := make(map[netip.Addr]bool)
	return func(a netip.Addr) error {
		mu.Lock()
		defer mu.Unlock()
		if told[a] {
			return nil
		}
		if err := source(a); err != nil {
			return fmt.Errorf("have answers to %v taken for checks: %w", a, err)
		}
		told[a] = true
		return nil
	}
}
