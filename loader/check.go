package loader

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// Level says how bad a finding is.
type Level string

const (
	LevelOK   Level = "ok"
	LevelWarn Level = "warn" // works, but not as well as it could
	LevelFail Level = "fail" // Open or Attach will fail
)

// Finding is one thing that Check looked at.
type Finding struct {
	Level   Level
	Subject string // kernel, privileges, bpf file system, an interface's name …
	What    string // what is so
	Advice  string // what a person can do about it; empty where nothing is to be done
}

const privilegeAdvice = "it takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN: run as root, or give the service these " +
	"capabilities"

const forbiddenAdvice = "a security module, a container's seccomp filter or kernel lockdown forbids bpf(2)"

// Check finds out what this kernel, these privileges and these interfaces allow, without changing anything. What can
// be tried is tried rather than guessed from a version.
func Check(opts Options) []Finding {
	findings := []Finding{checkKernel()}
	findings = append(findings, checkPrivileges()...)
	findings = append(findings, checkPinPath(opts.PinPath))
	mode := opts.Mode
	if mode == "" {
		mode = ModeAuto
	}
	frags := false
	if spec, err := bpf.LoadFairlead(); err == nil {
		frags = spec.Programs[bpf.FairleadProgFairlead].Flags&unix.BPF_F_XDP_HAS_FRAGS != 0
	}
	for _, name := range opts.Interfaces {
		findings = append(findings, checkInterface(name, mode, frags, opts.PinPath)...)
	}
	return findings
}

func checkKernel() Finding {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return Finding{LevelWarn, "kernel", "its version can't be read: " + err.Error(), "it must be 6.1 or newer"}
	}
	return kernelFinding(unix.ByteSliceToString(uname.Release[:]))
}

func kernelFinding(release string) Finding {
	f := Finding{Level: LevelOK, Subject: "kernel", What: "Linux " + release}
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		f.Level, f.Advice = LevelWarn, "a version that can't be read; it must be 6.1 or newer"
	} else if major < 6 || major == 6 && minor < 1 {
		f.Level, f.Advice = LevelFail, "fairlead needs 6.1 or newer; dataplane mode userspace works with this one"
	}
	return f
}

// The capabilities it takes; a test raises them one by one. CAP_SYS_ADMIN holds CAP_BPF and CAP_PERFMON within it.
var needed = []struct {
	number int
	name   string
}{{unix.CAP_BPF, "CAP_BPF"}, {unix.CAP_PERFMON, "CAP_PERFMON"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}}

func checkPrivileges() []Finding {
	if missing := missingCapabilities(); len(missing) > 0 {
		return []Finding{{LevelFail, "privileges", strings.Join(missing, ", ") + " missing", privilegeAdvice}}
	}
	findings := []Finding{{LevelOK, "privileges", "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN", ""}}
	if !capable(unix.CAP_SYS_ADMIN) {
		findings = append(findings, Finding{LevelWarn, "privileges", "no CAP_SYS_ADMIN", "without it the bpf file system " +
			"must be mounted already, another's program can't be named, and pinned rings can't be read back"})
	}
	return append(findings, checkJIT())
}

// missingCapabilities names those that this thread lacks.
func missingCapabilities() []string {
	var missing []string
	for _, c := range needed {
		if !capable(c.number) && (c.number == unix.CAP_NET_ADMIN || !capable(unix.CAP_SYS_ADMIN)) {
			missing = append(missing, c.name)
		}
	}
	return missing
}

// capable asks for an effective capability of this thread; none is, where that can't be read.
func capable(number int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	return err == nil && data[number/32].Effective&(1<<(number%32)) != 0
}

