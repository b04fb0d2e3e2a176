package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Verdicts of linux/bpf.h.
const (
	actDrop = 1
	actPass = 2
	actTX   = 3
)

// tiny loads quickly, for what is about devices alone.
var tiny = Settings{IPv4: true, DSR: true, Connections: 1024, HalfOpen: 1024}

// verdict is an XDP program that does the same with every frame.
func (b *bench) verdict(what int32) *ebpf.Program {
	return b.program(ebpf.XDP, asm.Mov.Imm(asm.R0, what), asm.Return())
}

func (b *bench) program(kind ebpf.ProgramType, code ...asm.Instruction) *ebpf.Program {
	b.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: kind, License: "Dual BSD/GPL", Instructions: code})
	must(b, err)
	b.Cleanup(func() { program.Close() })
	return program
}

// attachXDP attaches a program as another would, natively.
func (b *bench) attachXDP(device string, program *ebpf.Program) {
	b.Helper()
	b.attachAs(device, program, link.XDPDriverMode)
}

func (b *bench) attachAs(device string, program *ebpf.Program, mode link.XDPAttachFlags) {
	b.Helper()
	at, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: b.device(device).Attrs().Index, Flags: mode})
	must(b, err)
	b.Cleanup(func() { at.Close() })
}

func (b *bench) offloads(device string) map[string]offload {
	b.Helper()
	all, err := ethtoolOffloads(device)
	must(b, err)
	return all
}

func (b *bench) turn(device string, on bool, offloads ...string) {
	b.Helper()
	wanted := make(map[string]bool)
	for _, name := range offloads {
		wanted[name] = on
	}
	must(b, ethtoolSwitch(device, wanted))
}

func (b *bench) card(name string) *card {
	b.Helper()
	c, err := findCard(name)
	must(b, err)
	return c
}

// add adds a device, or says that this kernel has none of its kind.
func (b *bench) add(device netlink.Link) bool {
	b.Helper()
	err := netlink.LinkAdd(device)
	if errors.Is(err, unix.EOPNOTSUPP) {
		b.Logf("this kernel has no %s devices: test/kernels tries them in a virtual machine that has", device.Type())
		return false
	}
	must(b, err)
	must(b, netlink.LinkSetUp(device))
	return true
}

// expects makes sure that of the findings on a subject, one tells this.
func expects(t testing.TB, findings []Finding, level Level, subject, what, advice string) {
	t.Helper()
	for _, f := range findings {
		if f.Level == level && f.Subject == subject && strings.Contains(f.What, what) && strings.Contains(f.Advice, advice) {
			return
		}
	}
	t.Errorf("none says %s %s %q %q: %+v", level, subject, what, advice, findings)
}

func tells(findings []Finding, subject, what string) bool {
	return slices.ContainsFunc(findings, func(f Finding) bool { return f.Subject == subject && strings.Contains(f.What, what) })
}

