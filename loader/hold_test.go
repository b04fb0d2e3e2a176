package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
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
	"fairlead/maps"
)

const (
	tcpNumber = 6
	udpNumber = 17
)

// The addresses of what is held in tests: the host's source address and a backend; service and client are those of
// decap's tests.
var (
	source     = ends{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00:a::1")}
	natBackend = ends{netip.MustParseAddr("10.0.0.21"), netip.MustParseAddr("fd00:a::21")}
	anyBackend = ends{netip.MustParseAddr("10.0.0.22"), netip.MustParseAddr("fd00:a::22")}
)

// heldOptions hold a service of ports 443 and 8000 to 8100, a source address's ports 20000 to 20999, a backend by nat
// and one by fullnat whose source address is not known: of each protocol and family.
func heldOptions() (opts HoldOptions) {
	for _, v6 := range []bool{false, true} {
		for _, protocol := range []uint8{tcpNumber, udpNumber} {
			opts.Services = append(opts.Services, HeldPorts{service.of(v6), protocol, 443, 443},
				HeldPorts{service.of(v6), protocol, 8000, 8100})
			opts.Sources = append(opts.Sources, HeldPorts{source.of(v6), protocol, 20000, 20999})
			opts.Backends = append(opts.Backends,
				HeldBackend{netip.AddrPortFrom(natBackend.of(v6), 8765), protocol, 0, 65535},
				HeldBackend{netip.AddrPortFrom(anyBackend.of(v6), 8765), protocol, 1024, 32767})
		}
	}
	return opts
}

// frame is an Ethernet frame of TCP or UDP, by its fields.
type frame struct {
	from, to   netip.Addr
	sport      uint16
	dport      uint16
	udp        bool
	syn        bool
	tags       int
	options    []layers.IPv4Option
	extensions []byte // of IPv6, by their numbers, of 8 bytes each
	mf         bool
	offset     uint16 // in 8-byte units
}

func (f frame) bytes() []byte {
	l4 := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, f.sport), f.dport)
	protocol := layers.IPProtocolTCP
	if f.udp {
		protocol = layers.IPProtocolUDP
		l4 = append(l4, 0, 12, 0, 0, 1, 2, 3, 4)
	} else {
		flags := byte(0x10)
		if f.syn {
			flags = 0x02
		}
		l4 = append(l4, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 2, 0, 0, 0, 0, 0)
	}
	if len(f.extensions) > 0 {
		l4, protocol = f.extended(l4, protocol)
	}
	packet := serialized(ip(f.from, f.to, protocol, 0, f.options, f.mf, f.offset), gopacket.Payload(l4))
	out := append(make([]byte, 6), 2, 0, 0, 0, 0, 1)
	for i := range f.tags {
		out = append(out, []byte{0x88, 0xa8, 0, 7, 0x81, 0x00, 0, 8}[(i+2-f.tags)*4:][:4]...)
	}
	etherType := uint16(0x0800)
	if f.from.Is6() {
		etherType = 0x86dd
	}
	return append(binary.BigEndian.AppendUint16(out, etherType), packet...)
}

// extended puts extension headers of 8 bytes each, named by their numbers, before what follows.
func (f frame) extended(l4 []byte, protocol layers.IPProtocol) ([]byte, layers.IPProtocol) {
	for _, kind := range slices.Backward(f.extensions) {
		header := make([]byte, 8)
		header[0] = byte(protocol)
		if kind == 44 {
			fragment := f.offset << 3
			if f.mf {
				fragment |= 1
			}
			binary.BigEndian.PutUint16(header[2:], fragment)
		}
		l4, protocol = append(header, l4...), layers.IPProtocol(kind)
	}
	return l4, protocol
}

// holder is the program alone, without an interface.
type holder struct {
	testing.TB
	objects bpf.HoldObjects
	met     map[string]bool
}

func newHolder(t testing.TB) *holder {
	t.Helper()
	h := &holder{TB: t, met: make(map[string]bool)}
	must(t, bpf.LoadHoldObjects(&h.objects, nil))
	t.Cleanup(func() { h.objects.Close() })
	_, err := fillHold(&h.objects.HoldMaps, heldOptions(), new(undo))
	must(t, err)
	return h
}

// want holds the program to a verdict for a frame, by name, and to what that says of the frame: unchanged if it passes.
func (h *holder) want(what string, data []byte, verdict string) {
	h.Helper()
	must(h, h.objects.HoldCounters.Put(uint32(0), make([]bpf.HoldCounterSet, ebpf.MustPossibleCPU())))
	// The kernel takes no frame shorter than an Ethernet header.
	options := ebpf.RunOptions{Data: data, DataOut: make([]byte, len(data)+256)}
	action, err := h.objects.FairleadHold.Run(&options)
	must(h, err)
	counters, err := readHoldCounters(h.objects.HoldCounters)
	must(h, err)
	var counted []string
	for _, c := range counters {
		for range c.Count {
			counted = append(counted, c.Name)
		}
	}
	if !slices.Equal(counted, []string{verdict}) {
		h.Errorf("%s: counted %v, want %s\n% x", what, counted, verdict, data)
		return
	}
	h.met[verdict] = true
	wantAction := uint32(xdpPass)
	if strings.HasPrefix(verdict, "drop_") {
		wantAction = xdpDrop
	}
	if action != wantAction || !bytes.Equal(options.DataOut, data) {
		h.Errorf("%s: %s, and the action is %d, the frame\n% x, was\n% x", what, verdict, action, options.DataOut, data)
	}
}

