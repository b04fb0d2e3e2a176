package loader

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// What linux/bpf.h calls the program's answers.
const (
	xdpDrop = 1
	xdpPass = 2
)

// The ECN field.
const (
	notECT = iota
	ect1
	ect0
	ce
)

// opener is the program alone, without an interface.
type opener struct {
	testing.TB
	objects bpf.DecapObjects
	met     map[string]bool // verdicts and events that were as expected
}

// The ends of the tests' tunnels, of which the second is the host's, and of the connections inside.
var (
	tunnelFrom = ends{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00:a::1")}
	tunnelTo   = ends{netip.MustParseAddr("10.0.0.11"), netip.MustParseAddr("fd00:a::11")}
	elsewhere  = ends{netip.MustParseAddr("10.0.0.12"), netip.MustParseAddr("fd00:a::12")}
	client     = ends{netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:c::7")}
	service    = ends{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::10")}
)

type ends struct{ v4, v6 netip.Addr }

func (e ends) of(v6 bool) netip.Addr {
	if v6 {
		return e.v6
	}
	return e.v4
}

// newOpener loads the program for a GUE port, and for some sources if any are named.
func newOpener(t testing.TB, port uint16, sources ...string) *opener {
	t.Helper()
	o := &opener{TB: t, met: make(map[string]bool)}
	spec, err := bpf.LoadDecap()
	must(t, err)
	must(t, spec.Variables[bpf.DecapVarGuePort].Set(port))
	must(t, spec.Variables[bpf.DecapVarUseSources].Set(truth(len(sources) > 0)))
	must(t, spec.LoadAndAssign(&o.objects, nil))
	t.Cleanup(func() { o.objects.Close() })
	must(t, o.objects.Addresses4.Put(tunnelTo.v4.AsSlice(), uint32(1)))
	must(t, o.objects.Addresses6.Put(tunnelTo.v6.AsSlice(), uint32(1)))
	for _, text := range sources {
		source := netip.MustParsePrefix(text)
		key := append(binary.NativeEndian.AppendUint32(nil, uint32(source.Bits())), source.Addr().AsSlice()...)
		m := o.objects.Sources4
		if source.Addr().Is6() {
			m = o.objects.Sources6
		}
		must(t, m.Put(key, uint32(1)))
	}
	return o
}

// counts are the counters that are not zero.
func (o *opener) counts() map[string]uint64 {
	o.Helper()
	d := &Decap{maps: &o.objects.DecapMaps}
	var s DecapState
	must(o, d.readInto(&s))
	counts := make(map[string]uint64)
	for _, c := range slices.Concat(s.Verdicts, s.Events) {
		if c.Count > 0 {
			counts[c.Name] = c.Count
		}
	}
	return counts
}

// run has the program decide for one frame.
func (o *opener) run(frame []byte) (action uint32, out []byte, counted []string) {
	o.Helper()
	none := make([]bpf.DecapCounterSet, ebpf.MustPossibleCPU())
	must(o, o.objects.Counters.Put(uint32(0), none))
	options := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
	action, err := o.objects.FairleadDecap.Run(&options)
	must(o, err)
	for name, n := range o.counts() {
		for range n {
			counted = append(counted, name)
		}
	}
	slices.Sort(counted)
	return action, options.DataOut, counted
}

// want holds the program to a verdict, perhaps events, and every byte of what comes out; nil: the frame as it was.
func (o *opener) want(what string, frame, want []byte, names ...string) {
	o.Helper()
	if want == nil {
		want = frame
	}
	action, out, counted := o.run(frame)
	slices.Sort(names)
	if !slices.Equal(counted, names) {
		o.Errorf("%s: counted %v, want %v\n% x", what, counted, names, frame)
		return
	}
	for _, name := range names {
		o.met[name] = true
	}
	dropped := slices.ContainsFunc(names, func(name string) bool { return strings.HasPrefix(name, "drop_") })
	if dropped != (action == xdpDrop) || !dropped && action != xdpPass {
		o.Errorf("%s: counted %v, and the action is %d", what, counted, action)
	}
	if !dropped && !bytes.Equal(out, want) {
		o.Errorf("%s: came out (-want +got):\n%s", what, cmp.Diff(fmt.Sprintf("% x", want), fmt.Sprintf("% x", out)))
	}
}

// kind is a format that is opened.
type kind struct{ outer6, inner6, gue bool }

var kinds = []kind{{}, {inner6: true}, {outer6: true}, {outer6: true, inner6: true},
	{gue: true}, {inner6: true, gue: true}, {outer6: true, gue: true}, {outer6: true, inner6: true, gue: true}}

func (k kind) verdict() string {
	gue := map[bool]string{true: "gue_"}[k.gue]
	digit := map[bool]string{false: "4", true: "6"}
	return "opened_" + gue + digit[k.inner6] + "in" + digit[k.outer6]
}

// tunnelled is a packet in a tunnel, by its fields. Its bytes are made anew each time.
type tunnelled struct {
	kind
	tags     []uint32 // as in the frame: type, then control
	outerTOS uint8
	options  []layers.IPv4Option // of the outer header
	fragment []byte              // an IPv6 fragment header's bytes from the second on
	mf       bool
	offset   uint16 // of an IPv4 fragment, in 8-byte units
	from, to ends   // zero: tunnelFrom and tunnelTo
	port     uint16 // zero: GUE's
	innerTOS uint8
	tcp      bool
	payload  []byte
	trailing []byte // in the outer packet, behind the inner one
	padding  []byte // behind the outer packet
}

func serialized(all ...gopacket.SerializableLayer) []byte {
	buffer := gopacket.NewSerializeBuffer()
	options := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buffer, options, all...); err != nil {
		panic(err)
	}
	return bytes.Clone(buffer.Bytes())
}

// ip is an IP header; the last ones are not for IPv6.
func ip(from, to netip.Addr, protocol layers.IPProtocol, tos uint8, options []layers.IPv4Option, mf bool,
	offset uint16) gopacket.SerializableLayer {
	if from.Is6() {
		return &layers.IPv6{Version: 6, TrafficClass: tos, FlowLabel: 0xabcde, NextHeader: protocol, HopLimit: 64,
			SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
	}
	h := &layers.IPv4{Version: 4, TOS: tos, Id: 0x1234, TTL: 64, Protocol: protocol, SrcIP: from.AsSlice(),
		DstIP: to.AsSlice(), Options: options, FragOffset: offset}
	if mf {
		h.Flags = layers.IPv4MoreFragments
	}
	return h
}

// inner is the packet in the tunnel, with a TOS or traffic class.
func (p tunnelled) inner(tos uint8) []byte {
	protocol := layers.IPProtocolUDP
	udp := &layers.UDP{SrcPort: 40000, DstPort: 443}
	tcp := &layers.TCP{SrcPort: 40000, DstPort: 443, Seq: 1, Ack: 2, ACK: true, Window: 512}
	if p.tcp {
		protocol = layers.IPProtocolTCP
	}
	header := ip(client.of(p.inner6), service.of(p.inner6), protocol, tos, nil, false, 0)
	network := header.(gopacket.NetworkLayer)
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	if p.tcp {
		must(tcp.SetNetworkLayerForChecksum(network))
		return serialized(header, tcp, gopacket.Payload(p.payload))
	}
	must(udp.SetNetworkLayerForChecksum(network))
	return serialized(header, udp, gopacket.Payload(p.payload))
}

// outer wraps what stands in the outer packet behind its headers.
func (p tunnelled) outer(inside []byte) []byte {
	from, to := p.from, p.to
	if !from.v4.IsValid() {
		from = tunnelFrom
	}
	if !to.v4.IsValid() {
		to = tunnelTo
	}
	protocol := layers.IPProtocolIPv4
	switch {
	case p.gue:
		protocol = layers.IPProtocolUDP
		port := p.port
		if port == 0 {
			port = uint16(bpf.DecapLimitsGUE_PORT)
		}
		udp := binary.BigEndian.AppendUint16(nil, 50000)
		udp = binary.BigEndian.AppendUint16(udp, port)
		udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(inside)))
		inside = slices.Concat(udp, []byte{0, 0}, inside) // no checksum
	case p.inner6:
		protocol = layers.IPProtocolIPv6
	}
	if p.fragment != nil {
		inside = slices.Concat([]byte{byte(protocol)}, p.fragment, inside)
		protocol = layers.IPProtocolIPv6Fragment
	}
	return serialized(ip(from.of(p.outer6), to.of(p.outer6), protocol, p.outerTOS, p.options, p.mf, p.offset),
		gopacket.Payload(inside))
}

func (p tunnelled) ethernet(v6 bool) []byte {
	frame := []byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1}
	for _, tag := range p.tags {
		frame = binary.BigEndian.AppendUint32(frame, tag)
	}
	if v6 {
		return binary.BigEndian.AppendUint16(frame, uint16(layers.EthernetTypeIPv6))
	}
	return binary.BigEndian.AppendUint16(frame, uint16(layers.EthernetTypeIPv4))
}

