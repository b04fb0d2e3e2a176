package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/urfave/cli/v2"

	"fairlead/maps"
)

func backendsCommand() *cli.Command {
	return &cli.Command{
		Name:  "backends",
		Usage: "list, drain, resume and weigh backends",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "list backends: their state, weight and health",
				Description: "Read from the pinned maps: with a daemon or without one, as it left them. Live connections are counted\n" +
					"by walking the tables, and so with -o wide, json and jsonl alone.",
				Flags: []cli.Flag{
					&cli.StringSliceFlag{Name: "service", Usage: "of `SERVICE` alone: its name or address:port"},
					outputFlag(), pinPathFlag(),
				},
				Action: listBackends,
			},
			drainCommand(), resumeCommand(), weightCommand(),
		},
	}
}

// backendItem is a backend as it is listed.
type backendItem struct {
	Service        string         `json:"service"`
	ServiceAddress netip.AddrPort `json:"service_address"`
	Name           string         `json:"name"`
	Address        netip.AddrPort `json:"address"`
	Method         string         `json:"method"`
	condition
	Connections *int `json:"connections,omitempty"` // counted; half-open ones are not among them
}

func listBackends(c *cli.Context) (err error) {
	if _, err := words(c, 0, 0); err != nil {
		return err
	}
	v, err := openView(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	chosen := v.inv.Services
	if names := c.StringSlice("service"); len(names) > 0 {
		if chosen, err = v.namedServices(names); err != nil {
			return err
		}
	}
	var counts map[uint32]int
	if formatOf(c) != formatTable {
		counts = make(map[uint32]int)
		if err := v.set.Connections.Walk(func(conn *maps.Connection) error {
			counts[conn.Backend]++
			return nil
		}); err != nil {
			return err
		}
	}
	type item = backendItem
	l := newList(c.App.Writer, formatOf(c),
		column[item]{title: "SERVICE", text: func(i *item) string { return i.Service }},
		column[item]{title: "BACKEND", text: func(i *item) string { return i.Name }},
		column[item]{title: "ADDRESS", text: func(i *item) string { return addressText(i.Address) }},
		column[item]{title: "METHOD", wide: true, text: func(i *item) string { return i.Method }},
		column[item]{title: "STATE", text: func(i *item) string { return i.stateText() }},
		column[item]{title: "WEIGHT", text: func(i *item) string { return i.weightText() }},
		column[item]{title: "CONNECTIONS", right: true, wide: true, text: func(i *item) string { return orDash(i.Connections) }},
		column[item]{title: "HEALTH", wide: true, text: func(i *item) string { return i.Health }},
		column[item]{title: "SINCE", right: true, text: func(i *item) string { return i.sinceText() }},
		column[item]{title: "LAST FAILURE", text: func(i *item) string { return i.failureText() }},
	)
	for _, i := range v.backendItems(chosen, counts) {
		if err := l.add(i); err != nil {
			return err
		}
	}
	return l.end()
}

// namedServices are those that words mean.
func (v *view) namedServices(names []string) (chosen []maps.Service, err error) {
	for _, name := range names {
		found, err := v.findServices(name)
		if err != nil {
			return nil, err
		}
		chosen = append(chosen, found...)
	}
	return chosen, nil
}

// backendItems are the backends of services, each service's by name; counts of connections may be nil.
func (v *view) backendItems(services []maps.Service, counts map[uint32]int) (items []backendItem) {
	now := maps.Now()
	for _, s := range services {
		var own []maps.Backend
		for _, b := range v.inv.Backends {
			if b.Service == s.ID {
				own = append(own, b)
			}
		}
		slices.SortFunc(own, func(a, b maps.Backend) int {
			return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
		})
		for i := range own {
			b := &own[i]
			item := backendItem{
				Service: serviceName(s), ServiceAddress: s.AddrPort(), Name: cmp.Or(b.Name, fmt.Sprintf("#%d", b.ID)),
				Address: backendAddress(b), Method: b.Method.String(), condition: conditionOf(b, now),
			}
			if counts != nil {
				n := counts[b.ID]
				item.Connections = &n
			}
			items = append(items, item)
		}
	}
	return items
}