// What the loader reads and turns is what the kernel has: the kernel's own account of what a veth's driver does goes with GRO
// of its peer.
func TestEthtool(t *testing.T) {
	b := newBench(t)
	attributes := netlink.NewLinkAttrs()
	attributes.Name, attributes.NumTxQueues, attributes.NumRxQueues = "flload-a", 3, 4
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attributes, PeerName: "flload-ap"}))
	for _, end := range []string{"flload-a", "flload-ap"} {
		must(t, netlink.LinkSetUp(b.device(end)))
	}
	driver, err := ethtoolDriver("flload-a")
	must(t, err)
	equal(t, "driver", driver, "veth")
	queues, err := ethtoolChannels("flload-a")
	must(t, err)
	if want := (channels{maxRx: 4, maxTx: 3, rx: queues.rx, tx: queues.tx}); queues != want || queues.rx*queues.tx == 0 {
		t.Errorf("queues: %+v, want %+v", queues, want)
	}
	statistics, err := ethtoolStatistics("flload-a")
	must(t, err)
	equal(t, "the peer's number", statistics["peer_ifindex"], uint64(b.device("flload-ap").Attrs().Index))
	if _, ok := statistics["rx_queue_0_xdp_drops"]; !ok {
		t.Errorf("statistics: %v", statistics)
	}

	for _, on := range []bool{true, false, true} {
		b.turn("flload-ap", on, "rx-gro", "rx-vlan-hw-parse")
		got := b.offloads("flload-ap")
		for _, name := range []string{"rx-gro", "rx-vlan-hw-parse"} {
			if want := (offload{on: on}); got[name] != want {
				t.Errorf("%s: %+v, want %+v", name, got[name], want)
			}
		}
		if support := readXDPFeatures(b.device("flload-a").Attrs().Index); support.known {
			equal(t, "takes redirected frames", support.lacks(xdpTarget), !on)
		}
	}
	if got := b.offloads("flload-a")["rx-lro"]; got.on || !got.fixed {
		t.Errorf("rx-lro of a veth: %+v", got)
	}
	if err := ethtoolSwitch("flload-a", map[string]bool{"rx-magic": true}); err == nil {
		t.Error("a feature that no kernel has is turned on")
	}
	for what, err := range map[string]error{
		"driver":     second(ethtoolDriver("flload-c")),
		"offloads":   second(ethtoolOffloads("flload-c")),
		"channels":   second(ethtoolChannels("flload-c")),
		"statistics": second(ethtoolStatistics("flload-c")),
	} {
		if !errors.Is(err, unix.ENODEV) {
			t.Errorf("%s of a device that isn't there: %v", what, err)
		}
	}

	// No answer gets lost, whatever moves meanwhile.
	want := b.offloads("flload-a")
	for range 50 {
		got := deep(64, func() map[string]offload { return b.offloads("flload-a") })
		if !maps.Equal(got, want) {
			t.Fatalf("an answer got lost: %v", got)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// deep calls a function far down a stack that grows on the way.
func deep[T any](depth int, f func() T) T {
	if depth == 0 {
		if len(os.Args) > 0 {
			runtime.GC()
		}
		return f()
	}
	var room [256]byte
	room[depth%256] = 1
	result := deep(depth-1, f)
	runtime.KeepAlive(room)
	return result
}

func on(names ...string) map[string]offload {
	all := make(map[string]offload)
	for _, name := range names {
		name, fixed := strings.CutSuffix(name, "!")
		all[name] = offload{on: true, fixed: fixed}
	}
	return all
}

// everything is on that a card may have on; "!" marks what can't be turned off.
var everything = []string{"rx-lro", "rx-gro", "rx-gro-hw", "rx-gro-list", "rx-udp-gro-forwarding", "rx-vlan-hw-parse",
	"rx-vlan-filter", "rx-vlan-stag-hw-parse", "rx-vlan-stag-filter", "tx-checksum-ip-generic"}

func TestUnwanted(t *testing.T) {
	plain := fake("device", "eth0")
	plain.offloads = on(everything...)
	fixed := fake("device", "eth0")
	fixed.offloads = on("rx-lro!", "rx-vlan-filter!")
	sorted := fake("device", "eth0")
	sorted.offloads, sorted.vlans = on("rx-vlan-filter!", "rx-vlan-stag-filter"), []string{"5"}
	bond := fake("bond", "bond0", plain, fixed)
	bond.offloads = on(everything...) // a bond's own say nothing of its ports
	for _, c := range []struct {
		card *card
		mode XDPMode
		tags bool
		want string
	}{
		{plain, ModeNative, false, "eth0 rx-lro"},
		{plain, ModeGeneric, false, "eth0 rx-lro, eth0 rx-gro-hw"},
		{plain, ModeNative, true, "eth0 rx-lro, eth0 rx-vlan-hw-parse, eth0 rx-vlan-stag-hw-parse, eth0 rx-vlan-filter, " +
			"eth0 rx-vlan-stag-filter"},
		{fixed, ModeNative, false, "eth0 rx-lro!"},
		{fixed, ModeNative, true, "eth0 rx-lro!, eth0 rx-vlan-filter!"},
		{sorted, ModeNative, true, "eth0 rx-vlan-stag-filter"},
		{bond, ModeNative, false, "eth0 rx-lro, eth0 rx-lro!"},
		{bond, ModeGeneric, false, "eth0 rx-lro, eth0 rx-gro-hw, eth0 rx-gro, eth0 rx-gro-list, eth0 rx-udp-gro-forwarding, eth0 rx-lro!"},
	} {
		var got []string
		for _, u := range c.card.unwanted(c.mode, c.tags) {
			name := u.device + " " + u.name
			if u.fixed {
				name += "!"
			}
			got = append(got, name)
		}
		equal(t, fmt.Sprintf("%s %s, tags %t", c.card.name, c.mode, c.tags), strings.Join(got, ", "), c.want)
	}
	u := fixed.unwanted(ModeNative, true)
	expects(t, []Finding{u[1].finding(false)}, LevelFail, "eth0", "rx-vlan-filter is on and can't be turned off",
		"ip link add link eth0")
	u = plain.unwanted(ModeNative, false)
	expects(t, []Finding{u[0].finding(false)}, LevelOK, "eth0", "will be turned off", "")
	expects(t, []Finding{u[0].finding(true)}, LevelWarn, "eth0", "though a program is attached", "ethtool -K eth0 rx-lro off")
	expects(t, sorted.cautions(ModeNative, true, false), LevelWarn, "eth0", "frames of other VLANs than 5 are dropped", "")
}

// fake is a card that this machine lacks.
func fake(kind, name string, below ...*card) *card {
	attributes := netlink.NewLinkAttrs()
	attributes.Name, attributes.MTU = name, 1500
	attributes.Index = len(name)*1000 + int(name[len(name)-1])
	c := &card{name: name, below: below}
	switch kind {
	case "bond":
		bond := netlink.NewLinkBond(attributes)
		bond.Mode = netlink.BOND_MODE_ACTIVE_BACKUP
		c.Link = bond
	case "veth":
		c.Link, c.driver = &netlink.Veth{LinkAttrs: attributes}, "veth"
	case "vlan":
		c.Link = &netlink.Vlan{LinkAttrs: attributes}
	default:
		c.Link = &netlink.Device{LinkAttrs: attributes}
	}
	return c
}

// fakeCard is a device's offloads, and a driver that keeps some of them.
type fakeCard struct {
	now   map[string]offload
	keeps string
	fails error
	calls []string
}

func (f *fakeCard) switches() switches {
	return switches{
		read: func(string) (map[string]offload, error) { return f.now, nil },
		turn: func(device string, wanted map[string]bool) error {
			for _, name := range slices.Sorted(maps.Keys(wanted)) {
				f.calls = append(f.calls, fmt.Sprint(device, " ", name, " ", wanted[name]))
				if name != f.keeps {
					f.now[name] = offload{on: wanted[name]}
				}
			}
			return f.fails
		},
	}
}

func stillOff(all map[string]offload) (names []string) {
	for name, o := range all {
		if !o.on {
			names = append(names, name)
		}
	}
	return names
}

func TestTurnOff(t *testing.T) {
	all := []unwanted{{"eth0", "rx-lro", false, "why"}, {"eth0", "rx-vlan-filter", false, "why"}}
	card := &fakeCard{now: on("rx-lro", "rx-vlan-filter")}
	undo, err := turnOff(all, card.switches())
	must(t, err)
	equal(t, "off", len(stillOff(card.now)), 2)
	for _, step := range undo {
		must(t, step())
	}
	equal(t, "off once it is put back", len(stillOff(card.now)), 0)
	equal(t, "calls", card.calls, []string{"eth0 rx-lro false", "eth0 rx-vlan-filter false", "eth0 rx-lro true",
		"eth0 rx-vlan-filter true"})

	card = &fakeCard{now: on("rx-lro", "rx-vlan-filter"), keeps: "rx-vlan-filter"}
	undo, err = turnOff(all, card.switches())
	if err == nil || !strings.Contains(err.Error(), "rx-vlan-filter of eth0 stays on") {
		t.Errorf("a driver that keeps it: %v", err)
	}
	for _, step := range undo {
		must(t, step())
	}
	equal(t, "off once it is put back", len(stillOff(card.now)), 0)

	card = &fakeCard{now: on("rx-lro", "rx-vlan-filter"), fails: unix.EPERM}
	if _, err = turnOff(all, card.switches()); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), privilegeAdvice) {
		t.Errorf("without privilege: %v", err)
	}

	card = &fakeCard{now: on("rx-lro", "rx-vlan-filter!")}
	all[1].fixed = true
	undo, err = turnOff(all, card.switches())
	if err == nil || !strings.Contains(err.Error(), "rx-vlan-filter of eth0 is on and can't be turned off") {
		t.Errorf("a driver that can't: %v", err)
	}
	if len(undo)+len(card.calls) > 0 {
		t.Errorf("something was touched all the same: %v", card.calls)
	}
}

