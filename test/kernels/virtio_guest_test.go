package kernels

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
	"fairlead/loader"
	"fairlead/userspace/daemon"
)

var asGuest = flag.Bool("kernels.guest", false, "be what TestVirtio runs in its machine")

const (
	guestPins   = "/sys/fs/bpf/fairlead"
	guestConfig = "/tmp/fairlead.yaml"
)

// guestState is what the machine tells.
type guestState struct {
	Attached   map[string]string            // modes of the cards
	Statistics map[string]map[string]uint64 // the drivers' counters
	Drops      map[string]map[string]uint64
}

// TestVirtioGuest is the machine's side of TestVirtio: what the loader says of its cards is tried there and then, and then it
// does what the host's side asks for.
func TestVirtioGuest(t *testing.T) {
	if !*asGuest {
		t.Log("not in a machine: TestVirtio runs it there")
		return
	}
	for name, mac := range map[string]string{"front": frontMAC, "back": backMAC, "aside": asideMAC} {
		mustRename(t, mac, name)
	}
	must(t, configure("lo")())
	must(t, configure("front", frontNet)())
	must(t, configure("back", backNet)())
	must(t, configure("aside")())
	t.Run("queues", testQueues)
	t.Run("host's offloads", testHostOffloads)
	t.Run("mtu", testMTU)
	t.Run("tags", testTags)
	t.Run("targets", testTargets)
	t.Run("forward", testForward)
}

func mustRename(t *testing.T, mac, name string) {
	t.Helper()
	links, err := netlink.LinkList()
	must(t, err)
	for _, l := range links {
		if l.Attrs().HardwareAddr.String() == mac {
			must(t, netlink.LinkSetName(l, name))
			return
		}
	}
	t.Fatalf("no card has the address %s", mac)
}

func options(mode loader.XDPMode, interfaces ...string) loader.Options {
	return loader.Options{PinPath: guestPins, Interfaces: interfaces, Mode: mode}
}

// said are what Check says of a subject, a line each.
func said(opts loader.Options, subject string, levels ...loader.Level) string {
	var lines []string
	for _, f := range loader.Check(opts) {
		if f.Subject == subject && (len(levels) == 0 || slices.Contains(levels, f.Level)) {
			lines = append(lines, fmt.Sprintf("%s: %s; %s", f.Level, f.What, f.Advice))
		}
	}
	return strings.Join(lines, "\n")
}

func wantSaid(t *testing.T, text string, wants ...string) {
	t.Helper()
	if len(wants) == 0 && text != "" {
		t.Errorf("said without need:\n%s", text)
	}
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("not said: %q, but:\n%s", want, text)
		}
	}
	for line := range strings.Lines(text) {
		t.Log(strings.TrimSpace(line))
	}
}

// attaches tries whether the driver takes an XDP program that takes frames of several buffers or not, as the daemon's.
func attaches(t *testing.T, card string) error {
	t.Helper()
	spec, err := bpf.LoadFairlead()
	must(t, err)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "Dual BSD/GPL",
		Flags:        spec.Programs[bpf.FairleadProgFairlead].Flags & unix.BPF_F_XDP_HAS_FRAGS,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2 /* XDP_PASS */), asm.Return()}})
	must(t, err)
	defer program.Close()
	device, err := netlink.LinkByName(card)
	must(t, err)
	at, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: device.Attrs().Index, Flags: link.XDPDriverMode})
	if err != nil {
		return err
	}
	return at.Close()
}

// agrees compares what Check expects of native XDP with what becomes of it.
func agrees(t *testing.T, card string) {
	t.Helper()
	fails := said(options(loader.ModeNative, card), card, loader.LevelFail)
	if err := attaches(t, card); (err == nil) != (fails == "") {
		t.Errorf("attaching to %s: %v; expected was: %q", card, err, fails)
	}
}

