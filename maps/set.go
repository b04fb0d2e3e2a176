package maps

import (
	"errors"
	"fmt"

	"fairlead/bpf"
)

// Set is the typed view of all maps. It may be read by any process; only a Manager writes.
type Set struct {
	Control   Control
	Bitmaps   Bitmaps
	PortFlags PortFlags
	Counters  Counters
	// Connections is the connection table, HalfOpen the half-open one.
	Connections Connections
	HalfOpen    HalfOpen

	raw *bpf.FairleadMaps
}

// NewSet makes the typed view of a loaded or opened collection of maps. The maps stay the caller's to close, after the Set.
func NewSet(raw *bpf.FairleadMaps) (*Set, error) { return newSet(raw, false) }

func newSet(raw *bpf.FairleadMaps, write bool) (*Set, error) {
	block, err := mapped[bpf.FairleadControlBlock](raw.Control, write)
	if err != nil {
		return nil, err
	}
	bits, err := mapped[bpf.FairleadBitmapSet](raw.Bitmaps, write)
	if err != nil {
		return nil, errors.Join(err, unmap(block))
	}
	ports, err := mapped[bpf.FairleadPortSet](raw.PortFlags, write)
	if err != nil {
		return nil, errors.Join(err, unmap(block), unmap(bits))
	}
	control := Control{block}
	return &Set{
		Control:     control,
		Bitmaps:     Bitmaps{set: bits, control: control},
		PortFlags:   PortFlags{ports},
		Counters:    Counters{raw},
		Connections: Connections{v4: raw.Connections4, v6: raw.Connections6},
		HalfOpen:    HalfOpen{v4: raw.HalfOpen4, v6: raw.HalfOpen6},
		raw:         raw,
	}, nil
}

// Close gives back the shared memory.
func (s *Set) Close() error {
	if err := errors.Join(unmap(s.Control.block), unmap(s.Bitmaps.set), unmap(s.PortFlags.set)); err != nil {
		return fmt.Errorf("unmap the maps' memory: %w", err)
	}
	s.Control.block, s.Bitmaps.set, s.PortFlags.set = nil, nil, nil
	return nil
}