// Attaching turns off what takes tags off, says so, and puts it back where attaching fails; without tags it touches nothing.
func TestPrepare(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	tags := []string{"rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"}
	isOn := func(want bool) {
		t.Helper()
		for _, name := range tags {
			equal(t, name, b.offloads("flload-a")[name].on, want)
		}
	}
	isOn(true)
	b.attachXDP("flload-b", b.verdict(actPass))
	opts := b.options("flload-a", "flload-b")
	opts.VLAN = true
	expects(t, Check(opts), LevelOK, "flload-a", "rx-vlan-hw-parse is on and will be turned off", "")
	l := b.open(opts)
	if err := l.Attach(); !errors.Is(err, ErrForeign) {
		t.Fatalf("attach beside another's program: %v", err)
	}
	isOn(true)
	must(t, l.Close())

	opts.Interfaces = []string{"flload-a"}
	l = b.open(opts)
	must(t, l.Attach())
	isOn(false)
	if !strings.Contains(b.log.String(), "ethtool -K flload-a rx-vlan-hw-parse on") {
		t.Errorf("it is not said: %s", b.log.String())
	}
	b.turn("flload-a", true, tags...)
	expects(t, Check(opts), LevelWarn, "flload-a", "rx-vlan-hw-parse is on, though a program is attached",
		"ethtool -K flload-a rx-vlan-hw-parse off")
	must(t, l.Replace(small, opts.Interfaces))
	isOn(false)
	b.turn("flload-a", true, tags...)
	l.SetNeeds(false, nil)
	must(t, l.Replace(small, opts.Interfaces))
	isOn(true)
}

// far is another network namespace, of a thread of its own.
type far struct {
	bench *bench
	work  chan func()
	fd    int
}

// away makes another namespace, which ends with the test.
func (b *bench) away() *far {
	b.Helper()
	f := &far{bench: b, work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			f.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		ready <- err
		for do := range f.work {
			do()
		}
	}()
	must(b, <-ready)
	b.Cleanup(func() {
		close(f.work)
		unix.Close(f.fd)
	})
	return f
}

// do runs a function there.
func (f *far) do(what func() error) {
	f.bench.Helper()
	done := make(chan error)
	f.work <- func() { done <- what() }
	must(f.bench, <-done)
}

// The other end of a veth is seen as far as it can be, in this namespace and in another.
func TestPeer(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	away := b.away()
	must(t, netlink.LinkSetNsFd(b.device("flload-bp"), away.fd))
	here, there := b.card("flload-a").peer, b.card("flload-b").peer
	if here == nil || there == nil {
		t.Fatalf("peers: %+v, %+v", here, there)
	}
	equal(t, "here", []any{here.name, here.here, here.program, len(here.offloads) > 0}, []any{"flload-ap", true, false, true})
	equal(t, "there", []any{there.name, there.here, there.program, len(there.offloads)}, []any{"flload-bp", false, false, 0})
	pass := b.verdict(actPass)
	b.attachXDP("flload-ap", pass)
	away.do(func() error {
		peer, err := netlink.LinkByName("flload-bp")
		if err != nil {
			return err
		}
		return netlink.LinkSetXdpFd(peer, pass.FD())
	})
	equal(t, "programs", []bool{b.card("flload-a").peer.program, b.card("flload-b").peer.program}, []bool{true, true})
	if tells(Check(b.options("flload-b")), "flload-b", "has no xdp program") {
		t.Error("the program of the peer is not seen")
	}
}

// frames sends Ethernet frames out of a device: to everyone, of a type for experiments.
func (b *bench) frames(device string, count int) {
	b.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	must(b, err)
	defer unix.Close(fd)
	frame := make([]byte, 60)
	for i := range 6 {
		frame[i] = 0xff
	}
	binary.BigEndian.PutUint16(frame[12:], experimental)
	to := &unix.SockaddrLinklayer{Ifindex: b.device(device).Attrs().Index}
	for range count {
		must(b, unix.Sendto(fd, frame, 0, to))
	}
}

const experimental = 0x88b5

// swapped is a number of the network's byte order, as this machine reads it.
func swapped(n uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n)))
}