// TestHoldFrames: every kind of packet, in every form that it comes in.
func TestHoldFrames(t *testing.T) {
	newBench(t)
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	h := newHolder(t)
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			name := fmt.Sprintf("v6 %v, udp %v: ", v6, udp)
			to := func(to netip.Addr, port uint16) frame {
				return frame{from: client.of(v6), to: to, sport: 40000, dport: port, udp: udp}
			}
			from := func(from netip.Addr, sport, dport uint16) frame {
				return frame{from: from, to: source.of(v6), sport: sport, dport: dport, udp: udp}
			}
			forms := func(f frame, verdict string) {
				t.Helper()
				for tags := range 3 {
					f.tags = tags
					h.want(fmt.Sprintf("%s%d tags", name, tags), f.bytes(), verdict)
				}
				f.tags = 0
				f.syn = true
				h.want(name+"syn", f.bytes(), verdict)
				f.syn = false
				if !v6 {
					f.options = []layers.IPv4Option{{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}}
					h.want(name+"options", f.bytes(), verdict)
					f.options = nil
				} else {
					for _, chain := range [][]byte{{0}, {60}, {43}, {0, 60, 43, 60}, {60, 60, 60, 60, 60, 44}} {
						f.extensions = chain
						h.want(fmt.Sprintf("%sextensions %v", name, chain), f.bytes(), verdict)
					}
					f.extensions = []byte{60, 44}
				}
				f.mf = true
				h.want(name+"first fragment", f.bytes(), verdict)
				f.offset = 100
				h.want(name+"later fragment", f.bytes(), "pass_fragment")
				f.mf = false
				h.want(name+"last fragment", f.bytes(), "pass_fragment")
			}
			for _, port := range []uint16{443, 8000, 8001, 8063, 8064, 8100} {
				forms(to(service.of(v6), port), "drop_service")
			}
			for _, port := range []uint16{442, 444, 80, 7999, 8101, 1443, 65535} {
				f := to(service.of(v6), port)
				h.want(fmt.Sprintf("%sport %d", name, port), f.bytes(), "pass_other")
			}
			forms(to(elsewhere.of(v6), 443), "pass_other")
			for _, port := range []uint16{20000, 20511, 20999} {
				forms(to(source.of(v6), port), "drop_source")
			}
			for _, port := range []uint16{19999, 21000, 443} {
				h.want(name+"outside of the source's ports", to(source.of(v6), port).bytes(), "pass_other")
			}
			forms(from(natBackend.of(v6), 8765, 9), "drop_backend")
			h.want(name+"not the backend's port", from(natBackend.of(v6), 8764, 9).bytes(), "pass_other")
			forms(from(anyBackend.of(v6), 8765, 1024), "drop_backend")
			h.want(name+"the range's end", from(anyBackend.of(v6), 8765, 32767).bytes(), "drop_backend")
			// To the host's own connections with that server.
			h.want(name+"above the range", from(anyBackend.of(v6), 8765, 32768).bytes(), "pass_other")
			h.want(name+"below the range", from(anyBackend.of(v6), 8765, 1023).bytes(), "pass_other")

			// Cut short, nothing is read that is not there.
			whole := to(service.of(v6), 443)
			whole.tags = 2
			data := whole.bytes()
			ports := 14 + 8 + 20 + 4
			if v6 {
				ports += 20
			}
			for length := 14; length < len(data); length++ {
				verdict := "drop_service"
				if length < ports {
					verdict = "pass_other"
				}
				h.want(fmt.Sprintf("%sthe first %d bytes", name, length), data[:length], verdict)
			}
		}
		// Neither TCP nor UDP, and what names a protocol and is none of it.
		ping := frame{from: client.of(v6), to: service.of(v6), sport: 40000, dport: 443}.bytes()
		if v6 {
			ping[14+6] = 58
		} else {
			ping[14+9] = 1
		}
		h.want("icmp", ping, "pass_other")
		version := frame{from: client.of(v6), to: service.of(v6), sport: 40000, dport: 443}.bytes()
		version[14] ^= 0x30
		h.want("another version", version, "pass_other")
	}
	short := frame{from: client.v4, to: service.v4, sport: 40000, dport: 443}.bytes()
	short[14] = 0x44
	h.want("an IPv4 header of 16 bytes", short, "pass_other")
	arp := make([]byte, 60)
	arp[12], arp[13] = 0x08, 0x06
	h.want("arp", arp, "pass_other")
	deep := frame{from: client.v6, to: service.v6, sport: 40000, dport: 443, extensions: []byte{60, 60, 60, 60, 60, 60, 60}}
	h.want("more extension headers than are followed", deep.bytes(), "pass_other")
	triple := frame{from: client.v4, to: service.v4, sport: 40000, dport: 443, tags: 2}.bytes()
	h.want("three tags", slices.Insert(triple, 12, 0x81, 0, 0, 9), "pass_other")

	// Sockets of the host's own at a source address and port of ours: theirs goes to them.
	for _, a := range []netip.Addr{source.v4, source.v6} {
		bits := "/32"
		if a.Is6() {
			bits = "/128"
		}
		address, err := netlink.ParseAddr(a.String() + bits)
		must(t, err)
		address.Flags = unix.IFA_F_NODAD
		must(t, netlink.AddrAdd(lo, address))
		at := net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, 20500))
		listener, err := net.ListenTCP("tcp", at)
		must(t, err)
		defer listener.Close()
		var dialled *net.TCPConn
		// An address of IPv6 comes into force some time after it is set.
		await(t, "a connection to "+at.String(), func() bool {
			dialled, err = net.DialTCP("tcp", nil, at)
			return err == nil
		})
		defer dialled.Close()
		near := dialled.LocalAddr().(*net.TCPAddr)
		// Of the connection, whose far end has the service's port here.
		known := frame{from: a, to: a, sport: uint16(near.Port), dport: 20500}
		h.want("of the host's own connection", known.bytes(), "pass_socket")
		unknown := frame{from: client.of(a.Is6()), to: a, sport: 40000, dport: 20500}
		h.want("to a listener, of no connection", unknown.bytes(), "drop_source")
		unknown.syn = true
		h.want("to a listener, the first of a connection", unknown.bytes(), "pass_socket")
		unknown.dport = 20501
		h.want("to nobody", unknown.bytes(), "drop_source")
		datagrams, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 20500)))
		must(t, err)
		defer datagrams.Close()
		unknown.udp, unknown.dport = true, 20500
		h.want("to a socket of UDP", unknown.bytes(), "pass_socket")
		unknown.dport = 20501
		h.want("to no socket of UDP", unknown.bytes(), "drop_source")
	}
	names, err := holdVerdicts()
	must(t, err)
	equal(t, "number of verdicts", len(names), int(bpf.HoldVerdictVERDICT_COUNT))
	for _, name := range names {
		if !h.met[name] {
			t.Errorf("no frame was %s", name)
		}
	}
}

