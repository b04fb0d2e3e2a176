package loader

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
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
	var devices []egress
	for _, name := range opts.Interfaces {
		e, found := checkInterface(name, mode, frags, opts)
		findings = append(findings, found...)
		if e != nil {
			devices = append(devices, *e)
		}
	}
	for _, name := range opts.Targets {
		if slices.Contains(opts.Interfaces, name) {
			continue
		}
		c, err := findCard(name)
		if err != nil {
			findings = append(findings, Finding{LevelWarn, name, err.Error(), "`ip link` lists what there is"})
			continue
		}
		devices = append(devices, egress{card: c})
	}
	return append(findings, targetFindings(devices, cpus("online"))...)
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

func findCard(name string) (*card, error) {
	device, err := netlink.LinkByName(name)
	if err != nil {
		return nil, err
	}
	return readCard(device)
}

// checkInterface looks at an interface that a program is to be attached to. Where it is there, it is one that frames
// leave by.
func checkInterface(name string, mode XDPMode, frags bool, opts Options) (*egress, []Finding) {
	c, err := findCard(name)
	if err != nil {
		return nil, []Finding{{LevelFail, name, err.Error(), "`ip link` lists what there is"}}
	}
	attrs := c.Attrs()
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
		return nil, findings
	}
	attached, held := false, false
	if xdp := attrs.Xdp; xdp != nil && xdp.Attached {
		held = holds(opts.PinPath, attrs.Index, ebpf.ProgramID(xdp.ProgId))
		if attached = held || ownProgram(opts.PinPath, attrs.Index, ebpf.ProgramID(xdp.ProgId)); !attached {
			add(LevelFail, foreign(c.Link, unix.EBUSY).Error(), "")
		}
	}
	if attached {
		if now := modeOf(c.Link); now != "" {
			mode = now
		}
		what := "fairlead is attached, xdp "
		if held {
			what = "is held until fairlead is attached, xdp "
		}
		add(LevelOK, what+string(mode), "")
	} else {
		mode, findings = c.expect(mode, frags, findings)
	}
	for _, u := range c.unwanted(mode, opts.VLAN) {
		findings = append(findings, u.finding(attached))
	}
	findings = append(findings, c.portFindings(opts.Interfaces)...)
	for _, r := range c.receivers() {
		if r.unreadable != nil {
			findings = append(findings, Finding{LevelFail, r.name, r.unreadable.Error(), privilegeAdvice})
		}
		findings = append(findings, r.cautions(mode, opts.VLAN, attached)...)
	}
	return &egress{c, mode, attached}, findings
}

// expect says in which mode a program will run on a device that has none, and why not in a better one.
func (c *card) expect(mode XDPMode, frags bool, findings []Finding) (XDPMode, []Finding) {
	add := func(level Level, what, advice string) {
		findings = append(findings, Finding{level, c.name, what, advice})
	}
	obstacles := c.obstacles(frags)
	if mode == ModeGeneric {
		if upper := c.upper(); upper != "" {
			add(LevelWarn, "is a "+upper, c.lowerAdvice())
		}
		return mode, findings
	}
	for _, o := range obstacles {
		if mode == ModeNative {
			add(LevelFail, o.what, o.advice+", or set xdp to auto or generic")
		} else {
			add(LevelWarn, o.what+": it will be generic, which is slower", o.advice)
		}
	}
	switch {
	case len(obstacles) > 0:
		if mode == ModeAuto {
			mode = ModeGeneric
		}
		return mode, findings
	case !c.xdp.known:
		add(LevelOK, "whether the driver does native xdp shows when it is attached (the kernel tells since 6.3)", "")
	case c.xdp.lacks(xdpRedirect):
		add(LevelWarn, "the driver does native xdp, but not redirect: frames leave by the interface they came by", "")
	default:
		add(LevelOK, "the driver does native xdp", "")
	}
	if c.Attrs().MTU > linearMTU && c.fragsUnknown() {
		add(LevelOK, fmt.Sprintf("whether native xdp takes frames of mtu %d shows when it is attached", c.Attrs().MTU), "")
	}
	return ModeNative, findings
}

// ownProgram says whether the program on an interface is the one of a link pinned under the pin path.
func ownProgram(pinPath string, index int, program ebpf.ProgramID) bool {
	links, err := Links(pinPath)
	return err == nil && contains(links, index, program)
}

// holds says whether it is the one of a link of a hold's.
func holds(pinPath string, index int, program ebpf.ProgramID) bool {
	s, err := ReadHold(pinPath)
	return err == nil && contains(s.Interfaces, index, program)
}

func contains(links []Attachment, index int, program ebpf.ProgramID) bool {
	return slices.ContainsFunc(links, func(at Attachment) bool {
		return at.Index == index && (program == 0 || at.Program == program)
	})
}
