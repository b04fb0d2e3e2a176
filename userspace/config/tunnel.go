package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// TunnelSource returns the addresses that outer packets of s to backend come from: one of them by a connection's hash.
// It returns false where the file gives none of backend's family: the daemon then chooses one.
func (s Service) TunnelSource(backend netip.Addr) (netip.Prefix, bool) {
	for _, p := range s.TunnelSources {
		if p.Addr().Is4() == backend.Is4() {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// tunnel is an item of a tunnel_source, and where it stands.
type tunnel struct {
	prefix netip.Prefix
	place  place
}

func (c *checker) tunnelSources(raw *oneOrMore, s *Service) {
	if raw.state == empty {
		c.refuse(raw.place, "has no value", "write an address or prefix, or take the line out")
	}
	for _, item := range raw.items {
		p := scalar(c, item, netip.Prefix{}, parseTunnelSource)
		if !p.IsValid() {
			continue
		}
		if first, twice := s.TunnelSource(p.Addr()); twice {
			c.refuse(item.place, fmt.Sprintf("%s is a second %s source beside %s", plainPrefix(p), family(p.Addr()),
				plainPrefix(first)), "write one for each family; a prefix holds several addresses")
			continue
		}
		s.TunnelSources = append(s.TunnelSources, p)
		c.tunnels = append(c.tunnels, tunnel{p, item.place})
	}
	// One meaning, one order.
	slices.SortFunc(s.TunnelSources, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	// An empty list chooses nothing and so says nothing wrong.
	if len(raw.items) > 0 && s.Method != "" && !s.Method.encapsulates() {
		c.refuse(raw.place, fmt.Sprintf("method %s puts no outer header around packets", s.Method),
			"take it out, or take method ipip or gue")
	}
}

// notSources are what no outer packet can come from.
var notSources = []struct {
	prefix       netip.Prefix
	one, several string
}{
	{netip.MustParsePrefix("0.0.0.0/32"), "the unspecified address", "the unspecified address"},
	{netip.MustParsePrefix("127.0.0.0/8"), "a loopback address", "loopback addresses"},
	{netip.MustParsePrefix("169.254.0.0/16"), "a link-local address", "link-local addresses"},
	{netip.MustParsePrefix("224.0.0.0/4"), "a multicast address", "multicast addresses"},
	{netip.MustParsePrefix("255.255.255.255/32"), "the broadcast address", "the broadcast address"},
	{netip.MustParsePrefix("::/128"), "the unspecified address", "the unspecified address"},
	{netip.MustParsePrefix("::1/128"), "a loopback address", "loopback addresses"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "an IPv4 address mapped into IPv6", "IPv4 addresses mapped into IPv6"},
	{netip.MustParsePrefix("fe80::/10"), "a link-local address", "link-local addresses"},
	{netip.MustParsePrefix("ff00::/8"), "a multicast address", "multicast addresses"},
}

// parseTunnelSource reads an address or a prefix of addresses.
func parseTunnelSource(s string) (netip.Prefix, *complaint) {
	p, err := netip.ParsePrefix(s)
	if a, failed := netip.ParseAddr(s); failed == nil && !strings.Contains(s, "/") { // a zone may hold anything
		if a.Zone() != "" && !a.IsLinkLocalUnicast() {
			return p, complain("write "+a.WithZone("").String(), "%s names an interface, which only link-local addresses need", s)
		}
		p, err = netip.PrefixFrom(a, a.BitLen()), nil // without the zone
	}
	if err != nil {
		return p, complain("write it as 10.9.0.0/24, 10.9.0.1 or 2001:db8:9::/64", "%q is not an IP address or prefix", s)
	}
	least := minTunnel4
	if p.Addr().Is6() {
		least = minTunnel6
	}
	if p.Bits() < least {
		return p, complain(fmt.Sprintf("take one of /%d to /%d", least, p.Addr().BitLen()), "%s is shorter than /%d", s, least)
	}
	for _, not := range notSources {
		if !p.Overlaps(not.prefix) {
			continue
		}
		remedy := "take addresses of a network of yours"
		if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
			remedy = "write " + plainPrefix(netip.PrefixFrom(a.Unmap(), p.Bits()-96).Masked())
		}
		if p.IsSingleIP() {
			return p, complain(remedy, "%s is %s", s, not.one)
		}
		return p, complain(remedy, "%s holds %s", s, not.several)
	}
	if right := p.Masked(); right != p {
		return p, complain(fmt.Sprintf("write %v, or %v for that address alone", right, p.Addr()),
			"%s has bits set after its first %d", s, p.Bits())
	}
	return p, nil
}

// plainPrefix writes a prefix of one address as that address.
func plainPrefix(p netip.Prefix) string {
	return strings.TrimSuffix(p.String(), fmt.Sprintf("/%d", p.Addr().BitLen()))
}

// tunnelsApart refuses outer sources that are the address of a service or a backend: the answers to outer packets would
// be taken for clients' packets, or would go to the backend itself.
func (c *checker) tunnelsApart(services []Service) {
	if len(c.tunnels) == 0 {
		return
	}
	type owner struct {
		address          netip.Addr
		service, backend int // backend -1: the service itself
	}
	var owners []owner
	for i, s := range services {
		for _, a := range s.Addresses {
			owners = append(owners, owner{a.WithZone(""), i, -1})
		}
		for j, b := range s.Backends {
			if b.Address.IsValid() {
				owners = append(owners, owner{b.Address.WithZone(""), i, j})
			}
		}
	}
	slices.SortStableFunc(owners, func(a, b owner) int { return a.address.Compare(b.address) })
	for _, t := range c.tunnels {
		i, _ := slices.BinarySearchFunc(owners, t.prefix.Addr(), func(o owner, first netip.Addr) int {
			return o.address.Compare(first)
		})
		if i == len(owners) || !t.prefix.Contains(owners[i].address) {
			continue
		}
		o := owners[i]
		verb := "holds " + o.address.String() + ","
		if t.prefix.IsSingleIP() {
			verb = "is"
		}
		whose := "service " + services[o.service].Name
		if o.backend >= 0 {
			whose = fmt.Sprintf("backend %s of %s", services[o.service].Backends[o.backend].Name, whose)
		}
		c.refuse(t.place, fmt.Sprintf("%s %s the address of %s", plainPrefix(t.prefix), verb, whose),
			"take addresses that no service and no backend has")
	}
}