// TestHoldPorts: the keys of a range hold its ports and no others, and never more than 30 of them.
func TestHoldPorts(t *testing.T) {
	ranges := [][2]uint16{{0, 65535}, {1, 65534}, {443, 443}, {0, 0}, {65535, 65535}, {1024, 32767}}
	for range 500 {
		a, b := uint16(rand.Uint32()), uint16(rand.Uint32())
		ranges = append(ranges, [2]uint16{min(a, b), max(a, b)})
	}
	for _, r := range ranges {
		keys := portKeys([]byte{6, 0}, r[0], r[1])
		if len(keys) > 30 {
			t.Errorf("%v is %d keys", r, len(keys))
		}
		held := make(map[uint16]bool)
		for key := range keys {
			free := 16 + 16 - binary.NativeEndian.Uint32([]byte(key))
			first := binary.BigEndian.Uint16([]byte(key[6:]))
			for i := range uint32(1) << free {
				if held[first+uint16(i)] {
					t.Fatalf("%v: port %d is held twice", r, first+uint16(i))
				}
				held[first+uint16(i)] = true
			}
		}
		if len(held) != int(r[1])-int(r[0])+1 || !held[r[0]] || !held[r[1]] {
			t.Errorf("%v: %d ports are held", r, len(held))
		}
	}
}

// edgeHost is one whose own stack holds the service's address and has no socket for it; the other end of its cable sends
// frames of a client's and sees what is answered.
type edgeHost struct {
	*host
	socket       int
	to           unix.SockaddrLinklayer
	packet       []byte // a client's, in mid-connection
	sent, resets atomic.Int64
	forwarded    atomic.Int64 // frames that the data plane sent on: they have the service's address, and a backend's MAC
}

var backendMAC = [6]byte{2, 0, 0, 0, 0, 0x11}

func newEdgeHost(t testing.TB, devices ...string) *edgeHost {
	t.Helper()
	b := newBench(t, devices...)
	b.path = testPins + strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(t.Name(), "Test"), "/", "-"))
	e := &edgeHost{host: &host{bench: *b, path: b.path}}
	near, far := e.device(devices[0]), e.device(devices[0]+"p")
	e.addAddress(devices[0], "198.51.100.1/24")
	e.addAddress(devices[0], service.v4.String()+"/32")
	must(t, netlink.NeighSet(&netlink.Neigh{LinkIndex: near.Attrs().Index, State: netlink.NUD_PERMANENT,
		IP: client.v4.AsSlice(), HardwareAddr: far.Attrs().HardwareAddr}))
	// Else a veth loses what its peer sends by XDP_TX.
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "pass", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()}})
	must(t, err)
	defer pass.Close()
	on, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: far.Attrs().Index, Flags: link.XDPDriverMode})
	must(t, err)
	t.Cleanup(func() { on.Close() })
	e.socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	must(t, err)
	t.Cleanup(func() { unix.Close(e.socket) })
	e.to = unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: far.Attrs().Index}
	must(t, unix.Bind(e.socket, &e.to))
	must(t, unix.SetsockoptTimeval(e.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}))
	must(t, unix.SetsockoptInt(e.socket, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))

	tcp := &layers.TCP{SrcPort: 40000, DstPort: 443, Seq: 1000, Ack: 2000, ACK: true, PSH: true, Window: 512}
	header := ip(client.v4, service.v4, layers.IPProtocolTCP, 0, nil, false, 0)
	must(t, tcp.SetNetworkLayerForChecksum(header.(gopacket.NetworkLayer)))
	e.packet = serialized(&layers.Ethernet{SrcMAC: far.Attrs().HardwareAddr, DstMAC: near.Attrs().HardwareAddr,
		EthernetType: layers.EthernetTypeIPv4}, header, tcp, gopacket.Payload("hello"))
	return e
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// look counts what comes out of the edge until the socket has been silent for a while, or until told to stop.
func (e *edgeHost) look(stop <-chan struct{}) {
	buffer := make([]byte, 2048)
	for {
		n, from, err := unix.Recvfrom(e.socket, buffer, 0)
		if err != nil {
			select {
			case <-stop:
				return
			default:
				continue
			}
		}
		if at, ok := from.(*unix.SockaddrLinklayer); ok && at.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		f := buffer[:n]
		switch {
		case n >= 54 && f[23] == tcpNumber && netip.AddrFrom4([4]byte(f[26:30])) == service.v4 && f[47]&0x04 != 0:
			e.resets.Add(1)
		case n >= 54 && f[23] == tcpNumber && netip.AddrFrom4([4]byte(f[30:34])) == service.v4 && [6]byte(f[:6]) == backendMAC:
			e.forwarded.Add(1)
		}
	}
}

