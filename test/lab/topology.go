package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"sync"
)

// Options describe a topology. The zero value is three backends, sixteen client addresses a family, a plain router, and
// the default services.
type Options struct {
	Backends        int  // default 3; at most 200 in all, with those added later
	ClientAddresses int  // of each family; default 16, at most 200
	Masquerade      bool // the router hides the clients behind its own address
	Unhidden        int  // but so many client addresses of each family, the last ones, of which it keeps no track
	DropInvalid     bool // where it masquerades, it drops what fits no connection that it knows of
	EdgeForwards    bool // the edge's kernel routes, too
	ByEdge          bool // backends answer clients by way of the edge, as nat takes it, not by the router

	// Services are the virtual addresses. The router sends those outside its segment with the edge to the edge; those
	// inside it (SegmentServices) are left to ARP and NDP. Nobody holds them. Default, where DSRServices are empty too:
	// DefaultServices.
	Services []netip.Addr
	// DSRServices are virtual addresses as well, and every backend holds them silently, so that it answers clients itself:
	// for dsr, and for tunnels, which bring clients' packets whole.
	DSRServices []netip.Addr
	// TunnelSources are where the edge's tunnels begin. Nobody holds them; routers on the backends' side send what
	// concerns them, ICMP errors, to the edge.
	TunnelSources []netip.Prefix

	// FrontMTU puts a stretch of that MTU, in bytes, between two routers into the clients' way to the edge; BackMTU one
	// into the way from the edge's segment to the backends, which then are on a segment of their own. 0: none.
	FrontMTU, BackMTU int

	MTU    int // of everything else, bytes; default 1500
	Queues int // of each interface; default 1
}

// DefaultServices are 192.0.2.10 and 2001:db8::10.
func DefaultServices() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::10")}
}

// SegmentServices are addresses of the segment that router and edge share, which nobody holds: 10.0.0.10 and fd00:a::10
// with one arm, 10.0.1.10 and fd00:f::10 with two.
func SegmentServices(twoArms bool) []netip.Addr {
	if twoArms {
		return frontNet.addresses(serviceHost)
	}
	return backNet.addresses(serviceHost)
}

// Names of interfaces within a topology.
const (
	ClientsInterface = "eth0" // of the clients
	BackendInterface = "eth0" // of every backend
	RouterOutside    = "wan"  // of the router, to the clients
	stretchInterface = "stretch"
)

// Topology is clients behind a router, an edge that forwards, and backends, in both families:
//
//	one arm   clients ── router ─┬─ edge            two arms   clients ── router ─┬─ front ─ edge ─ back ─┬─ backends
//	                             └─ backends                                      └────────── back ───────┘
//
// Backends answer whoever is off their segment by way of the router, or of the edge (Options.ByEdge), and the edge
// directly. Options.FrontMTU puts "clients ── near ══ router" in front, Options.BackMTU puts "gate ══ far ── backends" in
// the backends' place on the segment.
type Topology struct {
	*Lab
	Clients, Router, Edge *Node
	Near                  *Node // the clients' router, where Options.FrontMTU is given
	Gate, Far             *Node // the routers before the backends, where Options.BackMTU is given

	Services []netip.Addr // all virtual addresses, DSR ones last
	// EdgeFront is the edge's interface to the router, EdgeBack the one to the backends: the same with one arm.
	EdgeFront, EdgeBack string

	options     Options
	back        *Segment // of edge, router, and gate or backends
	servers     *Segment // of the backends
	serversNet  subnet
	clients     []netip.Addr
	edge        []netip.Addr
	mu          sync.Mutex
	backends    []*Backend
	edges       int
	sourcesUsed int
}

// Backend is a node that serves.
type Backend struct {
	*Node
	IPv4, IPv6 netip.Addr
}

// subnet is one segment's addresses in both families. Host 11 is 10.0.0.11 and fd00:a::11: the hexadecimal digits of
// the last group are the decimal ones of the number.
type subnet struct{ v4, v6 netip.Prefix }

