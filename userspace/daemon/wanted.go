package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps"
	"fairlead/userspace/config"
	"fairlead/userspace/neighbor"
)

// This file turns a configuration, with what the host knows, into what loader and map manager want.

func destinations(cfg *config.Config) (list []netip.Addr) {
	for _, s := range cfg.Services {
		for _, b := range s.Backends {
			list = append(list, b.Address)
		}
	}
	return list
}

// destinationsInUse are the configuration's backends and those that are leaving but have connections yet.
func (d *daemon) destinationsInUse() []netip.Addr {
	list := destinations(d.config)
	inv, err := d.manager.Set().Inventory()
	if err != nil {
		d.log.Error("look for leaving backends", "err", err)
		return list
	}
	for _, b := range inv.Backends {
		list = append(list, b.Address)
	}
	return list
}

// resolved is closed when all of these addresses have been looked up.
func (d *daemon) resolved(ctx context.Context, list []netip.Addr) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		deadline := time.Now().Add(nextHopsTime)
		for _, a := range list {
			for {
				hop, ok := d.watcher.Lookup(a)
				if ok && hop.State != neighbor.Resolving || time.Now().After(deadline) || ctx.Err() != nil {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	}()
	return done
}

var methods = map[config.Method]maps.Method{
	config.MethodFullNAT: maps.MethodFullNAT, config.MethodNAT: maps.MethodNAT, config.MethodDSR: maps.MethodDSR,
	config.MethodIPIP: maps.MethodIPIP, config.MethodGUE: maps.MethodGUE,
}

var policies = map[config.DownPolicy]maps.DownPolicy{
	config.DownReset: maps.DownReset, config.DownKeep: maps.DownKeep, config.DownRehash: maps.DownRehash,
}

// wanted is the configuration as the maps are to hold it.
func (d *daemon) wanted(cfg *config.Config) (maps.Wanted, error) {
	var w maps.Wanted
	var errs []error
	if err := d.lookAtHost(); err != nil {
		return w, err
	}
	d.again = time.Time{}
	now := time.Now()
	for i, s := range cfg.Services {
		judged, standing, next := judge(&s, d.knownOf(&s), now)
		if !next.IsZero() {
			d.again = earlier(d.again, next)
		}
		ws := maps.WantedService{
			Name: s.Name, Keys: slices.Collect(s.Endpoints()), Protocol: s.Protocol.Number(), RingSize: s.RingSize,
			AffinityClient: s.Affinity == config.AffinityClient, OnBackendDown: policies[s.OnBackendDown],
			IdleTimeout: s.IdleTimeout, Standing: standing,
		}
		for j, b := range s.Backends {
			if hop, ok := d.watcher.Lookup(b.Address); ok && s.Method == config.MethodDSR && hop.Gateway.IsValid() {
				errs = append(errs, cfg.Refuse(fmt.Sprintf("services[%d].backends[%d].address", i, j),
					fmt.Sprintf("%v is not on-link: the way to it goes by %v", b.Address, hop.Gateway),
					"dsr takes a backend on a network of this host's own; else use fullnat"))
			}
			is := judged[j]
			wb := maps.WantedBackend{
				Name: b.Name, Address: b.Address, Port: b.Port, Method: methods[s.Method], Weight: is.weight,
				Percent: is.percent, Out: is.out, Down: is.down, Tried: is.tried, Shown: is.shown,
			}
			if s.Method == config.MethodIPIP || s.Method == config.MethodGUE {
				wb.Tunnel = d.tunnelSource(s, b)
			}
			for _, source := range d.sources(s, b) {
				ports, err := d.sourcePorts(cfg, i, source)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				if other, overlaps := cfg.ServiceWithin(source, s.Protocol, ports); overlaps {
					port, _ := other.PortWithin(ports)
					errs = append(errs, cfg.Refuse(fmt.Sprintf("services[%d].source_ports", i),
						fmt.Sprintf("source ports %v of %v hold port %d of service %s", ports, source, port, other.Name),
						"give source_ports that leave it out, or other source_addresses"))
					continue
				}
				wb.Sources = append(wb.Sources, maps.WantedSource{Address: source, First: ports.First, Last: ports.Last})
			}
			ws.Backends = append(ws.Backends, wb)
		}
		w.Services = append(w.Services, ws)
	}
	return w, errors.Join(errs...)
}

// sources are fullnat's source addresses towards a backend: as configured, else the one that the host would use.
func (d *daemon) sources(s config.Service, b config.Backend) []netip.Addr {
	if s.Method != config.MethodFullNAT {
		return nil
	}
	if len(s.SourceAddresses) > 0 {
		return s.SourceAddresses
	}
	if hop, ok := d.watcher.Lookup(b.Address); ok && hop.Source.IsValid() {
		return []netip.Addr{hop.Source}
	}
	return nil
}

// sourcePorts are the ports of a source address: as configured; else all of them on an address of XDP's own, and on one
// of the host's what its local port range leaves. None may meet a connection of the host's own.
func (d *daemon) sourcePorts(cfg *config.Config, service int, source netip.Addr) (config.PortRange, error) {
	s := cfg.Services[service]
	_, held := d.hostHolds(source)
	switch {
	case s.SourcePorts.IsZero() && !held:
		return config.PortRange{First: 1024, Last: 65535}, nil
	case s.SourcePorts.IsZero():
		return d.hostPort, nil
	case held && s.SourcePorts.First <= d.local.Last && d.local.First <= s.SourcePorts.Last:
		return config.PortRange{}, cfg.Refuse(fmt.Sprintf("services[%d].source_ports", service),
			fmt.Sprintf("ports %v of %v meet the host's own, which uses %v (net.ipv4.ip_local_port_range)", s.SourcePorts,
				source, d.local),
			fmt.Sprintf("take ports outside, such as %v, or a source address that the host does not hold", d.hostPort))
	}
	return s.SourcePorts, nil
}

// tunnelSource is what outer packets to a backend come from: as configured, else the address that the host would use.
func (d *daemon) tunnelSource(s config.Service, b config.Backend) netip.Prefix {
	if p, ok := s.TunnelSource(b.Address); ok {
		return p
	}
	if hop, ok := d.watcher.Lookup(b.Address); ok && hop.Source.IsValid() {
		return netip.PrefixFrom(hop.Source, hop.Source.BitLen())
	}
	return netip.Prefix{}
}

// hopTags are a next hop's VLAN tags as the maps have them.
func hopTags(h neighbor.NextHop) (tags [2]uint16) {
	for i, id := range h.VLAN[:min(len(h.VLAN), len(tags))] {
		tags[i] = id
		if h.VLANProtocols[i] == unix.ETH_P_8021AD {
			tags[i] |= maps.Tag8021AD
		}
	}
	return tags
}

// nextHop is what the map manager is told of an address.
func (d *daemon) nextHop(a netip.Addr) maps.NextHop {
	hop, ok := d.watcher.Lookup(a)
	if !ok {
		return maps.NextHop{Reason: "not looked up yet", Pending: true}
	}
	return mapsNextHop(hop)
}

// mapsNextHop translates. A neighbour that has stopped answering keeps its last address: its connections may yet live.
func mapsNextHop(h neighbor.NextHop) maps.NextHop {
	vlan := hopTags(h)
	hop := maps.NextHop{
		Known:     len(h.MAC) == 6 && len(h.SourceMAC) == 6 && (h.State == neighbor.Resolved || h.State == neighbor.Failed),
		Interface: uint32(h.Index), MTU: uint32(h.MTU), Reason: h.Reason, Pending: h.State == neighbor.Resolving,
		Gateway: h.Gateway.IsValid(), VLAN: vlan,
	}
	if len(h.VLAN) > len(vlan) {
		hop.Known, hop.Reason = false, fmt.Sprintf("the route is over %d VLANs in each other: two are possible", len(h.VLAN))
	}
	if hop.Known {
		copy(hop.MAC[:], h.MAC)
		copy(hop.SourceMAC[:], h.SourceMAC)
	}
	// The maps hold 63 bytes of it.
	hop.Reason = hop.Reason[:min(len(hop.Reason), 63)]
	return hop
}

// settings are the load-time constants: what the configuration asks for, and what is yet living of earlier ones.
func (d *daemon) settings(cfg *config.Config) (loader.Settings, error) {
	s := loader.Settings{Connections: cfg.Dataplane.Connections, HalfOpen: cfg.Dataplane.HalfOpen, Journal: true}
	for _, service := range cfg.Services {
		s.IPv4 = s.IPv4 || service.Address.Is4()
		s.IPv6 = s.IPv6 || service.Address.Is6()
		s.TCP = s.TCP || service.Protocol == config.ProtocolTCP
		s.UDP = s.UDP || service.Protocol == config.ProtocolUDP
		useMethod(&s, methods[service.Method])
		for _, b := range service.Backends { // tunnels may cross families
			s.IPv4 = s.IPv4 || b.Address.Is4()
			s.IPv6 = s.IPv6 || b.Address.Is6()
		}
		s.AffinityClient = s.AffinityClient || service.Affinity == config.AffinityClient
	}
	s.Checks = anyThrough(cfg)
	s.TCP = s.TCP || s.Checks
	inv, err := livingInventory(cfg.Dataplane.PinPath)
	if err != nil {
		return s, err
	}
	for _, service := range inv.Services {
		s.IPv4 = s.IPv4 || service.Address().Is4()
		s.IPv6 = s.IPv6 || service.Address().Is6()
		s.TCP = s.TCP || service.Protocol == config.ProtocolTCP.Number()
		s.UDP = s.UDP || service.Protocol == config.ProtocolUDP.Number()
		s.AffinityClient = s.AffinityClient || service.AffinityClient
	}
	for _, b := range inv.Backends {
		useMethod(&s, b.Method)
		s.IPv4 = s.IPv4 || b.Address.Is4()
		s.IPv6 = s.IPv6 || b.Address.Is6()
	}
	return s, nil
}

func useMethod(s *loader.Settings, method maps.Method) {
	switch method {
	case maps.MethodFullNAT:
		s.FullNAT = true
	case maps.MethodNAT:
		s.NAT = true
	case maps.MethodDSR:
		s.DSR = true
	case maps.MethodIPIP, maps.MethodGUE:
		s.Tunnel = true
	}
}

// needs are what the configuration needs of devices.
type needs struct {
	vlan    bool     // VLAN tags are in use
	targets []string // that packets to backends leave by, in order
}

func (n needs) equal(o needs) bool { return n.vlan == o.vlan && slices.Equal(n.targets, o.targets) }

func (d *daemon) needsOf(cfg *config.Config, interfaces []string) (needs, error) {
	var n needs
	for _, a := range destinations(cfg) {
		if hop, ok := d.watcher.Lookup(a); ok && hop.Interface != "" {
			n.targets = append(n.targets, hop.Interface)
			n.vlan = n.vlan || len(hop.VLAN) > 0
		}
	}
	slices.Sort(n.targets)
	n.targets = slices.Compact(n.targets)
	above, err := vlansAbove(interfaces)
	n.vlan = n.vlan || len(above) > 0
	return n, err
}

// livingInventory is what the pinned maps hold; nothing, where none are pinned.
func livingInventory(pinPath string) (*maps.Inventory, error) {
	raw, closer, err := loader.OpenMaps(pinPath)
	if errors.Is(err, loader.ErrNothing) {
		return new(maps.Inventory), nil
	}
	if err != nil {
		return nil, err
	}
	defer closer.Close()
	set, err := maps.NewSet(raw)
	if err != nil {
		return nil, err
	}
	defer set.Close()
	return set.Inventory()
}

// interfaces are those to attach to: as configured; else those with a route to backends, those of default routes, which is
// where clients come from, and those attached already, where living connections may come from.
func (d *daemon) interfaces(cfg *config.Config) ([]string, error) {
	if len(cfg.Dataplane.Interfaces) > 0 {
		return cfg.Dataplane.Interfaces, nil
	}
	found := make(map[string]bool)
	for _, a := range destinations(cfg) {
		if hop, ok := d.watcher.Lookup(a); ok && hop.Interface != "" && hop.State != neighbor.Unsuitable {
			found[hop.Interface] = true
		}
	}
	attached, err := attachments(cfg.Dataplane.PinPath)
	if err != nil {
		return nil, err
	}
	for _, at := range attached {
		if at.Index != 0 {
			found[at.Interface] = true
		}
	}
	if err := defaultRoutes(found); err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, errors.New("no interface has a route to the backends or to clients: name them in dataplane.interfaces")
	}
	list := make([]string, 0, len(found))
	for name := range found {
		list = append(list, name)
	}
	slices.Sort(list)
	return list, nil
}

