package neighbor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Ours among neighbour entries: NDA_PROTOCOL of those we made managed (see ip-neighbour(8), "protocol"). It lets a
// daemon that was killed be cleaned up after.
const neighborProtocol = 0xfa

const (
	attributeType  = 0x3fff // NLA_TYPE_MASK
	skipStatistics = 1 << 3 // RTEXT_FILTER_SKIP_STATS

	usableStates = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE |
		netlink.NUD_PERMANENT | netlink.NUD_NOARP
	unaskedStates = netlink.NUD_PERMANENT | netlink.NUD_NOARP
)

var eventGroups = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE,
	unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_NEXTHOP,
}

// entryKey names a neighbour entry.
type entryKey struct {
	index int
	ip    netip.Addr // no zone
}

// entry is a neighbour entry of the kernel; state NUD_NONE: there is none.
type entry struct {
	state    uint16
	mac      [6]byte
	hasMAC   bool
	learned  bool // NTF_EXT_LEARNED: some control plane keeps it
	managed  bool // NTF_EXT_MANAGED: the kernel keeps it resolved
	protocol uint8
}

func (e entry) usable() bool { return e.state&usableStates != 0 && e.hasMAC }

// route is the kernel's answer for one destination.
type route struct {
	kind    uint8 // RTN_*
	index   int
	gateway netip.Addr
	source  netip.Addr
	mtu     int // 0: the device's
	encap   bool
}

// requests asks the kernel over a socket of the namespace it was opened in, whatever thread calls.
type requests struct{ sockets map[int]*nl.SocketHandle }

func openRequests(ns netns.NsHandle) (*requests, error) {
	s, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	timeout := unix.NsecToTimeval(int64(2 * time.Second)) // the kernel answers at once; this only keeps Run from hanging
	if err := errors.Join(s.SetSendTimeout(&timeout), s.SetReceiveTimeout(&timeout)); err != nil {
		s.Close()
		return nil, err
	}
	return &requests{map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, nil
}

func (r *requests) close() { r.sockets[unix.NETLINK_ROUTE].Close() }

func (r *requests) new(kind uint16, flags uint16) *nl.NetlinkRequest {
	return &nl.NetlinkRequest{
		NlMsghdr: unix.NlMsghdr{Len: unix.SizeofNlMsghdr, Type: kind, Flags: unix.NLM_F_REQUEST | flags},
		Sockets:  r.sockets,
	}
}

// dump repeats a dump that a concurrent change has torn.
func (r *requests) dump(make func() *nl.NetlinkRequest, answer uint16, each func([]byte)) error {
	var err error
	for range 5 {
		var messages [][]byte
		messages, err = make().Execute(unix.NETLINK_ROUTE, answer)
		if err == nil || errors.Is(err, nl.ErrDumpInterrupted) {
			for _, m := range messages {
				each(m)
			}
		}
		if !errors.Is(err, nl.ErrDumpInterrupted) {
			return err
		}
	}
	// Torn five times: what changed meanwhile comes as events.
	return nil
}

func (r *requests) links() (map[int]link, error) {
	links := make(map[int]link)
	err := r.dump(func() *nl.NetlinkRequest {
		req := r.new(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStatistics)))
		return req
	}, unix.RTM_NEWLINK, func(m []byte) {
		if l, ok := decodeLink(m); ok {
			links[l.index] = l
		}
	})
	return links, err
}

// route asks how the host itself would send to ip; index, unless 0, is the device it must leave by.
func (r *requests) route(ip netip.Addr, index int) (route, error) {
	req := r.new(unix.RTM_GETROUTE, 0)
	req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: family(ip), Dst_len: uint8(ip.BitLen())}})
	req.AddData(nl.NewRtAttr(unix.RTA_DST, ip.AsSlice()))
	if index != 0 {
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))))
	}
	messages, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	if err != nil {
		return route{}, err
	}
	for _, m := range messages {
		if answer, ok := decodeRoute(m); ok {
			return answer, nil
		}
	}
	return route{}, errors.New("the kernel's answer can't be read")
}

// entry reads one neighbour entry; the zero entry if there is none.
func (r *requests) entry(key entryKey) (entry, error) {
	req := r.new(unix.RTM_GETNEIGH, 0)
	req.AddData(&netlink.Ndmsg{Family: family(key.ip), Index: uint32(key.index)})
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, key.ip.AsSlice()))
	messages, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if errors.Is(err, unix.ENOENT) {
		return entry{}, nil
	}
	if err != nil {
		return entry{}, err
	}
	for _, m := range messages {
		if k, e, ok := decodeEntry(m); ok && k == key {
			return e, nil
		}
	}
	return entry{}, nil
}

