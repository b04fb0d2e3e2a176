package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attachment is a program on an interface.
type Attachment struct {
	Interface string
	Index     int            // 0: the interface is gone, its link does nothing
	Mode      XDPMode        // ModeNative or ModeGeneric; "" where that can't be known
	Program   ebpf.ProgramID // the kernel's number of the program
	Link      link.ID        // the kernel's number of the link
	Pin       string         // path of the pinned link
}

// Attachments lists what is attached, by interface.
func (l *Loader) Attachments() []Attachment {
	l.mu.Lock()
	defer l.mu.Unlock()
	return describe(l.links)
}

// Links lists what is attached, read from the pins of every schema version, beside a daemon or without one.
// Error: ErrNothing, where nothing is pinned.
func Links(pinPath string) ([]Attachment, error) {
	path, err := cleanPinPath(pinPath)
	if err != nil {
		return nil, err
	}
	dirs, err := schemaDirs(path)
	if err != nil {
		return nil, err
	}
	if len(dirs) == 0 {
		return nil, fmt.Errorf("list links: %w under %s", ErrNothing, path)
	}
	var all []Attachment
	for _, dir := range dirs {
		links, err := pinnedLinks(dir)
		if err != nil {
			return nil, err
		}
		all = append(all, describe(links)...)
		for _, at := range links {
			at.link.Close()
		}
	}
	return all, nil
}

// attachment is a link that we hold.
type attachment struct {
	link    link.Link
	pin     string
	id      link.ID
	index   int
	program ebpf.ProgramID
	// prepared puts back what attaching changed of the device.
	prepared undo
}

// refresh reads what the kernel says of the link.
func (at *attachment) refresh() error {
	info, err := at.link.Info()
	if err != nil {
		return fmt.Errorf("link info: %w", err)
	}
	xdp := info.XDP()
	if xdp == nil {
		return errors.New("not a link of XDP")
	}
	at.id, at.index, at.program = info.ID, int(xdp.Ifindex), info.Program
	return nil
}

func describe(links []*attachment) []Attachment {
	all := make([]Attachment, 0, len(links))
	for _, at := range links {
		// What can't be read any more is told as it was last known.
		_ = at.refresh()
		d := Attachment{Index: at.index, Program: at.program, Link: at.id, Pin: at.pin,
			Interface: decodeName.Replace(strings.TrimPrefix(filepath.Base(at.pin), linkPrefix))}
		if at.index != 0 {
			// The same number may be another device's in this network namespace.
			if device, err := netlink.LinkByIndex(at.index); err == nil && runs(device, at.program) {
				d.Interface, d.Mode = device.Attrs().Name, modeOf(device)
			}
		}
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b Attachment) int { return strings.Compare(a.Interface, b.Interface) })
	return all
}

// runs says whether a program is on a device. A device with one in hardware beside another gives no number.
func runs(device netlink.Link, program ebpf.ProgramID) bool {
	xdp := device.Attrs().Xdp
	return xdp != nil && xdp.Attached && (xdp.ProgId == 0 || xdp.ProgId == uint32(program))
}

// modeOf says how a device runs its program. Values: IFLA_XDP_ATTACHED of linux/if_link.h.
func modeOf(device netlink.Link) XDPMode {
	if xdp := device.Attrs().Xdp; xdp != nil {
		switch xdp.AttachMode {
		case nl.XDP_ATTACHED_DRV:
			return ModeNative
		case nl.XDP_ATTACHED_SKB:
			return ModeGeneric
		}
	}
	return ""
}

// undo collects how to take back what was done, and does so in reverse.
type undo []func() error

func (u *undo) add(step func() error) { *u = append(*u, step) }

func (u undo) run() (err error) {
	for _, step := range slices.Backward(u) {
		err = errors.Join(err, step())
	}
	if err != nil {
		return fmt.Errorf("and as it was taken back: %w", err)
	}
	return nil
}