// catch counts the frames of that type that a device receives.
func (b *bench) catch(device string) (count func() int) {
	b.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	must(b, err)
	b.Cleanup(func() { unix.Close(fd) })
	must(b, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(swapped(experimental)), Ifindex: b.device(device).Attrs().Index}))
	total := 0
	return func() int {
		for buffer := make([]byte, 2048); ; {
			_, from, err := unix.Recvfrom(fd, buffer, 0)
			if errors.Is(err, unix.EAGAIN) {
				return total
			}
			must(b, err)
			if from.(*unix.SockaddrLinklayer).Pkttype != unix.PACKET_OUTGOING {
				total++
			}
		}
	}
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("wait until %s: not within 5 s", what)
		}
	}
}

func (b *bench) drops(devices ...string) (sum uint64) {
	b.Helper()
	for _, name := range devices {
		all, err := DeviceDrops(name)
		must(b, err)
		for _, n := range all {
			sum += n
		}
	}
	return sum
}

// What Check says of frames redirected to a veth, and sent back out of one, is what becomes of them; and what is lost is
// counted by the device.
func TestTargets(t *testing.T) {
	const sent = 20
	for _, c := range []struct {
		name         string
		gro, program bool
		arrive       bool
	}{{"bare", false, false, false}, {"gro", true, false, true}, {"program", false, true, true}} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, "flload-a", "flload-b")
			b.turn("flload-bp", c.gro, "rx-gro")
			if c.program {
				b.attachXDP("flload-bp", b.verdict(actPass))
			}
			const redirect = 23 // bpf_redirect
			b.attachXDP("flload-a", b.program(ebpf.XDP, asm.Mov.Imm(asm.R1, int32(b.device("flload-b").Attrs().Index)),
				asm.Mov.Imm(asm.R2, 0), asm.BuiltinFunc(redirect).Call(), asm.Return()))
			arrived := b.catch("flload-bp")
			b.frames("flload-ap", sent)
			lost := func() uint64 { return b.drops("flload-a", "flload-b") }
			until(t, "all frames are there or lost", func() bool { return arrived() == sent || lost() >= sent })
			equal(t, "all arrived", arrived() == sent, c.arrive)

			from := egress{b.card("flload-a"), ModeNative, true}
			findings := targetFindings([]egress{from, {card: b.card("flload-b")}}, 1)
			equal(t, "all is said to be well", !tells(findings, "flload-b", "takes no redirected frames"), c.arrive)
			// A kernel that does not tell what drivers do, and a peer that can't be seen.
			blind := b.card("flload-b")
			blind.xdp = xdpSupport{}
			equal(t, "the same by the driver alone", len(targetFindings([]egress{from, {card: blind}}, 1)) == 0, c.arrive)
			blind.peer = nil
			expects(t, targetFindings([]egress{from, {card: blind}}, 1), LevelOK, "flload-b", "can't be told", "gro on")
		})
	}
	for _, program := range []bool{false, true} {
		t.Run(fmt.Sprint("back, program ", program), func(t *testing.T) {
			b := newBench(t, "flload-a")
			if program {
				b.attachXDP("flload-ap", b.verdict(actPass))
			}
			b.attachXDP("flload-a", b.verdict(actTX))
			arrived := b.catch("flload-ap")
			b.frames("flload-ap", sent)
			until(t, "all frames are there or lost", func() bool { return arrived() == sent || b.drops("flload-a") >= sent })
			equal(t, "all arrived", arrived() == sent, program)
			equal(t, "said", tells(b.card("flload-a").cautions(ModeNative, false, true), "flload-a", "has no xdp program"), !program)
		})
	}
}

// Attaching warns of a target that takes nothing, and Check names it before.
func TestTargetsOfOptions(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	opts := b.options("flload-a")
	opts.Targets = []string{"flload-a", "flload-b", "flload-c"}
	const deaf = "takes no redirected frames"
	findings := Check(opts)
	expects(t, findings, LevelWarn, "flload-b", deaf, "gro on")
	expects(t, findings, LevelWarn, "flload-c", "", "`ip link`")
	equal(t, "frames that go back", tells(findings, "flload-a", deaf), false)
	l := b.attach(opts)
	if !strings.Contains(b.log.String(), deaf) {
		t.Errorf("not said: %s", b.log.String())
	}
	b.log.Reset()
	b.turn("flload-bp", true, "rx-gro")
	must(t, l.Replace(small, opts.Interfaces))
	equal(t, "findings once GRO is on", tells(Check(opts), "flload-b", deaf), false)
	if strings.Contains(b.log.String(), deaf) {
		t.Errorf("said though it takes them: %s", b.log.String())
	}
}

