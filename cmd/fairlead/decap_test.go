package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
	"fairlead/loader"
	"fairlead/test/lab"
)

const (
	decapDevice = "fltun.1" // the backend's
	decapEchoes = 7777      // the service's port
	decapMTU    = 9000
)

var (
	decapClient  = map[bool]netip.Addr{false: netip.MustParseAddr("10.9.0.1"), true: netip.MustParseAddr("fd09::1")}
	decapBackend = map[bool]netip.Addr{false: netip.MustParseAddr("10.9.0.2"), true: netip.MustParseAddr("fd09::2")}
	decapService = map[bool]netip.Addr{false: netip.MustParseAddr("192.0.2.10"), true: netip.MustParseAddr("2001:db8::10")}
)

// decapLab is a client and a backend. The client sends frames of its own making, and has sockets for the echoes.
type decapLab struct {
	*testing.T
	program         string
	client, backend *lab.Node
	frames          int // the client's packet socket
	to              unix.SockaddrLinklayer
	macs            [2]net.HardwareAddr // the client's and the backend's
	echoes          map[bool]*net.UDPConn
	sent            int
}

func newDecapLab(t *testing.T) *decapLab {
	t.Helper()
	d := &decapLab{T: t, program: filepath.Join(t.TempDir(), "fairlead"), echoes: make(map[bool]*net.UDPConn)}
	if output, err := exec.Command("go", "build", "-o", d.program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, output)
	}
	l, err := lab.New("fldecaptest")
	must(t, err)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	sweep := func() {
		if _, err := loader.RemoveDecap(loader.DecapPinPath(decapDevice)); err != nil && !errors.Is(err, loader.ErrNothing) {
			t.Errorf("clean up: %v", err)
		}
	}
	sweep()
	d.client, err = l.Node("client")
	must(t, err)
	d.backend, err = l.Node("backend")
	must(t, err)
	both := func(addresses map[bool]netip.Addr) []netip.Prefix {
		return []netip.Prefix{netip.PrefixFrom(addresses[false], 24), netip.PrefixFrom(addresses[true], 64)}
	}
	must(t, l.Cable(d.client, lab.Link{Name: "fltunnel", Addresses: both(decapClient), MTU: decapMTU},
		d.backend, lab.Link{Name: decapDevice, Addresses: both(decapBackend), MTU: decapMTU}))
	must(t, d.backend.Hold(decapService[false], decapService[true]))
	// Runs before the lab's end, whose processes would hold the pins.
	t.Cleanup(func() {
		must(t, l.Close())
		sweep()
	})
	for i, node := range []*lab.Node{d.client, d.backend} {
		must(t, node.Do(func() error {
			device, err := netlink.LinkByName([]string{"fltunnel", decapDevice}[i])
			if err != nil {
				return err
			}
			d.macs[i] = device.Attrs().HardwareAddr
			if i == 0 {
				d.to.Ifindex = device.Attrs().Index
			}
			return nil
		}))
	}
	must(t, d.client.Do(func() (err error) {
		d.frames, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	t.Cleanup(func() { unix.Close(d.frames) })
	for _, v6 := range []bool{false, true} {
		d.echoes[v6] = d.listen(d.client, netip.AddrPortFrom(decapClient[v6], 0))
		server := d.listen(d.backend, netip.AddrPortFrom(decapService[v6], decapEchoes))
		go func() {
			buffer := make([]byte, decapMTU)
			for {
				n, from, err := server.ReadFromUDPAddrPort(buffer)
				if err != nil {
					return
				}
				server.WriteToUDPAddrPort(buffer[:n], from)
			}
		}()
		// Addresses and routes come into force some time after they are set.
		d.awaitAnswers(decapKind{inner6: v6, plain: true}, netip.Addr{})
	}
	return d
}

func (d *decapLab) listen(node *lab.Node, at netip.AddrPort) (socket *net.UDPConn) {
	d.Helper()
	must(d, node.Do(func() (err error) {
		socket, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}))
	d.Cleanup(func() { socket.Close() })
	return socket
}

// decapKind is how a packet comes: in one of the tunnels, or plain.
type decapKind struct{ outer6, inner6, gue, plain bool }

var decapKinds = map[string]decapKind{
	"opened_4in4": {}, "opened_6in4": {inner6: true}, "opened_4in6": {outer6: true}, "opened_6in6": {outer6: true, inner6: true},
	"opened_gue_4in4": {gue: true}, "opened_gue_6in4": {inner6: true, gue: true},
	"opened_gue_4in6": {outer6: true, gue: true}, "opened_gue_6in6": {outer6: true, inner6: true, gue: true},
}

// send sends the service a datagram of some bytes, of the given kind, and says what its echo will be.
func (d *decapLab) send(k decapKind, tunnel netip.Addr, size int) string {
	d.Helper()
	d.sent++
	text := fmt.Sprintf("datagram %d", d.sent)
	text += strings.Repeat(".", max(0, size-len(text)))
	header := func(from, to netip.Addr, protocol layers.IPProtocol) gopacket.SerializableLayer {
		if to.Is6() {
			return &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: protocol, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
		}
		return &layers.IPv4{Version: 4, TTL: 64, Protocol: protocol, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
	}
	udp := func(ip gopacket.SerializableLayer, from, to int) *layers.UDP {
		u := &layers.UDP{SrcPort: layers.UDPPort(from), DstPort: layers.UDPPort(to)}
		must(d, u.SetNetworkLayerForChecksum(ip.(gopacket.NetworkLayer)))
		return u
	}
	kindOf := map[bool]layers.EthernetType{false: layers.EthernetTypeIPv4, true: layers.EthernetTypeIPv6}
	stack := []gopacket.SerializableLayer{&layers.Ethernet{SrcMAC: d.macs[0], DstMAC: d.macs[1],
		EthernetType: kindOf[k.outer6 && !k.plain || k.inner6 && k.plain]}}
	switch {
	case k.plain:
	case k.gue:
		outer := header(decapClient[k.outer6], tunnel, layers.IPProtocolUDP)
		stack = append(stack, outer, udp(outer, 50000, int(bpf.DecapLimitsGUE_PORT)))
	default:
		number := map[bool]layers.IPProtocol{false: layers.IPProtocolIPv4, true: layers.IPProtocolIPv6}[k.inner6]
		stack = append(stack, header(decapClient[k.outer6], tunnel, number))
	}
	inner := header(decapClient[k.inner6], decapService[k.inner6], layers.IPProtocolUDP)
	from := d.echoes[k.inner6].LocalAddr().(*net.UDPAddr).Port
	stack = append(stack, inner, udp(inner, from, decapEchoes), gopacket.Payload(text))
	buffer := gopacket.NewSerializeBuffer()
	must(d, gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, stack...))
	must(d, unix.Sendto(d.frames, buffer.Bytes(), 0, &d.to))
	return text
}

// echo is the next datagram that comes back; empty: none before the deadline.
func (d *decapLab) echo(k decapKind, patience time.Duration) string {
	d.Helper()
	must(d, d.echoes[k.inner6].SetReadDeadline(time.Now().Add(patience)))
	buffer := make([]byte, decapMTU)
	n, from, err := d.echoes[k.inner6].ReadFromUDPAddrPort(buffer)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ""
	}
	must(d, err)
	if want := netip.AddrPortFrom(decapService[k.inner6], decapEchoes); netip.AddrPortFrom(from.Addr().Unmap(),
		from.Port()) != want {
		d.Errorf("%v answers in place of %v", from, want)
	}
	return string(buffer[:n])
}

// answered: the backend's socket answers what came in a tunnel.
func (d *decapLab) answered(k decapKind, size int) {
	d.Helper()
	want := d.send(k, decapBackend[k.outer6], size)
	if got := d.echo(k, 5*time.Second); got != want {
		d.Fatalf("%+v, %d bytes: the echo is %q, want %q", k, size, got, want)
	}
}

// unanswered: nothing comes back from a tunnel. What is sent plain behind it does, on the same way.
func (d *decapLab) unanswered(k decapKind, tunnel netip.Addr) {
	d.Helper()
	d.send(k, tunnel, 0)
	k.plain = true
	want := d.send(k, tunnel, 0)
	if got := d.echo(k, 5*time.Second); got != want {
		d.Errorf("%+v: %q was answered, want %q alone", k, got, want)
	}
}

// awaitAnswers waits until what is sent so is answered, and until nothing sent before is still on its way.
func (d *decapLab) awaitAnswers(k decapKind, tunnel netip.Addr) {
	d.Helper()
	d.await(fmt.Sprintf("answers to %+v", k), func() bool {
		want, got := d.send(k, tunnel, 0), "any"
		for got != "" && got != want {
			got = d.echo(k, 100*time.Millisecond)
		}
		return got == want
	})
}

func (d *decapLab) kinds() (names []string) {
	for name := range decapKinds {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// start starts the program in the backend, and returns once it says that it is ready.
func (d *decapLab) start(flags ...string) *lab.Process {
	d.Helper()
	command := d.backend.Command(d.Context(), append([]string{d.program, "decap", "--interface", decapDevice}, flags...)...)
	p, err := d.backend.Start(command)
	must(d, err)
	d.await("decap to be ready", func() bool {
		select {
		case <-p.Done():
			d.Fatalf("decap ended: %v\n%s", p.Wait(), d.log(p))
		default:
		}
		return strings.Contains(d.log(p), "decap is ready")
	})
	return p
}

func (d *decapLab) log(p *lab.Process) string {
	d.Helper()
	text, err := os.ReadFile(p.Log())
	must(d, err)
	return string(text)
}

func (d *decapLab) await(what string, condition func() bool) {
	d.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			d.Fatalf("waited 10 s for %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// run runs the command in the backend, in this process.
func (d *decapLab) run(line string) (code int, stdout, stderr string) {
	d.Helper()
	must(d, d.backend.Do(func() error {
		code, stdout, stderr = fairlead(d.T, strings.Fields(line)...)
		return nil
	}))
	return code, stdout, stderr
}

func (d *decapLab) status() (r decapReport) {
	d.Helper()
	code, stdout, stderr := d.run("decap --interface " + decapDevice + " --status -o json")
	if code != exitDone {
		d.Fatalf("status: exit code %d: %s", code, stderr)
	}
	must(d, json.Unmarshal([]byte(stdout), &r))
	return r
}

func (r decapReport) count(name string) uint64 {
	for _, c := range r.Verdicts {
		if c.Name == name {
			return c.Count
		}
	}
	return 0
}

// TestDecap: a backend without a device for tunnels answers clients from within them, in each mode: while the program's
// process runs, is killed, comes again, ends; and no longer once it is removed.
func TestDecap(t *testing.T) {
	d := newDecapLab(t)
	for _, mode := range []string{"native", "generic"} {
		for _, name := range d.kinds() {
			d.unanswered(decapKinds[name], decapBackend[decapKinds[name].outer6])
		}
		p := d.start("--xdp", mode)
		if r := d.status(); r.Interface.Mode != mode || r.Process.PID != p.PID() || r.Interface.Name != decapDevice ||
			r.PinPath != "/sys/fs/bpf/fairlead_decap_fltun%2e1" {
			t.Errorf("status: %+v", r)
		}
		for _, name := range d.kinds() {
			before := d.status().count(name)
			for _, size := range []int{0, 1400, 8000} {
				d.answered(decapKinds[name], size)
			}
			if got := d.status().count(name) - before; got != 3 {
				t.Errorf("%s counted %d of 3", name, got)
			}
		}

		// Its process dies, comes again and is told to end: each time it goes on without a loss.
		must(t, p.Kill())
		d.answered(decapKind{}, 0)
		first := d.status()
		if first.Process.Running {
			t.Errorf("status of a killed process: %+v", first.Process)
		}
		ready, sent := make(chan *lab.Process), 0
		go func() {
			defer close(ready)
			ready <- d.start("--source", "10.9.0.0/24", "--source", "fd09::/64")
		}()
		for p = nil; p == nil; sent++ {
			d.answered(decapKind{}, 0)
			select {
			case p = <-ready:
				if p == nil {
					t.FailNow()
				}
			default:
			}
		}
		second := d.status()
		if second.Interface.Link != first.Interface.Link || second.Interface.Program == first.Interface.Program ||
			second.count("opened_4in4") < first.count("opened_4in4")+uint64(sent) {
			t.Errorf("replaced in place, %d datagrams meanwhile:\n%+v\n%+v", sent, first, second)
		}
		t.Logf("%s: %d datagrams answered while the program was replaced", mode, sent)
		must(t, p.Signal(map[string]os.Signal{"native": unix.SIGTERM, "generic": unix.SIGINT}[mode]))
		if err := p.Wait(); err != nil || !strings.Contains(d.log(p), "stays attached") ||
			!strings.Contains(d.log(p), "fairlead decap --interface "+decapDevice+" --remove") {
			t.Errorf("told to end: %v\n%s", err, d.log(p))
		}
		for _, name := range d.kinds() {
			d.answered(decapKinds[name], 0)
		}

		code, stdout, stderr := d.run("decap --interface " + decapDevice + " --remove")
		if code != exitDone || strings.Count(stdout, "removed /sys/fs/bpf/fairlead_decap_fltun%2e1/") != 6 {
			t.Errorf("remove: exit code %d: %s%s", code, stdout, stderr)
		}
		if left, _ := filepath.Glob("/sys/fs/bpf/fairlead_decap_fltun*"); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		for _, name := range d.kinds() {
			d.unanswered(decapKinds[name], decapBackend[decapKinds[name].outer6])
		}
	}
	for _, line := range []string{"--remove", "--status"} {
		if code, _, stderr := d.run("decap --interface " + decapDevice + " " + line); code != exitNothing ||
			!strings.Contains(stderr, "nothing is attached") {
			t.Errorf("%s of nothing: exit code %d: %s", line, code, stderr)
		}
	}
}

// TestDecapWho: which tunnels are opened: those from the sources named, to the addresses that the interface has now.
func TestDecapWho(t *testing.T) {
	d := newDecapLab(t)
	p := d.start("--source", "10.9.0.8/29", "--source", "fd09::1")
	d.unanswered(decapKind{}, decapBackend[false])
	d.answered(decapKind{outer6: true}, 0)
	if r := d.status(); r.count("pass_other_source") != 1 || fmt.Sprint(r.Sources) != "[10.9.0.8/29 fd09::1/128]" {
		t.Errorf("status: %+v", r)
	}
	must(t, p.Stop())

	p = d.start()
	late := netip.MustParseAddr("10.9.0.3")
	d.unanswered(decapKind{}, late)
	must(t, d.backend.AddAddress(decapDevice, netip.PrefixFrom(late, 24)))
	d.awaitAnswers(decapKind{}, late)
	if r := d.status(); r.count("pass_other_address") == 0 || !slices.Contains(r.Addresses, late) {
		t.Errorf("status: %+v", r)
	}
	must(t, p.Stop())

	// What a person sees.
	_, stdout, _ := d.run("decap --interface " + decapDevice + " --status")
	for _, part := range []string{"decap on fltun.1 (native), program ", "\nprocess    not running: packets are opened on",
		"\naddresses  10.9.0.2, 10.9.0.3, fd09::2, fe80::", "\nsources    from anywhere\n", "\ngue port   6080\n", "\nVERDICTS\n",
		"  opened_4in6 "} {
		if !strings.Contains(stdout, part) {
			t.Errorf("status lacks %q:\n%s", part, stdout)
		}
	}
	if strings.Contains(stdout, "drop_truncated") {
		t.Errorf("status shows what never happened:\n%s", stdout)
	}
	if _, stdout, _ := d.run("decap --interface " + decapDevice + " --status -o wide"); !strings.Contains(stdout, "drop_truncated") {
		t.Errorf("wide status lacks what never happened:\n%s", stdout)
	}

	// A process that runs is not thrown off, and neither is a stranger's program.
	p = d.start()
	if code, _, stderr := d.run("decap --interface " + decapDevice + " --remove"); code != exitFailed ||
		!strings.Contains(stderr, fmt.Sprintf("(pid %d)", p.PID())) {
		t.Errorf("removed under its process: exit code %d: %s", code, stderr)
	}
	must(t, p.Stop())
	if code, _, stderr := d.run("decap --interface " + decapDevice + " --remove"); code != exitDone {
		t.Errorf("remove: exit code %d: %s", code, stderr)
	}
	var stranger link.Link
	must(t, d.backend.Do(func() error {
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "stranger", Type: ebpf.XDP, License: "MIT",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
		if err != nil {
			return err
		}
		defer program.Close()
		device, err := netlink.LinkByName(decapDevice)
		if err != nil {
			return err
		}
		stranger, err = link.AttachXDP(link.XDPOptions{Program: program, Interface: device.Attrs().Index,
			Flags: link.XDPGenericMode}) // its program takes no jumbo frames
		return err
	}))
	defer stranger.Close()
	if code, _, stderr := d.run("decap --interface " + decapDevice); code != exitFailed ||
		!strings.Contains(stderr, `name "stranger"`) || !strings.Contains(stderr, "bpftool link detach id") {
		t.Errorf("with a stranger's program: exit code %d: %s", code, stderr)
	}
}

func TestDecapUsage(t *testing.T) {
	for line, part := range map[string]string{
		"":                                   "on which interface?",
		"--interface eth0 extra":             `one argument too many: "extra"`,
		"--interface eth0 --remove --status": "--remove or --status, not both",
		"--interface eth0 --status --source ::/0":  "--source goes with a start",
		"--interface eth0 --remove --xdp native":   "--xdp goes with a start",
		"--interface eth0 --xdp offload":           "one of auto, native, generic",
		"--interface eth0 --gue-port 0":            "not a port",
		"--interface eth0 --gue-port 65536":        "not a port",
		"--interface eth0 --gue-port six":          "six",
		"--interface eth0 --address 10.0.0.0/8":    "not an address that a host has",
		"--interface eth0 --address 0.0.0.0":       "not an address that a host has",
		"--interface eth0 --source here":           "not a prefix",
		"--interface eth0 --source 10.0.0.1/24":    "is it 10.0.0.0/24?",
		"--interface eth0 --source ::ffff:1.2.3.4": "not a prefix",
		"--interface eth0 --log-level loud":        "one of debug, info, warn, error",
		"--interface eth0 --status -o xml":         `"xml"`,
	} {
		code, stdout, stderr := fairlead(t, append([]string{"decap"}, strings.Fields(line)...)...)
		if code != exitUsage || stdout != "" || !strings.Contains(stderr, part) {
			t.Errorf("decap %s: exit code %d, %q, want %q", line, code, stderr, part)
		}
	}
	code, _, stderr := fairlead(t, "decap", "--interface", "flabsent", "--pin-path", "/sys/fs/bpf/fairlead-test-cli/decap")
	if code != exitFailed || !strings.Contains(stderr, "attach to flabsent") {
		t.Errorf("an interface that is not there: exit code %d: %s", code, stderr)
	}
	// The help says what a backend needs.
	_, stdout, _ := fairlead(t, "decap", "--help")
	for _, part := range []string{"mtu", "dev lo", "arp_ignore", "rp_filter", "--source"} {
		if !strings.Contains(stdout, part) {
			t.Errorf("the help lacks %s", part)
		}
	}
}
