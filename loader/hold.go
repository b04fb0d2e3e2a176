package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/vishvananda/netlink"

	"fairlead/bpf"
)

// Beside the directories of the data plane's schema versions stands that of what is held: a link an interface, and one
// directory a schema version with the maps and the program. The links belong to no version.
const holdPins = "hold"

// HeldPorts are ports at an address, both ends included.
type HeldPorts struct {
	Address     netip.Addr
	Protocol    uint8 // as in the IP header
	First, Last uint16
}

// HeldBackend is a backend whose packets are held where they go to one of these ports, at whichever address.
type HeldBackend struct {
	Address     netip.AddrPort
	Protocol    uint8
	First, Last uint16
}

// HoldOptions are what Hold needs to know.
type HoldOptions struct {
	PinPath    string   // that of the data plane
	Interfaces []string // those that the data plane will be attached to
	Mode       XDPMode  // "" is ModeAuto
	Services   []HeldPorts
	Sources    []HeldPorts   // source addresses of fullnat: held unless the host has a socket that a packet is for
	Backends   []HeldBackend // those of nat, and of fullnat where its source address is not known
	Logger     *slog.Logger  // nil is slog.Default
}

// HoldReport is what became of a hold's interfaces.
type HoldReport struct {
	Held     []Attachment  // by interface
	Attached []Attachment  // left as they are: the data plane is attached
	Released []Attachment  // held before, and no longer asked for
	Failed   []HoldFailure // in the order of the options
}

// HoldFailure says why an interface is not held.
type HoldFailure struct {
	Interface string
	Err       error
}

// hold is one at work, under the lock of its pin path.
type hold struct {
	opts     HoldOptions
	path     string
	log      *slog.Logger
	lock     *os.File
	attacher *Loader // of which nothing is loaded
	maps     *bpf.HoldMaps
	program  *ebpf.Program
	pinned   *ebpf.Program        // that of an earlier one of this version; nil: none
	fresh    map[string]*ebpf.Map // made by this one
	opened   []*ebpf.Program      // to be put back where something fails
	links    []*attachment        // all that were opened
}

// Hold has packets dropped, and counted, that the host's own stack would answer with RST: those for services, and
// backends' replies, until the data plane is attached. Attach takes over in place. An interface that the data plane is
// attached to already is left as it is. Holding again changes what is held, in place: nothing is let through meanwhile
// that both hold. Interfaces no longer named are released.
//
// An interface that can't be held is told in the report, and keeps none of the others from being held; a foreign
// program is never thrown off (*ForeignError). Error: ErrLocked, where a daemon holds the pin path and has not attached
// all of the interfaces.
func Hold(opts HoldOptions) (_ *HoldReport, err error) {
	h, err := newHold(opts)
	if err != nil {
		return nil, err
	}
	if err := requireBPFFS(h.path); err != nil {
		return nil, err
	}
	h.lock, err = lockOrCreate(h.path)
	if errors.Is(err, ErrLocked) {
		if r := h.carried(); r != nil {
			return r, nil
		}
		return nil, fmt.Errorf("hold: %w (it attaches its interfaces itself)", err)
	} else if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	return h.apply()
}

// UnloadHeld ends forwarding as Unload does, but has packets held from then on: in every link that stands the data
// plane's program is replaced by the hold's, so that none goes to the host's stack meanwhile. It returns what is held
// now, and the paths that it removed. The options' Interfaces count for nothing.
//
// Errors: ErrNothing (nothing is attached), ErrLocked (a daemon runs: stop it first).
func UnloadHeld(opts HoldOptions) (_ *HoldReport, removed []string, err error) {
	h, err := newHold(opts)
	if err != nil {
		return nil, nil, err
	}
	h.lock, err = lockDirectory(h.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, fmt.Errorf("unload: %w under %s", ErrNothing, h.path)
	} else if err != nil {
		return nil, nil, fmt.Errorf("unload: %w", err)
	}
	defer func() { err = errors.Join(err, h.close()) }()
	return h.replace()
}

