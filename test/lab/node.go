package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Node is a machine of the lab: a network namespace called PREFIX-NAME.
type Node struct {
	lab       *Lab
	name      string
	namespace string
	ports     map[string]switchPort // by interface, of those that have joined a segment; the lab's mutex's to guard
}

// nodeSettings hold in every node: addresses usable at once, no autoconfiguration, no filter on the way back (replies
// take another way than requests in half of what the lab is for), no redirects past the router, queues for a crowd.
var nodeSettings = [][2]string{
	{"net.ipv4.conf.all.rp_filter", "0"},
	{"net.ipv4.conf.default.rp_filter", "0"},
	{"net.ipv4.conf.all.send_redirects", "0"},
	{"net.ipv4.conf.default.send_redirects", "0"},
	{"net.ipv4.conf.all.accept_redirects", "0"},
	{"net.ipv4.conf.default.accept_redirects", "0"},
	{"net.ipv4.tcp_max_syn_backlog", "16384"},
	{"net.core.somaxconn", "16384"},
	{"net.ipv6.conf.all.disable_ipv6", "0"},
	{"net.ipv6.conf.default.disable_ipv6", "0"},
	{"net.ipv6.conf.all.accept_dad", "0"},
	{"net.ipv6.conf.default.accept_dad", "0"},
	{"net.ipv6.conf.default.dad_transmits", "0"},
	{"net.ipv6.conf.all.accept_ra", "0"},
	{"net.ipv6.conf.default.accept_ra", "0"},
	{"net.ipv6.conf.default.autoconf", "0"},
	{"net.ipv6.conf.all.accept_redirects", "0"},
	{"net.ipv6.conf.default.accept_redirects", "0"},
}

