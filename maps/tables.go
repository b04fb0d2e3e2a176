package maps

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// Table is one map of the data plane as the kernel has it.
type Table struct {
	Name       string
	Type       string
	KeySize    uint32 // bytes
	ValueSize  uint32 // bytes; of one CPU where there is one value for each
	MaxEntries uint32
	Memory     uint64 // bytes of kernel memory, the maps inside it among them
	Inside     int    // maps that stand in it
	Purpose    string
}

var purposes = map[string]string{
	bpf.FairleadMapAddresses4:     "our IPv4 addresses, and what they are to us",
	bpf.FairleadMapAddresses6:     "our IPv6 addresses, and what they are to us",
	bpf.FairleadMapBackendInfo:    "names and weights of backends, and why one has no next hop",
	bpf.FairleadMapBackendTraffic: "packets, bytes and connections by backend",
	bpf.FairleadMapBackends:       "backends by number: address, method, next hop, port pools",
	bpf.FairleadMapBitmaps:        "exception and fresh bits, by the hash of the 4-tuple",
	bpf.FairleadMapBudgets:        "how many adoptions and ICMP answers each CPU has left in this tick",
	bpf.FairleadMapCheckFrames:    "answers to checks through a method, for the daemon",
	bpf.FairleadMapClocks:         "the coarse clock, as each CPU last saw it",
	bpf.FairleadMapConnections4:   "connection table, IPv4: who is pinned to which backend",
	bpf.FairleadMapConnections6:   "connection table, IPv6: who is pinned to which backend",
	bpf.FairleadMapControl:        "epoch, exception bitmap in use, fill of the connection table",
	bpf.FairleadMapCounters:       "verdicts and events",
	bpf.FairleadMapDevices:        "devices by number: MTU and Ethernet address",
	bpf.FairleadMapFragments:      "packets of which a first fragment was seen, and where they go",
	bpf.FairleadMapGenerations:    "numbers for new connections, by CPU",
	bpf.FairleadMapHalfOpen4:      "half-open table, IPv4: SYNs not confirmed yet",
	bpf.FairleadMapHalfOpen6:      "half-open table, IPv6: SYNs not confirmed yet",
	bpf.FairleadMapHalfReplies4:   "ways back of half-open connections, IPv4",
	bpf.FairleadMapHalfReplies6:   "ways back of half-open connections, IPv6",
	bpf.FairleadMapNatBackends4:   "backends by nat, by IPv4 address, port and protocol",
	bpf.FairleadMapNatBackends6:   "backends by nat, by IPv6 address, port and protocol",
	bpf.FairleadMapJournal:        "what became of connections, for the daemon to keep on disk",
	bpf.FairleadMapPaths:          "ends of tunnels, and what routers said of the way there",
	bpf.FairleadMapPools:          "port pools: a source address towards a backend",
	bpf.FairleadMapPortFlags:      "what port numbers may be to us: a service's, a source port, a backend's",
	bpf.FairleadMapPorts:          "the pools' queues of unused ports and of ports handed out",
	bpf.FairleadMapReplies4:       "ways back of connections, IPv4: backend's packet to client",
	bpf.FairleadMapReplies6:       "ways back of connections, IPv6: backend's packet to client",
	bpf.FairleadMapRings:          "rings by service: slot to backend",
	bpf.FairleadMapScratch:        "room for values on their way into the tables",
	bpf.FairleadMapServiceInfo:    "names and settings of services",
	bpf.FairleadMapServiceTraffic: "packets, bytes and connections by service",
	bpf.FairleadMapServices4:      "services by IPv4 address, port and protocol",
	bpf.FairleadMapServices6:      "services by IPv6 address, port and protocol",
	bpf.FairleadMapSources:        "source addresses of fullnat by number",
	bpf.FairleadMapSources4:       "numbers of IPv4 source addresses",
	bpf.FairleadMapSources6:       "numbers of IPv6 source addresses",
}

// byName are the maps of a collection by the names that they have in the object.
func byName(raw *bpf.FairleadMaps) map[string]*ebpf.Map {
	all := make(map[string]*ebpf.Map)
	v := reflect.ValueOf(raw).Elem()
	for i := range v.NumField() {
		if m, ok := v.Field(i).Interface().(*ebpf.Map); ok && m != nil {
			all[v.Type().Field(i).Tag.Get("ebpf")] = m
		}
	}
	return all
}

// Tables lists the maps, by name.
func (s *Set) Tables() ([]Table, error) {
	var tables []Table
	for name, m := range byName(s.raw) {
		t := Table{
			Name: name, Type: typeName(m.Type()), KeySize: m.KeySize(), ValueSize: m.ValueSize(),
			MaxEntries: m.MaxEntries(), Purpose: purposes[name],
		}
		var err error
		if t.Memory, err = memoryOf(m); err != nil {
			return nil, fmt.Errorf("read the size of %s: %w", name, err)
		}
		if m.Type() == ebpf.ArrayOfMaps {
			if err := s.walkInside(m, func(_ uint32, inside *ebpf.Map) error {
				memory, err := memoryOf(inside)
				t.Memory += memory
				t.Inside++
				return err
			}); err != nil {
				return nil, fmt.Errorf("read the size of %s: %w", name, err)
			}
		}
		tables = append(tables, t)
	}
	slices.SortFunc(tables, func(a, b Table) int { return strings.Compare(a.Name, b.Name) })
	return tables, nil
}

// typeName is what the kernel calls a type of maps, in small letters.
func typeName(t ebpf.MapType) string {
	switch t {
	case ebpf.PerCPUArray:
		return "percpu_array"
	case ebpf.LRUHash:
		return "lru_hash"
	case ebpf.ArrayOfMaps:
		return "array_of_maps"
	}
	return strings.ToLower(t.String())
}

func memoryOf(m *ebpf.Map) (uint64, error) {
	info, err := m.Info()
	if err != nil {
		return 0, err
	}
	memory, _ := info.Memlock()
	return memory, nil
}

// walkInside opens the rings, or the pools' queues, one after the other; each is closed after its visit. Their numbers are
// those that services and pools have: an empty place of a map of maps can't be read in batches.
func (s *Set) walkInside(outer *ebpf.Map, visit func(number uint32, inside *ebpf.Map) error) error {
	numbers, err := s.inside(outer)
	if err != nil {
		return err
	}
	for _, number := range numbers {
		var inside *ebpf.Map
		if err := outer.Lookup(number, &inside); errors.Is(err, ebpf.ErrKeyNotExist) {
			continue
		} else if err != nil {
			return fmt.Errorf("open number %d: %w", number, err)
		}
		err := visit(number, inside)
		inside.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) inside(outer *ebpf.Map) (numbers []uint32, err error) {
	if outer == s.raw.Rings {
		err = walkTable(s.raw.ServiceInfo, func(id *uint32, v *bpf.FairleadServiceLabel) error {
			if v.Family != 0 {
				numbers = append(numbers, *id)
			}
			return nil
		})
		return numbers, err
	}
	err = walkTable(s.raw.Pools, func(id *uint32, v *bpf.FairleadPool) error {
		if v.Family != 0 {
			numbers = append(numbers, *id*2, *id*2+1)
		}
		return nil
	})
	return numbers, err
}
