package maps

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// poolsFor gives a backend its port pools, one for each source address. Backends of the same address and port share them:
// whoever they belong to, no two connections get the same tuple.
func (m *Manager) poolsFor(b *Backend, sources []WantedSource) ([]uint32, error) {
	if b.Method != MethodFullNAT {
		return nil, nil
	}
	var pools []uint32
	for _, ws := range sources {
		m.wanted[ws.Address] = true
		src, err := m.sourceFor(ws)
		if err != nil {
			return nil, err
		}
		key := poolKey{b.Address, b.Port, protocolTCP, src.ID}
		id, ok := m.pools[key]
		if !ok {
			if id, err = m.newPool(key, src); err != nil {
				return nil, err
			}
			m.pools[key] = id
		}
		pools = append(pools, id)
	}
	return pools, nil
}

func (m *Manager) sourceFor(ws WantedSource) (*Source, error) {
	for _, s := range m.sources {
		if s.Address == ws.Address {
			return s, nil
		}
	}
	id, err := freeNumber(m.sources, uint32(bpf.FairleadLimitsMAX_SOURCES), "source address")
	if err != nil {
		return nil, err
	}
	s := &Source{ID: id, Address: ws.Address, First: ws.First, Last: ws.Last}
	v := bpf.FairleadSource{
		Address: addressWords(s.Address), FirstPort: s.First, LastPort: s.Last, Family: familyOf(s.Address),
	}
	if err := m.set.raw.Sources.Put(id, &v); err != nil {
		return nil, fmt.Errorf("write source address %v: %w", s.Address, err)
	}
	table, key := m.sourceEntry(s)
	if err := table.Put(key, id); err != nil {
		return nil, fmt.Errorf("write source address %v: %w", s.Address, err)
	}
	m.sources[id] = s
	return s, nil
}

func (m *Manager) sourceEntry(s *Source) (table *ebpf.Map, key any) {
	words := addressWords(s.Address)
	if s.Address.Is4() {
		return m.set.raw.Sources4, words[0]
	}
	return m.set.raw.Sources6, &bpf.FairleadAddress6{Address: words}
}

// newPool makes the two queues of a pool and fills the one of unused ports.
func (m *Manager) newPool(key poolKey, src *Source) (uint32, error) {
	used := make(map[uint32]bool, len(m.pools))
	for _, id := range m.pools {
		used[id] = true
	}
	id, err := freeNumber(used, uint32(bpf.FairleadLimitsMAX_POOLS), "port pool")
	if err != nil {
		return 0, err
	}
	count := uint32(src.Last-src.First) + 1
	for kind := range uint32(2) {
		queue, err := ebpf.NewMap(&ebpf.MapSpec{Name: "port_queue", Type: ebpf.Queue, ValueSize: 4, MaxEntries: count})
		if err != nil {
			return 0, fmt.Errorf("make a queue of %d ports: %w", count, err)
		}
		err = m.set.raw.Ports.Put(id*2+kind, queue)
		queue.Close()
		if err != nil {
			return 0, fmt.Errorf("put the queue of port pool %d: %w", id, err)
		}
	}
	for done := uint32(0); done < count; {
		part := min(count-done, uint32(bpf.FairleadLimitsFILL_PORTS))
		request := bpf.FairleadFillRequest{Pool: id, FirstPort: uint32(src.First) + done, Count: part}
		packet, err := binary.Append(nil, binary.NativeEndian, &request)
		if err != nil {
			return 0, err
		}
		verdict, err := m.fill.Run(&ebpf.RunOptions{Data: packet})
		if err != nil {
			return 0, fmt.Errorf("fill port pool %d: %w", id, err)
		}
		if verdict != xdpPass {
			return 0, fmt.Errorf("fill port pool %d with ports from %d: the queue does not take them (answer %d)",
				id, request.FirstPort, verdict)
		}
		done += part
	}
	if err := m.set.raw.Pools.Put(id, &bpf.FairleadPool{
		Source: src.ID, Address: addressWords(key.address), Port: portWire(key.port), Family: familyOf(key.address),
		Protocol: key.protocol,
	}); err != nil {
		return 0, fmt.Errorf("write port pool %d: %w", id, err)
	}
	return id, nil
}

// xdpPass is XDP_PASS: what the data plane's programs for the daemon answer when all went well.
const xdpPass = 2

// removeUnusedSources takes out port pools that no backend has, and source addresses that no pool and no configuration has.
// A source address that a backend lost stays as long as connections use it.
func (m *Manager) removeUnusedSources(conns map[uint32]int) error {
	inUse := make(map[uint32]bool)
	for _, b := range m.backends {
		for _, id := range b.pools {
			inUse[id] = true
		}
	}
	for id := range m.sources {
		if conns[id] == 0 {
			m.emptySources[id]++
		} else {
			delete(m.emptySources, id)
		}
	}
	needed := make(map[uint32]bool)
	for key, id := range m.pools {
		if inUse[id] || m.emptySources[key.source] < 2 {
			needed[key.source] = true
			continue
		}
		// The entry first: a killed daemon's successor then knows the number to be free.
		if err := m.set.raw.Pools.Put(id, &bpf.FairleadPool{}); err != nil {
			return fmt.Errorf("clear port pool %d: %w", id, err)
		}
		for kind := range uint32(2) {
			if err := m.set.raw.Ports.Delete(id*2 + kind); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("remove port pool %d: %w", id, err)
			}
		}
		delete(m.pools, key)
	}
	for id, s := range m.sources {
		if needed[id] || m.wanted[s.Address] || m.emptySources[id] < 2 {
			continue
		}
		table, key := m.sourceEntry(s)
		if err := table.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove source address %v: %w", s.Address, err)
		}
		if err := m.set.raw.Sources.Put(id, &bpf.FairleadSource{}); err != nil {
			return fmt.Errorf("clear source address %v: %w", s.Address, err)
		}
		delete(m.sources, id)
		delete(m.emptySources, id)
	}
	return nil
}