// apply makes the program stand on these interfaces and no others. New links come first, because they are what fails;
// then the program changes in the links that stand; then the pins; and only when nothing can fail any more are links
// detached.
func (l *Loader) apply(next *ebpf.Program, interfaces []string) (err error) {
	var replaced []*ebpf.Program
	defer func() {
		for _, program := range replaced {
			program.Close()
		}
	}()
	var taken undo
	defer func() {
		if err != nil {
			err = errors.Join(err, taken.run())
		}
	}()
	devices, err := findDevices(interfaces)
	if err != nil {
		return err
	}
	standing, err := l.standing()
	if err != nil {
		return err
	}

	held, err := l.standingHolds()
	if err != nil {
		return err
	}

	var links, fresh, kept, taking []*attachment
	for _, device := range devices {
		index, name := device.Attrs().Index, device.Attrs().Name
		at := standing[index]
		if at == nil {
			at = held[index]
		}
		if at != nil {
			if err := l.recognise(at, device); err != nil {
				return fmt.Errorf("attach to %s: %w", name, err)
			}
			if err := l.prepare(device, modeOf(device), &taken); err != nil {
				return fmt.Errorf("attach to %s: %w", name, err)
			}
			links = append(links, at)
			if at == standing[index] {
				kept = append(kept, at)
			} else {
				taking = append(taking, at)
			}
			continue
		}
		if l.mode != ModeGeneric {
			if l.held, err = releasePorts(device, l.held, l.holder, l.log, &taken, func(again *attachment) {
				l.held = append(l.held, again)
			}); err != nil {
				return fmt.Errorf("attach to %s: %w", name, err)
			}
		}
		at, err := l.attach(next, device)
		if err != nil {
			return fmt.Errorf("attach to %s: %w", name, err)
		}
		taken.add(at.prepared.run)
		taken.add(at.detach)
		links, fresh = append(links, at), append(fresh, at)
	}
	for _, at := range kept {
		if err := l.exchange(at, next, &replaced, &taken); err != nil {
			return err
		}
	}
	pinned := l.pinned
	if err := l.commit(next, fresh, devices, &taken); err != nil {
		return err
	}
	// Only now, with maps and program there for all to find: one that is killed here leaves links that the next start
	// knows, held or taken over.
	for _, at := range taking {
		if err := l.exchange(at, next, &replaced, &taken); err != nil {
			return err
		}
		if err := movePin(at, l.dir(), &taken); err != nil {
			return err
		}
	}
	if pinned != nil {
		pinned.Close()
	}
	l.reviewTargets(devices)
	l.endHold(taking)

	for _, at := range l.links {
		if slices.Contains(links, at) {
			continue
		}
		if err := errors.Join(at.detach(), os.Remove(at.pin)); err != nil {
			l.log.Error("an interface no longer wanted can't be let go of", "pin", at.pin, "error", err)
			continue
		}
		l.log.Info("detached", "pin", at.pin, "ifindex", at.index)
	}
	l.links = links
	return nil
}

// exchange changes the program in a link that stands. A program that it opens, to be able to put it back, is added to
// replaced.
func (l *Loader) exchange(at *attachment, next *ebpf.Program, replaced *[]*ebpf.Program, taken *undo) error {
	old, opened := l.programOf(at)
	if opened {
		*replaced = append(*replaced, old)
	}
	if err := at.link.Update(next); err != nil {
		return fmt.Errorf("replace the program in %s: %w", at.pin, err)
	}
	l.log.Info("replaced the program in place", "pin", at.pin, "link", at.id, "before", at.program)
	taken.add(func() error {
		if old == nil {
			return fmt.Errorf("%s keeps the new program: program %d can't be opened without CAP_SYS_ADMIN", at.pin,
				at.program)
		}
		return at.link.Update(old)
	})
	return nil
}