func TestTargetFindings(t *testing.T) {
	with := func(driver string, known bool, flags uint64) *card {
		c := fake("device", "eth1")
		c.driver, c.xdp = driver, xdpSupport{known, flags}
		return c
	}
	const all = xdpBasic | xdpRedirect | xdpTarget | xdpFrags | xdpTargetFrags
	few := with("mlx5_core", true, all)
	few.channels = channels{combined: 4, maxCombined: 16}
	fewer := with("i40e", false, 0)
	fewer.channels = channels{combined: 4, maxCombined: 4}
	jumbo := with("ena", true, xdpBasic|xdpTarget)
	jumbo.Attrs().MTU = 9000
	source := egress{with("mlx5_core", true, all), ModeNative, false}
	source.Attrs().Index++
	for _, c := range []struct {
		to     egress
		level  Level // "": nothing to be said
		what   string
		advice string
	}{
		{egress{with("ice", true, xdpBasic), "", false}, LevelWarn, "without a native xdp program", "name it in dataplane.interfaces"},
		{egress{with("ice", true, xdpBasic), ModeGeneric, false}, LevelWarn, "without a native xdp program", "name it in"},
		{egress{with("ice", true, xdpBasic), ModeNative, false}, "", "", ""},
		{egress{with("ice", true, xdpBasic), ModeNative, true}, LevelWarn, "its driver ice takes no redirected frames", "another interface"},
		{egress{with("ice", true, all), ModeNative, true}, "", "", ""},
		{egress{with("ice", false, 0), ModeNative, false}, "", "", ""},
		{egress{with("ice", false, 0), "", false}, LevelWarn, "only while a native xdp program is on it", "name it in"},
		{egress{with("ixgbevf", false, 0), ModeNative, false}, LevelWarn, "takes no redirected frames", "another interface"},
		{egress{with("mlx5_core", false, 0), "", false}, "", "", ""},
		{egress{with("e1000e", false, 0), "", false}, LevelOK, "can't be told", ""},
		{egress{few, ModeNative, true}, LevelWarn, "has 4 queues, fewer than there are CPUs (8)", "ethtool -L eth1 combined 8"},
		{egress{fewer, ModeNative, true}, LevelWarn, "what CPUs from 4 on redirect", "CPUs 0 to 3"},
		{egress{jumbo, ModeNative, true}, LevelWarn, "of several buffers", "mtu 3506"},
		{egress{fake("vlan", "eth1"), "", false}, LevelWarn, "xdp can't redirect", "below"},
		{egress{fake("bond", "bond0", with("ice", true, xdpBasic)), "", false}, LevelWarn, "without a native", "attach to bond0"},
	} {
		got := targetFindings([]egress{source, c.to}, 8)
		if c.level == "" {
			equal(t, c.to.driver+": findings", len(got), 0)
		} else {
			expects(t, got, c.level, "eth1", c.what, c.advice)
		}
		// Generic XDP asks no driver.
		if c.to.mode != ModeNative {
			got = targetFindings([]egress{{source.card, ModeGeneric, false}, c.to}, 8)
			equal(t, c.to.driver+": findings", len(got), 0)
		}
	}
}

func TestObstacles(t *testing.T) {
	const page = 4096
	if os.Getpagesize() != page {
		t.Fatalf("figures are those of pages of %d bytes", page)
	}
	type changes func(*card)
	driver := func(name string, mtu int, known bool, flags uint64, more ...changes) *card {
		c := fake("device", "eth0")
		c.driver, c.xdp = name, xdpSupport{known, flags}
		c.Attrs().MTU = mtu
		for _, change := range more {
			change(c)
		}
		return c
	}
	virtio := func(features ...int) changes {
		return func(c *card) {
			bits := []byte(strings.Repeat("0", 64))
			for _, f := range features {
				bits[f] = '1'
			}
			c.virtio = string(bits)
		}
	}
	bonded := func(mode netlink.BondMode, policy netlink.BondXmitHashPolicy, ports ...*card) *card {
		c := fake("bond", "bond0", ports...)
		c.Link.(*netlink.Bond).Mode, c.Link.(*netlink.Bond).XmitHashPolicy = mode, policy
		return c
	}
	good := driver("ice", 1500, true, xdpBasic)
	for i, c := range []struct {
		card         *card
		frags        bool
		what, advice string // empty: none
	}{
		{good, true, "", ""},
		{driver("e1000e", 1500, true, 0), true, "no native xdp", ""},
		{driver("e1000e", 9000, false, 0), true, "", ""}, // shows when it is attached
		{driver("virtio_net", 3506, true, xdpBasic), true, "", ""},
		{driver("virtio_net", 3507, true, xdpBasic), true, "mtu 3507 is more than native xdp takes without fragments (3506)", "mtu 3506"},
		{driver("virtio_net", 9000, true, xdpBasic|xdpFrags), true, "", ""},
		{driver("virtio_net", 9000, true, xdpBasic|xdpFrags), false, "(3506)", "mtu 3506"},
		{driver("virtio_net", 9000, false, 0), true, "(3506)", "mtu 3506"}, // Linux 6.1
		{driver("igc", 1501, true, xdpBasic), true, "(1500)", "mtu 1500"},
		{driver("mlx5_core", 9000, false, 0), true, "", ""},
		{driver("ixgbe", 3051, false, 0), true, "(3050)", "mtu 3050"},
		{driver("ena", 1500, true, 0, func(c *card) { c.channels = channels{combined: 8, maxCombined: 8} }), true,
			"uses 8 of 8 queues", "ethtool -L eth0 combined 4"},
		{driver("gve", 1500, true, xdpBasic, func(c *card) { c.channels = channels{rx: 5, tx: 5, maxRx: 8, maxTx: 8} }), true,
			"uses 5 of 8 queues", "ethtool -L eth0 rx 4 tx 4"},
		{driver("ena", 1500, true, xdpBasic, func(c *card) { c.channels = channels{combined: 4, maxCombined: 8} }), true, "", ""},
		{driver("virtio_net", 1500, true, xdpBasic, virtio(1, 2, 7, 8, 15, 32)), true, "", ""},
		{driver("virtio_net", 1500, true, xdpBasic, virtio(1, 15, 32)), true, "lets nobody turn that off", "ctrl_guest_offloads"},
		{driver("virtio_net", 1500, true, xdpBasic, virtio(15)), true, "before 1.0", "virtio 1.0"},
		{bonded(netlink.BOND_MODE_ACTIVE_BACKUP, 0, good), true, "", ""},
		{bonded(netlink.BOND_MODE_802_3AD, netlink.BOND_XMIT_HASH_POLICY_LAYER3_4, good), true, "", ""},
		{bonded(netlink.BOND_MODE_802_3AD, netlink.BOND_XMIT_HASH_POLICY_VLAN_SRCMAC, good), true, "vlan+srcmac", "layer3+4"},
		{bonded(netlink.BOND_MODE_BALANCE_ALB, 0, good), true, "mode balance-alb", "802.3ad, or attach to its ports: eth0"},
		{bonded(netlink.BOND_MODE_ACTIVE_BACKUP, 0, driver("ixgbevf", 1500, true, xdpBasic)), true,
			"ixgbevf of its port eth0 takes no redirected frames", "ports"},
		{bonded(netlink.BOND_MODE_ACTIVE_BACKUP, 0, driver("ixgbe", 9000, true, xdpBasic)), true, "its port eth0: mtu 9000", "mtu 3050"},
		{fake("vlan", "eth0.5", good), true, "is a vlan device on eth0", "interfaces: [eth0]"},
	} {
		got := c.card.obstacles(c.frags)
		if c.what == "" {
			equal(t, fmt.Sprint(i, " ", c.card.driver, ": obstacles"), len(got), 0)
			continue
		}
		if len(got) != 1 || !strings.Contains(got[0].what, c.what) || !strings.Contains(got[0].advice, c.advice) {
			t.Errorf("%d %s: %+v; want %q, %q", i, c.card.driver, got, c.what, c.advice)
			continue
		}
		mode, findings := c.card.expect(ModeNative, c.frags, nil)
		equal(t, "mode", mode, ModeNative)
		expects(t, findings, LevelFail, c.card.name, c.what, "auto or generic")
		mode, findings = c.card.expect(ModeAuto, c.frags, nil)
		equal(t, "mode", mode, ModeGeneric)
		expects(t, findings, LevelWarn, c.card.name, c.what, c.advice)
	}
	_, findings := driver("e1000e", 9000, false, 0).expect(ModeAuto, true, nil)
	expects(t, findings, LevelOK, "eth0", "mtu 9000 shows when it is attached", "")
}