func newHold(opts HoldOptions) (*hold, error) {
	h := &hold{opts: opts, log: opts.Logger}
	switch opts.Mode {
	case "":
		opts.Mode = ModeAuto
	case ModeAuto, ModeNative, ModeGeneric:
	default:
		return nil, fmt.Errorf("xdp mode %q: not one of auto, native, generic", opts.Mode)
	}
	if h.log == nil {
		h.log = slog.Default()
	}
	h.attacher = &Loader{mode: opts.Mode, log: h.log}
	var err error
	h.path, err = cleanPinPath(opts.PinPath)
	return h, err
}

func (h *hold) close() error {
	if h.maps != nil {
		h.maps.Close()
	}
	if h.program != nil {
		h.program.Close()
	}
	if h.pinned != nil {
		h.pinned.Close()
	}
	for _, program := range h.opened {
		program.Close()
	}
	closeLinks(h.links)
	closeMaps(h.fresh)
	// Where nothing was pinned, not even the directory stays. The kernel keeps it where anything is in it.
	_ = os.Remove(h.path)
	if err := h.lock.Close(); err != nil {
		return fmt.Errorf("release the lock of %s: %w", h.path, err)
	}
	return nil
}

// carried is the report where the data plane is attached to all interfaces; nil: not to all.
func (h *hold) carried() *HoldReport {
	links, err := Links(h.path)
	if err != nil {
		return nil
	}
	r := new(HoldReport)
	for _, name := range h.opts.Interfaces {
		i := slices.IndexFunc(links, func(at Attachment) bool { return at.Index != 0 && at.Interface == name })
		if i < 0 {
			return nil
		}
		r.Attached = append(r.Attached, links[i])
	}
	return r
}

func holdDir(path string) string { return filepath.Join(path, holdPins) }

func (h *hold) dir() string { return holdDir(h.path) }

func holdVersion() string {
	return "v" + strconv.FormatUint(uint64(bpf.HoldSchemaSCHEMA_VERSION), 10)
}

// apply makes the program stand on the options' interfaces. What may fail comes first; on an error everything is as it
// was before.
func (h *hold) apply() (_ *HoldReport, err error) {
	var taken undo
	defer func() {
		if err != nil {
			err = errors.Join(err, taken.run())
		}
	}()
	if err := settleHolds(h.path, h.log); err != nil {
		return nil, err
	}
	real, err := realLinks(h.path)
	h.links = append(h.links, real...)
	if err != nil {
		return nil, err
	}
	standing, err := pinnedLinks(h.dir())
	h.links = append(h.links, standing...)
	if err != nil {
		return nil, err
	}
	stale, err := h.load(&taken)
	if err != nil {
		return nil, err
	}

	r := new(HoldReport)
	var fresh, kept, spared []*attachment
	var devices []netlink.Link
	for _, name := range h.opts.Interfaces {
		fail := func(err error) {
			r.Failed = append(r.Failed, HoldFailure{name, fmt.Errorf("hold %s: %w", name, err)})
		}
		device, err := netlink.LinkByName(name)
		if err != nil {
			fail(fmt.Errorf("%w: `ip link` lists what there is", err))
			continue
		}
		index := device.Attrs().Index
		same := func(at *attachment) bool { return at.index == index }
		if slices.ContainsFunc(devices, func(d netlink.Link) bool { return d.Attrs().Index == index }) {
			continue
		}
		if i := slices.IndexFunc(real, same); i >= 0 {
			r.Attached = append(r.Attached, describe(real[i:i+1])...)
			continue
		}
		if i := slices.IndexFunc(standing, same); i >= 0 {
			if err := h.attacher.recognise(standing[i], device); err != nil {
				spared = append(spared, standing[i])
				fail(err)
				continue
			}
			kept = append(kept, standing[i])
		} else {
			var released undo
			if h.opts.Mode != ModeGeneric {
				standing, err = releasePorts(device, standing, h.pinned, h.log, &released, func(again *attachment) {
					h.links, spared = append(h.links, again), append(spared, again)
				})
			}
			var at *attachment
			if err == nil {
				at, err = h.attacher.attach(h.program, device)
			}
			if err != nil {
				fail(errors.Join(err, released.run()))
				continue
			}
			taken = append(taken, released...)
			taken.add(at.prepared.run)
			taken.add(at.detach)
			fresh = append(fresh, at)
			h.links = append(h.links, at)
		}
		devices = append(devices, device)
	}
	if len(devices) == 0 && len(standing) == 0 {
		taken, err = nil, taken.run()
		return r, err
	}

	if err := h.pin(fresh, devices, &taken); err != nil {
		return nil, err
	}
	for _, at := range kept {
		if err := h.exchange(at, h.pinned, &taken); err != nil {
			return nil, err
		}
	}
	taken = nil // it stands
	for _, at := range standing {
		if slices.Contains(kept, at) || slices.Contains(spared, at) {
			continue
		}
		if at.index != 0 {
			r.Released = append(r.Released, describe([]*attachment{at})...)
		}
		err = errors.Join(err, at.release(h.log))
	}
	if err = errors.Join(err, stale(), h.removeOtherVersions(), removeHoldIfIdle(h.path, nil)); err != nil {
		return r, fmt.Errorf("it is held, but what was there before is not cleared away: %w", err)
	}
	r.Held = describe(slices.Concat(fresh, kept))
	return r, nil
}

