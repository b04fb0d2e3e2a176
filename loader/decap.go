package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
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
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// Under a decap's pin path stand the link and one directory a schema version, with its maps. The link belongs to no
// version: whichever starts puts its program into it.
const (
	decapPins      = "fairlead_decap_"
	decapDirPrefix = "decap_v"
)

// DecapPinPath is where the decap of an interface pins its state if nothing else is said.
func DecapPinPath(interfaceName string) string {
	return filepath.Join(bpffsRoot, decapPins+encodeName.Replace(interfaceName))
}

// DecapOptions are what AttachDecap needs to know.
type DecapOptions struct {
	Interface string
	PinPath   string         // a directory in a bpf file system; "" is DecapPinPath
	Mode      XDPMode        // "" is ModeAuto
	Addresses []netip.Addr   // tunnels end at these; none: at those of the interface, which Run keeps current
	Sources   []netip.Prefix // tunnels may come from these; none: from anywhere
	GUEPort   uint16         // 0 is GUE's own, 6080
	Logger    *slog.Logger   // nil is slog.Default
}

// Decap is a program that opens ipip and gue on an interface, before the host's stack. It goes on without this process.
type Decap struct {
	path   string // the pin path
	log    *slog.Logger
	lock   *os.File
	maps   *bpf.DecapMaps
	at     *attachment
	follow bool // the addresses are those of the interface

	requests *netlink.Handle
	news     *nl.NetlinkSocket

	mu        sync.Mutex
	addresses []netip.Addr
	closed    bool
}

// AttachDecap brings the program onto the interface, and pins link and maps. Where one is pinned already, its counters
// go on and the program is replaced in place: no packet passes unseen. It happens whole or not at all. Close lets go,
// and leaves it attached; RemoveDecap takes it away.
//
// Errors: ErrLocked (another process holds the pin path), *ForeignError (ErrForeign: another program is on the
// interface). A program that the verifier refuses gives its whole log.
func AttachDecap(opts DecapOptions) (_ *Decap, err error) {
	d := &Decap{log: opts.Logger, follow: len(opts.Addresses) == 0}
	if d.addresses, err = ordered(opts.Addresses); err != nil {
		return nil, err
	}
	for _, source := range opts.Sources {
		if !source.IsValid() || source.Addr().Is4In6() {
			return nil, fmt.Errorf("source %v: not a prefix", source)
		}
	}
	if d.log == nil {
		d.log = slog.Default()
	}
	switch opts.Mode {
	case "":
		opts.Mode = ModeAuto
	case ModeAuto, ModeNative, ModeGeneric:
	default:
		return nil, fmt.Errorf("xdp mode %q: not one of auto, native, generic", opts.Mode)
	}
	if opts.PinPath == "" {
		opts.PinPath = DecapPinPath(opts.Interface)
	}
	if d.path, err = cleanPinPath(opts.PinPath); err != nil {
		return nil, err
	}
	devices, err := findDevices([]string{opts.Interface})
	if err != nil {
		return nil, err
	}
	if err := requireBPFFS(d.path); err != nil {
		return nil, err
	}
	if d.lock, err = lockOrCreate(d.path); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if err := d.subscribe(); err != nil {
		return nil, fmt.Errorf("watch %s: %w", opts.Interface, err)
	}
	if d.follow {
		if d.addresses, err = d.ofInterface(devices[0]); err != nil {
			return nil, err
		}
	}
	if err := d.apply(opts, devices[0]); err != nil {
		return nil, err
	}
	if len(d.addresses) == 0 {
		d.log.Warn("the interface has no address: nothing is opened until it gets one", "interface", opts.Interface)
	}
	return d, nil
}

// ordered is the addresses in order, without zones and each once.
func ordered(addresses []netip.Addr) ([]netip.Addr, error) {
	var all []netip.Addr
	for _, address := range addresses {
		address = address.Unmap().WithZone("")
		if !address.IsValid() || address.IsUnspecified() || address.IsMulticast() {
			return nil, fmt.Errorf("address %v: not one that a host has", address)
		}
		all = append(all, address)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all), nil
}

// Attachment is the program on its interface.
func (d *Decap) Attachment() Attachment {
	d.mu.Lock()
	defer d.mu.Unlock()
	return describe([]*attachment{d.at})[0]
}

// Addresses are those that tunnels end at, in order.
func (d *Decap) Addresses() []netip.Addr {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.addresses)
}