// standing returns the links by the numbers of their interfaces. Links of interfaces that are gone are cleared away: they
// do nothing, and an interface of the same name may have come.
func (l *Loader) standing() (map[int]*attachment, error) {
	standing := make(map[int]*attachment)
	for _, at := range slices.Clone(l.links) {
		if err := at.refresh(); err != nil {
			return nil, fmt.Errorf("read link %s: %w", at.pin, err)
		}
		if at.index != 0 {
			standing[at.index] = at
			continue
		}
		at.link.Close()
		if err := os.Remove(at.pin); err != nil {
			return nil, fmt.Errorf("clear away the link of an interface that is gone: %w", err)
		}
		l.links = slices.DeleteFunc(l.links, func(other *attachment) bool { return other == at })
		l.log.Info("cleared away the link of an interface that is gone", "pin", at.pin)
	}
	return standing, nil
}

// detach ends a link at once; closing alone would leave that to the kernel's leisure.
func (at *attachment) detach() error {
	err := at.link.Detach()
	// Of a device that is gone there is nothing to detach from.
	if errors.Is(err, unix.ENOLINK) || errors.Is(err, unix.ENODEV) {
		err = nil
	}
	return errors.Join(err, at.link.Close())
}

func findDevices(interfaces []string) ([]netlink.Link, error) {
	if len(interfaces) == 0 {
		return nil, errors.New("attach: no interface is named")
	}
	var devices []netlink.Link
	for _, name := range interfaces {
		device, err := netlink.LinkByName(name)
		if err != nil {
			return nil, fmt.Errorf("attach to %s: %w: `ip link` lists what there is", name, err)
		}
		same := func(d netlink.Link) bool { return d.Attrs().Index == device.Attrs().Index }
		if !slices.ContainsFunc(devices, same) {
			devices = append(devices, device)
		}
	}
	return devices, nil
}

// recognise makes sure that a pinned link is this device's, not that of a device of the same number in another network
// namespace, and says when it runs in another mode than the configuration asks for.
func (l *Loader) recognise(at *attachment, device netlink.Link) error {
	if !runs(device, at.program) {
		return fmt.Errorf("%s is a link of another network namespace: give each namespace a pin_path of its own", at.pin)
	}
	if mode := modeOf(device); l.mode != ModeAuto && mode != l.mode {
		l.log.Warn("the interface keeps the xdp mode it was attached in; to change it, unload first",
			"interface", device.Attrs().Name, "mode", mode, "wanted", l.mode)
	}
	return nil
}

// programOf is the program that a link runs, to be able to put it back; nil: it can't be had. opened: to be closed.
func (l *Loader) programOf(at *attachment) (_ *ebpf.Program, opened bool) {
	for _, known := range []*ebpf.Program{l.programs.Fairlead, l.pinned, l.holder} {
		if known != nil && programID(known) == at.program {
			return known, false
		}
	}
	if program, err := ebpf.NewProgramFromID(at.program); err == nil {
		return program, true
	}
	return nil, false
}

func programID(program *ebpf.Program) ebpf.ProgramID {
	info, err := program.Info()
	if err != nil {
		return 0
	}
	id, _ := info.ID()
	return id
}

