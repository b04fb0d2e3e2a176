package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/userspace/announce"
	"fairlead/userspace/config"
)

// This file is about the time in which nothing is attached: what is to be held then, and where.

// HoldOptions says what a configuration has held: packets for its services, and replies of its backends that the host's
// stack would get. They name no interfaces: HoldInterfaces finds them.
func HoldOptions(cfg *config.Config) (loader.HoldOptions, error) {
	opts := loader.HoldOptions{PinPath: cfg.Dataplane.PinPath, Mode: loader.XDPMode(cfg.Dataplane.XDP.String())}
	if cfg.Dataplane.Mode == config.ModeUserspace {
		return opts, cfg.Refuse("dataplane.mode", "in the userspace plane the host's own sockets answer for services, and what is "+
			"held never reaches them", "hold nothing: disable fairlead-hold.service")
	}
	local, err := localPorts()
	if err != nil {
		return opts, err
	}
	left, noneLeft := defaultSourcePorts(local)
	for _, s := range cfg.Services {
		protocol := s.Protocol.Number()
		for _, a := range s.Addresses {
			for _, r := range s.Ports {
				opts.Services = append(opts.Services, loader.HeldPorts{Address: a.WithZone(""), Protocol: protocol, First: r.First,
					Last: r.Last})
			}
		}
		switch s.Method {
		case config.MethodNAT:
			for _, b := range s.Backends {
				opts.Backends = append(opts.Backends, loader.HeldBackend{Address: plain(b), Protocol: protocol, Last: 65535})
			}
		case config.MethodFullNAT:
			// Whether the host will hold an address can't be known before the network is configured. On one that it does not
			// hold there are more ports by default, but nobody answers RST for it either.
			ports := s.SourcePorts
			if ports.IsZero() {
				if noneLeft != nil {
					return opts, noneLeft
				}
				ports = left
			}
			for _, a := range s.SourceAddresses {
				opts.Sources = append(opts.Sources, loader.HeldPorts{Address: a.WithZone(""), Protocol: protocol, First: ports.First,
					Last: ports.Last})
			}
			// The outgoing interface's address is not known yet: whoever it is, the backends are.
			for _, b := range s.Backends {
				if len(s.SourceAddresses) == 0 {
					opts.Backends = append(opts.Backends, loader.HeldBackend{Address: plain(b), Protocol: protocol, First: ports.First,
						Last: ports.Last})
				}
			}
		}
	}
	return opts, nil
}

func plain(b config.Backend) netip.AddrPort {
	return netip.AddrPortFrom(b.Address.WithZone(""), b.Port)
}

// HoldInterfaces are those to hold: as configured; else those with a route to backends, and those of default routes; and
// where there is no route yet, as before the network is configured, all Ethernet cards. It waits as long as this for
// those that are configured, or for any, to be there. What is missing after that is among the names all the same.
func HoldInterfaces(ctx context.Context, cfg *config.Config, wait time.Duration) (names []string, how string, err error) {
	// Subscribed first: a device that comes after the first look is not missed.
	updates, done := make(chan netlink.LinkUpdate, 64), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		return nil, "", fmt.Errorf("watch devices: %w", err)
	}
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		if names, how, err = holdInterfaces(cfg); err != nil {
			return nil, "", err
		}
		if len(names) > 0 && present(names) {
			return names, how, nil
		}
		select {
		case _, ok := <-updates:
			if !ok {
				return nil, "", errors.New("watch devices: the kernel ended it")
			}
		case <-timeout.C:
			if len(names) == 0 {
				return nil, "", fmt.Errorf("hold: no Ethernet device is there after %v", wait)
			}
			return names, how, nil
		case <-ctx.Done():
			return nil, "", ctx.Err()
		}
	}
}

func present(names []string) bool {
	return !slices.ContainsFunc(names, func(name string) bool {
		_, err := netlink.LinkByName(name)
		return err != nil
	})
}

func holdInterfaces(cfg *config.Config) (names []string, how string, err error) {
	if len(cfg.Dataplane.Interfaces) > 0 {
		return cfg.Dataplane.Interfaces, "as configured", nil
	}
	found := make(map[string]bool)
	if err := defaultRoutes(found); err != nil {
		return nil, "", err
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, "", fmt.Errorf("list devices: %w", err)
	}
	devices := make(map[int]netlink.Link)
	for _, l := range links {
		devices[l.Attrs().Index] = l
	}
	for _, a := range destinations(cfg) {
		routes, err := netlink.RouteGet(a.AsSlice())
		if err != nil {
			continue // there is none
		}
		for _, r := range routes {
			device := devices[r.LinkIndex]
			// As packets to backends leave: by the device below VLAN devices.
			for device != nil && device.Type() == "vlan" && device.Attrs().NetNsID == -1 {
				device = devices[device.Attrs().ParentIndex]
			}
			if device != nil && isEthernet(device) {
				found[device.Attrs().Name] = true
			}
		}
	}
	if len(found) > 0 {
		return slices.Sorted(maps.Keys(found)), "those with routes to backends and clients", nil
	}
	for _, l := range links {
		switch l.Type() {
		case "device", "veth", "tuntap":
			if isEthernet(l) {
				found[l.Attrs().Name] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found)), "all Ethernet devices, as there are no routes yet", nil
}

func isEthernet(l netlink.Link) bool {
	return l.Attrs().EncapType == "ether" && l.Attrs().RawFlags&unix.IFF_LOOPBACK == 0
}

// UnloadHeld ends forwarding, and has packets held from then on, as loader.UnloadHeld does. The groups that addresses of
// XDP's own had joined are left: nobody is to be answered any more.
func UnloadHeld(opts loader.HoldOptions) (report *loader.HoldReport, removed []string, err error) {
	own, interfaces, err := joined(opts.PinPath)
	if err != nil {
		return nil, nil, err
	}
	report, removed, err = loader.UnloadHeld(opts)
	if err != nil {
		return report, removed, err
	}
	var errs []error
	for _, a := range own {
		for _, name := range interfaces {
			errs = append(errs, announce.Leave(name, a))
		}
	}
	return report, removed, errors.Join(errs...)
}
