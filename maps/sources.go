package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

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
		key := poolKey{b.Address, b.Port, b.protocol, src.ID}
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
	if err := m.putSourceNumber(s); err != nil {
		return nil, err
	}
	m.sources[id] = s
	return s, nil
}

// putSourceNumber lets replies find a source address.
func (m *Manager) putSourceNumber(s *Source) error {
	table, key := m.sourceEntry(s)
	if err := table.Put(key, s.ID); err != nil {
		return fmt.Errorf("write source address %v: %w", s.Address, err)
	}
	return nil
}

func (m *Manager) sourceEntry(s *Source) (table *ebpf.Map, key any) {
	words := addressWords(s.Address)
	if s.Address.Is4() {
		return m.set.raw.Sources4, words[0]
	}
	return m.set.raw.Sources6, &bpf.FairleadAddress6{Address: words}
}

// newPool gives a pool its number; putPools makes its queues.
func (m *Manager) newPool(key poolKey, src *Source) (uint32, error) {
	for m.poolNumbers[m.nextPool] {
		if m.nextPool++; m.nextPool == uint32(bpf.FairleadLimitsMAX_POOLS) {
			return 0, fmt.Errorf("no number left for another port pool: %d are in use", m.nextPool)
		}
	}
	id := m.nextPool
	m.poolNumbers[id] = true
	m.pending = append(m.pending, pendingPool{id, key, src})
	return id, nil
}

// pendingPool is a pool with a number and no queues yet.
type pendingPool struct {
	id  uint32
	key poolKey
	src *Source
}

// putPools makes the two queues of each pending pool, all in one batch, and fills those of unused ports.
func (m *Manager) putPools() (err error) {
	var ids, descriptors []uint32
	for _, p := range m.pending {
		for kind := range uint32(2) {
			count := uint32(p.src.Last-p.src.First) + 1
			queue, err := ebpf.NewMap(&ebpf.MapSpec{
				Name: "port_queue", Type: ebpf.Queue, ValueSize: 4, MaxEntries: count,
			})
			if err != nil {
				return fmt.Errorf("make a queue of %d ports: %w", count, err)
			}
			defer queue.Close()
			ids, descriptors = append(ids, p.id*2+kind), append(descriptors, uint32(queue.FD()))
		}
	}
	if len(ids) == 0 {
		return nil
	}
	if _, err := m.set.raw.Ports.BatchUpdate(ids, descriptors, nil); err != nil {
		return fmt.Errorf("put %d queues of ports: %w", len(ids), err)
	}
	for _, p := range m.pending {
		if err := m.fillPool(p); err != nil {
			return err
		}
	}
	m.pending = nil
	return nil
}

func (m *Manager) fillPool(p pendingPool) error {
	reserved := m.reserved[portKey{netip.AddrPortFrom(p.key.address, p.key.port), p.key.protocol, p.src.Address}]
	for first, end := uint32(p.src.First), uint32(p.src.Last)+1; first < end; {
		if reserved.has(uint16(first)) {
			first++
			continue
		}
		count := uint32(1)
		for first+count < end && count < uint32(bpf.FairleadLimitsFILL_PORTS) && !reserved.has(uint16(first+count)) {
			count++
		}
		if err := m.fillPorts(p.id, first, count); err != nil {
			return err
		}
		first += count
	}
	if err := m.set.raw.Pools.Put(p.id, &bpf.FairleadPool{
		Source: p.src.ID, Address: addressWords(p.key.address), Port: portWire(p.key.port),
		Family: familyOf(p.key.address), Protocol: p.key.protocol,
	}); err != nil {
		return fmt.Errorf("write port pool %d: %w", p.id, err)
	}
	return nil
}

// xdpPass is XDP_PASS: what the data plane's programs for the daemon answer when all went well.
const xdpPass = 2

// poolUser is who uses ports of a source address: a backend, by number.
type poolUser struct{ backend, source uint32 }

// removeUnusedSources takes out port pools that no backend has, and source addresses that no pool and no configuration has.
// A pool that its backends lost stays as long as connections use it.
func (m *Manager) removeUnusedSources(users map[poolUser]int) error {
	inUse := make(map[uint32]bool)
	for _, b := range m.backends {
		for _, id := range b.pools {
			inUse[id] = true
		}
	}
	for user := range users {
		if b := m.backends[user.backend]; b != nil {
			inUse[m.pools[poolKey{b.Address, b.Port, b.protocol, user.source}]] = true
		}
	}
	needed := make(map[uint32]bool)
	for key, id := range m.pools {
		if inUse[id] {
			delete(m.emptyPools, id)
			needed[key.source] = true
			continue
		}
		if m.emptyPools[id]++; m.emptyPools[id] < 2 {
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
		delete(m.poolNumbers, id)
		delete(m.emptyPools, id)
		m.nextPool = min(m.nextPool, id)
		m.pending = slices.DeleteFunc(m.pending, func(p pendingPool) bool { return p.id == id })
	}
	for id, s := range m.sources {
		if needed[id] || m.wanted[s.Address] {
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
	}
	return nil
}