// replace puts the hold's program into every link of the data plane, then takes the rest of that away.
func (h *hold) replace() (r *HoldReport, removed []string, err error) {
	var taken undo
	defer func() {
		if err != nil {
			err = errors.Join(err, taken.run())
		}
	}()
	if err := settleHolds(h.path, h.log); err != nil {
		return nil, nil, err
	}
	dirs, err := schemaDirs(h.path)
	if err != nil {
		return nil, nil, err
	}
	if len(dirs) == 0 {
		return nil, nil, fmt.Errorf("unload: %w under %s", ErrNothing, h.path)
	}
	stale, err := h.load(&taken)
	if err != nil {
		return nil, nil, err
	}
	if err := h.pin(nil, nil, &taken); err != nil {
		return nil, nil, err
	}
	held, err := pinnedLinks(h.dir())
	h.links = append(h.links, held...)
	if err != nil {
		return nil, nil, err
	}
	for _, at := range held {
		if err := h.exchange(at, h.pinned, &taken); err != nil {
			return nil, nil, err
		}
	}
	for _, dir := range dirs {
		if strings.HasSuffix(dir, stagingSuffix) {
			continue // nobody has seen any of this
		}
		links, err := pinnedLinks(dir)
		h.links = append(h.links, links...)
		if err != nil {
			return nil, nil, err
		}
		program, err := openPinned(filepath.Join(dir, programPin))
		if err != nil {
			return nil, nil, err
		}
		if program != nil {
			h.opened = append(h.opened, program)
		}
		for _, at := range links {
			if at.index == 0 {
				continue // it does nothing, and goes with the rest
			}
			if err := h.exchange(at, program, &taken); err != nil {
				return nil, nil, err
			}
			if err := movePin(at, h.dir(), &taken); err != nil {
				return nil, nil, err
			}
			held = append(held, at)
		}
	}
	taken = nil // it stands
	r = new(HoldReport)
	for _, at := range held {
		if at.index == 0 {
			err = errors.Join(err, at.release(h.log))
		} else {
			r.Held = append(r.Held, describe([]*attachment{at})...)
		}
	}
	for _, dir := range dirs {
		err = errors.Join(err, removePins(dir, &removed))
	}
	if err = errors.Join(err, stale(), h.removeOtherVersions(), removeHoldIfIdle(h.path, &removed)); err != nil {
		return r, removed, fmt.Errorf("it is held, but what was there before is not cleared away: %w", err)
	}
	return r, removed, nil
}

// exchange puts the hold's program into a link that stands. before may be what it runs now, to be put back.
func (h *hold) exchange(at *attachment, before *ebpf.Program, taken *undo) error {
	if at.index == 0 {
		return nil
	}
	if before == nil || programID(before) != at.program {
		var err error
		if before, err = ebpf.NewProgramFromID(at.program); err != nil {
			before = nil // it takes CAP_SYS_ADMIN
		} else {
			h.opened = append(h.opened, before)
		}
	}
	if err := at.link.Update(h.program); err != nil {
		return fmt.Errorf("replace the program in %s: %w", at.pin, err)
	}
	h.log.Info("replaced the program in place", "pin", at.pin, "link", at.id, "before", at.program)
	taken.add(func() error {
		if before == nil {
			return fmt.Errorf("%s keeps the new program: program %d can't be opened without CAP_SYS_ADMIN", at.pin, at.program)
		}
		return at.link.Update(before)
	})
	return nil
}

