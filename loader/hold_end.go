package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"fairlead/bpf"
)

// This file is about the end of a hold: the data plane takes over.

// standingHolds returns the links of a hold by the numbers of their interfaces. Those of interfaces that are gone are
// cleared away.
func (l *Loader) standingHolds() (map[int]*attachment, error) {
	held := make(map[int]*attachment)
	for _, at := range slices.Clone(l.held) {
		if err := at.refresh(); err != nil {
			return nil, fmt.Errorf("read link %s: %w", at.pin, err)
		}
		if at.index != 0 {
			held[at.index] = at
			continue
		}
		at.link.Close()
		if err := os.Remove(at.pin); err != nil {
			return nil, fmt.Errorf("clear away the link of an interface that is gone: %w", err)
		}
		l.held = slices.DeleteFunc(l.held, func(other *attachment) bool { return other == at })
	}
	return held, nil
}

// releasePorts releases the ports of a bond that are held, before that gets a program: while a port has one of its own,
// the kernel gives the bond none. It is the one case in which a hold ends before its successor stands. It returns the
// links that are left; restored is told of those that the undoing holds again, with the hold's program.
func releasePorts(bond netlink.Link, held []*attachment, program *ebpf.Program, log *slog.Logger, taken *undo,
	restored func(*attachment)) (left []*attachment, err error) {
	if bond.Type() != "bond" {
		return held, nil
	}
	for i, at := range held {
		port, err := netlink.LinkByIndex(at.index)
		if err != nil || port.Attrs().MasterIndex != bond.Attrs().Index || !runs(port, at.program) {
			left = append(left, at)
			continue
		}
		flags := link.XDPDriverMode
		if modeOf(port) == ModeGeneric {
			flags = link.XDPGenericMode
		}
		if err := at.release(log); err != nil {
			return append(left, held[i:]...), err
		}
		at.link.Close()
		log.Warn("a port of a bond is no longer held, and the bond not yet: name the bond in dataplane.interfaces",
			"bond", bond.Attrs().Name, "port", port.Attrs().Name)
		taken.add(func() error {
			if program == nil {
				return fmt.Errorf("%s is no longer held", port.Attrs().Name)
			}
			made, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: at.index, Flags: flags})
			if err != nil {
				return fmt.Errorf("hold %s again: %w", port.Attrs().Name, err)
			}
			again := &attachment{link: made, pin: at.pin}
			restored(again)
			return errors.Join(again.refresh(), made.Pin(at.pin))
		})
	}
	return left, nil
}

// endHold releases what is held on interfaces that the data plane was not asked to stand on, as it does itself, and takes
// away the rest of the hold. The data plane stands: what goes wrong here is said.
func (l *Loader) endHold(taken []*attachment) {
	if _, err := os.Stat(holdDir(l.path)); err != nil {
		return
	}
	l.logHeld(taken)
	for _, at := range slices.Clone(l.held) {
		if !slices.Contains(taken, at) {
			if err := at.release(l.log); err != nil {
				l.log.Error("an interface that is held can't be let go of", "pin", at.pin, "error", err)
				continue
			}
			at.link.Close()
		}
		l.held = slices.DeleteFunc(l.held, func(other *attachment) bool { return other == at })
	}
	if err := removeHoldIfIdle(l.path, nil); err != nil {
		l.log.Error("what is left of a hold can't be cleared away: `fairlead hold` and a restart try again", "error", err)
	}
	if l.holder != nil && len(l.held) == 0 {
		l.holder.Close()
		l.holder = nil
	}
}

// logHeld says what was held back, before the counters go.
func (l *Loader) logHeld(taken []*attachment) {
	pin := filepath.Join(holdDir(l.path), holdVersion(), bpf.HoldMapHoldCounters)
	m, err := ebpf.LoadPinnedMap(pin, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return // of another version
	}
	defer m.Close()
	counters, err := readHoldCounters(m)
	if err != nil {
		return
	}
	attributes := []any{slog.Int("interfaces", len(taken))}
	for _, c := range counters {
		attributes = append(attributes, slog.Uint64(c.Name, c.Count))
	}
	l.log.Info("took over from `fairlead hold`", attributes...)
}
