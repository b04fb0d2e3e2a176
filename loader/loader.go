// Package loader brings the data plane into the kernel and keeps it there: it loads the programs with the constants of
// a configuration, attaches them to interfaces, replaces them in place, pins what must outlive the daemon, and takes
// all of it away again. Nothing but Unload, UnloadHeld, and an interface taken out of the configuration, ever ends
// forwarding. Where nothing forwards yet, Hold keeps the host's own stack from resetting what is to be forwarded.
package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// Settings are the load-time constants: what a configuration does not use is cut out of the programs as they are
// loaded.
type Settings struct {
	IPv4, IPv6        bool // families that services or backends have
	TCP, UDP          bool // protocols that services have
	FullNAT, NAT, DSR bool // forwarding methods in use
	Tunnel            bool // ipip or gue is in use
	AffinityClient    bool // some service chooses by the client's address alone
	Checks            bool // some checks go through their method
	Journal           bool // what becomes of connections is told, for the daemon to keep on disk
	// Connections is the capacity of the connection table, HalfOpen that of the half-open table, in connections of each
	// family. 0 takes the size that the programs were compiled with. Sizes of maps already pinned are kept.
	Connections uint32
	HalfOpen    uint32
}

// XDPMode says where in the kernel the program runs.
type XDPMode string

const (
	ModeAuto    XDPMode = "auto"    // native, else generic
	ModeNative  XDPMode = "native"  // in the driver
	ModeGeneric XDPMode = "generic" // in the stack: works with every device, and is slower
)

// Options are what Open and Check need to know.
type Options struct {
	PinPath    string // a directory in a bpf file system
	Interfaces []string
	// Targets are the devices that packets leave by, of Interfaces or not: Check looks at whether they take them.
	Targets  []string
	VLAN     bool    // VLAN tags are in use: frames must come with them
	Mode     XDPMode // "" is ModeAuto
	Settings Settings
	Logger   *slog.Logger // nil is slog.Default
}

// Loader holds the loaded programs and maps, and the exclusive lock of its pin path.
type Loader struct {
	path string // the pin path
	mode XDPMode
	log  *slog.Logger
	lock *os.File

	maps *bpf.FairleadMaps

	mu         sync.Mutex
	interfaces []string
	vlan       bool
	targets    []string
	settings   Settings // in force
	programs   *bpf.FairleadPrograms
	previous   *bpf.FairleadPrograms // those before the last Replace
	pinned     *ebpf.Program         // what the pin of the program holds
	unpinned   map[string]*ebpf.Map  // made by this start; pinned once attaching succeeds
	byName     map[string]*ebpf.Map  // all of maps
	adopted    bool                  // the connection table was there
	links      []*attachment         // every one of them pinned, or about to be
	held       []*attachment         // those of a hold, until Attach takes them over or releases them
	holder     *ebpf.Program         // the pinned program of that hold; nil: none
	closed     bool
}

// Open takes the exclusive lock of the pin path, adopts the maps pinned there, makes those that are missing and loads
// the programs with them. It attaches nothing, and pins nothing yet: Attach does. A pin path under /sys/fs/bpf has the
// bpf file system mounted if it is not.
//
// Errors: ErrLocked (another daemon holds the pin path), ErrSchema (what is pinned was made by another version and
// can't be adopted). A program that the verifier refuses gives its whole log.
func Open(opts Options) (_ *Loader, err error) {
	l := &Loader{
		mode: opts.Mode, log: opts.Logger, interfaces: opts.Interfaces, vlan: opts.VLAN, targets: opts.Targets,
		maps: new(bpf.FairleadMaps), programs: new(bpf.FairleadPrograms),
	}
	switch l.mode {
	case "":
		l.mode = ModeAuto
	case ModeAuto, ModeNative, ModeGeneric:
	default:
		return nil, fmt.Errorf("xdp mode %q: not one of auto, native, generic", l.mode)
	}
	if l.log == nil {
		l.log = slog.Default()
	}
	if l.path, err = cleanPinPath(opts.PinPath); err != nil {
		return nil, err
	}
	if err := requireBPFFS(l.path); err != nil {
		return nil, err
	}
	if l.lock, err = lockOrCreate(l.path); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()

	if err := refuseOtherSchemas(l.path); err != nil {
		return nil, err
	}
	// A start that was killed before it came to the end: nobody has seen any of this.
	if err := removePins(l.stagingDir(), nil); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("clear away an unfinished start: %w", err)
	}
	if err := settleHolds(l.path, l.log); err != nil {
		return nil, err
	}
	adopted, err := pinnedMaps(l.dir(), nil)
	if err != nil {
		return nil, err
	}
	defer closeMaps(adopted)
	_, l.adopted = adopted[bpf.FairleadMapConnections4]
	if l.pinned, err = ebpf.LoadPinnedProgram(filepath.Join(l.dir(), programPin), nil); err != nil &&
		!errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open the pinned program: %w", err)
	}
	if l.links, err = pinnedLinks(l.dir()); err != nil {
		return nil, err
	}
	if l.held, err = pinnedLinks(holdDir(l.path)); err != nil {
		return nil, err
	}
	if l.holder, err = openPinned(filepath.Join(holdDir(l.path), holdVersion(), programPin)); err != nil {
		return nil, err
	}

	collection, settings, err := load(opts.Settings, adopted, l.log)
	if err != nil {
		return nil, err
	}
	defer collection.Close()
	l.byName, l.unpinned = make(map[string]*ebpf.Map), make(map[string]*ebpf.Map)
	for name, m := range collection.Maps {
		if _, ok := adopted[name]; !ok && pinsByName(name) {
			l.unpinned[name] = m
		}
		if pinsByName(name) {
			l.byName[name] = m
		}
	}
	if err := collection.Assign(l.maps); err != nil {
		return nil, fmt.Errorf("take the maps: %w", err)
	}
	if err := collection.Assign(l.programs); err != nil {
		return nil, fmt.Errorf("take the programs: %w", err)
	}
	l.settings = settings
	return l, nil
}