// stream sends the client's packet again and again until end is called, which answers how many were sent, forwarded and
// reset meanwhile.
func (e *edgeHost) stream() (end func() (sent, forwarded, resets int64)) {
	e.sent.Store(0)
	e.resets.Store(0)
	e.forwarded.Store(0)
	stop, quiet, done := make(chan struct{}), make(chan struct{}), make(chan struct{}, 2)
	go func() {
		e.look(quiet)
		done <- struct{}{}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := unix.Sendto(e.socket, e.packet, 0, &e.to); err != nil {
				e.Errorf("send: %v", err)
				return
			}
			e.sent.Add(1)
			time.Sleep(50 * time.Microsecond)
		}
	}()
	return func() (int64, int64, int64) {
		close(stop)
		<-done
		close(quiet)
		<-done
		return e.sent.Load(), e.forwarded.Load(), e.resets.Load()
	}
}

// during streams while something is done, and until then and later enough was sent.
func (e *edgeHost) during(do func()) (sent, forwarded, resets int64) {
	e.Helper()
	end := e.stream()
	enough := func() {
		before := e.sent.Load()
		await(e, "packets to be sent", func() bool { return e.sent.Load() >= before+100 })
	}
	enough()
	do()
	enough()
	return end()
}

func (e *edgeHost) holdOptions(interfaces ...string) HoldOptions {
	return HoldOptions{PinPath: e.path, Interfaces: interfaces, Logger: slog.New(slog.NewTextHandler(&e.log, nil)),
		Services: []HeldPorts{{service.v4, tcpNumber, 443, 443}}}
}

func (e *edgeHost) hold(interfaces ...string) *HoldReport {
	e.Helper()
	r, err := Hold(e.holdOptions(interfaces...))
	must(e, err)
	for _, f := range r.Failed {
		e.Errorf("%s: %v", f.Interface, f.Err)
	}
	return r
}

// openEdge opens a data plane whose maps forward the service, by dsr to a backend at the end of a device's cable.
func (e *edgeHost) openEdge(device string, interfaces ...string) *Loader {
	e.Helper()
	opts := e.options(interfaces...)
	opts.Settings.TCP = true
	l := e.open(opts)
	m, err := maps.NewManager(l.Maps(), maps.ManagerOptions{Tend: l.Programs().Tend, Fill: l.Programs().Fill,
		Epoch: time.Second, Logger: slog.New(slog.DiscardHandler)})
	must(e, err)
	defer m.Close()
	d := e.device(device).Attrs()
	hop := maps.NextHop{Known: true, Interface: uint32(d.Index), MAC: backendMAC, SourceMAC: [6]byte(d.HardwareAddr), MTU: 1500}
	var devices []maps.Device
	for _, name := range interfaces {
		a := e.device(name).Attrs()
		devices = append(devices, maps.Device{Index: uint32(a.Index), MTU: uint32(a.MTU), MAC: [6]byte(a.HardwareAddr)})
	}
	must(e, m.SetDevices(devices))
	_, err = m.Apply(maps.Wanted{Services: []maps.WantedService{{Name: "chat", Protocol: tcpNumber, RingSize: 503,
		Keys: []netip.AddrPort{netip.AddrPortFrom(service.v4, 443)}, IdleTimeout: time.Hour,
		Backends: []maps.WantedBackend{{Name: "ws1", Address: netip.MustParseAddr("198.51.100.11"), Port: 443,
			Method: maps.MethodDSR, Weight: 1}}}}}, func(netip.Addr) maps.NextHop { return hop })
	must(e, err)
	return l
}

// programName is what runs on a device; empty: nothing.
func (e *edgeHost) programName(device string) string {
	e.Helper()
	id := e.running(device)
	if id == 0 {
		return ""
	}
	program, err := ebpf.NewProgramFromID(id)
	must(e, err)
	defer program.Close()
	info, err := program.Info()
	must(e, err)
	return info.Name
}

// linkOf is the link that a device's program is in, by whatever is pinned.
func (e *edgeHost) linkOf(device string) (id link.ID, pin string) {
	e.Helper()
	index := e.device(device).Attrs().Index
	for _, pattern := range []string{"/hold/link_*", "/v*/link_*"} {
		pins, err := filepath.Glob(e.path + pattern)
		must(e, err)
		for _, pin := range pins {
			l, err := link.LoadPinnedLink(pin, nil)
			must(e, err)
			at := &attachment{link: l}
			must(e, at.refresh())
			l.Close()
			if at.index == index {
				return at.id, strings.TrimPrefix(pin, e.path)
			}
		}
	}
	return 0, ""
}

func (e *edgeHost) count(name string) uint64 {
	e.Helper()
	s, err := ReadHold(e.path)
	must(e, err)
	for _, c := range s.Verdicts {
		if c.Name == name {
			return c.Count
		}
	}
	e.Fatalf("nothing is counted as %s", name)
	return 0
}

func (e *edgeHost) wantGone(path string) {
	e.Helper()
	if _, err := os.Stat(e.path + path); !errors.Is(err, os.ErrNotExist) {
		e.Errorf("%s is still there: %v", path, err)
	}
}

var realDir = "/" + versionDir(bpf.FairleadSchemaSCHEMA_VERSION)