// entries calls each with every neighbour entry.
func (r *requests) entries(each func(entryKey, entry)) error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		err := r.dump(func() *nl.NetlinkRequest {
			req := r.new(unix.RTM_GETNEIGH, unix.NLM_F_DUMP)
			req.AddData(&netlink.Ndmsg{Family: family})
			return req
		}, unix.RTM_NEWNEIGH, func(m []byte) {
			if k, e, ok := decodeEntry(m); ok {
				each(k, e)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ask makes the kernel find out who answers for key, as if a packet were waiting (NTF_USE), and keep the answer fresh
// by itself (NTF_EXT_MANAGED, Linux 5.16; older kernels ignore the attribute, and the entry won't say managed). was is
// the entry as last seen: NTF_USE clears the flags it doesn't repeat, and makes a permanent entry an ordinary one,
// so those must never be asked.
func (r *requests) ask(key entryKey, was entry) error {
	req := r.neighborUse(key, was, unix.NLM_F_CREATE)
	req.AddData(nl.NewRtAttr(netlink.NDA_FLAGS_EXT, nl.Uint32Attr(netlink.NTF_EXT_MANAGED)))
	if !was.managed {
		req.AddData(nl.NewRtAttr(netlink.NDA_PROTOCOL, nl.Uint8Attr(neighborProtocol)))
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// verify has a usable entry confirmed now, by unicast probes, instead of when the kernel next thinks of it.
func (r *requests) verify(key entryKey, was entry) error {
	req := r.new(unix.RTM_NEWNEIGH, unix.NLM_F_ACK|unix.NLM_F_REPLACE)
	msg := &netlink.Ndmsg{Family: family(key.ip), Index: uint32(key.index), State: netlink.NUD_PROBE}
	if was.learned {
		msg.Flags |= netlink.NTF_EXT_LEARNED
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, key.ip.AsSlice()))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// release takes the managed flag back from an entry that we gave it to; entries of others are left as they are.
func (r *requests) release(key entryKey) error {
	e, err := r.entry(key)
	if err != nil || !e.managed || e.protocol != neighborProtocol || e.state&netlink.NUD_PERMANENT != 0 {
		return err
	}
	// Without NLM_F_CREATE: an entry that has just gone needs nothing.
	if _, err := r.neighborUse(key, e, 0).Execute(unix.NETLINK_ROUTE, 0); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

func (r *requests) neighborUse(key entryKey, was entry, flags uint16) *nl.NetlinkRequest {
	req := r.new(unix.RTM_NEWNEIGH, unix.NLM_F_ACK|flags)
	msg := &netlink.Ndmsg{Family: family(key.ip), Index: uint32(key.index), Flags: netlink.NTF_USE}
	if was.learned {
		msg.Flags |= netlink.NTF_EXT_LEARNED
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, key.ip.AsSlice()))
	return req
}

func family(ip netip.Addr) uint8 {
	if ip.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// attributes calls each with every attribute after a header of n bytes; false if the message is too short or broken.
// (nl.ParseRouteAttr panics where the last attribute's padding is missing.)
func attributes(m []byte, n int, each func(kind uint16, value []byte)) bool {
	if len(m) < n {
		return false
	}
	for m = m[n:]; len(m) >= unix.SizeofRtAttr; {
		length := int(u16(m))
		if length < unix.SizeofRtAttr || length > len(m) {
			return false
		}
		each(u16(m[2:])&attributeType, m[unix.SizeofRtAttr:length])
		m = m[min((length+3)&^3, len(m)):]
	}
	return true
}

func u16(b []byte) uint16 {
	if len(b) < 2 {
		return 0
	}
	return binary.NativeEndian.Uint16(b)
}

func u32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

func decodeLink(m []byte) (link, bool) {
	if len(m) < unix.SizeofIfInfomsg || m[0] != unix.AF_UNSPEC {
		return link{}, false // a bridge's or IPv6's news of the device; its RTM_DELLINK does not mean the device
	}
	l := link{
		hardware: u16(m[2:]),
		index:    int(int32(u32(m[4:]))),
		// Only what we judge by: other flags (promiscuous, multicast) come and go.
		flags: u32(m[8:]) & (unix.IFF_UP | unix.IFF_LOWER_UP | unix.IFF_LOOPBACK),
	}
	var data []byte
	whole := false
	ok := attributes(m, unix.SizeofIfInfomsg, func(kind uint16, v []byte) {
		switch kind {
		case unix.IFLA_IFNAME:
			l.name = unix.ByteSliceToString(v)
		case unix.IFLA_ADDRESS:
			l.hasMAC = len(v) == len(l.mac)
			copy(l.mac[:], v)
		case unix.IFLA_MTU:
			l.mtu, whole = int(u32(v)), true // what some wireless news leave out, with most of the rest
		case unix.IFLA_LINK:
			l.lower = int(int32(u32(v)))
		case unix.IFLA_LINK_NETNSID:
			l.foreign = true
		case unix.IFLA_LINKINFO:
			attributes(v, 0, func(kind uint16, v []byte) {
				switch kind {
				case unix.IFLA_INFO_KIND:
					l.kind = unix.ByteSliceToString(v)
				case unix.IFLA_INFO_DATA:
					data = v
				}
			})
		}
	})
	if !ok || !whole {
		return link{}, false
	}
	switch l.kind {
	case "vlan":
		attributes(data, 0, func(kind uint16, v []byte) {
			switch kind {
			case nl.IFLA_VLAN_ID:
				l.vlanID = u16(v)
			case nl.IFLA_VLAN_PROTOCOL:
				if len(v) >= 2 {
					l.vlanType = binary.BigEndian.Uint16(v)
				}
			}
		})
	case "bond":
		attributes(data, 0, func(kind uint16, v []byte) {
			if kind == nl.IFLA_BOND_MODE && len(v) > 0 {
				l.bondMode = v[0]
			}
		})
	}
	return l, true
}

func decodeRoute(m []byte) (route, bool) {
	if len(m) < unix.SizeofRtMsg {
		return route{}, false
	}
	r := route{kind: m[7]}
	ok := attributes(m, unix.SizeofRtMsg, func(kind uint16, v []byte) {
		switch kind {
		case unix.RTA_OIF:
			r.index = int(u32(v))
		case unix.RTA_GATEWAY:
			r.gateway, _ = netip.AddrFromSlice(v)
		case unix.RTA_VIA: // struct rtvia: family, then the address
			if len(v) > 2 {
				r.gateway, _ = netip.AddrFromSlice(v[2:])
			}
		case unix.RTA_PREFSRC:
			r.source, _ = netip.AddrFromSlice(v)
		case unix.RTA_ENCAP_TYPE:
			r.encap = true
		case unix.RTA_METRICS:
			attributes(v, 0, func(kind uint16, v []byte) {
				if kind == unix.RTAX_MTU {
					r.mtu = int(u32(v))
				}
			})
		}
	})
	return r, ok
}

// decodeRoutePrefix reads which destinations a route's change is about.
func decodeRoutePrefix(m []byte) (netip.Prefix, bool) {
	if len(m) < unix.SizeofRtMsg {
		return netip.Prefix{}, false
	}
	var ip netip.Addr
	switch m[0] {
	case unix.AF_INET:
		ip = netip.IPv4Unspecified()
	case unix.AF_INET6:
		ip = netip.IPv6Unspecified()
	default:
		return netip.Prefix{}, false
	}
	ok := attributes(m, unix.SizeofRtMsg, func(kind uint16, v []byte) {
		if a, valid := netip.AddrFromSlice(v); kind == unix.RTA_DST && valid {
			ip = a
		}
	})
	p := netip.PrefixFrom(ip, int(m[1]))
	return p, ok && p.IsValid()
}

func decodeEntry(m []byte) (entryKey, entry, bool) {
	if len(m) < unix.SizeofNdMsg || m[0] != unix.AF_INET && m[0] != unix.AF_INET6 {
		return entryKey{}, entry{}, false
	}
	key := entryKey{index: int(int32(u32(m[4:])))}
	e := entry{state: u16(m[8:]), learned: m[10]&netlink.NTF_EXT_LEARNED != 0}
	ok := attributes(m, unix.SizeofNdMsg, func(kind uint16, v []byte) {
		switch kind {
		case netlink.NDA_DST:
			key.ip, _ = netip.AddrFromSlice(v)
		case netlink.NDA_LLADDR:
			e.hasMAC = len(v) == len(e.mac)
			copy(e.mac[:], v)
		case netlink.NDA_FLAGS_EXT:
			e.managed = u32(v)&netlink.NTF_EXT_MANAGED != 0
		case netlink.NDA_PROTOCOL:
			if len(v) > 0 {
				e.protocol = v[0]
			}
		}
	})
	return key, e, ok && key.ip.IsValid() && m[10]&netlink.NTF_PROXY == 0
}

// subscribe opens the socket that news comes by, in ns.
func subscribe(ns netns.NsHandle, buffer int) (*nl.NetlinkSocket, error) {
	s, err := nl.SubscribeAt(ns, netns.None(), unix.NETLINK_ROUTE, eventGroups...)
	if err != nil {
		return nil, err
	}
	// Beyond net.core.rmem_max only with CAP_NET_ADMIN.
	if s.SetReceiveBufferSize(buffer, true) != nil {
		if err := s.SetReceiveBufferSize(buffer, false); err != nil {
			s.Close()
			return nil, fmt.Errorf("set receive buffer: %w", err)
		}
	}
	return s, nil
}

// news is a batch of messages, or the notice that some were lost, or the end.
type news struct {
	messages []syscall.NetlinkMessage
	lost     bool
	err      error
}

// receive hands on what comes by s until done or an error that doesn't pass.
func receive(s *nl.NetlinkSocket, out chan<- news, done <-chan struct{}) {
	for {
		messages, from, err := s.Receive()
		n := news{messages: messages}
		switch {
		case errors.Is(err, unix.ENOBUFS):
			n = news{lost: true}
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			n = news{err: err}
		case from.Pid != nl.PidKernel:
			continue
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