// Adopted tells whether the connection table was pinned already: an earlier daemon's, of this boot of the host.
func (l *Loader) Adopted() bool {
	return l.adopted
}

// Maps are the data plane's maps: the same for the life of the Loader, closed by its Close.
func (l *Loader) Maps() *bpf.FairleadMaps { return l.maps }

// Programs are the programs in force. Ask again after Replace: those from before it stay open until the next one.
func (l *Loader) Programs() *bpf.FairleadPrograms {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.programs
}

// Settings are the constants in force: sizes are those of the maps, which may be older than the configuration.
func (l *Loader) Settings() Settings {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.settings
}

// Attach attaches the program to every interface of the options, and pins links, program and maps. An interface that
// has a pinned link keeps it, be it an earlier Attach's or a Hold's: the program is replaced in place, no packet passes
// unseen. It happens whole or not at all: on an error everything is as it was before. Once it stands, links of
// interfaces no longer named are detached, and nothing is held any more.
//
// Errors: *ForeignError (ErrForeign), where another program is on an interface.
func (l *Loader) Attach() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.apply(l.programs.Fairlead, l.interfaces)
}

// Replace brings other constants or other interfaces into force: a new program with the same maps takes the place of
// the old one in every link, new interfaces are attached, and then those no longer wanted are detached. On an error the
// old program and the old interfaces stay. Errors: as Open and Attach.
func (l *Loader) Replace(s Settings, interfaces []string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	collection, settings, err := load(s, l.byName, l.log)
	if err != nil {
		return err
	}
	defer collection.Close()
	next := new(bpf.FairleadPrograms)
	if err := collection.Assign(next); err != nil {
		return fmt.Errorf("take the programs: %w", err)
	}
	if err := l.apply(next.Fairlead, interfaces); err != nil {
		closePrograms(next)
		return err
	}
	closePrograms(l.previous)
	l.previous, l.programs = l.programs, next
	l.settings, l.interfaces = settings, interfaces
	return nil
}

// Close lets go of the lock and of every descriptor. What is pinned stays, and forwarding goes on.
func (l *Loader) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	closeLinks(l.links)
	closeLinks(l.held)
	if l.holder != nil {
		l.holder.Close()
	}
	closePrograms(l.previous)
	closePrograms(l.programs)
	if l.pinned != nil {
		l.pinned.Close()
	}
	closeMaps(l.byName)
	// Of a start that pinned nothing, not even the directory stays. The kernel keeps it where anything is in it.
	_ = os.Remove(l.path)
	if err := l.lock.Close(); err != nil {
		return fmt.Errorf("release the lock of %s: %w", l.path, err)
	}
	return nil
}

func (l *Loader) dir() string {
	return filepath.Join(l.path, versionDir(bpf.FairleadSchemaSCHEMA_VERSION))
}

func (l *Loader) stagingDir() string { return l.dir() + stagingSuffix }

func closePrograms(p *bpf.FairleadPrograms) {
	if p == nil {
		return
	}
	for _, program := range []*ebpf.Program{p.Fairlead, p.Tend, p.Fill} {
		if program != nil {
			program.Close()
		}
	}
}

func closeMaps(maps map[string]*ebpf.Map) {
	for _, m := range maps {
		m.Close()
	}
}

func cleanPinPath(path string) (string, error) {
	if path == "" {
		return "", errors.New("pin path: empty")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("pin path: %w", err)
	}
	if strings.Contains(path, ".") {
		return "", fmt.Errorf("pin path %s: the bpf file system takes no name with a dot: choose another", path)
	}
	return path, nil
}
