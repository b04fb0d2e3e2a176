package control

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"fairlead/maps"
)

// Find is the one connection that a request means, as the connection table has it. The error says what there is instead.
func (r CloseRequest) Find(set *maps.Set, inv *maps.Inventory) (maps.Connection, error) {
	services, err := findServices(inv, r.Service)
	if err != nil {
		return maps.Connection{}, err
	}
	client := netip.AddrPortFrom(r.Client.Addr().Unmap().WithZone(""), r.Client.Port())
	var found []maps.Connection
	opening := false
	var places []string
	for _, s := range services {
		for _, at := range s.Keys {
			if at.Addr().Is4() != client.Addr().Is4() {
				continue
			}
			t := maps.Tuple{Source: client, Destination: at, Protocol: s.Protocol}
			conn, ok, err := set.Connections.Get(t)
			if err != nil {
				return maps.Connection{}, err
			}
			if ok {
				found = append(found, conn)
				places = append(places, at.String())
				continue
			}
			if _, ok, err = set.HalfOpen.Get(t); err != nil {
				return maps.Connection{}, err
			}
			opening = opening || ok
		}
	}
	to := ""
	if r.Service != "" {
		to = " to " + r.Service
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return maps.Connection{}, fmt.Errorf("%v has several connections: say to which service address: %s", client,
			strings.Join(places, ", "))
	case opening:
		return maps.Connection{}, fmt.Errorf("the connection from %v%s is half-open: it can be closed once it is confirmed, "+
			"and ends by itself if it never is", client, to)
	}
	return maps.Connection{}, fmt.Errorf("no connection from %v%s", client, to)
}

// findServices are the services that a word means, each with the addresses and ports that it means: by name, or by
// address and port. No word means all.
func findServices(inv *maps.Inventory, word string) (found []maps.Service, err error) {
	address, bad := netip.ParseAddrPort(word)
	var known []string
	for _, s := range inv.Services {
		switch {
		case word == "" || s.Name == word:
			found = append(found, s)
		case bad == nil && slices.Contains(s.Keys, address):
			s.Keys = []netip.AddrPort{address}
			found = append(found, s)
		}
		known = append(known, s.Name)
	}
	if len(found) > 0 || word == "" {
		return found, nil
	}
	if len(known) == 0 {
		return nil, fmt.Errorf("there is no service %s: there is none at all", word)
	}
	slices.Sort(known)
	return nil, fmt.Errorf("there is no service %s: there are %s", word, strings.Join(slices.Compact(known), ", "))
}