// Run keeps the addresses those of the interface, unless others were given, until the context ends. It returns an error
// once the program is no longer attached: the interface is gone, or somebody detached the link. Close comes after it.
func (d *Decap) Run(ctx context.Context) error {
	news, failed, done := make(chan struct{}, 1), make(chan error, 1), make(chan struct{})
	defer close(done)
	go d.receive(news, failed, done)
	for {
		if err := d.look(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-news:
		case err := <-failed:
			return fmt.Errorf("follow the addresses of %s: receive: %w: start again", d.Attachment().Interface, err)
		}
	}
}

// receive says that there is news. What it is does not matter: all is asked anew, and lost news is news too.
func (d *Decap) receive(news chan<- struct{}, failed chan<- error, done <-chan struct{}) {
	for {
		_, _, err := d.news.Receive()
		switch {
		case err == nil, errors.Is(err, unix.ENOBUFS):
			select {
			case news <- struct{}{}:
			default:
			}
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		default:
			failed <- err
			return
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

// look makes the map hold what the interface has now.
func (d *Decap) look() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := decodeName.Replace(strings.TrimPrefix(filepath.Base(d.at.pin), linkPrefix))
	if err := d.at.refresh(); err != nil {
		return fmt.Errorf("read link %s: %w", d.at.pin, err)
	}
	gone := fmt.Errorf("nothing is opened on %s any more: the interface is gone, or the link was detached: start again "+
		"to attach anew", name)
	if d.at.index == 0 {
		return gone
	}
	if !d.follow {
		return nil
	}
	device, err := d.requests.LinkByIndex(d.at.index)
	if errors.As(err, new(netlink.LinkNotFoundError)) { // the link will know in a moment
		return gone
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	addresses, err := d.ofInterface(device)
	if err != nil {
		return err
	}
	if slices.Equal(addresses, d.addresses) {
		return nil
	}
	stale, _, err := d.addAddresses(addresses)
	if err == nil {
		err = deleteKeys(stale)
	}
	if err != nil {
		return err
	}
	d.log.Info("the interface's addresses have changed", "interface", device.Attrs().Name, "addresses", addresses)
	d.addresses = addresses
	return nil
}

// subscribe opens the sockets of this network namespace, the one for news first: nothing is missed.
func (d *Decap) subscribe() (err error) {
	if d.news, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR,
		unix.RTNLGRP_IPV6_IFADDR); err != nil {
		return err
	}
	d.requests, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	return err
}

// ofInterface lists the addresses of an interface, in order.
func (d *Decap) ofInterface(device netlink.Link) ([]netip.Addr, error) {
	list, err := d.requests.AddrList(device, netlink.FAMILY_ALL)
	// The list changed while the kernel told it.
	for try := 0; errors.Is(err, netlink.ErrDumpInterrupted) && try < 10; try++ {
		list, err = d.requests.AddrList(device, netlink.FAMILY_ALL)
	}
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", device.Attrs().Name, err)
	}
	var addresses []netip.Addr
	for _, a := range list {
		if address, ok := netip.AddrFromSlice(a.IP); ok {
			addresses = append(addresses, address)
		}
	}
	return ordered(addresses)
}

// Close lets go of the lock and of every descriptor. What is pinned stays, and packets are opened on.
func (d *Decap) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	if d.news != nil {
		d.news.Close()
	}
	if d.requests != nil {
		d.requests.Close()
	}
	if d.at != nil {
		d.at.link.Close()
	}
	if d.maps != nil {
		d.maps.Close()
	}
	// Of a start that pinned nothing, not even the directory stays. The kernel keeps it where anything is in it.
	_ = os.Remove(d.path)
	if err := d.lock.Close(); err != nil {
		return fmt.Errorf("release the lock of %s: %w", d.path, err)
	}
	return nil
}

func (d *Decap) dir() string {
	return filepath.Join(d.path, decapDirPrefix+strconv.FormatUint(uint64(bpf.DecapSchemaSCHEMA_VERSION), 10))
}