// movePin moves a link's pin into another directory of the same file system: at no moment is the link without one.
func movePin(at *attachment, dir string, taken *undo) error {
	from, to := at.pin, freePin(dir, filepath.Base(at.pin), at.index)
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("move the pin of a link: %w", err)
	}
	at.pin = to
	taken.add(func() error {
		at.pin = from
		return os.Rename(to, from)
	})
	return nil
}

// freePin is a path that nothing is pinned at. Where a renamed interface left its old name on another's link, the number
// goes with it.
func freePin(dir, name string, index int) string {
	pin := filepath.Join(dir, name)
	if _, err := os.Lstat(pin); err == nil {
		pin += "_" + strconv.Itoa(index)
	}
	return pin
}

// load loads the program on top of the maps that are pinned, and fills these in addition to what is in them. The answer
// takes out what no longer belongs there.
func (h *hold) load(taken *undo) (stale func() error, err error) {
	// Of a start that was killed before it came to the end: nobody has seen any of this.
	if err := removeHold(h.dir()+stagingSuffix, nil); err != nil {
		return nil, fmt.Errorf("clear away an unfinished start: %w", err)
	}
	version := filepath.Join(h.dir(), holdVersion())
	if err := removePins(version+stagingSuffix, nil); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("clear away an unfinished start: %w", err)
	}
	spec, err := bpf.LoadHold()
	if err != nil {
		return nil, fmt.Errorf("read the compiled program: %w", err)
	}
	adopted, err := pinnedHoldMaps(version, nil)
	if err != nil {
		return nil, err
	}
	defer closeMaps(adopted)
	if h.pinned, err = openPinned(filepath.Join(version, programPin)); err != nil {
		return nil, err
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: adopted})
	if err != nil {
		return nil, &loadError{err, missingCapabilities()}
	}
	defer collection.Close()
	h.fresh = make(map[string]*ebpf.Map)
	for name, m := range collection.Maps {
		if adopted[name] != nil || !pinsByName(name) {
			continue
		}
		if h.fresh[name], err = m.Clone(); err != nil {
			return nil, fmt.Errorf("take map %s: %w", name, err)
		}
	}
	objects := new(bpf.HoldObjects)
	if err := collection.Assign(objects); err != nil {
		return nil, fmt.Errorf("take the program: %w", err)
	}
	h.maps, h.program = &objects.HoldMaps, objects.FairleadHold
	return fillHold(h.maps, h.opts, taken)
}

// openPinned opens a pinned program; nil, without error, where there is none.
func openPinned(pin string) (*ebpf.Program, error) {
	program, err := ebpf.LoadPinnedProgram(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("open the pinned program: %w", advised(err))
	}
	return program, nil
}

