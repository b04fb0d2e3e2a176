package config

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
)

// checker turns raw fields into checked ones. What is refused is told once and becomes the zero value, which for a
// field that must hold something means unknown: what depends on it is then not judged.
type checker struct {
	source source
	errs   Errors
	host   host

	addressPlaces [][]place // where each service's Addresses stand
	tunnels       []tunnel  // all services'

	// What was made of texts that many backends may share.
	expressions map[string]*regexp.Regexp
	authorities map[string]authority // by path
}

func newChecker(src source, errs Errors, h host) *checker {
	return &checker{source: src, errs: errs, host: h, expressions: map[string]*regexp.Regexp{},
		authorities: map[string]authority{}}
}

func (c *checker) refuse(at place, problem, remedy string) {
	c.errs = append(c.errs, c.source.refuse(at, problem, remedy))
}

func (c *checker) config(raw *rawConfig) *Config {
	cfg := &Config{
		Node:      c.node(raw.node),
		Dataplane: c.dataplane(&raw.dataplane),
		StateDir:  scalar(c, raw.stateDir, defaultStateDir, parsePath),
		Control:   c.control(&raw.control),
	}
	if n := len(raw.services.items); n > maxServices {
		c.refuse(raw.services.place, fmt.Sprintf("%d services are over the limit of %d", n, maxServices),
			"divide them between hosts")
	}
	backends, endpoints := 0, 0
	for i := range raw.services.items {
		s, places := c.service(&raw.services.items[i], &cfg.Dataplane)
		cfg.Services, c.addressPlaces = append(cfg.Services, s), append(c.addressPlaces, places)
		backends += len(s.Backends)
		endpoints += s.EndpointCount()
	}
	if backends > maxBackends {
		c.refuse(raw.services.place, fmt.Sprintf("%d backends altogether are over the limit of %d", backends,
			maxBackends), "divide them between hosts")
	}
	if endpoints > maxEndpoints {
		c.refuse(raw.services.place, fmt.Sprintf("%d pairs of address and port altogether are over the limit of %d",
			endpoints, maxEndpoints), "divide them between hosts")
	}
	cfg.endpoints = c.together(raw.services.items, cfg.Services)
	return cfg
}

func (c *checker) node(raw text) string {
	if raw.state != absent {
		return scalar(c, raw, "", parseNode)
	}
	name, err := c.host.name()
	if err != nil {
		c.refuse(raw.place, fmt.Sprintf("the host's name can't be read (%v)", err), "write node: and a name")
		return ""
	}
	if _, bad := parseNode(name); bad != nil {
		c.refuse(raw.place, fmt.Sprintf("the host's name won't do: it %s", bad.problem), "write node: and a name")
	}
	return name
}

func (c *checker) dataplane(raw *rawDataplane) Dataplane {
	d := Dataplane{
		Mode:        choose(c, raw.mode, defaultMode, modes),
		XDP:         choose(c, raw.xdp, defaultXDP, xdpModes),
		Connections: c.number(raw.connections, defaultConnections, minTable, maxTable),
		PinPath:     scalar(c, raw.pinPath, defaultPinPath, parsePinPath),
		Epoch:       c.duration(raw.epoch, defaultEpoch, minEpoch, maxEpoch),
	}
	d.HalfOpen = c.number(raw.halfOpen, defaultHalfOpen(d.Connections), minTable, maxTable)
	for _, item := range raw.interfaces.items {
		name := scalar(c, item, "", parseInterface)
		if name != "" && slices.Contains(d.Interfaces, name) {
			c.refuse(item.place, fmt.Sprintf("interface %s is named already", name), "name each interface once")
			continue
		}
		d.Interfaces = append(d.Interfaces, name)
	}
	return d
}

func (c *checker) control(raw *rawControl) Control {
	control := Control{Socket: scalar(c, raw.socket, defaultSocket, parseSocket)}
	if raw.http.state == absent || raw.http.state == given {
		control.HTTP = scalar(c, raw.http, defaultHTTP, parseHTTP)
	}
	return control
}