// apply makes the program stand on the interface with these options. What may fail comes first; what makes it visible,
// the link's update or its pin, is the last step that can.
func (d *Decap) apply(opts DecapOptions, device netlink.Link) (err error) {
	var taken undo
	defer func() {
		if err != nil {
			err = errors.Join(err, taken.run())
		}
	}()
	// A start that was killed before it came to the end: nobody has seen any of this.
	staging := d.dir() + stagingSuffix
	if err := removePins(staging, nil); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("clear away an unfinished start: %w", err)
	}
	standing, err := d.standing(device, opts.Mode)
	if err != nil {
		return err
	}
	defer func() {
		if standing != nil && d.at != standing {
			standing.link.Close()
		}
	}()
	adopted, err := pinnedDecapMaps(d.dir(), nil)
	if err != nil {
		return err
	}
	defer closeMaps(adopted)
	program, fresh, err := d.load(opts, adopted)
	if err != nil {
		return err
	}
	defer program.Close()
	defer closeMaps(fresh)

	// The program in force looks into the same maps: more is allowed for a moment, never less.
	staleAddresses, added, err := d.addAddresses(d.addresses)
	taken.add(func() error { return deleteKeys(added) })
	if err != nil {
		return err
	}
	staleSources, added, err := d.addSources(opts.Sources)
	sources := added
	taken.add(func() error { return deleteKeys(sources) })
	if err != nil {
		return err
	}

	at, name := standing, device.Attrs().Name
	attacher := &Loader{mode: opts.Mode, log: d.log}
	if at == nil {
		if at, err = attacher.attach(program, device); err != nil {
			return fmt.Errorf("attach to %s: %w", name, ofDecap(err, name))
		}
		taken.add(at.prepared.run)
		taken.add(at.detach)
	} else if err := attacher.prepare(device, modeOf(device), &taken); err != nil {
		return fmt.Errorf("attach to %s: %w", name, err)
	}
	if err := d.pinMaps(fresh, staging, &taken); err != nil {
		return err
	}
	if standing == nil {
		at.pin = filepath.Join(d.path, linkPrefix+encodeName.Replace(name))
		if err := at.link.Pin(at.pin); err != nil {
			return fmt.Errorf("pin link %s: %w", at.pin, err)
		}
	} else {
		before := at.program
		if err := at.link.Update(program); err != nil {
			return fmt.Errorf("replace the program in %s: %w", at.pin, err)
		}
		d.log.Info("replaced the program in place", "pin", at.pin, "link", at.id, "before", before)
	}
	d.at = at
	taken = nil // it stands
	if err := errors.Join(at.refresh(), deleteKeys(staleAddresses), deleteKeys(staleSources),
		d.removeOtherVersions()); err != nil {
		return fmt.Errorf("the program stands, but what was there before is not cleared away: %w", err)
	}
	return nil
}

// standing is the link that is pinned for the interface; nil: none. The link of an interface that is gone is cleared
// away: it does nothing, and an interface of the same name has come.
func (d *Decap) standing(device netlink.Link, mode XDPMode) (*attachment, error) {
	links, err := pinnedLinks(d.path)
	if err != nil {
		return nil, err
	}
	var found *attachment
	for _, at := range links {
		switch {
		case err != nil:
			at.link.Close()
		case at.index == 0:
			at.link.Close()
			if err = os.Remove(at.pin); err != nil {
				err = fmt.Errorf("clear away the link of an interface that is gone: %w", err)
			} else {
				d.log.Info("cleared away the link of an interface that is gone", "pin", at.pin)
			}
		case at.index != device.Attrs().Index || !runs(device, at.program):
			at.link.Close()
			err = fmt.Errorf("%s is the link of another interface, or of another network namespace: give each a pin path of "+
				"its own", at.pin)
		default:
			found = at
		}
	}
	if err != nil {
		if found != nil {
			found.link.Close()
		}
		return nil, err
	}
	if found != nil && mode != ModeAuto && modeOf(device) != mode {
		d.log.Warn("the interface keeps the xdp mode it was attached in; to change it, remove first",
			"interface", device.Attrs().Name, "mode", modeOf(device), "wanted", mode)
	}
	return found, nil
}