var (
	clientsNet = subnet{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:c::/64")}
	frontNet   = subnet{netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("fd00:f::/64")}
	backNet    = subnet{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00:a::/64")}
	// Those of topologies with stretches.
	nearNet    = subnet{netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd00:2::/64")}
	farNet     = subnet{netip.MustParsePrefix("10.0.3.0/24"), netip.MustParsePrefix("fd00:3::/64")}
	serversNet = subnet{netip.MustParsePrefix("10.0.4.0/24"), netip.MustParsePrefix("fd00:4::/64")}
)

const (
	edgeHost       = 1
	maxEdges       = 9
	serviceHost    = 10
	firstHost      = 11 // backends and clients
	maxHosts       = 200
	firstSource    = 220 // further addresses for the edge
	maxSources     = 30
	gateHost       = 253
	routerHost     = 254
	frontSegment   = "front"
	backSegment    = "back"
	serversSegment = "servers"
)

func (s subnet) host(number int) []netip.Prefix {
	v4 := s.v4.Addr().As4()
	v4[3] = byte(number)
	v6 := s.v6.Addr().As16()
	digits, _ := strconv.ParseUint(strconv.Itoa(number), 16, 16)
	v6[14], v6[15] = byte(digits>>8), byte(digits)
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4(v4), s.v4.Bits()),
		netip.PrefixFrom(netip.AddrFrom16(v6), s.v6.Bits()),
	}
}

func (s subnet) addresses(number int) []netip.Addr {
	host := s.host(number)
	return []netip.Addr{host[0].Addr(), host[1].Addr()}
}

func (s subnet) contains(address netip.Addr) bool {
	return s.v4.Contains(address) || s.v6.Contains(address)
}

// OneArm opens a lab in which the edge has one interface, eth0, on the segment that the router and the backends are on.
func OneArm(prefix string, options Options) (*Topology, error) {
	return open(prefix, options, &Topology{EdgeFront: "eth0", EdgeBack: "eth0"})
}

// TwoArm opens a lab in which the edge has an interface front on a segment with the router, and an interface back on a
// segment with the backends, which the router is on too.
func TwoArm(prefix string, options Options) (*Topology, error) {
	return open(prefix, options, &Topology{EdgeFront: "front", EdgeBack: "back"})
}

func open(prefix string, options Options, t *Topology) (*Topology, error) {
	if options.Backends == 0 {
		options.Backends = 3
	}
	if options.ClientAddresses == 0 {
		options.ClientAddresses = 16
	}
	if options.Services == nil && options.DSRServices == nil {
		options.Services = DefaultServices()
	}
	if options.ClientAddresses < 1 || options.ClientAddresses > maxHosts {
		return nil, fmt.Errorf("build topology %s: %d client addresses: want 1 to %d", prefix,
			options.ClientAddresses, maxHosts)
	}
	if options.Unhidden < 0 || options.Unhidden > options.ClientAddresses {
		return nil, fmt.Errorf("build topology %s: %d of %d client addresses unhidden: want no more than there are", prefix,
			options.Unhidden, options.ClientAddresses)
	}
	if options.Backends < 0 || options.Backends > maxHosts {
		return nil, fmt.Errorf("build topology %s: %d backends: want 1 to %d", prefix, options.Backends, maxHosts)
	}
	l, err := New(prefix)
	if err != nil {
		return nil, err
	}
	t.Lab, t.options = l, options
	t.Services = slices.Concat(options.Services, options.DSRServices)
	if err := t.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("build topology %s: %w", prefix, err), l.Close())
	}
	return t, nil
}