// TestHoldTakeOver: a host that holds the address resets without a hold and is silent with it; the data plane takes over
// and gives back without one reset, in the same link.
func TestHoldTakeOver(t *testing.T) {
	for _, mode := range []XDPMode{ModeNative, ModeGeneric} {
		t.Run(string(mode), func(t *testing.T) {
			e := newEdgeHost(t, "flhold.1", "flhold2")
			if sent, _, resets := e.during(func() {}); resets == 0 {
				t.Fatalf("of %d packets to a service that nobody holds none was reset: this test shows nothing", sent)
			}
			opts := e.holdOptions("flhold.1", "flhold2")
			opts.Mode = mode
			r, err := Hold(opts)
			must(t, err)
			equal(t, "number of interfaces held", len(r.Held), 2)
			equal(t, "mode", r.Held[0].Mode, mode)
			equal(t, "pins", e.pins(), []string{"/hold/link_flhold%2e1", "/hold/link_flhold2", "/hold/v1/held_from4",
				"/hold/v1/held_from6", "/hold/v1/held_to4", "/hold/v1/held_to6", "/hold/v1/hold_counters", "/hold/v1/program"})
			equal(t, "program", e.programName("flhold.1"), "fairlead_hold")
			sent, _, resets := e.during(func() {})
			equal(t, "resets while held", resets, int64(0))
			if dropped := e.count("drop_service"); dropped != uint64(sent) {
				t.Errorf("of %d packets %d were dropped", sent, dropped)
			}
			id, _ := e.linkOf("flhold.1")

			l := e.openEdge("flhold.1", "flhold.1")
			sent, forwarded, resets := e.during(func() { must(t, l.Attach()) })
			equal(t, "resets while the data plane took over", resets, int64(0))
			if forwarded < 100 || forwarded > sent-100 {
				t.Errorf("of %d packets %d were forwarded: want some hundred, and not all", sent, forwarded)
			}
			after, pin := e.linkOf("flhold.1")
			equal(t, "link", after, id)
			equal(t, "its pin", pin, realDir+"/link_flhold%2e1")
			equal(t, "program", e.programName("flhold.1"), "fairlead")
			equal(t, "program where the data plane is not", e.programName("flhold2"), "")
			e.wantGone("/hold")
			if !strings.Contains(e.log.String(), "took over from `fairlead hold`\" interfaces=1") {
				t.Errorf("it is not said what was held:\n%s", e.log.String())
			}
			must(t, l.Close())

			// And back.
			var report *HoldReport
			sent, forwarded, resets = e.during(func() {
				report, _, err = UnloadHeld(opts)
				must(t, err)
			})
			equal(t, "resets while the data plane was unloaded", resets, int64(0))
			if forwarded < 100 || forwarded > sent-100 {
				t.Errorf("of %d packets %d were forwarded: want some hundred, and not all", sent, forwarded)
			}
			equal(t, "number of interfaces held", len(report.Held), 1)
			equal(t, "link", report.Held[0].Link, id)
			equal(t, "program", e.programName("flhold.1"), "fairlead_hold")
			e.wantGone(realDir)
			if dropped := e.count("drop_service"); dropped == 0 {
				t.Error("nothing was dropped afterwards")
			}

			removed, err := Unload(e.path)
			must(t, err)
			equal(t, "number of pins removed", len(removed), 7)
			e.wantNothing("flhold.1")
			if _, err := ReadHold(e.path); !errors.Is(err, ErrNothing) {
				t.Errorf("reading what is not there: %v", err)
			}
		})
	}
}

// TestHoldAgain: what is held changes in place, interfaces come and go, counters stay.
func TestHoldAgain(t *testing.T) {
	e := newEdgeHost(t, "flhold1", "flhold2", "flhold3")
	e.hold("flhold1", "flhold2")
	first, _ := e.linkOf("flhold1")
	before := e.running("flhold1")
	e.during(func() {})
	dropped := e.count("drop_service")

	opts := e.holdOptions("flhold1", "flhold3")
	opts.Services = append(opts.Services, HeldPorts{service.v6, udpNumber, 1000, 1999})
	opts.Sources = []HeldPorts{{source.v4, tcpNumber, 1024, 32767}}
	sent, _, resets := e.during(func() {
		r, err := Hold(opts)
		must(t, err)
		equal(t, "released", len(r.Released), 1)
	})
	equal(t, "resets meanwhile", resets, int64(0))
	equal(t, "dropped in all", e.count("drop_service"), dropped+uint64(sent))
	again, _ := e.linkOf("flhold1")
	equal(t, "link", again, first)
	if e.running("flhold1") == before {
		t.Error("the program is the one before")
	}
	equal(t, "programs", []string{e.programName("flhold2"), e.programName("flhold3")}, []string{"", "fairlead_hold"})
	s, err := ReadHold(e.path)
	must(t, err)
	// 443; 1000 to 1999 in 1000-1007, 1008-1023, 1024-1535, 1536-1791, 1792-1919, 1920-1983, 1984-1999; 1024 to 32767 in 5.
	equal(t, "entries", s.Entries, 1+7+5)

	// What it no longer asks for is let through.
	opts.Services, opts.Sources = []HeldPorts{{service.v4, tcpNumber, 444, 444}}, nil
	_, err = Hold(opts)
	must(t, err)
	if _, _, resets := e.during(func() {}); resets == 0 {
		t.Error("port 443 is held still")
	}
	s, err = ReadHold(e.path)
	must(t, err)
	equal(t, "entries", s.Entries, 1)

	// More than there is room for changes nothing.
	opts.Services = nil
	for i := range uint32(bpf.HoldLimitsMAX_PREFIXES) + 1 {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		opts.Services = append(opts.Services, HeldPorts{a, tcpNumber, 443, 443})
	}
	running := e.running("flhold1")
	if _, err := Hold(opts); err == nil || !strings.Contains(err.Error(), "there is room for 262144") {
		t.Errorf("too much: %v", err)
	}
	s, err = ReadHold(e.path)
	must(t, err)
	equal(t, "entries after a failure", s.Entries, 1)
	equal(t, "program after a failure", e.running("flhold1"), running)

	// An interface that is gone.
	must(t, netlink.LinkDel(e.device("flhold3")))
	r, err := Hold(e.holdOptions("flhold1", "flhold3"))
	must(t, err)
	equal(t, "held", len(r.Held), 1)
	if len(r.Failed) != 1 || r.Failed[0].Interface != "flhold3" {
		t.Errorf("failed: %+v", r.Failed)
	}
	e.addDevice("flhold3")
	equal(t, "held", len(e.hold("flhold1", "flhold3").Held), 2)
	_, err = Unload(e.path)
	must(t, err)
	e.wantNothing("flhold1")
}

