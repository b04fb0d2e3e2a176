package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/test/lab"
)

const holdPins = "/sys/fs/bpf/fairlead-test-hold"

// holdLab is a namespace with two cards, and a configuration in it.
type holdLab struct {
	*testing.T
	file string
}

func newHoldLab(t *testing.T) *holdLab {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a namespace (this test needs root): %v", err)
	}
	sweep := func() {
		if _, err := loader.Unload(holdPins); err != nil && !errors.Is(err, loader.ErrNothing) {
			t.Fatalf("remove what an earlier run left: %v", err)
		}
	}
	sweep()
	t.Cleanup(sweep)
	h := &holdLab{T: t, file: filepath.Join(t.TempDir(), "fairlead.yaml")}
	h.add(netlink.LinkAdd, "flhold")
	// The namespace's: a new one has the kernel's own.
	must(t, os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("32768 60999"), 0))
	return h
}

func (h *holdLab) add(add func(netlink.Link) error, name string) {
	h.Helper()
	must(h, add(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}))
}

const holdServices = `
services:
- name: chat
  addresses: [192.0.2.10, 192.0.2.11]
  ports: [443, 8000-8100]
  method: fullnat
  source_addresses: [10.0.0.1]
  health: {type: none}
  backends: [{name: ws1, address: 10.0.0.11, port: 8765}]
- name: plain
  address: "2001:db8::10"
  port: 80
  method: fullnat
  source_ports: 2000-2999
  health: {type: none}
  backends: [{name: ws1, address: "fd00:a::11", port: 8080}]
- name: names
  address: 192.0.2.12
  port: 53
  protocol: udp
  method: nat
  health: {type: none}
  backends: [{name: ns1, address: 10.0.0.12}]
- name: direct
  address: 192.0.2.13
  port: 443
  method: dsr
  health: {type: none}
  backends: [{name: d1, address: 10.0.0.13}]
`

func (h *holdLab) configure(dataplane string) {
	h.Helper()
	text := fmt.Sprintf("dataplane: {pin_path: %s%s}\nstate_dir: %s\n%s", holdPins, dataplane, h.TempDir(), holdServices)
	must(h, os.WriteFile(h.file, []byte(text), 0o600))
}

// run runs a command to its expected end.
func (h *holdLab) run(line string, code int, inError string) (stdout string) {
	h.Helper()
	got, stdout, stderr := fairlead(h.T, append(strings.Fields(line), "-c", h.file)...)
	if got != code || !strings.Contains(stderr, inError) || code == exitDone && stderr != "" {
		h.Fatalf("%s: exit code %d, want %d; %q, want %q", line, got, code, stderr, inError)
	}
	return stdout
}

// states are the interfaces of a report.
func (h *holdLab) states(stdout string) map[string]string {
	h.Helper()
	states := make(map[string]string)
	for _, i := range decoded[holdReport](h.T, stdout).Interfaces {
		states[i.Name] = i.State
	}
	return states
}