// frame is the packet in its tunnel, and opened is what should come out with an inner TOS.
func (p tunnelled) frame() []byte {
	inside := slices.Concat(p.inner(p.innerTOS), p.trailing)
	return slices.Concat(p.ethernet(p.outer6), p.outer(inside), p.padding)
}

func (p tunnelled) opened(tos uint8) []byte {
	return slices.Concat(p.ethernet(p.inner6), p.inner(tos), p.trailing, p.padding)
}

// headers are the lengths of what stands before the outer IP header, and before the inner packet.
func (p tunnelled) headers() (ethernet, all int) {
	ethernet = len(p.ethernet(p.outer6))
	all = len(p.frame()) - len(p.padding) - len(p.trailing) - len(p.inner(p.innerTOS))
	return ethernet, all
}

// mended makes an IPv4 header's checksum right again, wherever the header is in the frame.
func mended(frame []byte, at int) []byte {
	header := frame[at : at+int(frame[at]&15)*4]
	header[10], header[11] = 0, 0
	binary.BigEndian.PutUint16(header[10:], ^onesSum(header))
	return frame
}

// onesSum is the one's complement sum that the checksum of IPv4 is made of (RFC 1071).
func onesSum(header []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(header); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(header[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

var allTags = map[string][]uint32{
	"untagged": nil, "one tag": {0x81000064}, "priority": {0x8100e000}, "service tag": {0x88a80fff},
	"two tags": {0x88a80064, 0x81002fff}, "tag in tag": {0x81000001, 0x81000002},
}

// outerOptions are n words of no operations.
func outerOptions(words int) (options []layers.IPv4Option) {
	for range words * 4 {
		options = append(options, layers.IPv4Option{OptionType: 1})
	}
	return options
}

// TestDecapFrames holds the program to every verdict and every byte that comes out.
func TestDecapFrames(t *testing.T) {
	o := newOpener(t, uint16(bpf.DecapLimitsGUE_PORT))
	for name, test := range map[string]func(o *opener){
		"kinds": decapKinds, "congestion": decapCongestion, "truncated": decapTruncated, "lying": decapLying,
		"checksum": decapChecksum, "not ours": decapNotOurs, "fragments": decapFragments,
	} {
		t.Run(name, func(t *testing.T) {
			o := &opener{TB: t, objects: o.objects, met: o.met}
			test(o)
		})
	}
	t.Run("sources", func(t *testing.T) {
		named := newOpener(t, uint16(bpf.DecapLimitsGUE_PORT), "10.0.0.0/24", "10.0.1.7/32", "fd00:a::/64",
			"fd00:b::7/128")
		decapSources(named)
		maps.Copy(o.met, named.met)
	})
	var s DecapState
	must(t, (&Decap{maps: &o.objects.DecapMaps}).readInto(&s))
	for _, c := range slices.Concat(s.Verdicts, s.Events) {
		if !o.met[c.Name] {
			t.Errorf("no frame provoked %s", c.Name)
		}
	}
}

func decapKinds(o *opener) {
	for _, k := range kinds {
		for name, tags := range allTags {
			for variant, change := range map[string]func(p *tunnelled){
				"plain":               func(p *tunnelled) {},
				"empty":               func(p *tunnelled) { p.payload = nil },
				"odd":                 func(p *tunnelled) { p.payload = []byte("abc") },
				"tcp":                 func(p *tunnelled) { p.tcp = true },
				"full":                func(p *tunnelled) { p.payload = bytes.Repeat([]byte("Fairlead"), 175) },
				"several buffers":     func(p *tunnelled) { p.payload = bytes.Repeat([]byte("Fairlead"), 1100) },
				"padded with zeros":   func(p *tunnelled) { p.padding = make([]byte, 18) },
				"padded with rubbish": func(p *tunnelled) { p.padding = []byte("\x45\xff\xfe") },
				"trailing":            func(p *tunnelled) { p.trailing = []byte("behind") },
				"dscp":                func(p *tunnelled) { p.outerTOS, p.innerTOS = 0xb8, 0x28 },
				"one option word":     func(p *tunnelled) { p.options = outerOptions(1) },
				"all options":         func(p *tunnelled) { p.options = outerOptions(10) },
				"atomic fragment": func(p *tunnelled) {
					if p.outer6 {
						p.fragment = []byte{0, 0, 0, 0xca, 0xfe, 0xba, 0xbe}
					}
				},
			} {
				p := tunnelled{kind: k, tags: tags, payload: []byte("Fairlead!"), outerTOS: 0, innerTOS: 0}
				change(&p)
				o.want(fmt.Sprintf("%+v, %s, %s", k, name, variant), p.frame(), p.opened(p.innerTOS), k.verdict())
			}
		}
	}
	// Another port is another's.
	moved := newOpener(o, 16080)
	for _, k := range kinds[4:] {
		p := tunnelled{kind: k, port: 16080}
		moved.want("gue to a port of choice", p.frame(), p.opened(0), k.verdict())
		p.port = 0
		moved.want("gue to its own port", p.frame(), nil, "pass_not_tunnel")
	}
}

// decapCongestion is the table of RFC 6040, section 4.2, figure 4, with what it marks as currently unused.
func decapCongestion(o *opener) {
	const drop = 4
	type cell struct {
		result  uint8
		strange bool
	}
	table := [4][4]cell{ // by inner, then by outer field
		notECT: {notECT: {notECT, false}, ect0: {notECT, true}, ect1: {notECT, true}, ce: {drop, true}},
		ect0:   {notECT: {ect0, false}, ect0: {ect0, false}, ect1: {ect1, false}, ce: {ce, false}},
		ect1:   {notECT: {ect1, false}, ect0: {ect1, true}, ect1: {ect1, false}, ce: {ce, false}},
		ce:     {notECT: {ce, false}, ect0: {ce, false}, ect1: {ce, true}, ce: {ce, false}},
	}
	for _, k := range kinds {
		for inner, row := range table {
			for outer, want := range row {
				for _, dscp := range [][2]uint8{{0, 0}, {0xb8, 0x28}, {0xfc, 0}, {0, 0xfc}} {
					p := tunnelled{kind: k, payload: []byte("x"), outerTOS: dscp[0] | uint8(outer), innerTOS: dscp[1] | uint8(inner)}
					what := fmt.Sprintf("%+v, inner %d, outer %d, dscp %v", k, inner, outer, dscp)
					if want.result == drop {
						o.want(what, p.frame(), nil, "drop_congestion")
						continue
					}
					names := []string{k.verdict()}
					if want.strange {
						names = append(names, "congestion_strange")
					}
					if want.result == ce && inner != ce {
						names = append(names, "congestion_marked")
					}
					o.want(what, p.frame(), p.opened(dscp[1]|want.result), names...)
				}
			}
		}
	}
}

// decapTruncated cuts frames at every length. As long as it can't be known to be a tunnel's, it is left to the stack.
func decapTruncated(o *opener) {
	for _, k := range kinds {
		for name, tags := range allTags {
			for _, options := range []int{0, 3} {
				p := tunnelled{kind: k, tags: tags, payload: []byte("Fairlead!"), options: outerOptions(options)}
				frame := p.frame()
				ethernet, headers := p.headers()
				known := headers // with GUE, once its port is there
				if !k.gue {
					known = ethernet + 20
					if k.outer6 {
						known = ethernet + 40
					}
				}
				for length := 14; length < len(frame); length++ {
					want := "drop_truncated"
					if length < known {
						want = "pass_not_tunnel"
					}
					o.want(fmt.Sprintf("%+v, %s, %d option words, cut to %d of %d", k, name, options, length, len(frame)),
						slices.Clone(frame[:length]), nil, want)
				}
			}
		}
	}
	p := tunnelled{payload: bytes.Repeat([]byte("Fairlead"), 1100)}
	frame := p.frame()
	o.want("in several buffers, all but the last byte", frame[:len(frame)-1], nil, "drop_truncated")
}

// decapLying has headers say what is not so.
func decapLying(o *opener) {
	put16 := func(at int, value uint16) func(frame []byte) {
		return func(frame []byte) { binary.BigEndian.PutUint16(frame[at:], value) }
	}
	for _, k := range kinds {
		p := tunnelled{kind: k, payload: []byte("Fairlead!"), padding: make([]byte, 9)}
		ethernet, inner := p.headers()
		length := len(p.frame()) - len(p.padding) - ethernet // of the outer packet
		room := length - (inner - ethernet)
		type lie struct {
			name string
			tell func(frame []byte)
			want string
		}
		var lies []lie
		if k.outer6 {
			payload := func(n int) func([]byte) { return put16(ethernet+4, uint16(n-40)) }
			lies = append(lies,
				lie{"outer longer than the frame", payload(length + len(p.padding) + 1), "drop_truncated"},
				lie{"outer as long as can be", put16(ethernet+4, 0xffff), "drop_truncated"},
				lie{"outer takes the padding in", payload(length + len(p.padding)), k.verdict()},
				lie{"outer version", func(f []byte) { f[ethernet] = f[ethernet]&15 | 4<<4 }, "pass_not_tunnel"},
			)
			switch {
			case k.gue:
				lies = append(lies, lie{"outer of nothing", payload(40), "drop_bad_length"},
					lie{"outer one byte short", payload(length - 1), "drop_bad_length"})
			default:
				lies = append(lies, lie{"outer of nothing", payload(40), "drop_inner_length"},
					lie{"outer one byte short", payload(length - 1), "drop_inner_length"})
			}
		} else {
			total := func(n int) func([]byte) {
				return func(f []byte) { put16(ethernet+2, uint16(n))(f); mended(f, ethernet) }
			}
			lies = append(lies,
				lie{"outer longer than the frame", total(length + len(p.padding) + 1), "drop_truncated"},
				lie{"outer as long as can be", total(0xffff), "drop_truncated"},
				lie{"outer takes the padding in", total(length + len(p.padding)), k.verdict()},
				lie{"outer of no length", total(0), "drop_bad_length"},
				lie{"outer shorter than its header", total(19), "drop_bad_length"},
				lie{"outer version", func(f []byte) { f[ethernet] = f[ethernet]&15 | 6<<4 }, "pass_not_tunnel"},
			)
			for words := range byte(5) {
				want := "drop_bad_header"
				if k.gue {
					want = "pass_not_tunnel"
				}
				lies = append(lies, lie{fmt.Sprintf("outer header of %d words", words),
					func(f []byte) { f[ethernet] = 4<<4 | words }, want})
			}
			switch {
			case k.gue:
				lies = append(lies, lie{"outer of nothing", total(20), "drop_bad_length"},
					lie{"outer one byte short", total(length - 1), "drop_bad_length"})
			default:
				lies = append(lies, lie{"outer of nothing", total(20), "drop_inner_length"},
					lie{"outer one byte short", total(length - 1), "drop_inner_length"})
			}
		}
		if k.gue {
			for _, n := range []uint16{0, 7, uint16(room + 9), 0xffff} {
				lies = append(lies, lie{fmt.Sprintf("udp of %d bytes", n), put16(inner-4, n), "drop_bad_length"})
			}
			lies = append(lies, lie{"udp of nothing", put16(inner-4, 8), "pass_other_gue"},
				lie{"udp one byte short", put16(inner-4, uint16(room+7)), "drop_inner_length"})
		}
		if k.inner6 {
			lies = append(lies, lie{"inner one byte long", put16(inner+4, uint16(room-40+1)), "drop_inner_length"},
				lie{"inner as long as can be", put16(inner+4, 0xffff), "drop_inner_length"},
				lie{"inner of nothing", put16(inner+4, 0), k.verdict()})
		} else {
			lies = append(lies, lie{"inner one byte long", put16(inner+2, uint16(room+1)), "drop_inner_length"},
				lie{"inner as long as can be", put16(inner+2, 0xffff), "drop_inner_length"},
				lie{"inner shorter than its header", put16(inner+2, 19), "drop_inner_length"},
				lie{"inner of nothing but its header", put16(inner+2, 20), k.verdict()},
				lie{"inner header of 4 words", func(f []byte) { f[inner] = 0x44 }, "drop_inner_header"},
				lie{"inner header longer than it", func(f []byte) { f[inner] = 0x4f }, "drop_inner_length"})
		}
		for version := range byte(16) {
			if version == map[bool]byte{false: 4, true: 6}[k.inner6] {
				continue
			}
			want := "drop_inner_header"
			switch {
			case k.gue && version != 4 && version != 6:
				want = "pass_other_gue"
			case k.gue && version == 4: // an IPv6 header read as IPv4's: ten words' length, of the flow label's
				continue
			case k.gue && version == 6: // an IPv4 header read as IPv6's: its ID is the length
				want = "drop_inner_length"
			}
			lies = append(lies, lie{fmt.Sprintf("inner version %d", version),
				func(f []byte) { f[inner] = f[inner]&15 | version<<4 }, want})
		}
		for _, l := range lies {
			frame := p.frame()
			l.tell(frame)
			var want []byte
			if l.want == k.verdict() {
				want = slices.Concat(p.ethernet(k.inner6), frame[inner:])
			}
			o.want(fmt.Sprintf("%+v, %s", k, l.name), frame, want, l.want)
		}
		// Less than a header in the outer packet, though the frame has more.
		least := map[bool]int{false: 20, true: 40}[k.inner6]
		for short := 1; short < least; short++ {
			whole := p.inner(0)
			frame := slices.Concat(p.ethernet(k.outer6), p.outer(whole[:short]), whole[short:])
			what := fmt.Sprintf("%+v, inner of %d bytes", k, short)
			o.want(what, frame, nil, "drop_inner_length")
			o.want(what+" at the frame's end", frame[:len(frame)-len(whole)+short], nil, "drop_inner_length")
		}
	}
}

// decapChecksum turns every bit of outer IPv4 headers around, one at a time.
func decapChecksum(o *opener) {
	for _, k := range []kind{{}, {inner6: true}, {gue: true}} {
		for _, options := range []int{0, 1, 10} {
			p := tunnelled{kind: k, options: outerOptions(options), payload: []byte("Fairlead!")}
			at, _ := p.headers()
			for bit := range (20 + 4*options) * 8 {
				frame := p.frame()
				frame[at+bit/8] ^= 1 << (bit % 8)
				_, _, counted := o.run(frame)
				if slices.ContainsFunc(counted, func(name string) bool { return strings.HasPrefix(name, "opened_") }) {
					o.Errorf("%+v, %d option words: opened with bit %d turned", k, options, bit)
				}
			}
			for _, bit := range []int{1 * 8, 2*8 + 1, 4 * 8, 8 * 8, 10 * 8, 12 * 8} { // that nothing else asks for
				frame := p.frame()
				frame[at+bit/8] ^= 1 << (bit % 8)
				o.want(fmt.Sprintf("%+v, %d option words, bit %d", k, options, bit), frame, nil, "drop_bad_checksum")
			}
		}
	}
}

func decapNotOurs(o *opener) {
	plain := func(k kind, inside []byte) []byte { return slices.Concat(tunnelled{}.ethernet(k.inner6), inside) }
	for _, k := range kinds {
		p := tunnelled{kind: k, payload: []byte("Fairlead!")}
		o.want("an untunnelled packet", plain(k, p.inner(0)), nil, "pass_not_tunnel")
		p.to = elsewhere
		o.want(fmt.Sprintf("%+v, to another address", k), p.frame(), nil, "pass_other_address")
		p.to, p.port = ends{}, 6081
		if k.gue {
			o.want("to a port beside", p.frame(), nil, "pass_not_tunnel")
		}
		p.port, p.tags = 0, []uint32{0x88a80001, 0x81000002, 0x81000003}
		o.want(fmt.Sprintf("%+v, three tags", k), p.frame(), nil, "pass_not_tunnel")
		p.tags = nil
		frame := p.frame()
		binary.BigEndian.PutUint16(frame[12:], 0x88cc)
		o.want(fmt.Sprintf("%+v, said to be something else", k), frame, nil, "pass_not_tunnel")
		if k.outer6 {
			for _, number := range []byte{unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS} {
				frame, protocol := p.frame(), p.frame()[20]
				frame[20] = number
				frame = slices.Concat(frame[:54], []byte{protocol, 0, 1, 4, 0, 0, 0, 0}, frame[54:])
				frame[19] += 8
				o.want(fmt.Sprintf("%+v, behind extension %d", k, number), frame, nil, "pass_extension")
				copy(frame[38:], elsewhere.v6.AsSlice())
				o.want(fmt.Sprintf("%+v, elsewhere behind extension %d", k, number), frame, nil, "pass_not_tunnel")
			}
		}
	}
	arp := serialized(&layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DstMAC: layers.EthernetBroadcast,
		EthernetType: layers.EthernetTypeARP}, &layers.ARP{AddrType: layers.LinkTypeEthernet,
		Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
		SourceHwAddress: []byte{2, 0, 0, 0, 0, 1}, SourceProtAddress: tunnelFrom.v4.AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: tunnelTo.v4.AsSlice()})
	o.want("arp", arp, nil, "pass_not_tunnel")
	for _, v6 := range []bool{false, true} {
		for number := range 256 {
			switch layers.IPProtocol(number) {
			case unix.IPPROTO_IPIP, unix.IPPROTO_IPV6, unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
				continue
			}
			header := ip(tunnelFrom.of(v6), tunnelTo.of(v6), layers.IPProtocol(number), 0, nil, false, 0)
			frame := slices.Concat(tunnelled{}.ethernet(v6), serialized(header, gopacket.Payload(bytes.Repeat([]byte{0xff}, 64))))
			o.want(fmt.Sprintf("protocol %d", number), frame, nil, "pass_not_tunnel")
		}
	}
}

// decapFragments: of GUE, only the first fragment has a port that tells what it is.
func decapFragments(o *opener) {
	for _, k := range kinds {
		for _, f := range []struct {
			name   string
			mf     bool
			offset uint16
		}{{"first", true, 0}, {"middle", true, 100}, {"last", false, 100}, {"last at the least offset", false, 1}} {
			p := tunnelled{kind: k, mf: f.mf, offset: f.offset, payload: []byte("Fairlead!")}
			if k.outer6 {
				p.fragment = binary.BigEndian.AppendUint16([]byte{0}, f.offset<<3)
				if f.mf {
					p.fragment[2] |= 1
				}
				p.fragment = append(p.fragment, 0xca, 0xfe, 0xba, 0xbe)
			}
			want := "pass_fragment"
			if k.gue && f.offset != 0 {
				want = "pass_not_tunnel"
			}
			what := fmt.Sprintf("%+v, %s fragment", k, f.name)
			o.want(what, p.frame(), nil, want)
			if p.to = elsewhere; want == "pass_fragment" {
				o.want(what+" to another address", p.frame(), nil, "pass_other_address")
			}
		}
		if !k.outer6 { // DF is no fragment
			p := tunnelled{kind: k}
			frame := p.frame()
			frame[20] |= 0x40
			o.want(fmt.Sprintf("%+v, don't fragment", k), mended(frame, 14), p.opened(0), k.verdict())
		}
	}
}

// decapSources has the sources 10.0.0.0/24, 10.0.1.7, fd00:a::/64 and fd00:b::7.
func decapSources(o *opener) {
	for _, k := range kinds {
		for text, allowed := range map[string]bool{
			"10.0.0.0": true, "10.0.0.255": true, "10.0.1.7": true, "10.0.1.6": false, "10.0.1.0": false, "9.255.255.255": false,
			"fd00:a::": true, "fd00:a::ffff:ffff:ffff:ffff": true, "fd00:a:0:1::": false, "fd00:9:ffff:ffff::": false,
			"fd00:b::7": true, "fd00:b::6": false, "::ffff:10.0.0.1": false,
		} {
			address := netip.MustParseAddr(text)
			if address.Is6() != k.outer6 {
				continue
			}
			p := tunnelled{kind: k, from: ends{address, address}, payload: []byte("Fairlead!")}
			what := fmt.Sprintf("%+v, from %s", k, text)
			if allowed {
				o.want(what, p.frame(), p.opened(0), k.verdict())
				continue
			}
			o.want(what, p.frame(), nil, "pass_other_source")
			p.to = elsewhere
			o.want(what+" to another address", p.frame(), nil, "pass_other_address")
			p.to = ends{}
			frame := p.frame()
			if !k.outer6 {
				frame[25] ^= 1 // of strangers' packets nothing more is asked
				o.want(what+" with a wrong checksum", frame, nil, "pass_other_source")
			}
		}
	}
}

// modelled is what the program is to do, written anew from the formats: the verdict and the frame that comes out.
func modelled(frame []byte) (verdict string, out []byte) {
	const pass = "pass_not_tunnel"
	u16 := func(b []byte) int { return int(binary.BigEndian.Uint16(b)) }
	at := 12
	for range 2 {
		if len(frame) < at+6 {
			break
		}
		if t := u16(frame[at:]); t != 0x8100 && t != 0x88a8 {
			break
		}
		at += 4
	}
	outer := frame[at+2:]
	k, protocol, header, total, fragment, later, extension := kind{}, 0, 0, 0, false, false, false
	switch u16(frame[at:]) {
	case 0x0800:
		if len(outer) < 20 || outer[0]>>4 != 4 {
			return pass, frame
		}
		protocol, header, total = int(outer[9]), int(outer[0]&15)*4, u16(outer[2:])
		fragment, later = u16(outer[6:])&0x3fff != 0, u16(outer[6:])&0x1fff != 0
		if protocol == 17 && header < 20 {
			return pass, frame
		}
	case 0x86dd:
		if len(outer) < 40 || outer[0]>>4 != 6 {
			return pass, frame
		}
		k.outer6, protocol, header, total = true, int(outer[6]), 40, 40+u16(outer[4:])
		if protocol == 44 {
			if len(outer) < 48 {
				return pass, frame
			}
			protocol, header = int(outer[40]), 48
			fragment, later = u16(outer[42:])&0xfff9 != 0, u16(outer[42:])&0xfff8 != 0
		}
		extension = protocol == 0 || protocol == 43 || protocol == 60
	default:
		return pass, frame
	}
	k.gue = protocol == 17
	if k.gue && (later || len(outer) < header+8 || u16(outer[header+2:]) != int(bpf.DecapLimitsGUE_PORT)) ||
		!k.gue && !extension && protocol != 4 && protocol != 41 {
		return pass, frame
	}
	destination, _ := netip.AddrFromSlice(outer[16:20])
	if k.outer6 {
		destination, _ = netip.AddrFromSlice(outer[24:40])
	}
	switch {
	case destination != tunnelTo.of(k.outer6) && extension:
		return pass, frame
	case destination != tunnelTo.of(k.outer6):
		return "pass_other_address", frame
	case extension:
		return "pass_extension", frame
	case fragment:
		return "pass_fragment", frame
	case header < 20:
		return "drop_bad_header", nil
	case len(outer) < header:
		return "drop_truncated", nil
	case !k.outer6 && onesSum(outer[:header]) != 0xffff:
		return "drop_bad_checksum", nil
	case total < header:
		return "drop_bad_length", nil
	case len(outer) < total:
		return "drop_truncated", nil
	}
	inner, room := outer[header:], total-header
	if k.gue {
		if n := u16(inner[4:]); n < 8 || n > room {
			return "drop_bad_length", nil
		} else {
			inner, room = inner[8:], n-8
		}
	}
	version := 0
	if room > 0 {
		version = int(inner[0] >> 4)
	}
	k.inner6 = version == 6
	switch {
	case k.gue && version != 4 && version != 6:
		return "pass_other_gue", frame
	case room == 0:
		return "drop_inner_length", nil
	case !k.gue && version != map[int]int{4: 4, 41: 6}[protocol]:
		return "drop_inner_header", nil
	case k.inner6 && (room < 40 || 40+u16(inner[4:]) > room), !k.inner6 && room < 20:
		return "drop_inner_length", nil
	case !k.inner6 && inner[0]&15 < 5:
		return "drop_inner_header", nil
	case !k.inner6 && (u16(inner[2:]) < int(inner[0]&15)*4 || u16(inner[2:]) > room):
		return "drop_inner_length", nil
	}
	inner = slices.Clone(inner)
	ecn := func(packet []byte, v6 bool) byte {
		if v6 {
			return packet[1] >> 4 & 3
		}
		return packet[1] & 3
	}
	outerECN, innerECN := ecn(outer, k.outer6), ecn(inner, k.inner6)
	result := innerECN
	switch {
	case outerECN == ce && innerECN == notECT:
		return "drop_congestion", nil
	case innerECN == notECT || innerECN == ce:
	case outerECN == ce, outerECN == ect1:
		result = outerECN
	}
	switch {
	case result == innerECN:
	case k.inner6:
		inner[1] = inner[1]&^0x30 | result<<4
	default:
		// What is added to the header is taken off the checksum: a wrong one stays as wrong as it was.
		header := inner[:20]
		before := onesSum(slices.Concat(header[:10], header[12:20]))
		inner[1] = inner[1]&^3 | result
		after := onesSum(slices.Concat(header[:10], header[12:20]))
		b := binary.BigEndian.AppendUint16(slices.Clone(header[10:12]), before)
		b = binary.BigEndian.AppendUint16(b, ^after)
		check := onesSum(b)
		if check == 0xffff { // one number in two ways; what is mended is never this one (RFC 1624, section 3)
			check = 0
		}
		binary.BigEndian.PutUint16(inner[10:], check)
	}
	out = slices.Concat(frame[:at], []byte{0x08, 0x00}, inner)
	if k.inner6 {
		copy(out[at:], []byte{0x86, 0xdd})
	}
	return k.verdict(), out
}

// agree holds the program to the model.
func (o *opener) agree(frame []byte) {
	o.Helper()
	want, out := modelled(frame)
	action, got, counted := o.run(frame)
	counted = slices.DeleteFunc(counted, func(name string) bool { return strings.HasPrefix(name, "congestion_") })
	if !slices.Equal(counted, []string{want}) || action != map[bool]uint32{true: xdpDrop, false: xdpPass}[out == nil] {
		o.Fatalf("counted %v, action %d, the model says %s of\n% x", counted, action, want, frame)
	}
	if out != nil && !bytes.Equal(got, out) {
		o.Fatalf("%s (-model +program) of\n% x:\n%s", want, frame, cmp.Diff(fmt.Sprintf("% x", out), fmt.Sprintf("% x", got)))
	}
}

// seeds are frames of every kind for the fuzzer to change.
func seeds() (frames [][]byte) {
	for _, k := range kinds {
		for _, tags := range allTags {
			p := tunnelled{kind: k, tags: tags, payload: []byte("Fairlead!"), outerTOS: ce, innerTOS: ect0}
			frames = append(frames, p.frame())
			p.options, p.fragment = outerOptions(2), nil
			if k.outer6 {
				p.fragment = []byte{0, 0, 0, 0xca, 0xfe, 0xba, 0xbe}
			}
			frames = append(frames, p.frame())
		}
	}
	return frames
}

// FuzzDecap looks for frames with which program and model disagree.
func FuzzDecap(f *testing.F) {
	for _, frame := range seeds() {
		f.Add(frame, true)
		f.Add(frame, false)
	}
	o := newOpener(f, uint16(bpf.DecapLimitsGUE_PORT))
	f.Fuzz(func(t *testing.T, frame []byte, mend bool) {
		if len(frame) < 14 || len(frame) > 3000 { // the kernel runs programs on no less
			t.Skip()
		}
		frame = slices.Clone(frame)
		mendOuter(frame, mend)
		(&opener{TB: t, objects: o.objects}).agree(frame)
	})
}

// mendOuter makes the outer checksum of a frame without tags right, so that what is behind it gets its turn.
func mendOuter(frame []byte, mend bool) {
	if mend && len(frame) > 34 && frame[12] == 8 && frame[13] == 0 && frame[14]&15 >= 5 &&
		len(frame) >= 14+int(frame[14]&15)*4 {
		mended(frame, 14)
	}
}

// TestDecapChanged changes frames at random and holds the program to the model.
func TestDecapChanged(t *testing.T) {
	o := newOpener(t, uint16(bpf.DecapLimitsGUE_PORT))
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	frames := seeds()
	verdicts := make(map[string]int)
	for range 20_000 {
		frame := slices.Clone(frames[random.IntN(len(frames))])
		for range random.IntN(4) {
			at := min(12+random.IntN(80), len(frame)-1)
			switch random.IntN(3) {
			case 0:
				frame[at] ^= 1 << random.IntN(8)
			case 1:
				frame[at] = byte(random.Uint32())
			case 2:
				frame = frame[:max(14, len(frame)-random.IntN(60))]
			}
		}
		mendOuter(frame, random.IntN(4) > 0)
		verdict, _ := modelled(frame)
		verdicts[verdict]++
		o.agree(frame)
	}
	if len(verdicts) < 15 {
		t.Errorf("the frames provoke too little: %v", verdicts)
	}
}

// TestDecapLayouts: what Go writes is what C reads.
func TestDecapLayouts(t *testing.T) {
	spec, err := bpf.LoadDecap()
	must(t, err)
	for name, sizes := range map[string][2]uintptr{
		bpf.DecapMapAddresses4: {4, 4},
		bpf.DecapMapAddresses6: {reflect.TypeFor[bpf.DecapAddress6]().Size(), 4},
		bpf.DecapMapSources4:   {reflect.TypeFor[bpf.DecapPrefix4]().Size(), 4},
		bpf.DecapMapSources6:   {reflect.TypeFor[bpf.DecapPrefix6]().Size(), 4},
		bpf.DecapMapCounters:   {4, reflect.TypeFor[bpf.DecapCounterSet]().Size()},
	} {
		equal(t, name, [2]uintptr{uintptr(spec.Maps[name].KeySize), uintptr(spec.Maps[name].ValueSize)}, sizes)
	}
	equal(t, "flags", spec.Programs[bpf.DecapProgFairleadDecap].Flags, uint32(unix.BPF_F_XDP_HAS_FRAGS))
}

// host is a namespace of the test's own with devices, and a pin path.
type host struct {
	bench
	path string
}

func newHost(t testing.TB, devices ...string) *host {
	t.Helper()
	path := bpffsRoot + "/fairlead-test-decap-" + strings.ToLower(strings.TrimPrefix(t.Name(), "TestDecap"))
	sweep := func() {
		left, err := filepath.Glob(path + "*")
		must(t, err)
		for _, path := range left {
			if _, err := RemoveDecap(path); err != nil && !errors.Is(err, ErrNothing) {
				t.Errorf("clean up: %v", err)
			}
		}
	}
	sweep()
	b := newBench(t, devices...)
	t.Cleanup(sweep)
	return &host{bench: *b, path: path}
}

func (h *host) decapOptions(device string) DecapOptions {
	return DecapOptions{Interface: device, PinPath: h.path, Logger: slog.New(slog.NewTextHandler(&h.log, nil))}
}

func (h *host) attach(opts DecapOptions) *Decap {
	h.Helper()
	d, err := AttachDecap(opts)
	must(h, err)
	h.Cleanup(func() { d.Close() })
	return d
}

func (h *host) read() *DecapState {
	h.Helper()
	s, err := ReadDecap(h.path)
	must(h, err)
	return s
}

func (h *host) addAddress(device, text string) *netlink.Addr {
	h.Helper()
	address, err := netlink.ParseAddr(text)
	must(h, err)
	address.Flags = unix.IFA_F_NODAD
	must(h, netlink.AddrAdd(h.device(device), address))
	return address
}

func (h *host) pins() []string {
	h.Helper()
	var pins []string
	must(h, filepath.WalkDir(h.path, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !entry.IsDir() {
			pins = append(pins, strings.TrimPrefix(path, h.path))
		}
		return nil
	}))
	return pins
}

// wantNothing: no program on the device, no pin path.
func (h *host) wantNothing(device string) {
	h.Helper()
	equal(h, "program on "+device, h.running(device), ebpf.ProgramID(0))
	if _, err := os.Stat(h.path); !errors.Is(err, os.ErrNotExist) {
		h.Errorf("the pin path is still there: %v", err)
	}
}

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func addresses(texts ...string) (all []netip.Addr) {
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited 10 s for %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// TestDecapLife: attached, replaced in place with other options, read, taken away.
func TestDecapLife(t *testing.T) {
	h := newHost(t, "fldecap.1")
	h.addAddress("fldecap.1", "10.0.0.11/24")
	h.addAddress("fldecap.1", "fd00:a::11/64")
	if _, err := ReadDecap(h.path); !errors.Is(err, ErrNothing) {
		t.Errorf("reading what is not there: %v", err)
	}
	opts := h.decapOptions("fldecap.1")
	opts.Sources = prefixes("10.0.0.0/24", "fd00:a::/64", "10.1.0.0/16")
	d := h.attach(opts)
	equal(t, "pins", h.pins(), []string{"/decap_v1/addresses4", "/decap_v1/addresses6", "/decap_v1/counters",
		"/decap_v1/sources4", "/decap_v1/sources6", "/link_fldecap%2e1"})
	first := h.read()
	equal(t, "program on the device", h.running("fldecap.1"), first.Attachment.Program)
	own := first.Addresses[len(first.Addresses)-1] // link-local
	want := DecapState{PinPath: h.path, PID: os.Getpid(), Attachment: Attachment{"fldecap.1",
		h.device("fldecap.1").Attrs().Index, ModeNative, first.Attachment.Program, first.Attachment.Link,
		h.path + "/link_fldecap%2e1"}, Addresses: append(addresses("10.0.0.11", "fd00:a::11"), own),
		Sources: prefixes("10.0.0.0/24", "10.1.0.0/16", "fd00:a::/64"), GUEPort: 6080,
		Verdicts: first.Verdicts, Events: first.Events}
	equal(t, "state", fmt.Sprintf("%+v", *first), fmt.Sprintf("%+v", want))
	if !own.IsLinkLocalUnicast() {
		t.Errorf("%v is not the interface's link-local address", own)
	}
	equal(t, "attachment", d.Attachment(), first.Attachment)
	equal(t, "number of verdicts", len(first.Verdicts), int(bpf.DecapVerdictVERDICT_COUNT))
	equal(t, "number of events", len(first.Events), int(bpf.DecapEventEVENT_COUNT))

	// Held by one process alone.
	var locked *LockedError
	if _, err := AttachDecap(opts); !errors.As(err, &locked) || locked.PID != os.Getpid() {
		t.Errorf("a second one on the pin path: %v", err)
	}
	if _, err := RemoveDecap(h.path); !errors.Is(err, ErrLocked) {
		t.Errorf("removed under its process: %v", err)
	}
	must(t, d.maps.Counters.Put(uint32(0), append(make([]bpf.DecapCounterSet, ebpf.MustPossibleCPU()-1),
		bpf.DecapCounterSet{Verdicts: [bpf.DecapVerdictVERDICT_COUNT]uint64{bpf.DecapVerdictOPENED_4IN4: 7}})))
	must(t, d.Close())
	must(t, d.Close())
	equal(t, "program after Close", h.running("fldecap.1"), first.Attachment.Program)
	equal(t, "process after Close", h.read().PID, 0)

	// In place, with other options. Counters go on.
	opts.Sources, opts.Addresses, opts.GUEPort = prefixes("10.1.0.0/16", "10.2.0.0/16"), addresses("192.0.2.1", "2001:db8::1",
		"::ffff:192.0.2.1"), 7000
	d = h.attach(opts)
	second := h.read()
	equal(t, "link", second.Attachment.Link, first.Attachment.Link)
	if second.Attachment.Program == first.Attachment.Program {
		t.Errorf("program %d is still the one before", second.Attachment.Program)
	}
	equal(t, "program on the device", h.running("fldecap.1"), second.Attachment.Program)
	equal(t, "sources", fmt.Sprint(second.Sources), "[10.1.0.0/16 10.2.0.0/16]")
	equal(t, "addresses", fmt.Sprint(second.Addresses), "[192.0.2.1 2001:db8::1]")
	equal(t, "gue port", second.GUEPort, uint16(7000))
	equal(t, "counter", second.Verdicts[bpf.DecapVerdictOPENED_4IN4], DecapCounter{"opened_4in4", 7})
	must(t, d.Close())

	// What fails changes nothing.
	wrong := opts
	wrong.Addresses = nil
	for i := range int(bpf.DecapLimitsMAX_ADDRESSES) + 1 {
		wrong.Addresses = append(wrong.Addresses, netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}))
	}
	wrong.Addresses = wrong.Addresses[1:]
	if _, err := AttachDecap(wrong); err == nil || !strings.Contains(err.Error(), "there is room for 1024 of each family") {
		t.Errorf("too many addresses: %v", err)
	}
	equal(t, "addresses after a failure", fmt.Sprint(h.read().Addresses), "[192.0.2.1 2001:db8::1]")
	equal(t, "program after a failure", h.running("fldecap.1"), second.Attachment.Program)
	for _, change := range []func(*DecapOptions){
		func(o *DecapOptions) { o.Addresses = addresses("0.0.0.0") },
		func(o *DecapOptions) { o.Addresses = addresses("ff02::1") },
		func(o *DecapOptions) { o.Sources = []netip.Prefix{{}} },
		func(o *DecapOptions) { o.Mode = "offload" },
		func(o *DecapOptions) { o.Interface = "fldecap.9" },
	} {
		wrong := opts
		change(&wrong)
		if d, err := AttachDecap(wrong); err == nil {
			t.Errorf("taken: %+v", wrong)
			d.Close()
		}
	}

	removed, err := RemoveDecap(h.path)
	must(t, err)
	equal(t, "number of pins removed", len(removed), 6)
	h.wantNothing("fldecap.1")
	if _, err := RemoveDecap(h.path); !errors.Is(err, ErrNothing) {
		t.Errorf("removed twice: %v", err)
	}
}