// defaultRoutes adds the Ethernet devices of default routes, by name.
func defaultRoutes(found map[string]bool) error {
	devices := make(map[int]bool)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Dst: nil}, netlink.RT_FILTER_DST)
		if err != nil {
			return fmt.Errorf("list default routes: %w", err)
		}
		for _, r := range routes {
			devices[r.LinkIndex] = true
			for _, hop := range r.MultiPath {
				devices[hop.LinkIndex] = true
			}
		}
	}
	for index := range devices {
		if index == 0 {
			continue
		}
		link, err := netlink.LinkByIndex(index)
		if err != nil {
			return fmt.Errorf("find device %d of a default route: %w", index, err)
		}
		if link.Attrs().EncapType == "ether" {
			found[link.Attrs().Name] = true
		}
	}
	return nil
}

// attachments are what is attached by the pins; nothing, where there are none.
func attachments(pinPath string) ([]loader.Attachment, error) {
	list, err := loader.Links(pinPath)
	if errors.Is(err, loader.ErrNothing) {
		return nil, nil
	}
	return list, err
}

func sameInterfaces(attached []loader.Attachment, names []string) bool {
	have := make([]string, 0, len(attached))
	for _, at := range attached {
		have = append(have, at.Interface)
	}
	slices.Sort(have)
	return slices.Equal(have, slices.Sorted(slices.Values(names)))
}

