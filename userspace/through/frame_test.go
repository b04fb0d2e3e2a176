package through

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"fairlead/loader"
	"fairlead/maps"
)

// syn is a packet that opens a connection: a frame's, behind an Ethernet header of its own.
func syn(tb testing.TB, from, to netip.AddrPort, ttl uint8) (frame []byte) {
	tb.Helper()
	return tcp4or6(tb, from, to, ttl, &layers.TCP{
		SrcPort: layers.TCPPort(from.Port()), DstPort: layers.TCPPort(to.Port()), Seq: rand.Uint32(), SYN: true, Window: 512,
		Options: []layers.TCPOption{{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{4, 0xc4}}},
	}, nil)
}

func tcp4or6(tb testing.TB, from, to netip.AddrPort, ttl uint8, tcp *layers.TCP, payload []byte) (frame []byte) {
	tb.Helper()
	ethernet := &layers.Ethernet{SrcMAC: []byte{2, 1, 1, 1, 1, 1}, DstMAC: []byte{2, 2, 2, 2, 2, 2}, EthernetType: layers.EthernetTypeIPv6}
	var ip gopacket.SerializableLayer
	if from.Addr().Is4() {
		v4 := &layers.IPv4{
			Version: 4, TTL: ttl, Protocol: layers.IPProtocolTCP, Flags: layers.IPv4DontFragment, SrcIP: from.Addr().AsSlice(),
			DstIP: to.Addr().AsSlice(),
		}
		_ = tcp.SetNetworkLayerForChecksum(v4)
		ip, ethernet.EthernetType = v4, layers.EthernetTypeIPv4
	} else {
		v6 := &layers.IPv6{
			Version: 6, HopLimit: ttl, NextHeader: layers.IPProtocolTCP, SrcIP: from.Addr().AsSlice(), DstIP: to.Addr().AsSlice(),
		}
		_ = tcp.SetNetworkLayerForChecksum(v6)
		ip = v6
	}
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ethernet, ip, tcp,
		gopacket.Payload(payload)); err != nil {
		tb.Fatal(err)
	}
	// Without Ethernet's padding.
	length := ethernetLength + 40 + int(binary.BigEndian.Uint16(b.Bytes()[18:]))
	if from.Addr().Is4() {
		length = ethernetLength + int(binary.BigEndian.Uint16(b.Bytes()[16:]))
	}
	return b.Bytes()[:length]
}

// TestFramesAreTheDataPlanes: frames to backends are, byte by byte, those that the data plane makes of a client's packet.
// Its time to live is one more there: the data plane routes.
func TestFramesAreTheDataPlanes(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	tags := [][2]uint16{{}, {5}, {maps.Tag8021AD | 7, 4094}}
	sources := map[int][]string{
		4: {"10.255.0.0/24", "10.255.0.77/32", "10.0.0.0/8"},
		6: {"fd00:ff::/64", "fd00:ff::77/128", "fd00:ff::/96", "fd00:ff::8000/113"},
	}
	checked := 0
	for _, tag := range tags {
		for n := range len(sources[6]) {
			hop := w.backends[0].hop
			hop.VLAN = tag
			hop.SourceMAC = [6]byte{2, 9, 8, 7, 6, byte(n)}
			wanted := w.wanted()
			for i := range wanted.Services {
				b := &wanted.Services[i].Backends[0]
				if b.Tunnel.IsValid() {
					list := sources[4]
					if b.Address.Is6() {
						list = sources[6]
					}
					b.Tunnel = netip.MustParsePrefix(list[n%len(list)])
				}
			}
			w.must(w.apply(wanted, func(netip.Addr) maps.NextHop { return hop }))
			_, err := w.manager.SetNextHops(map[netip.Addr]maps.NextHop{w.backends[0].v4: hop, w.backends[0].v6: hop})
			w.must(err)
			for i, f := range forms() {
				d := w.destination(f, w.backends[0])
				d.Hop, d.TunnelSource = hop, wanted.Services[i].Backends[0].Tunnel
				for range 8 {
					client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(rand.Uint32())}), uint16(rand.Uint32()|1))
					if f.service.Addr().Is6() {
						client = netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0x20, 1: 1, 15: byte(rand.Uint32())}), client.Port())
					}
					frame := syn(t, client, f.service, hops+1)
					want := w.forwarded(frame)
					flow, err := newFlow(&d, client)
					w.must(err)
					packet := bytes.Clone(frame[ethernetLength:])
					if packet[0]>>4 == 4 {
						packet[8]--
						binary.BigEndian.PutUint16(packet[10:], headerSum(packet[:20]))
					} else {
						packet[7]--
					}
					if got := flow.appendFrame(nil, packet); !bytes.Equal(got, want) {
						t.Fatalf("%v, tags %x, outer source %v, client %v:\ngot  %x\nwant %x", f, tag, d.TunnelSource, client, got, want)
					}
					checked++
				}
			}
		}
	}
	if want := len(tags) * len(sources[6]) * len(forms()) * 8; checked != want {
		t.Errorf("%d frames were compared: want %d", checked, want)
	}
}