func (h *holdLab) want(what string, got, want any, options ...cmp.Option) {
	h.Helper()
	if diff := cmp.Diff(want, got, options...); diff != "" {
		h.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestHold(t *testing.T) {
	h := newHoldLab(t)
	h.configure(", interfaces: [flhold]")
	h.run("hold --status", exitNothing, "nothing is held: nothing is attached under")
	h.run("status", exitNothing, "nothing is attached")

	// A dry run shows all, and changes nothing.
	plan := decoded[holdReport](t, h.run("hold --dry-run -o json", exitDone, ""))
	a := netip.MustParseAddr
	h.want("plan", plan.Services, []heldPorts{
		{a("192.0.2.10"), 0, "tcp", 443, 443}, {a("192.0.2.10"), 0, "tcp", 8000, 8100},
		{a("192.0.2.11"), 0, "tcp", 443, 443}, {a("192.0.2.11"), 0, "tcp", 8000, 8100},
		{a("2001:db8::10"), 0, "tcp", 80, 80}, {a("192.0.2.12"), 0, "udp", 53, 53}, {a("192.0.2.13"), 0, "tcp", 443, 443},
	}, addresses)
	h.want("plan", plan.Sources, []heldPorts{{a("10.0.0.1"), 0, "tcp", 1024, 32767}}, addresses)
	h.want("plan", plan.Backends, []heldPorts{
		{a("fd00:a::11"), 8080, "tcp", 2000, 2999}, {a("10.0.0.12"), 53, "udp", 0, 65535},
	}, addresses)
	h.want("interfaces", h.states(h.run("hold --dry-run -o json", exitDone, "")), map[string]string{"flhold": "to hold"})
	if !strings.Contains(plan.NFT, `iifname != { "flhold" } accept`) {
		t.Errorf("nft: %s", plan.NFT)
	}
	if _, err := os.Stat(holdPins); err == nil {
		t.Error("a dry run pinned something")
	}

	if out := h.run("hold", exitDone, ""); !strings.HasPrefix(out, "flhold: held (native), program ") ||
		!strings.Contains(out, "drops: from backend udp 10.0.0.12:53\n") || strings.Contains(out, "nft") {
		t.Errorf("hold: %s", out)
	}
	out := h.run("hold -o json", exitDone, "")
	h.want("interfaces", h.states(out), map[string]string{"flhold": "held"})
	link := decoded[holdReport](t, out).Interfaces[0].Link
	status := decoded[holdReport](t, h.run("hold --status -o json", exitDone, ""))
	h.want("link", status.Interfaces[0].Link, link)
	// Of ports: 443; 8000-8063, 8064-8095, 8096-8099, 8100; each at two addresses; 80, 53 and 443; 1024 to 32767; 2000 to 2999; all ports.
	h.want("number of entries", status.Entries, 2*5+3+5+8+1)
	h.want("number of verdicts", len(status.Verdicts), 6)
	if out := h.run("hold --status", exitDone, ""); !strings.Contains(out, "drop_service") {
		t.Errorf("status: %s", out)
	}
	h.run("status", exitNothing, "held meanwhile: flhold (`fairlead hold --status`)")

	// The data plane takes over, and gives back.
	l, err := loader.Open(loader.Options{PinPath: holdPins, Interfaces: []string{"flhold"}, Logger: slog.New(slog.DiscardHandler),
		Settings: loader.Settings{IPv4: true, TCP: true, DSR: true, Connections: 4096, HalfOpen: 1024}})
	must(t, err)
	t.Cleanup(func() { l.Close() })
	must(t, l.Attach())
	h.want("link", uint32(l.Attachments()[0].Link), link)
	h.run("hold --status", exitNothing, "nothing is held")
	h.want("beside a daemon", h.states(h.run("hold -o json", exitDone, "")), map[string]string{"flhold": "attached"})
	h.run("unload --hold", exitFailed, "stop it first")
	must(t, l.Close())
	h.want("without one", h.states(h.run("hold -o json", exitDone, "")), map[string]string{"flhold": "attached"})
	if out := h.run("unload --hold", exitDone, ""); !strings.Contains(out, "flhold is held") || !strings.Contains(out, "removed "+holdPins) {
		t.Errorf("unload --hold: %s", out)
	}
	status = decoded[holdReport](t, h.run("hold --status -o json", exitDone, ""))
	h.want("link", status.Interfaces[0].Link, link)
	h.run("unload --hold", exitNothing, "nothing is attached")
	h.run("unload", exitDone, "")
	h.run("unload", exitNothing, "nothing is attached")
}

var addresses = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// TestHoldWaits: for an interface that comes later; without it, the others are held, and nftables is named.
func TestHoldWaits(t *testing.T) {
	h := newHoldLab(t)
	h.configure(", interfaces: [flhold, fllate]")
	out := h.run("hold --timeout 10ms", exitFailed, "not held: fllate")
	for _, want := range []string{"flhold: held", "fllate: NOT HELD: hold fllate: Link not found", "nft -f - <<'END'",
		`iifname != { "fllate" } accept`, "ip daddr 192.0.2.10 tcp dport { 443, 8000-8100 } counter drop"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not said:\n%s", want, out)
		}
	}
	space, err := netns.Get()
	must(t, err)
	defer space.Close()
	handle, err := netlink.NewHandleAt(space)
	must(t, err)
	defer handle.Close()
	ended := make(chan string)
	began := time.Now()
	go func() {
		// The command is waiting by then, or will not have to: both are to work.
		time.Sleep(200 * time.Millisecond)
		ended <- fmt.Sprint(handle.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "fllate"}, PeerName: "fllatep"}))
	}()
	out = h.run("hold --timeout 60s -o json", exitDone, "")
	if said := <-ended; said != fmt.Sprint(error(nil)) {
		t.Fatal(said)
	}
	h.want("interfaces", h.states(out), map[string]string{"flhold": "held", "fllate": "held"})
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestHoldFinds: where no interface is named.
func TestHoldFinds(t *testing.T) {
	h := newHoldLab(t)
	h.configure("")
	found := func(how string, names ...string) {
		t.Helper()
		out := h.run("hold --dry-run -o json", exitDone, "")
		want := make(map[string]string)
		for _, name := range names {
			want[name] = "to hold"
		}
		h.want(how, h.states(out), want)
		h.want("how", decoded[holdReport](t, out).Found, how)
	}
	found("all Ethernet devices, as there are no routes yet", "flhold", "flholdp")
	h.add(netlink.LinkAdd, "flback")
	for i, name := range []string{"flhold", "flback"} {
		device, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkSetUp(device))
		peer, err := netlink.LinkByName(name + "p")
		must(t, err)
		must(t, netlink.LinkSetUp(peer))
		address, err := netlink.ParseAddr([]string{"198.51.100.2/24", "10.0.0.1/24"}[i])
		must(t, err)
		must(t, netlink.AddrAdd(device, address))
		if i == 0 {
			found("all Ethernet devices, as there are no routes yet", "flhold", "flholdp", "flback", "flbackp")
			must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: device.Attrs().Index, Gw: net.ParseIP("198.51.100.1")}))
			found("those with routes to backends and clients", "flhold")
		}
	}
	found("those with routes to backends and clients", "flback", "flhold")

	h.run("hold --status --dry-run", exitUsage, "--status goes without")
	h.run("hold --timeout -1s", exitUsage, "not a time to wait")
	h.run("hold here", exitUsage, "one argument too many")
	h.run("unload --hold --pin-path /sys/fs/bpf/nothing", exitUsage, "goes by the configuration")
	h.configure(", mode: userspace")
	h.run("hold", exitFailed, "dataplane.mode: in the userspace plane the host's own sockets answer")
}