// service also returns where its Addresses stand.
func (c *checker) service(raw *rawService, d *Dataplane) (Service, []place) {
	if raw.state == empty {
		c.refuse(raw.place, "the item is empty", "write a service after the dash or take the dash out")
	}
	if raw.state != given {
		return Service{}, nil
	}
	s := Service{
		Name:          scalar(c, c.required(raw.name), "", parseName),
		Protocol:      choose(c, raw.protocol, defaultProtocol, protocols),
		Method:        choose(c, raw.method, defaultMethod, methods),
		Affinity:      choose(c, raw.affinity, defaultAffinity, affinities),
		RingSize:      c.ringSize(raw.ringSize, len(raw.backends.items)),
		OnBackendDown: choose(c, raw.onBackendDown, defaultOnBackendDown, downPolicies),
		AllDown:       choose(c, raw.allDown, defaultAllDown, allDowns),
		Panic:         c.percent(raw.panic, defaultPanic, 100),
		ResetRate:     c.number(raw.resetRate, defaultResetRate, 1, maxResetRate),
		SlowStart:     c.duration(raw.slowStart, defaultSlowStart, 0, maxSlowStart),
		Balance:       Balance{Mode: choose(c, raw.balance.mode, defaultBalance, balanceModes)},
		ProxyProtocol: choose(c, raw.proxyProtocol, defaultProxyProtocol, proxyProtocols),
		Announce:      choose(c, raw.announce, defaultAnnounce, announces),
	}
	addresses, places := c.addresses(raw, d.Mode)
	if s.Addresses = addresses; len(addresses) > 0 {
		s.Address = addresses[0]
	}
	ports, several := c.ports(raw)
	if s.Ports = ports; len(ports) > 0 {
		s.Port = ports[0].First
	}
	s.IdleTimeout = c.idleTimeout(raw.idleTimeout, s.Protocol, d.Epoch)
	c.sources(raw, &s, d.Mode)
	c.tunnelSources(&raw.tunnelSource, &s)
	c.proxy(raw.proxyProtocol.place, &s, d.Mode)
	if len(raw.backends.items) == 0 && raw.backends.state != broken {
		c.refuse(raw.backends.place, "the service has no backend", "add a backend or remove the service")
	}
	checks := c.serviceHealth(&raw.health, &s)
	for i := range raw.backends.items {
		s.Backends = append(s.Backends, c.backend(&raw.backends.items[i], &s, several, checks, d.Mode))
	}
	c.serviceHealthPort(raw, &s, several, checks)
	c.distinctBackends(raw.backends.items, &s)
	return s, places
}

// required refuses an absent field.
func (c *checker) required(t text) text {
	if t.state == absent {
		c.refuse(t.place, "is missing", fmt.Sprintf("write %s: and its value", lastName(t.field)))
		t.state = broken
	}
	return t
}

// ringSize asks for a prime, because Maglev's permutations visit every slot only then (Eisenbud et al., NSDI 2016,
// section 3.4).
func (c *checker) ringSize(raw text, backends int) uint32 {
	size := c.number(raw, defaultRingSize, 2, maxRingSize)
	if size == 0 {
		return 0
	}
	least := uint64(backends) * slotsABackend
	at := raw.place
	switch {
	case least > maxRingSize:
		c.refuse(at, fmt.Sprintf("no ring is large enough for %d backends: the largest has %d slots", backends,
			maxRingSize), "divide the service")
	case uint64(size) < least:
		c.refuse(at, fmt.Sprintf("a ring of %d slots is too small for %d backends", size, backends),
			fmt.Sprintf("take a prime of at least %d slots a backend, as %d", slotsABackend, nextPrime(uint32(least))))
	case !isPrime(size):
		c.refuse(at, fmt.Sprintf("%d is not a prime", size),
			fmt.Sprintf("take a prime, as %d", nextPrime(max(size, uint32(least)))))
	}
	return size
}

func isPrime(n uint32) bool {
	for d := uint32(2); d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return n > 1
}

// nextPrime returns the least prime that is not below n.
func nextPrime(n uint32) uint32 {
	for !isPrime(n) {
		n++
	}
	return n
}

func (c *checker) idleTimeout(raw text, p Protocol, epoch time.Duration) time.Duration {
	idle := c.duration(raw, defaultIdleTimeout(p), time.Millisecond, maxIdle)
	if least := idleEpochs * epoch; idle != 0 && idle < least {
		c.refuse(raw.place, fmt.Sprintf("%v is under four epochs of %v", idle, epoch),
			fmt.Sprintf("take %v or more, or a shorter dataplane.epoch", least))
	}
	return idle
}