// Node returns the node of a name (a letter, then letters, digits, dots and dashes), made on first use. "switch" is the
// namespace of the segments' bridges.
func (l *Lab) Node(name string) (*Node, error) {
	if !validName.MatchString(name) {
		return nil, fmt.Errorf("add node %q: want a lower-case letter, then up to 31 letters, digits, dots and dashes", name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.node(name)
}

// node is Node with the lab's mutex held.
func (l *Lab) node(name string) (*Node, error) {
	if l.closed {
		return nil, fmt.Errorf("add node %s: the lab is closed", name)
	}
	if n, ok := l.nodes[name]; ok {
		return n, nil
	}
	n := &Node{lab: l, name: name, namespace: l.namespace(name), ports: map[string]switchPort{}}
	if err := createNamespace(n.namespace); err != nil {
		return nil, fmt.Errorf("add node %s: %w", name, err)
	}
	settings := nodeSettings
	if name == switchName {
		// Bridges carry IPv6 and have none: theirs would be one more voice on every segment.
		settings = [][2]string{{"net.ipv6.conf.all.disable_ipv6", "1"}, {"net.ipv6.conf.default.disable_ipv6", "1"}}
	}
	err := n.Do(func() error {
		for _, setting := range settings {
			if err := setSysctl(setting[0], setting[1]); err != nil {
				return err
			}
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("set lo up: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("add node %s: %w", name, err), deleteNamespace(n.namespace))
	}
	l.nodes[name] = n
	return n, nil
}

// Name is the node's name within the lab.
func (n *Node) Name() string { return n.name }

// Namespace is the name under /run/netns.
func (n *Node) Namespace() string { return n.namespace }

// Do runs fn on a thread in the node's namespace. Sockets made by fn stay in the namespace and serve from anywhere
// afterwards; goroutines started by fn do not run there. It returns fn's error as it is.
func (n *Node) Do(fn func() error) error { return enter(n.namespace, fn) }

// Sysctl sets a kernel parameter of the node's namespace, as in Sysctl("net.ipv4.ip_forward", "1").
func (n *Node) Sysctl(key, value string) error {
	return n.wrap("set a sysctl", n.Do(func() error { return setSysctl(key, value) }))
}

// setSysctl sets a parameter of the calling thread's namespace.
func setSysctl(key, value string) error {
	path := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		return fmt.Errorf("set %s to %s: %w", key, value, err)
	}
	return nil
}

// AddAddress adds an address to an interface. An IPv6 address is usable at once (no duplicate address detection).
func (n *Node) AddAddress(interfaceName string, address netip.Prefix) error {
	return n.wrap("add an address", n.Do(func() error {
		link, err := netlink.LinkByName(interfaceName)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", interfaceName, err)
		}
		return addAddress(link, address)
	}))
}

func addAddress(link netlink.Link, address netip.Prefix) error {
	ip := &net.IPNet{IP: address.Addr().AsSlice(), Mask: net.CIDRMask(address.Bits(), address.Addr().BitLen())}
	a := &netlink.Addr{IPNet: ip}
	if address.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(link, a); err != nil {
		return fmt.Errorf("add %v to %s: %w", address, link.Attrs().Name, err)
	}
	return nil
}

// AddRoute routes a destination by way of an on-link gateway, in place of what the node had for it.
func (n *Node) AddRoute(destination netip.Prefix, gateway netip.Addr) error {
	return n.wrap("add a route", n.Do(func() error {
		destination = destination.Masked()
		route := &netlink.Route{
			Dst: &net.IPNet{
				IP:   destination.Addr().AsSlice(),
				Mask: net.CIDRMask(destination.Bits(), destination.Addr().BitLen()),
			},
			Gw: gateway.AsSlice(),
		}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("route %v by %v: %w", destination, gateway, err)
		}
		return nil
	}))
}

// AddDefaultRoutes sends what has no other route to the gateways, one a family.
func (n *Node) AddDefaultRoutes(gateways ...netip.Addr) error {
	for _, gateway := range gateways {
		everywhere := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if gateway.Is6() {
			everywhere = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if err := n.AddRoute(everywhere, gateway); err != nil {
			return err
		}
	}
	return nil
}

// addRoutes routes a subnet of both families by way of on-link gateways, one a family.
func (n *Node) addRoutes(to subnet, gateways []netip.Addr) (err error) {
	for _, prefix := range []netip.Prefix{to.v4, to.v6} {
		err = errors.Join(err, n.AddRoute(prefix, sameFamily(gateways, prefix.Addr())[0]))
	}
	return err
}

// PathMTU is the largest packet, in bytes from the IP header on, that the node's kernel takes the way to an address to
// carry: what a router has told it, else the route's or the interface's MTU.
func (n *Node) PathMTU(to netip.Addr) (mtu int, err error) {
	err = n.Do(func() error {
		routes, err := netlink.RouteGet(to.AsSlice())
		if err != nil {
			return fmt.Errorf("look up the route to %v: %w", to, err)
		}
		if mtu = routes[0].MTU; mtu != 0 {
			return nil
		}
		link, err := netlink.LinkByIndex(routes[0].LinkIndex)
		if err != nil {
			return fmt.Errorf("find the interface to %v: %w", to, err)
		}
		mtu = link.Attrs().MTU
		return nil
	})
	return mtu, n.wrap("look up a path's MTU", err)
}

// ForgetPaths makes the node's kernel forget what routers have told it of paths.
func (n *Node) ForgetPaths() error {
	for _, family := range []string{"-4", "-6"} {
		cmd := n.Command(context.Background(), "ip", family, "route", "flush", "cache")
		if output, err := cmd.CombinedOutput(); err != nil {
			return n.wrap("forget paths", fmt.Errorf("ip: %w: %s", err, strings.TrimSpace(string(output))))
		}
	}
	return nil
}

// SetMTU sets an interface's MTU in bytes.
func (n *Node) SetMTU(interfaceName string, mtu int) error {
	return n.wrap("set an MTU", n.Do(func() error {
		link, err := netlink.LinkByName(interfaceName)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", interfaceName, err)
		}
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("set the MTU of %s to %d: %w", interfaceName, mtu, err)
		}
		return nil
	}))
}

// SetForwarding makes the node a router of both families, or no more.
func (n *Node) SetForwarding(on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	return errors.Join(n.Sysctl("net.ipv4.ip_forward", value), n.Sysctl("net.ipv6.conf.all.forwarding", value))
}

// Masquerading is how a router hides those behind it.
type Masquerading struct {
	Interfaces []string     // what leaves by these has the router's own address there
	Except     []netip.Addr // keep their addresses, and the router keeps no track of what comes from them or goes to them

	// DropInvalid has its firewall let nothing through that fits no connection it knows of.
	DropInvalid bool
}

// Masquerade hides what the node routes behind its own addresses, both families.
func (n *Node) Masquerade(m Masquerading) error {
	var rules strings.Builder
	rules.WriteString("table inet lab {\n chain leaving {\n  type nat hook postrouting priority srcnat\n")
	for _, name := range m.Interfaces {
		fmt.Fprintf(&rules, "  oifname %q masquerade\n", name)
	}
	rules.WriteString(" }\n chain arriving {\n  type filter hook prerouting priority raw\n")
	for _, address := range m.Except {
		family := "ip"
		if address.Is6() {
			family = "ip6"
		}
		// What is not tracked is not translated either.
		fmt.Fprintf(&rules, "  %s saddr %v notrack\n  %[1]s daddr %[2]v notrack\n", family, address)
	}
	rules.WriteString(" }\n")
	if m.DropInvalid {
		rules.WriteString(" chain passing {\n  type filter hook forward priority filter\n  ct state invalid drop\n }\n")
	}
	cmd := n.Command(context.Background(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules.String() + "}\n")
	if output, err := cmd.CombinedOutput(); err != nil {
		return n.wrap("masquerade", fmt.Errorf("nft: %w: %s (the program comes with the nftables package)", err,
			strings.TrimSpace(string(output))))
	}
	return nil
}

// Hold gives lo addresses that the node answers for without announcing them to its segments, as a dsr backend holds a
// service's address.
func (n *Node) Hold(addresses ...netip.Addr) error {
	// An IPv6 node answers neighbour solicitations for the addresses of the interface asked only: lo's are silent already.
	err := errors.Join(n.Sysctl("net.ipv4.conf.all.arp_ignore", "1"), n.Sysctl("net.ipv4.conf.all.arp_announce", "2"))
	for _, address := range addresses {
		if err == nil {
			err = n.AddAddress("lo", netip.PrefixFrom(address, address.BitLen()))
		}
	}
	return err
}

// Addresses lists the addresses of an interface, but link-local ones.
func (n *Node) Addresses(interfaceName string) (addresses []netip.Addr, err error) {
	err = n.Do(func() error {
		link, err := netlink.LinkByName(interfaceName)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", interfaceName, err)
		}
		list, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses of %s: %w", interfaceName, err)
		}
		for _, a := range list {
			if address, ok := netip.AddrFromSlice(a.IP); ok {
				addresses = append(addresses, address.Unmap())
			}
		}
		addresses = slices.DeleteFunc(addresses, netip.Addr.IsLinkLocalUnicast)
		return nil
	})
	return addresses, n.wrap("list addresses", err)
}

func (n *Node) wrap(operation string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s on node %s: %w", operation, n.name, err)
}