// TestHoldBeside: a foreign program stays and is named, the data plane's interfaces are left alone, a daemon's lock is
// respected.
func TestHoldBeside(t *testing.T) {
	e := newEdgeHost(t, "flhold1", "flhold2", "flhold3")
	foreign, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "stranger", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()}})
	must(t, err)
	defer foreign.Close()
	other, err := link.AttachXDP(link.XDPOptions{Program: foreign, Interface: e.device("flhold2").Attrs().Index,
		Flags: link.XDPDriverMode})
	must(t, err)
	defer other.Close()

	// Alone, it leaves nothing behind.
	r, err := Hold(e.holdOptions("flhold2", "nosuch"))
	must(t, err)
	var taken *ForeignError
	if len(r.Failed) != 2 || !errors.As(r.Failed[0].Err, &taken) || taken.Name != "stranger" {
		t.Fatalf("failed: %+v", r.Failed)
	}
	equal(t, "program", e.programName("flhold2"), "stranger")
	e.wantGone("")

	r, err = Hold(e.holdOptions("flhold2", "flhold3"))
	must(t, err)
	equal(t, "held", r.Held[0].Interface, "flhold3")
	equal(t, "failed", len(r.Failed), 1)

	// What can't take over changes nothing.
	id, _ := e.linkOf("flhold3")
	l := e.openEdge("flhold3", "flhold3", "flhold2")
	if err := l.Attach(); !errors.Is(err, ErrForeign) {
		t.Errorf("attached to a foreign program's interface: %v", err)
	}
	equal(t, "program", e.programName("flhold3"), "fairlead_hold")
	e.wantGone(realDir)
	must(t, l.Close())
	var findings []string
	for _, f := range Check(e.options("flhold3")) {
		if f.Level == LevelFail || strings.Contains(f.What, "held") {
			findings = append(findings, f.What)
		}
	}
	equal(t, "findings", findings, []string{"is held until fairlead is attached, xdp native"})

	l = e.openEdge("flhold1", "flhold1")
	if _, err := Hold(e.holdOptions("flhold1")); !errors.Is(err, ErrLocked) {
		t.Errorf("held under a daemon that has not attached yet: %v", err)
	}
	must(t, l.Attach())
	now, _ := e.linkOf("flhold3")
	equal(t, "link of an interface that the data plane is not on", now, link.ID(0))
	r, err = Hold(e.holdOptions("flhold1"))
	must(t, err)
	equal(t, "left to a running daemon", r.Attached[0].Interface, "flhold1")
	if _, _, err := UnloadHeld(e.holdOptions()); !errors.Is(err, ErrLocked) {
		t.Errorf("unloaded under a daemon: %v", err)
	}
	must(t, l.Close())
	r = e.hold("flhold1", "flhold3")
	equal(t, "left", r.Attached[0].Interface, "flhold1")
	equal(t, "held", r.Held[0].Interface, "flhold3")
	after, _ := e.linkOf("flhold3")
	if after == id {
		t.Error("the link is the one that was released")
	}
	equal(t, "programs", []string{e.programName("flhold1"), e.programName("flhold3")}, []string{"fairlead", "fairlead_hold"})

	// Both are gone by one Unload.
	_, err = Unload(e.path)
	must(t, err)
	e.wantNothing("flhold1")
	if _, _, err := UnloadHeld(e.holdOptions()); !errors.Is(err, ErrNothing) {
		t.Errorf("unloaded what is not there: %v", err)
	}
}

