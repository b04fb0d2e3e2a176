package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// PortFlags owns what port numbers may be to us: the data plane looks here before it looks anything up.
type PortFlags struct{ set *bpf.FairleadPortSet }

type portFlag = uint8

const (
	portService = portFlag(bpf.FairleadPortFlagPORT_SERVICE)
	portSource  = portFlag(bpf.FairleadPortFlagPORT_SOURCE)
	portBackend = portFlag(bpf.FairleadPortFlagPORT_BACKEND)
	portCheck   = portFlag(bpf.FairleadPortFlagPORT_CHECK)
)

// Flags are those of a port number: bits of bpf's port_flag.
func (p PortFlags) Flags(port uint16) uint8 { return p.set.Flags[portWire(port)] }

// write sets all ports' flags, by number in network byte order. Four of them share a word: there is one writer, and readers look at bytes.
func (p PortFlags) write(flags *[bpf.FairleadLimitsPORT_NUMBERS]uint8, add bool) {
	for i := 0; i < len(flags); i += 4 {
		word := (*uint32)(unsafe.Pointer(&p.set.Flags[i]))
		want := *(*uint32)(unsafe.Pointer(&flags[i]))
		have := atomic.LoadUint32(word)
		if add {
			want |= have
		}
		if want != have {
			atomic.StoreUint32(word, want)
		}
	}
}

// putNear makes the maps say which ports, and which backends by nat, are to be looked at more closely. New ones stand
// before what they lead to does; old ones go when only is said: they lead nowhere any more.
func (m *Manager) putNear(only bool) error {
	var flags [bpf.FairleadLimitsPORT_NUMBERS]uint8
	for _, s := range m.services {
		for _, key := range s.Keys {
			flags[portWire(key.Port())] |= portService
		}
	}
	for _, s := range m.sources {
		for port := int(s.First); port <= int(s.Last); port++ {
			flags[portWire(uint16(port))] |= portSource
		}
	}
	for _, port := range m.checkPorts {
		flags[portWire(port)] |= portCheck
	}
	want := make(map[serviceKey]uint32)
	for _, b := range m.backends {
		if b.Method == MethodNAT {
			flags[portWire(b.Port)] |= portBackend
			want[serviceKey{b.Address, b.Port, b.protocol}]++
		}
	}
	for key, count := range want {
		if m.natBackends[key] == count {
			continue
		}
		table, k := m.natBackendEntry(key)
		if err := table.Put(k, count); err != nil {
			return fmt.Errorf("write backend %v by nat: %w", netip.AddrPortFrom(key.address, key.port), err)
		}
		m.natBackends[key] = count
	}
	m.set.PortFlags.write(&flags, !only)
	if !only {
		return nil
	}
	for key := range m.natBackends {
		if want[key] != 0 {
			continue
		}
		table, k := m.natBackendEntry(key)
		if err := table.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove backend %v by nat: %w", netip.AddrPortFrom(key.address, key.port), err)
		}
		delete(m.natBackends, key)
	}
	return nil
}

// SetCheckPorts says which ports checks through their method come from: a service's packets to them are for the daemon,
// which finds them in its ring of check frames.
func (m *Manager) SetCheckPorts(ports []uint16) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.checkPorts = slices.Clone(ports)
	return m.putNear(true)
}

func (m *Manager) natBackendEntry(key serviceKey) (table *ebpf.Map, k any) {
	if key.address.Is4() {
		k := entryKey4(key)
		return m.set.raw.NatBackends4, &k
	}
	k6 := entryKey6(key)
	return m.set.raw.NatBackends6, &k6
}

func entryKey4(key serviceKey) bpf.FairleadServiceKey4 {
	return bpf.FairleadServiceKey4{
		Address: addressWords(key.address)[0], Port: portWire(key.port), Protocol: key.protocol,
	}
}

func entryKey6(key serviceKey) bpf.FairleadServiceKey6 {
	return bpf.FairleadServiceKey6{Address: addressWords(key.address), Port: portWire(key.port), Protocol: key.protocol}
}

// adoptNear reads which backends by nat the maps hold.
func (m *Manager) adoptNear() error {
	if err := walkTable(m.set.raw.NatBackends4, func(k *bpf.FairleadServiceKey4, v *uint32) error {
		m.natBackends[serviceKey{wordAddress4(k.Address), portWire(k.Port), k.Protocol}] = *v
		return nil
	}); err != nil {
		return err
	}
	return walkTable(m.set.raw.NatBackends6, func(k *bpf.FairleadServiceKey6, v *uint32) error {
		m.natBackends[serviceKey{wordsAddress(familyIPv6, k.Address), portWire(k.Port), k.Protocol}] = *v
		return nil
	})
}

// MaxDevices is how many devices the data plane has room for.
const MaxDevices = int(bpf.FairleadLimitsMAX_DEVICES)

// Device is what the data plane has to know of a network device.
type Device struct {
	Index uint32
	MTU   uint32 // bytes of the longest IP packet
	MAC   [6]byte
}

// SetDevices says what devices there are: those that packets come by and leave by.
func (m *Manager) SetDevices(devices []Device) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	there := make(map[uint32]bool)
	for _, d := range devices {
		there[d.Index] = true
		if err := m.set.raw.Devices.Put(d.Index, &bpf.FairleadDevice{Mtu: d.MTU, Mac: d.MAC}); err != nil {
			return fmt.Errorf("write device %d: %w", d.Index, err)
		}
	}
	var gone []uint32
	if err := walkTable(m.set.raw.Devices, func(index *uint32, _ *bpf.FairleadDevice) error {
		if !there[*index] {
			gone = append(gone, *index)
		}
		return nil
	}); err != nil {
		return err
	}
	for _, index := range gone {
		if err := m.set.raw.Devices.Delete(index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove device %d: %w", index, err)
		}
	}
	return nil
}

// putPaths makes an entry for each end of a tunnel, where the data plane notes what its way takes, and takes out those
// of ends that are no more.
func (m *Manager) putPaths() error {
	want := make(map[bpf.FairleadPathKey]bool)
	for _, b := range m.backends {
		if b.Method == MethodIPIP || b.Method == MethodGUE {
			want[bpf.FairleadPathKey{Address: addressWords(b.Address), Family: uint32(familyOf(b.Address))}] = true
		}
	}
	for key := range want {
		if m.paths[key] {
			continue
		}
		if err := m.set.raw.Paths.Update(&key, &bpf.FairleadPath{}, ebpf.UpdateNoExist); err != nil &&
			!errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("write the way to %v: %w", wordsAddress(uint8(key.Family), key.Address), err)
		}
		m.paths[key] = true
	}
	for key := range m.paths {
		if want[key] {
			continue
		}
		if err := m.set.raw.Paths.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove the way to %v: %w", wordsAddress(uint8(key.Family), key.Address), err)
		}
		delete(m.paths, key)
	}
	return nil
}
