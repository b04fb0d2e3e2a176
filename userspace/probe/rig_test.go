package probe

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps"
)

const testPins = "/sys/fs/bpf/fairlead-test-probe-"

// TestMain sweeps what a killed run left.
func TestMain(m *testing.M) {
	var errs []error
	pins, _ := filepath.Glob(testPins + "*")
	for _, path := range pins {
		if _, err := loader.Unload(path); err != nil && !errors.Is(err, loader.ErrNothing) {
			errs = append(errs, err)
		}
	}
	namespaces, _ := filepath.Glob("/run/netns/" + namespacePrefix + "*")
	for _, path := range namespaces {
		errs = append(errs, netns.DeleteNamed(filepath.Base(path)))
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

// rig is the data plane in the kernel with its Manager, attached nowhere: packets come from the test, by
// BPF_PROG_TEST_RUN.
type rig struct {
	testing.TB
	*loader.Loader
	manager *maps.Manager
	set     *maps.Set
	wanted  maps.Wanted
	logged  lockedBuffer
}

// The rig's services, each with one backend: by dsr of both families, by fullnat, of UDP, and one that no campaign is
// about.
const (
	four = iota
	six
	full
	datagrams
	others
)

const tableSize = 16384

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{TB: t}
	var err error
	r.Loader, err = loader.Open(loader.Options{
		PinPath: fmt.Sprintf("%s%d-%s", testPins, os.Getpid(), strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))),
		Settings: loader.Settings{IPv4: true, IPv6: true, TCP: true, UDP: true, FullNAT: true, DSR: true,
			Connections: tableSize, HalfOpen: 8192},
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatalf("load the data plane (root is needed): %v", err)
	}
	t.Cleanup(func() { r.must(r.Loader.Close()) })
	r.manager, err = maps.NewManager(r.Maps(), maps.ManagerOptions{Tend: r.Programs().Tend, Fill: r.Programs().Fill,
		Epoch: 10 * time.Second})
	r.must(err)
	t.Cleanup(func() { r.must(r.manager.Close()) })
	r.set = r.manager.Set()
	for i, method := range []maps.Method{maps.MethodDSR, maps.MethodDSR, maps.MethodFullNAT, maps.MethodDSR, maps.MethodDSR} {
		backend := maps.WantedBackend{Name: "b", Address: backendAddress(i), Port: 443, Method: method, Weight: 1}
		if method == maps.MethodFullNAT {
			backend.Sources = []maps.WantedSource{{Address: netip.MustParseAddr("10.9.0.1"), First: 1024, Last: 32767}}
		}
		r.wanted.Services = append(r.wanted.Services, maps.WantedService{
			Name: fmt.Sprintf("s%d", i), Keys: []netip.AddrPort{serviceAddress(i)}, Protocol: unix.IPPROTO_TCP, RingSize: 251,
			OnBackendDown: maps.DownReset, IdleTimeout: time.Hour, Backends: []maps.WantedBackend{backend},
		})
	}
	r.wanted.Services[datagrams].Protocol = unix.IPPROTO_UDP
	r.apply()
	return r
}

func serviceAddress(service int) netip.AddrPort {
	if service == six {
		return netip.MustParseAddrPort("[fd00:1::1]:443")
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(service), 1}), 443)
}

func backendAddress(service int) netip.Addr {
	if service == six {
		return netip.MustParseAddr("fd00:2::1")
	}
	return netip.AddrFrom4([4]byte{10, 2, byte(service), 1})
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) apply() {
	r.Helper()
	_, err := r.manager.Apply(r.wanted, func(netip.Addr) maps.NextHop {
		return maps.NextHop{Known: true, Interface: 2, MAC: backendMAC, SourceMAC: edgeMAC, MTU: 1500}
	})
	r.must(err)
}

// change applies another state of a service's backend.
func (r *rig) change(service int, change func(*maps.WantedBackend)) {
	r.Helper()
	change(&r.wanted.Services[service].Backends[0])
	r.apply()
}