// checkJIT loads the smallest program there is and looks at what the kernel made of it.
func checkJIT() Finding {
	const subject = "bpf"
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "fairlead_check", Type: ebpf.XDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
	if err != nil {
		advice := "does the kernel have CONFIG_BPF_SYSCALL?"
		if errors.Is(err, unix.EPERM) {
			advice = forbiddenAdvice
		}
		return Finding{LevelFail, subject, "no xdp program can be loaded: " + err.Error(), advice}
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return Finding{LevelWarn, subject, "the loaded program can't be read: " + err.Error(), ""}
	}
	if size, err := info.JitedSize(); err != nil || size == 0 {
		return Finding{LevelWarn, subject, "programs are interpreted, several times slower than compiled ones",
			"sysctl net.core.bpf_jit_enable=1"}
	}
	return Finding{LevelOK, subject, "programs load and are compiled (JIT)", ""}
}

func checkPinPath(pinPath string) Finding {
	const subject = "pin path"
	path, err := cleanPinPath(pinPath)
	if err != nil {
		return Finding{LevelFail, subject, err.Error(), ""}
	}
	switch {
	case onBPFFS(path):
	case path != bpffsRoot && !strings.HasPrefix(path, bpffsRoot+"/"):
		return Finding{LevelFail, subject, path + " is not in a bpf file system",
			"choose one under " + bpffsRoot + ", or mount one there: mount -t bpf bpf DIRECTORY"}
	default:
		if _, err := os.Stat(bpffsRoot); err != nil {
			return Finding{LevelFail, subject, err.Error(), "does the kernel have CONFIG_BPF_SYSCALL? is /sys mounted?"}
		}
		return Finding{LevelWarn, subject, "no bpf file system at " + bpffsRoot,
			"it will be mounted at the start, which takes CAP_SYS_ADMIN; by hand: mount -t bpf bpf " + bpffsRoot}
	}
	if err := refuseOtherSchemas(path); err != nil {
		return Finding{LevelFail, subject, err.Error(), ""}
	}
	return Finding{LevelOK, subject, path + " is in a bpf file system", ""}
}

// What linear mode leaves of a page for a frame: headroom before, struct skb_shared_info behind it.
var linearMTU = os.Getpagesize() - 256 - 320 - 14

func checkInterface(name string, mode XDPMode, frags bool, pinPath string) []Finding {
	device, err := netlink.LinkByName(name)
	if err != nil {
		return []Finding{{LevelFail, name, err.Error(), "`ip link` lists what there is"}}
	}
	attrs := device.Attrs()
	var findings []Finding
	add := func(level Level, what, advice string) {
		findings = append(findings, Finding{level, name, what, advice})
	}

	if attrs.RawFlags&unix.IFF_UP == 0 {
		add(LevelWarn, "is down", "ip link set dev "+name+" up")
	} else if attrs.RawFlags&unix.IFF_RUNNING == 0 {
		add(LevelWarn, "is up, but has no carrier", "look at the cable or the peer")
	} else {
		add(LevelOK, fmt.Sprintf("is up, mtu %d", attrs.MTU), "")
	}
	if attrs.EncapType != "ether" {
		add(LevelFail, "is of type "+attrs.EncapType+", not Ethernet", "attach to the Ethernet device below it")
	}
	if xdp := attrs.Xdp; xdp != nil && xdp.Attached && !ownProgram(pinPath, attrs.Index, ebpf.ProgramID(xdp.ProgId)) {
		add(LevelFail, foreign(device, unix.EBUSY).Error(), "")
	}
	if f, ok := mtuFinding(name, attrs.MTU, mode, frags); ok {
		findings = append(findings, f)
	}
	native, known := xdpFeatures(attrs.Index)
	switch {
	case mode == ModeGeneric:
	case !known:
		add(LevelOK, "whether the driver does native xdp shows when it is attached (the kernel tells since 6.3)", "")
	case native&xdpActBasic == 0 && mode == ModeNative:
		add(LevelFail, "the driver has no native xdp", "set xdp to auto or generic")
	case native&xdpActBasic == 0:
		add(LevelWarn, "the driver has no native xdp: it will be generic, which is slower", "")
		mode = ModeGeneric
	case native&xdpActRedirect == 0:
		add(LevelWarn, "the driver does native xdp, but not redirect: frames leave by the interface they came by", "")
	default:
		add(LevelOK, "the driver does native xdp", "")
	}
	if on, err := ethtoolFlag(name, ethtoolGetFlags); err == nil && on&ethtoolFlagLRO != 0 {
		add(LevelWarn, "LRO is on: drivers refuse xdp with it, or turn it off", "ethtool -K "+name+" lro off")
	}
	if on, err := ethtoolFlag(name, ethtoolGetGRO); err == nil && on != 0 && mode == ModeGeneric {
		add(LevelWarn, "GRO is on: generic xdp sees packets joined together, larger than the path takes",
			"ethtool -K "+name+" gro off")
	}
	return findings
}