// attach makes a new link, not pinned yet, in the mode asked for.
func (l *Loader) attach(program *ebpf.Program, device netlink.Link) (_ *attachment, err error) {
	name := device.Attrs().Name
	mode, flags := ModeNative, link.XDPDriverMode
	if l.mode == ModeGeneric {
		mode, flags = ModeGeneric, link.XDPGenericMode
	}
	var prepared undo
	defer func() {
		if err != nil {
			err = errors.Join(err, prepared.run())
		}
	}()
	if err := l.prepare(device, mode, &prepared); err != nil {
		return nil, err
	}
	options := link.XDPOptions{Program: program, Interface: device.Attrs().Index, Flags: flags}
	made, err := link.AttachXDP(options)
	if err != nil && l.mode == ModeAuto && !isTaken(err) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENODEV) {
		l.log.Warn("no native xdp on this interface: attaching in generic mode, which is slower",
			"interface", name, "reason", err, "advice", nativeAdvice(device, err))
		mode, options.Flags = ModeGeneric, link.XDPGenericMode
		if err := l.prepare(device, mode, &prepared); err != nil {
			return nil, err
		}
		made, err = link.AttachXDP(options)
	}
	switch {
	case err == nil:
	case isTaken(err):
		return nil, foreign(device, err)
	case mode == ModeNative:
		return nil, fmt.Errorf("native xdp: %w: %s", err, nativeAdvice(device, err))
	default:
		return nil, fmt.Errorf("generic xdp: %w", advised(err))
	}
	at := &attachment{link: made, prepared: prepared}
	if err := at.refresh(); err != nil {
		return nil, errors.Join(err, at.detach())
	}
	l.log.Info("attached", "interface", name, "mode", mode, "link", at.id, "program", at.program)
	return at, nil
}

// isTaken: EBUSY is a program in this mode, EEXIST one in the other mode or on a device above this one (net/core/dev.c).
func isTaken(err error) bool { return errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) }

func nativeAdvice(device netlink.Link, err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return privilegeAdvice
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Sprintf("the driver of %s has no native xdp: set xdp to auto or generic", device.Attrs().Name)
	}
	return fmt.Sprintf("the driver refused: mtu %d, of it or of its peer, may be too large for xdp, LRO may be on, or "+
		"queues may be missing: see `fairlead doctor` and the kernel's log, or set xdp to auto or generic",
		device.Attrs().MTU)
}

// commit pins what is not pinned yet. The last step is a rename: before it nothing is to be seen, after it everything.
func (l *Loader) commit(program *ebpf.Program, fresh []*attachment, devices []netlink.Link, taken *undo) error {
	dir := l.dir()
	_, err := os.Stat(dir)
	first := errors.Is(err, os.ErrNotExist)
	if first {
		dir = l.stagingDir()
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("make pins: %w", advised(err))
		}
		taken.add(func() error { return os.Remove(dir) })
	}
	for name, m := range l.unpinned {
		if err := m.Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
		taken.add(m.Unpin)
	}
	for _, at := range fresh {
		name := l.pinName(at.index, devices)
		if err := at.link.Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin link %s: %w", name, err)
		}
		taken.add(at.link.Unpin)
		at.pin = filepath.Join(l.dir(), name)
	}
	// A clone, because one that was pinned before and renamed believes itself pinned.
	pin, err := program.Clone()
	if err != nil {
		return fmt.Errorf("pin program: %w", err)
	}
	taken.add(pin.Close)
	place := filepath.Join(dir, programPin)
	from, to := dir, l.dir()
	if !first {
		from, to = place+stagingSuffix, place
		place = from
		_ = os.Remove(place) // of an update that was killed
	}
	if err := pin.Pin(place); err != nil {
		return fmt.Errorf("pin program: %w", err)
	}
	taken.add(pin.Unpin)
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("make pins visible: %w", err)
	}
	old, unpinned := l.pinned, l.unpinned
	l.pinned, l.unpinned = pin, nil
	taken.add(func() error {
		l.pinned, l.unpinned = old, unpinned
		if first {
			return os.Rename(to, from)
		}
		if old == nil {
			return os.Remove(to)
		}
		back, err := old.Clone()
		if err != nil {
			return err
		}
		defer back.Close()
		return errors.Join(back.Pin(from), os.Rename(from, to))
	})
	return nil
}

// pinName names a link for its interface.
func (l *Loader) pinName(index int, devices []netlink.Link) string {
	at := slices.IndexFunc(devices, func(d netlink.Link) bool { return d.Attrs().Index == index })
	return filepath.Base(freePin(l.dir(), linkPrefix+encodeName.Replace(devices[at].Attrs().Name), index))
}