// TestDecapModes: generic where that is asked for; the mode of a link that stands is kept, and said.
func TestDecapModes(t *testing.T) {
	h := newHost(t, "fldecap")
	must(t, netlink.LinkSetDown(h.device("fldecap"))) // its link-local address goes
	opts := h.decapOptions("fldecap")
	opts.Mode = ModeGeneric
	must(t, h.attach(opts).Close())
	equal(t, "mode", h.read().Attachment.Mode, ModeGeneric)
	if !strings.Contains(h.log.String(), "nothing is opened until it gets one") {
		t.Errorf("that there is no address is not said:\n%s", h.log.String())
	}
	opts.Mode = ModeNative
	must(t, h.attach(opts).Close())
	equal(t, "mode after asking for another", h.read().Attachment.Mode, ModeGeneric)
	if !strings.Contains(h.log.String(), "keeps the xdp mode it was attached in") {
		t.Errorf("the mode kept is not said:\n%s", h.log.String())
	}
	_, err := RemoveDecap(h.path)
	must(t, err)
	must(t, h.attach(opts).Close())
	equal(t, "mode after a removal", h.read().Attachment.Mode, ModeNative)
}

// TestDecapFollows: the addresses are the interface's as they come and go, until the interface goes itself.
func TestDecapFollows(t *testing.T) {
	h := newHost(t, "fldecap", "flother")
	must(t, netlink.LinkSetDown(h.device("fldecap")))
	d := h.attach(h.decapOptions("fldecap"))
	equal(t, "addresses of an interface without any", d.Addresses(), []netip.Addr(nil))
	before := h.addAddress("fldecap", "10.0.0.10/24") // between attaching and Run
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	run := func() { ended <- d.Run(ctx) }
	go run()
	has := func(want string) {
		t.Helper()
		await(t, "addresses "+want, func() bool { return fmt.Sprint(h.read().Addresses) == want })
	}
	has("[10.0.0.10]")
	h.addAddress("fldecap", "10.0.0.11/24")
	h.addAddress("flother", "10.0.1.11/24")
	six := h.addAddress("fldecap", "fd00:a::11/64")
	has("[10.0.0.10 10.0.0.11 fd00:a::11]")
	must(t, netlink.AddrDel(h.device("fldecap"), six))
	must(t, netlink.AddrDel(h.device("fldecap"), before)) // its secondary goes with it
	has("[]")
	for i := range 200 {
		h.addAddress("fldecap", fmt.Sprintf("10.0.%d.1/32", i))
	}
	await(t, "200 addresses", func() bool { return len(h.read().Addresses) == 200 })
	cancel()
	must(t, <-ended)

	// Not followed while nobody runs; caught up with by the next start.
	must(t, d.Close())
	h.addAddress("fldecap", "10.9.0.1/24")
	equal(t, "addresses while nobody runs", len(h.read().Addresses), 200)
	d = h.attach(h.decapOptions("fldecap"))
	equal(t, "addresses after a start", len(h.read().Addresses), 201)
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	go run()
	must(t, netlink.LinkDel(h.device("fldecap")))
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "nothing is opened on fldecap any more") {
		t.Errorf("Run on an interface that is gone: %v", err)
	}
	await(t, "an index of 0, as the interface is gone", func() bool { return h.read().Attachment.Index == 0 })
	must(t, d.Close())
	h.addDevice("fldecap")
	d = h.attach(h.decapOptions("fldecap"))
	equal(t, "program on the interface that came", h.running("fldecap"), d.Attachment().Program)

	// Given addresses are not the interface's.
	must(t, d.Close())
	opts := h.decapOptions("fldecap")
	opts.Addresses = addresses("10.0.0.99")
	d = h.attach(opts)
	go run()
	h.addAddress("fldecap", "10.0.0.11/24")
	l, err := link.LoadPinnedLink(h.path+"/link_fldecap", nil)
	must(t, err)
	defer l.Close()
	must(t, l.Detach())
	h.addAddress("fldecap", "10.0.0.12/24") // news, by which it is noticed
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "the link was detached") {
		t.Errorf("Run on a detached link: %v", err)
	}
	equal(t, "addresses that were given", fmt.Sprint(h.read().Addresses), "[10.0.0.99]")
}