func goDown(b *maps.WantedBackend)  { b.Down = true }
func drained(b *maps.WantedBackend) { b.Weight = 0 }

func (r *rig) backend(service int) maps.Backend {
	r.Helper()
	inv, err := r.set.Inventory()
	r.must(err)
	for _, b := range inv.Backends {
		if b.Address == backendAddress(service) {
			return b
		}
	}
	r.Fatalf("no backend %v", backendAddress(service))
	return maps.Backend{}
}

// newTeller is a Teller that logs into the rig's buffer.
func (r *rig) newTeller(s Sender) *Teller {
	return NewTeller(Options{Connections: r.set.Connections, Keeper: r.manager, Counts: r.set.Control, Capacity: tableSize,
		Sender: s, Logger: slog.New(slog.NewTextHandler(&r.logged, nil))})
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

var (
	edgeMAC    = [6]byte{2, 0xe, 0, 0, 0, 1}
	clientMAC  = [6]byte{2, 0xc, 0, 0, 0, 1}
	backendMAC = [6]byte{2, 0xb, 0, 0, 0, 1}
)

// segment is a packet by what matters here.
type segment struct {
	source, destination netip.AddrPort
	protocol            uint8
	flags               uint8
	sequence, ack       uint32
	value, echo         uint32 // of a timestamp option; both 0: none
	payload             int
}

func (s *segment) frame(from, to [6]byte) []byte {
	kind := layers.EthernetTypeIPv4
	var ip gopacket.NetworkLayer
	var network gopacket.SerializableLayer
	if s.source.Addr().Is6() {
		kind = layers.EthernetTypeIPv6
		v6 := &layers.IPv6{Version: 6, NextHeader: layers.IPProtocol(s.protocol), HopLimit: 64,
			SrcIP: s.source.Addr().AsSlice(), DstIP: s.destination.Addr().AsSlice()}
		ip, network = v6, v6
	} else {
		v4 := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocol(s.protocol), SrcIP: s.source.Addr().AsSlice(),
			DstIP: s.destination.Addr().AsSlice()}
		ip, network = v4, v4
	}
	var transport gopacket.SerializableLayer
	if s.protocol == unix.IPPROTO_UDP {
		udp := &layers.UDP{SrcPort: layers.UDPPort(s.source.Port()), DstPort: layers.UDPPort(s.destination.Port())}
		_ = udp.SetNetworkLayerForChecksum(ip) // IP it is
		transport = udp
	} else {
		tcp := &layers.TCP{SrcPort: layers.TCPPort(s.source.Port()), DstPort: layers.TCPPort(s.destination.Port()),
			Seq: s.sequence, Ack: s.ack, Window: 1000,
			FIN: s.flags&fin != 0, SYN: s.flags&syn != 0, RST: s.flags&rst != 0, PSH: s.flags&psh != 0, ACK: s.flags&ack != 0}
		if s.value != 0 || s.echo != 0 {
			data := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, s.value), s.echo)
			tcp.Options = []layers.TCPOption{{OptionType: layers.TCPOptionKindNop}, {OptionType: layers.TCPOptionKindNop},
				{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: data}}
		}
		_ = tcp.SetNetworkLayerForChecksum(ip) // IP it is
		transport = tcp
	}
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: from[:], DstMAC: to[:], EthernetType: kind}, network, transport,
		gopacket.Payload(make([]byte, s.payload))); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// read reads a frame back; false: it is not TCP's or UDP's.
