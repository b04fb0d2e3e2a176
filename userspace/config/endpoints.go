package config

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"
)

// Endpoints returns every address and port that s is reached at: address by address in the file's order, ports rising.
func (s Service) Endpoints() iter.Seq[netip.AddrPort] {
	return func(yield func(netip.AddrPort) bool) {
		for _, a := range s.Addresses {
			for _, r := range s.Ports {
				for port := range r.All() {
					if !yield(netip.AddrPortFrom(a, port)) {
						return
					}
				}
			}
		}
	}
}

// EndpointCount returns how many there are of [Service.Endpoints].
func (s Service) EndpointCount() int {
	ports := 0
	for _, r := range s.Ports {
		ports += r.Count()
	}
	return len(s.Addresses) * ports
}

// PortWithin returns the lowest port of s that lies in ports.
func (s Service) PortWithin(ports PortRange) (uint16, bool) {
	i := reaching(s.Ports, ports.First)
	if ports.IsZero() || i == len(s.Ports) || s.Ports[i].First > ports.Last {
		return 0, false
	}
	return max(s.Ports[i].First, ports.First), true
}

// ServiceWithin returns the service of that protocol at address that has the lowest port in ports. A source address with
// such source ports would have the backends' replies taken for clients' packets. The daemon asks it of the source
// ports that it chooses by default; those of the file are checked already.
func (c *Config) ServiceWithin(address netip.Addr, protocol Protocol, ports PortRange) (Service, bool) {
	h, ok := c.endpoints.within(address, protocol, []PortRange{ports})
	if !ok {
		return Service{}, false
	}
	return c.Services[h.service], true
}

// station is what endpoints are told apart by, next to their port. It has no interface: a link-local address counts
// once, as in the data plane.
type station struct {
	address  netip.Addr
	protocol Protocol
}

func stationOf(address netip.Addr, protocol Protocol) station {
	return station{address.WithZone(""), protocol}
}

// holder is the service, by its place in the file, that has a port of a station.
type holder struct {
	port    uint16
	service int
}

// endpoints hold who is where, ports rising and services in the file's order.
type endpoints map[station][]holder

// newEndpoints takes in all services, or as many of the first as have no more than maxEndpoints together.
func newEndpoints(services []Service) (e endpoints, taken int) {
	e = endpoints{}
	for room := maxEndpoints; taken < len(services); taken++ {
		s := services[taken]
		if room -= s.EndpointCount(); room < 0 {
			break
		}
		if s.Protocol == "" {
			continue
		}
		for at := range s.Endpoints() {
			key := stationOf(at.Addr(), s.Protocol)
			e[key] = append(e[key], holder{at.Port(), taken})
		}
	}
	for _, list := range e {
		slices.SortStableFunc(list, func(a, b holder) int { return cmp.Compare(a.port, b.port) })
	}
	return e, taken
}

// within returns who has the lowest port at address that lies in ports, which rise and don't overlap.
func (e endpoints) within(address netip.Addr, protocol Protocol, ports []PortRange) (holder, bool) {
	list := e[stationOf(address, protocol)]
	// Each turn skips what can't meet on one side, then on the other.
	for len(list) > 0 && len(ports) > 0 {
		if list = list[holding(list, ports[0].First):]; len(list) == 0 {
			break
		}
		if ports[0].Contains(list[0].port) {
			return list[0], true
		}
		ports = ports[1:]
		ports = ports[reaching(ports, list[0].port):]
	}
	return holder{}, false
}

// holding returns the place of the first holder of port in a station's list, or of the next higher port.
func holding(list []holder, port uint16) int {
	i, _ := slices.BinarySearchFunc(list, port, func(h holder, port uint16) int { return cmp.Compare(h.port, port) })
	return i
}

// spellEndpoints writes ports of an address as messages do.
func spellEndpoints(address netip.Addr, ports PortRange, protocol Protocol) string {
	text := netip.AddrPortFrom(address.WithZone(""), ports.First).String()
	if ports.Count() > 1 {
		text = fmt.Sprintf("%s-%d", text, ports.Last)
	}
	return text + " " + protocol.String()
}