func setQueues(t *testing.T, card string, combined uint32) {
	t.Helper()
	tool, err := ethtool.NewEthtool()
	must(t, err)
	defer tool.Close()
	_, err = tool.SetChannels(card, ethtool.Channels{CombinedCount: combined})
	must(t, err)
}

// testQueues: a card has spare queues for XDP or not; the advice makes it so.
func testQueues(t *testing.T) {
	warnings := func(card string) string { return said(options(loader.ModeNative, card), card, loader.LevelWarn) }
	wantSaid(t, warnings("front"))
	setQueues(t, "front", frontQueues)
	wantSaid(t, warnings("front"), "4 of 4 queues are in use, and xdp would take 2 more", "ethtool -L front combined 2")
	agrees(t, "front")
	setQueues(t, "front", 2)
	wantSaid(t, warnings("front"))
	agrees(t, "front")
	wantSaid(t, warnings("back"), "1 of 1 queues", "let the host give this device at least 3 queues")
	agrees(t, "back")
}

// testHostOffloads: a host that joins packets and lets nobody turn that off refuses native XDP, and generic XDP is refused
// by the loader.
func testHostOffloads(t *testing.T) {
	agrees(t, "aside")
	wantSaid(t, said(options(loader.ModeNative, "aside"), "aside", loader.LevelFail), "lets nobody turn that off", "ctrl_guest_offloads")
	wantSaid(t, said(options(loader.ModeAuto, "aside"), "aside", loader.LevelFail), "rx-gro-hw is on and can't be turned off")
	opts := options(loader.ModeAuto, "aside")
	opts.Settings = loader.Settings{IPv4: true, FullNAT: true, Connections: 1024, HalfOpen: 1024}
	l, err := loader.Open(opts)
	must(t, err)
	defer l.Close()
	if err := l.Attach(); err == nil || !strings.Contains(err.Error(), "rx-gro-hw of aside is on and can't be turned off") {
		t.Errorf("attach: %v", err)
	}
}

// testMTU: what Check expects of large frames is so.
func testMTU(t *testing.T) {
	device, err := netlink.LinkByName("back")
	must(t, err)
	defer netlink.LinkSetMTU(device, 1500)
	for _, mtu := range []int{3506, 9000} {
		must(t, netlink.LinkSetMTU(device, mtu))
		agrees(t, "back")
		t.Logf("mtu %d: %s", mtu, said(options(loader.ModeNative, "back"), "back"))
	}
}

// testTags: virtio-net filters tags and can't leave that, so that tags take VLAN devices.
func testTags(t *testing.T) {
	opts := options(loader.ModeNative, "back")
	opts.VLAN = true
	wantSaid(t, said(opts, "back", loader.LevelFail), "rx-vlan-filter is on and can't be turned off", "ip link add link back")
	device, err := netlink.LinkByName("back")
	must(t, err)
	attributes := netlink.NewLinkAttrs()
	attributes.Name, attributes.ParentIndex = "back.5", device.Attrs().Index
	vlan := &netlink.Vlan{LinkAttrs: attributes, VlanId: 5}
	must(t, netlink.LinkAdd(vlan))
	defer netlink.LinkDel(vlan)
	wantSaid(t, said(opts, "back", loader.LevelFail))
	wantSaid(t, said(opts, "back", loader.LevelWarn), "frames of other VLANs than 5 are dropped")
}

// testTargets: a card takes redirected frames only with a program of its own.
func testTargets(t *testing.T) {
	opts := options(loader.ModeNative, "front")
	opts.Targets = []string{"back"}
	wantSaid(t, said(opts, "back", loader.LevelWarn), "native xdp program", "name it in dataplane.interfaces")
	opts.Interfaces = []string{"front", "back"}
	if text := said(opts, "back", loader.LevelWarn); strings.Contains(text, "redirected") {
		t.Errorf("said of a card that will have a program: %s", text)
	}
}

