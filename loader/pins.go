package loader

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// Under the pin path stands one directory a schema version. In it: every map by its name, the program in force, and a
// link an interface. A first start builds the directory beside its place and renames it, so that nobody sees half of it.
// Beside them may stand that of a hold: see hold.go.
const (
	bpffsRoot     = "/sys/fs/bpf"
	programPin    = "program"
	linkPrefix    = "link_"
	stagingSuffix = "-new"
)

// ErrNothing says that nothing of Fairlead is pinned under a path: nothing is attached.
var ErrNothing = errors.New("nothing is attached")

var versionPattern = regexp.MustCompile(`^v([0-9]+)(` + stagingSuffix + `)?$`)

func versionDir(version bpf.FairleadSchema) string {
	return "v" + strconv.FormatUint(uint64(version), 10)
}

// The bpf file system takes no dots; interfaces' names may have them.
var (
	encodeName = strings.NewReplacer("%", "%25", ".", "%2e")
	decodeName = strings.NewReplacer("%25", "%", "%2e", ".")
)

// OpenMaps opens the pinned maps for reading, beside a daemon or without one. The closer closes them. Reading the maps
// inside rings and ports takes CAP_SYS_ADMIN.
//
// Errors: ErrNothing (nothing is pinned), ErrSchema (what is pinned was made by another version).
func OpenMaps(pinPath string) (*bpf.FairleadMaps, io.Closer, error) {
	path, err := cleanPinPath(pinPath)
	if err != nil {
		return nil, nil, err
	}
	if dirs, err := schemaDirs(path); err != nil {
		return nil, nil, err
	} else if len(dirs) == 0 {
		return nil, nil, fmt.Errorf("open maps: %w under %s", ErrNothing, path)
	}
	if err := refuseOtherSchemas(path); err != nil {
		return nil, nil, err
	}
	spec, err := bpf.LoadFairlead()
	if err != nil {
		return nil, nil, fmt.Errorf("read the compiled programs: %w", err)
	}
	opened, err := pinnedMaps(filepath.Join(path, versionDir(bpf.FairleadSchemaSCHEMA_VERSION)),
		&ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return nil, nil, err
	}
	for name, m := range opened {
		want := spec.Maps[name]
		want.MaxEntries = m.MaxEntries()
		if err := want.Compatible(m); err != nil {
			closeMaps(opened)
			return nil, nil, &SchemaError{What: fmt.Sprintf("map %s: %s", name, err)}
		}
	}
	maps := new(bpf.FairleadMaps)
	if err := (&ebpf.Collection{Maps: opened}).Assign(maps); err != nil {
		closeMaps(opened)
		return nil, nil, fmt.Errorf("open maps under %s: %w", path, err)
	}
	return maps, maps, nil
}

// Unload detaches every link and removes every pin of every schema version under the pin path, those of a Hold too, and
// returns the paths it removed. Forwarding ends, and the connections noted are forgotten.
//
// Errors: ErrNothing (nothing was there), ErrLocked (a daemon runs: stop it first).
func Unload(pinPath string) (removed []string, err error) {
	path, err := cleanPinPath(pinPath)
	if err != nil {
		return nil, err
	}
	lock, err := lockDirectory(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("unload: %w under %s", ErrNothing, path)
	} else if err != nil {
		return nil, fmt.Errorf("unload: %w", err)
	}
	defer lock.Close()
	dirs, err := schemaDirs(path)
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		err = errors.Join(err, removePins(dir, &removed))
	}
	for _, dir := range []string{holdDir(path), holdDir(path) + stagingSuffix} {
		err = errors.Join(err, removeHold(dir, &removed))
	}
	if err != nil {
		return removed, fmt.Errorf("unload: %w", err)
	}
	// Others may keep things beside ours; then the directory stays.
	_ = os.Remove(path)
	if len(dirs) == 0 && len(removed) == 0 {
		return nil, fmt.Errorf("unload: %w under %s", ErrNothing, path)
	}
	return removed, nil
}

// schemaDirs lists the directories of all schema versions, unfinished ones too. None, without error, where there is no
// pin path.
func schemaDirs(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read pin path: %w", err)
	}
	var dirs []string
	for _, entry := range entries {
		if entry.IsDir() && versionPattern.MatchString(entry.Name()) {
			dirs = append(dirs, filepath.Join(path, entry.Name()))
		}
	}
	return dirs, nil
}

// refuseOtherSchemas refuses a pin path where another schema version is in force. There is one version so far, and so
// no migration.
func refuseOtherSchemas(path string) error {
	dirs, err := schemaDirs(path)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		name := filepath.Base(dir)
		if ours := versionDir(bpf.FairleadSchemaSCHEMA_VERSION); name != ours && name != ours+stagingSuffix {
			return &SchemaError{What: fmt.Sprintf("%s has schema version %s, this fairlead knows %s", dir, name[1:],
				ours[1:])}
		}
	}
	return nil
}