// pin makes maps, program and new links outlive this process. Where nothing was held, a rename shows all at once.
func (h *hold) pin(links []*attachment, devices []netlink.Link, taken *undo) error {
	dir := h.dir()
	_, err := os.Stat(dir)
	first := errors.Is(err, os.ErrNotExist)
	if first {
		dir += stagingSuffix
	}
	version := filepath.Join(dir, holdVersion())
	_, err = os.Stat(version)
	another := errors.Is(err, os.ErrNotExist)
	place := version
	if another && !first {
		place += stagingSuffix
	}
	if another {
		if err := os.MkdirAll(place, 0o700); err != nil {
			return fmt.Errorf("make pins: %w", advised(err))
		}
		taken.add(func() error {
			if first {
				defer os.Remove(dir)
			}
			return os.Remove(place)
		})
	}
	for name, m := range h.fresh {
		if err := m.Pin(filepath.Join(place, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
		taken.add(func() error { return os.Remove(filepath.Join(place, name)) })
	}
	if err := h.pinProgram(&place, taken); err != nil {
		return err
	}
	if place != version {
		if err := os.Rename(place, version); err != nil {
			return fmt.Errorf("make pins visible: %w", err)
		}
		place = version
	}
	for _, at := range links {
		i := slices.IndexFunc(devices, func(d netlink.Link) bool { return d.Attrs().Index == at.index })
		name := filepath.Base(freePin(h.dir(), linkPrefix+encodeName.Replace(devices[i].Attrs().Name), at.index))
		if err := at.link.Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin link %s: %w", name, err)
		}
		taken.add(func() error { return os.Remove(filepath.Join(dir, name)) })
		at.pin = filepath.Join(h.dir(), name)
	}
	if !first {
		return nil
	}
	if err := os.Rename(dir, h.dir()); err != nil {
		return fmt.Errorf("make pins visible: %w", err)
	}
	dir, place = h.dir(), filepath.Join(h.dir(), holdVersion())
	return nil
}

// pinProgram pins the program in a directory, in the place of one that is there.
func (h *hold) pinProgram(place *string, taken *undo) error {
	put := func(program *ebpf.Program) error {
		// A clone, because one that was pinned before and renamed believes itself pinned.
		clone, err := program.Clone()
		if err != nil {
			return err
		}
		defer clone.Close()
		pin := filepath.Join(*place, programPin)
		_ = os.Remove(pin + stagingSuffix) // of one that was killed
		if err := clone.Pin(pin + stagingSuffix); err != nil {
			return err
		}
		return os.Rename(pin+stagingSuffix, pin)
	}
	if err := put(h.program); err != nil {
		return fmt.Errorf("pin program: %w", err)
	}
	taken.add(func() error {
		if h.pinned != nil {
			return put(h.pinned)
		}
		return os.Remove(filepath.Join(*place, programPin))
	})
	return nil
}

// release ends a link of a hold for good.
func (at *attachment) release(log *slog.Logger) error {
	err := at.link.Detach()
	if at.index == 0 {
		err = nil // the interface is gone
	}
	if err = errors.Join(err, os.Remove(at.pin)); err != nil {
		return fmt.Errorf("release %s: %w", at.pin, err)
	}
	log.Info("no longer held", "pin", at.pin, "ifindex", at.index)
	return nil
}

// removeOtherVersions removes maps and programs of other versions, which no link runs any more.
func (h *hold) removeOtherVersions() error {
	dirs, err := holdVersions(h.dir())
	for _, dir := range dirs {
		if filepath.Base(dir) != holdVersion() {
			err = errors.Join(err, removePins(dir, nil))
		}
	}
	return err
}

// holdVersions lists the directories of all schema versions, unfinished ones too.
func holdVersions(dir string) (dirs []string, err error) {
	if dirs, err = filepath.Glob(filepath.Join(dir, "v[0-9]*")); err != nil {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	return dirs, nil
}

// removeHold detaches the links in a directory of a hold, then removes everything in it, and it. Where there is none,
// nothing is done.
func removeHold(dir string, removed *[]string) error {
	links, err := filepath.Glob(filepath.Join(dir, linkPrefix+"*"))
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, pin := range links {
		// A link that can't be detached keeps its pin, and its maps.
		err := detachPin(pin)
		if err == nil {
			err = os.Remove(pin)
		}
		if err != nil {
			return err
		}
		if removed != nil {
			*removed = append(*removed, pin)
		}
	}
	dirs, err := holdVersions(dir)
	for _, version := range dirs {
		err = errors.Join(err, removePins(version, removed))
	}
	if err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// removeHoldIfIdle removes the maps and the program of a hold once no interface is held.
func removeHoldIfIdle(path string, removed *[]string) error {
	links, err := filepath.Glob(filepath.Join(holdDir(path), linkPrefix+"*"))
	if err != nil || len(links) > 0 {
		return err
	}
	return removeHold(holdDir(path), removed)
}

// realLinks are the data plane's, of every schema version.
func realLinks(path string) (all []*attachment, err error) {
	dirs, err := schemaDirs(path)
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		links, err := pinnedLinks(dir)
		if err != nil {
			closeLinks(all)
			return nil, err
		}
		all = append(all, links...)
	}
	return all, nil
}

func closeLinks(links []*attachment) {
	for _, at := range links {
		at.link.Close()
	}
}

// settleHolds brings the pins of links to where they belong by the program that the link runs: one that was killed
// between the update of a link and the move of its pin has left it elsewhere.
func settleHolds(path string, log *slog.Logger) error {
	dirs, err := schemaDirs(path)
	if err != nil {
		return err
	}
	dirs = slices.DeleteFunc(dirs, func(dir string) bool { return strings.HasSuffix(dir, stagingSuffix) })
	// To each place its program.
	places, err := holdVersions(holdDir(path))
	if err != nil {
		return err
	}
	home := make(map[ebpf.ProgramID]string)
	for _, dir := range slices.Concat(places, dirs) {
		program, err := openPinned(filepath.Join(dir, programPin))
		if err != nil {
			return err
		}
		if program == nil {
			continue
		}
		if slices.Contains(places, dir) {
			dir = holdDir(path)
		}
		home[programID(program)] = dir
		program.Close()
	}
	for _, dir := range append(dirs, holdDir(path)) {
		links, err := pinnedLinks(dir)
		if err != nil {
			return err
		}
		for _, at := range links {
			to, known := home[at.program]
			if known && to != dir && at.index != 0 && err == nil {
				from := at.pin
				if err = movePin(at, to, new(undo)); err == nil {
					log.Info("brought the pin of a link to where its program is, after a start that was killed", "from", from,
						"to", at.pin)
				}
			}
			at.link.Close()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// pinnedHoldMaps opens the maps pinned in a directory; none, without error, where there is no directory.
func pinnedHoldMaps(dir string, opts *ebpf.LoadPinOptions) (_ map[string]*ebpf.Map, err error) {
	spec, err := bpf.LoadHold()
	if err != nil {
		return nil, fmt.Errorf("read the compiled program: %w", err)
	}
	maps := make(map[string]*ebpf.Map)
	defer func() {
		if err != nil {
			closeMaps(maps)
		}
	}()
	for name, want := range spec.Maps {
		if !pinsByName(name) {
			continue
		}
		pin := filepath.Join(dir, name)
		m, err := ebpf.LoadPinnedMap(pin, opts)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("open pinned map %s: %w", pin, advised(err))
		}
		maps[name] = m
		if err := want.Compatible(m); err != nil {
			return nil, fmt.Errorf("adopt %s: %w: somebody else put it there: `fairlead unload` first", pin, err)
		}
	}
	return maps, nil
}

// holdEntry is an entry of one of the tries.
type holdEntry struct {
	m   *ebpf.Map
	key string
}

// fillHold puts what is to be held into the maps: more than before for a moment, never less. The answer takes out what
// no longer belongs there.
func fillHold(maps *bpf.HoldMaps, opts HoldOptions, taken *undo) (stale func() error, err error) {
	wanted := make(map[holdEntry]uint32)
	ports := func(list []HeldPorts, verdict bpf.HoldVerdict) {
		for _, p := range list {
			m := maps.HeldTo6
			if p.Address.Is4() {
				m = maps.HeldTo4
			}
			for key := range portKeys(append([]byte{p.Protocol, 0}, p.Address.AsSlice()...), p.First, p.Last) {
				wanted[holdEntry{m, key}] = uint32(verdict)
			}
		}
	}
	ports(opts.Sources, bpf.HoldVerdictDROP_SOURCE)
	ports(opts.Services, bpf.HoldVerdictDROP_SERVICE) // where they meet, the host's sockets don't count
	for _, b := range opts.Backends {
		m := maps.HeldFrom6
		if b.Address.Addr().Is4() {
			m = maps.HeldFrom4
		}
		head := append([]byte{b.Protocol, 0, 0, 0}, b.Address.Addr().AsSlice()...)
		head = binary.BigEndian.AppendUint16(head, b.Address.Port())
		for key := range portKeys(head, b.First, b.Last) {
			wanted[holdEntry{m, key}] = uint32(bpf.HoldVerdictDROP_BACKEND)
		}
	}

	var old []holdEntry
	before := make(map[holdEntry]uint32)
	for _, m := range []*ebpf.Map{maps.HeldTo4, maps.HeldTo6, maps.HeldFrom4, maps.HeldFrom6} {
		var key []byte
		var value uint32
		entries := m.Iterate()
		for entries.Next(&key, &value) {
			e := holdEntry{m, string(key)}
			before[e] = value
			if _, ok := wanted[e]; !ok {
				old = append(old, e)
			}
		}
		if err := entries.Err(); err != nil {
			return nil, fmt.Errorf("read what is held: %w", err)
		}
	}
	var added []holdEntry
	taken.add(func() (err error) {
		for _, e := range added {
			if value, ok := before[e]; ok {
				err = errors.Join(err, e.m.Put([]byte(e.key), value))
			} else if e := e.m.Delete([]byte(e.key)); !errors.Is(e, ebpf.ErrKeyNotExist) {
				err = errors.Join(err, e)
			}
		}
		return err
	})
	for e, value := range wanted {
		if now, ok := before[e]; ok && now == value {
			continue
		}
		if err := e.m.Put([]byte(e.key), value); err != nil {
			return nil, fmt.Errorf("set what is held: %w (there is room for %d ranges of ports of each family)", err,
				e.m.MaxEntries())
		}
		added = append(added, e)
	}
	return func() (err error) {
		for _, e := range old {
			if gone := e.m.Delete([]byte(e.key)); gone != nil && !errors.Is(gone, ebpf.ErrKeyNotExist) {
				err = errors.Join(err, fmt.Errorf("take an entry out of %v: %w", e.m, gone))
			}
		}
		return err
	}, nil
}

// portKeys are the keys of a trie that make up a range of ports: as few as there can be, each with the port's first bits
// counting.
func portKeys(head []byte, first, last uint16) map[string]bool {
	keys := make(map[string]bool)
	for low, end := uint32(first), uint32(last); low <= end; {
		free := bits.TrailingZeros32(low | 1<<16)
		for low+1<<free-1 > end {
			free--
		}
		key := binary.NativeEndian.AppendUint32(nil, uint32(8*len(head)+16-free))
		keys[string(binary.BigEndian.AppendUint16(append(key, head...), uint16(low)))] = true
		low += 1 << free
	}
	return keys
}

// HoldState is what is held, and what was done, as the pins tell.
type HoldState struct {
	PinPath    string
	Interfaces []Attachment
	Entries    int           // ranges of ports that are held
	Verdicts   []HoldCounter // all of them
}

// HoldCounter is how often something was decided.
type HoldCounter struct {
	Name  string
	Count uint64
}

// ReadHold reads the pins of a hold. Error: ErrNothing (nothing is held).
func ReadHold(pinPath string) (*HoldState, error) {
	path, err := cleanPinPath(pinPath)
	if err != nil {
		return nil, err
	}
	links, err := pinnedLinks(holdDir(path))
	if err != nil {
		return nil, err
	}
	defer closeLinks(links)
	if len(links) == 0 {
		return nil, fmt.Errorf("nothing is held: %w under %s", ErrNothing, holdDir(path))
	}
	s := &HoldState{PinPath: path, Interfaces: describe(links)}
	maps, err := pinnedHoldMaps(filepath.Join(holdDir(path), holdVersion()), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer closeMaps(maps)
	if s.Verdicts, err = readHoldCounters(maps[bpf.HoldMapHoldCounters]); err != nil {
		return nil, err
	}
	for _, name := range []string{bpf.HoldMapHeldTo4, bpf.HoldMapHeldTo6, bpf.HoldMapHeldFrom4, bpf.HoldMapHeldFrom6} {
		if maps[name] == nil {
			continue
		}
		keys, err := keysOf(maps[name])
		if err != nil {
			return nil, fmt.Errorf("read what is held: %w", err)
		}
		s.Entries += len(keys)
	}
	return s, nil
}

func readHoldCounters(m *ebpf.Map) ([]HoldCounter, error) {
	names, err := holdVerdicts()
	if err != nil {
		return nil, err
	}
	counters := make([]HoldCounter, len(names))
	for i, name := range names {
		counters[i].Name = name
	}
	if m == nil {
		return counters, nil // of another version
	}
	var sets []bpf.HoldCounterSet
	if err := m.Lookup(uint32(0), &sets); err != nil {
		return nil, fmt.Errorf("read the counters: %w", err)
	}
	for _, set := range sets {
		for i, n := range set.Verdicts {
			counters[i].Count += n
		}
	}
	return counters, nil
}

// holdVerdicts reads the names from the object's own type information: the C's enum is their one source.
var holdVerdicts = sync.OnceValues(func() (names []string, err error) {
	spec, err := bpf.LoadHold()
	if err != nil {
		return nil, fmt.Errorf("read the compiled program: %w", err)
	}
	var t *btf.Enum
	if err := spec.Types.TypeByName("verdict", &t); err != nil {
		return nil, fmt.Errorf("find enum verdict in the object: %w", err)
	}
	for _, v := range t.Values {
		if !strings.HasSuffix(v.Name, "_COUNT") {
			names = append(names, strings.ToLower(v.Name))
		}
	}
	return names, nil
})