// TestHoldKilled: wherever a take-over, or the way back, is killed, the interface is held or forwarding, in the same
// link; and each command finds its way on from there.
func TestHoldKilled(t *testing.T) {
	type place struct {
		name string
		make func(e *edgeHost)
	}
	// Up to some step of what apply does.
	takeOver := func(steps int) func(e *edgeHost) {
		return func(e *edgeHost) {
			e.hold("flhold1")
			l := e.openEdge("flhold1", "flhold1")
			var forgotten undo
			must(e, l.commit(l.programs.Fairlead, nil, []netlink.Link{e.device("flhold1")}, &forgotten))
			if steps > 0 {
				must(e, l.exchange(l.held[0], l.programs.Fairlead, new([]*ebpf.Program), &forgotten))
			}
			if steps > 1 {
				must(e, movePin(l.held[0], l.dir(), &forgotten))
			}
			must(e, l.Close())
		}
	}
	giveBack := func(steps int) func(e *edgeHost) {
		return func(e *edgeHost) {
			l := e.openEdge("flhold1", "flhold1")
			must(e, l.Attach())
			must(e, l.Close())
			h, err := newHold(e.holdOptions())
			must(e, err)
			h.lock, err = lockDirectory(h.path)
			must(e, err)
			var forgotten undo
			_, err = h.load(&forgotten)
			must(e, err)
			must(e, h.pin(nil, nil, &forgotten))
			links, err := pinnedLinks(e.path + realDir)
			must(e, err)
			h.links = links
			if steps > 0 {
				must(e, h.exchange(links[0], nil, &forgotten))
			}
			if steps > 1 {
				must(e, movePin(links[0], h.dir(), &forgotten))
			}
			must(e, h.close())
		}
	}
	places := []place{
		{"taking over: maps there, link held", takeOver(0)},
		{"taking over: link updated", takeOver(1)},
		{"taking over: pin moved", takeOver(2)},
		{"giving back: hold there, link forwards", giveBack(0)},
		{"giving back: link updated", giveBack(1)},
		{"giving back: pin moved", giveBack(2)},
	}
	next := map[string]func(e *edgeHost) (program string){
		"run": func(e *edgeHost) string {
			l := e.openEdge("flhold1", "flhold1")
			must(e, l.Attach())
			equal(e, "attachments", len(l.Attachments()), 1)
			must(e, l.Close())
			e.wantGone("/hold")
			return "fairlead"
		},
		"hold": func(e *edgeHost) string {
			before := e.programName("flhold1")
			r := e.hold("flhold1")
			equal(e, "interfaces held and left", []bool{len(r.Held) == 1, len(r.Attached) == 1},
				[]bool{before == "fairlead_hold", before == "fairlead"})
			return before
		},
		"unload --hold": func(e *edgeHost) string {
			r, _, err := UnloadHeld(e.holdOptions())
			must(e, err)
			equal(e, "interfaces held", len(r.Held), 1)
			e.wantGone(realDir)
			return "fairlead_hold"
		},
		"unload": func(e *edgeHost) string {
			_, err := Unload(e.path)
			must(e, err)
			e.wantNothing("flhold1")
			return ""
		},
	}
	for i, at := range places {
		for what, then := range next {
			t.Run(fmt.Sprintf("%d/%s", i, strings.ReplaceAll(what, " ", "")), func(t *testing.T) {
				e := newEdgeHost(t, "flhold1")
				at.make(e)
				id, _ := e.linkOf("flhold1")
				if id == 0 {
					t.Fatalf("%s: no link is pinned", at.name)
				}
				var want string
				_, _, resets := e.during(func() { want = then(e) })
				if what != "unload" {
					equal(t, at.name+": resets", resets, int64(0))
					after, pin := e.linkOf("flhold1")
					equal(t, at.name+": link", after, id)
					home := map[string]string{"fairlead": realDir, "fairlead_hold": "/hold"}[want]
					equal(t, at.name+": pin", pin, home+"/link_flhold1")
				}
				equal(t, at.name+": program", e.programName("flhold1"), want)
			})
		}
	}
}

// TestHoldTakenBack: a take-over that fails half-way leaves what was held as it was.
func TestHoldTakenBack(t *testing.T) {
	e := newEdgeHost(t, "flhold1", "flhold2", "flhold3")
	// The data plane is on one already, two are held.
	l := e.openEdge("flhold3", "flhold3")
	must(t, l.Attach())
	must(t, l.Close())
	e.hold("flhold1", "flhold2", "flhold3")
	pins := e.pins()
	programs := []ebpf.ProgramID{e.running("flhold1"), e.running("flhold2"), e.running("flhold3")}

	l = e.openEdge("flhold3", "flhold1", "flhold2", "flhold3")
	// Where the second one's pin is to go to, there are directories.
	var made []string
	for _, suffix := range []string{"", fmt.Sprintf("_%d", e.device("flhold2").Attrs().Index)} {
		made = append(made, e.path+realDir+"/link_flhold2"+suffix)
		must(t, os.Mkdir(made[len(made)-1], 0o700))
	}
	_, _, resets := e.during(func() {
		if err := l.Attach(); err == nil || !strings.Contains(err.Error(), "move the pin of a link") ||
			strings.Contains(err.Error(), "taken back") {
			t.Errorf("with the way blocked: %v", err)
		}
	})
	equal(t, "resets meanwhile", resets, int64(0))
	for _, dir := range made {
		must(t, os.Remove(dir))
	}
	equal(t, "pins", e.pins(), pins)
	equal(t, "programs", []ebpf.ProgramID{e.running("flhold1"), e.running("flhold2"), e.running("flhold3")}, programs)
	pinned, err := ebpf.LoadPinnedProgram(e.path+realDir+"/program", nil)
	must(t, err)
	equal(t, "pinned program", programID(pinned), programs[2])
	pinned.Close()
	// The way is free: the same Loader goes it.
	must(t, l.Attach())
	equal(t, "attachments", len(l.Attachments()), 3)
	must(t, l.Close())
	e.wantGone("/hold")

	// What a first start has made visible goes as it came.
	_, err = Unload(e.path)
	must(t, err)
	e.hold("flhold1")
	pins = e.pins()
	l = e.openEdge("flhold1", "flhold1")
	var taken undo
	must(t, l.commit(l.programs.Fairlead, nil, []netlink.Link{e.device("flhold1")}, &taken))
	must(t, taken.run())
	equal(t, "pins", e.pins(), pins)
	must(t, l.Attach())
	equal(t, "program", e.programName("flhold1"), "fairlead")
}