// headerSum is the checksum of an IPv4 header, computed anew.
func headerSum(ip []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(ip); i += 2 {
		if i != 10 {
			sum += uint32(binary.BigEndian.Uint16(ip[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// forwarded is what the data plane makes of a client's frame.
func (w *world) forwarded(frame []byte) []byte {
	w.Helper()
	out := make([]byte, len(frame)+256)
	options := &ebpf.RunOptions{Data: frame, DataOut: out}
	const redirect = 4
	if action, err := w.programs.Programs().Fairlead.Run(options); err != nil || action != redirect {
		w.Fatalf("the data plane did not forward: action %d, %v", action, err)
	}
	return options.DataOut
}

// TestDecode: what is no whole TCP packet goes no further; of what is, all else is cut off.
func TestDecode(t *testing.T) {
	from4, to4 := netip.AddrPortFrom(service4, 443), netip.MustParseAddrPort("10.0.0.1:65000")
	from6, to6 := netip.AddrPortFrom(service6, 443), netip.MustParseAddrPort("[fd00::1]:65000")
	frame4, frame6 := syn(t, from4, to4, 64), syn(t, from6, to6, 64)
	tagged := func(frame []byte, types ...uint16) []byte {
		b := bytes.Clone(frame[:12])
		for _, kind := range types {
			b = append(binary.BigEndian.AppendUint16(b, kind), 0, 5)
		}
		return append(b, frame[12:]...)
	}
	changed := func(frame []byte, at int, b ...byte) []byte {
		frame = bytes.Clone(frame)
		copy(frame[at:], b)
		return frame
	}
	for _, test := range []struct {
		name  string
		frame []byte
		want  []byte // nil: refused
	}{
		{"IPv4", frame4, frame4[14:]},
		{"IPv6", frame6, frame6[14:]},
		{"padded", append(bytes.Clone(frame4), make([]byte, 20)...), frame4[14:]},
		{"padded IPv6", append(bytes.Clone(frame6), make([]byte, 20)...), frame6[14:]},
		{"a tag", tagged(frame4, unix.ETH_P_8021Q), frame4[14:]},
		{"two tags", tagged(frame6, unix.ETH_P_8021AD, unix.ETH_P_8021Q), frame6[14:]},
		{"three tags", tagged(frame4, unix.ETH_P_8021AD, unix.ETH_P_8021Q, unix.ETH_P_8021Q), nil},
		{"ARP", changed(frame4, 12, 8, 6), nil},
		{"IPv4 said to be IPv6", changed(frame4, 12, 0x86, 0xdd), nil},
		{"UDP", changed(frame4, 23, 17), nil},
		{"UDP over IPv6", changed(frame6, 20, 17), nil},
		{"an extension header", changed(frame6, 20, 0), nil},
		{"a first fragment", changed(frame4, 20, 0x20, 0), nil},
		{"a later fragment", changed(frame4, 20, 0, 1), nil},
		{"longer than the frame", changed(frame4, 16, 0, 200), nil},
		{"longer than the frame, IPv6", changed(frame6, 18, 0, 200), nil},
		{"shorter than TCP's header", changed(frame4, 16, 0, 39), nil},
		{"shorter than TCP's header, IPv6", changed(frame6, 18, 0, 19), nil},
		{"a header longer than the packet", changed(frame4, 14, 0x4f), nil},
	} {
		got, ok := decode(test.frame)
		if ok != (test.want != nil) || ok && !bytes.Equal(got, test.want) {
			t.Errorf("%s: %v, %x: want %x", test.name, ok, got, test.want)
		}
	}
	for _, frame := range [][]byte{frame4, frame6} {
		for n := range frame {
			if got, ok := decode(bytes.Clone(frame[:n])); ok {
				t.Errorf("%d bytes of %d: %x", n, len(frame), got)
			}
		}
	}
}

// TestFinishChecksum: a checksum that the sender has left to its card is computed; a wrong one stays wrong.
func TestFinishChecksum(t *testing.T) {
	from, to := netip.AddrPortFrom(service4, 443), netip.MustParseAddrPort("10.0.0.1:65000")
	for length := range 70 {
		payload := make([]byte, length)
		for i := range payload {
			payload[i] = byte(rand.Uint32())
		}
		whole := tcp4or6(t, from, to, 64, &layers.TCP{SrcPort: 443, DstPort: 65000, Seq: rand.Uint32(), ACK: true}, payload)
		const at = 14 + 20 + 16
		unfinished := bytes.Clone(whole)
		// That of the pseudo-header alone, as the kernel leaves it: not complemented.
		sum := uint32(0)
		for i := 26; i < 34; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(whole[i:]))
		}
		sum += 6 + uint32(len(whole)-34)
		for sum > 0xffff {
			sum = sum&0xffff + sum>>16
		}
		binary.BigEndian.PutUint16(unfinished[at:], uint16(sum))
		if got, ok := decode(unfinished); !ok || !bytes.Equal(got, whole[14:]) {
			t.Errorf("%d bytes: %v, %x: want %x", length, ok, got, whole[14:])
		}
		wrong := bytes.Clone(whole)
		wrong[at]++
		if got, ok := decode(bytes.Clone(wrong)); !ok || !bytes.Equal(got, wrong[14:]) {
			t.Errorf("%d bytes, a wrong checksum: %v, %x: want it left alone", length, ok, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	from4, to4 := netip.AddrPortFrom(service4, 443), netip.MustParseAddrPort("10.0.0.1:65000")
	from6, to6 := netip.AddrPortFrom(service6, 443), netip.MustParseAddrPort("[fd00::1]:65000")
	f.Add(syn(f, from4, to4, 64))
	f.Add(syn(f, from6, to6, 64))
	f.Fuzz(func(t *testing.T, frame []byte) {
		packet, ok := decode(bytes.Clone(frame))
		if !ok {
			return
		}
		kind := layers.LayerTypeIPv6
		if packet[0]>>4 == 4 {
			kind = layers.LayerTypeIPv4
		}
		p := gopacket.NewPacket(packet, kind, gopacket.Default)
		if p.NetworkLayer() == nil {
			t.Fatalf("%x: no IP packet", packet)
		}
		if !bytes.Contains(frame, packet[:header.IPv4MinimumSize]) {
			t.Fatalf("%x is not in the frame %x", packet, frame)
		}
	})
}

// TestCheckFrames reads what the data plane has taken, and is ended by its context, and by Close.
func TestCheckFrames(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	port := ChoosePorts(32768, 60999, nil)[0]
	w.must(w.manager.SetCheckPorts([]uint16{port}))
	w.must(w.manager.AddCheckSource(netip.MustParseAddr("10.0.0.1")))
	run := func(frame []byte) uint32 {
		t.Helper()
		action, err := w.programs.Programs().Fairlead.Run(&ebpf.RunOptions{Data: frame})
		w.must(err)
		return action
	}
	const drop, pass = 1, 2
	service := forms()[0].service
	answer := func(size int) []byte {
		return tcp4or6(t, service, netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port), 64,
			&layers.TCP{SrcPort: layers.TCPPort(service.Port()), DstPort: layers.TCPPort(port), ACK: true}, make([]byte, size))
	}
	var sent [][]byte
	for _, size := range []int{0, 1, 1000, maps.CheckFrameMax - 54, maps.CheckFrameMax - 53, 3000} {
		frame := answer(size)
		sent = append(sent, frame)
		if action := run(frame); action != drop {
			t.Errorf("a frame of %d bytes: action %d", len(frame), action)
		}
	}
	other := answer(0)
	other[29]++ // no service's address
	if action := run(other); action != pass {
		t.Errorf("what is from no service: action %d", action)
	}
	client := tcp4or6(t, service, netip.AddrPortFrom(netip.MustParseAddr("198.51.100.9"), port), 64,
		&layers.TCP{SrcPort: layers.TCPPort(service.Port()), DstPort: layers.TCPPort(port), ACK: true}, nil)
	if action := run(client); action != pass {
		t.Errorf("what is to a client that has the same port: action %d", action)
	}
	frames, err := w.manager.Set().CheckFrames()
	w.must(err)
	for _, want := range sent {
		got, err := frames.Read(t.Context())
		w.must(err)
		kept := want[:min(len(want), maps.CheckFrameMax)]
		if int(got.Length) != len(want) || !bytes.Equal(got.Data, kept) || got.Interface == 0 {
			t.Errorf("read %d bytes of %d by device %d: want %d of %d", len(got.Data), got.Length, got.Interface, len(kept), len(want))
		}
	}
	for i := range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { _, err := frames.Read(ctx); ended <- err }()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("read %d, given up: %v", i, err)
		}
	}
	// What was given up does not end what comes after it.
	next := make(chan error)
	go func() {
		got, err := frames.Read(t.Context())
		if err == nil && len(got.Data) != 54 {
			err = fmt.Errorf("%d bytes", len(got.Data))
		}
		next <- err
	}()
	run(answer(0))
	select {
	case err := <-next:
		w.must(err)
	case <-time.After(patience):
		t.Error("in vain: a frame")
	}
	go func() { _, err := frames.Read(t.Context()); next <- err }()
	w.must(frames.Close())
	if err := <-next; !errors.Is(err, os.ErrClosed) {
		t.Errorf("read, closed: %v", err)
	}
}