func TestVirtioQueues(t *testing.T) {
	for _, c := range []struct {
		in, most           uint32
		receiving, sending int
		mode               XDPMode
		attached           bool
		what, advice       string
	}{
		{4, 8, 4, 4, ModeNative, false, "", ""},
		{5, 8, 5, 5, ModeNative, false, "5 of 8 queues are in use, and xdp would take 4 more", "ethtool -L eth0 combined 4"},
		{1, 1, 1, 1, ModeNative, false, "1 of 1", "at least 5 queues"},
		{4, 4, 4, 4, ModeNative, false, "4 of 4", "at least 5 queues"},
		{5, 8, 5, 5, ModeGeneric, false, "", ""},
		{0, 0, 0, 0, ModeNative, false, "", ""},
		{8, 8, 8, 4, ModeNative, true, "", ""}, // it has them
		{8, 8, 8, 8, ModeNative, true, "8 of 8", "unload"},
	} {
		card := fake("device", "eth0")
		card.channels, card.receiving, card.sending = channels{combined: c.in, maxCombined: c.most}, c.receiving, c.sending
		what, advice := card.virtioQueues(c.mode, c.attached, 4)
		if !strings.Contains(what, c.what) || !strings.Contains(advice, c.advice) || (what == "") != (c.what == "") {
			t.Errorf("%+v: %q, %q", c, what, advice)
		}
	}
}

func TestDropsOf(t *testing.T) {
	equal(t, "drops", dropsOf(map[string]uint64{"rx_queue_0_xdp_drops": 1, "rx_queue_1_xdp_drops": 2, "rx0_xdp_tx": 4, "rx_errors": 8,
		"tx_xdp_full": 16, "rx_queue_10_xdp_tx_errors": 32, "rx_xdp_redirect": 64}),
		map[string]uint64{"rx_queue_*_xdp_drops": 3, "tx_xdp_full": 16, "rx_queue_*_xdp_tx_errors": 32})
	b := newBench(t, "flload-a")
	b.attachXDP("flload-a", b.verdict(actDrop))
	b.frames("flload-ap", 7)
	until(t, "they are counted", func() bool {
		drops, err := DeviceDrops("flload-a")
		must(t, err)
		return drops["rx_queue_*_xdp_drops"] >= 7
	})
	if _, err := DeviceDrops("flload-c"); err == nil {
		t.Error("drops of a device that isn't there")
	}
}

// A veth with fewer receive queues than its peer has transmit queues is told apart from one that can.
func TestVethQueues(t *testing.T) {
	b := newBench(t)
	attributes := netlink.NewLinkAttrs()
	attributes.Name, attributes.NumTxQueues, attributes.NumRxQueues = "flload-a", 4, 1
	peer := &netlink.Veth{LinkAttrs: attributes, PeerName: "flload-ap", PeerNumRxQueues: 1, PeerNumTxQueues: 4}
	must(t, netlink.LinkAdd(peer))
	for _, end := range []string{"flload-a", "flload-ap"} {
		must(t, netlink.LinkSetUp(b.device(end)))
	}
	b.setQueues("flload-ap", 1, 4)
	opts := b.options("flload-a")
	opts.Mode, opts.Settings = ModeNative, tiny
	expects(t, Check(opts), LevelFail, "flload-a", "fewer than the 4 transmit queues of its peer", "ethtool -L flload-a rx 4")
	l := b.open(opts)
	if err := l.Attach(); err == nil || !strings.Contains(err.Error(), "native xdp") {
		t.Errorf("attach: %v", err)
	}
	b.setQueues("flload-ap", 1, 1)
	must(t, l.Attach())
}

// setQueues is ethtool -L.
func (b *bench) setQueues(device string, rx, tx uint32) {
	b.Helper()
	const setChannels = 0x3d
	must(b, ethtool(device, words(0, setChannels, 0, 0, 0, 0, rx, tx, 0, 0)))
}