// mtuFinding: a linear program needs a whole frame in one page, in native mode. The limit itself is the driver's; this
// is the largest that any has with this page size.
func mtuFinding(name string, mtu int, mode XDPMode, frags bool) (Finding, bool) {
	if mtu <= linearMTU || frags || mode == ModeGeneric {
		return Finding{}, false
	}
	f := Finding{Level: LevelFail, Subject: name,
		What:   fmt.Sprintf("mtu %d is more than native xdp takes without fragments (%d)", mtu, linearMTU),
		Advice: fmt.Sprintf("ip link set dev %s mtu %d (and its peer's), or xdp: generic", name, linearMTU)}
	if mode == ModeAuto {
		f.Level, f.What = LevelWarn, f.What+": it will be generic, which is slower"
	}
	return f, true
}

// ownProgram says whether the program on an interface is the one of a link pinned under the pin path.
func ownProgram(pinPath string, index int, program ebpf.ProgramID) bool {
	links, err := Links(pinPath)
	return err == nil && slices.ContainsFunc(links, func(at Attachment) bool {
		return at.Index == index && (program == 0 || at.Program == program)
	})
}

// Features of a driver: enum netdev_xdp_act, linux/netdev.h.
const (
	xdpActBasic    = 1
	xdpActRedirect = 2
)

// xdpFeatures asks the kernel what the driver does; known is false before Linux 6.3. Numbers: linux/netdev.h.
func xdpFeatures(index int) (features uint64, known bool) {
	const (
		commandDevGet = 1
		attrIfindex   = 1
		attrFeatures  = 3
	)
	family, err := netlink.GenlFamilyGet("netdev")
	if err != nil {
		return 0, false
	}
	request := nl.NewNetlinkRequest(int(family.ID), 0)
	request.AddData(&nl.Genlmsg{Command: commandDevGet, Version: 1})
	request.AddData(nl.NewRtAttr(attrIfindex, nl.Uint32Attr(uint32(index))))
	answers, err := request.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil || len(answers) == 0 || len(answers[0]) < nl.SizeofGenlmsg {
		return 0, false
	}
	attrs, err := nl.ParseRouteAttr(answers[0][nl.SizeofGenlmsg:])
	if err != nil {
		return 0, false
	}
	for _, attr := range attrs {
		if attr.Attr.Type == attrFeatures && len(attr.Value) >= 8 {
			return nl.NativeEndian().Uint64(attr.Value), true
		}
	}
	return 0, false
}

// Commands and flags of linux/ethtool.h.
const (
	ethtoolGetFlags = 0x25
	ethtoolGetGRO   = 0x2b
	ethtoolFlagLRO  = 1 << 15
)

// ethtoolFlag asks one value of a device by SIOCETHTOOL.
func ethtoolFlag(name string, command uint32) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("ask %s by ethtool: %w", name, err)
	}
	defer unix.Close(fd)
	value := &struct{ command, data uint32 }{command: command} // struct ethtool_value
	request := &struct {                                       // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(value)}
	copy(request.name[:unix.IFNAMSIZ-1], name)
	var pin runtime.Pinner
	pin.Pin(value)
	defer pin.Unpin()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL,
		uintptr(unsafe.Pointer(request))); errno != 0 {
		return 0, fmt.Errorf("ask %s by ethtool: %w", name, errno)
	}
	return value.data, nil
}