func read(frame []byte) (s segment, ok bool) {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	if p.NetworkLayer() == nil {
		return s, false
	}
	address := func(b []byte) netip.Addr { a, _ := netip.AddrFromSlice(b); return a }
	from, to := p.NetworkLayer().NetworkFlow().Endpoints()
	switch l := p.TransportLayer().(type) {
	case *layers.TCP:
		s.protocol = unix.IPPROTO_TCP
		s.source = netip.AddrPortFrom(address(from.Raw()), uint16(l.SrcPort))
		s.destination = netip.AddrPortFrom(address(to.Raw()), uint16(l.DstPort))
		s.sequence, s.ack, s.flags, s.payload = l.Seq, l.Ack, l.Contents[13], len(l.Payload)
		s.value, s.echo, _ = timestampsOf(l)
	case *layers.UDP:
		s.protocol = unix.IPPROTO_UDP
		s.source = netip.AddrPortFrom(address(from.Raw()), uint16(l.SrcPort))
		s.destination = netip.AddrPortFrom(address(to.Raw()), uint16(l.DstPort))
	default:
		return s, false
	}
	return s, true
}

func timestampsOf(tcp *layers.TCP) (value, echo uint32, ok bool) {
	for _, o := range tcp.Options {
		if o.OptionType == layers.TCPOptionKindTimestamps && len(o.OptionData) == 8 {
			return binary.BigEndian.Uint32(o.OptionData), binary.BigEndian.Uint32(o.OptionData[4:]), true
		}
	}
	return 0, 0, false
}

// run gives the data plane a packet and answers what it sent on.
func (r *rig) run(s segment, from [6]byte) (out segment, sent bool) {
	r.Helper()
	options := ebpf.RunOptions{Data: s.frame(from, edgeMAC), DataOut: make([]byte, 256)}
	action, err := r.Programs().Fairlead.Run(&options)
	r.must(err)
	if action != 3 && action != 4 { // XDP_TX, XDP_REDIRECT
		return segment{}, false
	}
	out, _ = read(options.DataOut)
	return out, true
}

// client is one that answers probes as Linux does, unless it is told otherwise.
type client struct {
	service    int
	tuple      maps.Tuple
	seq, ack   uint32
	timestamps bool
	mute       int  // so many probes are not answered
	gone       bool // its answers are RSTs: its host knows nothing of it

	probes, answers []time.Time
	backendTold     time.Time // when its backend got a RST
	told            time.Time // when it got one itself
	forwarded       int       // answers that its backend got
}

// newClient is the number-th of a service.
func newClient(service, number int) *client {
	a := netip.AddrFrom4([4]byte{198, 18, byte(service), byte(number / 30000)})
	if service == six {
		a = netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 15: byte(number / 30000)})
	}
	protocol := uint8(unix.IPPROTO_TCP)
	if service == datagrams {
		protocol = unix.IPPROTO_UDP
	}
	return &client{service: service, seq: random.Uint32(), ack: random.Uint32(), timestamps: number%2 == 0,
		tuple: maps.Tuple{Source: netip.AddrPortFrom(a, uint16(1024+number%30000)), Destination: serviceAddress(service),
			Protocol: protocol}}
}

func (k *client) segment(flags uint8, payload int) segment {
	s := segment{source: k.tuple.Source, destination: k.tuple.Destination, protocol: k.tuple.Protocol, flags: flags,
		sequence: k.seq, ack: k.ack, payload: payload}
	if k.timestamps {
		s.value, s.echo = k.seq|1, k.ack|1 // as good as a clock
	}
	return s
}

// begin is a handshake: under dsr the entry is young then.
func (r *rig) begin(k *client) {
	r.Helper()
	opening := k.segment(syn, 0)
	opening.sequence, opening.ack = k.seq-1, 0
	out, sent := r.run(opening, clientMAC)
	if !sent || out.flags&rst != 0 {
		r.Fatalf("%v: SYN refused", k.tuple)
	}
	if k.service == full {
		r.run(segment{source: out.destination, destination: out.source, protocol: unix.IPPROTO_TCP, flags: syn | ack,
			sequence: k.ack - 1, ack: k.seq}, backendMAC)
	}
	r.run(k.segment(ack, 0), clientMAC)
}

// grow shows that both ends talk.
func (r *rig) grow(k *client) {
	r.Helper()
	k.ack += 4
	r.run(k.segment(ack|psh, 4), clientMAC)
	k.seq += 4
}