// Devices that only hand on what others receive are told from those below them.
func TestUpperDevices(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	bridge := netlink.NewLinkAttrs()
	bridge.Name = "flload-br"
	if b.add(&netlink.Bridge{LinkAttrs: bridge}) {
		must(t, netlink.LinkSetMaster(b.device("flload-a"), b.device("flload-br")))
		b.upper("flload-br", "is a bridge of flload-a", "interfaces: [flload-a]")
	}
	for kind, device := range map[string]netlink.Link{
		"macvlan": &netlink.Macvlan{LinkAttrs: b.on("flload-b", "flload-up"), Mode: netlink.MACVLAN_MODE_BRIDGE},
		"vlan":    &netlink.Vlan{LinkAttrs: b.on("flload-b", "flload-up"), VlanId: 5},
	} {
		if !b.add(device) {
			continue
		}
		b.upper("flload-up", "is a "+kind+" device on flload-b", "interfaces: [flload-b]")
		if kind == "vlan" {
			equal(t, "VLANs", b.card("flload-b").vlans, []string{"5"})
		}
		must(t, netlink.LinkDel(b.device("flload-up")))
	}
}

// on names a device, and the one that it is on.
func (b *bench) on(lower, name string) netlink.LinkAttrs {
	attributes := netlink.NewLinkAttrs()
	attributes.Name, attributes.ParentIndex = name, b.device(lower).Attrs().Index
	return attributes
}

func (b *bench) upper(name, what, advice string) {
	b.Helper()
	opts := b.options(name)
	opts.Settings = tiny
	for mode, level := range map[XDPMode]Level{ModeNative: LevelFail, ModeAuto: LevelWarn, ModeGeneric: LevelWarn} {
		opts.Mode = mode
		expects(b, Check(opts), level, name, what, advice)
	}
	if _, err := link.AttachXDP(link.XDPOptions{Program: b.verdict(actPass), Interface: b.device(name).Attrs().Index,
		Flags: link.XDPDriverMode}); !errors.Is(err, unix.EOPNOTSUPP) {
		b.Errorf("attach natively: %v", err)
	}
	opts.Mode = ModeAuto
	l, err := Open(opts)
	must(b, err)
	defer l.Close()
	must(b, l.Attach())
	equal(b, "mode", l.Attachments()[0].Mode, ModeGeneric)
	must(b, l.Close())
	_, err = Unload(b.path)
	must(b, err)
}

// Bonds, where there are any: in the modes that Check has no objection to, and in no others, attaching natively succeeds,
// and their ports are what is prepared.
func TestBond(t *testing.T) {
	for mode, name := range map[netlink.BondMode]string{
		netlink.BOND_MODE_BALANCE_RR: "balance-rr", netlink.BOND_MODE_ACTIVE_BACKUP: "active-backup",
		netlink.BOND_MODE_BALANCE_XOR: "balance-xor", netlink.BOND_MODE_802_3AD: "802-3ad",
		netlink.BOND_MODE_BROADCAST: "broadcast", netlink.BOND_MODE_BALANCE_TLB: "balance-tlb",
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, "flload-a", "flload-b")
			b.path = testPins + name
			attributes := netlink.NewLinkAttrs()
			attributes.Name = "flload-bond"
			bond := netlink.NewLinkBond(attributes)
			bond.Mode = mode
			if !b.add(bond) {
				return
			}
			for _, port := range []string{"flload-a", "flload-b"} {
				must(t, netlink.LinkSetDown(b.device(port)))
				must(t, netlink.LinkSetBondSlave(b.device(port), &netlink.Bond{LinkAttrs: *b.device("flload-bond").Attrs()}))
				must(t, netlink.LinkSetUp(b.device(port)))
			}
			opts := b.options("flload-bond")
			opts.Mode, opts.Settings, opts.VLAN = ModeNative, tiny, true
			c := b.card("flload-bond")
			equal(t, "ports", names(c.below), "flload-a, flload-b")
			works := len(c.obstacles(true)) == 0
			objects := slices.ContainsFunc(Check(opts), func(f Finding) bool {
				return f.Subject == "flload-bond" && f.Level == LevelFail
			})
			equal(t, "Check objects", objects, !works)
			l := b.open(opts)
			err := l.Attach()
			equal(t, fmt.Sprintf("attached natively (%v)", err), err == nil, works)
			for _, port := range []string{"flload-a", "flload-b"} {
				equal(t, "tags are taken off by "+port, b.offloads(port)["rx-vlan-hw-parse"].on, !works)
			}
			if works {
				equal(t, "mode", l.Attachments()[0].Mode, ModeNative)
				const port = "is a port of the bond flload-bond"
				equal(t, "said of the bond's own ports", tells(Check(opts), "flload-a", port), false)
				opts.Interfaces = []string{"flload-a"}
				expects(t, Check(opts), LevelWarn, "flload-a", port, "attach to flload-bond")
				opts.Interfaces = []string{"flload-a", "flload-b"}
				equal(t, "said where all ports are named", tells(Check(opts), "flload-a", port), false)
			}
		})
	}
}

// longest is a generic XDP program that passes everything and notes how long the longest frame was.
func (b *bench) longest(device string) func() uint64 {
	b.Helper()
	note, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	must(b, err)
	b.Cleanup(func() { note.Close() })
	b.attachAs(device, b.program(ebpf.XDP,
		asm.LoadMem(asm.R7, asm.R1, 4, asm.Word), // data_end
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // data
		asm.Sub.Reg(asm.R7, asm.R2),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, note.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.JGE.Reg(asm.R1, asm.R7, "pass"),
		asm.StoreMem(asm.R0, 0, asm.R7, asm.DWord),
		asm.Mov.Imm(asm.R0, actPass).WithSymbol("pass"),
		asm.Return(),
	), link.XDPGenericMode)
	return func() uint64 {
		b.Helper()
		var length uint64
		must(b, note.Lookup(uint32(0), &length))
		return length
	}
}