// TestDecapForeign: another's program is named and left alone; so are the pins of another interface.
func TestDecapForeign(t *testing.T) {
	h := newHost(t, "fldecap", "flother")
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "stranger", Type: ebpf.XDP, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()}})
	must(t, err)
	defer program.Close()
	strange, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: h.device("fldecap").Attrs().Index})
	must(t, err)
	var foreign *ForeignError
	if _, err := AttachDecap(h.decapOptions("fldecap")); !errors.As(err, &foreign) || foreign.Name != "stranger" {
		t.Errorf("with a stranger's program: %v", err)
	}
	equal(t, "program on the device", h.running("fldecap"), programID(program))
	if _, err := os.Stat(h.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed start left its pin path: %v", err)
	}
	must(t, strange.Close())
	await(t, "the stranger's end", func() bool { return h.running("fldecap") == 0 })

	d := h.attach(h.decapOptions("fldecap"))
	beside := h.decapOptions("fldecap")
	beside.PinPath += "-beside"
	if _, err := AttachDecap(beside); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(),
		"`fairlead decap --interface fldecap --pin-path DIRECTORY --remove`") {
		t.Errorf("beside another decap: %v", err)
	}
	must(t, d.Close())
	if _, err := AttachDecap(h.decapOptions("flother")); err == nil || !strings.Contains(err.Error(), "of another interface") {
		t.Errorf("with the pins of another interface: %v", err)
	}
	equal(t, "program on the other device", h.running("flother"), ebpf.ProgramID(0))

	// The same number in another namespace is another device.
	home, err := netns.Get() // else the devices end with the namespace
	must(t, err)
	defer home.Close()
	must(t, unix.Unshare(unix.CLONE_NEWNET))
	h.addDevice("flfirst")
	h.addDevice("fldecap")
	for _, name := range []string{"flfirst", "fldecap"} {
		if _, err := AttachDecap(h.decapOptions(name)); err == nil || !strings.Contains(err.Error(), "namespace") {
			t.Errorf("with the pins of another namespace: %v", err)
		}
	}
}