func (c *checker) proxy(at place, s *Service, mode Mode) {
	switch {
	case s.ProxyProtocol == "" || s.ProxyProtocol == ProxyNone:
	case mode == ModeXDP:
		c.refuse(at, "xdp can't write a PROXY header into a connection", "take none, or mode auto or userspace")
	case s.ProxyProtocol == ProxyV1 && s.Protocol == ProtocolUDP:
		c.refuse(at, "version 1 of the PROXY protocol does not know udp", "take v2 or none")
	}
}

func (c *checker) sources(raw *rawService, s *Service, mode Mode) {
	s.SourcePorts = scalar(c, raw.sourcePorts, PortRange{}, parseSourcePorts)
	for _, item := range raw.sourceAddresses.items {
		address := c.address(item, mode)
		switch {
		case !address.IsValid():
		case containsAddress(s.SourceAddresses, address):
			c.refuse(item.place, fmt.Sprintf("%v is listed already", address), "list each address once")
		case s.Method == MethodFullNAT && s.Address.IsValid() && address.Is4() != s.Address.Is4():
			c.refuse(item.place, fmt.Sprintf("%v is %s, but the backends of an %s service are %[3]s", address,
				family(address), family(s.Address)), fmt.Sprintf("list %s addresses", family(s.Address)))
		}
		s.SourceAddresses = append(s.SourceAddresses, address)
	}
	if n := len(raw.sourceAddresses.items); n > maxSources {
		c.refuse(raw.sourceAddresses.place, fmt.Sprintf("%d source addresses are over the limit of %d", n, maxSources),
			"list fewer")
	}
	if s.Method == MethodFullNAT || s.Method == "" {
		return
	}
	// An empty list chooses nothing and so says nothing wrong.
	if len(raw.sourceAddresses.items) > 0 {
		c.refuse(raw.sourceAddresses.place, fmt.Sprintf("method %s keeps the client's address", s.Method),
			"take them out, or take method fullnat")
	}
	if raw.sourcePorts.state == given {
		c.refuse(raw.sourcePorts.place, fmt.Sprintf("method %s keeps the client's port", s.Method),
			"take them out, or take method fullnat")
	}
}

func (c *checker) backend(raw *rawBackend, s *Service, several bool, checks stated, mode Mode) Backend {
	if raw.state == empty {
		c.refuse(raw.place, "the item is empty", "write a backend after the dash or take the dash out")
	}
	if raw.state != given {
		return Backend{}
	}
	b := Backend{
		Name:     scalar(c, c.required(raw.name), "", parseName),
		Address:  c.address(c.required(raw.address), mode),
		Port:     c.backendPort(raw.port, s, several),
		Weight:   c.number(raw.weight, defaultWeight, 0, maxWeight),
		Disabled: c.boolean(raw.disabled, false),
	}
	if health := raw.health.rawHealth; health != nil && health.state == given {
		b.Health = c.backendHealth(health, s, several, checks)
	}
	if s.Method.keepsFamily() && b.Address.IsValid() && s.Address.IsValid() && b.Address.Is4() != s.Address.Is4() {
		c.refuse(raw.address.place, fmt.Sprintf("%v is %s, but clients come by %s, and %s can't cross", b.Address,
			family(b.Address), family(s.Address), s.Method),
			fmt.Sprintf("take an %s address, or method ipip or gue", family(s.Address)))
	}
	return b
}

// backendPort is 0 where the backend gets packets to any of the service's several ports.
func (c *checker) backendPort(raw text, s *Service, several bool) uint16 {
	if !several {
		port := scalar(c, raw, s.Port, parsePortField)
		if s.Method.keepsPort() && port != 0 && s.Port != 0 && port != s.Port {
			c.refuse(raw.place, fmt.Sprintf("port %d is not the service's port %d, and under %s packets arrive with that",
				port, s.Port, s.Method), "leave the port out, or take method fullnat or nat")
		}
		return port
	}
	port := scalar(c, raw, 0, parsePortField)
	switch {
	case s.Method.keepsPort() && port != 0:
		c.refuse(raw.place, fmt.Sprintf("under %s packets arrive with the port that the client chose of the service's several",
			s.Method), "leave the port out, or take method fullnat or nat")
		return 0
	case s.Method.rewritesPort() && raw.state == absent:
		c.refuse(raw.place, fmt.Sprintf("is missing, and under %s the service's several ports become one of the backend's",
			s.Method), "write port: and that one, or take method dsr, ipip or gue")
	}
	return port
}

