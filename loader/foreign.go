package loader

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// ErrForeign is matched by the errors that say that somebody else's program is on an interface.
var ErrForeign = errors.New("another xdp program is on the interface")

// ForeignError names the program that is on an interface. It is never thrown off. It matches ErrForeign.
type ForeignError struct {
	Interface string
	Program   ebpf.ProgramID // 0: not to be known
	Mode      XDPMode        // "": not to be known
	Name      string         // empty, as Type and Tag, without CAP_SYS_ADMIN, which opening another's program takes
	Type      string
	Tag       string
	Link      link.ID // the link that holds it; 0: none, or not to be known
}

func (e *ForeignError) Is(target error) bool { return target == ErrForeign }

func (e *ForeignError) Error() string {
	var about []string
	if e.Name != "" {
		about = append(about, fmt.Sprintf("name %q, type %s, tag %s", e.Name, e.Type, e.Tag))
	} else {
		about = append(about, "its name takes CAP_SYS_ADMIN")
	}
	if e.Mode != "" {
		about = append(about, string(e.Mode))
	}
	way := fmt.Sprintf("`ip link set dev %s %s off` takes it off", e.Interface, map[XDPMode]string{
		ModeNative: "xdpdrv", ModeGeneric: "xdpgeneric", "": "xdp"}[e.Mode])
	if e.Link != 0 {
		about = append(about, fmt.Sprintf("held by link %d", e.Link))
		way = fmt.Sprintf("`bpftool link detach id %d` takes it off", e.Link)
	}
	whose := "find out who put it there; if nobody needs it,"
	if e.Name == "fairlead" || e.Name == bpf.HoldProgFairleadHold {
		whose = "it seems to be a fairlead's with another pin_path: `fairlead unload` with its configuration, or"
	}
	return fmt.Sprintf("xdp program %d (%s) is on %s, and an interface holds one: %s %s", e.Program,
		strings.Join(about, ", "), e.Interface, whose, way)
}

// foreign explains why an interface is taken, and by what.
func foreign(device netlink.Link, cause error) error {
	name, index := device.Attrs().Name, device.Attrs().Index
	// Asked anew: the program may have come since.
	if now, err := netlink.LinkByIndex(index); err == nil {
		device = now
	}
	xdp := device.Attrs().Xdp
	if xdp == nil || !xdp.Attached {
		if errors.Is(cause, unix.EEXIST) {
			return fmt.Errorf("%w: a device above it (bond, bridge or VLAN) has an xdp program: attach to that one", cause)
		}
		return fmt.Errorf("%w: the program that was there has just gone: try again", cause)
	}
	e := &ForeignError{Interface: name, Program: ebpf.ProgramID(xdp.ProgId), Mode: modeOf(device)}
	if program, err := ebpf.NewProgramFromID(e.Program); err == nil {
		defer program.Close()
		if info, err := program.Info(); err == nil {
			e.Name, e.Type, e.Tag = info.Name, info.Type.String(), info.Tag
		}
	}
	links := new(link.Iterator)
	defer links.Close()
	for links.Next() {
		info, err := links.Link.Info()
		if err != nil || info.Program != e.Program {
			continue
		}
		if on := info.XDP(); on != nil && int(on.Ifindex) == index {
			e.Link = info.ID
			break
		}
	}
	return e
}
