package daemon

import (
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"

	"fairlead/maps"
	"fairlead/maps/journal"
)

// names is what the numbers in connections mean. On disk connections are kept by names: numbers don't outlive the maps.
type names struct {
	services map[uint32]string
	backends map[uint32]journal.Backend
	sources  map[uint32]netip.Addr
	devices  map[uint32]string
}

func namesOf(backends []maps.ServiceBackend, sources map[uint32]netip.Addr) names {
	n := names{
		services: make(map[uint32]string), backends: make(map[uint32]journal.Backend), sources: sources,
		devices: make(map[uint32]string),
	}
	for _, b := range backends {
		n.services[b.Service.ID] = b.Service.Name
		n.backends[b.Backend.ID] = journal.Backend{
			Name: b.Backend.Name, Address: netip.AddrPortFrom(b.Backend.Address, b.Backend.Port), Method: b.Backend.Method.String(),
		}
	}
	if links, err := netlink.LinkList(); err == nil {
		for _, l := range links {
			n.devices[uint32(l.Attrs().Index)] = l.Attrs().Name
		}
	}
	return n
}

// inventoryNames are the same, as a reader of the maps finds them.
func inventoryNames(inv *maps.Inventory) names {
	var backends []maps.ServiceBackend
	for _, b := range inv.Backends {
		if s, ok := inv.Service(b.Service); ok {
			backends = append(backends, maps.ServiceBackend{Service: s, Backend: b})
		}
	}
	sources := make(map[uint32]netip.Addr)
	for _, s := range inv.Sources {
		sources[s.ID] = s.Address
	}
	return namesOf(backends, sources)
}

// entry fills in a connection as it is kept; false: its numbers mean nothing any more.
func (n *names) entry(e *journal.Entry, c *maps.Connection, now uint32, at time.Time) bool {
	b, known := n.backends[c.Backend]
	service, there := n.services[c.Service]
	source, has := n.sources[c.Source]
	if !known || !there || c.SourcePort != 0 && !has {
		return false
	}
	*e = journal.Entry{
		Tuple: journal.Tuple(c.Tuple), Service: service, Backend: b, Generation: c.Generation, State: uint32(c.State),
		Opened: at.Add(-maps.Age(now, c.Opened)), Seen: at.Add(-maps.Age(now, c.Seen)),
		SequenceEnd: c.SequenceEnd, Acknowledgement: c.Acknowledgement, Timestamp: c.Timestamp, TimestampEcho: c.TimestampEcho,
		Hop: journal.Hop{
			Interface: n.devices[c.Hop.Interface], MAC: c.Hop.MAC, SourceMAC: c.Hop.SourceMAC, VLAN: c.Hop.VLAN,
		},
	}
	if c.SourcePort != 0 {
		e.SourceAddr = netip.AddrPortFrom(source, c.SourcePort)
	}
	return true
}

// walk yields all connections that are to outlive the maps: those that are neither closing nor condemned. Nameless are those that it leaves
// out because their numbers mean nothing any more, or nothing yet.
func (n *names) walk(set *maps.Set, yield func(*journal.Entry) error) (nameless int, err error) {
	now, at := maps.Now(), time.Now()
	var e journal.Entry
	err = set.Connections.Walk(func(c *maps.Connection) error {
		if c.State.Closing() || c.State&maps.StateCondemned != 0 {
			return nil
		}
		if !n.entry(&e, c, now, at) {
			nameless++
			return nil
		}
		return yield(&e)
	})
	return nameless, err
}

// contradicts tells whether a number now means something else than it did.
func (n *names) contradicts(now names) bool {
	return differ(n.services, now.services) || differ(n.backends, now.backends) || differ(n.sources, now.sources) ||
		differ(n.devices, now.devices)
}

func differ[V comparable](was, is map[uint32]V) bool {
	for number, v := range was {
		if w, there := is[number]; there && w != v {
			return true
		}
	}
	return false
}