// TestDecapUnfinished: what a killed start or another version has left is cleared away.
func TestDecapUnfinished(t *testing.T) {
	h := newHost(t, "fldecap")
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(t, err)
	defer m.Close()
	for _, dir := range []string{"decap_v1-new", "decap_v0", "decap_v7", "decap_v7-new"} {
		must(t, os.MkdirAll(filepath.Join(h.path, dir), 0o700))
		must(t, m.Pin(filepath.Join(h.path, dir, "addresses4")))
		m, err = m.Clone()
		must(t, err)
		defer m.Close()
	}
	must(t, h.attach(h.decapOptions("fldecap")).Close())
	equal(t, "number of pins", len(h.pins()), 6)

	// A map that somebody else put there is not taken for ours.
	pin := h.path + "/decap_v1/sources4"
	must(t, os.Remove(pin))
	must(t, m.Pin(pin))
	if _, err := AttachDecap(h.decapOptions("fldecap")); err == nil || !strings.Contains(err.Error(), "adopt "+pin) {
		t.Errorf("with a strange map: %v", err)
	}
	// One that is missing is made anew.
	must(t, os.Remove(pin))
	opts := h.decapOptions("fldecap")
	opts.Sources = prefixes("10.0.0.0/24")
	must(t, h.attach(opts).Close())
	equal(t, "sources", fmt.Sprint(h.read().Sources), "[10.0.0.0/24]")

	// Maps without a link, of a start that was killed before it pinned that.
	must(t, detachPin(h.path+"/link_fldecap"))
	must(t, os.Remove(h.path+"/link_fldecap"))
	if _, err := ReadDecap(h.path); !errors.Is(err, ErrNothing) {
		t.Errorf("reading maps without a link: %v", err)
	}
	must(t, h.attach(opts).Close())
	_, err = RemoveDecap(h.path)
	must(t, err)
	h.wantNothing("fldecap")
}