// addresses reads address, or addresses in its stead. places are where the addresses stand.
func (c *checker) addresses(raw *rawService, mode Mode) (list []netip.Addr, places []place) {
	one, apart := c.address(raw.address, mode), c.either(raw.address, &raw.addresses)
	listed := map[netip.Addr]bool{}
	for _, item := range raw.addresses.items {
		a := c.address(item, mode)
		switch {
		case !a.IsValid():
			continue
		case listed[a.WithZone("")]:
			c.refuse(item.place, fmt.Sprintf("%v is listed already", a), "list each address once")
			continue
		case len(list) > 0 && a.Is4() != list[0].Is4():
			c.refuse(item.place, fmt.Sprintf("%v is %s, but %v before it is %s", a, family(a), list[0], family(list[0])),
				fmt.Sprintf("give the %s addresses a service of their own", family(a)))
			continue
		}
		listed[a.WithZone("")] = true
		list, places = append(list, a), append(places, item.place)
	}
	switch {
	case !apart:
		return nil, nil
	case one.IsValid():
		return []netip.Addr{one}, []place{raw.address.place}
	}
	return list, places
}

// ports reads port, or ports in its stead. several says that there is more than one, though some may be refused.
func (c *checker) ports(raw *rawService) (list []PortRange, several bool) {
	one, apart := scalar(c, raw.port, 0, parseServicePort), c.either(raw.port, &raw.ports)
	for _, item := range raw.ports.items {
		r := scalar(c, item, PortRange{}, parsePorts)
		if r.IsZero() {
			continue
		}
		at := reaching(list, r.First)
		if at < len(list) && list[at].First <= r.Last {
			problem := fmt.Sprintf("%s overlaps %s, which is listed already", r.plain(), list[at].plain())
			if list[at] == r {
				problem = r.plain() + " is listed already"
			}
			c.refuse(item.place, problem, "list each port once")
			continue
		}
		list = slices.Insert(list, at, r)
	}
	switch {
	case !apart:
		return nil, false
	case one != 0:
		return []PortRange{{one, one}}, false
	}
	list = joined(list)
	return list, len(raw.ports.items) > 1 || len(list) > 0 && list[0].Count() > 1
}

// joined makes one range of ranges that touch, so that one set of ports has one spelling.
func joined(list []PortRange) []PortRange {
	var out []PortRange
	for _, r := range list {
		if last := len(out) - 1; last >= 0 && int(out[last].Last)+1 == int(r.First) {
			out[last].Last = r.Last
		} else {
			out = append(out, r)
		}
	}
	return out
}

// either asks for one of a field and its plural, and reports whether the file gives just one of them.
func (c *checker) either(one text, many *texts) bool {
	name, plural := lastName(one.field), lastName(many.field)
	switch {
	case one.state == absent && many.state == absent:
		c.refuse(one.place, "is missing", fmt.Sprintf("write %s: and its value, or %s: and a list", name, plural))
	case many.state == empty:
		c.refuse(many.place, "has no value", "write a list, or take the line out")
	case many.state == given && len(many.items) == 0:
		c.refuse(many.place, "the list is empty", "list one at least, or take the line out")
	case one.state != absent && one.state != empty && many.state != absent:
		c.refuse(many.place, fmt.Sprintf("%s is given too, in line %d", name, one.line), "keep one of the two")
	default:
		return true
	}
	return false
}

// distinctEndpoints refuses what an earlier service has, once for each run of ports.
func (c *checker) distinctEndpoints(raw []rawService, services []Service, all endpoints) {
	for i, s := range services {
		for k, address := range s.Addresses {
			list := all[stationOf(address, s.Protocol)]
			var shared PortRange
			owner := i
			tell := func() {
				if owner != i {
					c.refuse(c.addressPlaces[i][k], fmt.Sprintf("%s is service %s of line %d already",
						spellEndpoints(address, shared, s.Protocol), services[owner].Name, raw[owner].line),
						"make them one service, or take another address or port")
				}
			}
			for _, r := range s.Ports {
				for port := range r.All() {
					first := i
					if at := holding(list, port); at < len(list) {
						first = list[at].service
					}
					if first == owner && int(shared.Last)+1 == int(port) {
						shared.Last = port
						continue
					}
					tell()
					owner, shared = first, PortRange{port, port}
				}
			}
			tell()
		}
	}
}