// load loads the program with its constants on top of the maps that are there. It returns the maps made anew.
func (d *Decap) load(opts DecapOptions, adopted map[string]*ebpf.Map) (*ebpf.Program, map[string]*ebpf.Map, error) {
	spec, err := bpf.LoadDecap()
	if err != nil {
		return nil, nil, fmt.Errorf("read the compiled program: %w", err)
	}
	if opts.GUEPort == 0 {
		opts.GUEPort = uint16(bpf.DecapLimitsGUE_PORT)
	}
	for name, value := range map[string]any{
		bpf.DecapVarGuePort:    opts.GUEPort,
		bpf.DecapVarUseSources: truth(len(opts.Sources) > 0),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, nil, fmt.Errorf("set constant %s: %w", name, err)
		}
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: adopted})
	if err != nil {
		return nil, nil, &loadError{err, missingCapabilities()}
	}
	defer collection.Close()
	fresh := make(map[string]*ebpf.Map)
	for name, m := range collection.Maps {
		if adopted[name] != nil || !pinsByName(name) {
			continue
		}
		if fresh[name], err = m.Clone(); err != nil {
			closeMaps(fresh)
			return nil, nil, fmt.Errorf("take map %s: %w", name, err)
		}
	}
	objects := new(bpf.DecapObjects)
	if err := collection.Assign(objects); err != nil {
		closeMaps(fresh)
		return nil, nil, fmt.Errorf("take the program: %w", err)
	}
	d.maps = &objects.DecapMaps
	return objects.FairleadDecap, fresh, nil
}

// pinMaps pins the maps made anew: all of them at once, by a rename, where there was none.
func (d *Decap) pinMaps(fresh map[string]*ebpf.Map, staging string, taken *undo) error {
	dir := d.dir()
	_, err := os.Stat(dir)
	first := errors.Is(err, os.ErrNotExist)
	if first {
		dir = staging
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("make pins: %w", advised(err))
		}
		taken.add(func() error { return os.Remove(dir) })
	}
	for name, m := range fresh {
		pin := filepath.Join(dir, name)
		if err := m.Pin(pin); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
		taken.add(func() error { return os.Remove(filepath.Join(dir, name)) })
	}
	if !first {
		return nil
	}
	if err := os.Rename(staging, d.dir()); err != nil {
		return fmt.Errorf("make pins visible: %w", err)
	}
	dir = d.dir()
	return nil
}

// removeOtherVersions removes the maps of other versions, whose program is not in the link any more.
func (d *Decap) removeOtherVersions() error {
	dirs, err := decapDirs(d.path)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if dir != d.dir() {
			err = errors.Join(err, removePins(dir, nil))
		}
	}
	return err
}

// addAddresses puts addresses into the maps, and returns what else is in there.
func (d *Decap) addAddresses(addresses []netip.Addr) (stale, added []mapKey, err error) {
	var keys []mapKey
	for _, address := range addresses {
		m := d.maps.Addresses6
		if address.Is4() {
			m = d.maps.Addresses4
		}
		keys = append(keys, mapKey{m, string(address.AsSlice())})
	}
	if stale, added, err = addKeys(keys, d.maps.Addresses4, d.maps.Addresses6); err != nil {
		err = fmt.Errorf("set the addresses that tunnels end at: %w", err)
	}
	return stale, added, err
}

// addSources is addAddresses for the prefixes that tunnels may come from.
func (d *Decap) addSources(sources []netip.Prefix) (stale, added []mapKey, err error) {
	var keys []mapKey
	for _, source := range sources {
		m := d.maps.Sources6
		if source.Addr().Is4() {
			m = d.maps.Sources4
		}
		key := binary.NativeEndian.AppendUint32(nil, uint32(source.Bits()))
		keys = append(keys, mapKey{m, string(append(key, source.Masked().Addr().AsSlice()...))})
	}
	if stale, added, err = addKeys(keys, d.maps.Sources4, d.maps.Sources6); err != nil {
		err = fmt.Errorf("set the sources that tunnels may come from: %w", err)
	}
	return stale, added, err
}

// mapKey is an entry of a map whose values say nothing.
type mapKey struct {
	m   *ebpf.Map
	key string
}

// addKeys puts entries into maps. It returns what else is in these maps, and what was not in them before.
func addKeys(keys []mapKey, maps ...*ebpf.Map) (stale, added []mapKey, err error) {
	for _, m := range maps {
		present, err := keysOf(m)
		if err != nil {
			return nil, nil, err
		}
		for _, key := range present {
			if !slices.Contains(keys, mapKey{m, key}) {
				stale = append(stale, mapKey{m, key})
			}
		}
	}
	for _, k := range keys {
		err := k.m.Update([]byte(k.key), uint32(1), ebpf.UpdateNoExist)
		switch {
		case errors.Is(err, ebpf.ErrKeyExist):
		case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOSPC):
			return stale, added, fmt.Errorf("there is room for %d of each family", k.m.MaxEntries())
		case err != nil:
			return stale, added, err
		default:
			added = append(added, k)
		}
	}
	return stale, added, nil
}