// TestHoldBond: ports that were held before their bond was made give way to it, as the kernel demands.
func TestHoldBond(t *testing.T) {
	bonded := func(t *testing.T) *edgeHost {
		e := newEdgeHost(t, "flhold1", "flhold2")
		e.hold("flhold1", "flhold2")
		attributes := netlink.NewLinkAttrs()
		attributes.Name = "flholdbond"
		bond := netlink.NewLinkBond(attributes)
		bond.Mode = netlink.BOND_MODE_ACTIVE_BACKUP
		if !e.add(bond) {
			return nil
		}
		for _, port := range []string{"flhold1", "flhold2"} {
			must(t, netlink.LinkSetDown(e.device(port)))
			must(t, netlink.LinkSetBondSlave(e.device(port), &netlink.Bond{LinkAttrs: *e.device("flholdbond").Attrs()}))
			must(t, netlink.LinkSetUp(e.device(port)))
			equal(t, "program on "+port, e.programName(port), "fairlead_hold")
		}
		return e
	}
	t.Run("attach", func(t *testing.T) {
		e := bonded(t)
		if e == nil {
			return
		}
		// What fails has the ports held again. A program of the test's own is on the cable's other end.
		l := e.open(e.options("flholdbond", "flhold1p"))
		if err := l.Attach(); !errors.Is(err, ErrForeign) || strings.Contains(err.Error(), "taken back") {
			t.Errorf("attached to a foreign program's interface: %v", err)
		}
		equal(t, "programs", []string{e.programName("flhold1"), e.programName("flhold2"), e.programName("flholdbond")},
			[]string{"fairlead_hold", "fairlead_hold", ""})
		s, err := ReadHold(e.path)
		must(t, err)
		equal(t, "interfaces held", len(s.Interfaces), 2)
		must(t, l.Close())

		l = e.bench.attach(e.options("flholdbond"))
		equal(t, "mode", l.Attachments()[0].Mode, ModeNative)
		equal(t, "program", e.programName("flholdbond"), "fairlead")
		e.wantGone("/hold")
	})
	t.Run("hold", func(t *testing.T) {
		e := bonded(t)
		if e == nil {
			return
		}
		r := e.hold("flholdbond")
		equal(t, "held", r.Held[0].Interface, "flholdbond")
		equal(t, "mode", r.Held[0].Mode, ModeNative)
		s, err := ReadHold(e.path)
		must(t, err)
		equal(t, "interfaces held", len(s.Interfaces), 1)
	})
}

const (
	cycleVar    = "FLLOAD_CYCLE"
	cycleDevice = "flhold1"
)

// cycleHold is a process that has the data plane take over and give back, again and again.
func cycleHold(path string) {
	quiet := slog.New(slog.DiscardHandler)
	opts := HoldOptions{PinPath: path, Interfaces: []string{cycleDevice}, Logger: quiet,
		Services: []HeldPorts{{service.v4, tcpNumber, 443, 443}}}
	for {
		l, err := Open(Options{PinPath: path, Interfaces: opts.Interfaces, Settings: small, Logger: quiet})
		if err == nil {
			fmt.Println("attach")
			err = errors.Join(l.Attach(), l.Close())
		}
		if err == nil {
			fmt.Println("unload")
			_, _, err = UnloadHeld(opts)
		}
		if err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
	}
}

// TestHoldKilledForReal: SIGKILL at any moment.
func TestHoldKilledForReal(t *testing.T) {
	e := newEdgeHost(t, cycleDevice)
	e.hold(cycleDevice)
	id, _ := e.linkOf(cycleDevice)
	seen := make(map[string]int)
	for i := range 12 {
		child := exec.Command("/proc/self/exe")
		child.Env = append(os.Environ(), cycleVar+"="+e.path)
		output, err := child.StdoutPipe()
		must(t, err)
		must(t, child.Start())
		buffer := make([]byte, 256)
		n, err := output.Read(buffer)
		if err != nil || strings.Contains(string(buffer[:n]), "failed") {
			t.Fatalf("killed %d times before: %v %s", i, err, buffer[:n])
		}
		// Some are to be hit in Attach, some between, some in UnloadHeld.
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		must(t, child.Process.Kill())
		child.Wait()
		name := e.programName(cycleDevice)
		seen[name]++
		after, pin := e.linkOf(cycleDevice)
		if after != id || name == "" {
			t.Fatalf("killed %d times: program %q, link %d pinned at %s, was %d", i+1, name, after, pin, id)
		}
	}
	t.Logf("programs that were found: %v", seen)
	l := e.openEdge(cycleDevice, cycleDevice)
	must(t, l.Attach())
	after, pin := e.linkOf(cycleDevice)
	equal(t, "link", after, id)
	equal(t, "pin", pin, realDir+"/link_"+cycleDevice)
	e.wantGone("/hold")
	e.wantGone("/hold-new")
}

// TestHoldNFT: nftables takes the text, twice, and drops the same.
func TestHoldNFT(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Fatalf("this test needs nft: apt-get install nftables: %v", err)
	}
	e := newEdgeHost(t, "flhold1")
	opts := heldOptions()
	opts.Sources = append(opts.Sources, HeldPorts{source.v4, tcpNumber, 20500, 22000}) // overlaps
	text := opts.NFT([]string{"flhold1", "nosuch.7"})
	if _, _, resets := e.during(func() {}); resets == 0 {
		t.Fatal("nothing is reset: this test shows nothing")
	}
	for range 2 {
		nft := exec.Command("nft", "-f", "-")
		nft.Stdin = strings.NewReader(text)
		if output, err := nft.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v\n%s\n%s", err, output, text)
		}
	}
	sent, _, resets := e.during(func() {})
	equal(t, "resets", resets, int64(0))
	rules, err := exec.Command("nft", "list", "table", "inet", "fairlead_hold").CombinedOutput()
	must(t, err)
	if want := fmt.Sprintf("counter packets %d ", sent); !strings.Contains(string(rules), want) {
		t.Errorf("%d packets were sent:\n%s", sent, rules)
	}
	if !strings.Contains(string(rules), "20000-22000") {
		t.Errorf("overlapping ranges are not one:\n%s", rules)
	}
}