// TestHoldRun: a client that connects while the service is held is connected once the daemon has taken over. Without a
// hold it is refused at once: the host's stack holds the address.
func TestHoldRun(t *testing.T) {
	program := filepath.Join(t.TempDir(), "fairlead")
	if output, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, output)
	}
	const pins = holdPins + "-run"
	sweep := func() {
		if _, err := loader.Unload(pins); err != nil && !errors.Is(err, loader.ErrNothing) {
			t.Errorf("remove what an earlier run left: %v", err)
		}
	}
	l, err := lab.New("flholdtest")
	must(t, err)
	t.Cleanup(func() {
		must(t, l.Close())
		sweep()
	})
	sweep()
	wire, err := l.Segment("wire", 0)
	must(t, err)
	nodes := make(map[string]*lab.Node)
	for i, name := range []string{"client", "edge", "backend"} {
		nodes[name], err = l.Node(name)
		must(t, err)
		must(t, nodes[name].Join(wire, lab.Link{Name: "flwire",
			Addresses: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.8.0.%d/24", i+1))}}))
	}
	service := netip.MustParseAddrPort("10.8.0.100:443")
	must(t, nodes["edge"].AddAddress("flwire", netip.PrefixFrom(service.Addr(), 32)))
	var listener net.Listener
	must(t, nodes["backend"].Do(func() (err error) {
		listener, err = net.Listen("tcp", "10.8.0.3:443")
		return err
	}))
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	dial := func(within time.Duration) (c net.Conn, err error) {
		err = nodes["client"].Do(func() error {
			c, err = net.DialTimeout("tcp", service.String(), within)
			return err
		})
		return c, err
	}
	file := filepath.Join(t.TempDir(), "fairlead.yaml")
	must(t, os.WriteFile(file, fmt.Appendf(nil, `
dataplane: {pin_path: %s, interfaces: [flwire], connections: 4096}
state_dir: %s
control: {socket: %s, http: ""}
services:
- name: echo
  address: %s
  port: 443
  ring_size: 503
  health: {type: none}
  backends: [{name: b1, address: 10.8.0.3}]
`, pins, t.TempDir(), filepath.Join(t.TempDir(), "control.sock"), service.Addr()), 0o600))
	command := func(args ...string) string {
		t.Helper()
		out, err := nodes["edge"].Command(t.Context(), append(append([]string{program}, args...), "-c", file)...).CombinedOutput()
		if err != nil {
			t.Fatalf("fairlead %v: %v\n%s", args, err, out)
		}
		return string(out)
	}

	deadline := time.Now().Add(10 * time.Second)
	for _, err = dial(time.Second); !errors.Is(err, unix.ECONNREFUSED); _, err = dial(time.Second) {
		if time.Now().After(deadline) {
			t.Fatalf("the host's stack does not refuse the client: %v: this test shows nothing", err)
		}
	}
	held := decoded[holdReport](t, command("hold", "-o", "json"))
	type dialled struct {
		net.Conn
		error
	}
	connected := make(chan dialled, 1)
	go func() {
		c, err := dial(30 * time.Second)
		connected <- dialled{c, err}
	}()
	for {
		status := decoded[holdReport](t, command("hold", "--status", "-o", "json"))
		if i := slices.IndexFunc(status.Verdicts, func(v counterStatus) bool { return v.Name == "drop_service" }); status.Verdicts[i].Count > 0 {
			break
		}
		if time.Now().After(deadline.Add(10 * time.Second)) {
			t.Fatal("nothing of the client's is dropped")
		}
	}
	select {
	case d := <-connected:
		t.Fatalf("while it is held, the client has an answer: %v", d.error)
	default:
	}
	process, err := nodes["edge"].Start(nodes["edge"].Command(context.Background(), program, "run", "-c", file))
	must(t, err)
	d := <-connected
	if d.error != nil {
		log, _ := os.ReadFile(process.Log())
		t.Fatalf("connect: %v\n%s", d.error, log)
	}
	defer d.Conn.Close()
	must(t, d.Conn.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = d.Conn.Write([]byte("hello"))
	must(t, err)
	_, err = io.ReadFull(d.Conn, make([]byte, 5))
	must(t, err)
	status := decoded[statusReport](t, command("status", "-o", "json"))
	if len(status.Interfaces) != 1 || status.Interfaces[0].Link != held.Interfaces[0].Link {
		t.Errorf("interfaces %+v, was held by %+v", status.Interfaces, held.Interfaces)
	}

	// And back: with the daemon stopped, the connection is held, not reset.
	must(t, process.Stop())
	if out := command("unload", "--hold"); !strings.Contains(out, "flwire is held") {
		t.Errorf("unload --hold: %s", out)
	}
	_, err = d.Conn.Write([]byte("again"))
	must(t, err)
	must(t, d.Conn.SetDeadline(time.Now().Add(500*time.Millisecond)))
	if _, err := d.Conn.Read(make([]byte, 5)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("while it is held, the client reads: %v", err)
	}

	// The connection was kept on disk: a daemon that takes over has it go on, with what was sent meanwhile.
	process, err = nodes["edge"].Start(nodes["edge"].Command(context.Background(), program, "run", "-c", file))
	must(t, err)
	must(t, d.Conn.SetDeadline(time.Now().Add(30*time.Second)))
	answer := make([]byte, 5)
	if _, err := io.ReadFull(d.Conn, answer); err != nil || string(answer) != "again" {
		log, _ := os.ReadFile(process.Log())
		t.Errorf("after another take-over the client reads %q: %v\n%s", answer, err, log)
	}
	must(t, process.Stop())
}
