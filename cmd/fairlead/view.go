package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"fairlead/bpf"
	"fairlead/loader"
	"fairlead/maps"
	"fairlead/userspace/config"
)

func pinPathFlag() cli.Flag {
	return &cli.StringFlag{Name: "pin-path",
		Usage: "look for the pins in `DIRECTORY`, whatever the configuration says; it is not read then"}
}

// pinPath is where the pins are, by flag or by configuration, and the node's name if it is known.
func pinPath(c *cli.Context) (path, node string, err error) {
	if path = c.String("pin-path"); path != "" {
		return path, "", nil
	}
	cfg, err := config.Load(c.String("config"))
	if err != nil {
		return "", "", fmt.Errorf("%w\nwith --pin-path DIRECTORY this command does without the configuration", err)
	}
	return cfg.Dataplane.PinPath, cfg.Node, nil
}

// view is the pinned maps, opened for reading: with a daemon or without one.
type view struct {
	path, node string
	raw        *bpf.FairleadMaps
	set        *maps.Set
	inv        *maps.Inventory
	rings      map[uint32][]maps.Slot
	closer     io.Closer
}

// openView opens the pinned maps of a command's configuration. Errors: loader.ErrNothing.
func openView(c *cli.Context) (*view, error) {
	path, node, err := pinPath(c)
	if err != nil {
		return nil, err
	}
	v := &view{path: path, node: node, rings: make(map[uint32][]maps.Slot)}
	v.raw, v.closer, err = loader.OpenMaps(path)
	if errors.Is(err, loader.ErrNothing) {
		what := "no daemon runs: start it with `fairlead run`"
		if pid := loader.Holder(path); pid != 0 {
			what = fmt.Sprintf("a daemon runs (pid %d), and has attached nothing: its log says why", pid)
		}
		if s, err := loader.ReadHold(path); err == nil {
			var names []string
			for _, at := range s.Interfaces {
				names = append(names, at.Interface)
			}
			what += fmt.Sprintf("; held meanwhile: %s (`fairlead hold --status`)", strings.Join(names, ", "))
		}
		return nil, fmt.Errorf("%w; %s", err, what)
	}
	if err != nil {
		return nil, err
	}
	if v.set, err = maps.NewSet(v.raw); err != nil {
		return nil, errors.Join(err, v.closer.Close())
	}
	if v.inv, err = v.set.Inventory(); err != nil {
		return nil, errors.Join(err, v.close())
	}
	return v, nil
}

func (v *view) close() error { return errors.Join(v.set.Close(), v.closer.Close()) }

// ring reads a service's ring once. One without a ring is being taken away: it has no slots.
func (v *view) ring(service uint32) ([]maps.Slot, error) {
	if slots, ok := v.rings[service]; ok {
		return slots, nil
	}
	slots, err := v.set.Ring(service)
	if err != nil && !errors.Is(err, maps.ErrNoRing) {
		return nil, err
	}
	v.rings[service] = slots
	return slots, nil
}

func backendAddress(b *maps.Backend) netip.AddrPort { return netip.AddrPortFrom(b.Address, b.Port) }

// serviceName is how a service is called: by number while its name is being written.
func serviceName(s maps.Service) string { return cmp.Or(s.Name, fmt.Sprintf("#%d", s.ID)) }

func (v *view) serviceName(id uint32) string {
	s, _ := v.inv.Service(id)
	s.ID = id
	return serviceName(s)
}

func (v *view) backendName(id uint32) string {
	if id == maps.NoBackend {
		return "none"
	}
	if b, ok := v.inv.Backend(id); ok {
		return b.Name
	}
	return fmt.Sprintf("#%d", id)
}

// findServices are the services that a word means: by name, or by address and port. Two may have one name, where one of
// them is leaving.
func (v *view) findServices(word string) ([]maps.Service, error) {
	address, err := parseAddrPort(word)
	isAddress := err == nil
	var found []maps.Service
	var known []string
	for _, s := range v.inv.Services {
		if at := slices.Index(s.Keys, address); isAddress && at >= 0 {
			// The one that was asked for stands for all.
			s.Keys = append([]netip.AddrPort{address}, slices.Delete(slices.Clone(s.Keys), at, at+1)...)
			found = append(found, s)
		} else if s.Name == word {
			found = append(found, s)
		}
		known = append(known, s.Name)
	}
	if len(found) == 0 {
		return nil, unknown("service", word, known)
	}
	return found, nil
}

// oneService is the service that a word means; of two with one name, the one that is not leaving.
func (v *view) oneService(word string) (maps.Service, error) {
	found, err := v.findServices(word)
	if err != nil {
		return maps.Service{}, err
	}
	if staying := slices.DeleteFunc(slices.Clone(found), func(s maps.Service) bool { return s.Leaving }); len(staying) == 1 {
		found = staying
	}
	if len(found) > 1 {
		var which []string
		for _, s := range found {
			which = append(which, s.AddrPort().String())
		}
		return maps.Service{}, fmt.Errorf("service %s: there are several: say which: %s", word, strings.Join(which, ", "))
	}
	return found[0], nil
}

// findBackends are the backends that a word means: `backend`, or `service/backend`.
func (v *view) findBackends(word string) ([]maps.Backend, error) {
	var found []maps.Backend
	var known []string
	for _, b := range v.inv.Backends {
		full := v.serviceName(b.Service) + "/" + b.Name
		if b.Name == word || full == word {
			found = append(found, b)
		}
		known = append(known, full)
	}
	if len(found) == 0 {
		return nil, unknown("backend", word, known)
	}
	return found, nil
}

// unknown names what there is instead.
func unknown(kind, word string, known []string) error {
	if len(known) == 0 {
		return fmt.Errorf("there is no %s %s: there is none at all", kind, word)
	}
	slices.Sort(known)
	known = slices.Compact(known)
	const show = 20
	more := ""
	if len(known) > show {
		more = fmt.Sprintf(" and %d more", len(known)-show)
		known = known[:show]
	}
	return fmt.Errorf("there is no %s %s: there are %s%s", kind, word, strings.Join(known, ", "), more)
}

// parseAddrPort reads ADDRESS:PORT, an IPv6 address in brackets.
func parseAddrPort(word string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(word)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not ADDRESS:PORT, as in 198.51.100.7:40000 or [2001:db8::7]:40000", word)
	}
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port()), nil
}