func keysOf(m *ebpf.Map) (keys []string, err error) {
	var key []byte
	var value uint32
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		keys = append(keys, string(key))
	}
	return keys, entries.Err()
}

func deleteKeys(keys []mapKey) (err error) {
	for _, k := range keys {
		if e := k.m.Delete([]byte(k.key)); e != nil && !errors.Is(e, ebpf.ErrKeyNotExist) {
			err = errors.Join(err, fmt.Errorf("take an entry out of %v: %w", k.m, e))
		}
	}
	return err
}

// ofDecap says of another decap's program whose it may be.
func ofDecap(err error, interfaceName string) error {
	var other *ForeignError
	if errors.As(err, &other) && other.Name == bpf.DecapProgFairleadDecap {
		return fmt.Errorf("%w: it seems to be a fairlead decap's with another pin path: `fairlead decap --interface %s "+
			"--pin-path DIRECTORY --remove`", err, interfaceName)
	}
	return err
}

// pinnedDecapMaps opens the maps pinned in a directory; none, without error, where there is no directory.
func pinnedDecapMaps(dir string, opts *ebpf.LoadPinOptions) (_ map[string]*ebpf.Map, err error) {
	spec, err := bpf.LoadDecap()
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
			return nil, fmt.Errorf("adopt %s: %w: somebody else put it there: `fairlead decap --remove` first", pin, err)
		}
	}
	return maps, nil
}