func (t *Topology) build() error {
	outside, err := t.Segment("clients", t.options.MTU)
	if err != nil {
		return err
	}
	if t.back, err = t.Segment(backSegment, t.options.MTU); err != nil {
		return err
	}
	t.servers, t.serversNet = t.back, backNet
	front, toEdge := t.back, backNet
	if t.twoArms() {
		if front, err = t.Segment(frontSegment, t.options.MTU); err != nil {
			return err
		}
		toEdge = frontNet
	}
	if t.options.BackMTU != 0 {
		t.serversNet = serversNet
		if t.servers, err = t.Segment(serversSegment, t.options.MTU); err != nil {
			return err
		}
	}
	for _, node := range []struct {
		name   string
		to     **Node
		wanted bool
	}{
		{"clients", &t.Clients, true}, {"router", &t.Router, true}, {"edge", &t.Edge, true},
		{"near", &t.Near, t.options.FrontMTU != 0}, {"gate", &t.Gate, t.options.BackMTU != 0}, {"far", &t.Far, t.options.BackMTU != 0},
	} {
		if !node.wanted {
			continue
		}
		if *node.to, err = t.Node(node.name); err != nil {
			return err
		}
	}

	var addresses []netip.Prefix
	for i := range t.options.ClientAddresses {
		host := clientsNet.host(firstHost + i)
		addresses = append(addresses, host...)
		t.clients = append(t.clients, host[0].Addr(), host[1].Addr())
	}
	t.edges = 1
	t.edge = backNet.addresses(edgeHost)
	err = errors.Join(
		t.join(t.Clients, outside, ClientsInterface, addresses),
		// Many connections to one address take many local ports, and take them again at once in the next run.
		t.Clients.Sysctl("net.ipv4.ip_local_port_range", "1024 65535"),
		t.Clients.Sysctl("net.ipv4.tcp_tw_reuse", "1"),
		t.Clients.AddDefaultRoutes(clientsNet.addresses(routerHost)...),
		t.buildFront(outside),
		t.join(t.Router, t.back, backSegment, backNet.host(routerHost)),
		t.Router.SetForwarding(true),
		t.joinEdge(t.Edge, edgeHost),
		t.Edge.SetForwarding(t.options.EdgeForwards))
	hidden := []string{backSegment}
	if err == nil && t.twoArms() {
		hidden = append(hidden, frontSegment)
		err = t.join(t.Router, front, frontSegment, toEdge.host(routerHost))
	}
	if err != nil {
		return err
	}
	steps := []error{t.Edge.AddDefaultRoutes(toEdge.addresses(routerHost)...), t.buildBack(), t.routeTunnels(t.Router)}
	for _, service := range t.Services {
		if !toEdge.contains(service) {
			gateway := sameFamily(toEdge.addresses(edgeHost), service)[0]
			steps = append(steps, t.Router.AddRoute(netip.PrefixFrom(service, service.BitLen()), gateway))
		}
	}
	if t.options.Masquerade {
		steps = append(steps, t.Router.Masquerade(Masquerading{
			Interfaces: hidden, Except: t.clients[2*(t.options.ClientAddresses-t.options.Unhidden):], DropInvalid: t.options.DropInvalid,
		}))
	}
	if err := errors.Join(steps...); err != nil {
		return err
	}
	for range t.options.Backends {
		if _, err := t.AddBackend(); err != nil {
			return err
		}
	}
	return nil
}

// buildFront connects the router to the clients' segment: itself, or by way of near and a stretch.
func (t *Topology) buildFront(outside *Segment) error {
	if t.Near == nil {
		return t.join(t.Router, outside, RouterOutside, clientsNet.host(routerHost))
	}
	const near, router = 1, 2
	err := errors.Join(
		t.join(t.Near, outside, ClientsInterface, clientsNet.host(routerHost)),
		t.Cable(t.Near, Link{Name: stretchInterface, Addresses: nearNet.host(near), MTU: t.options.FrontMTU},
			t.Router, Link{Name: RouterOutside, Addresses: nearNet.host(router), MTU: t.options.FrontMTU}),
		t.Near.SetForwarding(true))
	if err != nil {
		return err
	}
	return errors.Join(t.Near.AddDefaultRoutes(nearNet.addresses(router)...),
		t.Router.addRoutes(clientsNet, nearNet.addresses(near)))
}

