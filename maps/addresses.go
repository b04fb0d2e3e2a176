package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// AddressUse is what an address is to us: bits of bpf's address_flag.
type AddressUse uint32

// The uses.
const (
	AddressService = AddressUse(bpf.FairleadAddressFlagADDRESS_SERVICE)
	AddressSource  = AddressUse(bpf.FairleadAddressFlagADDRESS_SOURCE)
	AddressTunnel  = AddressUse(bpf.FairleadAddressFlagADDRESS_TUNNEL)
	AddressOwn     = AddressUse(bpf.FairleadAddressFlagADDRESS_OWN) // XDP answers ARP, NDP and echo for it
	AddressCheck   = AddressUse(bpf.FairleadAddressFlagADDRESS_CHECK)
)

// Names are the uses in words; that it is XDP's own is not among them.
func (u AddressUse) Names() []string {
	return flagNames(uint32(u&^AddressOwn), "service", "source", "tunnel", "", "check")
}

// Addresses reads which addresses are ours, and what they are to us.
func (s *Set) Addresses() (map[netip.Addr]AddressUse, error) {
	all := make(map[netip.Addr]AddressUse)
	if err := walkTable(s.raw.Addresses4, func(k, v *uint32) error {
		all[wordAddress4(*k)] = AddressUse(*v)
		return nil
	}); err != nil {
		return nil, err
	}
	return all, walkTable(s.raw.Addresses6, func(k *bpf.FairleadAddress6, v *uint32) error {
		all[wordsAddress(familyIPv6, k.Address)] = AddressUse(*v)
		return nil
	})
}

// SetOwn says which addresses are XDP's own: no host holds them, this one does not, and the segment has been told. Of
// them, those that a service or a source address has are answered for.
func (m *Manager) SetOwn(addresses []netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.own = make(map[netip.Addr]bool, len(addresses))
	for _, a := range addresses {
		m.own[a] = true
	}
	return m.putAddresses()
}

// Own are the addresses of XDP's own, in order: those that the maps held at the start among them.
func (m *Manager) Own() []netip.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []netip.Addr
	for a := range m.own {
		list = append(list, a)
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list
}

// AddCheckSource says that checks through their method come from an address of the host's: what a service answers to it,
// at a port of theirs, is for the daemon. What a service answers to clients is none of our business, whatever their port.
func (m *Manager) AddCheckSource(a netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.checkSources == nil {
		m.checkSources = make(map[netip.Addr]bool)
	}
	m.checkSources[a] = true
	return m.putAddresses()
}

// IsService tells whether an address is a service's.
func (m *Manager) IsService(a netip.Addr) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.addresses[a]&AddressService != 0
}

// putAddresses makes the maps of addresses say what services, source addresses and tunnels there are.
func (m *Manager) putAddresses() error {
	want := make(map[netip.Addr]AddressUse)
	for _, s := range m.services {
		for _, key := range s.Keys {
			want[key.Addr()] |= AddressService
		}
	}
	for _, s := range m.sources {
		want[s.Address] |= AddressSource
	}
	for a := range want {
		if m.own[a] {
			want[a] |= AddressOwn
		}
	}
	for _, b := range m.backends {
		if b.Tunnel.IsValid() {
			want[b.Tunnel.Masked().Addr()] |= AddressTunnel
		}
	}
	for a := range m.checkSources {
		want[a] |= AddressCheck
	}
	for a, use := range want {
		if m.addresses[a] == use {
			continue
		}
		table, key := m.addressEntry(a)
		if err := table.Put(key, uint32(use)); err != nil {
			return fmt.Errorf("write address %v: %w", a, err)
		}
		m.addresses[a] = use
	}
	for a := range m.addresses {
		if want[a] != 0 {
			continue
		}
		table, key := m.addressEntry(a)
		if err := table.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove address %v: %w", a, err)
		}
		delete(m.addresses, a)
	}
	return nil
}

func (m *Manager) addressEntry(a netip.Addr) (table *ebpf.Map, key any) {
	words := addressWords(a)
	if a.Is4() {
		return m.set.raw.Addresses4, words[0]
	}
	return m.set.raw.Addresses6, &bpf.FairleadAddress6{Address: words}
}
