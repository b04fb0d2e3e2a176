package announce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// HostAddresses returns every address that this host's own stack holds, in the calling thread's network namespace, and
// the interface that holds it. Link-local IPv6 addresses carry that interface as zone. What is in here is not to be
// XDP's own.
func HostAddresses() (map[netip.Addr]string, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for the host's addresses: %w", err)
	}
	defer handle.Close()
	h, err := readHost(handle)
	if err != nil {
		return nil, err
	}
	return h.addresses, nil
}

// link is what matters of a network device.
type link struct {
	index  int
	name   string
	flags  uint32
	mac    mac
	silent bool // nobody resolves addresses there: no Ethernet, point to point, loopback, or ARP is off
	master int  // the bridge or bond that the host hears its frames by; 0: none
}

func (l link) usable() bool {
	return l.flags&unix.IFF_UP != 0 && l.flags&unix.IFF_LOWER_UP != 0 && !l.silent
}

// host is what the kernel has.
type host struct {
	links     map[string]link
	macs      map[mac]struct{} // of all links: what comes from them is ours
	addresses map[netip.Addr]string
}

func readHost(handle *netlink.Handle) (*host, error) {
	h := &host{links: map[string]link{}, macs: map[mac]struct{}{}, addresses: map[netip.Addr]string{}}
	names := map[int]string{}
	links, err := whole(handle.LinkList)
	if err != nil {
		return nil, fmt.Errorf("read links: %w", err)
	}
	for _, l := range links {
		a := l.Attrs()
		names[a.Index] = a.Name
		entry := link{index: a.Index, name: a.Name, flags: a.RawFlags, master: a.MasterIndex,
			silent: a.EncapType != "ether" || len(a.HardwareAddr) != len(mac{}) ||
				a.RawFlags&(unix.IFF_LOOPBACK|unix.IFF_POINTOPOINT|unix.IFF_NOARP) != 0}
		if len(a.HardwareAddr) == len(entry.mac) {
			entry.mac = mac(a.HardwareAddr)
			h.macs[entry.mac] = struct{}{}
		}
		h.links[a.Name] = entry
	}
	addresses, err := whole(func() ([]netlink.Addr, error) { return handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("read the host's addresses: %w", err)
	}
	for _, a := range addresses {
		if a.IPNet == nil {
			continue
		}
		address, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		name := names[a.LinkIndex]
		if address.Is6() && address.IsLinkLocalUnicast() {
			address = address.WithZone(name)
		}
		if _, ok := h.addresses[address]; !ok {
			h.addresses[address] = name
		}
	}
	return h, nil
}

// whole repeats a dump that a concurrent change has torn. Torn five times: what changed meanwhile comes as news.
func whole[T any](dump func() ([]T, error)) (list []T, err error) {
	for range 5 {
		if list, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return list, nil
}

// linkLocal is an address of the host's on this interface that MLD can be spoken from; unspecified: it has none.
func (h *host) linkLocal(name string) netip.Addr {
	for a := range h.addresses {
		if a.Zone() == name && a.IsLinkLocalUnicast() {
			return a
		}
	}
	return netip.IPv6Unspecified()
}

// news says that something has changed; it doesn't say what, but for interfaces that could not send for a moment.
type news struct {
	bounced []int
	lost    bool
	err     error
}

var newsGroups = []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR}

// receiveNews hands on the kernel's news until done or an error that doesn't pass.
func receiveNews(s *nl.NetlinkSocket, out chan<- news, done <-chan struct{}) {
	for {
		messages, from, err := s.Receive()
		var n news
		switch {
		case errors.Is(err, unix.ENOBUFS):
			n.lost = true
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			n.err = err
		case from.Pid != nl.PidKernel:
			continue
		}
		for _, m := range messages {
			kind := m.Header.Type
			if kind != unix.RTM_NEWLINK && kind != unix.RTM_DELLINK || len(m.Data) < unix.SizeofIfInfomsg {
				continue
			}
			flags := binary.NativeEndian.Uint32(m.Data[8:])
			if kind == unix.RTM_DELLINK || flags&unix.IFF_UP == 0 || flags&unix.IFF_LOWER_UP == 0 {
				n.bounced = append(n.bounced, int(int32(binary.NativeEndian.Uint32(m.Data[4:]))))
			}
		}
		select {
		case out <- n:
		case <-done:
			return
		}
		if n.err != nil {
			return
		}
	}
}

// settleTime: changes come in bursts; look when the burst is over.
const settleTime = 30 * time.Millisecond

// readShare: where there are so many links that reading them takes long, it may not take more than a tenth of the
// time.
const readShare = 10