// open makes an entry that is not young.
func (r *rig) open(k *client) {
	r.Helper()
	if k.service == datagrams {
		r.run(k.segment(0, 4), clientMAC)
		return
	}
	r.begin(k)
	r.grow(k)
	if c, found := r.entry(k); !found || c.State&maps.StateYoung != 0 {
		r.Fatalf("%v: %+v", k.tuple, c)
	}
}

func (r *rig) entry(k *client) (maps.Connection, bool) {
	r.Helper()
	c, found, err := r.set.Connections.Get(k.tuple)
	r.must(err)
	return c, found
}

// world is where probes go: clients, whose answers the data plane gets.
type world struct {
	*rig
	mu      sync.Mutex
	clients map[netip.AddrPort]*client
	sent    []time.Time
	largest int // batch
	fail    error
}

func newWorld(r *rig) *world { return &world{rig: r, clients: make(map[netip.AddrPort]*client)} }

// crowd opens connections and answers them.
func (w *world) crowd(service, n int) (all []*client) {
	w.Helper()
	for i := range n {
		k := newClient(service, i)
		w.open(k)
		w.clients[k.tuple.Source] = k
		all = append(all, k)
	}
	return all
}

func (w *world) Send(ctx context.Context, probes []Probe) (sent int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.largest = max(w.largest, len(probes))
	for i := range probes {
		if probes[i].Err = w.fail; w.fail == nil {
			probes[i].Err = ctx.Err()
		}
		if probes[i].Err == nil {
			w.receive(&probes[i])
			sent++
		}
	}
	return sent
}

// count is how many probes were received.
func (w *world) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.sent)
}

func (w *world) receive(p *Probe) {
	now := time.Now()
	w.sent = append(w.sent, now)
	s, ok := read(p.Frame)
	k := w.clients[s.destination]
	if !ok || k == nil {
		w.Errorf("a probe for nobody: %+v", s)
		return
	}
	if s.source != k.tuple.Destination || s.flags != ack || s.payload != 1 || s.sequence != k.ack-1 || s.ack != k.seq ||
		net.HardwareAddr(p.Frame[:6]).String() != net.HardwareAddr(clientMAC[:]).String() || p.Interface != 1 {
		w.Errorf("%v, at %d and %d: a probe %+v by interface %d", k.tuple, k.seq, k.ack, s, p.Interface)
	}
	k.probes = append(k.probes, now)
	if n := len(k.answers); len(k.probes) <= k.mute || n > 0 && now.Sub(k.answers[n-1]) < 500*time.Millisecond {
		return
	}
	k.answers = append(k.answers, now)
	answer := k.segment(ack, 0)
	if k.gone {
		answer = segment{source: k.tuple.Source, destination: k.tuple.Destination, protocol: unix.IPPROTO_TCP, flags: rst,
			sequence: s.ack}
	}
	out, sent := w.run(answer, clientMAC)
	switch {
	case !sent:
	case out.flags&rst != 0 && out.destination == k.tuple.Source:
		if out.sequence != k.ack || out.source != k.tuple.Destination {
			w.Errorf("%v, at %d: told by %+v", k.tuple, k.ack, out)
		}
		k.told = now
	case out.flags&rst != 0:
		k.backendTold = now
	default:
		k.forwarded++
	}
}

// perSecond counts times by whole seconds since began.
func perSecond(began time.Time, times []time.Time) (counts []int) {
	for _, at := range times {
		second := int(at.Sub(began) / time.Second)
		for len(counts) <= second {
			counts = append(counts, 0)
		}
		counts[second]++
	}
	return counts
}

// largestBurst is the largest number within a millisecond.
func largestBurst(times []time.Time) (most int) {
	for i := range times {
		n := 0
		for j := i; j < len(times) && times[j].Sub(times[i]) < time.Millisecond; j++ {
			n++
		}
		most = max(most, n)
	}
	return most
}