// removePins detaches the links pinned in a directory, then removes all of its pins and the directory. A link that
// can't be detached keeps its pin. The paths removed are added to removed, unless that is nil.
func removePins(dir string, removed *[]string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var failed error
	for _, links := range []bool{true, false} {
		for _, entry := range entries {
			pin := filepath.Join(dir, entry.Name())
			if strings.HasPrefix(entry.Name(), linkPrefix) != links {
				continue
			}
			if links {
				if err := detachPin(pin); err != nil {
					failed = errors.Join(failed, err)
					continue
				}
			}
			if err := os.Remove(pin); err != nil {
				failed = errors.Join(failed, err)
			} else if removed != nil {
				*removed = append(*removed, pin)
			}
		}
	}
	if failed != nil {
		return failed
	}
	return os.Remove(dir)
}

func detachPin(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("open %s: %w", pin, err)
	}
	defer l.Close()
	if err := l.Detach(); err != nil {
		return fmt.Errorf("detach %s: %w", pin, err)
	}
	return nil
}

// pinnedMaps opens those of the data plane's maps that are pinned in a directory.
func pinnedMaps(dir string, opts *ebpf.LoadPinOptions) (_ map[string]*ebpf.Map, err error) {
	spec, err := bpf.LoadFairlead()
	if err != nil {
		return nil, fmt.Errorf("read the compiled programs: %w", err)
	}
	maps := make(map[string]*ebpf.Map)
	for name, m := range spec.Maps {
		if !pinsByName(name) {
			continue
		}
		opts := opts
		if m.Flags&unix.BPF_F_MMAPABLE != 0 {
			opts = nil // the kernel shares a map's memory only through a handle that may write, even to read it
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), opts)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			closeMaps(maps)
			return nil, fmt.Errorf("open pinned map %s: %w", filepath.Join(dir, name), advised(err))
		}
		maps[name] = m
	}
	return maps, nil
}

// pinnedLinks opens the links that are pinned in a directory; none, without error, where there is no directory.
func pinnedLinks(dir string) (_ []*attachment, err error) {
	pins, err := filepath.Glob(filepath.Join(dir, linkPrefix+"*"))
	if err != nil {
		return nil, fmt.Errorf("list pinned links: %w", err)
	}
	var links []*attachment
	defer func() {
		if err != nil {
			for _, at := range links {
				at.link.Close()
			}
		}
	}()
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		if err != nil {
			return nil, fmt.Errorf("open pinned link %s: %w", pin, advised(err))
		}
		at := &attachment{link: l, pin: pin}
		links = append(links, at)
		if err := at.refresh(); err != nil {
			return nil, fmt.Errorf("read pinned link %s: %w", pin, err)
		}
	}
	return links, nil
}

// advised adds to a refused system call what it takes.
func advised(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %s", err, privilegeAdvice)
	}
	return err
}

// requireBPFFS sees to it that a pin path lies in a bpf file system, mounting one where the system would.
func requireBPFFS(path string) error {
	if onBPFFS(path) {
		return nil
	}
	if path != bpffsRoot && !strings.HasPrefix(path, bpffsRoot+"/") {
		return fmt.Errorf("pin path %s: not in a bpf file system: choose one under %s, or mount one there: "+
			"mount -t bpf bpf DIRECTORY", path, bpffsRoot)
	}
	advice := "mount -t bpf bpf " + bpffsRoot + " (in a container: on the host, and share it)"
	root, err := os.Open(bpffsRoot)
	if err != nil {
		return fmt.Errorf("mount the bpf file system: %w: does the kernel have CONFIG_BPF_SYSCALL? is /sys mounted?", err)
	}
	defer root.Close()
	// Two that start together must not mount one over the other, hiding the first one's pins.
	if err := unix.Flock(int(root.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("mount the bpf file system: lock %s: %w", bpffsRoot, err)
	}
	if onBPFFS(path) {
		return nil
	}
	if err := unix.Mount("bpf", bpffsRoot, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount the bpf file system at %s: %w: as root, %s", bpffsRoot, err, advice)
	}
	return nil
}

// onBPFFS asks of the nearest directory that exists.
func onBPFFS(path string) bool {
	for {
		var fs unix.Statfs_t
		err := unix.Statfs(path, &fs)
		if err == nil {
			return fs.Type == unix.BPF_FS_MAGIC
		}
		if !errors.Is(err, unix.ENOENT) || path == "/" {
			return false
		}
		path = filepath.Dir(path)
	}
}