// decapDirs lists the directories of all schema versions under a pin path, unfinished ones too.
func decapDirs(path string) ([]string, error) {
	dirs, err := filepath.Glob(filepath.Join(path, decapDirPrefix+"*"))
	if err != nil {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	return dirs, nil
}

// RemoveDecap detaches the program and removes every pin under the pin path, and returns the paths it removed. Packets
// that come in a tunnel are the host's stack's again.
//
// Errors: ErrNothing (nothing was there), ErrLocked (a process keeps its addresses current: stop it first).
func RemoveDecap(pinPath string) (removed []string, err error) {
	path, err := cleanPinPath(pinPath)
	if err != nil {
		return nil, err
	}
	lock, err := lockDirectory(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove: %w under %s", ErrNothing, path)
	} else if err != nil {
		return nil, fmt.Errorf("remove: %w", err)
	}
	defer lock.Close()
	pins, err := filepath.Glob(filepath.Join(path, linkPrefix+"*"))
	if err != nil {
		return nil, fmt.Errorf("remove: %w", err)
	}
	for _, pin := range pins {
		// A link that can't be detached keeps its pin, and its maps.
		err := detachPin(pin)
		if err == nil {
			err = os.Remove(pin)
		}
		if err != nil {
			return removed, fmt.Errorf("remove: %w", err)
		}
		removed = append(removed, pin)
	}
	dirs, err := decapDirs(path)
	for _, dir := range dirs {
		err = errors.Join(err, removePins(dir, &removed))
	}
	if err != nil {
		return removed, fmt.Errorf("remove: %w", err)
	}
	// Others may keep things beside ours; then the directory stays.
	_ = os.Remove(path)
	if len(pins)+len(dirs) == 0 {
		return nil, fmt.Errorf("remove: %w under %s", ErrNothing, path)
	}
	return removed, nil
}

// DecapState is what a decap is and what it has done, as its pins tell.
type DecapState struct {
	PinPath    string
	PID        int // of the process that keeps the addresses current; 0: none to be seen
	Attachment Attachment
	Addresses  []netip.Addr   // in order
	Sources    []netip.Prefix // in order; none: from anywhere
	GUEPort    uint16         // 0: not to be known, without CAP_SYS_ADMIN
	Verdicts   []DecapCounter // all of them
	Events     []DecapCounter
}

// DecapCounter is how often something was decided or met.
type DecapCounter struct {
	Name  string
	Count uint64
}

// ReadDecap reads the pins of a decap, beside its process or without one. Errors: ErrNothing (nothing is attached).
func ReadDecap(pinPath string) (_ *DecapState, err error) {
	path, err := cleanPinPath(pinPath)
	if err != nil {
		return nil, err
	}
	links, err := pinnedLinks(path)
	if err != nil {
		return nil, err
	}
	for _, at := range links {
		defer at.link.Close()
	}
	if len(links) == 0 {
		return nil, fmt.Errorf("read decap: %w under %s", ErrNothing, path)
	}
	d := &Decap{path: path}
	opened, err := pinnedDecapMaps(d.dir(), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer closeMaps(opened)
	d.maps = new(bpf.DecapMaps)
	if err := (&ebpf.Collection{Maps: opened}).Assign(d.maps); err != nil {
		return nil, fmt.Errorf("open maps under %s: %w: another version of fairlead may have made them", d.dir(), err)
	}
	s := &DecapState{PinPath: path, PID: Holder(path), Attachment: describe(links)[0],
		GUEPort: guePort(links[0].program)}
	if err := d.readInto(s); err != nil {
		return nil, fmt.Errorf("read the maps under %s: %w", d.dir(), err)
	}
	return s, nil
}

func (d *Decap) readInto(s *DecapState) error {
	for _, m := range []*ebpf.Map{d.maps.Addresses4, d.maps.Addresses6} {
		keys, err := keysOf(m)
		if err != nil {
			return err
		}
		for _, key := range keys {
			address, _ := netip.AddrFromSlice([]byte(key))
			s.Addresses = append(s.Addresses, address)
		}
	}
	for _, m := range []*ebpf.Map{d.maps.Sources4, d.maps.Sources6} {
		keys, err := keysOf(m)
		if err != nil {
			return err
		}
		for _, key := range keys {
			address, _ := netip.AddrFromSlice([]byte(key[4:]))
			s.Sources = append(s.Sources, netip.PrefixFrom(address, int(binary.NativeEndian.Uint32([]byte(key)))))
		}
	}
	slices.SortFunc(s.Addresses, netip.Addr.Compare)
	slices.SortFunc(s.Sources, comparePrefixes)
	var cpus []bpf.DecapCounterSet
	if err := d.maps.Counters.Lookup(uint32(0), &cpus); err != nil {
		return err
	}
	var total bpf.DecapCounterSet
	for _, c := range cpus {
		for i, n := range c.Verdicts {
			total.Verdicts[i] += n
		}
		for i, n := range c.Events {
			total.Events[i] += n
		}
	}
	names, err := decapNames()
	s.Verdicts, s.Events = namedCounters(names.verdicts, total.Verdicts[:]), namedCounters(names.events, total.Events[:])
	return err
}

func comparePrefixes(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// decapNames are the names of the C's enums, by number, read from the object's own type information.
var decapNames = sync.OnceValues(func() (names struct{ verdicts, events []string }, err error) {
	spec, err := bpf.LoadDecap()
	if err != nil {
		return names, fmt.Errorf("read the compiled program: %w", err)
	}
	for enum, list := range map[string]*[]string{"verdict": &names.verdicts, "event": &names.events} {
		var t *btf.Enum
		if err := spec.Types.TypeByName(enum, &t); err != nil {
			return names, fmt.Errorf("find enum %s in the object: %w", enum, err)
		}
		for _, v := range t.Values {
			if !strings.HasSuffix(v.Name, "_COUNT") {
				*list = append(*list, strings.ToLower(strings.TrimPrefix(v.Name, "EVENT_")))
			}
		}
	}
	return names, nil
})

func namedCounters(names []string, counts []uint64) (counters []DecapCounter) {
	for i, name := range names {
		counters = append(counters, DecapCounter{name, counts[i]})
	}
	return counters
}

// guePort reads the port that a loaded program was given; 0: it can't be read.
func guePort(id ebpf.ProgramID) uint16 {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return 0
	}
	defer program.Close()
	spec, err := bpf.LoadDecap()
	if err != nil {
		return 0
	}
	variable := spec.Variables[bpf.DecapVarGuePort]
	info, err := program.Info()
	if err != nil {
		return 0
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		if constants := readConstants(id); len(constants) >= int(variable.Offset+variable.Size()) {
			return binary.NativeEndian.Uint16(constants[variable.Offset:])
		}
	}
	return 0
}

// readConstants reads a map if it is a section of constants: those alone are frozen.
func readConstants(id ebpf.MapID) []byte {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil
	}
	defer m.Close()
	if info, err := m.Info(); err != nil || !info.Frozen() {
		return nil
	}
	constants, _ := m.LookupBytes(uint32(0))
	return constants
}