// buildBack puts gate, a stretch and far between the edge's segment and the backends', where that is asked for.
func (t *Topology) buildBack() error {
	if t.Gate == nil {
		return nil
	}
	const gate, far = 1, 2
	err := errors.Join(
		t.join(t.Gate, t.back, backSegment, backNet.host(gateHost)),
		t.Cable(t.Gate, Link{Name: stretchInterface, Addresses: farNet.host(gate), MTU: t.options.BackMTU},
			t.Far, Link{Name: stretchInterface, Addresses: farNet.host(far), MTU: t.options.BackMTU}),
		t.join(t.Far, t.servers, serversSegment, serversNet.host(routerHost)),
		t.Gate.SetForwarding(true), t.Far.SetForwarding(true))
	if err != nil {
		return err
	}
	steps := []error{
		t.Far.AddDefaultRoutes(farNet.addresses(gate)...),
		t.Gate.addRoutes(serversNet, farNet.addresses(far)),
		t.answerBy(t.Gate),
		t.routeTunnels(t.Gate),
	}
	for _, node := range []*Node{t.Edge, t.Router} {
		steps = append(steps, node.addRoutes(serversNet, backNet.addresses(gateHost)))
	}
	return errors.Join(steps...)
}

// answerBy gives a node of the edge's segment the way back to the clients: by the router, or by the edge.
func (t *Topology) answerBy(n *Node) error {
	if !t.options.ByEdge {
		return n.AddDefaultRoutes(backNet.addresses(routerHost)...)
	}
	err := n.AddDefaultRoutes(t.edge...)
	if t.options.Masquerade && !t.twoArms() {
		// Clients have the router's address, which is on the segment: the answers are the edge's all the same.
		for i, router := range backNet.addresses(routerHost) {
			err = errors.Join(err, n.AddRoute(netip.PrefixFrom(router, router.BitLen()), t.edge[i]))
		}
	}
	return err
}

// routeTunnels sends a node of the edge's segment what concerns the edge's tunnels to the edge.
func (t *Topology) routeTunnels(n *Node) (err error) {
	for _, source := range t.options.TunnelSources {
		err = errors.Join(err, n.AddRoute(source, sameFamily(t.edge, source.Addr())[0]))
	}
	return err
}

// joinEdge connects an edge to its segments.
func (t *Topology) joinEdge(n *Node, host int) error {
	if !t.twoArms() {
		return t.join(n, t.back, t.EdgeBack, backNet.host(host))
	}
	front, err := t.Segment(frontSegment, t.options.MTU)
	if err != nil {
		return err
	}
	return errors.Join(t.join(n, front, t.EdgeFront, frontNet.host(host)), t.join(n, t.back, t.EdgeBack, backNet.host(host)))
}

