package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"

	"fairlead/loader"
	"fairlead/maps"
	"fairlead/userspace/announce"
	"fairlead/userspace/config"
)

// This file is about addresses of XDP's own, and about the devices that they are answered for on.

// ownTime is how long a start waits for its addresses to be its own. A conflict is found out within it.
const ownTime = 5 * time.Second

// own starts to claim the configuration's addresses that the host does not hold, and waits for the outcome.
func (d *daemon) own(ctx context.Context, tasks *errgroup.Group) error {
	announcer, err := announce.New(announce.Options{
		Logger: d.log,
		OnChange: func(owned []netip.Addr) {
			if err := d.manager.SetOwn(owned); err != nil {
				d.log.Error("answer for addresses of our own", "err", err)
			}
		},
	})
	if err != nil {
		return fmt.Errorf("announce addresses: %w", err)
	}
	d.announcer = announcer
	if err := d.claim(d.config); err != nil {
		return err
	}
	tasks.Go(func() error { return announcer.Run(ctx) })
	moved := d.drain(ctx, announcer.Ready(), ownTime)
	select {
	case <-announcer.Ready():
	default:
		if ctx.Err() == nil {
			d.log.Warn("addresses of our own are not announced yet: asking goes on")
		}
	}
	return d.nextHopsChanged(moved)
}

// claim says what is to be owned: what the configuration has announced, and what living connections yet come to.
func (d *daemon) claim(cfg *config.Config) error {
	w := announce.Wanted{Adopt: d.manager.Own()}
	for _, s := range cfg.Services {
		if s.Announce == config.AnnounceOff {
			continue
		}
		w.Addresses = append(w.Addresses, s.Addresses...)
		if s.Method == config.MethodFullNAT {
			w.Addresses = append(w.Addresses, s.SourceAddresses...)
		}
	}
	inv, err := d.manager.Set().Inventory()
	if err != nil {
		return err
	}
	for _, s := range inv.Services {
		for _, key := range s.Keys {
			if (s.Leaving || slices.Contains(s.LeavingKeys(), key)) && slices.Contains(w.Adopt, key.Addr()) {
				w.Addresses = append(w.Addresses, key.Addr())
			}
		}
	}
	slices.SortFunc(w.Addresses, netip.Addr.Compare)
	w.Addresses = slices.Compact(w.Addresses)
	for _, at := range d.loader.Attachments() {
		w.Interfaces = append(w.Interfaces, at.Interface)
	}
	above, err := vlansAbove(w.Interfaces)
	if err != nil {
		return err
	}
	w.Interfaces = append(w.Interfaces, above...)
	d.announcer.Set(w)
	return nil
}

// vlansAbove are the VLAN devices on these interfaces: XDP sees their frames, tags and all.
func vlansAbove(interfaces []string) (above []string, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	attached := make(map[int]bool)
	for _, l := range links {
		if slices.Contains(interfaces, l.Attrs().Name) {
			attached[l.Attrs().Index] = true
		}
	}
	for again := true; again; {
		again = false
		for _, l := range links {
			if a := l.Attrs(); l.Type() == "vlan" && attached[a.ParentIndex] && !attached[a.Index] {
				attached[a.Index], again = true, true
				above = append(above, a.Name)
			}
		}
	}
	return above, nil
}

// hostHolds tells whether the host's own stack holds an address, and by which interface.
func (d *daemon) hostHolds(a netip.Addr) (string, bool) {
	by, ok := d.held[a]
	return by, ok
}

// lookAtHost reads what the host holds: it decides which ports a source address may have.
func (d *daemon) lookAtHost() (err error) {
	d.held, err = announce.HostAddresses()
	return err
}

// devices tells the map manager what devices there are.
func (d *daemon) devices() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var list []maps.Device
	for _, l := range links {
		a := l.Attrs()
		if a.EncapType != "ether" || len(a.HardwareAddr) != 6 {
			continue
		}
		list = append(list, maps.Device{Index: uint32(a.Index), MTU: uint32(a.MTU), MAC: [6]byte(a.HardwareAddr)})
	}
	if len(list) > maps.MaxDevices {
		return fmt.Errorf("%d devices are more than the %d that the data plane has room for", len(list), maps.MaxDevices)
	}
	return d.manager.SetDevices(list)
}

// followDevices keeps what the data plane knows of devices current.
func (d *daemon) followDevices(ctx context.Context) error {
	updates, done := make(chan netlink.LinkUpdate, 64), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-updates:
			if !ok {
				return fmt.Errorf("watch devices: the kernel ended it")
			}
		}
		if err := d.devices(); err != nil {
			d.log.Error("follow devices", "err", err)
		}
	}
}

// Unload ends forwarding, as loader.Unload does, and leaves the groups that addresses of XDP's own had joined: nobody is
// to be answered any more.
func Unload(pinPath string) (removed []string, err error) {
	own, interfaces, err := joined(pinPath)
	if err != nil {
		return nil, err
	}
	removed, err = loader.Unload(pinPath)
	if err != nil {
		return removed, err
	}
	var errs []error
	for _, a := range own {
		for _, name := range interfaces {
			errs = append(errs, announce.Leave(name, a))
		}
	}
	return removed, errors.Join(errs...)
}

// joined are the addresses of XDP's own, and where their groups are joined. State of another version is not looked into.
func joined(pinPath string) (own []netip.Addr, interfaces []string, err error) {
	links, err := loader.Links(pinPath)
	if errors.Is(err, loader.ErrNothing) || errors.Is(err, loader.ErrSchema) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	raw, closer, err := loader.OpenMaps(pinPath)
	if errors.Is(err, loader.ErrNothing) || errors.Is(err, loader.ErrSchema) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer closer.Close()
	set, err := maps.NewSet(raw)
	if err != nil {
		return nil, nil, err
	}
	defer set.Close()
	all, err := set.Addresses()
	if err != nil {
		return nil, nil, err
	}
	for a, use := range all {
		if use&maps.AddressOwn != 0 {
			own = append(own, a)
		}
	}
	for _, at := range links {
		if at.Index != 0 {
			interfaces = append(interfaces, at.Interface)
		}
	}
	above, err := vlansAbove(interfaces)
	return own, append(interfaces, above...), err
}