// testForward runs the daemon for the host's side.
func testForward(t *testing.T) {
	ended := make(chan struct{})
	stop := func() error { return nil }
	mux := http.NewServeMux()
	mux.HandleFunc("/attach", func(w http.ResponseWriter, r *http.Request) {
		err := stop()
		if err == nil {
			stop, err = startDaemon(t, r.URL.Query().Get("xdp"))
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		answer(w)
	})
	mux.HandleFunc("/state", func(w http.ResponseWriter, r *http.Request) { answer(w) })
	mux.HandleFunc("/end", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		close(ended)
	})
	listener, err := net.Listen("tcp", netip.AddrPortFrom(frontNet.Addr(), controlPort).String())
	must(t, err)
	server := &http.Server{Handler: mux}
	go server.Serve(listener)
	<-ended
	must(t, server.Shutdown(t.Context()))
	must(t, stop())
}

// underProgram is what Check says while the daemon's program is attached.
func underProgram(t *testing.T, xdp string) {
	both := options(loader.ModeAuto, "front", "back")
	wantSaid(t, said(both, "front"), "fairlead is attached, xdp "+xdp)
	front, back := said(both, "front", loader.LevelWarn, loader.LevelFail), said(both, "back", loader.LevelWarn, loader.LevelFail)
	if xdp == "native" {
		wantSaid(t, front)
		wantSaid(t, back, "1 of 1 queues")
		return
	}
	wantSaid(t, front, "the host leaves checksums of its own packets out")
	wantSaid(t, back, "the host leaves checksums of its own packets out")
}

// startDaemon runs the daemon and waits until it forwards. stop ends it, and what it has attached.
func startDaemon(t *testing.T, xdp string) (stop func() error, err error) {
	ctx, cancel := context.WithCancel(t.Context())
	config := fmt.Sprintf(`node: machine
dataplane: {interfaces: [front, back], xdp: %s, pin_path: %s, connections: 4096, epoch: 1s}
control: {socket: /tmp/control.sock, http: ""}
state_dir: /tmp
services:
- {name: far, address: %s, port: %d, method: fullnat, ring_size: 1009, backends: [
    {name: far1, address: %s, port: %[6]d}, {name: far2, address: %[7]s, port: %[6]d}]}
- {name: near, address: %[8]s, port: %[4]d, method: fullnat, ring_size: 1009, backends: [{name: near1, address: %[9]s, port: %[6]d}]}
`, xdp, guestPins, farService, servicePort, farBackends[0].Addr(), backendPort, farBackends[1].Addr(), nearService,
		nearBackend.Addr())
	if err := os.WriteFile(guestConfig, []byte(config), 0o644); err != nil {
		cancel()
		return nil, err
	}
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- daemon.Run(ctx, daemon.Options{Config: guestConfig, Ready: func() { close(ready) },
			Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	}()
	stop = func() error {
		underProgram(t, xdp)
		cancel()
		err := <-ended
		_, unloaded := loader.Unload(guestPins)
		return errors.Join(err, unloaded)
	}
	select {
	case <-ready:
		return stop, nil
	case err := <-ended:
		cancel()
		return nil, fmt.Errorf("the daemon ended: %w", err)
	case <-time.After(time.Minute):
		cancel()
		return nil, errors.New("the daemon is not ready within a minute")
	}
}

// answer tells the state of the cards.
func answer(w http.ResponseWriter) {
	state := guestState{make(map[string]string), make(map[string]map[string]uint64), make(map[string]map[string]uint64)}
	err := func() error {
		attached, err := loader.Links(guestPins)
		if err != nil {
			return err
		}
		for _, at := range attached {
			state.Attached[at.Interface] = string(at.Mode)
			if state.Drops[at.Interface], err = loader.DeviceDrops(at.Interface); err != nil {
				return err
			}
			tool, err := ethtool.NewEthtool()
			if err != nil {
				return err
			}
			defer tool.Close()
			if state.Statistics[at.Interface], err = tool.Stats(at.Interface); err != nil {
				return err
			}
		}
		return json.NewEncoder(w).Encode(state)
	}()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}