// AddEdge adds another edge to the living lab, with the same interfaces as the first: edge2 is 10.0.0.2 and fd00:a::2
// (with two arms 10.0.1.2 and fd00:f::2 too), and so on. The router goes on sending services' addresses to the first.
func (t *Topology) AddEdge() (*Node, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.edges == maxEdges {
		return nil, fmt.Errorf("add edge: the lab has its %d already", maxEdges)
	}
	number := t.edges + 1
	node, err := t.Node(fmt.Sprintf("edge%d", number))
	if err == nil {
		err = t.joinEdge(node, number)
	}
	if err == nil {
		toRouter := backNet
		if t.twoArms() {
			toRouter = frontNet
		}
		err = errors.Join(node.AddDefaultRoutes(toRouter.addresses(routerHost)...), node.SetForwarding(t.options.EdgeForwards))
		if t.Gate != nil {
			err = errors.Join(err, node.addRoutes(serversNet, backNet.addresses(gateHost)))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("add edge: %w", err)
	}
	t.edges = number
	return node, nil
}

// SetFrontMTU changes the MTU of the stretch before the edge, which Options.FrontMTU has made.
func (t *Topology) SetFrontMTU(mtu int) error {
	if t.Near == nil {
		return fmt.Errorf("set the MTU before the edge to %d: there is no stretch: give FrontMTU in the options", mtu)
	}
	return errors.Join(t.Near.SetMTU(stretchInterface, mtu), t.Router.SetMTU(RouterOutside, mtu))
}

// SetBackMTU changes the MTU of the stretch behind the edge, which Options.BackMTU has made.
func (t *Topology) SetBackMTU(mtu int) error {
	if t.Gate == nil {
		return fmt.Errorf("set the MTU behind the edge to %d: there is no stretch: give BackMTU in the options", mtu)
	}
	return errors.Join(t.Gate.SetMTU(stretchInterface, mtu), t.Far.SetMTU(stretchInterface, mtu))
}

func (t *Topology) twoArms() bool { return t.EdgeFront != t.EdgeBack }

func (t *Topology) join(n *Node, s *Segment, name string, addresses []netip.Prefix) error {
	return n.Join(s, Link{Name: name, Addresses: addresses, Queues: t.options.Queues})
}

// AddBackend adds the next backend to the living lab: ws1, ws2 and so on, 10.0.0.11 and fd00:a::11 and so on; behind a
// stretch, 10.0.4.11 and fd00:4::11.
func (t *Topology) AddBackend() (*Backend, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	number := len(t.backends)
	if number >= maxHosts {
		return nil, fmt.Errorf("add backend: the lab has its %d already", maxHosts)
	}
	node, err := t.Node(fmt.Sprintf("ws%d", number+1))
	if err != nil {
		return nil, err
	}
	host := t.serversNet.host(firstHost + number)
	err = t.join(node, t.servers, BackendInterface, host)
	if err == nil && t.Far != nil {
		err = node.AddDefaultRoutes(serversNet.addresses(routerHost)...)
	} else if err == nil {
		err = t.answerBy(node)
	}
	if err == nil && len(t.options.DSRServices) > 0 {
		err = node.Hold(t.options.DSRServices...)
	}
	if err != nil {
		return nil, fmt.Errorf("add backend: %w", err)
	}
	backend := &Backend{Node: node, IPv4: host[0].Addr(), IPv6: host[1].Addr()}
	t.backends = append(t.backends, backend)
	return backend, nil
}

// Backends are those of Options and those added since, oldest first.
func (t *Topology) Backends() []*Backend {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.backends)
}

// Address is the backend's own address of the family that another address is of.
func (b *Backend) Address(like netip.Addr) netip.Addr {
	return sameFamily([]netip.Addr{b.IPv4, b.IPv6}, like)[0]
}

// ClientAddresses are the clients' addresses of the family that another address is of.
func (t *Topology) ClientAddresses(like netip.Addr) []netip.Addr { return sameFamily(t.clients, like) }

// EdgeAddress is the edge's address on the backends' segment, of the family that another address is of: the one that
// backends see under fullnat.
func (t *Topology) EdgeAddress(like netip.Addr) netip.Addr { return sameFamily(t.edge, like)[0] }

// RouterAddress is the router's address on the backends' segment, of the family that another address is of.
func (t *Topology) RouterAddress(like netip.Addr) netip.Addr {
	return sameFamily(backNet.addresses(routerHost), like)[0]
}

// SourceAddresses sets aside count further addresses of the backends' segment, which nobody holds, of the family that
// another address is of: source addresses for fullnat, or virtual addresses on the segment. At most 30 in all.
func (t *Topology) SourceAddresses(like netip.Addr, count int) ([]netip.Addr, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sourcesUsed+count > maxSources {
		return nil, fmt.Errorf("set aside %d source addresses: %d of %d are left", count, maxSources-t.sourcesUsed, maxSources)
	}
	var addresses []netip.Addr
	for range count {
		addresses = append(addresses, sameFamily(backNet.addresses(firstSource+t.sourcesUsed), like)[0])
		t.sourcesUsed++
	}
	return addresses, nil
}

func sameFamily(addresses []netip.Addr, like netip.Addr) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(addresses), func(a netip.Addr) bool { return a.Is4() != like.Is4() })
}