func (c *checker) distinctBackends(raw []rawBackend, s *Service) {
	names, sockets := map[string]int{}, map[netip.AddrPort]int{}
	for i, b := range s.Backends {
		if first, twice := names[b.Name]; twice && b.Name != "" {
			c.refuse(raw[i].name.place, fmt.Sprintf("backend %s stands in line %d already", b.Name,
				raw[first].name.line), "give it a name of its own")
		} else {
			names[b.Name] = i
		}
		if !b.Address.IsValid() || b.Port == 0 && !s.Method.keepsPort() {
			continue
		}
		socket := netip.AddrPortFrom(b.Address.WithZone(""), b.Port)
		if first, twice := sockets[socket]; twice {
			text := socket.String()
			if b.Port == 0 {
				text = socket.Addr().String()
			}
			c.refuse(raw[i].address.place, fmt.Sprintf("%s is backend %s of line %d already", text, s.Backends[first].Name,
				raw[first].line), "take one of them out; a weight gives a backend a larger share")
		} else {
			sockets[socket] = i
		}
	}
}

// together checks the services against each other, and returns who is where.
func (c *checker) together(raw []rawService, services []Service) endpoints {
	all, taken := newEndpoints(services)
	c.distinctEndpoints(raw, services[:taken], all)
	names, sources := map[string]int{}, map[netip.Addr]int{}
	for i, s := range services {
		if first, twice := names[s.Name]; twice && s.Name != "" {
			c.refuse(raw[i].name.place, fmt.Sprintf("service %s stands in line %d already", s.Name,
				raw[first].name.line), "give it a name of its own")
		} else {
			names[s.Name] = i
		}
		c.circles(&raw[i], &s, services, all)
		if raw[i].sourcePorts.state == broken || raw[i].sourcePorts.state == given && s.SourcePorts.IsZero() {
			continue
		}
		for j, address := range s.SourceAddresses {
			if !address.IsValid() {
				continue
			}
			if other, within := all.within(address, s.Protocol, []PortRange{s.SourcePorts}); within {
				c.refuse(raw[i].sourcePorts.place, fmt.Sprintf("ports %v of %v hold port %d of service %s on that address",
					s.SourcePorts, address, other.port, services[other.service].Name), "take a range without it")
			}
			first, shared := sources[address.WithZone("")]
			if !shared {
				sources[address.WithZone("")] = i
			} else if services[first].SourcePorts != s.SourcePorts {
				c.refuse(raw[i].sourceAddresses.items[j].place, fmt.Sprintf("%v has source ports %s here, but %s in service %s",
					address, orDefault(s.SourcePorts), orDefault(services[first].SourcePorts), services[first].Name),
					"give both services the same source_ports, or addresses of their own")
			}
		}
	}
	c.tunnelsApart(services)
	return all
}

// circles refuses backends that are services.
func (c *checker) circles(raw *rawService, s *Service, services []Service, all endpoints) {
	for i, b := range s.Backends {
		ports := []PortRange{{b.Port, b.Port}}
		if b.Port == 0 && s.Method.keepsPort() {
			ports = s.Ports
		}
		if other, is := all.within(b.Address, s.Protocol, ports); is {
			c.refuse(raw.backends.items[i].address.place, fmt.Sprintf("%s is the address of service %s, so that "+
				"connections would go in a circle", spellEndpoints(b.Address, PortRange{other.port, other.port}, s.Protocol),
				services[other.service].Name), "write the address of the server itself")
		}
	}
}

// lastName returns a field's own name.
func lastName(field string) string { return field[strings.LastIndexByte(field, '.')+1:] }

func orDefault(ports PortRange) string {
	if ports.IsZero() {
		return "by default"
	}
	return ports.String()
}

func containsAddress(list []netip.Addr, address netip.Addr) bool {
	return slices.ContainsFunc(list, func(a netip.Addr) bool { return a.WithZone("") == address.WithZone("") })
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}