// fixed refuses what a running daemon can't change.
func (d *daemon) fixed(cfg *config.Config) error {
	var errs []error
	old := d.config
	refuse := func(field string, same bool) {
		if !same {
			errs = append(errs, cfg.Refuse(field, "can't be changed by a reload", "restart the daemon: connections live through that"))
		}
	}
	a, b := old.Dataplane, cfg.Dataplane
	refuse("dataplane.mode", a.Mode == b.Mode)
	refuse("dataplane.xdp", a.XDP == b.XDP)
	refuse("dataplane.connections", a.Connections == b.Connections)
	refuse("dataplane.half_open", a.HalfOpen == b.HalfOpen)
	refuse("dataplane.pin_path", a.PinPath == b.PinPath)
	refuse("dataplane.epoch", a.Epoch == b.Epoch)
	refuse("state_dir", old.StateDir == cfg.StateDir)
	return errors.Join(errs...)
}

// defaultSourcePorts is the larger of the two ranges that the host's own local port range leaves, from 1024 up: no
// connection of the host's own can meet one of ours.
func defaultSourcePorts(local config.PortRange) (config.PortRange, error) {
	below, above := int(local.First)-1024, 65535-int(local.Last)
	switch {
	case below >= above && below > 0:
		return config.PortRange{First: 1024, Last: local.First - 1}, nil
	case above > 0:
		return config.PortRange{First: local.Last + 1, Last: 65535}, nil
	}
	return config.PortRange{}, fmt.Errorf("the host's local port range %d-%d leaves no source ports for fullnat: narrow it "+
		"(sysctl net.ipv4.ip_local_port_range) or give source_addresses and source_ports", local.First, local.Last)
}

// localPorts is the range that the host's own connections take their ports from.
func localPorts() (config.PortRange, error) {
	const path = "/proc/sys/net/ipv4/ip_local_port_range"
	b, err := os.ReadFile(path)
	if err != nil {
		return config.PortRange{}, fmt.Errorf("read the host's local port range: %w", err)
	}
	var r config.PortRange
	if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &r.First, &r.Last); err != nil {
		return config.PortRange{}, fmt.Errorf("read the host's local port range: %s holds %q: %w", path, b, err)
	}
	return r, nil
}