// Generic XDP on a device sees frames as they came, whatever its GRO: the kernel leaves that out there. On a device above it
// sees packets that the lower one joined, until the loader has turned GRO off below.
func TestGenericGRO(t *testing.T) {
	for _, c := range []struct {
		name  string
		upper bool
		off   bool // what is unwanted is turned off
		joins bool
	}{{"device", false, false, false}, {"above", true, false, true}, {"above, prepared", true, true, false}} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, "flload-a")
			b.path = testPins + "gro"
			away := b.away()
			must(t, netlink.LinkSetNsFd(b.device("flload-ap"), away.fd))
			b.turn("flload-a", true, "rx-gro")
			at := "flload-a"
			if c.upper {
				at = "flload-up"
				if !b.add(&netlink.Macvlan{LinkAttrs: b.on("flload-a", at), Mode: netlink.MACVLAN_MODE_BRIDGE}) {
					t.Fatal("macvlan devices are what this is tried with")
				}
			}
			address := func(device, text string) error {
				l, err := netlink.LinkByName(device)
				if err != nil {
					return err
				}
				a, err := netlink.ParseAddr(text)
				if err != nil {
					return err
				}
				return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
			}
			if c.upper {
				must(t, netlink.LinkSetARPOff(b.device("flload-a"))) // it would answer for the address, too
			}
			must(t, address(at, "10.9.0.1/24"))
			away.do(func() error {
				// As a wire does: packets are cut and their checksums there before they leave.
				return errors.Join(ethtoolSwitch("flload-ap", map[string]bool{"tx-checksum-ip-generic": false,
					"tx-tcp-segmentation": false, "tx-tcp6-segmentation": false, "tx-tcp-ecn-segmentation": false}),
					address("flload-ap", "10.9.0.2/24"))
			})
			if c.off {
				opts := b.options()
				opts.Mode, opts.Settings = ModeGeneric, tiny
				var taken undo
				must(t, b.open(opts).prepare(b.device(at), ModeGeneric, &taken))
				equal(t, "GRO below", b.offloads("flload-a")["rx-gro"].on, false)
				t.Cleanup(func() { must(t, taken.run()) })
			}
			longest := b.longest(at)
			listener, err := net.Listen("tcp", "10.9.0.1:0")
			must(t, err)
			defer listener.Close()
			var received sync.WaitGroup
			defer received.Wait()
			received.Go(func() {
				if conn, err := listener.Accept(); err == nil {
					io.Copy(io.Discard, conn)
					conn.Close()
				}
			})
			var conn net.Conn
			away.do(func() (err error) {
				conn, err = net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second)
				return err
			})
			defer conn.Close()
			must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
			for sent := 0; sent < 8<<20 && (longest() <= 1514 || !c.joins); sent += 1 << 20 {
				_, err := conn.Write(make([]byte, 1<<20))
				must(t, err)
			}
			t.Logf("the longest frame: %d bytes", longest())
			equal(t, "packets are joined", longest() > 1514, c.joins)
			if longest() < 1514 {
				t.Errorf("no full frame came by: %d bytes", longest())
			}
		})
	}
}

// A veth hands over tags beside the frame as long as its peer leaves them there: what is said of the peer is so.
func TestTagsOfPeer(t *testing.T) {
	b := newBench(t, "flload-a")
	note, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(t, err)
	defer note.Close()
	const tag = 0x8100
	// What type a frame has, of these two: the namespace's own frames come by as well.
	b.attachXDP("flload-a", b.program(ebpf.XDP,
		asm.LoadMem(asm.R6, asm.R1, 0, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word),
		asm.Mov.Reg(asm.R2, asm.R6),
		asm.Add.Imm(asm.R2, 14),
		asm.JGT.Reg(asm.R2, asm.R3, "drop"),
		asm.LoadMem(asm.R7, asm.R6, 12, asm.Half),
		asm.JEq.Imm(asm.R7, swapped(experimental), "note"),
		asm.JNE.Imm(asm.R7, swapped(tag), "drop"),
		asm.StoreMem(asm.RFP, -8, asm.R7, asm.Word).WithSymbol("note"),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, note.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -8),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Imm(asm.R0, actDrop).WithSymbol("drop"),
		asm.Return()))
	push := b.program(ebpf.SchedCLS, asm.Mov.Imm(asm.R2, swapped(tag)), asm.Mov.Imm(asm.R3, 5), asm.FnSkbVlanPush.Call(),
		asm.Mov.Imm(asm.R0, 0), asm.Return())
	b.onEgress("flload-ap", push)
	for _, beside := range []bool{true, false} {
		b.turn("flload-ap", beside, "tx-vlan-hw-insert")
		said := tells(b.card("flload-a").cautions(ModeNative, true, false), "flload-a", "sends VLAN tags beside the frame")
		equal(t, "said", said, beside)
		must(t, note.Put(uint32(0), uint32(0)))
		b.frames("flload-ap", 1)
		var seen uint32
		until(t, "the frame is there", func() bool {
			must(t, note.Lookup(uint32(0), &seen))
			return seen != 0
		})
		equal(t, fmt.Sprintf("type of the frame, tags beside it: %t", beside), int32(seen),
			map[bool]int32{true: swapped(experimental), false: swapped(tag)}[beside])
	}
}

// onEgress has a classifier see what leaves by a device: by clsact, which is older than the oldest kernel that is supported.
func (b *bench) onEgress(device string, program *ebpf.Program) {
	b.Helper()
	index := b.device(device).Attrs().Index
	must(b, netlink.QdiscAdd(&netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}))
	must(b, netlink.FilterAdd(&netlink.BpfFilter{Fd: program.FD(), Name: "tag", DirectAction: true, FilterAttrs: netlink.FilterAttrs{
		LinkIndex: index, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1}}))
}
